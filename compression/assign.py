"""Learning from boxes: which cells answer for which box, and the loss of those cells.

Cells are assigned by task alignment (TOOD, arXiv 2108.07755): a box goes to the cells inside it
whose class score and overlap are best together, and the aligned quality is the score they should
give (quality focal loss, arXiv 2006.04388). Boxes are people's labels, or what the uncut network
finds at its own resolution, weighted by its score.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..models.nets.common import DetectorNet
from . import parallel
from .levels import layout_of, take_apart

CELLS_PER_BOX = 10
BETA = 6.0  # weight of the overlap against the score, as in the paper


@dataclass(frozen=True)
class Targets:
    """The boxes of one photo as the network sees it.

    Attributes:
        xyxy: float32 ``(n, 4)`` in input pixels.
        label: int64 ``(n,)``.
        weight: float32 ``(n,)``; 1 for people's labels, less for a network's.
    """

    xyxy: Tensor
    label: Tensor
    weight: Tensor


def label_loss(
    net: DetectorNet,
    levels: Sequence[Tensor],
    targets: Sequence[Targets],
    silent: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Returns the score term and the box term of a batch, each a scalar.

    Args:
        net: Whose raw maps they are.
        levels: Raw maps, finest first.
        targets: One entry per photo of the batch.
        silent: bool ``(classes,)``: where no box is, silence is asked of these; None: of all.
    """
    cells = read_cells(net, levels)
    score_terms, box_terms = levels[0].new_zeros(()), levels[0].new_zeros(())
    total = levels[0].new_zeros(())
    for k, target in enumerate(targets):
        logits, boxes = cells.logits[k], cells.boxes[k]
        quality = torch.zeros_like(logits)
        if len(target.label):
            owner, aligned = _assign(cells, k, target)
            hit = owner >= 0
            chosen = owner[hit]
            weight = aligned[hit] * target.weight[chosen]
            quality[hit, target.label[chosen]] = aligned[hit] * target.weight[chosen].sqrt()
            overlap = giou(boxes[hit], target.xyxy[chosen])
            box_terms = box_terms + ((1 - overlap) * weight).sum()
            if cells.bins is not None:
                sides = _sides(cells, hit, target.xyxy[chosen])
                box_terms = box_terms + 0.25 * (_dfl(cells.bins[k][hit], sides) * weight).sum()
            total = total + weight.sum()
        error = (logits.detach().sigmoid() - quality).square()
        if cells.objectness is not None:
            best = quality.amax(1)
            wrong = (cells.objectness[k].detach().sigmoid() - best).square()
            if silent is not None and not bool(silent.all()):  # what lies there may be of another
                wrong = wrong * (best > 0)
            bce = F.binary_cross_entropy_with_logits
            score_terms = (
                score_terms + (bce(cells.objectness[k], best, reduction="none") * wrong).sum()
            )
            error = error * (best > 0).float()[:, None]
            quality = (quality > 0).float()
        if silent is not None:
            error = error * (silent | (quality > 0))
        loss = F.binary_cross_entropy_with_logits(logits, quality, reduction="none")
        score_terms = score_terms + (loss * error).sum()
    total = parallel.total(total).clamp_min(1.0)
    return score_terms / total, box_terms / total


@dataclass(frozen=True)
class Cells:
    """All cells of a batch, level by level, finest first.

    Attributes:
        logits: ``(b, n, classes)``.
        objectness: ``(b, n)`` logits, for heads that have it.
        boxes: ``(b, n, 4)`` in input pixels.
        bins: ``(b, n, 4, bins)`` logits, for heads with distributions.
        centre: ``(n, 2)``: the point that a cell speaks for, x and y in input pixels.
        stride: ``(n,)`` in pixels.
    """

    logits: Tensor
    objectness: Tensor | None
    boxes: Tensor
    bins: Tensor | None
    centre: Tensor
    stride: Tensor


