"""Parameters, MACs and integer operators, read from graphs."""

from __future__ import annotations

import builtins
import runpy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
from edgesight.compression.calibrate import Grid
from edgesight.compression.onnx_io import tidy
from edgesight.compression.qdq import insert, plan_layout
from edgesight.models import graph
from edgesight.models.errors import MissingExtraError, ModelFileError

kit: Any = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("tiny_graphs.py"))))


def optimised(model: Any, folder: Path) -> Path:
    path = folder / "optimised.onnx"
    options = ort.SessionOptions()
    options.optimized_model_filepath = str(path)
    options.log_severity_level = 4
    ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return path


def quantized(float_convs: int = 0) -> Any:
    """A QDQ model on unfitted grids whose first convolutions stay in float."""
    model = tidy(kit.detector("leaky"))
    convs = [n.name for n in model.graph.node if n.op_type == "Conv"]
    layout = plan_layout(model, convs[:float_convs])
    grids = {name: Grid.over(-4, 4) for name in set(layout.group.values())}
    return insert(model, layout, grids, signed=False)


def test_macs_and_parameters_of_a_known_graph() -> None:
    b = kit.GraphBuilder()
    x = b.conv("images", (3, 16), 3, 2)
    x = b.conv(x, (16, 16), 3, 1, group=16)
    model = b.model(x, [1, 16, 32, 32])
    macs = list(graph.node_macs(model).values())
    assert macs == [32 * 32 * 16 * 27, 32 * 32 * 16 * 9]
    assert graph.parameters(model) == 16 * 27 + 16 + 16 * 9 + 16


def test_quantizing_changes_neither_parameters_nor_macs() -> None:
    plain, small = tidy(kit.detector("leaky")), quantized()
    assert graph.parameters(small) == graph.parameters(plain)
    assert sum(graph.node_macs(small).values()) == sum(graph.node_macs(plain).values())


def test_integer_share_of_float_mixed_and_int8(tmp_path: Path) -> None:
    plain = tidy(kit.detector("leaky"))
    report = graph.integer_share(plain, optimised(plain, tmp_path))
    assert report.share == 0
    assert not report.ops_integer
    whole = quantized()
    report = graph.integer_share(whole, optimised(whole, tmp_path))
    assert report.share == 1
    assert report.float_convs == ()
    assert report.ops_integer["QLinearConv"] == 9
    mixed = quantized(float_convs=1)
    report = graph.integer_share(mixed, optimised(mixed, tmp_path))
    macs = list(graph.node_macs(mixed).values())
    assert report.share == pytest.approx(1 - macs[0] / sum(macs))
    assert report.float_convs == ("n0",)


def test_quantizers_without_one_behind_the_convolution_are_not_integer(tmp_path: Path) -> None:
    """What NNCF writes: ONNX Runtime makes no integer convolution of it."""
    model = quantized()
    convs = {n.output[0] for n in model.graph.node if n.op_type == "Conv"}
    skipped = {f"{name}/dq": name for name in convs}
    for node in model.graph.node:
        for index, name in enumerate(node.input):
            node.input[index] = skipped.get(name, name)
    report = graph.integer_share(model, optimised(model, tmp_path))
    assert report.share < 0.5


def test_unreadable_files_are_told_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(ModelFileError, match="no such file"):
        graph.load_model(tmp_path / "none.onnx")
    (tmp_path / "text.onnx").write_text("not a model")
    with pytest.raises(ModelFileError, match="expected an ONNX model"):
        graph.load_model(tmp_path / "text.onnx")
    (tmp_path / "empty.onnx").write_bytes(b"")
    with pytest.raises(ModelFileError, match="expected an ONNX model"):
        graph.load_model(tmp_path / "empty.onnx")
    data = kit.detector().SerializeToString()
    (tmp_path / "half.onnx").write_bytes(data[: len(data) // 2])
    with pytest.raises(ModelFileError, match="expected an ONNX model"):
        graph.load_model(tmp_path / "half.onnx")


def test_unknown_sizes_are_told() -> None:
    b = kit.GraphBuilder()
    model = b.model(b.conv("images", (3, 16), 3, 2), [1, 16, 32, 32])
    for value in (model.graph.input[0], model.graph.output[0]):
        value.type.tensor_type.ClearField("shape")
    with pytest.raises(ModelFileError, match="fixed"):
        graph.node_macs(model)


def test_missing_onnx_names_the_install(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without_onnx(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.split(".")[0] == "onnx":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_onnx)
    with pytest.raises(MissingExtraError, match=r"pip install onnx"):
        graph.require_onnx()


def test_shapes_are_zero_where_unknown() -> None:
    model = kit.detector("leaky")
    shapes = graph.tensor_shapes(model)
    assert shapes["images"] == (1, 3, kit.SIZE, kit.SIZE)
    assert np.prod(shapes["output"]) == 64 * 7


def branching() -> Any:
    """An If whose branches read stored tensors of the outer graph, and what nobody needs."""
    import onnx
    from onnx import helper, numpy_helper

    def branch(name: str) -> Any:
        node = helper.make_node("Identity", [name], [f"{name}_out"])
        info = helper.make_tensor_value_info(f"{name}_out", 1, [2])
        return helper.make_graph([node], name, [], [info])

    ends = {"then_branch": branch("a"), "else_branch": branch("b")}
    nodes = [
        helper.make_node("If", ["flag"], ["y"], "choice", **ends),
        helper.make_node("Relu", ["unread"], ["nobody"], "dead"),
    ]
    tensors = [
        numpy_helper.from_array(np.full(2, i, np.float32), name)
        for i, name in enumerate(("unread", "a", "b", "constant"))
    ]
    info = [helper.make_tensor_value_info(name, 1, [2]) for name in ("y", "constant")]
    flag = helper.make_tensor_value_info("flag", onnx.TensorProto.BOOL, [])
    made = helper.make_graph(nodes, "branching", [flag], info, tensors)
    return helper.make_model(made, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def test_what_no_output_needs_goes_and_branches_keep_what_they_read() -> None:
    model = branching()
    graph.drop_dead(model)
    assert [n.name for n in model.graph.node] == ["choice"]
    assert list(graph.initializers(model)) == ["a", "b", "constant"]
    runner = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    for flag, value in ((True, 1), (False, 2)):
        np.testing.assert_array_equal(runner.run(["y"], {"flag": np.array(flag)})[0], [value] * 2)


def test_nodes_of_a_graph_can_be_put_in_another_order() -> None:
    model = branching()
    before = [n.SerializeToString() for n in model.graph.node]
    graph.set_nodes(model.graph, reversed(model.graph.node))
    assert [n.SerializeToString() for n in model.graph.node] == before[::-1]
    assert list(graph.initializers(model)) == ["unread", "a", "b", "constant"]


def test_a_copy_is_apart_from_its_original() -> None:
    model = branching()
    other = graph.copied(model)
    assert other == model
    other.graph.node[0].name = "other"
    assert model.graph.node[0].name == "choice"


def test_attributes_are_plain_values() -> None:
    from onnx import helper

    node = helper.make_node("Conv", ["x", "w"], ["y"], pads=[1, 2, 3, 4], group=2, auto_pad="VALID")
    assert graph.attributes(node) == {"pads": [1, 2, 3, 4], "group": 2, "auto_pad": b"VALID"}
    assert graph.attributes(helper.make_node("Relu", ["x"], ["y"])) == {}
