"""The step ``factorise``: in recipes, beside the other steps, on the tiny and shipped detectors."""

from __future__ import annotations

import runpy
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from edgesight.compression.calibrate import session
from edgesight.compression.chain import HOWS
from edgesight.compression.distill import FeatureTap
from edgesight.compression.export import TorchDetector
from edgesight.compression.groups import find_groups
from edgesight.compression.lowrank_choice import Choice, by_budget, by_energy, choices_of
from edgesight.compression.lowrank_step import candidates, replaced
from edgesight.compression.moments import collect_moments
from edgesight.compression.photos import as_tensor
from edgesight.compression.pipeline import RunResult, run_recipe
from edgesight.compression.prune import COSTS, count_macs
from edgesight.compression.recipe import ModelSource, Recipe, make_recipe
from edgesight.compression.source import enter
from edgesight.compression.state import EDITS, rows_kept
from edgesight.models.dataset import load_image
from edgesight.models.detector import OnnxDetector
from edgesight.models.errors import RecipeError
from edgesight.models.files import sha256
from edgesight.models.graph import load_model
from torch import Tensor, nn

HERE = Path(__file__).parent
tools: Any = runpy.run_path(str(HERE / "tiny_recipe.py"))
kit: Any = SimpleNamespace(**runpy.run_path(str(HERE / "prune_kit.py")))
fat_kit: Any = SimpleNamespace(**runpy.run_path(str(HERE / "fat_net.py")))
fat, photo = fat_kit.fat, fat_kit.photo
pytestmark = pytest.mark.usefixtures("one_thread")
FACTORISE = {"kind": "factorise", "photos": 6, "cost": "macs"}
PRUNE = {"kind": "prune", "macs_ratio": 0.3, "photos": 6, "align": 8, "iterations": 1}


