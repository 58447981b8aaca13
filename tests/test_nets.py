"""The networks: shapes, names, folding, tracing, export, and loading good and bad files."""

from __future__ import annotations

import contextlib
import copy
import functools
import logging
import pickle
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from edgesight.models.errors import InputError, ModelFileError
from edgesight.models.nets.build import NETS, build_net, load_weights
from edgesight.models.nets.common import (
    DetectorNet,
    WithTail,
    fold_batchnorm,
    has_batchnorm,
    make_activation,
)
from edgesight.models.nets.nanodet import NanoDetPlus, shuffle_index
from edgesight.models.nets.onnx_weights import net_wiring
from edgesight.models.nets.ssdlite import SSDLite, ssdlite_default_boxes
from edgesight.models.nets.yolox import YOLOX
from safetensors.torch import save_file
from torch import Tensor, nn

FX_NETS = ["yolox_nano", "yolox_tiny", "nanodet_plus_m"]
SIDE = 128


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def lively(name: str, seed: int = 0, num_classes: int = 80) -> DetectorNet:
    """A random network in eval mode whose every layer changes its output visibly."""
    return copy.deepcopy(_lively(name, seed, num_classes))


@functools.cache
def _lively(name: str, seed: int, num_classes: int) -> DetectorNet:
    torch.manual_seed(seed)
    net = build_net(name, num_classes)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.3)
            module.momentum = 1.0
        elif isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight)
    side = 320 if name == "ssdlite320" else SIDE
    with torch.no_grad():
        net.train()(torch.randn(2, 3, side, side))
    return net.eval()


def outputs(net: DetectorNet, x: Tensor) -> list[Tensor]:
    with torch.no_grad():
        out = net.export_forward(x)
    return list(out) if isinstance(out, tuple) else [out]


def image(seed: int = 1, side: int = SIDE, batch: int = 1) -> Tensor:
    return torch.randn(batch, 3, side, side, generator=torch.Generator().manual_seed(seed))


def assert_same(a: DetectorNet, b: DetectorNet, atol: float = 0.0, side: int = SIDE) -> None:
    for first, second in zip(
        outputs(a, image(side=side)), outputs(b, image(side=side)), strict=True
    ):
        torch.testing.assert_close(first, second, atol=atol, rtol=0)


def export(net: DetectorNet, path: Path, side: int = SIDE, dynamo: bool = False) -> Path:
    quiet = contextlib.ExitStack()
    with quiet:
        quiet.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        logging.getLogger("torch.onnx").setLevel(logging.ERROR)
        torch.onnx.export(
            WithTail(net),
            (image(side=side),),
            str(path),
            dynamo=dynamo,
            opset_version=18,
            input_names=["images"],
            **({"external_data": False, "verbose": False} if dynamo else {}),
        )
    return path


def run_onnx(path: Path, x: Tensor) -> list[np.ndarray]:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return session.run(None, {"images": x.numpy()})


# -- shapes and sizes


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
    heads = pytest.importorskip("edgesight.models.heads")
    if not hasattr(heads, "ssdlite_anchors"):
        pytest.skip("no ssdlite_anchors yet")
    for hw in ((320, 320), (256, 384)):
        np.testing.assert_allclose(heads.ssdlite_anchors(hw), ssdlite_default_boxes(hw), atol=1e-6)


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


@pytest.mark.parametrize("name", list(NETS))
@pytest.mark.parametrize("kind", ["pth", "safetensors"])
def test_state_dict_roundtrip(name: str, kind: str, tmp_path: Path) -> None:
    net = lively(name)
    path = tmp_path / f"net.{kind}"
    state = {k: v for k, v in net.state_dict().items() if not k.endswith("_index")}
    if kind == "pth":
        torch.save(state, path)
    else:
        save_file(state, path)
    other = build_net(name).eval()
    load_weights(other, path)
    assert has_batchnorm(other)
    assert_same(net, other, side=320 if name == "ssdlite320" else SIDE)


