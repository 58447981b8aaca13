"""The leaner front of a graph computes what the graph computed."""

from __future__ import annotations

import runpy
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import onnx.compose
import onnxruntime as ort
import pytest
from edgesight.compression.calibrate import Grid
from edgesight.compression.lean import (
    fold_normalisation,
    lean,
    merge_focus,
    pair_columns,
    pool_first,
)
from edgesight.compression.onnx_io import fold_preprocess, tidy
from edgesight.models.graph import copied
from edgesight.models.spec import ModelSpec
from onnx import TensorProto, helper, numpy_helper

graphs: Any = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("tiny_graphs.py"))))
SIZE, SPEC, detector, run = graphs.SIZE, graphs.SPEC, graphs.detector, graphs.run

CORNERS = ((0, 0), (1, 0), (0, 1), (1, 1))


def bytes_image(seed: int = 0) -> Any:
    return np.random.default_rng(seed).integers(0, 256, (1, SIZE, SIZE, 3), dtype=np.uint8)


def focus_net(
    kernel: int = 3, corners: Sequence[tuple[int, int]] = CORNERS, step: int = 2, readers: int = 1
) -> Any:
    """Slices of every second pixel, put side by side, and a convolution, as YOLOX begins."""
    rng = np.random.default_rng(0)
    stored = [numpy_helper.from_array(np.array(v, np.int64), n) for n, v in (
        ("end", [2**31 - 1]), ("step", [step]), ("0", [0]), ("1", [1]), ("2", [2]), ("3", [3]),
    )]  # fmt: skip
    stored += [
        numpy_helper.from_array(rng.normal(0, 1, (5, 12, kernel, kernel)).astype(np.float32), "w"),
        numpy_helper.from_array(rng.normal(0, 1, 5).astype(np.float32), "b"),
    ]
    nodes = []
    for number, (y, x) in enumerate(corners):
        nodes += [
            helper.make_node("Slice", ["x", str(y), "end", "2", "step"], [f"row{number}"]),
            helper.make_node("Slice", [f"row{number}", str(x), "end", "3", "step"], [f"p{number}"]),
        ]
    nodes.append(helper.make_node("Concat", [f"p{n}" for n in range(4)], ["focus"], axis=1))
    pads = [kernel // 2] * 4
    nodes.append(helper.make_node("Conv", ["focus", "w", "b"], ["y"], pads=pads))
    outputs = [("y", 5), ("focus", 12)][:readers]
    graph = helper.make_graph(
        nodes,
        "focus",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 3, 16, 24])],
        [
            helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, count, 8, 12])
            for name, count in outputs
        ],
        stored,
    )
    opsets = [helper.make_opsetid("", 17)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=8)


@pytest.mark.parametrize("kernel", [1, 3, 5])
@pytest.mark.parametrize("corners", [CORNERS, CORNERS[::-1]])
def test_focus_becomes_one_convolution_that_computes_the_same(
    kernel: int, corners: Sequence[tuple[int, int]]
) -> None:
    model = focus_net(kernel, corners)
    merged = copied(model)
    assert merge_focus(merged) == 1
    onnx.checker.check_model(merged)
    assert [n.op_type for n in merged.graph.node] == ["Conv"]
    x = np.random.default_rng(1).normal(0, 1, (1, 3, 16, 24)).astype(np.float32)
    np.testing.assert_allclose(run(merged, x)[0], run(model, x)[0], rtol=1e-4, atol=1e-5)


def test_each_focus_of_a_graph_becomes_a_convolution() -> None:
    model, other = focus_net(3), onnx.compose.add_prefix(focus_net(1, CORNERS[::-1]), "other_")
    for field in ("node", "initializer", "input", "output"):
        getattr(model.graph, field).extend(getattr(other.graph, field))
    merged = copied(model)
    assert merge_focus(merged) == 2
    onnx.checker.check_model(merged)
    assert [n.op_type for n in merged.graph.node] == ["Conv", "Conv"]
    random = np.random.default_rng(1)
    feeds = {
        i.name: random.normal(0, 1, (1, 3, 16, 24)).astype(np.float32) for i in model.graph.input
    }
    found, wanted = (
        ort.InferenceSession(m.SerializeToString(), providers=["CPUExecutionProvider"]).run(
            None, feeds
        )
        for m in (merged, model)
    )
    for ours, theirs in zip(found, wanted, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "model",
    [
        focus_net(step=3),
        focus_net(corners=((0, 0), (0, 0), (0, 1), (1, 1))),
        focus_net(readers=2),
    ],
)
def test_what_is_not_quite_a_focus_is_left_alone(model: Any) -> None:
    before = model.SerializeToString()
    assert merge_focus(model) == 0
    assert model.SerializeToString() == before


