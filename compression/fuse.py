"""Boxes of several detectors made one: weighted box fusion (Solovyev et al., arXiv 1910.13302)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..models.boxes import iou_matrix
from ..models.detections import Detections, FloatArray, IntArray

OVERLAP_MIN = 0.55
"""Boxes of one class that overlap by more are of one object; the paper's value."""


def fuse_boxes(
    found: Sequence[Detections], known: IntArray | None = None, overlap_min: float = OVERLAP_MIN
) -> Detections:
    """Returns the boxes that several detectors see in one picture.

    A fused box is the mean of its boxes, weighted by their scores; its score is the mean of
    theirs, smaller if not every detector that knows the class has seen it.

    Args:
        found: Of each detector, labels of one and the same list of classes.
        known: int64 ``(classes,)``: how many of the detectors know a class; None: all do.
        overlap_min: Boxes of one class that overlap by more are of one object.
    """
    joined = _joined(found)
    order = np.argsort(-joined.score, kind="stable")
    clusters: list[list[int]] = []
    boxes = np.zeros((len(order), 4), np.float32)
    labels = np.full(len(order), -1, np.int64)
    for index in order:
        count = len(clusters)
        near = iou_matrix(joined.xyxy[index][None], boxes[:count])[0]
        near[labels[:count] != joined.label[index]] = 0
        best = int(near.argmax()) if count else -1
        if best < 0 or near[best] <= overlap_min:
            best = count
            clusters.append([])
            labels[best] = joined.label[index]
        clusters[best].append(int(index))
        boxes[best] = _mean(joined, clusters[best])
    scores = np.zeros(len(clusters), np.float32)
    for n, members in enumerate(clusters):
        voters = len(found) if known is None else max(1, int(known[labels[n]]))
        scores[n] = joined.score[members].mean() * min(len(members), voters) / voters
    best_first = np.argsort(-scores, kind="stable")
    return Detections(boxes[best_first], scores[best_first], labels[best_first])


def _joined(found: Sequence[Detections]) -> Detections:
    return Detections(
        np.concatenate([d.xyxy for d in found]),
        np.concatenate([d.score for d in found]),
        np.concatenate([d.label for d in found]),
    )


def _mean(joined: Detections, members: list[int]) -> FloatArray:
    weight = joined.score[members][:, None]
    mean: FloatArray = (joined.xyxy[members] * weight).sum(0) / max(float(weight.sum()), 1e-12)
    return mean
