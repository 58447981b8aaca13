"""What a model takes besides time per frame: file size, memory, and how long it takes to start.

Memory and start time are those of processes of their own, the two models taking turns, so that
nothing of the one counts for the other and a busy machine slows down both.
"""

from __future__ import annotations

import contextlib
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ..models.errors import ModelFileError
from .verdict import Check, Outcome

ROUNDS = 5
INFERENCES = 3
TIME_MAX_S = 120.0
SIZE_MORE = 0.10
MEMORY_MORE, MEMORY_MORE_BYTES = 0.20, 20_000_000
START_MORE, START_MORE_S = 0.50, 0.2


@dataclass(frozen=True)
class Cost:
    """What processes of their own said of one model.

    Attributes:
        start_s: Loading the file and the first inference, per round.
        memory_bytes: Largest resident memory of the whole process, per round.
    """

    start_s: tuple[float, ...]
    memory_bytes: tuple[int, ...]

    @property
    def memory(self) -> int:
        """Median of the rounds, in bytes."""
        return int(statistics.median(self.memory_bytes))

    @property
    def start(self) -> float:
        """Median of the rounds, in seconds."""
        return statistics.median(self.start_s)

    def to_json(self) -> dict[str, Any]:
        """Returns it JSON-ready."""
        return asdict(self)


def measure_costs(
    new: Path,
    old: Path,
    *,
    rounds: int = ROUNDS,
    threads: int = 1,
    time_max_s: float = TIME_MAX_S,
    progress: bool = True,
) -> tuple[Cost, Cost]:
    """Starts each model ``rounds`` times in a process of its own, in turn.

    Args:
        new: One ONNX file.
        old: The other.
        rounds: Processes for each.
        threads: Of an inference.
        time_max_s: Longest that one may take.
        progress: Whether a bar stands on stderr.

    Raises:
        ModelFileError: A file does not run, or hangs.
    """
    found: dict[Path, list[dict[str, float]]] = {new: [], old: []}
    turns = [(new, old) if number % 2 == 0 else (old, new) for number in range(rounds)]
    steps = [path for turn in turns for path in turn]
    for path in tqdm(steps, "starting", unit="start", file=sys.stderr, disable=not progress):
        found[path].append(_measured(path, threads, time_max_s))
    both = [
        Cost(
            tuple(round(float(row["start_s"]), 6) for row in found[path]),
            tuple(int(row["memory_bytes"]) for row in found[path]),
        )
        for path in (new, old)
    ]
    return both[0], both[1]


def size_check(new: int, old: int, more: float = SIZE_MORE) -> Check:
    """Compares file sizes in bytes."""
    told = f"{new / 1e6:.2f} MB, {old / 1e6:.2f} MB of the old model ({_change(new, old)})"
    figures = {"new_bytes": new, "old_bytes": old, "limit": more}
    if new <= old * (1 + more):
        return Check("file size", "cost", "pass", told, figures)
    text = f"expected at most {100 * more:.0f} % more, found {told}; compress it, or --size-max"
    return Check("file size", "cost", "fail", text, figures)


def cost_checks(
    new: Cost, old: Cost, *, memory_more: float = MEMORY_MORE, start_more: float = START_MORE
) -> list[Check]:
    """Compares memory and start time.

    Args:
        new: Of the new model.
        old: Of the old one, measured in turn with it.
        memory_more: Part more that is let pass; 20 MB more always are.
        start_more: Part more that is let pass; 0.2 s more always are.
    """
    return [_memory(new, old, memory_more), _start(new, old, start_more)]


def _memory(new: Cost, old: Cost, more: float) -> Check:
    limit = old.memory + max(more * old.memory, MEMORY_MORE_BYTES)
    told = (
        f"{new.memory / 1e6:.0f} MB at its peak, {old.memory / 1e6:.0f} MB of the old model "
        f"({_change(new.memory, old.memory)})"
    )
    figures = {"new_bytes": new.memory, "old_bytes": old.memory, "limit_bytes": int(limit)}
    if new.memory <= limit:
        return Check("memory", "cost", "pass", told, figures)
    text = (
        f"expected at most {limit / 1e6:.0f} MB, found {told}; look for large constants and "
        "feature maps with edgesight inspect"
    )
    return Check("memory", "cost", "fail", text, figures)


def _start(new: Cost, old: Cost, more: float) -> Check:
    def over(ours: float, theirs: float) -> bool:
        return ours > theirs + max(more * theirs, START_MORE_S)

    told = (
        f"{1000 * new.start:.0f} ms, {1000 * old.start:.0f} ms of the old model "
        f"({_change(new.start, old.start)}; medians of {len(new.start_s)})"
    )
    figures = {"new_s": new.start, "old_s": old.start, "limit": more}
    slow_often = over(new.start, old.start)
    slow_at_best = over(min(new.start_s), min(old.start_s))  # a busy machine slows some, not all
    outcome: Outcome = "pass"
    text = told
    if slow_often and slow_at_best:
        outcome = "fail"
        text = f"expected at most {100 * more:.0f} % more, found {told}; it loads or unpacks more"
    elif slow_often:
        outcome = "not enough evidence"
        text = f"{told}, but not in its fastest start; measure again while the machine is idle"
    return Check("start time", "cost", outcome, text, figures)


def _change(new: float, old: float) -> str:
    return f"{100 * (new / old - 1):+.0f} %" if old else "n/a"


def _measured(path: Path, threads: int, time_max_s: float) -> dict[str, float]:
    command = [sys.executable, "-m", __name__, str(path.absolute()), str(threads)]
    parents = [str(Path(entry).absolute()) for entry in sys.path if entry]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(parents)}
    pipe, nowhere = subprocess.PIPE, subprocess.DEVNULL
    try:
        done = subprocess.run(
            command, stdin=nowhere, stdout=pipe, stderr=nowhere, text=True, env=environment,
            timeout=time_max_s, cwd=os.sep, check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired as error:
        message = f"{path}: expected a model that runs, found one that hangs ({time_max_s:.0f} s)"
        raise ModelFileError(message) from error
    except OSError as error:
        message = f"{path}: expected to start it in a process of its own, found: {error}"
        raise ModelFileError(message) from error
    with contextlib.suppress(ValueError, IndexError):
        said = json.loads(done.stdout.strip().splitlines()[-1])
        if isinstance(said, dict) and done.returncode == 0:
            return said
    message = (
        f"{path}: expected a model that runs, found one that ends its process "
        f"(exit code {done.returncode}); edgesight inspect says more"
    )
    raise ModelFileError(message)


def peak_memory() -> int:
    """Returns the largest resident memory that this process had so far, in bytes."""
    with contextlib.suppress(OSError, ValueError):
        # Linux's getrusage also counts what the process that started this one had taken.
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return 1024 * int(line.split()[1])
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def main(words: Sequence[str]) -> int:
    """Opens one model and runs it; prints what that took as one JSON object."""
    import numpy as np

    from ..models.detector import OnnxDetector

    path, threads = words
    begin = time.perf_counter()
    detector = OnnxDetector(Path(path), threads=int(threads))
    started = time.perf_counter() - begin
    size = (*detector.spec.input_hw, 3)
    picture = np.random.default_rng(0).integers(0, 256, size, dtype=np.uint8)
    for _ in range(INFERENCES):
        detector(picture)
    print(json.dumps({"start_s": started, "memory_bytes": peak_memory()}))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
