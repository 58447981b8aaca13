"""Learning from boxes: cells are read as the decoders of the heads read them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from edgesight.compression.assign import Targets, label_loss, read_cells
from edgesight.compression.levels import layout_of
from edgesight.models.heads import HEADS, grid_hw
from edgesight.models.spec import ModelSpec

SIDE = 64
CLASSES = ("a", "b")


def net_of(head: str) -> Any:
    return SimpleNamespace(spec_head=head, strides=HEADS[head].strides, num_classes=len(CLASSES))


def maps(head: str, seed: int = 0) -> list[torch.Tensor]:
    """Raw maps; one cell of the finest level is sure of class b."""
    generator = torch.Generator().manual_seed(seed)
    width = 5 + 2 if head == "yolox" else 2 + 32
    levels = [
        torch.randn(1, width, *grid_hw((SIDE, SIDE), s), generator=generator)
        for s in HEADS[head].strides
    ]
    scores = slice(4, None) if head == "yolox" else slice(0, 2)
    for level in levels:
        level[:, scores] = -9
    levels[0][0, 5 if head == "yolox" else 1, 3, 4] = 4
    if head == "yolox":
        levels[0][0, 4, 3, 4] = 4
        levels[0][0, 6, 3, 4] = 4
        levels[0][0, 5, 3, 4] = -9
    return levels


def outputs(head: str, levels: list[torch.Tensor]) -> list[Any]:
    """What a file with this head gives."""
    flat = [level.flatten(2).transpose(1, 2) for level in levels]
    if head == "nanodet":
        scores = [f[..., :2].sigmoid() for f in flat]
        return [o.numpy() for o in (*scores, *(f[..., 2:] for f in flat))]
    joined = torch.cat(flat, 1)
    cut = slice(4, None) if head == "yolox" else slice(0, 2)
    joined[..., cut] = joined[..., cut].sigmoid()
    return [joined.numpy()]


@pytest.mark.parametrize("head", ["yolox", "nanodet_plus", "nanodet"])
def test_boxes_are_read_as_the_decoder_reads_them(head: str) -> None:
    levels = maps(head)
    known = HEADS[head]
    spec = ModelSpec(head, (SIDE, SIDE), CLASSES, strides=known.strides)
    wanted, score, label = known.decode(outputs(head, levels), spec, 0.5)
    assert len(score) == 1
    assert label.tolist() == [1]
    found = read_cells(net_of(head), levels).boxes[0, 3 * (SIDE // 8) + 4]
    np.testing.assert_allclose(found.numpy(), wanted[0], atol=1e-3)


def test_no_target_asks_for_silence() -> None:
    levels = [level.requires_grad_() for level in maps("nanodet_plus")]
    none = Targets(torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64), torch.zeros(0))
    scores, boxes = label_loss(net_of("nanodet_plus"), levels, [none])
    assert float(boxes) == 0
    (gradient,) = torch.autograd.grad(scores, [levels[0]])
    assert gradient[0, 1, 3, 4] > 0
    assert np.all(gradient[:, 2:].numpy() == 0)


def test_whose_boxes_cannot_be_read_is_known() -> None:
    assert layout_of(net_of("yolox")).learns_boxes
    assert layout_of(net_of("nanodet")).learns_boxes
    assert layout_of(net_of("nanodet")).cell_offset == 0.5
    assert layout_of(net_of("nanodet_plus")).cell_offset == 0