@pytest.mark.parametrize("nest", ["model", "state_dict", "ema", "module", "lightning"])
def test_nested_and_prefixed_checkpoints(nest: str, tmp_path: Path) -> None:
    net, worse = lively("nanodet_plus_m"), lively("nanodet_plus_m", seed=9)
    state, bad = net.state_dict(), worse.state_dict()
    state["head.distribution_project.project"] = torch.arange(8.0)
    aux = {"aux_fpn.reduce_layers.0.conv.weight": torch.zeros(1), "aux_head.a": torch.zeros(1)}
    content: dict[str, object] = {
        "model": {"model": state | aux, "start_epoch": 3, "optimizer": {"lr": 0.1}},
        "state_dict": {"state_dict": {f"model.{k}": v for k, v in (state | aux).items()}},
        "ema": {"model": bad, "ema_model": {"state_dict": state}},
        "module": {f"module.{k}": v for k, v in state.items()},
        "lightning": {
            "state_dict": {f"model.{k}": v for k, v in bad.items()}
            | {f"avg_model.{k}": v for k, v in (state | aux).items()}
        },
    }[nest]
    path = tmp_path / ("net.ckpt" if nest == "lightning" else "net.pth")
    torch.save(content, path)
    other = build_net("nanodet_plus_m").eval()
    load_weights(other, path)
    assert_same(net, other)


def test_a_folded_checkpoint_folds_the_net(tmp_path: Path) -> None:
    net = lively("yolox_nano")
    fold_batchnorm(net)
    save_file(net.state_dict(), tmp_path / "net.safetensors")
    other = build_net("yolox_nano").eval()
    load_weights(other, tmp_path / "net.safetensors")
    assert not has_batchnorm(other)
    assert_same(net, other)
    torch.save(build_net("yolox_nano").state_dict(), tmp_path / "fresh.pth")
    with pytest.raises(ModelFileError, match="fresh from build_net"):
        load_weights(other, tmp_path / "fresh.pth")


def test_half_precision_weights_load_as_float32(tmp_path: Path) -> None:
    net = lively("yolox_nano")
    save_file({k: v.half() for k, v in net.state_dict().items()}, tmp_path / "net.safetensors")
    other = build_net("yolox_nano").eval()
    load_weights(other, tmp_path / "net.safetensors")
    assert {p.dtype for p in other.parameters()} == {torch.float32}