@pytest.fixture(scope="module", autouse=True)
def modules() -> Iterator[None]:
    """Lets recipes find ``tiny_net`` and ``fat_net``."""
    tiny = ModuleType("tiny_net")
    vars(tiny).update(runpy.run_path(str(HERE / "tiny_net.py")))
    sys.modules["tiny_net"] = tiny
    sys.modules["fat_net"] = ModuleType("fat_net")
    vars(sys.modules["fat_net"])["make"] = fat
    yield
    del sys.modules["tiny_net"], sys.modules["fat_net"]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with photos."""
    folder = tmp_path_factory.mktemp("lowrank")
    tools["draw_photos"](folder / "photos", 12)
    return folder


def recipe(base: Path, steps: list[dict[str, Any]], net: str = "fat_net", **changes: Any) -> Recipe:
    model = {"module": f"{net}:make", "classes": ["a", "b", "c"], "input_hw": [64, 64]}
    data = {"photos": "photos", "step_photos": 0}
    return make_recipe(
        tools["tiny_recipe"](steps, **{"model": model, "data": data} | changes), base
    )


def run(wanted: Recipe) -> RunResult:
    return run_recipe(wanted, progress=False, say=lambda line: None)


def figures(result: RunResult, row: int = 1) -> dict[str, Any]:
    report = result.rows[row].report
    assert report is not None
    return report.figures


def notes(result: RunResult, row: int = 1) -> str:
    report = result.rows[row].report
    assert report is not None
    return "; ".join(report.notes)


def error(a: nn.Module, b: nn.Module, x: Tensor) -> float:
    """Relative square error of ``a`` against ``b`` on pictures."""
    with torch.no_grad():
        pairs = list(zip(a(x), b(x), strict=True))
    return float(np.mean([float((x - y).square().mean() / y.var()) for x, y in pairs]))


# -- in recipes


@pytest.mark.parametrize("how", HOWS)
def test_each_method_saves_and_is_resumed(how: str, base: Path) -> None:
    wanted = recipe(base, [FACTORISE | {"methods": [how], "energy": 0.97}, PRUNE], out=how)
    first = run(wanted)
    original, factorised, pruned = first.rows
    assert factorised.macs < {"svd": 0.7, "spatial": 0.6}.get(how, 0.5) * original.macs
    assert pruned.macs <= 0.3 * original.macs
    rows = figures(first)["tried"]
    taken = [row for row in rows if row["kept"]]
    assert {"down.0", "down.1", "down.2"} <= {row["name"] for row in taken}
    assert {row["how"] for row in taken} == {how}
    assert all(row["energy"] >= 0.97 for row in taken)
    assert all(row["cost_after"] < row["cost"] for row in taken)
    assert figures(first)["macs_after"] == factorised.macs
    kinds = [edit["kind"] for edit in first.state.edits]
    assert kinds == ["factorise", "cut"]
    before = sha256(first.final)
    again = run(wanted)
    assert all(row.resumed for row in again.rows[1:])
    assert sha256(again.final) == before
    # The file computes what the network does.
    gap = _gap(again)
    assert gap < 1e-3


def _gap(result: RunResult) -> float:
    """Largest difference between the final file and the network, on a photo."""
    spec = result.state.spec
    x = np.random.default_rng(0).integers(0, 256, (1, *spec.input_hw, 3), dtype=np.uint8)
    runner = session(load_model(result.final))
    (found,) = runner.run(None, {runner.get_inputs()[0].name: x})
    normal = torch.from_numpy(x).permute(0, 3, 1, 2).float()
    if spec.color == "rgb":
        normal = normal.flip(1)
    mean, std = torch.tensor(spec.mean), torch.tensor(spec.std)
    normal = (normal - mean[:, None, None]) / std[:, None, None]
    (wanted,) = TorchDetector(result.state.net, spec).infer(normal.numpy())
    return float(np.abs(wanted - found).max())


def test_after_prune_and_before_distill_and_quantize(base: Path) -> None:
    steps = [
        PRUNE | {"macs_ratio": 0.6},
        FACTORISE | {"energy": 0.95},
        tools["DISTILL"],
        {"kind": "quantize", "photos": 6},
    ]
    result = run(recipe(base, steps, out="all"))
    macs = [row.macs for row in result.rows]
    assert macs[2] < 0.7 * macs[1] < macs[0]
    assert [edit["kind"] for edit in result.state.edits] == ["cut", "factorise"]
    types = [node.op_type for node in load_model(result.final).graph.node]
    assert "QuantizeLinear" in types
    assert types.count("Conv") > 3 + 8  # more than the network had
    assert OnnxDetector(result.final).spec.input_hw == (64, 64)
    # Each layer of the teacher has its counterpart in the student, with equal channels.
    state = result.state
    mine = FeatureTap(state.net)
    theirs = FeatureTap(state.teacher, rows_kept(state.teacher, state.edits))
    with torch.no_grad():
        state.net(photo())
        state.teacher(photo())
    small, dense = mine.take(), theirs.take()
    assert small.keys() > dense.keys()
    assert {n: small[n].shape for n in dense} == {n: y.shape for n, y in dense.items()}


def test_refitting_mends(base: Path) -> None:
    wanted = FACTORISE | {"energy": 0.8, "photos": 9, "data_aware": False}
    blunt = run(recipe(base, [wanted | {"refit": False}], out="blunt"))
    mended = run(recipe(base, [wanted], out="mended"))
    assert blunt.rows[1].macs == mended.rows[1].macs
    teacher, teacher_spec = blunt.state.teacher, blunt.state.teacher_spec
    pictures = [as_tensor(load_image(p), teacher_spec) for p in sorted((base / "photos").iterdir())]
    drawn = torch.cat(pictures)
    assert error(mended.state.net, teacher, drawn) < 0.7 * error(blunt.state.net, teacher, drawn)


def test_what_does_not_pay_stays_and_the_report_says_why(base: Path) -> None:
    narrow = run(recipe(base, [FACTORISE | {"cost": "cortex-a76"}], "tiny_net", out="narrow"))
    assert narrow.rows[1].macs == narrow.rows[0].macs
    assert narrow.state.edits == ()
    rows = figures(narrow)["tried"]
    assert [row["kept"] for row in rows] == [False] * 7
    assert "costs more at every rank" in rows[0]["why"]
    assert "nothing was factorised" in notes(narrow)
    fat_one = run(recipe(base, [FACTORISE | {"energy": 0.9999}], out="strict"))
    reasons = {row["name"]: row.get("why", "") for row in figures(fat_one)["tried"]}
    assert "at most where it costs less" in reasons["mix"]
    assert "1 layers: depthwise or grouped" in notes(fat_one)


def test_on_a_core_less_is_kept_than_multiply_accumulates_say(base: Path) -> None:
    net = fat()
    kept = {}
    for cost in ("macs", "cortex-a76", "cortex-a72"):
        found, _ = candidates(net, torch.zeros(1, 3, 64, 64), None, COSTS[cost])
        for one in found:
            one.choices = choices_of(one, HOWS, 8, COSTS[cost])
            for choices in one.choices.values():
                assert all(choice.cost < one.cost for choice in choices)
                assert [c.cost for c in choices] == sorted(c.cost for c in choices)
        kept[cost] = by_energy(found, 0.9, 8)
    assert kept["cortex-a76"].keys() < kept["macs"].keys()


def test_a_target_is_met_by_what_harms_least(base: Path) -> None:
    goal = {"kind": "factorise", "photos": 6, "cost": "macs", "macs_ratio": 0.6}
    result = run(recipe(base, [goal], out="goal"))
    original, factorised = result.rows
    assert 0.4 * original.macs < factorised.macs <= 0.6 * original.macs
    taken = {row["name"]: row["energy"] for row in figures(result)["tried"] if row["kept"]}
    assert set(taken) & {"down.0", "down.1", "down.2"}
    assert "mix" not in taken, "it is of full rank and saves next to nothing"
    assert min(taken.values()) > 0.98
    far = run(recipe(base, [goal | {"macs_ratio": 0.01}], out="far"))
    assert "macs_ratio 0.01 was not reached" in notes(far)
    assert far.rows[1].macs < 0.4 * original.macs
    assert run(recipe(base, [goal | {"macs_ratio": 1.0}], out="none")).state.edits == ()


def test_a_small_saving_at_a_high_price_is_skipped() -> None:
    """The way to a large cheap saving leads past it: it lies above the hull."""
    (one, *_), _ = candidates(fat(), torch.zeros(1, 3, 64, 64), None, COSTS["macs"])
    one.macs = one.cost = 100.0
    dear, cheap = Choice("svd", (8,), 90.0, 90.0), Choice("svd", (16,), 40.0, 40.0)
    one.choices = {"svd": [cheap, dear]}
    one.errors = {dear: 0.5, cheap: 0.6}
    for saving in (5, 30, 1000):
        assert by_budget([one], saving, 8) == {one.name: cheap}
    one.errors[cheap] = 9.0
    assert by_budget([one], 5, 8) == {one.name: dear}
    assert by_budget([one], 30, 8) == {one.name: cheap}


def test_what_is_lost_of_a_constant_goes_into_the_bias() -> None:
    """A chain of rank 8 gives the layer's mean on the photos that it was made from."""
    net = fat()
    batch = torch.cat([photo(), photo() + 50])
    moments = collect_moments(net, [batch])
    found, _ = candidates(net, torch.zeros(1, 3, 64, 64), moments, COSTS["macs"])
    chosen = {one.name: Choice("svd", (8,), 0.0, 0.0) for one in found if one.name == "mix"}
    small = replaced(net, found, chosen, moments)
    read: list[Tensor] = []
    net.mix.register_forward_pre_hook(lambda m, i: read.append(i[0]))
    with torch.no_grad():
        net(batch)
        wanted, given = net.mix(read[0]), small.get_submodule("mix")(read[0])
    error = (wanted - given).mean((0, 2, 3)).abs().max()
    assert float((wanted - given).abs().max()) > 0.01, "the chain is not the layer"
    assert float(error) < 1e-4


