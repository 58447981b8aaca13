"""How the INT8 search judges: ranges, SiLUs that are equalised through, disagreement times cost."""

from __future__ import annotations

import runpy
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cv2
import numpy as np
import onnx
import onnxruntime as ort
import pytest
from edgesight.compression.calibrate import Grid, Seen
from edgesight.compression.calibrators import CALIBRATORS
from edgesight.compression.int8_search import (
    Search,
    Variant,
    effect,
    find_grids,
    first_gates,
    gate_factor,
    gates_by_worth,
)
from edgesight.compression.lowbit_choice import in_float
from edgesight.compression.onnx_io import tidy
from edgesight.compression.predict import predicted_convs, predicted_others
from edgesight.compression.qdq import Links, insert, plan_layout
from edgesight.compression.quantize import QuantizeConfig, quantize
from edgesight.compression.recipe import make_recipe
from edgesight.models import cost_guest
from edgesight.models.core_costs import CHANNELWISE, OPERATORS, conv_instructions
from edgesight.models.detector import WEIGHT_ROUNDING, open_session
from edgesight.models.errors import RecipeError
from onnx import TensorProto, helper

graphs: Any = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("tiny_graphs.py"))))
SIZE, SPEC, GraphBuilder = graphs.SIZE, graphs.SPEC, graphs.GraphBuilder


def quiet(items: Iterable[Any], **_: Any) -> Iterable[Any]:
    return items


def bell(wild: float = 0.0) -> Any:
    """A hundred thousand normal values, and one that is not."""
    values = np.random.default_rng(0).normal(0, 1, 100_000).astype(np.float32)
    if wild:
        values[500] = wild
    return values[:, None]


@pytest.mark.parametrize("name", CALIBRATORS)
def test_every_calibrator_rounds_a_bell_well(name: str) -> None:
    values = bell()
    grid = CALIBRATORS[name](values, float(values.min()), float(values.max()), None, None)
    error = grid.round(values) - values
    assert grid.low < 0 < grid.high
    assert float((error**2).mean()) < 3e-3


@pytest.mark.parametrize("name", CALIBRATORS)
def test_one_wild_value_does_not_take_the_codes_but_from_least_to_greatest(name: str) -> None:
    values = bell(1000.0)
    grid = CALIBRATORS[name](values, float(values.min()), 1000.0, None, None)
    assert (grid.high > 900) == (name == "least to greatest")


@pytest.mark.parametrize("name", CALIBRATORS)
def test_what_is_never_below_zero_wastes_no_codes(name: str) -> None:
    values = np.maximum(bell(), 0)
    grid = CALIBRATORS[name](values, 0.0, float(values.max()), None, None)
    assert grid.zero_point == 0


@pytest.mark.parametrize("name", CALIBRATORS)
def test_a_tensor_of_zeros_and_broken_numbers_gives_a_grid(name: str) -> None:
    empty = CALIBRATORS[name](np.zeros((50, 2), np.float32), 0.0, 0.0, None, None)
    assert empty.scale > 0
    same = np.array([[1.0], [1.0000001]] * 50, np.float32)  # a saturated gate
    nearly = CALIBRATORS[name](same, 1.0, 1.0000001, None, None)
    np.testing.assert_allclose(nearly.round(same), same, atol=0.01)
    nothing = CALIBRATORS[name](np.zeros((50, 2), np.float32), 0.0, np.inf, None, None)
    assert np.isfinite(nothing.scale)
    broken = bell()
    broken[7] = np.inf
    grid = CALIBRATORS[name](broken, float(bell().min()), np.inf, None, None)
    assert np.isfinite(grid.scale)
    assert grid.high < 100


def graph_of(build: Any, end: str, shape: list[int]) -> Any:
    """A model of ``GraphBuilder``'s nodes; reads ``x``, 8 channels of 16x16."""
    output = build.add("Neg", [end])  # the head's tail: it stays in float
    graph = helper.make_graph(
        build.nodes,
        "tiny",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 8, 16, 16])],
        [helper.make_tensor_value_info(output, TensorProto.FLOAT, shape)],
        build.stored,
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def opened(model: Any, folder: Path) -> tuple[Any, list[str]]:
    """Opens a model as a detector's is opened; returns the operators that run, too."""
    path = folder / "model.onnx"
    onnx.save(model, path)
    options = ort.SessionOptions()
    options.optimized_model_filepath = str(folder / "optimised.onnx")
    runner = open_session(path, options)
    return runner, [n.op_type for n in onnx.load(folder / "optimised.onnx").graph.node]


