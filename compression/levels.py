"""What the channels of a network's raw maps mean, so that losses can treat each part rightly."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ..models.nets.common import DetectorNet

CELL_OFFSETS = {"nanodet": 0.5, "yolov8": 0.5}
"""Heads whose sides are counted from the middle of a cell; NanoDet-Plus counts from its corner."""


@dataclass(frozen=True)
class LevelParts:
    """One raw map, taken apart.

    Attributes:
        logits: ``(b, k, h, w)``; each is a yes/no question (class, objectness), or all are
            one choice.
        boxes: ``(b, c, h, w)``; distribution bins or offsets.
        bins: Bins per box side if ``boxes`` is a distribution, else 0.
        confidence: ``(b, 1, h, w)``; the best class score of each cell, 0..1, no gradient.
        choice: Whether the logits are one choice among all classes (a softmax), and no boxes.
    """

    logits: Tensor
    boxes: Tensor
    bins: int
    confidence: Tensor
    choice: bool = False


@dataclass(frozen=True)
class Layout:
    """Which channels of every raw map of a network mean what.

    Attributes:
        logits: Yes/no questions: objectness, classes.
        boxes: Distribution bins, offsets, or whatever is only compared by distance.
        bins: Bins per box side if boxes are distributions (-1: a quarter of them), else 0.
        objectness: Whether the first logit is the objectness, which multiplies the classes.
        cell_offset: Where in its cell a distribution's sides are counted from, 0..1.
        choice: Whether the logits are one choice among all classes (a softmax): a classifier.
    """

    logits: slice
    boxes: slice
    bins: int = 0
    objectness: bool = False
    cell_offset: float = 0.0
    choice: bool = False

    @property
    def learns_boxes(self) -> bool:
        """Whether boxes can be read from a map, and so learned from labels."""
        return self.objectness or self.bins != 0


CHOICE = Layout(slice(0, None), slice(0, 0), choice=True)
"""Of a classifier."""


def layout_of(net: DetectorNet) -> Layout:
    """Returns what the channels of a network's raw maps mean; its own ``layout`` if it has one.

    Raises:
        ValueError: The network's head is not known here.
    """
    own = getattr(net, "layout", None)
    if isinstance(own, Layout):
        return own
    if net.spec_head == "yolox":
        return Layout(slice(4, None), slice(0, 4), objectness=True)
    if net.spec_head in ("nanodet", "nanodet_plus"):
        count = net.num_classes
        offset = CELL_OFFSETS.get(net.spec_head, 0.0)
        return Layout(slice(0, count), slice(count, None), bins=-1, cell_offset=offset)
    if net.spec_head == "classify":
        return CHOICE
    message = f"expected a yolox, nanodet or classify head, found {net.spec_head!r}"
    raise ValueError(message)


def take_apart(net: DetectorNet, level: Tensor) -> LevelParts:
    """Takes one raw map of ``net`` apart.

    Raises:
        ValueError: The network's head is not known here.
    """
    layout = layout_of(net)
    logits, boxes = level[:, layout.logits], level[:, layout.boxes]
    bins = boxes.shape[1] // 4 if layout.bins < 0 else layout.bins
    score = _scores(logits.detach(), layout.choice)
    if not logits.shape[1]:  # nothing is known of the map: all of it counts alike
        best = torch.ones_like(boxes[:, :1].detach())
    elif layout.objectness:
        best = score[:, :1] * score[:, 1:].amax(1, keepdim=True)
    else:
        best = score.amax(1, keepdim=True)
    return LevelParts(logits, boxes, bins, best, layout.choice)


def _scores(logits: Tensor, choice: bool) -> Tensor:
    return logits.softmax(1) if choice else logits.sigmoid()


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
        score = _scores(parts.logits, parts.choice)
        boxes = parts.boxes
        if parts.bins:
            b, _, h, w = boxes.shape
            boxes = boxes.reshape(b, 4, parts.bins, h, w).softmax(2)
        for value in (score, boxes):
            noise = torch.randn(value.shape, generator=generator)
            scale = weight if value.ndim == 4 else weight[:, :, None]
            total = total + (value * noise * scale).sum()
    return total


def probe_gradients(
    net: DetectorNet, batches: Iterable[Tensor], generator: torch.Generator
) -> Iterator[None]:
    """Sends the gradient of ``probe_loss`` back through a network, batch by batch.

    At each turn the parameters' ``grad`` is that of one batch alone; at the end it is None.

    Args:
        net: In eval mode.
        batches: Normalised float32 ``(b, 3, h, w)``.
        generator: Of the projections.

    Raises:
        ValueError: The network's head is not known here.
    """
    torch.set_flush_denormal(True)  # tiny gradients are a hundred times slower on x86 otherwise
    try:
        for batch in batches:
            net.zero_grad(set_to_none=True)
            with torch.autocast(batch.device.type, torch.bfloat16):  # 5 times as fast on a CPU
                levels = [level.float() for level in net(batch)]
            probe_loss(net, levels, generator).backward()  # type: ignore[no-untyped-call]
            yield
    finally:
        net.zero_grad(set_to_none=True)
