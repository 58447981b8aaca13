"""Loading weights into the networks: good files and bad ones."""

from __future__ import annotations

import contextlib
import pickle
import runpy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from edgesight.models.errors import ModelFileError
from edgesight.models.nets.build import NETS, build_net, load_weights
from edgesight.models.nets.common import (
    fold_batchnorm,
    has_batchnorm,
)
from edgesight.models.nets.onnx_weights import net_wiring
from safetensors.torch import save_file

kit: Any = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("nets_kit.py"))))
lively = kit.lively
outputs = kit.outputs
image = kit.image
assert_same = kit.assert_same
export = kit.export
run_onnx = kit.run_onnx
FX_NETS, SIDE = kit.FX_NETS, kit.SIDE
pytestmark = pytest.mark.usefixtures("one_thread")


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