def test_the_budget_is_spent_best() -> None:
    """Against all combinations: what is chosen is not dominated by any other."""
    net = fat()
    found, _ = candidates(net, torch.zeros(1, 3, 64, 64), None, COSTS["macs"])
    found = [one for one in found if one.name in ("stem", "down.0", "mix")]
    for one in found:
        one.choices = choices_of(one, ("svd", "spatial"), 8, COSTS["macs"])
    options: list[list[tuple[float, float]]] = []
    for one in found:
        flat = [c for choices in one.choices.values() for c in choices]
        options.append([(0.0, 0.0), *((one.macs - c.macs, one.error(c)) for c in flat)])
    everything = [
        (sum(o[0] for o in picked), sum(o[1] for o in picked)) for picked in _product(options)
    ]
    for part in (0.1, 0.3, 0.5):
        saving = part * sum(one.macs for one in found)
        chosen = by_budget(found, saving, 8)
        saved = sum(one.macs - chosen[one.name].macs for one in found if one.name in chosen)
        lost = sum(one.error(chosen[one.name]) for one in found if one.name in chosen)
        assert saved >= saving
        better = [e for s, e in everything if s >= saved and e < lost - 1e-9]
        assert not better


def _product(options: list[list[tuple[float, float]]]) -> list[list[tuple[float, float]]]:
    result: list[list[tuple[float, float]]] = [[]]
    for column in options:
        result = [[*row, value] for row in result for value in column]
    return result


