"""Costs of layers, on graphs whose every figure can be worked out by hand."""

from __future__ import annotations

import runpy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
from edgesight.compression.analyse import Costs, count_costs
from edgesight.compression.calibrate import Grid
from edgesight.compression.onnx_io import tidy
from edgesight.compression.qdq import insert, plan_layout
from edgesight.compression.traced import Traced
from edgesight.models.errors import ModelFileError
from edgesight.models.graph import load_model, node_macs, parameters
from edgesight.models.zoo import shipped, shipped_float
from onnx import TensorProto, helper, numpy_helper

kit: Any = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("tiny_graphs.py"))))
analyse_kit: Any = SimpleNamespace(
    **runpy.run_path(str(Path(__file__).with_name("analyse_kit.py")))
)
graph, normal = analyse_kit.graph, analyse_kit.normal


def costs_of(model: Any, **more: Any) -> Costs:
    return count_costs(Traced(model, **more), len(model.SerializeToString()))


def by_hand() -> Any:
    node = helper.make_node
    nodes = [
        node("Conv", ["in", "w1", "b1"], ["a"], "first", pads=[1] * 4),
        node("Relu", ["a"], ["b"], "act"),
        node("Conv", ["b", "w2"], ["c"], "depth", pads=[1] * 4, strides=[2, 2], group=4),
        node("Conv", ["c", "w3", "b3"], ["d"], "grouped", group=2),
        node("ConvTranspose", ["d", "w4"], ["e"], "up", strides=[2, 2]),
        node("GlobalAveragePool", ["e"], ["f"], "pool"),
        node("Flatten", ["f"], ["g"], "flat"),
        node("Gemm", ["g", "w5", "b5"], ["h"], "gemm", transB=1),
        node("MatMul", ["h", "w6"], ["out"], "matmul"),
    ]
    stored = {
        "w1": normal(4, 3, 3, 3),
        "b1": normal(4),
        "w2": normal(4, 1, 3, 3),
        "w3": normal(8, 2, 1, 1),
        "b3": normal(8),
        "w4": normal(8, 2, 2, 2),
        "w5": normal(5, 2),
        "b5": normal(5),
        "w6": normal(5, 7),
    }
    return graph(nodes, stored, [1, 3, 8, 8])


def test_every_figure_of_a_graph_counted_by_hand() -> None:
    costs = costs_of(by_hand())
    found = {
        la.name: (
            la.kind,
            la.family,
            la.macs,
            la.parameters,
            la.activation_elements,
            la.weight_bytes,
        )
        for la in costs.layers
    }
    assert found == {
        "first": ("3x3", "kxk", 8 * 8 * 4 * 27, 4 * 27 + 4, 256, 4 * 112),
        "depth": ("3x3 depthwise", "depthwise", 16 * 4 * 9, 36, 64, 144),
        "grouped": ("1x1 in 2 groups", "grouped", 16 * 8 * 2, 16 + 8, 128, 96),
        "up": ("transposed 2x2", "transposed", 16 * 8 * 2 * 4, 64, 128, 256),
        "gemm": ("linear", "linear", 10, 15, 5, 60),
        "matmul": ("linear", "linear", 35, 35, 7, 140),
    }
    assert costs.macs == sum(la.macs for la in costs.layers) == 6912 + 576 + 256 + 1024 + 10 + 35
    assert costs.parameters == 112 + 36 + 24 + 64 + 15 + 35
    assert costs.activation_bytes == 4 * (256 + 64 + 128 + 128 + 5 + 7)
    assert costs.stored_bytes == costs.weight_bytes == 4 * costs.parameters
    assert {o.op: (o.count, o.elements) for o in costs.others} == {
        "Relu": (1, 256),
        "GlobalAveragePool": (1, 2),
        "Flatten": (1, 2),
    }
    assert [la.name for la in costs.layers if la.last] == ["matmul"]
    assert costs.layers[0].behind == "b"
    assert costs.layers[1].behind == "c"


def test_an_operator_that_nobody_knows_is_named_and_what_hides_behind_it_too() -> None:
    node = helper.make_node
    nodes = [
        node("Conv", ["in", "w1"], ["a"], "first"),
        node("Wonder", ["a"], ["b"], "odd", domain="elsewhere"),
        node("Conv", ["b", "w2"], ["c"], "behind"),
        node("Relu", ["c"], ["out"], "act"),
    ]
    stored = {"w1": normal(4, 3, 1, 1), "w2": normal(4, 4, 1, 1)}
    costs = costs_of(graph(nodes, stored, [1, 3, 8, 8], domains=("elsewhere",)))
    assert [(la.name, la.macs) for la in costs.layers] == [("first", 768)]
    assert {o.op: (o.count, o.unknown) for o in costs.others} == {
        "elsewhere:Wonder": (1, 1),
        "Conv": (1, 1),
        "Relu": (1, 1),
    }


def test_nothing_to_count_is_refused() -> None:
    model = graph([helper.make_node("Relu", ["in"], ["out"], "act")], {}, [1, 3, 8, 8])
    with pytest.raises(ModelFileError, match=r"layers that can be counted, found Relu"):
        costs_of(model)


def test_what_batch_norm_stores_is_told() -> None:
    nodes = [
        helper.make_node("Conv", ["in", "w"], ["a"], "conv"),
        helper.make_node("BatchNormalization", ["a", "g", "b", "m", "v"], ["out"], "bn"),
    ]
    four = {name: np.ones(4, np.float32) for name in "gbmv"}
    costs = costs_of(graph(nodes, {"w": normal(4, 3, 1, 1), **four}, [1, 3, 8, 8]))
    assert [(o.op, o.stored) for o in costs.others] == [("BatchNormalization", 16)]
    assert costs.stored_bytes == 4 * (12 + 16)