def test_normalisation_goes_into_the_first_convolution() -> None:
    model, _ = fold_preprocess(tidy(detector()), SPEC)
    leaner, grids = lean(model)
    onnx.checker.check_model(leaner)
    front = [n.op_type for n in leaner.graph.node[:4]]
    assert front == ["Cast", "Sub", "Transpose", "Conv"]
    assert set(grids.values()) == {Grid(1.0, 110)}  # the mean of 100, 110 and 120
    wanted, got = (run(m, bytes_image(), None) for m in (exposed(model), exposed(leaner)))
    inside = (slice(None), slice(None), slice(1, -1), slice(1, -1))
    np.testing.assert_allclose(got[-1][inside], wanted[-1][inside], rtol=1e-3, atol=1e-3)
    assert not np.allclose(got[-1], wanted[-1], atol=1e-3), "the ring of padding differs"


def test_the_grid_of_the_picture_holds_every_pixel_value() -> None:
    model, _ = fold_preprocess(tidy(detector()), SPEC)
    _, grids = lean(model)
    for grid in grids.values():
        values = np.arange(256, dtype=np.float32) - 110
        np.testing.assert_array_equal(grid.round(values), values)


def test_equal_means_leave_no_difference_at_all() -> None:
    spec = SPEC.with_changes(mean=(114.0, 114.0, 114.0))
    model, _ = fold_preprocess(tidy(detector()), spec)
    leaner, _ = lean(model)
    wanted, got = run(model, bytes_image())[0], run(leaner, bytes_image())[0]
    np.testing.assert_allclose(got, wanted, rtol=1e-3, atol=1e-3)


