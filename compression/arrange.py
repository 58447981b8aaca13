"""Finds out what the channels of a foreign detector's raw maps mean, by asking its tail.

Every channel of every raw map is filled with a number of its own; where that number (or its
sigmoid) comes out again says which column of the output the channel is. No names, no guesses; the
answer is checked on random maps.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..models.heads import grid_hw
from ..models.spec import ModelSpec
from .levels import CELL_OFFSETS, CHOICE, Layout

Tail = Callable[[Sequence[Tensor]], Sequence[Tensor]]
TOLERANCE = 1e-4
REACH = 3.0
"""Numbers go from minus to plus this: within it a sigmoid still tells them apart."""


@dataclass(frozen=True)
class Arrangement:
    """How raw maps become levels in our order, and what their channels then mean.

    Attributes:
        levels: Per level, finest first: the numbers of the raw maps that are put side by side.
        orders: Per level: which channel of those comes at each place; empty: as they are.
        layout: What the channels of a level mean.
    """

    levels: tuple[tuple[int, ...], ...]
    orders: tuple[tuple[int, ...], ...]
    layout: Layout

    def join(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """Returns the levels of these raw maps."""
        levels = []
        for numbers, order in zip(self.levels, self.orders, strict=True):
            parts = [maps[n] for n in numbers]
            level = parts[0] if len(parts) == 1 else torch.cat(parts, 1)
            if order:
                level = level[:, list(order)]
            levels.append(level)
        return levels

    def split(self, levels: Sequence[Tensor], widths: Sequence[int]) -> list[Tensor]:
        """Returns the raw maps of these levels; the inverse of ``join``.

        Args:
            levels: Each ``(b, c, h, w)``.
            widths: Channels of each raw map.
        """
        maps: dict[int, Tensor] = {}
        for level, numbers, order in zip(levels, self.levels, self.orders, strict=True):
            if order:
                back = torch.argsort(torch.tensor(order, device=level.device))
                level = level[:, back]
            parts = torch.split(level, [widths[n] for n in numbers], 1)
            maps.update(zip(numbers, parts, strict=True))
        return [maps[n] for n in range(len(widths))]


def unknown_arrangement(count: int) -> Arrangement:
    """Returns the one for maps of which nothing is known: all are compared by distance."""
    levels = tuple((n,) for n in range(count))
    return Arrangement(levels, ((),) * count, Layout(slice(0, 0), slice(None)))


@torch.no_grad()
def arrange(
    tail: Tail, shapes: Sequence[tuple[int, ...]], spec: ModelSpec, softmax: bool
) -> Arrangement:
    """Returns how to put raw maps into our order, or the one for unknown maps.

    Args:
        tail: Raw maps (batch of one) to outputs.
        shapes: Of the raw maps.
        spec: Of the detector.
        softmax: Whether the tail has one: boxes are then distributions.
    """
    unknown = unknown_arrangement(len(shapes))
    if spec.head == "classify":
        return _classifier(tail, shapes, spec) or unknown
    total = sum(s[1] for s in shapes)
    numbers = ((torch.arange(total) + 0.5) / total * 2 - 1) * REACH
    maps = [
        part[None, :, None, None].expand(shape).clone()
        for part, shape in zip(torch.split(numbers, [s[1] for s in shapes]), shapes, strict=True)
    ]
    columns = _columns(tail(maps), spec)
    if columns is None:
        return unknown
    scores = _score_columns(spec)
    levels, orders, sources = [], [], []
    row = 0
    layout: Layout | None = None
    for stride in spec.strides:
        grid = grid_hw(spec.input_hw, stride)
        mine = tuple(n for n, s in enumerate(shapes) if tuple(s[2:]) == grid)
        if not mine or row >= len(columns):
            return unknown
        mine = _in_column_order(mine, maps, columns[row], scores)
        found = _find(maps, mine, columns[row], scores)
        ours = _our_order(found, sum(shapes[n][1] for n in mine), spec, softmax)
        if ours is None or (layout is not None and ours[1] != layout):
            return unknown
        order, layout = ours
        levels.append(mine)
        orders.append(() if order == tuple(range(len(order))) else order)
        sources.append(found)
        row += grid[0] * grid[1]
    if layout is None or sorted(n for level in levels for n in level) != list(range(len(shapes))):
        return unknown
    arrangement = Arrangement(tuple(levels), tuple(orders), layout)
    return arrangement if _holds(arrangement, sources, tail, shapes, spec) else unknown


def _classifier(
    tail: Tail, shapes: Sequence[tuple[int, ...]], spec: ModelSpec
) -> Arrangement | None:
    """Returns the one for a classifier's only map; None if more than a softmax comes behind it."""
    if list(shapes) != [(1, len(spec.classes), 1, 1)]:
        return None
    logits = torch.randn(shapes[0], generator=torch.Generator().manual_seed(0))
    found = tail([logits])[0].flatten()
    for wanted in (logits.flatten(), logits.flatten().softmax(0)):
        if torch.allclose(found, wanted, atol=TOLERANCE):
            return Arrangement(((0,),), ((),), CHOICE)
    return None