def quantized(model: Any, in_float: Sequence[str] = (), low: float = -4.0) -> Any:
    layout = plan_layout(model, in_float)
    relus = {out for n in model.graph.node if n.op_type == "Relu" for out in n.output}
    positive = {layout.group[name] for name in layout.tensors if name in relus}
    grids = {g: Grid.over(0.0 if g in positive else low, 4.0) for g in layout.group.values()}
    return insert(model, layout, grids, signed=False)


def test_a_relu_beside_a_leaky_relu_leaves_both_convolutions_integer(tmp_path: Path) -> None:
    build = GraphBuilder()
    left = build.add("Relu", [build.conv("x", (8, 8), 3)])
    right = build.add("LeakyRelu", [build.conv("x", (8, 8), 3)], alpha=0.1)
    joined = build.add("Concat", [left, right], axis=1)
    end = build.conv(joined, (16, 8))
    model = graph_of(build, end, [1, 8, 16, 16])
    layout = plan_layout(model)
    assert layout.group[left] != layout.group[joined], "a grid below zero would undo the ReLU"
    assert layout.group[right] == layout.group[joined]
    runner, kinds = opened(quantized(model), tmp_path)
    assert kinds.count("QLinearConv") == 3
    assert not {"Conv", "FusedConv", "Relu"} & set(kinds)
    x = np.random.default_rng(1).normal(0, 1, (1, 8, 16, 16)).astype(np.float32)
    plain, _ = opened(model, tmp_path)
    wanted, got = plain.run(None, {"x": x})[0], runner.run(None, {"x": x})[0]
    assert np.corrcoef(wanted.ravel(), got.ravel())[0, 1] > 0.99


def test_relus_that_are_joined_share_a_grid() -> None:
    build = GraphBuilder()
    parts = [build.add("Relu", [build.conv("x", (8, 8), 3)]) for _ in range(2)]
    joined = build.add("Concat", parts, axis=1)
    end = build.conv(joined, (16, 8))
    layout = plan_layout(graph_of(build, end, [1, 8, 16, 16]))
    assert len({layout.group[name] for name in (*parts, joined)}) == 1


def silu_graph() -> Any:
    build = GraphBuilder()
    first = build.silu(build.conv("x", (8, 16), 3))
    end = build.conv(build.silu(build.conv(first, (16, 16), 3, stride=2)), (16, 8))
    return tidy(graph_of(build, end, [1, 8, 8, 8]))


def test_silus_are_ordered_by_noise_per_number_and_taken_from_the_front() -> None:
    model = silu_graph()
    layout = plan_layout(model)
    gates = [n for n in model.graph.node if n.op_type == "Sigmoid"]
    sources = [layout.group[g.input[0]] for g in gates]
    # The first is four times as large: with twice the noise it is still worth less.
    ordered = gates_by_worth(model, {sources[0]: 2.0, sources[1]: 1.0}, layout)
    assert ordered == [(gates[1].name, 16 * 64), (gates[0].name, 16 * 256)]
    assert first_gates(ordered, 0.1) == frozenset()
    assert first_gates(ordered, 0.2) == {gates[1].name}
    assert first_gates(ordered, 1.0) == {g.name for g in gates}


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


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    found = []
    for number in range(4):
        image = np.random.default_rng(number).integers(0, 256, (80, 96, 3), dtype=np.uint8)
        found.append(tmp_path_factory.mktemp("photos") / f"{number}.png")
        cv2.imwrite(str(found[-1]), image)
    return found


def searched(weight: float) -> Search:
    return Search(None, "cortex-a76", True, weight)  # type: ignore[arg-type]


def test_disagreement_and_cost_weigh_alike_unless_told_otherwise() -> None:
    def variant(loss: float, cost: float) -> Variant:
        return Variant(None, None, {}, loss=loss, cost=cost)  # type: ignore[arg-type]

    cheap, close = variant(0.3, 100.0), variant(0.2, 160.0)
    assert searched(1).score(cheap) < searched(1).score(close)
    assert searched(0).score(cheap) > searched(0).score(close)
    assert searched(1).score(variant(0.0, 100.0)) > 0, "cost counts where nothing is lost, too"


def test_within_a_limit_of_cost_what_is_nearer_to_it_wins_and_then_the_more_accurate() -> None:
    def variant(loss: float, cost: float) -> Variant:
        nodes = frozenset({str(cost)})
        return Variant(None, None, {}, nodes, loss=loss, cost=cost)  # type: ignore[arg-type]

    search = Search(None, "cortex-a76", True, 0.0, limit=100.0)  # type: ignore[arg-type]
    rough, exact, dear, dearest = (
        variant(*p) for p in ((0.5, 90), (0.3, 99), (0.2, 101), (0.1, 120))
    )
    for one in (rough, exact, dear, dearest):
        search.known[one.key] = one.loss, one.cost
    assert search.better("", rough, exact) == exact
    assert search.better("", exact, dear) == exact
    assert search.better("", dear, rough) == rough
    assert search.better("", dearest, dear) == dear
    assert search.better("", dear, dearest) == dear


