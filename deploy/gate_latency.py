"""Is the new model as fast as the old one? Both in one process, in short turns, on the same photos.

Within a block of a few hundred milliseconds both models see the same machine, so each block's times
are divided by the block's own level, and only what differs within blocks is compared; who is first
is drawn by lot. The interval comes from drawing blocks, not inferences, with replacement:
neighbours in time are alike.

Where the network computes on one thread of the processor, the time that the processor spent on it
is compared: another program that takes the core for 10 ms adds to the wall clock, not to it. The
wall clock's figures are told beside it, and are compared where several threads or another device
do the work (wall and processor time then differ even when nothing else runs).

    pass    the slowdown is shown to be below ``slowdown_max``
    fail    else, a slowdown is shown (the interval lies above a ratio of 1)
    else    not enough evidence: time more blocks, or a quieter machine

``level`` holds for each end by itself: a model slower by exactly ``slowdown_max`` passes in at most
5 of 100 gates, and one of equal speed fails in at most 5 of 100.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ..models.detections import Detections
from ..models.preprocess import Image
from .verdict import Check, Outcome

DoubleArray = npt.NDArray[np.float64]

BLOCKS, PER_BLOCK = 60, 8
BLOCKS_MIN = 10
WARM_UP = 10
RESAMPLES = 2000
SLOWDOWN_MAX = 0.05
LEVEL = 0.95
RANKS = {"p50": 0.5, "p90": 0.9}
QUIET_RANK = 0.1
"""The tenth of inferences that least disturbed it: there wall and processor time are compared."""
ALONE = (0.8, 1.1)
"""Processor time over wall time of what computes on one thread, where nothing disturbs it."""


@dataclass(frozen=True, eq=False)
class Pairs:
    """Times of two detectors in turns, milliseconds, float64 ``(blocks, inferences)``.

    Attributes:
        new_ms: Of the new one, by the wall clock.
        old_ms: Of the old one.
        new_cpu_ms: Processor time of the new one; None where it is not known.
        old_cpu_ms: Of the old one.
    """

    new_ms: DoubleArray
    old_ms: DoubleArray
    new_cpu_ms: DoubleArray | None = None
    old_cpu_ms: DoubleArray | None = None


def measure_pairs(
    new: Callable[[Image], Detections],
    old: Callable[[Image], Detections],
    pictures: Sequence[Image],
    *,
    blocks: int = BLOCKS,
    per_block: int = PER_BLOCK,
    warm_up: int = WARM_UP,
    seed: int = 0,
    progress: bool = True,
) -> Pairs:
    """Times two detectors from picture to boxes in alternating short blocks.

    Args:
        new: The new detector.
        old: The old one.
        pictures: BGR; both get the same ones in the same order, again and again.
        blocks: So many turns of each.
        per_block: Inferences of a turn.
        warm_up: Inferences of each before the first turn.
        seed: Of the draw of who is first.
        progress: Whether to show a bar on stderr.
    """
    from tqdm import tqdm

    random = np.random.default_rng(seed)
    detectors = (new, old)
    for turn in range(warm_up):
        for detector in detectors:
            detector(pictures[turn % len(pictures)])
    times = np.zeros((2, 2, blocks, per_block))  # who, by which clock
    for block in tqdm(
        range(blocks), desc="latency", unit="block", disable=None if progress else True
    ):
        for who in random.permutation(2):
            for turn in range(per_block):
                picture = pictures[(block * per_block + turn) % len(pictures)]
                wall, cpu = time.perf_counter(), time.process_time()
                detectors[who](picture)
                spent = time.process_time() - cpu, time.perf_counter() - wall
                times[who, :, block, turn] = 1000 * spent[1], 1000 * spent[0]
    return Pairs(times[0, 0], times[1, 0], times[0, 1], times[1, 1])


def latency_checks(
    pairs: Pairs,
    *,
    slowdown_max: float = SLOWDOWN_MAX,
    resamples: int = RESAMPLES,
    seed: int = 0,
    level: float = LEVEL,
) -> list[Check]:
    """Compares the two detectors' p50 and p90.

    Args:
        pairs: What ``measure_pairs`` gives.
        slowdown_max: Slowdown that is not accepted any more, as a share of the old time.
        resamples: Of the blocks.
        seed: Of the draw.
        level: Of each end of the intervals by itself.

    Returns:
        ``latency p50`` and ``latency p90``.
    """
    clock, new, old = _steady(pairs)
    walls = ratios(pairs.new_ms, pairs.old_ms, resamples=resamples, seed=seed, level=level)
    found = walls
    if clock != "wall":
        found = ratios(new, old, resamples=resamples, seed=seed, level=level)
    checks = []
    for rank, share in RANKS.items():
        figures = {
            "new_ms": _round(np.quantile(pairs.new_ms, share)),
            "old_ms": _round(np.quantile(pairs.old_ms, share)),
            f"new_{clock}_ms": _round(np.quantile(new, share)),
            f"old_{clock}_ms": _round(np.quantile(old, share)),
            "clock": clock,
            "ratio": _round(found[rank][0]),
            "low": _round(found[rank][1]),
            "high": _round(found[rank][2]),
            "wall_ratio": [_round(value) for value in walls[rank]],
            "slowdown_max": slowdown_max,
            "level_per_end": level,
            "blocks": len(new),
            "inferences": int(new.size),
        }
        checks.append(_check(rank, figures, found[rank], slowdown_max))
    return checks


def ratios(
    new: DoubleArray,
    old: DoubleArray,
    *,
    resamples: int = RESAMPLES,
    seed: int = 0,
    level: float = LEVEL,
) -> dict[str, tuple[float, float, float]]:
    """Returns new over old at each rank, with lower and upper limit, by drawing blocks.

    Args:
        new: Milliseconds ``(blocks, inferences)``.
        old: The same of the old one.
        resamples: Of the blocks.
        seed: Of the draw.
        level: Of each end by itself.
    """
    middle = np.sqrt(np.median(new, axis=1) * np.median(old, axis=1))[:, None]
    scaled = [new / middle, old / middle]
    count = len(new)
    drawn = np.random.default_rng(seed).integers(0, count, (resamples, count))
    result = {}
    for rank, share in RANKS.items():
        first, second = (np.quantile(one, share) for one in scaled)
        many = [np.quantile(one[drawn].reshape(resamples, -1), share, axis=1) for one in scaled]
        low, high = np.quantile(many[0] / many[1], [1 - level, level])
        result[rank] = float(first / second), float(low), float(high)
    return result


def _steady(pairs: Pairs) -> tuple[str, DoubleArray, DoubleArray]:
    """Returns the clock to compare by, and both detectors' times by it."""
    if pairs.new_cpu_ms is not None and pairs.old_cpu_ms is not None:
        both = ((pairs.new_ms, pairs.new_cpu_ms), (pairs.old_ms, pairs.old_cpu_ms))
        shares = [float(np.quantile(cpu / wall, 1 - QUIET_RANK)) for wall, cpu in both]
        if all(ALONE[0] <= share <= ALONE[1] for share in shares):
            return "cpu", pairs.new_cpu_ms, pairs.old_cpu_ms
    return "wall", pairs.new_ms, pairs.old_ms


