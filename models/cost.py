"""Instructions per frame of ONNX files on another processor core, counted and remembered.

ONNX Runtime runs in an emulated computer (``emulator``) with one thread; what comes back are
instructions of one inference. They are not milliseconds (no cache, bandwidth or issue width), but
they rank variants of a network on a core, repeatably, without the board.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from .core_costs import CORES
from .cost_guest import MARK
from .emulator import (
    FORMAT,
    EmulatorError,
    Guest,
    boot,
    cache_folder,
    find_guest,
    find_qemu,
    make_guest,
    qemu_version,
)
from .errors import InputError, ModelFileError, OutputError
from .files import is_file, write_json

RUNS = 3
SILENCE_S = 600.0


@dataclass(frozen=True)
class NodeCost:
    """What one operator of ONNX Runtime's optimised graph takes.

    Attributes:
        name: Of the node in the optimised graph.
        op: Its operator.
        shapes: Of its outputs.
        instructions: Median; the profiler's own share, even over all nodes, is taken off.
    """

    name: str
    op: str
    shapes: tuple[tuple[int, ...], ...]
    instructions: int


@dataclass(frozen=True)
class Cost:
    """What one inference takes on a core.

    Attributes:
        instructions: Median of the runs after a first one.
        spread: Largest minus smallest run, over the median.
        runs: How many were counted.
        finite: All outputs for the random input are finite.
        core: That was emulated.
        onnxruntime: Version that ran.
        qemu: Version that emulated.
        nodes: Operators in the order in which they run; empty if they were not asked for.
    """

    instructions: int
    spread: float
    runs: int
    finite: bool
    core: str
    onnxruntime: str
    qemu: str
    nodes: tuple[NodeCost, ...] = ()


def count(
    models: Sequence[Path],
    core: str,
    *,
    runs: int = RUNS,
    layers: bool = False,
    timeout_s: float = SILENCE_S,
    progress: bool = True,
) -> list[Cost | ModelFileError]:
    """Counts instructions of one inference of each file; results are cached by content.

    Inputs are random numbers of a fixed seed, the batch is 1 where it is free.

    Args:
        models: ONNX files with their weights inside.
        core: One of ``CORES``.
        runs: Inferences to count after a first one.
        layers: Count each operator, too.
        timeout_s: Longest that one model may take, in seconds of this machine.
        progress: Show bars.

    Returns:
        For each file what it costs, or why it cannot be said; one file does not harm the others.

    Raises:
        InputError: The core is not known.
        MissingExtraError: The emulator, apt or pip is not installed.
        DownloadError: The emulated computer's packages cannot be had.
        EmulatorError: The emulated computer does not start.
    """
    if core not in CORES:
        message = f"expected a core of {', '.join(CORES)}, found {core!r}"
        raise InputError(message)
    version = qemu_version(find_qemu())
    guest = make_guest(progress=progress)
    found: dict[int, Cost | ModelFileError] = {}
    contents: dict[int, bytes] = {}
    places: dict[int, Path] = {}
    for number, path in enumerate(models):
        try:
            content = _read(path)
        except ModelFileError as error:
            found[number] = error
            continue
        places[number] = _place(hashlib.sha256(content).hexdigest(), core, guest, version)
        known = _load(places[number])
        if known is not None and known.runs >= runs and (known.nodes or not layers):
            found[number] = known
        else:
            contents[number] = content
    hidden = not (progress and contents)
    with tqdm(total=len(contents), desc=core, unit="model", disable=hidden) as bar:
        while contents:
            for number, answer in _boot_once(guest, core, contents, runs, layers, timeout_s):
                del contents[number]
                bar.update()
                if isinstance(answer, str):
                    text = answer.replace(f"/models/{number}.onnx", models[number].name)
                    message = f"{models[number]}: cannot be counted on {core}: {text}"
                    found[number] = ModelFileError(message)
                else:
                    found[number] = cost = _cost(answer, core, guest, version)
                    _save(places[number], cost)
    return [found[number] for number in range(len(models))]


def cached(path: Path, core: str) -> Cost | None:
    """Returns what was counted before for a file with this content; None if it was not.

    Raises:
        MissingExtraError: The emulator is not installed.
        ModelFileError: The file cannot be read.
    """
    guest = find_guest()
    if guest is None:
        return None
    digest = hashlib.sha256(_read(path)).hexdigest()
    return _load(_place(digest, core, guest, qemu_version(find_qemu())))


def _read(path: Path) -> bytes:
    if not is_file(path):
        message = f"{path}: expected an ONNX model, found no such file; check the path"
        raise ModelFileError(message)
    try:
        return path.read_bytes()
    except OSError as error:
        message = f"{path}: cannot be read: {error.strerror or error}"
        raise ModelFileError(message) from error


def _boot_once(
    guest: Guest,
    core: str,
    contents: Mapping[int, bytes],
    runs: int,
    layers: bool,
    timeout_s: float,
) -> Iterator[tuple[int, dict[str, Any] | str]]:
    """Yields number and what was found, or why not, of each model until one ends the guest."""
    asked = {"numbers": list(contents), "runs": runs, "layers": layers}
    files = {f"models/{number}.onnx": content for number, content in contents.items()}
    files["models/asked.json"] = json.dumps(asked).encode()
    current: int | None = None
    begun = False
    heard = "nothing"
    why = "it ended the emulated computer (out of memory?)"
    try:
        for line in boot(guest, core, files, timeout_s):
            mark, _, text = line.partition("\t")
            heard = line.strip() or heard
            if mark != MARK:
                continue
            said = json.loads(text)
            if "begin" in said:
                current, begun = said["begin"], True
            elif "done" in said:
                current = None
                yield said["done"], said
            elif "failed" in said:
                current = None
                yield said["failed"], said["why"]
    except EmulatorError as error:
        if current is None:
            raise
        why = str(error)
    if current is not None:
        yield current, why
    elif not begun:
        message = f"expected the emulated {core} to start, found on its console: {heard[-200:]}"
        raise EmulatorError(message)


def _cost(said: dict[str, Any], core: str, guest: Guest, version: str) -> Cost:
    runs = [int(run) for run in said["runs"]]
    middle = round(statistics.median(runs))
    nodes = said.get("nodes", [])
    excess = max(0.0, (sum(node[3] for node in nodes) - middle) / max(1, len(nodes)))
    return Cost(
        instructions=middle,
        spread=(max(runs) - min(runs)) / middle,
        runs=len(runs),
        finite=bool(said["finite"]),
        core=core,
        onnxruntime=guest.onnxruntime,
        qemu=version,
        nodes=tuple(
            NodeCost(name, op, tuple(map(tuple, shapes)), max(0, round(count - excess)))
            for name, op, shapes, count in nodes
        ),
    )


def _place(digest: str, core: str, guest: Guest, version: str) -> Path:
    name = f"{digest}-{core}-ort{guest.onnxruntime}-qemu{version}-guest{FORMAT}.json"
    return cache_folder() / "costs" / name


def _load(place: Path) -> Cost | None:
    """Returns a stored cost; None if there is none that can be read."""
    try:
        values = json.loads(place.read_text())
        nodes = (
            NodeCost(n["name"], n["op"], tuple(map(tuple, n["shapes"])), n["instructions"])
            for n in values.pop("nodes")
        )
        return Cost(**values, nodes=tuple(nodes))
    except (OSError, ValueError, TypeError, KeyError):
        return None


def _save(place: Path, cost: Cost) -> None:
    """Stores a cost; a cache that cannot be written is no reason to lose the figure."""
    with contextlib.suppress(OutputError):
        write_json(place, asdict(cost))
