"""What the channels of a network's raw maps mean, so that losses can treat each part rightly."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..models.nets.common import DetectorNet


@dataclass(frozen=True)
class LevelParts:
    """One raw map, taken apart.

    Attributes:
        logits: ``(b, k, h, w)``; each is a yes/no question (class, objectness).
        boxes: ``(b, c, h, w)``; distribution bins or offsets.
        bins: Bins per box side if ``boxes`` is a distribution, else 0.
        confidence: ``(b, 1, h, w)``; the best class score of each cell, 0..1, no gradient.
    """

    logits: Tensor
    boxes: Tensor
    bins: int
    confidence: Tensor


def take_apart(net: DetectorNet, level: Tensor) -> LevelParts:
    """Takes one raw map of ``net`` apart.

    Raises:
        ValueError: The network's head is not known here.
    """
    if net.spec_head == "yolox":
        boxes, logits = level[:, :4], level[:, 4:]
        score = logits.detach().sigmoid()
        best = score[:, :1] * score[:, 1:].amax(1, keepdim=True)
        return LevelParts(logits, boxes, 0, best)
    if net.spec_head == "nanodet_plus":
        logits, boxes = level[:, : net.num_classes], level[:, net.num_classes :]
        best = logits.detach().sigmoid().amax(1, keepdim=True)
        return LevelParts(logits, boxes, boxes.shape[1] // 4, best)
    message = f"expected a yolox or nanodet_plus head, found {net.spec_head!r}"
    raise ValueError(message)


def probe_loss(net: DetectorNet, levels: list[Tensor], generator: torch.Generator) -> Tensor:
    """Returns a random projection of the outputs that matter.

    The square of its gradient at any inner tensor, averaged over draws, is how much a small error
    there changes the outputs (Hutchinson's estimator of the Gauss-Newton diagonal). Cells are
    weighted by their confidence, so that background does not drown the objects.
    """
    total = torch.zeros(())
    for level in levels:
        parts = take_apart(net, level)
        weight = parts.confidence.square()
        score = parts.logits.sigmoid()
        boxes = parts.boxes
        if parts.bins:
            b, _, h, w = boxes.shape
            boxes = boxes.reshape(b, 4, parts.bins, h, w).softmax(2)
        for value in (score, boxes):
            noise = torch.randn(value.shape, generator=generator)
            scale = weight if value.ndim == 4 else weight[:, :, None]
            total = total + (value * noise * scale).sum()
    return total
