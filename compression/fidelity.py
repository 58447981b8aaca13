"""How far a changed detector's boxes are from the original's: one number, no labels needed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..models.boxes import iou_matrix
from ..models.dataset import load_image
from ..models.detections import Detections
from ..models.detector import SCORE_MIN_EVAL, decode
from ..models.preprocess import prepare
from ..models.spec import ModelSpec
from .calibrate import session

IOU_MATCH = 0.5


def disagreement(reference: Sequence[Detections], changed: Sequence[Detections]) -> float:
    """Returns how much two sets of detections differ, 0 (the same) to 1 (nothing in common).

    Boxes of one class that overlap by half are the same object; they differ by the change of
    score and by the overlap that is missing. A box without a partner counts with its score. So
    small changes give small numbers, which a count of matches would not.
    """
    lost = total = 0.0
    for a, b in zip(reference, changed, strict=True):
        total += float(a.score.sum() + b.score.sum())
        overlap = iou_matrix(a.xyxy, b.xyxy) * (a.label[:, None] == b.label[None, :])
        free = np.ones(len(b), bool)
        for i in range(len(a)):
            j = int(np.argmax(overlap[i] * free)) if free.any() else 0
            if not free.any() or overlap[i, j] * free[j] < IOU_MATCH:
                lost += float(a.score[i])
                continue
            free[j] = False
            top = max(float(a.score[i]), float(b.score[j]))
            lost += abs(float(a.score[i] - b.score[j])) + 2 * top * (1 - float(overlap[i, j]))
        lost += float(b.score[free].sum())
    return min(1.0, lost / total) if total > 0 else 0.0


class Fidelity:
    """Compares variants of a model with the model itself, on the same photos.

    Args:
        model: The float ``onnx.ModelProto``.
        photos: Some dozen.
        spec: Of the model.
    """

    def __init__(self, model: Any, photos: Sequence[Path], spec: ModelSpec) -> None:
        """Runs the float model once over the photos."""
        self.spec = spec
        self._inputs = [prepare(load_image(path), spec) for path in photos]
        self.reference = self.detect(model)

    def detect(self, model: Any) -> list[Detections]:
        """Returns what a model sees in each photo."""
        runner = session(model)
        feed = runner.get_inputs()[0].name
        return [
            decode(runner.run(None, {feed: tensor}), self.spec, placement, SCORE_MIN_EVAL)
            for tensor, placement in self._inputs
        ]

    def loss(self, model: Any) -> float:
        """Returns the disagreement of a variant with the original, 0..1."""
        return disagreement(self.reference, self.detect(model))
