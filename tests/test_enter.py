"""Networks that are not ours: an ONNX file cut at its last convolutions, and torch modules."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from edgesight.compression.arrange import arrange, unknown_arrangement
from edgesight.compression.calibrate import session
from edgesight.compression.cut import cut, masked
from edgesight.compression.distill import output_loss
from edgesight.compression.enter import enter_module, enter_onnx
from edgesight.compression.foreign import ForeignNet, export_foreign, reattach_tail
from edgesight.compression.groups import find_groups
from edgesight.compression.levels import take_apart
from edgesight.compression.onnx_io import fold_preprocess, save_model
from edgesight.models.errors import ModelFileError, RecipeError
from edgesight.models.graph import load_model
from edgesight.models.nets.common import has_batchnorm
from edgesight.models.spec import ModelSpec
from onnx import TensorProto, helper

kit: Any = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("prune_kit.py"))))


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found: Path = kit.write_onnx(tmp_path_factory.mktemp("onnx") / "small.onnx")
    return found


@pytest.fixture(scope="module")
def net(path: Path) -> ForeignNet:
    return enter_onnx(path)[0]


def run(model: Any, x: np.ndarray) -> list[np.ndarray]:
    runner = session(model)
    found: list[np.ndarray] = runner.run(None, {runner.get_inputs()[0].name: x})
    return found


def noise(batch: int = 1) -> np.ndarray:
    random = np.random.default_rng(3)
    return random.uniform(0, 255, (batch, 3, kit.SIDE, kit.SIDE)).astype(np.float32)


# -- an ONNX file comes in


def test_same_outputs_as_the_file_for_more_than_one_picture(path: Path, net: ForeignNet) -> None:
    x = noise(3)
    with torch.no_grad():
        found = net.export_forward(torch.from_numpy(x)).numpy()
    wanted = np.concatenate([run(onnx.load(path), x[i : i + 1])[0] for i in range(3)])
    assert found.shape == wanted.shape == (3, 84, 7)
    np.testing.assert_allclose(found, wanted, atol=1e-3)


def test_levels_are_in_our_order(net: ForeignNet) -> None:
    """The file's convolutions come classes, boxes, objectness; ours are boxes first."""
    assert (net.spec_head, net.strides, net.num_classes) == ("yolox", (8, 16, 32), 2)
    with torch.no_grad():
        x = torch.from_numpy(noise())
        levels = net(x)
        out = net.tail(levels)
    assert [tuple(level.shape) for level in levels] == [
        (1, 7, 8, 8), (1, 7, 4, 4), (1, 7, 2, 2)
    ]  # fmt: skip
    parts = take_apart(net, levels[0])
    torch.testing.assert_close(parts.boxes[0].flatten(1).T, out[0, :64, :4])
    torch.testing.assert_close(parts.logits[0].sigmoid().flatten(1).T, out[0, :64, 4:])
    best = out[0, :64, 4] * out[0, :64, 5:].amax(1)
    torch.testing.assert_close(parts.confidence[0, 0].flatten(), best)


def test_the_shuffle_that_fixed_the_batch_is_a_choice_of_channels(net: ForeignNet) -> None:
    picks = [b.tolist() for name, b in net.named_buffers() if "pick" in name]
    assert sorted(picks) == [list(range(0, 16, 2)), list(range(1, 16, 2))]
    assert "stem" in {n.rpartition(".")[2] for n in kit.conv_names(find_groups(net, kit.EXAMPLE))}


def test_cut_equals_masked_and_the_tail_fits(net: ForeignNet) -> None:
    channels = find_groups(net, kit.EXAMPLE)
    chosen = list(range(0, len(channels.groups), 3))
    small = cut(net, channels, chosen)
    x = torch.from_numpy(noise(2))
    with torch.no_grad():
        assert kit.difference(small(x), masked(net, channels, chosen)(x)) < 1e-3
        wanted = small.export_forward(x[:1]).numpy()  # type: ignore[operator]
    model = export_foreign(small, spec_of(net))  # type: ignore[arg-type]
    assert [o.name for o in model.graph.output] == ["output"]
    assert len(model.SerializeToString()) < len(
        export_foreign(net, spec_of(net)).SerializeToString()
    )
    np.testing.assert_allclose(run(model, x[:1].numpy())[0], wanted, atol=1e-3)


def test_exported_uncut_it_is_the_original(path: Path, net: ForeignNet) -> None:
    x = noise()
    found = run(export_foreign(net, spec_of(net)), x)[0]
    np.testing.assert_allclose(found, run(onnx.load(path), x)[0], atol=1e-3)


def spec_of(net: ForeignNet) -> ModelSpec:
    return ModelSpec("yolox", (kit.SIDE, kit.SIDE), tuple("ab"), strides=net.strides)


