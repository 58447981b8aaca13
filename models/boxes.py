"""Box arithmetic: overlap, clipping, and non-maximum suppression per class."""

from __future__ import annotations

from typing import Any

import cv2
import numpy as np

from .detections import FloatArray, IntArray


def iou_matrix(a_xyxy: FloatArray, b_xyxy: FloatArray) -> FloatArray:
    """Returns intersection over union of every pair.

    Args:
        a_xyxy: ``(n, 4)`` boxes in pixels.
        b_xyxy: ``(m, 4)`` boxes in pixels.

    Returns:
        float32 ``(n, m)``; pairs with an empty union give 0.
    """
    top_left = np.maximum(a_xyxy[:, None, :2], b_xyxy[None, :, :2])
    bottom_right = np.minimum(a_xyxy[:, None, 2:], b_xyxy[None, :, 2:])
    inter = np.prod(np.clip(bottom_right - top_left, 0, None), axis=2)
    union = box_area(a_xyxy)[:, None] + box_area(b_xyxy)[None, :] - inter
    result: FloatArray = np.divide(
        inter, union, out=np.zeros_like(inter, dtype=np.float32), where=union > 0
    )
    return result


def box_area(xyxy: FloatArray) -> FloatArray:
    """Returns the area of each box in square pixels; boxes turned inside out count as 0."""
    size = np.clip(xyxy[:, 2:] - xyxy[:, :2], 0, None)
    area: FloatArray = size[:, 0] * size[:, 1]
    return area


def clip_boxes(xyxy: FloatArray, size_wh: tuple[int, int]) -> FloatArray:
    """Returns the boxes cut to a picture of ``size_wh`` pixels."""
    width, height = size_wh
    clipped: FloatArray = np.clip(xyxy, 0, np.array([width, height, width, height], np.float32))
    return clipped


def nms_per_class(
    xyxy: FloatArray, score: FloatArray, label: IntArray, iou_max: float, limit: int
) -> IntArray:
    """Greedy non-maximum suppression within each class.

    Args:
        xyxy: float32 ``(n, 4)`` boxes in pixels.
        score: float32 ``(n,)``.
        label: int64 ``(n,)``.
        iou_max: A box is dropped when it overlaps a better one of its class by more than this.
        limit: At most so many boxes are kept, best first.

    Returns:
        int64 indices of the kept boxes, by falling score.
    """
    if len(score) == 0:
        return np.zeros(0, np.int64)
    # Classes are moved apart, so that one pass never compares boxes of two classes.
    span = float(np.abs(xyxy).max()) * 2 + 1
    moved: Any = xyxy.astype(np.float64)
    scores: Any = score
    moved[:, 2:] -= moved[:, :2]
    moved[:, :2] += (label * span)[:, None]
    kept = cv2.dnn.NMSBoxes(moved, scores, 0.0, iou_max)
    result: IntArray = np.asarray(kept, np.int64).reshape(-1)[:limit]
    return result
