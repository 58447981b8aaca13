"""How often the gate itself is wrong on this machine and data: equal models, seeded losses, speed.

Models: the given one with a little noise on its weights, several times. They see differently, as a
compressed model does, and those that have almost the same AP on all photos are taken in pairs: the
truth of "equal" is known. A loss is seeded by blurring one model's scores or corners until its AP
on all photos is exactly 1.5 margins below the other's.

A trial draws as many photos as there are, with replacement, and runs the whole gate on them: the
photos at hand stand for all photos of their kind, and the truth is what it is on all of them. Speed
is measured once for long, with two sessions of the same file, and with one that really works so
much longer (scaled so that the ratio of p90 is exact); a trial draws its blocks from that.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from ..models.dataset import Dataset, map_classes
from ..models.detections import Detections
from ..models.detector import OnnxDetector
from ..models.machine import machine
from ..models.metrics import MatchTable, match_photos
from ..models.preprocess import Image
from .gate_accuracy import LEVEL, MARGIN_AP, accuracy_checks
from .gate_latency import BLOCKS, SLOWDOWN_MAX, Pairs, latency_checks, measure_pairs
from .selftest_models import Kind, ap_of, blurred, closest, detect_variants
from .verdict import Verdict

_Item = TypeVar("_Item")

TRIALS, RESAMPLES = 200, 400
NOISE, VARIANTS, PAIRS = 0.01, 8, 4
LOSS_MARGINS = 1.5
POOL_BLOCKS = 240
TIMED_PHOTOS = 32
Z95 = 1.959964


@dataclass(frozen=True)
class Rate:
    """How often something happened in trials, with Wilson's 95 % interval.

    Attributes:
        name: What was counted.
        count: How often it happened.
        trials: Of so many.
        goal: What the rate is to be at most, or at least.
        at_most: Which of the two.
        outcomes: How often the gate said what.
    """

    name: str
    count: int
    trials: int
    goal: float
    at_most: bool
    outcomes: dict[str, int] = field(default_factory=dict)

    @property
    def rate(self) -> float:
        """Share of the trials, 0..1."""
        return self.count / self.trials if self.trials else math.nan

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson's 95 % interval of the rate, 0..1."""
        return wilson(self.count, self.trials)

    @property
    def met(self) -> bool:
        """Whether the rate itself meets the goal."""
        return self.rate <= self.goal if self.at_most else self.rate >= self.goal

    def to_json(self) -> dict[str, Any]:
        """Returns it as JSON."""
        low, high = self.interval
        derived = {"rate": round(self.rate, 4), "low": round(low, 4), "high": round(high, 4)}
        return {**asdict(self), **derived, "met": self.met}


@dataclass(frozen=True)
class SelfTest:
    """The gate's error rates.

    Attributes:
        rates: Of each kind of trial.
        settings: What they were measured with, as JSON.
    """

    rates: tuple[Rate, ...]
    settings: dict[str, Any]

    @property
    def met(self) -> bool:
        """Whether every rate meets its goal."""
        return all(rate.met for rate in self.rates)

    def to_json(self) -> dict[str, Any]:
        """Returns it as JSON."""
        rates = [rate.to_json() for rate in self.rates]
        return {"met": self.met, "rates": rates, **self.settings}


def selftest(
    model: Path,
    data: Dataset,
    *,
    trials: int = TRIALS,
    resamples: int = RESAMPLES,
    margin_ap: float = MARGIN_AP,
    slowdown_max: float = SLOWDOWN_MAX,
    noise: float = NOISE,
    variants: int = VARIANTS,
    head: str | None = None,
    threads: int = 1,
    seed: int = 0,
    progress: bool = True,
) -> SelfTest:
    """Measures the gate's error rates.

    Args:
        model: ONNX file.
        data: With labels.
        trials: Of each kind.
        resamples: Of the gate in a trial; fewer than in earnest, to save time.
        margin_ap: The gate's.
        slowdown_max: The gate's.
        noise: Of the weights, as a share of their spread.
        variants: Models with such noise.
        head: Only for foreign files.
        threads: Of the networks.
        seed: Of all draws.
        progress: Whether to show bars on stderr.

    Raises:
        InputError: No two variants are alike.
        DatasetError: No labels, or no class in common.
        ModelFileError: The model cannot be used, or its weights cannot be changed.
    """
    began = time.monotonic()
    detector = OnnxDetector(model, head=head, threads=threads)
    classes, truths = data.labels()
    shared = map_classes(detector.spec.classes, classes)
    boxes = [shared.truth(one) for one in truths]
    found = detect_variants(
        model,
        data,
        shared,
        noise,
        variants,
        head=head,
        threads=threads,
        seed=seed,
        progress=progress,
    )
    tables = [match_photos(one, boxes, shared.names) for one in found]
    pairs = closest(tables, PAIRS)
    equal = [(tables[new], tables[old]) for new, old in pairs]
    loss = LOSS_MARGINS * margin_ap
    kinds: tuple[Kind, ...] = ("scores", "boxes")
    lossy = [
        (blurred(found[new], tables[old], boxes, loss, kind=kinds[i % 2], seed=seed), tables[old])
        for i, (new, old) in enumerate(_shown(pairs, "seeding losses", progress))
    ]
    options: dict[str, Any] = {"resamples": resamples, "seed": seed, "margin_ap": margin_ap}
    same = accuracy_trials(equal, trials, title="equal", progress=progress, **options)
    less = accuracy_trials(lossy, trials, title="loss", progress=progress, **options)
    pictures = [photo.load() for photo in data.limit(TIMED_PHOTOS).photos]
    other = OnnxDetector(model, head=head, threads=threads)
    pools = [
        measure_pairs(new, other, pictures, blocks=POOL_BLOCKS, seed=seed, progress=progress)
        for new in (detector, Slower(detector, slowdown_max))
    ]
    pools[1] = exactly(pools[1], 1 + slowdown_max)
    speed = [latency_trials(pool, trials, slowdown_max, seed=seed) for pool in pools]
    limit, slow = f"{loss:g} AP", f"{100 * slowdown_max:g} %"
    rates = (
        Rate("equal AP, not passed", trials - same["pass"], trials, 0.05, True, dict(same)),
        Rate(f"true loss of {limit}, passed", less["pass"], trials, 0.10, True, dict(less)),
        Rate("equal speed, flagged", speed[0]["fail"], trials, 0.05, True, dict(speed[0])),
        Rate(f"p90 {slow} slower, found", speed[1]["fail"], trials, 0.90, False, dict(speed[1])),
    )
    settings = {
        "model": str(model),
        "photos": len(boxes),
        "boxes": sum(map(len, boxes)),
        "margin_ap": margin_ap,
        "level_per_end": LEVEL,
        "resamples": resamples,
        "noise": noise,
        "variants_ap": [round(ap_of(table), 3) for table in tables],
        "equal_differences_ap": [round(ap_of(a) - ap_of(b), 3) for a, b in equal],
        "loss_differences_ap": [round(ap_of(a) - ap_of(b), 3) for a, b in lossy],
        "p90_ratios_of_pools": [_pool_ratio(pool) for pool in pools],
        "blocks": BLOCKS,
        "seed": seed,
        "seconds": round(time.monotonic() - began, 1),
        "machine": machine(),
    }
    return SelfTest(rates, settings)


