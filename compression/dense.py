"""What a teacher with another grid says, brought to the student's cells.

A teacher of another architecture, or the same network at another input size, has other cells than
the student. Its class scores are resampled bilinearly at the points that the student's cells speak
for; its boxes are decoded to pixels and taken from the nearest cell. Heads with an objectness are
compared by the score that they show, objectness times class.

Heads differ in what they say of nothing: NanoDet-Plus gives every class of every empty cell a score
of nearly 0.1, YOLOX one of nearly 0. Background is most of a picture, and a student that learned
another's floor would learn little else. So a teacher's scores are moved to the student's floor, and
each question counts by how far above it teacher or student is.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..models.preprocess import Placement
from . import parallel
from .assign import Cells, giou
from .distill import bernoulli_divergence

PROBABILITY_MIN = 1e-6
"""Scores are compared as if none were closer to 0 or 1. They are blended as scores: between a cell
that is sure and one that is not, their logits would be sure of nothing."""
FLOOR_STEP = 7
"""Every so many cells tell the score of nothing."""


@dataclass(frozen=True)
class Dense:
    """A teacher's opinion of each of the student's cells; no gradient.

    Attributes:
        score: ``(b, n, k)``; shown, for the classes that both know, on the student's floor.
        floor: ``(b, 1, 1)``; what the student shows where there is nothing.
        boxes: ``(b, n, 4)`` in the student's input pixels.
        inside: ``(b, n)``; 1 where a cell speaks for a point of the picture, 0 in the padding.
    """

    score: Tensor
    floor: Tensor
    boxes: Tensor
    inside: Tensor


def shown_logits(cells: Cells) -> Tensor:
    """Returns the logit of the score that a detector shows, ``(b, n, classes)``.

    With objectness ``o`` and class ``c`` the shown score is ``sigmoid(o) * sigmoid(c)``; its logit
    is ``-log(exp(-o) + exp(-c) + exp(-o - c))``.
    """
    if cells.objectness is None:
        return cells.logits
    c = cells.logits
    o = cells.objectness[..., None].expand_as(c)
    return -torch.stack([-o, -c, -o - c]).logsumexp(0)


@torch.no_grad()
def resample(
    theirs: Cells,
    their_shapes: Sequence[tuple[int, int]],
    their_places: Sequence[Placement],
    columns: Tensor,
    ours: Cells,
    our_shapes: Sequence[tuple[int, int]],
    our_places: Sequence[Placement],
) -> Dense:
    """Returns what a teacher says in the student's cells.

    Each level of the student asks the teacher's level whose cells are nearest in size, as seen in
    the picture.

    Args:
        theirs: The teacher's cells.
        their_shapes: Rows and columns of each of its levels.
        their_places: Where each picture lies in the teacher's input.
        columns: The teacher's classes to take, int64.
        ours: The student's cells.
        our_shapes: Rows and columns of each of its levels.
        our_places: Where each picture lies in the student's input.
    """
    device = ours.logits.device
    score = shown_logits(theirs)[..., columns].sigmoid()
    scale_t, shift_t, _ = _geometry(their_places, device)
    scale_s, shift_s, size = _geometry(our_places, device)
    point = (ours.centre[None] - shift_s[:, None]) / scale_s[:, None]  # in picture pixels
    inside = ((point >= 0) & (point <= size[:, None])).all(2)
    asked = point * scale_t[:, None] + shift_t[:, None]
    boxes = (theirs.boxes - shift_t.repeat(1, 2)[:, None]) / scale_t.repeat(1, 2)[:, None]
    boxes = boxes * scale_s.repeat(1, 2)[:, None] + shift_s.repeat(1, 2)[:, None]
    ratios = (scale_t / scale_s).prod(1).sqrt().tolist()
    starts = _starts(their_shapes)
    strides = theirs.stride[starts].tolist()
    found, places = [], []
    for k, ratio in enumerate(ratios):
        scores_k, boxes_k = [], []
        for start, (rows, cols) in zip(_starts(our_shapes), our_shapes, strict=True):
            wanted = math.log(float(ours.stride[start]) * ratio)
            level = min(range(len(strides)), key=lambda n: abs(math.log(strides[n]) - wanted))
            first, (h, w) = starts[level], their_shapes[level]
            offset = theirs.centre[first] / strides[level]
            cell = asked[k, start : start + rows * cols] / strides[level] - offset
            last = torch.tensor([w - 1, h - 1], device=device).clamp_min(1)
            grid = (2 * cell / last - 1)[None, None]
            at = slice(first, first + h * w)
            scores_k.append(_sampled(score[k, at], (h, w), grid, "bilinear"))
            boxes_k.append(_sampled(boxes[k, at], (h, w), grid, "nearest"))
        found.append(torch.cat(scores_k))
        places.append(torch.cat(boxes_k))
    theirs_floor, our_floor = floor_of(score), floor_of(shown_logits(ours).sigmoid())
    above = ((torch.stack(found) - theirs_floor) / (1 - theirs_floor)).clamp_min(0)
    moved = our_floor + (1 - our_floor) * above
    return Dense(moved, our_floor, torch.stack(places), inside.float())


def floor_of(score: Tensor) -> Tensor:
    """Returns the score of nothing in each picture, ``(b, 1, 1)``: the median of all.

    Args:
        score: ``(b, n, k)``, shown.
    """
    return score[:, ::FLOOR_STEP].flatten(1).median(1).values[:, None, None]


def _sampled(values: Tensor, shape: tuple[int, int], grid: Tensor, mode: str) -> Tensor:
    """Returns one level's values ``(cells, k)`` at points ``(1, 1, n, 2)`` as ``(n, k)``."""
    maps = values.T.reshape(1, -1, *shape)
    return F.grid_sample(maps, grid, mode, "border", align_corners=True)[0, :, 0].T


def dense_loss(
    ours: Cells, columns: Tensor, goal: Dense, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Returns the score term and the box term of a batch, each a scalar.

    Args:
        ours: The student's cells.
        columns: Its classes that the teacher knows, in the order of ``goal.logits``.
        goal: From ``resample``.
        temperature: Softens both sides.
    """
    logits = shown_logits(ours)[..., columns]
    inside = goal.inside[..., None]
    sure = (goal.score - goal.floor).square() * inside
    unsure = (logits.detach().sigmoid() - goal.floor).clamp_min(0).square() * inside
    wanted = torch.logit(goal.score.clamp(PROBABILITY_MIN, 1 - PROBABILITY_MIN))
    divergence = bernoulli_divergence(logits, wanted, temperature)
    scores = (divergence * torch.maximum(sure, unsure)).sum()
    there = sure.amax(2)
    boxes = ((1 - giou(ours.boxes, goal.boxes)) * there).sum()
    total = parallel.total(there.sum()).clamp_min(1e-6)
    return scores / total, boxes / total


def _geometry(places: Sequence[Placement], device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Returns scale, offset and picture size of each picture, ``(b, 2)``, x first."""
    columns = [[p.scale_xy, p.offset_xy, p.source_wh] for p in places]
    scale, shift, size = torch.tensor(columns, dtype=torch.float32, device=device).unbind(1)
    return scale, shift, size


def _starts(shapes: Sequence[tuple[int, int]]) -> list[int]:
    """Returns the number of each level's first cell."""
    starts, cell = [], 0
    for rows, cols in shapes:
        starts.append(cell)
        cell += rows * cols
    return starts