def test_without_normalisation_pixels_stay_pixels() -> None:
    plain: ModelSpec = SPEC.with_changes(mean=(0.0,) * 3, std=(1.0,) * 3, color="bgr")
    model, _ = fold_preprocess(tidy(detector()), plain)
    leaner, grids = lean(model)
    assert [n.op_type for n in leaner.graph.node[:3]] == ["Cast", "Transpose", "Conv"]
    assert set(grids.values()) == {Grid(1.0, 0)}
    np.testing.assert_allclose(
        run(leaner, bytes_image())[0], run(model, bytes_image())[0], rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("mean", [0.0, 114.0])
def test_a_focus_reads_pairs_of_pixels(mean: float) -> None:
    spec = SPEC.with_changes(input_hw=(16, 24), mean=(mean,) * 3, std=(2.0,) * 3)
    model, _ = fold_preprocess(tidy(focus_net(3)), spec)
    leaner, grids = lean(model)
    onnx.checker.check_model(leaner, full_check=True)
    kinds = [n.op_type for n in leaner.graph.node]
    assert kinds == ["Reshape", "Cast", *["Sub"] * bool(mean), "Transpose", "Conv"]
    conv = leaner.graph.node[-1]
    weight = next(t for t in leaner.graph.initializer if t.name == conv.input[1])
    assert list(weight.dims) == [5, 6, 6, 3]
    assert len(grids) == 2
    image = np.random.default_rng(0).integers(0, 256, (1, 16, 24, 3), dtype=np.uint8)
    wanted, got = run(model, image)[0], run(leaner, image)[0]
    np.testing.assert_allclose(got, wanted, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("case", ["odd width", "odd kernel"])
def test_what_cannot_be_paired_is_read_pixel_by_pixel(case: str) -> None:
    model, _ = fold_preprocess(tidy(detector()), SPEC)  # 3x3, padding 1
    if case == "odd width":
        model, _ = fold_preprocess(tidy(focus_net(3)), SPEC.with_changes(input_hw=(16, 24)))
        merge_focus(model)
        assert fold_normalisation(model)
        model.graph.input[0].type.tensor_type.shape.dim[2].dim_value = 23
        assert not pair_columns(model)
        return
    leaner, _ = lean(model)
    assert "image_pairs" not in {n.name for n in leaner.graph.node}


def test_a_front_that_is_not_ours_is_left_alone() -> None:
    model = tidy(detector())
    assert fold_normalisation(model) == {}
    shown = fold_preprocess(tidy(detector()), SPEC)[0]
    planes = next(n for n in shown.graph.node if n.name == "image_div").output[0]
    shown.graph.output.append(helper.make_empty_tensor_value_info(planes))
    before = shown.SerializeToString()
    assert fold_normalisation(shown) == {}
    assert shown.SerializeToString() == before


def exposed(model: Any) -> Any:
    copy = copied(model)
    first = next(n for n in model.graph.node if n.op_type == "Conv")
    copy.graph.output.append(helper.make_empty_tensor_value_info(first.output[0]))
    return copy


def pooled(op: str, readers: int = 1, **attributes: float) -> Any:
    """A convolution, an activation, and the maximum of each 3x3 cells."""
    weight = np.random.default_rng(0).normal(0, 1, (5, 3, 3, 3)).astype(np.float32)
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["c"], pads=[1] * 4),
        helper.make_node(op, ["c"], ["a"], **attributes),
        helper.make_node(
            "MaxPool", ["a"], ["p"], kernel_shape=[3, 3], strides=[2, 2], pads=[1] * 4
        ),
        helper.make_node("Neg", ["p"], ["y"]),
    ]
    outputs = [("y", [1, 5, 8, 12]), ("a", [1, 5, 16, 24])][:readers]
    graph = helper.make_graph(
        nodes,
        "pooled",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 3, 16, 24])],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, dims) for name, dims in outputs],
        [numpy_helper.from_array(weight, "w")],
    )
    opsets = [helper.make_opsetid("", 17)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=8)


def test_a_leaky_relu_is_computed_on_the_pooled_map() -> None:
    model = pooled("LeakyRelu", alpha=0.1)
    x = np.random.default_rng(1).normal(0, 2, (1, 3, 16, 24)).astype(np.float32)
    before = run(model, x)
    assert pool_first(model) == 1
    assert [n.op_type for n in model.graph.node] == ["Conv", "MaxPool", "LeakyRelu", "Neg"]
    onnx.checker.check_model(model, full_check=True)
    np.testing.assert_array_equal(run(model, x), before)


@pytest.mark.parametrize(
    ("op", "readers", "attributes"),
    [
        ("LeakyRelu", 1, {"alpha": -0.5}),  # falls left of zero: its maximum is elsewhere
        ("HardSwish", 1, {}),
        ("LeakyRelu", 2, {"alpha": 0.1}),  # somebody else wants the map as it was
    ],
)
def test_what_falls_or_is_read_elsewhere_stays_in_front_of_the_pooling(
    op: str, readers: int, attributes: dict[str, float]
) -> None:
    model = pooled(op, readers, **attributes)
    before = model.SerializeToString()
    assert pool_first(model) == 0
    assert model.SerializeToString() == before


def test_a_map_that_a_branch_reads_stays_where_it_is() -> None:
    model = pooled("LeakyRelu", alpha=0.1)
    branch = helper.make_graph(
        [helper.make_node("Abs", ["a"], ["b"])],
        "branch",
        [],
        [helper.make_tensor_value_info("b", TensorProto.FLOAT, None)],
    )
    model.graph.initializer.append(numpy_helper.from_array(np.array(True), "yes"))
    model.graph.node.append(
        helper.make_node("If", ["yes"], ["z"], then_branch=branch, else_branch=branch)
    )
    model.graph.output.append(helper.make_tensor_value_info("z", TensorProto.FLOAT, None))
    assert pool_first(model) == 0
