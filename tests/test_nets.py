"""The networks: shapes, names, folding, tracing and export."""

from __future__ import annotations

import runpy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from edgesight.models.errors import InputError
from edgesight.models.heads import ssdlite_anchors
from edgesight.models.nets.build import NETS, build_net, load_weights
from edgesight.models.nets.common import (
    fold_batchnorm,
    has_batchnorm,
    make_activation,
)
from edgesight.models.nets.nanodet import NanoDetPlus, shuffle_index
from edgesight.models.nets.ssdlite import SSDLite, ssdlite_default_boxes
from edgesight.models.nets.yolox import YOLOX
from torch import Tensor, nn

kit: Any = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("nets_kit.py"))))
lively = kit.lively
outputs = kit.outputs
image = kit.image
assert_same = kit.assert_same
export = kit.export
run_onnx = kit.run_onnx
FX_NETS, SIDE = kit.FX_NETS, kit.SIDE
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize(
    ("name", "millions"), [("yolox_nano", 0.91), ("yolox_tiny", 5.06), ("yolox_s", 8.97)]
)
def test_yolox_has_the_published_number_of_parameters(name: str, millions: float) -> None:
    count = sum(p.numel() for p in build_net(name).parameters())
    assert round(count / 1e6, 2) == millions


def test_nanodet_folded_has_the_files_number_of_parameters() -> None:
    net = build_net("nanodet_plus_m")
    assert fold_batchnorm(net) == 106
    assert sum(p.numel() for p in net.parameters()) == 1_186_346


