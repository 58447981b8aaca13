"""A detector on a dataset: run it over the photos, then AP with intervals."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

from tqdm import tqdm

from .dataset import Dataset, map_classes
from .detections import Detections
from .metrics import (
    PER_PHOTO_MAX,
    ApResult,
    Interval,
    MatchTable,
    bootstrap,
    match_photos,
    paired_bootstrap,
)
from .metrics import evaluate as evaluate_table
from .preprocess import Image
from .spec import ModelSpec

_Item = TypeVar("_Item")

SCORE_MIN_AP = 0.001
"""Floor of scores for AP, as others use it: at 0.05 YOLOX-nano loses 0.6 AP, at 0.01 0.1."""


class Detector(Protocol):
    """What can be evaluated: ``OnnxDetector``, or anything that behaves like it."""

    spec: ModelSpec

    def __call__(self, image: Image, score_min: float = ..., limit: int = ...) -> Detections:
        """Detects in one BGR picture, uint8 ``(height, width, 3)``."""


@dataclass(frozen=True, eq=False)
class Evaluation:
    """How well a detector did on a dataset.

    Attributes:
        result: AP and its parts, in percent.
        table: The matches, for intervals and comparisons with other detectors on the same data.
        ms_per_photo: Median milliseconds of the detector per photo, without reading the file.
        note: What of the classes was left out; None if nothing.
    """

    result: ApResult
    table: MatchTable
    ms_per_photo: float
    note: str | None

    def interval(self, resamples: int = 1000, seed: int = 0) -> Interval:
        """Returns AP with its 95 % bootstrap interval over photos, in percent."""
        return bootstrap(self.table, resamples, seed)

    def minus(self, other: Evaluation, resamples: int = 1000, seed: int = 0) -> Interval:
        """Returns this AP minus the other's with its paired 95 % interval, in percent.

        Raises:
            ValueError: The two are not of the same number of photos.
        """
        return paired_bootstrap(self.table, other.table, resamples, seed)


def run_detector(
    detector: Detector,
    dataset: Dataset,
    *,
    progress: bool = True,
    score_min: float = SCORE_MIN_AP,
    title: str = "detecting",
) -> tuple[list[Detections], list[float]]:
    """Runs a detector over all photos.

    Args:
        detector: Called once per photo.
        dataset: Labels are not needed.
        progress: Whether to show a bar with an estimate on stderr.
        score_min: Floor of the scores.
        title: Of the bar.

    Returns:
        Detections per photo, labelled with the detector's classes, and its milliseconds per photo
        (all stages, without reading the file).

    Raises:
        DatasetError: A photo cannot be read.
    """
    found: list[Detections] = []
    times: list[float] = []
    for photo in bar(dataset.photos, title, progress):
        image = photo.load()
        start = time.perf_counter()
        found.append(detector(image, score_min, PER_PHOTO_MAX))
        times.append(1000 * (time.perf_counter() - start))
    return found, times


def evaluate_detector(
    detector: Detector, dataset: Dataset, *, progress: bool = True, title: str = "detecting"
) -> Evaluation:
    """Runs a detector over a labelled dataset and gives its AP.

    Only classes that both know count; ``Evaluation.note`` says what is left out.

    Raises:
        DatasetError: No labels, no class in common, or a photo that cannot be read.
    """
    map_classes(detector.spec.classes, dataset.labels()[0])  # before the work, not after it
    found, times = run_detector(detector, dataset, progress=progress, title=title)
    return evaluate_detections(found, detector.spec.classes, dataset, times)


def evaluate_detections(
    found: Sequence[Detections],
    model_classes: Sequence[str],
    dataset: Dataset,
    times_ms: Sequence[float] = (),
) -> Evaluation:
    """Gives the AP of detections that were made before.

    Args:
        found: Per photo of the dataset, in its order, labelled with the model's classes.
        model_classes: Class names of the model.
        dataset: With labels.
        times_ms: Milliseconds per photo, if known.

    Raises:
        DatasetError: No labels, or no class in common.
    """
    classes, truths = dataset.labels()
    shared = map_classes(model_classes, classes)
    table = match_photos(
        [shared.detections(one) for one in found],
        [shared.truth(one) for one in truths],
        shared.names,
    )
    median = sorted(times_ms)[len(times_ms) // 2] if times_ms else float("nan")
    note = shared.note(model_classes, classes)
    return Evaluation(evaluate_table(table), table, median, note)


def bar(items: Sequence[_Item], title: str, progress: bool = True) -> Iterator[_Item]:
    """Yields the items while a bar with an estimate of the time left stands on stderr."""
    wait = 0.5 if sys.stderr.isatty() else 10.0  # a log file needs fewer lines
    wrapped: Iterable[_Item] = tqdm(
        items, desc=title, unit="photo", file=sys.stderr, disable=not progress, mininterval=wait
    )
    yield from wrapped
