"""How the INT8 search judges: ranges, SiLUs that are equalised through, disagreement times cost."""

from __future__ import annotations

import runpy
from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from edgesight.compression.calibrate import Seen
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
from edgesight.compression.qdq import Links, plan_layout
from edgesight.compression.quantize import QuantizeConfig, quantize
from edgesight.compression.recipe import make_recipe
from edgesight.models.errors import RecipeError

graphs: Any = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("tiny_graphs.py"))))
SIZE, SPEC, GraphBuilder = graphs.SIZE, graphs.SPEC, graphs.GraphBuilder
kit: Any = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("qdq_kit.py"))))
graph_of, opened, quantized = kit.graph_of, kit.opened, kit.quantized
silu_graph = kit.silu_graph


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


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    found: list[Path] = kit.noise_photos(tmp_path_factory.mktemp("photos"), 4)
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