@pytest.mark.parametrize(
    ("name", "side", "cells", "channels"),
    [
        ("yolox_nano", 96, [12, 6, 3], 4 + 1 + 7),
        ("nanodet_plus_m", 96, [12, 6, 3, 2], 7 + 32),
        ("nanodet_plus_m", 416, [52, 26, 13, 7], 7 + 32),
    ],
)
def test_levels_are_raw_maps(name: str, side: int, cells: list[int], channels: int) -> None:
    net = build_net(name, num_classes=7).eval()
    with torch.no_grad():
        levels = net(image(side=side, batch=2))
        flat = net.tail(levels)
    assert [tuple(level.shape) for level in levels] == [(2, channels, c, c) for c in cells]
    assert [-(-side // stride) for stride in net.strides] == cells
    assert flat.shape == (2, sum(c * c for c in cells), channels)


def test_tail_keeps_boxes_raw_and_scores_in_0_to_1_row_by_row() -> None:
    x = image()
    for name, scores in (("yolox_nano", slice(4, None)), ("nanodet_plus_m", slice(0, 80))):
        net = lively(name)
        with torch.no_grad():
            level = net(x)[0][0]
        expected = level.clone()
        expected[scores] = expected[scores].sigmoid()
        rows = outputs(net, x)[0][0]
        width = level.shape[-1]
        for row, col in ((0, 0), (0, 3), (2, 1)):
            torch.testing.assert_close(rows[row * width + col], expected[:, row, col])


def test_export_forward_is_tail_of_forward() -> None:
    for name in NETS:
        net = lively(name)
        x = image(side=320 if name == "ssdlite320" else SIDE)
        with torch.no_grad():
            expected = net.tail(net(x))
        expected = expected if isinstance(expected, tuple) else (expected,)
        for a, b in zip(outputs(net, x), expected, strict=True):
            torch.testing.assert_close(a, b, atol=0, rtol=0)


def test_ssdlite_gives_two_maps_per_level() -> None:
    net = lively("ssdlite320")
    assert isinstance(net, SSDLite)
    with torch.no_grad():
        levels = net(image(side=320))
    scores, boxes = net.tail(levels)
    assert [tuple(m.shape[1:]) for m in levels[0::2]] == [(546, c, c) for c in (20, 10, 5, 3, 2, 1)]
    assert [tuple(m.shape[1:]) for m in levels[1::2]] == [(24, c, c) for c in (20, 10, 5, 3, 2, 1)]
    assert scores.shape == (1, 3234, 91)
    assert boxes.shape == (1, 3234, 4)
    # box 4 of the cell in row 1, column 2 of the first level
    torch.testing.assert_close(scores[0, (1 * 20 + 2) * 6 + 4], levels[0][0, 4 * 91 : 5 * 91, 1, 2])
    assert torch.isfinite(scores).all()
    assert (
        build_net("ssdlite320", 3)
        .tail(build_net("ssdlite320", 3).eval()(image(side=320)))[0]
        .shape[2]
        == 4
    )


def test_ssdlite_tail_orders_as_torchvisions_head() -> None:
    net = lively("ssdlite320")
    x = image(side=320)
    with torch.no_grad():
        expected = net.head(list(net.backbone(x).values()))
        scores, boxes = outputs(net, x)
    torch.testing.assert_close(scores, expected["cls_logits"], atol=0, rtol=0)
    torch.testing.assert_close(boxes, expected["bbox_regression"], atol=0, rtol=0)


def test_ssdlite_pretrained_is_for_80_classes_only() -> None:
    with pytest.raises(ValueError, match="expected 80 classes"):
        SSDLite(5, pretrained=True)


def test_default_boxes() -> None:
    boxes = ssdlite_default_boxes()
    assert boxes.shape == (3234, 4)
    assert boxes.dtype == np.float32
    np.testing.assert_allclose(boxes[0], [0.025, 0.025, 0.2, 0.2], atol=1e-6)
    np.testing.assert_allclose(boxes[6, :2], [0.075, 0.025], atol=1e-6)  # x runs first
    assert boxes.min() >= 0
    assert boxes.max() <= 1


def test_default_boxes_agree_with_the_torch_free_decoder() -> None:
    for hw in ((320, 320), (256, 384)):
        np.testing.assert_allclose(ssdlite_anchors(hw), ssdlite_default_boxes(hw), atol=1e-6)


# -- structure


def test_names_are_those_of_published_checkpoints() -> None:
    yolox_nano = set(build_net("yolox_nano").state_dict())
    assert yolox_nano >= {
        "backbone.backbone.stem.conv.conv.weight",
        "backbone.backbone.stem.conv.bn.running_var",
        "backbone.backbone.dark2.0.dconv.conv.weight",
        "backbone.backbone.dark3.1.m.2.conv2.pconv.bn.weight",
        "backbone.backbone.dark5.1.conv2.conv.weight",
        "backbone.lateral_conv0.conv.weight",
        "backbone.C3_p4.conv3.conv.weight",
        "backbone.reduce_conv1.bn.bias",
        "backbone.bu_conv2.dconv.conv.weight",
        "backbone.C3_n4.m.0.conv1.conv.weight",
        "head.stems.0.conv.weight",
        "head.cls_convs.0.0.dconv.conv.weight",
        "head.reg_convs.2.1.pconv.conv.weight",
        "head.cls_preds.0.weight",
        "head.obj_preds.1.bias",
    }
    assert "backbone.backbone.dark2.0.conv.weight" in build_net("yolox_s").state_dict()
    assert set(build_net("nanodet_plus_m").state_dict()) >= {
        "backbone.conv1.0.weight",
        "backbone.conv1.1.running_mean",
        "backbone.stage2.0.branch1.0.weight",
        "backbone.stage2.0.branch1.3.weight",
        "backbone.stage3.7.branch2.5.weight",
        "fpn.reduce_layers.2.conv.weight",
        "fpn.reduce_layers.2.bn.weight",
        "fpn.top_down_blocks.0.blocks.0.ghost1.primary_conv.0.weight",
        "fpn.top_down_blocks.1.blocks.0.ghost2.cheap_operation.1.weight",
        "fpn.bottom_up_blocks.1.blocks.0.shortcut.3.bias",
        "fpn.downsamples.0.depthwise.weight",
        "fpn.downsamples.1.pwnorm.weight",
        "fpn.extra_lvl_in_conv.0.pointwise.weight",
        "fpn.extra_lvl_out_conv.0.dwnorm.weight",
        "head.cls_convs.3.1.depthwise.weight",
        "head.gfl_cls.3.bias",
    }


def test_yolox_uses_the_published_epsilon() -> None:
    norms = [m for m in build_net("yolox_nano").modules() if isinstance(m, nn.BatchNorm2d)]
    assert {norm.eps for norm in norms} == {1e-3}


@pytest.mark.parametrize("name", list(NETS))
def test_every_activation_is_used_once(name: str) -> None:
    net = build_net(name).eval()
    calls: dict[str, int] = {}
    kinds = (nn.SiLU, nn.LeakyReLU, nn.ReLU, nn.ReLU6, nn.Hardswish, nn.Conv2d)
    for path, module in net.named_modules():
        if isinstance(module, kinds):
            calls[path] = 0

            def count(*_: object, path: str = path) -> None:
                calls[path] += 1

            module.register_forward_hook(count)
            assert not getattr(module, "inplace", False)
    with torch.no_grad():
        net(image(side=320 if name == "ssdlite320" else SIDE))
    assert set(calls.values()) == {1}


def test_shuffle_index_is_a_channel_shuffle() -> None:
    x = torch.arange(8).reshape(1, 8, 1, 1)
    shuffled = x.reshape(1, 2, 4, 1, 1).transpose(1, 2).reshape(1, 8, 1, 1)
    assert torch.equal(x.index_select(1, shuffle_index(8)), shuffled)


def test_shuffle_stage_equals_chunk_and_shuffle() -> None:
    net = lively("nanodet_plus_m")
    assert isinstance(net, NanoDetPlus)
    stage = net.backbone.stage2
    x = torch.randn(1, 24, 16, 16)

    def shuffle(y: Tensor) -> Tensor:
        b, c, h, w = y.shape
        return y.reshape(b, 2, c // 2, h, w).transpose(1, 2).reshape(b, c, h, w)

    with torch.no_grad():
        y = shuffle(stage[0](x))
        for block in list(stage)[1:]:
            left, right = y.chunk(2, 1)
            y = shuffle(torch.cat([left, block.branch2(right)], 1))
        torch.testing.assert_close(stage(x), y, atol=0, rtol=0)


@pytest.mark.parametrize("name", FX_NETS)
def test_fx_traces(name: str) -> None:
    net = lively(name)
    traced = torch.fx.symbolic_trace(net)
    for side in (SIDE, 64):
        with torch.no_grad():
            for a, b in zip(traced(image(side=side)), net(image(side=side)), strict=True):
                torch.testing.assert_close(a, b, atol=0, rtol=0)


def test_unknown_names_are_refused() -> None:
    with pytest.raises(InputError, match=r"yolox_nano.*found 'yolo11n'"):
        build_net("yolo11n")
    with pytest.raises(InputError, match="at least 1 class"):
        build_net("yolox_nano", 0)
    with pytest.raises(ValueError, match="nano"):
        YOLOX("huge")
    with pytest.raises(ValueError, match="leaky_relu"):
        make_activation("swish2")


# -- folding


@pytest.mark.parametrize("name", list(NETS))
def test_folding_changes_nothing(name: str) -> None:
    net = lively(name)
    side = 320 if name == "ssdlite320" else SIDE
    before = outputs(net, image(side=side))
    count = sum(isinstance(m, nn.BatchNorm2d) for m in net.modules())
    assert fold_batchnorm(net) == count
    assert not has_batchnorm(net)
    assert fold_batchnorm(net) == 0
    for a, b in zip(outputs(net, image(side=side)), before, strict=True):
        assert b.std() > 0.01, "the comparison would be vacuous"
        torch.testing.assert_close(a, b, atol=1e-4 * float(b.abs().max()), rtol=0)


def test_folding_with_a_bias_is_exact() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.ReLU(), nn.BatchNorm2d(5)
    ).double()
    net.train()(torch.randn(8, 3, 9, 9).double())
    net.eval()
    x = torch.randn(2, 3, 9, 9).double()
    before = net(x)
    assert fold_batchnorm(net) == 1  # the one behind the activation cannot be folded
    torch.testing.assert_close(net(x), before, atol=1e-12, rtol=0)


# -- export


@pytest.mark.parametrize("name", list(NETS))
def test_exported_file_runs_equal_and_loads_back(name: str, tmp_path: Path) -> None:
    net = lively(name)
    side = 320 if name == "ssdlite320" else SIDE
    path = export(net, tmp_path / "net.onnx", side)
    assert not net.training
    x = image(3, side)
    for a, b in zip(run_onnx(path, x), outputs(net, x), strict=True):
        np.testing.assert_allclose(a, b.numpy(), atol=1e-4 * float(b.abs().max()))
    other = build_net(name).eval()
    load_weights(other, path)
    assert not has_batchnorm(other)
    assert_same(
        net, other, atol=1e-4 * float(outputs(net, image(side=side))[0].abs().max()), side=side
    )


def test_dynamo_export_of_nanodet_is_clean(tmp_path: Path) -> None:
    net = lively("nanodet_plus_m")
    path = export(net, tmp_path / "net.onnx", dynamo=True)
    ops = {node.op_type for node in onnx.load(path).graph.node}
    assert ops == {
        *("Conv", "LeakyRelu", "Concat", "Gather", "Slice", "Add", "Sigmoid"),
        *("Reshape", "Resize", "MaxPool", "Transpose"),
    }
    x = image(3)
    expected = outputs(net, x)[0]
    np.testing.assert_allclose(run_onnx(path, x)[0], expected.numpy(), atol=1e-3)
    other = build_net("nanodet_plus_m").eval()
    load_weights(other, path)
    assert_same(net, other, atol=1e-3)


# -- loading
