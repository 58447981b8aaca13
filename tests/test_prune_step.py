"""The step ``prune`` in a recipe: budgets, criteria, parts, and what it says of them."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from edgesight.compression.pipeline import RunResult, run_recipe
from edgesight.compression.prune import COSTS, conv_costs, total_cost
from edgesight.compression.recipe import make_recipe
from edgesight.models.errors import RecipeError

HERE = Path(__file__).parent
tools: Any = runpy.run_path(str(HERE / "tiny_recipe.py"))
PRUNE: dict[str, Any] = {"kind": "prune", "photos": 6, "align": 4, "iterations": 1}


@pytest.fixture(autouse=True)
def tiny_net(monkeypatch: pytest.MonkeyPatch, one_thread: None) -> None:
    module = ModuleType("tiny_net")
    vars(module).update(runpy.run_path(str(HERE / "tiny_net.py")))
    monkeypatch.setitem(sys.modules, "tiny_net", module)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("recipe")
    tools["draw_photos"](folder / "photos")
    return folder


def run(base: Path, out: str, **settings: Any) -> RunResult:
    data = {"photos": "photos", "hold_out": 4, "step_photos": 0}
    values = tools["tiny_recipe"]([PRUNE | settings], out=out, data=data)
    return run_recipe(make_recipe(values, base), progress=False, say=lambda line: None)


def figures(result: RunResult) -> dict[str, Any]:
    report = result.rows[1].report
    assert report is not None
    return report.figures


def test_a_budget_in_instructions(base: Path) -> None:
    result = run(base, "cost", cost_ratio=0.9, cost="cortex-a76")
    told = figures(result)
    costs = conv_costs(result.state.net, result.state.example)
    assert told["cost"] == "cortex-a76"
    assert told["cost_after"] == round(total_cost(costs, COSTS["cortex-a76"]))
    assert told["cost_after"] <= told["cost_goal"] == round(0.9 * told["cost_original"])
    assert told["macs_after"] < told["macs_original"]


def test_in_parts(base: Path) -> None:
    """Each part is an edit of its own; a resumed run carries both out again."""
    result = run(base, "parts", macs_ratio=0.5, iterations=2)
    told = figures(result)
    assert [edit["kind"] for edit in result.state.edits] == ["cut", "cut"]
    assert told["macs_after"] <= told["macs_goal"]
    for name, (now, before) in told["layers"].items():
        conv = dict(result.state.net.named_modules())[name]
        whole = dict(result.state.teacher.named_modules())[name]
        assert (now, before) == (conv.out_channels, whole.out_channels)
        assert now >= 0.25 * before
    once = run(base, "once", macs_ratio=0.5)
    first, second = (sum(now for now, _ in figures(r)["layers"].values()) for r in (once, result))
    assert first != second or once.state.edits != result.state.edits
    resumed = run(base, "parts", macs_ratio=0.5, iterations=2)
    assert resumed.rows[1].resumed
    ours, theirs = resumed.state.net.state_dict(), result.state.net.state_dict()
    assert all(torch.equal(ours[k], theirs[k]) for k in theirs)


def test_parts_do_not_take_more_of_a_layer_than_is_allowed(base: Path) -> None:
    """``keep_min`` counts from what the step began with, not from what a part has left."""
    result = run(base, "least", macs_ratio=0.6, iterations=3, keep_min=0.7, align=1)
    for now, before in figures(result)["layers"].values():
        assert now >= 0.7 * before


@pytest.mark.parametrize("criterion", ["l1", "bn", "taylor", "lamp", "fpgm"])
def test_every_criterion_runs_in_a_recipe(base: Path, criterion: str) -> None:
    result = run(base, criterion, macs_ratio=0.6, criterion=criterion, allocation="global")
    told = figures(result)
    assert told["macs_after"] <= told["macs_goal"]
    assert result.final.is_file()


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"macs_ratio": 0.01}, r"prune.macs_ratio: 0.01 of .* M multiply-accumulates .* is 0\.\d"),
        (
            {"cost_ratio": 0.01, "cost": "cortex-a72"},
            r"prune.cost_ratio: 0.01 of .* M instructions on cortex-a72 .* is 0\.\d",
        ),
    ],
)
def test_out_of_reach(base: Path, settings: dict[str, Any], words: str) -> None:
    with pytest.raises(RecipeError, match=words) as caught:
        run(base, "far", **settings)
    assert "\n" not in str(caught.value)
    assert not list((base / "far").rglob("state.json"))


def test_the_least_that_is_told_can_be_had(base: Path) -> None:
    with pytest.raises(RecipeError) as caught:
        run(base, "far2", macs_ratio=0.02)
    least = float(str(caught.value).split("the least is ")[1].split(";")[0])
    result = run(base, "near", macs_ratio=least)
    assert figures(result)["macs_after"] / figures(result)["macs_original"] <= least


def test_two_budgets_are_refused(base: Path) -> None:
    with pytest.raises(RecipeError, match="found macs_ratio and cost_ratio"):
        run(base, "both", macs_ratio=0.5, cost_ratio=0.5)


def test_steps_of_different_units_may_follow_each_other(base: Path) -> None:
    steps = [PRUNE | {"macs_ratio": 0.5}, PRUNE | {"cost_ratio": 0.7, "cost": "cortex-a76"}]
    assert len(make_recipe(tools["tiny_recipe"](steps), base).steps) == 2
    with pytest.raises(RecipeError, match="each prune to leave less"):
        make_recipe(tools["tiny_recipe"]([steps[0], PRUNE | {"macs_ratio": 0.6}]), base)


def test_the_edits_are_plain_data(base: Path) -> None:
    result = run(base, "edits", macs_ratio=0.6, criterion="l2", allocation="uniform")
    (edit,) = result.state.edits
    assert json.loads(json.dumps(edit)) == edit


def test_a_stored_plan_is_carried_out_again(base: Path) -> None:
    first = run(base, "chosen", macs_ratio=0.6)
    (base / "plan.json").write_text(json.dumps(first.state.edits[0]))
    again = run(base, "planned", plan="plan.json")
    assert again.state.edits == first.state.edits
    for name, value in first.state.net.state_dict().items():
        assert torch.equal(again.state.net.state_dict()[name], value), name
    assert figures(again)["macs_after"] == figures(first)["macs_after"]


def test_another_plan_is_another_result(base: Path) -> None:
    first = run(base, "one", macs_ratio=0.6)
    removed = first.state.edits[0]["removed"]
    (base / "two.json").write_text(json.dumps(removed))
    run(base, "two", plan="two.json")
    less = {name: rows[:4] for name, rows in removed.items()}
    (base / "two.json").write_text(json.dumps(less))
    assert run(base, "two", plan="two.json").state.edits[0]["removed"] == less


@pytest.mark.parametrize("text", ["", "[1]", '{"stem.conv": "all"}', '{"nobody": [1]}'])
def test_what_is_no_plan_of_this_network_is_refused(base: Path, text: str) -> None:
    (base / "bad.json").write_text(text)
    with pytest.raises(RecipeError, match=r"bad\.json: expected a plan"):
        run(base, "bad", plan="bad.json")