def _check(
    rank: str, figures: dict[str, Any], found: tuple[float, float, float], slowdown_max: float
) -> Check:
    value, low, high = (100 * (one - 1) for one in found)
    limit = 100 * slowdown_max
    what = "processor time" if figures["clock"] == "cpu" else "wall clock"
    text = (
        f"{value:+.1f} % [{low:+.1f}, {high:+.1f}] of {what} "
        f"({figures['old_ms']:.2f} -> {figures['new_ms']:.2f} ms by the wall clock)"
    )
    outcome: Outcome
    if figures["blocks"] < BLOCKS_MIN:
        outcome = "not enough evidence"
        text = (
            f"expected at least {BLOCKS_MIN} blocks, found {figures['blocks']}: {text}; time more"
        )
    elif high < limit:
        outcome, text = "pass", f"expected a slowdown below {limit:g} %, found {text}"
    elif low > 0:
        outcome = "fail"
        text = f"expected a slowdown below {limit:g} %, found {text}; compare both with `bench`"
    else:
        outcome = "not enough evidence"
        text = (
            f"expected a slowdown shown to be below {limit:g} %, found {text}; time it again when "
            "the machine is quieter, or with more blocks"
        )
    return Check(f"latency {rank}", "latency", outcome, text, figures)


def _round(value: float) -> float:
    return round(float(value), 4)
