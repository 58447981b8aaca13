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
        track: int64 ``(n,)``; which object of a stream it is, from 1; 0: not followed (yet). None
            where nobody follows.

    Raises:
        ValueError: A column has another shape, a number is not finite, or a label is negative.
    """

    xyxy: FloatArray
    score: FloatArray
    label: IntArray
    track: IntArray | None = None

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
        columns: dict[str, npt.NDArray[Any]] = {"xyxy": xyxy, "score": score, "label": label}
        if self.track is not None:
            track = columns["track"] = np.array(self.track, dtype=np.int64)
            if track.shape != (n,):
                message = f"expected track (n,), got {track.shape} for {n} boxes"
                raise ValueError(message)
        for name, column in columns.items():
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
        track = None if self.track is None else self.track[index]
        return Detections(self.xyxy[index], self.score[index], self.label[index], track)

    def with_tracks(self, track: IntArray) -> Detections:
        """Returns the same boxes, and which object each is."""
        return Detections(self.xyxy, self.score, self.label, track)

    def above(self, score_min: float) -> Detections:
        """Returns the boxes with a score of at least ``score_min``."""
        return self[self.score >= score_min]

    def to_dicts(self, classes: tuple[str, ...]) -> list[dict[str, Any]]:
        """Returns one JSON-ready dict per box: ``label``, ``score``, ``xyxy`` in pixels.

        ``track`` is its object's number, where it is followed.
        """
        found: list[dict[str, Any]] = [
            {
                "label": classes[label] if label < len(classes) else str(label),
                "score": round(score, 4),
                "xyxy": [round(float(v), 1) for v in box],
            }
            for box, score, label in self
        ]
        for row, track in zip(found, [] if self.track is None else self.track, strict=False):
            if track:
                row["track"] = int(track)
        return found
