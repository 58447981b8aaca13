"""How good a model is beside another: AP where there are boxes, else agreement."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from ..models.agreement import RunningAgreement
from ..models.boxes import iou_matrix
from ..models.dataset import Dataset
from ..models.detections import Detections
from ..models.evaluate import evaluate_detections

SHOWN = 0.35
"""Agreement is of boxes that a user would see: those with at least this score."""
PARITY_SCORE = 0.05
PARITY_MARGIN = 0.01
PARITY_BOX_PX = 1.0
PARITY_SCORE_GAP = 5e-3
PARITY_LOST_MAX = 0.005


@dataclass(frozen=True)
class Score:
    """How good a model is on some photos, in percent.

    Attributes:
        kind: ``ap`` (COCO's AP) or ``f1`` (agreement with the original at IoU 0.5).
        value: The figure; None if there is nothing to compare (no boxes at all).
        low: Lower limit of its 95 % interval.
        high: Upper limit.
        loss: Points of AP below the original; None for agreement.
        loss_low: Lower limit of the paired 95 % interval.
        loss_high: Upper limit.
        photos: Photos behind it.
        more: Further figures: ``ap50`` ... or ``precision`` and ``recall``.
        note: What was left out; None if nothing.
    """

    kind: str
    value: float | None
    low: float | None
    high: float | None
    photos: int
    loss: float | None = None
    loss_low: float | None = None
    loss_high: float | None = None
    more: dict[str, float | None] | None = None
    note: str | None = None

    def to_json(self) -> dict[str, Any]:
        """Returns it as a JSON-ready dict."""
        return asdict(self)


def score(
    found: Sequence[Detections],
    original: Sequence[Detections],
    classes: Sequence[str],
    data: Dataset,
    resamples: int = 1000,
    seed: int = 0,
) -> Score:
    """Compares a model with the original on the same photos.

    Args:
        found: The model's detections per photo.
        original: The original's.
        classes: Class names of both.
        data: The photos; AP needs labels.
        resamples: Of the bootstrap.
        seed: Of the bootstrap.
    """
    if data.truths is None:
        return _agreement(found, original)
    mine = evaluate_detections(found, classes, data)
    theirs = evaluate_detections(original, classes, data)
    own, lost = mine.interval(resamples, seed), theirs.minus(mine, resamples, seed)
    figures = asdict(mine.result)
    more = {k: _number(figures[k]) for k in ("ap50", "ap75", "ap_small", "ap_medium", "ap_large")}
    return Score(
        "ap",
        _number(own.value),
        _number(own.low),
        _number(own.high),
        len(data),
        _number(lost.value),
        _number(lost.low),
        _number(lost.high),
        more,
        mine.note,
    )


def _agreement(found: Sequence[Detections], original: Sequence[Detections]) -> Score:
    running = RunningAgreement(window=max(1, len(found)))
    for mine, theirs in zip(found, original, strict=True):
        running.add(mine.above(SHOWN), theirs.above(SHOWN))
    result = running.result()
    if result is None:
        note = f"neither model sees anything with a score of at least {SHOWN}"
        return Score("f1", None, None, None, len(found), note=note)
    f1 = result.f1
    if found is original:  # with itself; the interval would say nothing
        return Score("f1", f1.value, None, None, len(found))
    more: dict[str, float | None] = {
        "precision": result.precision.value,
        "recall": result.recall.value,
    }
    return Score("f1", f1.value, f1.low, f1.high, len(found), more=more)


@dataclass(frozen=True)
class Parity:
    """Whether two forms of one network see the same.

    Attributes:
        photos: Photos compared.
        boxes: Boxes of the first form.
        lost: Boxes that only one of them has.
        box_px: Largest difference of a coordinate, in source pixels; of boxes that both have.
        score: Largest difference of a score.
        same: The differences are rounding and nothing else.
    """

    photos: int
    boxes: int
    lost: int
    box_px: float
    score: float
    same: bool

    def to_json(self) -> dict[str, Any]:
        """Returns it as a JSON-ready dict."""
        return asdict(self)


def parity(first: Sequence[Detections], second: Sequence[Detections]) -> Parity:
    """Compares two forms of one network (torch and ONNX) box by box.

    A wrong colour order, resize or normalisation shows at once; a box whose score lies within 0.01
    of the floor may be on one side only.
    """
    boxes = lost = 0
    box_px = gap = 0.0
    for a, b in zip(first, second, strict=True):
        a, b = _visible(a), _visible(b)
        boxes += len(a.above(PARITY_SCORE + PARITY_MARGIN))
        for mine, theirs, count in ((a, b, True), (b, a, False)):
            sure = mine.above(PARITY_SCORE + PARITY_MARGIN)
            if not len(sure):
                continue
            others = theirs.above(PARITY_SCORE)
            overlap = np.zeros((len(sure), 1), np.float32)
            if len(others):
                same = sure.label[:, None] == others.label[None]
                overlap = np.where(same, iou_matrix(sure.xyxy, others.xyxy), 0)
            hit = overlap.max(axis=1) >= 0.8
            lost += int((~hit).sum())
            if count and hit.any():
                partner = others[overlap.argmax(axis=1)[hit]]
                box_px = max(box_px, float(np.abs(sure.xyxy[hit] - partner.xyxy).max()))
                gap = max(gap, float(np.abs(sure.score[hit] - partner.score).max()))
    same_all = (
        lost <= PARITY_LOST_MAX * max(boxes, 1) and box_px <= PARITY_BOX_PX
    ) and gap <= PARITY_SCORE_GAP
    return Parity(len(first), boxes, lost, round(box_px, 4), round(gap, 6), same_all)


def _visible(found: Detections) -> Detections:
    """Returns the boxes with an area: those of a diverged network have none and overlap nothing."""
    sides = found.xyxy[:, 2:] - found.xyxy[:, :2]
    return found[np.asarray((sides > 1).all(axis=1))]


def _number(value: float) -> float | None:
    """Returns a number that JSON knows: None for NaN."""
    return float(value) if math.isfinite(value) else None
