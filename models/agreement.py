"""How well boxes agree with other boxes, frame by frame: what the accuracy panel shows.

Everything here is cheap enough for a live screen: a frame costs well under a millisecond, a
result a few, and memory does not grow with the length of the stream. All rates are in percent.
Labels must mean the same in both sets: see ``dataset.ClassMap``.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from .boxes import box_area, iou_matrix
from .dataset import GroundTruth
from .detections import BoolArray, Detections, FloatArray, IntArray

Z95 = 1.959964
"""Standard errors on either side of a 95 % interval."""
PRIOR_FRAMES = 3
"""So many frames with errors weigh as much as the assumption that errors come frame by frame."""
ENTRIES = 512
"""So many score steps per class at most; with more detections, neighbours are merged."""
REPLICATES = 40
RECALLS = np.linspace(0, 1, 101)


class Boxes(Protocol):
    """What boxes are compared with: another model's ``Detections``, or ``GroundTruth``."""

    @property
    def xyxy(self) -> FloatArray:
        """float32 ``(n, 4)`` in pixels of the source picture."""

    @property
    def label(self) -> IntArray:
        """int64 ``(n,)``; the same numbering as the detections'."""


@dataclass(frozen=True)
class Estimate:
    """A figure with its 95 % interval, in percent."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Agreement:
    """Precision, recall and F1 over some frames, in percent, with the counts behind them.

    Attributes:
        precision: Detections that are in the reference.
        recall: Reference boxes that were detected.
        f1: Harmonic mean of the two, ``2 tp / (2 tp + fp + fn)``.
        frames: Frames that these figures rest on.
        tp: Detections that match a reference box.
        fp: Detections that match none.
        fn: Reference boxes that no detection matches.
    """

    precision: Estimate
    recall: Estimate
    f1: Estimate
    frames: int
    tp: int
    fp: int
    fn: int


@dataclass(frozen=True)
class RunningAp:
    """What ``RunningAp50`` gives.

    Attributes:
        ap50: Mean over the classes seen of average precision at IoU 0.5, in percent.
        agreement: Precision, recall and F1 of the boxes at or above the score shown.
        classes: Classes that had at least one true box.
        frames: All frames since the start.
    """

    ap50: Estimate
    agreement: Agreement
    classes: int
    frames: int


def match(detections: Detections, reference: Boxes, iou: float = 0.5) -> tuple[int, int, int]:
    """Counts which detections of one frame are in the reference.

    Greedy, best score first: a detection takes the free reference box of its class that it
    overlaps most, if by at least ``iou``. Crowd regions of a ``GroundTruth`` count for nothing,
    nor do detections inside them.

    Args:
        detections: Of the frame; take those that are shown, as in ``detections.above(0.35)``.
        reference: Boxes of the same frame, labels numbered alike.
        iou: Intersection over union that makes a match.

    Returns:
        True positives, false positives, false negatives.
    """
    hit, counted = assign(detections, reference, iou)
    tp = int(hit.sum())
    return tp, int(counted.sum()) - tp, int((~_crowd(reference)).sum()) - tp


def assign(
    detections: Detections, reference: Boxes, iou: float = 0.5
) -> tuple[BoolArray, BoolArray]:
    """Matches as ``match`` does, and says it per detection.

    Returns:
        bool ``(n,)``: matched a reference box; bool ``(n,)``: counts at all, which detections
        that only lie in a crowd region do not.
    """
    n = len(detections)
    hit, counted = np.zeros(n, np.bool_), np.ones(n, np.bool_)
    if n == 0 or len(reference.label) == 0:
        return hit, counted
    crowd = _crowd(reference)
    same = detections.label[:, None] == reference.label[None, :]
    overlap = np.where(same, iou_matrix(detections.xyxy, reference.xyxy), 0.0)
    free = np.where(crowd[None, :], 0.0, overlap)
    for i in np.argsort(-detections.score, kind="stable"):
        best = int(free[i].argmax())
        if free[i, best] >= iou:
            hit[i] = True
            free[:, best] = 0.0
    if crowd.any():
        area = box_area(detections.xyxy)[:, None]
        region = reference.xyxy[crowd]
        inter = _intersection(detections.xyxy, region)
        inside = np.divide(inter, area, out=np.zeros_like(inter), where=area > 0) >= iou
        counted = hit | ~(inside & same[:, crowd]).any(axis=1)
    return hit, counted


class RunningAgreement:
    """Agreement with a reference over the latest frames of a stream.

    The interval treats the frame, not the box, as the unit, and allows for neighbouring frames
    being alike (ratio estimate with Newey-West variance, Wilson's limits at the effective size).
    It says how well these frames stand for the same scene, not for another one.

    Args:
        iou: Intersection over union that makes a match.
        window: So many frames are remembered; older ones are forgotten.
    """

    def __init__(self, iou: float = 0.5, window: int = 1000) -> None:
        self.iou = iou
        self._counts: deque[tuple[int, int, int]] = deque(maxlen=window)

    def __len__(self) -> int:
        """Number of frames remembered."""
        return len(self._counts)

    def add(self, detections: Detections, reference: Boxes) -> tuple[int, int, int]:
        """Adds one frame and returns its true positives, false positives, false negatives."""
        counts = match(detections, reference, self.iou)
        self.add_counts(*counts)
        return counts

    def add_counts(self, tp: int, fp: int, fn: int) -> None:
        """Adds one frame that was matched elsewhere."""
        self._counts.append((tp, fp, fn))

    def clear(self) -> None:
        """Forgets all frames, for instance because the model or the shown score changed."""
        self._counts.clear()

    def result(self) -> Agreement | None:
        """Returns the agreement over the frames remembered; None before there is a box at all.

        A rate that has no boxes yet (precision without detections) is 0 with interval 0..100.
        """
        counts = np.array(self._counts, np.float64).reshape(-1, 3)
        tp, fp, fn = counts.T
        if counts.sum() == 0:
            return None
        return Agreement(
            precision=ratio_interval(tp, tp + fp),
            recall=ratio_interval(tp, tp + fn),
            f1=ratio_interval(2 * tp, 2 * tp + fp + fn),
            frames=len(counts),
            tp=int(tp.sum()),
            fp=int(fp.sum()),
            fn=int(fn.sum()),
        )


class RunningAp50:
    """AP at IoU 0.5, precision and recall over the frames of a labelled source so far.

    Up to 512 detections of a class AP is exactly that of the COCO protocol; beyond that, those of
    neighbouring scores are merged, so memory and cost do not grow with the frames. The interval
    comes from 40 online bootstrap replicates, each of which takes a frame 0, 1, 2 ... times
    (Poisson).

    Args:
        score_min: Precision and recall are of boxes with at least this score: those shown.
        window: So many frames precision and recall remember; AP remembers all.
        seed: Of the bootstrap.
    """

    def __init__(self, score_min: float = 0.35, window: int = 1000, seed: int = 0) -> None:
        self.score_min = score_min
        self.shown = RunningAgreement(window=window)
        self.frames = 0
        self._random = np.random.default_rng(seed)
        # Weight 0 is 1 for every frame, the others are the replicates'.
        self._found: dict[int, _Scores] = {}
        self._truths: dict[int, npt.NDArray[np.float64]] = {}

    def add(self, detections: Detections, truth: GroundTruth) -> None:
        """Adds one frame.

        Args:
            detections: All of them down to the evaluation floor (0.05), not only those shown.
            truth: The frame's true boxes, labels numbered alike.
        """
        self.frames += 1
        hit, counted = assign(detections, truth)
        shown = detections.score >= self.score_min
        tp = int((hit & shown).sum())
        self.shown.add_counts(
            tp, int((counted & shown).sum()) - tp, int((~truth.iscrowd).sum()) - tp
        )
        weight = np.concatenate([[1.0], self._random.poisson(1.0, REPLICATES).astype(np.float64)])
        for label in truth.label[~truth.iscrowd].tolist():
            self._truths.setdefault(label, np.zeros(REPLICATES + 1))
            self._truths[label] += weight
        for i in np.flatnonzero(counted):
            scores = self._found.setdefault(int(detections.label[i]), _Scores())
            scores.add(float(detections.score[i]), bool(hit[i]), weight)

    def result(self) -> RunningAp | None:
        """Returns the figures so far; None before the first true box."""
        agreement = self.shown.result()
        if not self._truths or agreement is None:
            return None
        per_class = [
            _stepped_ap(self._found[label].falling(), truths)
            if label in self._found
            else np.where(truths > 0, 0.0, np.nan)
            for label, truths in self._truths.items()
        ]
        known = np.isfinite(per_class)
        ap = 100 * np.where(known, per_class, 0).sum(axis=0) / np.maximum(known.sum(axis=0), 1)
        ap[~known.any(axis=0)] = np.nan
        value = float(ap[0])
        others = ap[1:][np.isfinite(ap[1:])]
        half = Z95 * float(others.std(ddof=1)) if len(others) > 1 else 100.0
        estimate = Estimate(value, max(0.0, value - half), min(100.0, value + half))
        return RunningAp(estimate, agreement, len(self._truths), self.frames)


def ratio_interval(part: npt.NDArray[np.float64], whole: npt.NDArray[np.float64]) -> Estimate:
    """Returns ``sum(part) / sum(whole)`` with its 95 % interval over frames, in percent.

    Args:
        part: ``(frames,)``, in order of time, ``0 <= part <= whole``.
        whole: ``(frames,)``.
    """
    total = float(whole.sum())
    if total == 0:
        return Estimate(0.0, 0.0, 100.0)
    rate = float(part.sum()) / total
    frames = int((whole > 0).sum())
    error = part - rate * whole
    variance = _long_run_sum(error) / total**2 * len(part) / max(1, len(part) - 1)
    # How many boxes' worth of independent information there is: the observed design effect,
    # shrunk towards "a frame is all right or all wrong" while few frames have errors.
    spread = rate * (1 - rate)
    observed = variance * total / spread if spread > 0 else 0.0
    wrong = int(((part < whole) if rate > 0.5 else (part > 0)).sum())
    assumed = total / frames
    effect = (wrong * observed + PRIOR_FRAMES * assumed) / (wrong + PRIOR_FRAMES)
    size = total / max(effect, 1.0)
    z = _student(frames - 1)
    middle = (rate + z * z / (2 * size)) / (1 + z * z / size)
    half = z * math.sqrt(spread / size + z * z / (4 * size * size)) / (1 + z * z / size)
    low, high = max(0.0, middle - half), min(1.0, middle + half)
    return Estimate(100 * rate, 100 * min(low, rate), 100 * max(high, rate))


def _long_run_sum(error: npt.NDArray[np.float64]) -> float:
    """Returns the variance of ``sum(error)`` where neighbours may be alike (Newey-West)."""
    n = len(error)
    plain = float(error @ error)
    total = plain
    lags = min(n - 1, math.ceil(1.5 * n ** (1 / 3)))
    for lag in range(1, lags + 1):
        total += 2 * (1 - lag / (lags + 1)) * float(error[:-lag] @ error[lag:])
    return max(plain, total)


def _student(freedom: int) -> float:
    """Returns Student's 97.5 % point (Cornish-Fisher; within 1 % from 3 degrees on)."""
    z, f = Z95, max(freedom, 1)
    first = (z**3 + z) / 4
    second = (5 * z**5 + 16 * z**3 + 3 * z) / 96
    third = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
    return z + first / f + second / f**2 + third / f**3


class _Scores:
    """Detections of one class by score, as weights of false and true ones, in bounded memory."""

    def __init__(self) -> None:
        self._score = np.zeros(ENTRIES, np.float32)
        self._weight = np.zeros((ENTRIES, 2, REPLICATES + 1), np.float32)
        self._used = 0

    def add(self, score: float, hit: bool, weight: npt.NDArray[np.float64]) -> None:
        """Adds one detection with its frame's weights ``(1 + replicates,)``."""
        if self._used == ENTRIES:
            merged = self.falling()
            self._used = ENTRIES // 2
            self._weight[: self._used] = merged[::2] + merged[1::2]
            self._weight[self._used :] = 0
            self._score[: self._used] = -np.sort(-self._score)[1::2]
        self._score[self._used] = score
        self._weight[self._used, int(hit)] = weight
        self._used += 1

    def falling(self) -> npt.NDArray[np.float32]:
        """Returns weights ``(entries, 2, 1 + replicates)`` by falling score."""
        order = np.argsort(-self._score[: self._used], kind="stable")
        weight: npt.NDArray[np.float32] = self._weight[order]
        return weight


def _stepped_ap(
    weight: npt.NDArray[np.float32], truths: npt.NDArray[np.float64]
) -> npt.NDArray[np.float64]:
    """Returns AP of one class per replicate, 0..1; NaN where it has no true box.

    Args:
        weight: ``(entries, 2, replicates)``: of false and true detections by falling score.
        truths: ``(replicates,)``: of true boxes.
    """
    wrong, right = np.cumsum(weight, axis=0, dtype=np.float64).transpose(1, 0, 2)
    both = wrong + right
    precision = np.divide(right, both, out=np.zeros_like(both), where=both > 0)
    precision = np.maximum.accumulate(precision[::-1], axis=0)[::-1]
    reached = np.searchsorted(RECALLS, right / np.maximum(truths, 1e-9), side="right")
    steps = np.diff(reached, axis=0, prepend=0)
    ap: npt.NDArray[np.float64] = (precision * steps).sum(axis=0) / len(RECALLS)
    return np.where(truths > 0, ap, np.nan)


def _crowd(reference: Boxes) -> BoolArray:
    if isinstance(reference, GroundTruth):
        return reference.iscrowd
    return np.zeros(len(reference.label), np.bool_)


def _intersection(a_xyxy: FloatArray, b_xyxy: FloatArray) -> FloatArray:
    top_left = np.maximum(a_xyxy[:, None, :2], b_xyxy[None, :, :2])
    bottom_right = np.minimum(a_xyxy[:, None, 2:], b_xyxy[None, :, 2:])
    area: FloatArray = np.prod(np.clip(bottom_right - top_left, 0, None), axis=2)
    return area
