"""Predicted instructions: what operators between and beside integer convolutions cost."""

from __future__ import annotations

import runpy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from edgesight.compression.lowbit_choice import in_float
from edgesight.compression.predict import predicted_convs, predicted_others
from edgesight.models import cost_guest
from edgesight.models.core_costs import CHANNELWISE, OPERATORS, conv_instructions
from edgesight.models.engines import WEIGHT_ROUNDING

graphs: Any = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("tiny_graphs.py"))))
SIZE, SPEC, GraphBuilder = graphs.SIZE, graphs.SPEC, graphs.GraphBuilder
kit: Any = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("qdq_kit.py"))))
graph_of, opened, quantized = kit.graph_of, kit.opened, kit.quantized
silu_graph = kit.silu_graph


def test_operators_between_quantizers_cost_what_integers_cost() -> None:
    model = silu_graph()
    sizes = np.array([16 * 256, 16 * 64])

    def cost(kind: str, numbers: Any) -> float:
        call, each = OPERATORS[kind]
        return float(np.sum(call + each * numbers))

    ends = cost("QuantizeLinear", np.array([8 * 256]))
    ends += cost("DequantizeLinear", np.array([8 * 64]))
    inside = cost("QLinearSigmoid", sizes) + cost("QLinearMul", sizes)
    assert predicted_others(quantized(model)) == pytest.approx(ends + inside)
    assert predicted_others(model) == pytest.approx(cost("Sigmoid", sizes) + cost("Mul", sizes))


def test_a_factor_per_channel_begins_anew_in_every_row_only(tmp_path: Path) -> None:
    build = GraphBuilder()
    factor = build.store("f", np.full((1, 16, 1, 1), 0.5, np.float32))
    middle = build.add("Mul", [build.conv("x", (8, 16), 3), factor])
    end = build.conv(middle, (16, 8))
    model = graph_of(build, end, [1, 8, 16, 16])
    call, each = OPERATORS["QLinearMul"]
    ends = sum(
        OPERATORS[k][0] + OPERATORS[k][1] * 8 * 256 for k in ("QuantizeLinear", "DequantizeLinear")
    )
    wanted = ends + call + each * 16 * 256 + CHANNELWISE * 16
    small = quantized(model)
    assert predicted_others(small) == pytest.approx(wanted)
    by = next(n for n in small.graph.node if n.op_type == "Expand")
    folded, kinds = opened(small, tmp_path)
    assert "Expand" not in kinds, "widened when the file is loaded"
    assert kinds.count("QLinearMul") == 1
    stored = {t.name: t for t in small.graph.initializer}
    assert list(stored[by.input[0]].dims) == [1, 16, 1, 1], "the file does not grow"
    plain, _ = opened(model, tmp_path)
    x = np.random.default_rng(1).normal(0, 1, (1, 8, 16, 16)).astype(np.float32)
    wanted_y, got = plain.run(None, {"x": x})[0], folded.run(None, {"x": x})[0]
    assert np.corrcoef(wanted_y.ravel(), got.ravel())[0, 1] > 0.99


def price(kind: str, numbers: int) -> float:
    call, each = OPERATORS[kind]
    return call + each * numbers


@pytest.mark.parametrize("activation", ["Relu", "LeakyRelu"])
def test_rounding_around_a_float_convolution_is_paid_for_and_it_runs_in_float(
    activation: str, tmp_path: Path
) -> None:
    build = GraphBuilder()
    x = "x"
    for _ in range(3):
        x = build.add(activation, [build.conv(x, (8, 8), 3)])
    model = graph_of(build, build.conv(x, (8, 8)), [1, 8, 16, 16])
    middle = [n.name for n in model.graph.node][2:4]
    integer, mixed = quantized(model), quantized(model, middle)
    rounding = price("DequantizeLinear", 2048) + price("QuantizeLinear", 2048)
    swallowed = price("QLinearLeakyRelu", 2048) if activation == "LeakyRelu" else 0
    assert predicted_others(mixed) - predicted_others(integer) == pytest.approx(
        rounding - swallowed
    )
    kinds = opened(mixed, tmp_path)[1]
    assert kinds.count("QLinearConv") == 3
    assert sum("Conv" in kind for kind in kinds) == 4


def test_one_factor_for_maps_of_two_widths(tmp_path: Path) -> None:
    build = GraphBuilder()
    factor = build.store("f", np.full((1, 8, 1, 1), 0.5, np.float32))
    large = build.conv("x", (8, 8), 3)
    small = build.conv("x", (8, 8), 3, 2)
    ends = [
        build.conv(build.add("Mul", [y, factor]), (8, 8), 3, s) for y, s in ((large, 2), (small, 1))
    ]
    model = graph_of(build, build.add("Add", ends), [1, 8, 8, 8])
    both = quantized(model)
    assert sum(n.op_type == "Expand" for n in both.graph.node) == 2
    runner, kinds = opened(both, tmp_path)
    assert kinds.count("QLinearMul") == 2
    x = np.random.default_rng(1).normal(0, 1, (1, 8, 16, 16)).astype(np.float32)
    wanted, got = opened(model, tmp_path)[0].run(None, {"x": x})[0], runner.run(None, {"x": x})[0]
    assert np.corrcoef(wanted.ravel(), got.ravel())[0, 1] > 0.98
    floats = in_float(both)
    assert not {"Expand", "QuantizeLinear", "DequantizeLinear"} & {
        n.op_type for n in floats.graph.node
    }
    plain = opened(floats, tmp_path)[0].run(None, {"x": x})[0]
    assert np.corrcoef(wanted.ravel(), plain.ravel())[0, 1] > 0.999