class _Bomb:
    """Creates a file when unpickled."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return (Path.touch, (self.target,))


@pytest.mark.parametrize("plain", [False, True])
def test_a_pickle_with_code_is_refused_and_not_run(plain: bool, tmp_path: Path) -> None:
    trace, path = tmp_path / "ran", tmp_path / "net.pth"
    content = {"model": {"a": torch.zeros(1).tolist(), "b": _Bomb(trace)}}
    if plain:
        path.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, path)
    with pytest.raises(ModelFileError, match="refused") as caught:
        load_weights(build_net("yolox_nano"), path)
    assert "\n" not in str(caught.value)
    assert not trace.exists()
    with contextlib.suppress(RuntimeError):  # the plain one is no torch file, but it is unpickled
        torch.load(path, weights_only=False)
    assert trace.exists(), "the bomb works, so refusing it meant something"


@pytest.fixture(scope="module")
def good_files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("good")
    net = lively("yolox_nano")
    torch.save(net.state_dict(), folder / "net.pth")
    save_file(net.state_dict(), folder / "net.safetensors")
    export(net, folder / "net.onnx")
    return {path.suffix: path for path in folder.iterdir()}


@pytest.mark.parametrize("suffix", [".pth", ".safetensors", ".onnx"])
@pytest.mark.parametrize("damage", ["truncated", "empty", "noise", "text"])
def test_damaged_files(
    suffix: str, damage: str, good_files: dict[str, Path], tmp_path: Path
) -> None:
    good = good_files[suffix].read_bytes()
    path = tmp_path / f"net{suffix}"
    path.write_bytes(
        {
            "truncated": good[: len(good) * 2 // 3],
            "empty": b"",
            "noise": np.random.default_rng(0).bytes(5000),
            "text": b"<html>404: Not Found</html>\n" * 9,
        }[damage]
    )
    net = lively("yolox_nano", seed=4)
    before = {k: v.clone() for k, v in net.state_dict().items()}
    with pytest.raises(ModelFileError) as caught:
        load_weights(net, path)
    message = str(caught.value)
    assert str(path) in message
    assert "expected" in message
    assert "found" in message
    assert "\n" not in message
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())


@pytest.mark.parametrize("suffix", [".pth", ".safetensors", ".onnx"])
@pytest.mark.parametrize(
    ("name", "num_classes"), [("yolox_tiny", 80), ("nanodet_plus_m", 80), ("yolox_nano", 3)]
)
def test_the_file_of_another_net(
    suffix: str, name: str, num_classes: int, good_files: dict[str, Path]
) -> None:
    net = build_net(name, num_classes)
    before = {k: v.clone() for k, v in net.state_dict().items()}
    with pytest.raises(ModelFileError, match=f"{name} with {num_classes} classes.*found.*choose"):
        load_weights(net, good_files[suffix])
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())


@pytest.mark.parametrize("suffix", [".pth", ".safetensors", ".onnx"])
def test_not_finite_weights(suffix: str, good_files: dict[str, Path], tmp_path: Path) -> None:
    net = lively("yolox_nano")
    load_weights(net, good_files[suffix])
    with torch.no_grad():
        next(net.parameters())[0, 0, 0, 0] = float("nan")
    path = tmp_path / f"net{suffix}"
    if suffix == ".pth":
        torch.save(net.state_dict(), path)
    elif suffix == ".safetensors":
        save_file(net.state_dict(), path)
    else:
        export(net, path)
    with pytest.raises(ModelFileError, match="expected finite weights"):
        load_weights(build_net("yolox_nano"), path)


def test_missing_unknown_and_wrong_kind_of_file(tmp_path: Path) -> None:
    net = build_net("yolox_nano")
    with pytest.raises(ModelFileError, match="found none"):
        load_weights(net, tmp_path / "no.onnx")
    with pytest.raises(ModelFileError, match=r"found \.bin"):
        load_weights(net, tmp_path / "net.bin")
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(ModelFileError, match="state dict"):
        load_weights(net, tmp_path / "list.pt")
    state = net.state_dict()
    del state["head.stems.0.conv.weight"]
    torch.save(state, tmp_path / "less.pt")
    with pytest.raises(ModelFileError, match=r"1 missing, e\.g\. head\.stems\.0\.conv\.weight"):
        load_weights(net, tmp_path / "less.pt")
    torch.save(net.state_dict() | {"head.extra": torch.zeros(1)}, tmp_path / "more.pt")
    with pytest.raises(ModelFileError, match=r"1 unknown, e\.g\. head\.extra"):
        load_weights(net, tmp_path / "more.pt")


def _edit(good: Path, path: Path, change: str) -> Path:
    model = onnx.load(good)
    nodes = model.graph.node
    convs = [i for i, node in enumerate(nodes) if node.op_type == "Conv"]
    if change == "wiring":  # the two convolutions of a cross-stage block read the same tensor
        for i in convs[1:]:
            if nodes[i].input[0] != nodes[convs[0]].input[0]:
                first = nodes[convs[10]]
                same = [
                    j
                    for j in convs[12:]
                    if _shape(model, nodes[j].input[1])[1] == _shape(model, first.input[1])[1]
                ]
                nodes[same[0]].input[0] = first.input[0]
                break
    elif change == "batchnorm":
        nodes[convs[3]].op_type = "BatchNormalization"
    elif change == "quantized":
        nodes[convs[3]].op_type = "QLinearConv"
    elif change == "activation":
        nodes.append(onnx.helper.make_node("Relu", [nodes[convs[0]].output[0]], ["unused"]))
    elif change == "weights":
        nodes[convs[3]].input[1] = "images"
    elif change == "stride":
        for attribute in nodes[convs[1]].attribute:
            if attribute.name == "strides":
                attribute.ints[0] = 4
    path.write_bytes(model.SerializeToString())
    return path


def _shape(model: onnx.ModelProto, name: str) -> list[int]:
    return next(list(item.dims) for item in model.graph.initializer if item.name == name)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("wiring", "fed by"),
        ("batchnorm", "1 BatchNormalization nodes"),
        ("quantized", "QLinearConv"),
        ("activation", "0 Relu nodes"),
        ("weights", "stored 2-D convolution weights"),
        ("stride", "stride 4"),
    ],
)
def test_onnx_of_another_structure(
    change: str, words: str, good_files: dict[str, Path], tmp_path: Path
) -> None:
    path = _edit(good_files[".onnx"], tmp_path / "edited.onnx", change)
    with pytest.raises(ModelFileError, match=words):
        load_weights(build_net("yolox_nano"), path)


def test_wiring_names_what_feeds_a_convolution() -> None:
    names, wiring = net_wiring(build_net("nanodet_plus_m"))
    assert len(names) == 110
    first, down = names.index("backbone.conv1.0"), names.index("backbone.stage2.0.branch1.0")
    assert wiring[first].feeders == {-1}
    assert wiring[down].feeders == {first}
    unit = wiring[names.index("backbone.stage2.1.branch2.0")]
    assert {names[i] for i in unit.feeders} == {
        "backbone.stage2.0.branch1.2",
        "backbone.stage2.0.branch2.5",
    }