def test_bytes_as_input_are_taken_off(path: Path, net: ForeignNet, tmp_path: Path) -> None:
    model, spec = fold_preprocess(load_model(path), spec_of(net))
    save_model(model, tmp_path / "bytes.onnx", spec)
    other, plain_spec = enter_onnx(tmp_path / "bytes.onnx")
    assert plain_spec.input_format == "float_nchw"
    x = torch.from_numpy(noise())
    with torch.no_grad():
        assert kit.difference(other(x), net(x)) < 1e-3


def test_loss_is_nothing_for_equal_networks(net: ForeignNet) -> None:
    with torch.no_grad():
        levels = net(torch.from_numpy(noise()))
        scores, boxes = output_loss(net, levels, levels)
    assert float(scores) == float(boxes) == 0


def test_a_known_file_without_known_roles_is_a_regression() -> None:
    """A tail that squares its scores fits no layout: all channels are compared by distance."""
    shapes = [(1, 7, 8, 8), (1, 7, 4, 4), (1, 7, 2, 2)]
    spec = ModelSpec("yolox", (64, 64), tuple("ab"))

    def tail(maps: Any, power: int) -> list[torch.Tensor]:
        flat = [torch.cat([m[:, :4], m[:, 4:].sigmoid() ** power], 1).flatten(2) for m in maps]
        return [torch.cat(flat, 2).permute(0, 2, 1)]

    assert arrange(lambda m: tail(m, 1), shapes, spec, False).layout.objectness
    found = arrange(lambda m: tail(m, 2), shapes, spec, False)
    assert found == unknown_arrangement(3)
    level = torch.randn(2, 7, 8, 8)
    holder = SimpleNamespace(layout=found.layout)
    parts = take_apart(holder, level)  # type: ignore[arg-type]
    assert torch.equal(parts.boxes, level)
    assert parts.logits.shape[1] == 0
    assert parts.confidence.min() == 1


def test_what_holds_only_for_flat_maps_is_not_believed() -> None:
    """Every channel comes out where it seems to, but the tail also sharpens the map."""
    spec = ModelSpec("yolox", (64, 64), tuple("ab"))

    def tail(maps: Any) -> list[torch.Tensor]:
        sharp = [2 * m - m.mean((2, 3), keepdim=True) for m in maps]
        flat = [torch.cat([m[:, :4], m[:, 4:].sigmoid()], 1).flatten(2) for m in sharp]
        return [torch.cat(flat, 2).permute(0, 2, 1)]

    shapes = [(1, 7, 8, 8), (1, 7, 4, 4), (1, 7, 2, 2)]
    assert arrange(tail, shapes, spec, False) == unknown_arrangement(3)


def test_channels_within_a_map_are_put_in_order() -> None:
    """A file whose maps have the bins before the classes."""
    spec = ModelSpec("nanodet_plus", (64, 64), tuple("ab"), strides=(8, 16, 32, 64))

    def tail(maps: Any) -> list[torch.Tensor]:
        flat = [torch.cat([m[:, 32:].sigmoid(), m[:, :32]], 1).flatten(2) for m in maps]
        return [torch.cat(flat, 2).permute(0, 2, 1)]

    shapes = [(1, 34, s, s) for s in (8, 4, 2, 1)]
    found = arrange(tail, shapes, spec, False)
    assert found.layout.bins == 8
    maps = [torch.randn(s) for s in shapes]
    levels = found.join(maps)
    assert torch.equal(levels[0], torch.cat([maps[0][:, 32:], maps[0][:, :32]], 1))
    assert kit.difference(found.split(levels, [34] * 4), maps) == 0


def test_yolov8_boxes_are_distributions() -> None:
    shapes = [(1, 64, 8, 8), (1, 2, 8, 8), (1, 64, 4, 4), (1, 2, 4, 4), (1, 64, 2, 2), (1, 2, 2, 2)]
    spec = ModelSpec("yolov8", (64, 64), tuple("ab"))

    def tail(maps: Any) -> list[torch.Tensor]:
        boxes = torch.cat([m.flatten(2) for m in maps[0::2]], 2)
        scores = torch.cat([m.flatten(2) for m in maps[1::2]], 2).sigmoid()
        sides = (boxes.reshape(1, 4, 16, -1).softmax(2) * torch.arange(16.0)[:, None]).sum(2)
        return [torch.cat([sides, scores], 1)]

    found = arrange(tail, shapes, spec, True)
    assert (found.layout.bins, found.layout.boxes) == (16, slice(0, 64))
    maps = [torch.randn(s) for s in shapes]
    assert kit.difference(found.split(found.join(maps), [s[1] for s in shapes]), maps) == 0


def test_an_operator_the_converter_does_not_know_is_named(tmp_path: Path) -> None:
    model = onnx.load(kit.write_onnx(tmp_path / "x.onnx"))
    node = next(n for n in model.graph.node if n.name == "stem_act")
    node.op_type = "Shrink"
    onnx.save(model, tmp_path / "x.onnx")
    with pytest.raises(ModelFileError, match=r"x.onnx: expected operators that onnx2torch"):
        enter_onnx(tmp_path / "x.onnx")


