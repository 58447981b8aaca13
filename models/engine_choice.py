"""Which engine runs a model fastest on this machine: measured, compared, and remembered.

How fast an engine is depends on model, processor and version, so nothing is believed: every engine
that is installed runs the same picture in turn with the others, with each number of threads, and
what it finds is compared with what ONNX Runtime finds. ``auto`` takes the fastest that sees the
same.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import onnxruntime

from .agreement import RunningAgreement
from .detections import Detections
from .detector import OnnxDetector
from .emulator import cache_folder
from .engines import CPU, PROVIDERS, offered
from .errors import EdgeSightError, ModelFileError
from .files import is_file, sha256, write_json
from .machine import machine
from .preprocess import Image

SCORE = 0.35
"""Of the boxes that are compared: what a viewer sees."""
SAME_MIN = 95.0
"""Percent agreement (F1) with ONNX Runtime's boxes; an engine below it is not taken by itself."""
WARM_UP = 3
ROUNDS = 20
VERSION = 1

Progress = Callable[[Iterable[Any]], Iterable[Any]]


@dataclass(frozen=True)
class Candidate:
    """One engine with a number of threads, measured.

    Attributes:
        engine: Key of ``engines.ENGINES``.
        threads: Of the network.
        p50_ms: Median milliseconds of the bare network; NaN if it does not run.
        p90_ms: Of ten, nine are faster.
        same: Percent agreement of its boxes with ONNX Runtime's; None if neither found any.
        note: Why it does not run; None if it does.
    """

    engine: str
    threads: int
    p50_ms: float
    p90_ms: float
    same: float | None = None
    note: str | None = None

    @property
    def usable(self) -> bool:
        """Whether it runs, and sees what ONNX Runtime sees."""
        return self.note is None and (self.same is None or self.same >= SAME_MIN)


def thread_counts(most: int) -> list[int]:
    """Returns the numbers of threads worth trying: 1, 2, 4, ... and ``most``."""
    return sorted({1, most, *(2**n for n in range(most.bit_length()) if 2**n <= most)})


def measure(
    path: Path,
    images: Sequence[Image],
    threads: Sequence[int],
    *,
    engines: Sequence[str] | None = None,
    head: str | None = None,
    rounds: int = ROUNDS,
    progress: Progress = iter,
) -> list[Candidate]:
    """Runs a model in every engine that is installed, in turn, with each number of threads.

    Args:
        path: The ONNX file.
        images: BGR pictures; the first is timed, all are compared.
        threads: Numbers of threads.
        engines: Which; all that are installed by default.
        head: Of a foreign model whose file does not tell.
        rounds: Timed runs of each.
        progress: Wraps the rounds.

    Returns:
        All that were tried, the fastest first, those that do not run last.

    Raises:
        ModelFileError: Not even ONNX Runtime can run the file.
        InputError: An engine that was named is not installed.
    """
    plain = OnnxDetector(path, head=head)
    wanted = [_found(plain, image) for image in images]
    tensor, _ = plain.preprocess(images[0])
    failed, running = list[Candidate](), list[tuple[OnnxDetector, int, float | None]]()
    for name in engines or offered():
        for count in threads[:1] if name in PROVIDERS else threads:  # a GPU has its own
            one = OnnxDetector(path, head=head, threads=count, engine=name)
            if one.engine != name:
                failed.append(Candidate(name, count, math.nan, math.nan, None, one.engine_note))
                continue
            try:
                same = None if name == CPU else _agreement(one, images, wanted)
            except EdgeSightError as error:  # it ran an empty picture, and fails on a real one
                failed.append(Candidate(name, count, math.nan, math.nan, None, str(error)))
                continue
            running.append((one, count, same))
    times: list[list[float]] = [[] for _ in running]
    broken: dict[int, str] = {}
    for turn in progress(range(rounds + WARM_UP)):
        for place, ((one, _, _), own) in enumerate(zip(running, times, strict=True)):
            if place in broken:
                continue
            began = time.perf_counter()
            try:
                one.infer(tensor)
            except EdgeSightError as error:
                broken[place] = str(error)
            if turn >= WARM_UP:
                own.append(1000 * (time.perf_counter() - began))
    done = []
    for place, ((one, count, same), own) in enumerate(zip(running, times, strict=True)):
        if place in broken:
            failed.append(Candidate(one.engine, count, math.nan, math.nan, None, broken[place]))
        else:
            done.append(Candidate(one.engine, count, statistics.median(own), _p90(own), same))
    return [*sorted(done, key=lambda one: one.p50_ms), *failed]


def fastest(found: Sequence[Candidate]) -> Candidate:
    """Returns the fastest that sees what ONNX Runtime sees; ONNX Runtime always does."""
    return min((one for one in found if one.usable), key=lambda one: one.p50_ms)


def choose(
    path: Path,
    images: Sequence[Image],
    threads_max: int,
    *,
    head: str | None = None,
    exactly: bool = False,
) -> tuple[Candidate, bool]:
    """Returns the engine to use, measured now or remembered from an earlier time.

    What is remembered holds for this model, processor, number of threads and these versions.

    Args:
        path: The ONNX file.
        images: BGR pictures to compare on.
        threads_max: At most so many threads.
        head: Of a foreign model whose file does not tell.
        exactly: Just so many threads.

    Returns:
        The choice, and whether it was remembered.

    Raises:
        ModelFileError: The file cannot be used.
    """
    if not is_file(path):
        message = f"{path}: expected an ONNX model, found no such file; check the path"
        raise ModelFileError(message)
    counts = [threads_max] if exactly else thread_counts(threads_max)
    store = _store(path, counts)
    known = _read(store)
    if known is not None and known.engine in offered():
        return known, True
    best = fastest(measure(path, images, counts, head=head))
    try:
        store.parent.mkdir(parents=True, exist_ok=True)
        write_json(store, {"version": VERSION, "model": path.name, **asdict(best)})
    except (EdgeSightError, OSError):
        pass  # a cache that cannot be written is no reason not to run
    return best, False


def _store(path: Path, threads: Sequence[int]) -> Path:
    here = machine()
    here["engines"] = {name: _version(name) for name in offered()}
    here["threads"] = list(threads)
    here["cores"] = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None
    told = hashlib.sha256(json.dumps(here, sort_keys=True).encode()).hexdigest()
    return cache_folder() / "engines" / f"{sha256(path)[:24]}-{told[:16]}.json"


def _version(name: str) -> str:
    if name != "openvino":
        return str(onnxruntime.__version__)
    from importlib.metadata import version

    return version(name)


def _read(store: Path) -> Candidate | None:
    try:
        values = json.loads(store.read_text(encoding="utf-8"))
        if values.pop("version") != VERSION:
            return None
        values.pop("model")
        found = Candidate(**values)
        sound = isinstance(found.threads, int) and found.threads >= 1
        return found if sound and isinstance(found.engine, str) and found.p50_ms > 0 else None
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return None


def _found(detector: OnnxDetector, image: Image) -> Detections:
    return detector(image, SCORE)


def _agreement(
    detector: OnnxDetector, images: Sequence[Image], wanted: Sequence[Detections]
) -> float | None:
    running = RunningAgreement()
    for image, reference in zip(images, wanted, strict=True):
        running.add(_found(detector, image), reference)
    result = running.result()
    return None if result is None else result.f1.value


def _p90(times: Sequence[float]) -> float:
    return statistics.quantiles(times, n=10)[-1] if len(times) > 1 else times[0]