def test_a_factor_that_is_computed_costs_more_than_a_stored_one_and_a_single_one_least() -> None:
    def cost(factor_shape: list[int], computed: bool) -> float:
        build = GraphBuilder()
        x = build.add("LeakyRelu", [build.conv("x", (8, 16), 3)], alpha=0.1)
        if computed:
            factor = build.add("Sigmoid", [build.add("GlobalAveragePool", [x])])
        else:
            factor = build.store("f", np.full(factor_shape, 0.5, np.float32))
        end = build.conv(build.add("Mul", [x, factor]), (16, 8))
        return predicted_others(quantized(graph_of(build, end, [1, 8, 16, 16])))

    channelwise, single = cost([1, 16, 1, 1], False), cost([], False)
    rows, cells = 16, 256
    assert channelwise - single == pytest.approx(CHANNELWISE * rows)
    gate = price("QLinearSigmoid", 16)
    assert cost([], True) == pytest.approx(single + CHANNELWISE * cells + gate)


def test_what_is_computed_on_loading_costs_nothing() -> None:
    build = GraphBuilder()
    build.store("one", np.float32(1))
    weight = build.add("Add", [build.store("w", np.ones((8, 8, 1, 1), np.float32)), "one"])
    end = build.add("Conv", ["x", weight])
    assert predicted_others(graph_of(build, end, [1, 8, 16, 16])) == 0


def test_pooling_between_float_and_integers_is_the_dear_one(tmp_path: Path) -> None:
    build = GraphBuilder()
    first = build.add("Relu", [build.conv("x", (8, 8), 3)])
    x = build.add("MaxPool", [first], kernel_shape=[3, 3], strides=[2, 2], pads=[1] * 4)
    model = graph_of(build, build.conv(x, (8, 8)), [1, 8, 8, 8])
    names = [n.name for n in model.graph.node]
    integer = predicted_others(quantized(model))
    mixed = quantized(model, names[:2])
    assert opened(mixed, tmp_path)[1].count("MaxPool") == 1, "in 8 bits, channels first"
    dear = price("QLinearMaxPool, channels first", 512) - price("QLinearMaxPool", 512)
    assert predicted_others(mixed) == pytest.approx(integer + dear)


@pytest.mark.parametrize("sizes", [(3,), (1, 3, 3)])
def test_convolutions_of_one_and_three_axes_have_a_price(sizes: tuple[int, ...]) -> None:
    build = GraphBuilder()
    weight = build.store("w", np.ones((8, 8, *sizes), np.float32))
    pads = [s // 2 for s in sizes] * 2
    end = build.add("Conv", ["x", weight], pads=pads)
    model = graph_of(build, end, [1, 8, *[16] * len(sizes)])
    dims = model.graph.input[0].type.tensor_type.shape.dim
    del dims[2:]
    for _ in sizes:
        dims.add().dim_value = 16
    kernel, cells = (int(np.prod(sizes[:-1])), sizes[-1]), 16 ** len(sizes)
    wanted = conv_instructions("cortex-a76", "float", 8, 8, kernel, 1, cells)
    assert predicted_convs(model, "cortex-a76") == wanted
    assert wanted != conv_instructions("cortex-a76", "float", 8, 8, (1, 1), 1, cells)


def test_a_transposed_convolution_is_priced_by_its_weights_not_by_the_width_of_its_map() -> None:
    prices = {}
    for side, groups in ((16, 1), (32, 1), (32, 8)):
        build = GraphBuilder()
        weight = build.store("w", np.ones((8, 8 // groups, 2, 2), np.float32))
        end = build.add("ConvTranspose", ["x", weight], strides=[2, 2], group=groups)
        model = graph_of(build, end, [1, 8, 2 * side, 2 * side])
        for axis in (2, 3):
            model.graph.input[0].type.tensor_type.shape.dim[axis].dim_value = side
        prices[side, groups] = predicted_convs(model, "cortex-a76")
    one = conv_instructions("cortex-a76", "float", 8, 32, (1, 1), 1, 1024)
    assert prices[32, 1] == one
    assert 3 < prices[32, 1] / prices[16, 1] < 4.1, "four times the cells"
    assert prices[32, 8] != prices[32, 1], "eight small ones"


def test_the_guest_leaves_the_same_pass_out_as_the_detector() -> None:
    assert f'"{WEIGHT_ROUNDING}"' in Path(cost_guest.__file__).read_text()