def test_an_output_without_convolution_is_refused(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("ReduceMean", ["images"], ["mean"], keepdims=0),
        helper.make_node("Add", ["table", "mean"], ["output"]),
    ]
    table = onnx.numpy_helper.from_array(np.full((1, 84, 7), 0.5, np.float32), "table")
    graph = helper.make_graph(
        nodes,
        "none",
        [helper.make_tensor_value_info("images", TensorProto.FLOAT, [1, 3, 64, 64])],
        [helper.make_tensor_value_info("output", TensorProto.FLOAT, [1, 84, 7])],
        [table],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    onnx.save(model, tmp_path / "none.onnx")
    with pytest.raises(ModelFileError, match="expected outputs that come from convolutions"):
        enter_onnx(tmp_path / "none.onnx")


def test_a_quantized_file_is_refused(path: Path, tmp_path: Path) -> None:
    from onnxruntime.quantization import quantize_dynamic

    quantize_dynamic(path, tmp_path / "q.onnx", op_types_to_quantize=["Conv"])
    with pytest.raises(ModelFileError, match=r"expected a float model|quantized"):
        enter_onnx(tmp_path / "q.onnx")


def test_the_tail_wants_its_own_body(net: ForeignNet, path: Path) -> None:
    with pytest.raises(ModelFileError, match="expected a body with 9 raw maps, found 1"):
        reattach_tail(net, load_model(path))


def test_no_initializer_as_input_stays(path: Path, tmp_path: Path) -> None:
    """Old exporters list every weight as an input; the network has one."""
    model = onnx.load(path)
    for tensor in model.graph.initializer:
        model.graph.input.append(
            helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims)
        )
    onnx.save(model, tmp_path / "old.onnx")
    options = ort.SessionOptions()
    options.log_severity_level = 4
    found, _ = enter_onnx(tmp_path / "old.onnx")
    assert len(found.map_names) == 9


# -- a torch module comes in


@pytest.fixture
def plugin(monkeypatch: pytest.MonkeyPatch) -> str:
    module = ModuleType("a_users_module")
    module.__dict__.update(vars(kit))
    monkeypatch.setitem(sys.modules, "a_users_module", module)
    return "a_users_module"


def test_a_module_comes_in_ready_to_be_pruned(plugin: str) -> None:
    net, spec = enter_module(f"{plugin}:picky", "yolox", ("cat", "dog"), (64, 64))
    assert (spec.classes, spec.head, spec.input_hw) == (("cat", "dog"), "yolox", (64, 64))
    assert (net.strides, net.num_classes, net.net_name) == ((8, 16, 32), 2, "picky")
    assert not has_batchnorm(net)
    x = torch.from_numpy(noise(2))
    with torch.no_grad():
        wanted = kit.picky().eval()(x)
        assert kit.difference(net(x), wanted) < 1e-3
    channels = find_groups(net, kit.EXAMPLE)
    assert "body.stem.0" in kit.conv_names(channels)  # through the chunk
    assert kit.proof(net, 0.3)[0] < 1e-4


def test_a_network_of_ours_by_its_path() -> None:
    net, spec = enter_module(
        "edgesight.models.nets.nanodet:NanoDetPlus", classes=("a", "b"), input_hw=(64, 64)
    )
    assert spec.head == net.spec_head == "nanodet_plus"


@pytest.mark.parametrize(
    ("target", "head", "side", "message"),
    [
        ("no colon", "yolox", 64, "expected package.module:function"),
        ("os; import this:x", "yolox", 64, "expected package.module:function"),
        ("no_such_package_x:f", "yolox", 64, "No module named"),
        ("{}:no_such_function", "yolox", 64, "can be imported"),
        ("{}:Untraceable", "yolox", 64, "raised TypeError"),
        ("{}:conv_names", "yolox", 64, "raised TypeError"),
        ("{}:nothing", "yolox", 64, "raised TypeError"),
        ("{}:picky", None, 64, "expected one of yolox, nanodet_plus"),
        ("{}:picky", "ssdlite", 64, "expected one of yolox, nanodet_plus"),
        ("{}:picky", "nanodet_plus", 64, "channels for a nanodet_plus head"),
        ("{}:picky", "yolox", 8, "expected raw maps at strides|takes a batch"),
    ],
)
def test_bad_modules(target: str, head: str | None, side: int, message: str, plugin: str) -> None:
    with pytest.raises(RecipeError, match=message) as caught:
        enter_module(target.format(plugin), head, ("a", "b"), (side, side))
    assert "\n" not in str(caught.value)


def test_a_module_without_raw_maps(plugin: str) -> None:
    with pytest.raises(RecipeError, match="expected a list of raw maps"):
        enter_module(f"{plugin}:nothing", "yolox", None, (64, 64))