def test_a_foreign_detector(base: Path) -> None:
    file = kit.write_onnx(base / "foreign.onnx")
    model = {"file": str(file), "head": "yolox", "classes": ["a", "b"]}
    steps = [FACTORISE | {"methods": ["svd", "spatial"], "energy": 0.5}]
    result = run(recipe(base, steps, model=model, out="foreign"))
    assert figures(result)["macs_after"] < figures(result)["macs_before"]
    assert {e["kind"] for e in result.state.edits} == {"factorise"}
    assert _gap(result) < 1e-3


def test_the_shipped_detector_goes_out_and_comes_in_again(base: Path) -> None:
    steps = [FACTORISE | {"energy": 0.9, "photos": 4, "refit": False}]
    values = {"version": 1, "out": "shipped", "model": "shipped", "steps": steps}
    wanted = make_recipe(values | {"data": {"photos": "photos", "step_photos": 0}}, base)
    result = run(wanted)
    assert result.rows[1].macs < 0.8 * result.rows[0].macs
    entered = enter(ModelSource(file=result.float_file))
    assert [edit["kind"] for edit in entered.edits][-1] == "factorise"
    x = torch.randn(1, 3, *entered.spec.input_hw, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        gaps = [
            float((a - b).abs().max())
            for a, b in zip(entered.net(x), result.state.net(x), strict=True)
        ]
    assert max(gaps) < 1e-4
    # It can be cut again, and the plan composes with the edits it came with.
    channels = find_groups(entered.net, x)
    plan = {"kind": "cut", "removed": {}}
    group = next(g for g in channels.groups if any(".factor0" in m for m, _ in g.makers))
    plan["removed"] = {m: [i] for m, i in group.makers}
    small = EDITS["cut"](entered.net, plan, x)
    assert count_macs(small, x) < count_macs(entered.net, x)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"energy": 0.0}, "energy: expected greater than 0"),
        ({"energy": 1.5}, "energy: expected less than or equal to 1"),
        ({"macs_ratio": 0}, "macs_ratio: expected greater than 0"),
        ({"energy": 0.9, "macs_ratio": 0.5}, "one of energy or macs_ratio, found both"),
        ({"methods": ["qr"]}, "'svd', 'spatial', 'tucker' or 'cp'"),
        ({"methods": []}, "methods: expected at least 1"),
        ({"align": 0}, "align: expected greater than or equal to 1"),
        ({"cost": "m4"}, "'macs', 'cortex-a76' or 'cortex-a72'"),
        ({"rank": 8}, "unknown key 'rank'"),
    ],
)
def test_wrong_settings(change: dict[str, Any], words: str, base: Path) -> None:
    with pytest.raises(RecipeError, match="steps") as caught:
        recipe(base, [{"kind": "factorise"} | change])
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)