def read_cells(net: DetectorNet, levels: Sequence[Tensor]) -> Cells:
    """Returns what the raw maps say, cell by cell, as the head's decoder reads them.

    Raises:
        ValueError: The network's head is not known here.
    """
    logits, boxes, bins, centres, strides = [], [], [], [], []
    offset = layout_of(net).cell_offset
    for level, stride in zip(levels, net.strides, strict=True):
        parts = take_apart(net, level)
        b, _, h, w = level.shape
        y, x = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
        grid = torch.stack([x, y], -1).reshape(-1, 2).to(level)
        logits.append(parts.logits.flatten(2).transpose(1, 2))
        raw = parts.boxes.flatten(2).transpose(1, 2)
        if parts.bins:
            shaped = raw.reshape(b, h * w, 4, parts.bins)
            side = shaped.softmax(3) @ torch.arange(parts.bins).to(level) * stride
            centre = (grid + offset) * stride
            boxes.append(torch.cat([centre - side[..., :2], centre + side[..., 2:]], -1))
            bins.append(shaped)
        else:
            centre = (grid + 0.5) * stride
            middle = (raw[..., :2] + grid) * stride
            half = raw[..., 2:].clamp(max=8).exp() * stride / 2
            boxes.append(torch.cat([middle - half, middle + half], -1))
        centres.append(centre)
        strides.append(torch.full_like(centre[:, 0], stride))
    all_logits = torch.cat(logits, 1)
    with_objectness = all_logits.shape[2] == net.num_classes + 1
    return Cells(
        all_logits[..., 1:] if with_objectness else all_logits,
        all_logits[..., 0] if with_objectness else None,
        torch.cat(boxes, 1),
        torch.cat(bins, 1) if bins else None,
        torch.cat(centres),
        torch.cat(strides),
    )


@torch.no_grad()
def _assign(cells: Cells, k: int, target: Targets) -> tuple[Tensor, Tensor]:
    """Returns per cell the number of its box (-1: none) and the quality it should give."""
    left_top = cells.centre[None] - target.xyxy[:, None, :2]
    right_bottom = target.xyxy[:, None, 2:] - cells.centre[None]
    inside = torch.cat([left_top, right_bottom], -1).amin(-1) > 0
    overlap = _iou(target.xyxy, cells.boxes[k])
    score = cells.logits[k].sigmoid()[:, target.label].T
    if cells.objectness is not None:
        score = score * cells.objectness[k].sigmoid()
    metric = score * overlap.pow(BETA) * inside
    best = min(CELLS_PER_BOX, metric.shape[1])
    bar = metric.topk(best, dim=1).values[:, -1:]
    mine = (metric >= bar) & (metric > 0)
    metric = metric * mine
    top_metric = metric.amax(1, keepdim=True).clamp_min(1e-12)
    top_overlap = (overlap * mine).amax(1, keepdim=True)
    aligned = metric / top_metric * top_overlap
    claim = torch.where(mine, overlap, torch.full_like(overlap, -1.0))
    value, owner = claim.max(0)
    owner = torch.where(value >= 0, owner, torch.full_like(owner, -1))
    quality = aligned.gather(0, owner.clamp_min(0)[None])[0]
    return owner, quality


def _iou(a: Tensor, b: Tensor) -> Tensor:
    """Overlap of every pair, ``(n, m)``."""
    inter = (
        (
            torch.minimum(a[:, None, 2:], b[None, :, 2:])
            - torch.maximum(a[:, None, :2], b[None, :, :2])
        )
        .clamp_min(0)
        .prod(-1)
    )
    return inter / (_area(a)[:, None] + _area(b)[None] - inter).clamp_min(1e-6)


def giou(a: Tensor, b: Tensor) -> Tensor:
    """Generalised overlap of matching boxes ``(..., 4)`` (arXiv 1902.09630), ``(...)``."""
    low, high = torch.minimum, torch.maximum
    inter = (low(a[..., 2:], b[..., 2:]) - high(a[..., :2], b[..., :2])).clamp_min(0)
    hull = (high(a[..., 2:], b[..., 2:]) - low(a[..., :2], b[..., :2])).clamp_min(0)
    joint, around = inter.prod(-1), hull.prod(-1).clamp_min(1e-6)
    union = (_area(a) + _area(b) - joint).clamp_min(1e-6)
    return joint / union - (around - union) / around


def _area(xyxy: Tensor) -> Tensor:
    return (xyxy[..., 2:] - xyxy[..., :2]).clamp_min(0).prod(-1)


def _sides(cells: Cells, hit: Tensor, xyxy: Tensor) -> Tensor:
    """Distances from cell centres to the sides of their boxes, in strides, ``(n, 4)``."""
    centre, stride = cells.centre[hit], cells.stride[hit][:, None]
    return torch.cat([centre - xyxy[:, :2], xyxy[:, 2:] - centre], 1) / stride


def _dfl(bins: Tensor, sides: Tensor) -> Tensor:
    """Distribution focal loss (arXiv 2006.04388), mean over sides, ``(n,)``."""
    last = bins.shape[2] - 1
    sides = sides.clamp(0, last - 0.01)
    low = sides.floor().long()
    part = sides - low
    log = bins.log_softmax(2)
    near = log.gather(2, low[..., None])[..., 0] * (1 - part)
    far = log.gather(2, (low + 1)[..., None])[..., 0] * part
    return -(near + far).mean(1)
