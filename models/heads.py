"""From a network's raw outputs to candidate boxes, one decoder per kind of head.

A decoder takes the outputs (batch of one) and gives ``(xyxy, score, label)`` of all (cell, class)
pairs with at least ``score_min``, in input pixels, before non-maximum suppression.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from .detections import FloatArray, IntArray
from .spec import ModelSpec

CANDIDATES_MAX = 1000
"""So many pairs at most go into non-maximum suppression, best first."""

Candidates = tuple[FloatArray, FloatArray, IntArray]
Decoder = Callable[[Sequence[FloatArray], ModelSpec, float], Candidates]
WHOLE = 8192
"""Stride of a classifier: one cell over a picture of any size."""
SSD_GRIDS = 6
SSD_RATIOS = (2.0, 3.0)
SSD_SCALES = (*(0.2 + 0.15 * k for k in range(SSD_GRIDS)), 1.0)
SSD_CODER = np.array([10.0, 10.0, 5.0, 5.0], np.float32)


@lru_cache(maxsize=16)
def cells(input_hw: tuple[int, int], strides: tuple[int, ...]) -> FloatArray:
    """Returns float32 ``(n, 3)``: column, row and stride (px) of every cell, level by level."""
    levels = []
    for stride in strides:
        rows, cols = grid_hw(input_hw, stride)
        y, x = np.mgrid[:rows, :cols]
        level = np.stack([x, y, np.full_like(x, stride)], axis=-1).reshape(-1, 3)
        levels.append(level.astype(np.float32))
    grid: FloatArray = np.concatenate(levels)
    grid.setflags(write=False)
    return grid


def grid_hw(input_hw: tuple[int, int], stride: int) -> tuple[int, int]:
    """Returns rows and columns of the level with this stride."""
    return -(-input_hw[0] // stride), -(-input_hw[1] // stride)


def decode_yolox(outputs: Sequence[FloatArray], spec: ModelSpec, score_min: float) -> Candidates:
    """YOLOX (arXiv 2107.08430): ``(1, n, 5 + classes)``, xy offset, log wh, objectness, scores."""
    raw = outputs[0][0]
    likely = np.flatnonzero(raw[:, 4] >= score_min)  # no score can exceed its objectness
    rows = raw[likely]
    row, label, score = _best_pairs(rows[:, 5:] * rows[:, 4:5], score_min)
    grid = cells(spec.input_hw, spec.strides)[likely[row]]
    box = rows[row]
    centre = (box[:, :2] + grid[:, :2]) * grid[:, 2:]
    half = np.exp(np.minimum(box[:, 2:4], 10)) * grid[:, 2:] / 2
    return np.concatenate([centre - half, centre + half], axis=1), score, label


def decode_nanodet_plus(
    outputs: Sequence[FloatArray], spec: ModelSpec, score_min: float
) -> Candidates:
    """NanoDet-Plus: ``(1, n, classes + 4 bins)``; boxes are distributions (GFL, 2006.04388)."""
    raw = outputs[0][0]
    classes = len(spec.classes)
    return _decode_distribution(raw[:, :classes], raw[:, classes:], spec, score_min, offset=0.0)


def decode_nanodet(outputs: Sequence[FloatArray], spec: ModelSpec, score_min: float) -> Candidates:
    """NanoDet: scores and distributions per level, in any order; cells have a half-cell offset."""
    order = {r * c: i for i, (r, c) in enumerate(grid_hw(spec.input_hw, s) for s in spec.strides)}
    classes = len(spec.classes)
    score: list[FloatArray] = [np.zeros(0, np.float32)] * len(order)
    bins: list[FloatArray] = [np.zeros(0, np.float32)] * len(order)
    for output in outputs:
        target = score if output.shape[2] == classes else bins
        target[order[output.shape[1]]] = output[0]
    return _decode_distribution(
        np.concatenate(score), np.concatenate(bins), spec, score_min, offset=0.5
    )


def decode_yolov8(outputs: Sequence[FloatArray], spec: ModelSpec, score_min: float) -> Candidates:
    """The common export layout of YOLOv8/11: ``(1, 4 + classes, n)``, centre x, y, w, h in px."""
    raw = outputs[0][0]
    label, column, score = _best_pairs(raw[4:], score_min)
    box = raw[:4, column].T
    half = box[:, 2:] / 2
    return np.concatenate([box[:, :2] - half, box[:, :2] + half], axis=1), score, label


def decode_ssdlite(outputs: Sequence[FloatArray], spec: ModelSpec, score_min: float) -> Candidates:
    """Torchvision SSDLite: ``(1, n, 1 + classes)`` logits (0: background), ``(1, n, 4)`` deltas."""
    logits, deltas = sorted((o[0] for o in outputs), key=lambda o: -o.shape[1])
    exp = np.exp(logits - logits.max(axis=1, keepdims=True))
    score_all = exp[:, 1:] / exp.sum(axis=1, keepdims=True)
    row, label, score = _best_pairs(score_all, score_min)
    anchor = ssdlite_anchors(spec.input_hw)[row]
    delta = deltas[row] / SSD_CODER
    centre = anchor[:, :2] + delta[:, :2] * anchor[:, 2:]
    half = np.exp(np.minimum(delta[:, 2:], np.log(1000 / 16))) * anchor[:, 2:] / 2
    size = np.array([spec.input_hw[1], spec.input_hw[0]] * 2, np.float32)
    return np.concatenate([centre - half, centre + half], axis=1) * size, score, label


def decode_classify(outputs: Sequence[FloatArray], spec: ModelSpec, score_min: float) -> Candidates:
    """A classifier: ``(1, classes)`` logits or probabilities; its box is the whole input."""
    raw = outputs[0]
    if raw.min() < 0 or abs(float(raw.sum()) - 1) > 1e-3:  # no softmax inside the network
        raw = np.exp(raw - raw.max())
        raw = raw / raw.sum()
    _, label, score = _best_pairs(raw, score_min)
    height, width = spec.input_hw
    return np.tile(np.array([0, 0, width, height], np.float32), (len(label), 1)), score, label


@lru_cache(maxsize=4)
def ssdlite_anchors(input_hw: tuple[int, int]) -> FloatArray:
    """Returns torchvision's default boxes, float32 ``(n, 4)``: centre x, y, w, h in 0..1."""
    boxes = []
    rows, cols = grid_hw(input_hw, 16)
    for k in range(SSD_GRIDS):
        scale, following = SSD_SCALES[k], SSD_SCALES[k + 1]
        sizes = [(scale, scale), ((scale * following) ** 0.5,) * 2]
        for ratio in SSD_RATIOS:
            sizes += [(scale * ratio**0.5, scale / ratio**0.5)]
            sizes += [(scale / ratio**0.5, scale * ratio**0.5)]
        wh = np.clip(np.array(sizes), 0, 1)
        y, x = np.mgrid[:rows, :cols]
        centre = np.stack([(x + 0.5) / cols, (y + 0.5) / rows], axis=-1).reshape(-1, 1, 2)
        centre, wh_all = np.broadcast_arrays(centre, wh[None])
        boxes.append(np.concatenate([centre, wh_all], axis=2).reshape(-1, 4))
        rows, cols = -(-rows // 2), -(-cols // 2)
    anchors: FloatArray = np.concatenate(boxes).astype(np.float32)
    anchors.setflags(write=False)
    return anchors


def _decode_distribution(
    score_all: FloatArray, bins: FloatArray, spec: ModelSpec, score_min: float, offset: float
) -> Candidates:
    row, label, score = _best_pairs(score_all, score_min)
    logits = bins[row].reshape(len(row), 4, spec.reg_max + 1)
    exp = np.exp(logits - logits.max(axis=2, keepdims=True))
    side = exp @ np.arange(spec.reg_max + 1, dtype=np.float32) / exp.sum(axis=2)
    grid = cells(spec.input_hw, spec.strides)[row]
    stride = grid[:, 2:]
    centre = (grid[:, :2] + offset) * stride
    xyxy = np.concatenate([centre - side[:, :2] * stride, centre + side[:, 2:] * stride], axis=1)
    return xyxy, score, label


def _best_pairs(score: FloatArray, score_min: float) -> tuple[IntArray, IntArray, FloatArray]:
    """Returns row, column and value of the entries >= ``score_min``; the best if there are many."""
    hits = np.flatnonzero(score >= score_min)
    if len(hits) <= CANDIDATES_MAX:  # as always in a live run: nothing is copied
        row, column = np.divmod(hits, score.shape[1])
        return row, column, score[row, column]
    flat = score.ravel()
    # Raise the floor as long as enough is left above it: sorting out the best is what costs.
    while 0 < score_min < 1 and np.count_nonzero(flat >= 4 * score_min) >= CANDIDATES_MAX:
        score_min *= 4
    hits = np.flatnonzero(flat >= score_min)
    value = flat[hits]
    if len(hits) > CANDIDATES_MAX:
        best = np.argpartition(-value, CANDIDATES_MAX)[:CANDIDATES_MAX]
        best.sort()
        hits, value = hits[best], value[best]
    row, column = np.divmod(hits, score.shape[1])
    return row, column, value


@dataclass(frozen=True)
class Head:
    """One kind of head: its decoder and what is usual for networks that have it."""

    decode: Decoder
    strides: tuple[int, ...] = (8, 16, 32)
    color: str = "bgr"
    mean: tuple[float, float, float] = (0.0, 0.0, 0.0)
    std: tuple[float, float, float] = (1.0, 1.0, 1.0)
    resize: str = "letterbox_topleft"
    nms_iou: float = 0.65


_MEAN_BGR = (103.53, 116.28, 123.675)  # ImageNet's, as NanoDet takes them
_STD_BGR = (57.375, 57.12, 58.395)
HEADS: dict[str, Head] = {
    "yolox": Head(decode_yolox),
    "nanodet_plus": Head(
        decode_nanodet_plus, (8, 16, 32, 64), "bgr", _MEAN_BGR, _STD_BGR, "stretch", 0.6
    ),
    "nanodet": Head(decode_nanodet, (8, 16, 32), "bgr", _MEAN_BGR, _STD_BGR, "stretch", 0.6),
    "yolov8": Head(
        decode_yolov8, (8, 16, 32), "rgb", (0.0,) * 3, (255.0,) * 3, "letterbox_center", 0.7
    ),
    "ssdlite": Head(
        decode_ssdlite, (16, 32, 64), "rgb", (127.5,) * 3, (127.5,) * 3, "stretch", 0.55
    ),
    "classify": Head(decode_classify, (WHOLE,), "rgb", (0.0,) * 3, (255.0,) * 3, "stretch", 1.0),
}
