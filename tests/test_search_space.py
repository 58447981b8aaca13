"""What a search can choose, and what it counts costs in."""

from __future__ import annotations

import itertools
import runpy
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import optuna
import pytest
from edgesight.compression import price as price_module
from edgesight.compression import settings, space
from edgesight.compression.predict import predicted_convs, predicted_instructions
from edgesight.compression.price import graph_print, price_for
from edgesight.compression.space import (
    KNOBS,
    SHARES,
    Knobs,
    Space,
    draw_recipe,
    first_choices,
    known_kinds,
    recipe_text,
    same_recipe,
    sizes_near,
)
from edgesight.compression.steps import STEPS
from edgesight.models.core_costs import OPERATORS, conv_instructions
from edgesight.models.errors import RecipeError
from edgesight.models.graph import load_model
from onnx import helper, numpy_helper

kit: Any = runpy.run_path(str(Path(__file__).with_name("search_kit.py")))
WHOLE = (416, 416)


def space_of(kinds: tuple[str, ...], sizes: tuple[tuple[int, int], ...] = (WHOLE,)) -> Space:
    return Space(kinds, sizes, WHOLE, 900, 400)


def draws(one: Space, count: int = 60) -> list[Any]:
    """Returns recipes at full effort that an unguided search would draw."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    return [draw_recipe(study.ask(), one, 1.0) for _ in range(count)]


def test_whatever_is_drawn_is_a_recipe_with_quantizing_at_its_end() -> None:
    found = draws(space_of(known_kinds(), (WHOLE, (320, 320))))
    for hw, steps in found:
        assert hw in (WHOLE, (320, 320))
        for step in steps:
            settings.STEP_KINDS[step["kind"]].model_validate(step)
        places = [KNOBS[step["kind"]].place for step in steps]
        assert places == sorted(places, key=["body", "train", "last"].index)
        assert len({step["kind"] for step in steps}) == len(steps)
    used = {step["kind"] for _, steps in found for step in steps}
    assert used == set(known_kinds())
    assert {hw for hw, _ in found} == {WHOLE, (320, 320)}


def test_one_step_at_most_writes_the_file_and_it_is_last() -> None:
    found = draws(space_of(("prune", "quantize", "half")))
    ends = [[s["kind"] for s in steps if KNOBS[s["kind"]].place == "last"] for _, steps in found]
    assert {tuple(kinds) for kinds in ends} == {("quantize",), ("half",), ()}


def test_a_size_that_is_asked_for_may_be_had_by_fewer_bits() -> None:
    one = Space(("quantize",), (WHOLE,), WHOLE, 900, 400, "cortex-a76", 500_000)
    sizes = {step.get("bytes_max") for _, steps in draws(one) for step in steps}
    assert sizes == {None, 500_000}


def test_every_kind_it_knows_is_a_step() -> None:
    assert set(known_kinds()) <= set(STEPS)
    assert known_kinds(("quantize", "prune")) == ("prune", "quantize")


def test_more_effort_is_the_same_recipe_with_longer_training_and_more_photos() -> None:
    values = {
        **{"use.prune": True, "use.distill": True, "use.quantize": True},
        **{"prune.left": 0.5, "prune.align": 8, "distill.length": 1.0, "distill.rate": 1e-3},
        **{"quantize.refine": 0.25, "quantize.share": 0.9},
    }
    one = space_of(("prune", "distill", "quantize"))
    rungs = []
    for share in SHARES:
        pick = optuna.trial.FixedTrial(values)
        _, steps = draw_recipe(pick, one, share)
        rungs.append({step["kind"]: step for step in steps})
    assert [r["distill"]["photos"] for r in rungs] == [100, 300, 900]
    assert [r["quantize"]["photos"] for r in rungs] == [36, 107, 320]
    assert [r["quantize"]["refine"] for r in rungs] == [25, 75, 225]
    assert rungs[0]["prune"] == rungs[1]["prune"] == rungs[2]["prune"], "so it is done only once"


def test_what_pruning_leaves_counts_from_the_input_size_chosen() -> None:
    values = {"use.prune": True, "prune.left": 0.5, "prune.align": 8, "input": "208x208"}
    one = space_of(("prune",), (WHOLE, (208, 208)))
    hw, (step,) = draw_recipe(optuna.trial.FixedTrial(values), one, 1.0)
    assert hw == (208, 208)
    assert step["macs_ratio"] == 0.125, "a quarter of the input, half of the channels"


def test_a_step_joins_by_one_entry_and_its_order_is_searched(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def weaken(draw: Any) -> dict[str, Any]:
        return {"by": draw.pick.suggest_float("weaken.by", 0, 1)}

    monkeypatch.setitem(space.KNOBS, "weaken", Knobs("body", weaken))
    monkeypatch.setitem(settings.STEP_KINDS, "weaken", settings.Strict)
    kinds = tuple(k for k in known_kinds() if k in ("prune", "weaken", "quantize"))
    assert "weaken" in kinds
    orders = {tuple(step["kind"] for step in steps) for _, steps in draws(space_of(kinds))}
    assert {("prune", "weaken", "quantize"), ("weaken", "prune", "quantize")} <= orders
    assert all(order.index("quantize") == len(order) - 1 for order in orders if "quantize" in order)


def test_sizes_keep_the_shape_and_the_stride() -> None:
    assert sizes_near((416, 416)) == ((416, 416), (320, 320), (224, 224))
    assert sizes_near((288, 384))[1] == (224, 288)
    assert sizes_near((64, 64)) == ((64, 64),), "not below what a detector can use"


def test_what_is_tried_first_fits_the_space() -> None:
    for kinds in (("quantize",), ("prune", "distill", "quantize"), ("distill",)):
        one = space_of(kinds, (WHOLE, (320, 320)))
        seeds = first_choices(one)
        assert seeds
        for values in seeds:
            study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
            study.enqueue_trial(values)
            hw, steps = draw_recipe(study.ask(), one, 1.0)
            assert hw == WHOLE
            assert {s["kind"] for s in steps} == {k for k in kinds if values[f"use.{k}"]}


def test_recipes_are_told_apart_and_told_in_words() -> None:
    prune = {"kind": "prune", "macs_ratio": 0.5, "photos": 96}
    distill = {"kind": "distill", "photos": 900}
    assert (
        recipe_text(WHOLE, [prune, distill]) == "416x416: prune (MACs 0.5) > distill (photos 900)"
    )
    assert recipe_text(WHOLE, []) == "416x416: as it is"
    texts = [
        same_recipe(hw, steps)
        for hw, steps in itertools.product(
            (WHOLE, (320, 320)), ([prune], [prune, distill], [distill, prune])
        )
    ]
    assert len(set(texts)) == len(texts)


def conv_model(channels: int = 32, seed: int = 0, quantized: bool = False, zero: Any = None) -> Any:
    """Returns a model of one 1x1 convolution on 20x20 cells, 16 channels in."""
    weight = np.random.default_rng(seed).normal(size=(channels, 16, 1, 1)).astype(np.float32)
    stored = [numpy_helper.from_array(weight, "w")]
    nodes = [helper.make_node("Conv", ["x", "w"], ["y"], "conv")]
    if quantized:
        zero = np.uint8(0) if zero is None else zero
        stored = [
            numpy_helper.from_array((10 * weight).astype(np.int8), "w"),
            numpy_helper.from_array(np.float32(0.1), "s"),
            numpy_helper.from_array(np.asarray(zero), "z"),
            numpy_helper.from_array(np.int8(0), "wz"),
        ]
        nodes = [
            helper.make_node("QuantizeLinear", ["x", "s", "z"], ["xq"]),
            helper.make_node("DequantizeLinear", ["xq", "s", "z"], ["xd"]),
            helper.make_node("DequantizeLinear", ["w", "s", "wz"], ["wd"]),
            helper.make_node("Conv", ["xd", "wd"], ["yd"], "conv"),
            helper.make_node("QuantizeLinear", ["yd", "s", "z"], ["yq"]),
            helper.make_node("DequantizeLinear", ["yq", "s", "z"], ["y"]),
        ]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", 1, [1, 16, 20, 20])],
        [helper.make_tensor_value_info("y", 1, [1, channels, 20, 20])],
        stored,
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)])


@pytest.mark.parametrize(
    ("model", "kind"),
    [
        (conv_model(), "float"),
        (conv_model(quantized=True), "u8"),
        (conv_model(quantized=True, zero=np.int8(3)), "s8"),
    ],
)
@pytest.mark.parametrize("core", ["cortex-a76", "cortex-a72"])
def test_predicted_costs_are_the_tables(model: Any, kind: str, core: str) -> None:
    wanted = conv_instructions(core, kind, 16, 32, (1, 1), 1, 400)
    assert predicted_convs(model, core) == pytest.approx(wanted)
    ends = (
        0
        if kind == "float"
        else sum(
            call + each * 400 * channels
            for (call, each), channels in (
                (OPERATORS["QuantizeLinear"], 16),
                (OPERATORS["DequantizeLinear"], 32),
            )
        )
    )
    assert predicted_instructions(model, core) == pytest.approx(wanted + ends)


def test_predicted_costs_add_up_over_a_real_detector() -> None:
    from edgesight.models.zoo import shipped_float

    float_model = load_model(shipped_float())
    int8 = load_model(shipped_float().with_name("edgesight_nano.onnx"))
    whole = predicted_instructions(float_model, "cortex-a76")
    assert predicted_instructions(int8, "cortex-a76") < 0.6 * whole
    assert predicted_instructions(int8, "cortex-a72") > predicted_instructions(int8, "cortex-a76")


def test_graphs_that_differ_in_weights_only_have_one_print() -> None:
    assert graph_print(conv_model(seed=0)) == graph_print(conv_model(seed=1))
    different = [
        conv_model(),
        conv_model(channels=24),
        conv_model(quantized=True),
        conv_model(quantized=True, zero=np.int8(3)),
    ]
    assert len({graph_print(model) for model in different}) == len(different)


def test_the_best_price_that_can_be_had(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    onnx.save(conv_model(), tmp_path / "a.onnx")
    onnx.save(conv_model(seed=1), tmp_path / "b.onnx")
    onnx.save(conv_model(channels=24), tmp_path / "c.onnx")
    counted: list[str] = []

    def count(paths: list[Path], core: str) -> list[int]:
        counted.extend(path.name for path in paths)
        return [1000] * len(paths)

    monkeypatch.setattr(price_module, "count_instructions", count)
    monkeypatch.setattr(price_module, "can_count", lambda core: core == "cortex-a76")
    price = price_for("cortex-a76", None, 7200)
    assert price.kind == "counted"
    assert [price.of(tmp_path / f"{name}.onnx") for name in "abc"] == [1000] * 3
    assert counted == ["a.onnx", "c.onnx"], "training does not change what is counted"
    assert price_for("cortex-a76", None, 60).kind == "predicted", "no time to count"
    assert price_for("cortex-a72").kind == "predicted"
    assert price_for("x86-64").kind == "macs"
    assert price_for("x86-64").of(tmp_path / "a.onnx") == 16 * 32 * 400
    assert "from a table" in price_for("cortex-a72").text
    with pytest.raises(RecipeError, match="expected costs to be counted, as the study began with"):
        price_for("cortex-a72", "counted")