def test_weights_that_two_layers_share_count_once_in_the_total() -> None:
    nodes = [
        helper.make_node("Conv", ["in", "w"], ["a"], "one"),
        helper.make_node("Conv", ["a", "w"], ["out"], "two"),
    ]
    costs = costs_of(graph(nodes, {"w": normal(3, 3, 1, 1)}, [1, 3, 8, 8]))
    assert [la.parameters for la in costs.layers] == [9, 9]
    assert costs.parameters == 9
    assert costs.weight_bytes == 36


def test_weights_are_found_however_they_are_stored() -> None:
    """As float16 behind a Cast, and as a Constant node."""
    half = normal(4, 3, 1, 1).astype(np.float16)
    constant = numpy_helper.from_array(normal(2, 4, 1, 1), "value")
    nodes = [
        helper.make_node("Cast", ["half"], ["w1"], "cast", to=TensorProto.FLOAT),
        helper.make_node("Conv", ["in", "w1"], ["a"], "one"),
        helper.make_node("Constant", [], ["w2"], "constant", value=constant),
        helper.make_node("Conv", ["a", "w2"], ["out"], "two"),
    ]
    model = graph(nodes, {"half": half}, [1, 3, 8, 8])
    traced = Traced(model)
    costs = count_costs(traced, 0)
    assert [(la.parameters, la.weight_bytes) for la in costs.layers] == [(12, 24), (8, 32)]
    assert np.array_equal(traced.constants["w1"], half.astype(np.float32))
    assert {o.op: o.elements for o in costs.others} == {"Cast": 0, "Constant": 0}


def test_open_sizes_are_filled_in_or_refused() -> None:
    nodes = [helper.make_node("Conv", ["in", "w"], ["out"], "one")]
    model = graph(nodes, {"w": normal(4, 3, 1, 1)}, ["batch", 3, "height", "width"])
    assert costs_of(model, input_hw=(6, 10)).macs == 60 * 12
    with pytest.raises(ModelFileError, match="fixed input size"):
        costs_of(model)


def test_quantized_files_are_counted_like_their_float_form() -> None:
    model = tidy(kit.detector("leaky"))
    layout = plan_layout(model)
    grids = {name: Grid.over(-4, 4) for name in set(layout.group.values())}
    small = insert(model, layout, grids, signed=False)
    before, after = costs_of(model), costs_of(small)
    assert [(la.macs, la.parameters) for la in after.layers] == [
        (la.macs, la.parameters) for la in before.layers
    ]
    assert all(la.quantized for la in after.layers)
    assert not any(la.quantized for la in before.layers)
    for float_layer, layer in zip(before.layers, after.layers, strict=True):
        if not layer.last:
            assert layer.activation_bytes == layer.activation_elements
            assert float_layer.activation_bytes == 4 * layer.activation_elements
    assert after.weight_bytes < 0.5 * before.weight_bytes
    assert {"QuantizeLinear", "DequantizeLinear"} <= {o.op for o in after.others}


def test_integer_convolutions_are_counted_too() -> None:
    """As ONNX Runtime's own static quantization writes them (QOperator)."""
    nodes = [
        helper.make_node("QuantizeLinear", ["in", "s", "z"], ["a"], "quantize"),
        helper.make_node(
            "QLinearConv", ["a", "s", "z", "w", "s", "wz", "s", "z", "b"], ["b8"], "conv"
        ),
        helper.make_node("DequantizeLinear", ["b8", "s", "z"], ["out"], "dequantize"),
    ]
    stored = {
        "s": np.array(0.1, np.float32),
        "z": np.array(128, np.uint8),
        "wz": np.array(0, np.int8),
        "w": np.arange(12, dtype=np.int8).reshape(4, 3, 1, 1),
        "b": np.zeros(4, np.int32),
    }
    (layer,) = costs_of(graph(nodes, stored, [1, 3, 8, 8])).layers
    assert (layer.macs, layer.parameters, layer.activation_bytes) == (768, 16, 256)
    assert layer.quantized


@pytest.mark.parametrize("file", [shipped, shipped_float])
def test_the_shipped_model_is_counted_to_the_last_operator(file: Any) -> None:
    model = load_model(file())
    costs = costs_of(model)
    assert len(costs.layers) + sum(o.count for o in costs.others) == len(model.graph.node)
    assert costs.macs == sum(node_macs(model).values())
    assert costs.parameters == parameters(model)
    assert costs.stored_bytes < file().stat().st_size
    assert not any(o.unknown for o in costs.others)


def test_silu_is_an_activation_in_two_operators() -> None:
    costs = costs_of(kit.detector("silu"))
    model = kit.detector("silu")
    maker = {out: n for n in model.graph.node for out in n.output}
    inner = [la for la in costs.layers if not la.last]
    assert {maker[la.behind].op_type for la in inner} == {"Mul"}


@pytest.mark.shared
@pytest.mark.parametrize(
    ("name", "layers", "macs", "millions"),
    [
        ("nanodet_plus_m_416", 110, 762_090_840, 1.186),
        ("yolox_nano_416", 113, 522_553_408, 0.904),
        ("fastestdet_352", 70, 121_491_744, 0.240),
    ],
)
def test_known_detectors(shared: Path, name: str, layers: int, macs: int, millions: float) -> None:
    model = onnx.load(shared / "weights" / f"{name}.onnx")
    costs = costs_of(model)
    assert (len(costs.layers), costs.macs) == (layers, macs)
    assert round(costs.parameters / 1e6, 3) == millions
