"""The one type that flows through everything: what a detector saw in one picture."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float32]
IntArray = npt.NDArray[np.int64]
BoolArray = npt.NDArray[np.bool_]


@dataclass(frozen=True, eq=False)
class Detections:
    """Boxes of one picture, column by column, checked at birth and read-only after it.

    Attributes:
        xyxy: float32 ``(n, 4)``; left, top, right, bottom in pixels of the source picture.
        score: float32 ``(n,)`` in 0..1.
        label: int64 ``(n,)``; index into ``ModelSpec.classes``.

    Raises:
        ValueError: A column has another shape, a number is not finite, or a label is negative.
    """

    xyxy: FloatArray
    score: FloatArray
    label: IntArray

    def __post_init__(self) -> None:
        """Converts the columns to their types, checks them and makes them read-only."""
        xyxy = np.array(self.xyxy, dtype=np.float32)
        score = np.array(self.score, dtype=np.float32)
        label = np.array(self.label, dtype=np.int64)
        if xyxy.size == 0:
            xyxy = xyxy.reshape(0, 4)
        n = len(xyxy)
        if xyxy.shape != (n, 4) or score.shape != (n,) or label.shape != (n,):
            message = (
                "expected xyxy (n, 4), score (n,) and label (n,), "
                f"got {xyxy.shape}, {score.shape} and {label.shape}"
            )
            raise ValueError(message)
        if not (np.isfinite(xyxy).all() and np.isfinite(score).all()):
            message = "expected finite boxes and scores, got NaN or infinity"
            raise ValueError(message)
        if n and label.min() < 0:
            message = f"expected labels >= 0, got {label.min()}"
            raise ValueError(message)
        for name, column in (("xyxy", xyxy), ("score", score), ("label", label)):
            column.setflags(write=False)
            object.__setattr__(self, name, column)

    @classmethod
    def empty(cls) -> Detections:
        """Returns no detections at all."""
        return cls(np.zeros((0, 4), np.float32), np.zeros(0, np.float32), np.zeros(0, np.int64))

    def __len__(self) -> int:
        """Number of boxes."""
        return len(self.score)

    def __iter__(self) -> Iterator[tuple[FloatArray, float, int]]:
        """Yields ``(xyxy, score, label)`` per box."""
        for box, score, label in zip(self.xyxy, self.score, self.label, strict=True):
            yield box, float(score), int(label)

    def __getitem__(self, index: BoolArray | IntArray | slice) -> Detections:
        """Returns the chosen boxes: a mask, an index array or a slice."""
        return Detections(self.xyxy[index], self.score[index], self.label[index])

    def above(self, score_min: float) -> Detections:
        """Returns the boxes with a score of at least ``score_min``."""
        return self[self.score >= score_min]

    def to_dicts(self, classes: tuple[str, ...]) -> list[dict[str, Any]]:
        """Returns one JSON-ready dict per box: ``label``, ``score``, ``xyxy`` in pixels."""
        return [
            {
                "label": classes[label] if label < len(classes) else str(label),
                "score": round(score, 4),
                "xyxy": [round(float(v), 1) for v in box],
            }
            for box, score, label in self
        ]
