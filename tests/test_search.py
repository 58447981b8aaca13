"""The search: targets met and missed, its frontier, and what it may look at."""

from __future__ import annotations

import json
import re
import runpy
import sys
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from edgesight.__main__ import main
from edgesight.compression import candidates as candidates_module
from edgesight.compression.candidates import Workshop
from edgesight.compression.frontier import choose
from edgesight.compression.pipeline import run_recipe
from edgesight.compression.recipe import make_recipe, read_recipe
from edgesight.compression.search import read_trials, search
from edgesight.models.detector import OnnxDetector
from edgesight.models.errors import RecipeError
from edgesight.models.files import sha256
from edgesight.models.nets import build

kit: Any = runpy.run_path(str(Path(__file__).with_name("search_kit.py")))
recipe_of, run, quiet = kit["recipe_of"], kit["run"], kit["quiet"]
tiny_net = kit["tiny_net"]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with photos, and with labelled ones to learn from and to judge by."""
    folder = tmp_path_factory.mktemp("search")
    draw = kit["tools"]["draw_photos"]
    draw(folder / "photos")
    model = kit["export_tiny"](folder / "tiny.onnx")
    kit["label"](draw(folder / "labelled", 24), model)
    kit["label"](draw(folder / "eval", 6), model)
    return folder


@pytest.fixture(scope="module")
def reached(base: Path) -> dict[str, Any]:
    """A search whose target can be met, with labels and eval photos of their own."""
    data = {"photos": "labelled", "eval": "eval", "hold_out": 4}
    return run(recipe_of(base, "reached", data=data, trials=4, cost_max=0.75))


def test_a_target_that_can_be_met_is_met(base: Path, reached: dict[str, Any]) -> None:
    found = reached["search"]
    assert reached["passed"]
    assert found["met"]
    assert found["says"] == "found the most accurate model with at most 75 % of the cost"
    best = next(row for row in found["rows"] if row["best"])
    assert best["cost_ratio"] <= 0.75
    out = base / "reached"
    assert OnnxDetector(out / "model.onnx").spec.classes == ("a", "b", "c")
    assert sha256(out / "model.onnx") == best["sha256"]
    assert json.loads((out / "report.json").read_text())["steps"][-1]["macs"] == best["macs"]
    assert "multiply-accumulates" in found["cost_unit"], "the report says what cost is"
    within = [row for row in found["rows"] if row["cost_ratio"] <= 0.75]
    assert best["loss"] == min(row["loss"] for row in within)


def test_the_frontier_has_nobody_beaten_and_all_figures(
    base: Path, reached: dict[str, Any]
) -> None:
    found = reached["search"]
    rows = found["rows"]
    assert sum(row["best"] for row in rows) == 1
    keys = ("loss", "cost_ratio", "bytes")
    for row in rows:
        for other in rows:
            if other is not row:
                assert any(other[key] > row[key] for key in keys), (row["name"], other["name"])
        assert row["macs"] > 0
        assert row["ms"] > 0
        assert row["score"]["kind"] == row["eval"]["kind"] == row["train"]["kind"] == "ap"
        assert row["score"]["photos"] == 6, "every fourth photo tunes"
        assert row["eval"]["photos"] == 6
        gap = row["generalisation"]["gap"]
        assert gap["after"] == pytest.approx(row["train"]["value"] - row["eval"]["value"])
        before = row["generalisation"]
        assert gap["before"] == pytest.approx(
            before["train"]["before"]["value"] - before["others"]["before"]["value"]
        )
    out = base / "reached"
    assert (out / "frontier.png").read_bytes().startswith(b"\x89PNG")
    page = (out / "frontier.html").read_text()
    assert "data:image/png;base64," in page
    assert all(row["text"].replace(">", "&gt;") in page for row in rows)
    assert json.loads((out / "frontier.json").read_text()) == found


def test_every_trial_is_logged_with_recipe_figures_and_files(
    base: Path, reached: dict[str, Any]
) -> None:
    trials = read_trials(base / "reached")
    assert [trial["trial"] for trial in trials] == [0, 1, 2, 3]
    assert reached["search"]["trials"] == 4
    for trial in trials:
        assert trial["candidates"] or trial["failed"]
        for one in trial["candidates"]:
            assert sha256(base / "reached" / one["file"]) == one["sha256"]
            assert {step["kind"] for step in one["steps"]} <= {"prune", "distill", "quantize"}
    for path in (base / "reached").rglob("*.json"):
        assert str(base) not in path.read_text(), "no folders of this machine"


def test_trials_begin_with_little_effort(base: Path, reached: dict[str, Any]) -> None:
    passes = [
        [s["photos"] for one in t["candidates"] for s in one["steps"] if s["kind"] == "distill"]
        for t in read_trials(base / "reached")
    ]
    longer = [p for p in passes if len(set(p)) > 1]
    assert longer, "some trial went on"
    assert all(p == sorted(p) for p in passes)
    assert max(map(max, longer)) <= 72


def test_the_best_recipe_can_be_run_again(base: Path, reached: dict[str, Any]) -> None:
    again = read_recipe(base / "reached" / "best.toml")
    assert again.search is None
    assert again.data.eval is not None
    result = run_recipe(again, progress=False, say=quiet)
    best = next(row for row in reached["search"]["rows"] if row["best"])
    assert sha256(result.final) == best["sha256"]


def test_verify_sets_training_photos_beside_the_others(base: Path, reached: dict[str, Any]) -> None:
    found = reached["run"]["verify"]["generalisation"]
    assert found["kind"] == "ap"
    assert found["train"]["after"]["photos"] == found["others"]["after"]["photos"] == 6
    assert found["others"]["after"]["value"] == reached["run"]["verify"]["after"]["value"]
    assert found["train"]["after"]["value"] != found["others"]["after"]["value"]
    page = (base / "reached" / "report.html").read_text()
    assert "<h2>Generalisation</h2>" in page
    assert "AP on training / other photos" in page


def test_a_target_out_of_reach_gives_the_nearest_model(
    base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    search = {"trials": 2, "bytes_max": "2 kB", "cost_max": 0.99}
    file = kit["write_recipe"](base / "far.toml", "far", **search)
    assert main(["compress", str(file), "--quiet"]) == 1
    text = capsys.readouterr().out
    last = text.splitlines()[-1]
    assert last.startswith("not found: the most accurate model with at most 99 % of the cost, ")
    assert "the nearest has" in last
    assert re.search(r"0\.0\d\d MB, asked: at most 0\.002 MB", last)
    found = json.loads((base / "far" / "frontier.json").read_text())
    best = next(row for row in found["rows"] if row["best"])
    assert not found["met"]
    assert best["bytes"] == min(row["bytes"] for row in found["rows"])
    assert sha256(base / "far" / "model.onnx") == best["sha256"]
    assert best["score"]["kind"] == "f1", "without labels: agreement"
    assert best["eval"] is None


class Reads:
    """Names of all files that are opened while it is on; the interpreter tells them."""

    def __init__(self) -> None:
        self.on = False
        self.names: set[str] = set()
        sys.addaudithook(self._hook)

    def _hook(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self.on and event == "open" and isinstance(arguments[0], str):
            self.names.add(arguments[0])


def test_the_eval_photos_are_not_read_before_the_search_is_over(base: Path) -> None:
    data = {"photos": "labelled", "eval": "eval", "hold_out": 4}
    recipe = recipe_of(base, "unseen", data=data, trials=2, cost_max=0.75)
    assert recipe.search is not None
    held = {str(path) for path in (base / "eval").glob("*.png")}
    reads = Reads()
    reads.on = True
    workshop = Workshop(recipe, progress=False)
    found = search(workshop, recipe.search, quiet)
    assert any("labelled" in name for name in reads.names), "the spy sees photos"
    assert not held & reads.names
    choose(workshop, recipe.search, found, quiet)
    reads.on = False
    assert held <= reads.names, "now they are"


def test_eval_photos_that_are_learned_from_are_refused_at_once(base: Path) -> None:
    data = {"photos": "labelled", "eval": "labelled"}
    with pytest.raises(Exception, match="in both photos and eval"):
        Workshop(recipe_of(base, "both", data=data, trials=1, cost_max=0.75), progress=False)


def test_the_budget_ends_the_search_but_nothing_that_has_begun(base: Path) -> None:
    found = run(recipe_of(base, "brief", budget_s=0.01, cost_max=0.75))["search"]
    assert found["trials"] == 1
    (trial,) = read_trials(base / "brief")
    assert len(trial["candidates"]) == 1
    assert found["seconds"] >= 0.01


def test_combinations_that_cannot_be_made_are_named_and_the_rest_goes_on(
    base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = candidates_module.run_step

    def broken(state: Any, settings: Any, *rest: Any) -> Any:
        if settings.kind == "prune":
            message = "prune: expected a network that can be cut, found none"
            raise RecipeError(message)
        return real(state, settings, *rest)

    monkeypatch.setattr(candidates_module, "run_step", broken)
    found = run(recipe_of(base, "partly", trials=3, cost_max=1.0))["search"]
    assert len(found["failed"]) >= 1
    assert "can be cut" in found["failed"][0]
    assert found["met"]
    only = recipe_of(base, "nothing", trials=30, cost_max=0.5, kinds=["prune"])
    workshop = Workshop(only, progress=False)
    assert only.search is not None
    monkeypatch.setattr("edgesight.compression.study.STARTUP_TRIALS", 30)
    with pytest.raises(RecipeError, match=r"the first 5 combinations all failed.*can be cut"):
        search(workshop, only.search, quiet)


def test_a_model_on_the_command_line(
    base: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(base)
    monkeypatch.setitem(build.NETS, "tiny", kit["tiny"]["TinyNet"])
    words = "tiny.onnx --labelled labelled --eval eval --ap-loss-max 90 --bytes-max 60kB"
    more = "--trials 2 --target x86-64 --out line --quiet"
    assert main(["compress", *words.split(), *more.split()]) == 0
    text = capsys.readouterr().out
    assert text.splitlines()[-1].startswith("found the cheapest model with at most 0.06 MB")
    found = json.loads((base / "line/frontier.json").read_text())
    assert found["core"] == "x86-64"
    assert found["target"] == {"bytes_max": 60_000, "ap_loss_max": 90}
    best = next(row for row in found["rows"] if row["best"])
    assert best["bytes"] == (base / "line/model.onnx").stat().st_size <= 60_000


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("r.toml --cost-max 0.5", "expected MODEL.onnx (or shipped) beside --cost-max"),
        ("--cost-max 0.5", "found none; a recipe says its target itself"),
        ("tiny.onnx --trials 3 --photos photos", "expected a target (--cost-max, --bytes-max"),
        ("tiny.onnx --cost-max 0.5 --trials 3", "expected --labelled DIR or --photos DIR"),
        ("tiny.onnx --cost-max 0.5 --photos photos", "expected budget_s (seconds) or trials"),
        ("tiny.onnx --cost-max 0.5 --photos photos --budget soon", "--budget: expected a time"),
        ("tiny.onnx --cost-max 2 --photos photos --trials 1", "search.cost_max: expected less"),
        ("tiny.onnx --bytes-max x --photos photos --trials 1", "search.bytes_max: expected a size"),
        ("--quantize-only tiny.onnx --bytes-max 1MB", "--bytes-max without --quantize-only"),
        ("--quantize-only tiny.onnx --cost-max 0.5", "expected --photos DIR"),
        ("--quantize-only tiny.onnx --cost-max 2", "--cost-max: expected above 0"),
        ("no.onnx --cost-max 0.5 --photos photos --trials 1", "no.onnx: expected"),
    ],
)
def test_bad_words_are_refused_in_one_line(
    words: str,
    message: str,
    base: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(base)
    assert main(["compress", *words.split(), "--quiet"]) == 2
    text = capsys.readouterr().err.strip().splitlines()[-1]
    assert text.startswith("edgesight: error: ")
    assert message in text


def test_a_search_with_photos_that_show_nothing_is_refused(base: Path) -> None:
    (base / "black").mkdir()
    for i in range(24):
        cv2.imwrite(str(base / "black" / f"{i:02}.png"), np.zeros((72, 96, 3), np.uint8))

    def make(num_classes: int = 3) -> Any:
        net = kit["tiny"]["make"](num_classes)
        with torch.no_grad():
            for predict in net.predict:
                predict.bias[4:] -= 50
        return net

    vars(sys.modules["tiny_net"])["blind"] = make
    values = kit["values_of"]("blind", data={"photos": "black"}, trials=1, cost_max=0.5)
    values["model"] = values["model"] | {"module": "tiny_net:blind"}
    recipe = make_recipe({k: v for k, v in values.items() if k != "steps"}, base)
    with pytest.raises(Exception, match="finds something, found none"):
        run(recipe)
