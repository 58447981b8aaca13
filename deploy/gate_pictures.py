"""The photos on which a new model did worst against the old one, with the boxes of both."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np

from ..models.agreement import Boxes, match
from ..models.dataset import Dataset, GroundTruth
from ..models.detections import Detections
from ..models.draw import draw_detections
from ..models.preprocess import Image
from .gate_frames import SHOWN

SIDE = 480
GAP = 6
QUALITY = 80
CROWDED = 100
"""Boxes drawn at most, best first."""


@dataclass(frozen=True)
class WorstPhoto:
    """One photo, the old model's boxes on the left and the new one's on the right.

    Attributes:
        name: Of the file.
        lost: True boxes that only the old model found, net.
        gained: False alarms that only the new model gave, net.
        jpeg: The picture.
    """

    name: str
    lost: int
    gained: int
    jpeg: bytes


def worst_photos(
    new: Sequence[Detections],
    old: Sequence[Detections],
    data: Dataset,
    truths: Sequence[GroundTruth] | None,
    classes: tuple[str, ...],
    count: int = 6,
) -> list[WorstPhoto]:
    """Returns the photos where the new model lost most, the worst first; none that it did not.

    Args:
        new: Per photo, labels numbered as the old model's.
        old: The same of the old model.
        data: The photos.
        truths: Per photo, numbered alike; None: the old model's shown boxes stand for them.
        classes: The old model's.
        count: Photos at most.

    Raises:
        DatasetError: A photo cannot be read.
    """
    ranked: list[tuple[int, int, int, int]] = []
    for number, (ours, theirs) in enumerate(zip(new, old, strict=True)):
        ours, theirs = ours.above(SHOWN), theirs.above(SHOWN)
        reference: Boxes = theirs if truths is None else truths[number]
        new_tp, new_fp, _ = match(ours, reference)
        old_tp, old_fp, _ = match(theirs, reference)
        lost, gained = old_tp - new_tp, new_fp - old_fp
        worse = max(0, lost) + max(0, gained)
        if worse:
            ranked.append((-worse, number, lost, gained))
    found = []
    for _, number, lost, gained in sorted(ranked)[:count]:
        photo = data.photos[number]
        jpeg = side_by_side(photo.load(), old[number], new[number], classes)
        found.append(WorstPhoto(photo.path.name, max(0, lost), max(0, gained), jpeg))
    return found


def side_by_side(
    image: Image, left: Detections, right: Detections, classes: tuple[str, ...]
) -> bytes:
    """Returns a JPEG with a picture twice, each with the shown boxes of one model."""
    height, width = image.shape[:2]
    scale = min(1.0, SIDE / max(height, width))
    size_wh = (max(1, round(width * scale)), max(1, round(height * scale)))
    small = np.asarray(cv2.resize(image, size_wh, interpolation=cv2.INTER_AREA), np.uint8)
    ratio = np.array([size_wh[0] / width, size_wh[1] / height] * 2, np.float32)
    halves = []
    for boxes in (left, right):
        shown = boxes.above(SHOWN)[:CROWDED]
        half = small.copy()
        draw_detections(half, Detections(shown.xyxy * ratio, shown.score, shown.label), classes)
        halves.append(half)
    middle = np.full((size_wh[1], GAP, 3), 128, np.uint8)
    both = np.concatenate([halves[0], middle, halves[1]], axis=1)
    _, data = cv2.imencode(".jpg", both, [cv2.IMWRITE_JPEG_QUALITY, QUALITY])
    return bytes(data.tobytes())