def _find(maps: Sequence[Tensor], mine: Sequence[int], columns: Tensor, scores: range) -> list[int]:
    """Returns which channel of these maps, side by side, each column shows; -1 if none."""
    values = torch.cat([maps[n][0, :, 0, 0] for n in mine])
    found = [-1] * len(columns)
    for shown, wanted in ((values.sigmoid(), scores), (values, range(len(columns)))):
        gaps, places = (shown[None] - columns[:, None]).abs().min(1)
        for column in wanted:
            if found[column] < 0 and gaps[column] < TOLERANCE:
                found[column] = int(places[column])
    return found


def _in_column_order(
    mine: tuple[int, ...], maps: Sequence[Tensor], columns: Tensor, scores: range
) -> tuple[int, ...]:
    """Returns the maps of a level sorted by the first column that each is shown in."""

    def first(number: int) -> int:
        found = _find(maps, [number], columns, scores)
        return next((c for c, channel in enumerate(found) if channel >= 0), -1)

    return tuple(sorted(mine, key=first))


def _our_order(
    found: list[int], count: int, spec: ModelSpec, softmax: bool
) -> tuple[tuple[int, ...], Layout] | None:
    """Returns the channel at each place of a level in our order, and the layout."""
    classes = len(spec.classes)
    if spec.head == "yolov8":
        scores = found[4:]
        boxes = [i for i in range(count) if i not in scores]
        order = (*boxes, *scores)
        bins = len(boxes) // 4 if softmax and len(boxes) % 4 == 0 else 0
        parts = slice(len(boxes), None), slice(0, len(boxes))
        layout = Layout(*parts, bins, cell_offset=CELL_OFFSETS["yolov8"])
    else:
        order = tuple(found)
        layout = Layout(slice(4, None), slice(0, 4), objectness=True)
        if spec.head != "yolox":
            parts = slice(0, classes), slice(classes, None)
            offset = CELL_OFFSETS.get(spec.head, 0.0)
            layout = Layout(*parts, spec.reg_max + 1, cell_offset=offset)
    return (order, layout) if sorted(order) == list(range(count)) else None


def _columns(outputs: Sequence[Tensor], spec: ModelSpec) -> Tensor | None:
    """Returns the outputs as ``(cells, columns)``, levels finest first; None for other heads."""
    if spec.head in ("yolox", "nanodet_plus"):
        return outputs[0][0]
    if spec.head == "yolov8":
        return outputs[0][0].T
    if spec.head == "nanodet":
        ordered = sorted(outputs, key=lambda o: -o.shape[1])
        scores = [o[0] for o in ordered if o.shape[2] == len(spec.classes)]
        bins = [o[0] for o in ordered if o.shape[2] != len(spec.classes)]
        return torch.cat([torch.cat(scores), torch.cat(bins)], 1)
    return None


def _score_columns(spec: ModelSpec) -> range:
    count = len(spec.classes)
    return {"yolox": range(4, 5 + count), "yolov8": range(4, 4 + count)}.get(
        spec.head, range(count)
    )


def _holds(
    arrangement: Arrangement,
    sources: list[list[int]],
    tail: Tail,
    shapes: Sequence[tuple[int, ...]],
    spec: ModelSpec,
) -> bool:
    """Whether random maps come out of the tail where the arrangement says."""
    generator = torch.Generator().manual_seed(0)
    maps = [torch.randn(shape, generator=generator) for shape in shapes]
    columns = _columns(tail(maps), spec)
    assert columns is not None
    row, scores = 0, _score_columns(spec)
    for numbers, source in zip(arrangement.levels, sources, strict=True):
        raw = torch.cat([maps[n] for n in numbers], 1)[0].flatten(1).T
        shown = columns[row : row + len(raw)]
        row += len(raw)
        for column, channel in enumerate(source):
            if channel < 0:
                continue
            wanted = raw[:, channel]
            close = torch.allclose(shown[:, column], wanted, atol=TOLERANCE)
            if column in scores and not close:
                close = torch.allclose(shown[:, column], wanted.sigmoid(), atol=TOLERANCE)
            if not close:
                return False
    return row == len(columns)