def accuracy_trials(
    pairs: Sequence[tuple[MatchTable, MatchTable]],
    trials: int,
    *,
    resamples: int = RESAMPLES,
    margin_ap: float = MARGIN_AP,
    seed: int = 0,
    title: str = "trials",
    progress: bool = True,
) -> Counter[str]:
    """Returns how often the accuracy gate says what, each time on photos drawn anew.

    Args:
        pairs: New and old model; taken in turn.
        trials: So many gates.
        resamples: Of each gate.
        margin_ap: Of each gate.
        seed: Of the draws.
        title: Of the bar.
        progress: Whether to show it.
    """
    random = np.random.default_rng([seed, 1])
    said: Counter[str] = Counter()
    for trial in _shown(range(trials), title, progress):
        new, old = pairs[trial % len(pairs)]
        taken = random.multinomial(new.photos, np.full(new.photos, 1 / new.photos))
        checks = accuracy_checks(
            new, old, margin_ap=margin_ap, resamples=resamples, seed=seed + trial, taken=taken
        )
        said[Verdict(tuple(checks)).outcome] += 1
    return said


class Slower:
    """A detector that works longer by a share of the processor time that it takes."""

    def __init__(self, detector: Callable[[Image], Detections], share: float) -> None:
        """Keeps the detector."""
        self._detector, self._share = detector, share

    def __call__(self, image: Image) -> Detections:
        """Detects, then works on."""
        began = time.process_time()
        found = self._detector(image)
        until = time.process_time() + self._share * (time.process_time() - began)
        while time.process_time() < until:
            pass
        return found


def exactly(pool: Pairs, ratio: float) -> Pairs:
    """Returns the pairs with the new times scaled until p90 over all blocks has this ratio."""
    factor = ratio / latency_checks(pool)[-1].figures["ratio"]
    cpu = pool.new_cpu_ms
    return replace(
        pool, new_ms=pool.new_ms * factor, new_cpu_ms=None if cpu is None else cpu * factor
    )


def latency_trials(
    pool: Pairs, trials: int, slowdown_max: float = SLOWDOWN_MAX, *, seed: int = 0
) -> Counter[str]:
    """Returns how often the latency gate says what of p90, each time on blocks drawn anew."""
    random = np.random.default_rng([seed, 2])
    said: Counter[str] = Counter()
    for trial in range(trials):
        drawn = random.integers(0, len(pool.new_ms), BLOCKS)
        parts = (pool.new_ms, pool.old_ms, pool.new_cpu_ms, pool.old_cpu_ms)
        some = Pairs(*(None if one is None else one[drawn] for one in parts))  # type: ignore[arg-type]
        checks = latency_checks(some, slowdown_max=slowdown_max, resamples=500, seed=trial)
        said[checks[-1].outcome] += 1
    return said


def wilson(count: int, trials: int) -> tuple[float, float]:
    """Returns the 95 % interval of a rate, 0..1 (E. B. Wilson 1927)."""
    if not trials:
        return 0.0, 1.0
    rate, weight = count / trials, Z95**2 / trials
    middle = (rate + weight / 2) / (1 + weight)
    half = math.sqrt(weight * rate * (1 - rate) + weight**2 / 4) / (1 + weight)
    return max(0.0, middle - half), min(1.0, middle + half)


def _pool_ratio(pool: Pairs) -> list[float]:
    figures = latency_checks(pool)[-1].figures
    return [figures["ratio"], figures["low"], figures["high"], figures["wall_ratio"][0]]


def _shown(items: Iterable[_Item], title: str, progress: bool) -> Iterator[_Item]:
    from tqdm import tqdm

    yield from tqdm(items, desc=title, disable=None if progress else True)