@pytest.mark.parametrize("cost_max", [0.01, 1.0])
def test_a_limit_that_cannot_be_met_is_told(photos: list[Path], cost_max: float) -> None:
    config = QuantizeConfig(photos_max=4, cost_max=cost_max)
    result = quantize(graphs.detector("silu"), SPEC, photos, config, progress=quiet)
    part = result.report["part of the float model's instructions"]
    wanted = (
        ()
        if cost_max == 1
        else (
            "cost_max = 0.01 is not met: the cheapest way found takes "
            f"{part:.2f} of the float model's instructions",
        )
    )
    assert result.notes == wanted
    assert part < 1


def test_the_report_says_what_each_trial_cost_and_which_ranges_won(photos: list[Path]) -> None:
    dear, tried = {}, {}
    for core in ("cortex-a76", "x86-64"):
        config = QuantizeConfig(target=core, photos_max=4)
        report = quantize(graphs.detector("silu"), SPEC, photos, config, progress=quiet).report
        assert report["ranges"] in CALIBRATORS
        tried[core] = set(report["disagreement"]) - {"final"}
        others = {f"ranges: {name}" for name in CALIBRATORS if name != "least cubic error"}
        assert others <= tried[core]
        assert any(name.startswith("through ") for name in tried[core])
        dear[core] = report["million instructions"]
    assert set(dear["cortex-a76"]) == tried["cortex-a76"]
    assert all(cost > 0 for cost in dear["cortex-a76"].values())
    assert dear["x86-64"] == {}, "no table, no figure"


def test_what_a_pooling_drops_needs_no_code() -> None:
    build = GraphBuilder()
    before = build.conv("x", (8, 8), 3)
    after = build.add("MaxPool", [before], kernel_shape=[2, 2], strides=[2, 2])
    end = build.conv(build.add("LeakyRelu", [after], alpha=0.1), (8, 8))
    model = graph_of(build, end, [1, 8, 8, 8])
    layout = plan_layout(model)
    assert layout.group[before] == layout.group[after]
    flat = np.float32(bell().reshape(-1, 8)[:1000])
    seen = {
        name: Seen(values.min(axis=0), values.max(axis=0), values)
        for name in layout.tensors
        for values in [flat - 50 * (flat < -1) if name == before else flat]
    }
    grid = find_grids(model, layout, seen)[layout.group[before]]
    assert -6 < grid.low < 0
    assert 3 < grid.high < 6


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


@pytest.mark.parametrize("shape", [(1, 1, 16, 16), (1, 8, 16, 16), (1, 1, 1, 1)])
def test_a_scaled_gate_that_is_no_equalised_silu_is_left_alone(shape: tuple[int, ...]) -> None:
    build = GraphBuilder()
    x = build.conv("x", (8, 8), 3)
    scaled = build.add("Mul", [x, build.store("f", np.full(shape, 2.0, np.float32))])
    gate = build.add("Sigmoid", [scaled])
    product = build.add("Mul", [x, gate]) if len(set(shape)) > 2 else gate
    end = build.conv(product, (8, 8))
    links = Links(graph_of(build, end, [1, 8, 16, 16]).graph)
    assert gate_factor(links, links.maker[scaled]) is None
    assert effect(links, x) == (None, None)


def test_the_guest_leaves_the_same_pass_out_as_the_detector() -> None:
    assert f'"{WEIGHT_ROUNDING}"' in Path(cost_guest.__file__).read_text()


def test_a_recipe_and_a_config_weigh_cost_by_one_unless_told_otherwise(tmp_path: Path) -> None:
    assert QuantizeConfig().weight == 1
    assert QuantizeConfig(cost_max=0.5).weight == 0
    assert QuantizeConfig(cost_max=0.5, cost_weight=2).weight == 2
    values = {"version": 1, "data": {"photos": "p"}, "steps": [{"kind": "quantize"}]}
    assert make_recipe(values, tmp_path).steps[0].cost_weight is None  # type: ignore[union-attr]
    for wrong in (-1, 11):
        with pytest.raises(RecipeError, match=r"cost_weight: expected 0\.\.10"):
            QuantizeConfig(cost_weight=wrong)
        values["steps"] = [{"kind": "quantize", "cost_weight": wrong}]
        with pytest.raises(RecipeError, match="cost_weight"):
            make_recipe(values, tmp_path)
