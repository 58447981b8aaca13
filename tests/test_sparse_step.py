"""The step ``sparsify`` in recipes, on the tiny and on the shipped detector."""

from __future__ import annotations

import copy
import json
import runpy
import shutil
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from edgesight.compression import lowbit, lowbit_train, source
from edgesight.compression.compensate import refit_to_original
from edgesight.compression.photos import calibration_batches
from edgesight.compression.pipeline import RunResult, run_recipe
from edgesight.compression.recipe import ModelSource, Recipe, make_recipe
from edgesight.compression.sparse import masks_of, weights_of, zero_count
from edgesight.models.detector import OnnxDetector
from edgesight.models.errors import RecipeError
from edgesight.models.files import sha256
from onnx import numpy_helper

HERE = Path(__file__).parent
tools: Any = runpy.run_path(str(HERE / "tiny_recipe.py"))
SPARSIFY = {"kind": "sparsify", "photos": 6}
QUANTIZE = {"kind": "quantize", "photos": 6, "refine": 160}
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module", autouse=True)
def tiny_net() -> Iterator[None]:
    """Lets recipes find ``tiny_net``."""
    module = ModuleType("tiny_net")
    vars(module).update(runpy.run_path(str(HERE / "tiny_net.py")))
    sys.modules["tiny_net"] = module
    yield
    del sys.modules["tiny_net"]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with photos."""
    folder = tmp_path_factory.mktemp("sparse")
    tools["draw_photos"](folder / "photos", 12)
    return folder


def recipe(base: Path, steps: list[dict[str, Any]], **changes: Any) -> Recipe:
    changes = {"data": {"photos": "photos", "step_photos": 0}} | changes
    return make_recipe(tools["tiny_recipe"](steps, **changes), base)


def run(wanted: Recipe) -> RunResult:
    return run_recipe(wanted, progress=False, say=lambda line: None)


def figures(result: RunResult, row: int = 1) -> dict[str, Any]:
    report = result.rows[row].report
    assert report is not None
    return report.figures


def conv_weights(path: Path) -> list[Any]:
    """Stored weights of the convolutions of a float or INT8 file, in the graph's order."""
    graph = onnx.load(path).graph
    stored = {t.name: t for t in graph.initializer}
    codes = {n.output[0]: n.input[0] for n in graph.node if n.op_type == "DequantizeLinear"}
    names = [n.input[1] for n in graph.node if n.op_type == "Conv"]
    return [numpy_helper.to_array(stored[codes.get(name, name)]) for name in names]


def unpacked_weights(path: Path) -> list[Any]:
    """Weights of a file's convolutions as the runtime has them, whatever they are stored as."""
    model = onnx.load(path)
    names = [n.input[1] for n in model.graph.node if n.op_type == "Conv"]
    given = {output.name for output in model.graph.output}
    model.graph.output.extend(
        onnx.helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, None)
        for n in names
        if n not in given
    )
    runner = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    kinds = {"tensor(float)": np.float32, "tensor(uint8)": np.uint8}
    feeds = {i.name: np.zeros(i.shape, kinds[i.type]) for i in runner.get_inputs()}
    found: list[Any] = runner.run(names, feeds)
    return found


@pytest.mark.parametrize(
    ("settings", "density"),
    [
        ({}, 0.5),
        ({"method": "magnitude", "scope": "layer"}, 0.5),
        ({"method": "magnitude", "scope": "global", "sparsity": 0.7, "refit": False}, 0.3),
        ({"method": "gradient", "scope": "global", "sparsity": 0.3}, 0.7),
        ({"method": "taylor", "scope": "global", "sparsity": 0.6, "rounds": 3}, 0.4),
        ({"method": "magnitude", "scope": "layer", "sparsity": 0.0}, 1.0),
    ],
)
def test_the_density_is_what_was_asked_for(
    base: Path, settings: dict[str, Any], density: float
) -> None:
    result = run(recipe(base, [SPARSIFY | settings], out=f"d{hash(str(settings))}"))
    found = figures(result)
    assert found["density"] == pytest.approx(density, abs=0.001)
    assert found["zeros_after"] == zero_count(result.state.net)
    assert result.rows[1].macs == result.rows[0].macs, "zeros save no work"
    assert len(found["density_by_round"]) == settings.get("rounds", 1)
    assert (np.diff([1.0, *found["density_by_round"]]) <= 0).all()
    per_layer = found["density_by_layer"]
    assert per_layer.keys() == weights_of(result.state.net).keys()
    same = max(per_layer.values()) - min(per_layer.values()) < 0.02  # 14 of 27, 16 of 32
    assert same == (settings.get("scope") != "global")
    stored = sum(int((w == 0).sum()) for w in conv_weights(result.final))
    assert stored == found["zeros_after"], "the file holds them"


def test_a_threshold_goes_by_size_alone(base: Path) -> None:
    threshold = {"method": "threshold", "threshold": 0.5, "refit": False}
    net = run(recipe(base, [SPARSIFY | threshold], out="relative")).state.net
    kept = {n: float((w != 0).float().mean()) for n, w in weights_of(net).items()}
    assert all(0.2 < part < 0.9 for part in kept.values()), kept
    absolute = threshold | {"threshold": 0.02, "relative": False}
    net = run(recipe(base, [SPARSIFY | absolute], out="absolute")).state.net
    for weight in weights_of(net).values():
        part = weight.detach().flatten().abs()
        assert float(part[part > 0].min()) >= 0.02 or int((part > 0).sum()) <= len(part) * 0.03


@pytest.fixture(scope="module")
def to_int8(base: Path) -> RunResult:
    """Two of four, then to integers, which are trained."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    result = run(recipe(base, [SPARSIFY | {"pattern": "2:4"}, QUANTIZE], out="int8"))
    torch.set_num_threads(threads)
    return result


def test_two_of_four_survives_export_and_quantization(to_int8: RunResult) -> None:
    floats, codes = conv_weights(to_int8.float_file), conv_weights(to_int8.final)
    assert {w.dtype for w in floats} == {np.dtype(np.float32)}
    assert np.dtype(np.int8) in {c.dtype for c in codes}
    for code in codes:  # the order of the nodes changes on the way
        alike = [w for w in floats if w.shape == code.shape]
        fits = [w for w in alike if not code[w == 0].any()]
        assert len(fits) == 1 or code.shape[1] % 4, "a zero of the float file is code 0"
    patterned = 0
    for weight in floats:
        if weight.shape[1] % 4 == 0:
            groups = np.moveaxis(weight, 1, -1).reshape(-1, 4)
            assert ((groups != 0).sum(1) <= 2).all()
            assert (weight == 0).mean() == pytest.approx(0.5, abs=0.01)
            patterned += 1
        else:
            assert (weight != 0).all(), "the three colours are no group of four"
    assert patterned == 6
    assert len(OnnxDetector(to_int8.final).spec.classes) == 3


def test_the_report_says_what_zeros_win_and_what_not(to_int8: RunResult) -> None:
    report = to_int8.rows[1].report
    assert report is not None
    text = " ".join(report.notes)
    assert "zeros do not make a dense runtime faster" in text
    assert "2:4 is what the sparse tensor cores" in text
    assert "left dense: 1 of 7 layers (too few input channels)" in text
    before, after = (report.figures["bytes"][k] for k in ("before", "after"))
    assert after["float"] == pytest.approx(before["float"], rel=0.02), "as it lies: no smaller"
    assert after["float_deflated"] < 0.75 * before["float_deflated"]
    assert after["int8_weights"] == before["int8_weights"] == report.figures["weights"]
    assert after["int8_weights_deflated"] < 0.75 * before["int8_weights_deflated"]
    assert json.loads(json.dumps(report.figures)) == report.figures


def test_a_sparse_step_after_another_goes_on_from_its_zeros(base: Path) -> None:
    steps = [
        SPARSIFY | {"sparsity": 0.4},
        SPARSIFY | {"method": "gradient", "scope": "global", "sparsity": 0.7},
        SPARSIFY | {"sparsity": 0.2},
    ]
    first = run(recipe(base, steps[:1], out="more"))
    both = run(recipe(base, steps, out="more"))
    for name, weight in weights_of(both.state.net).items():
        assert not weight[weights_of(first.state.net)[name] == 0].any()
    assert [r.report.figures["density"] for r in both.rows[1:] if r.report] == pytest.approx(
        [0.6, 0.3, 0.3], abs=0.001
    )
    last = both.rows[3].report
    assert last is not None
    assert "nothing became zero" in last.notes[0]


def test_zeros_stay_while_the_others_learn(base: Path) -> None:
    steps = [SPARSIFY, tools["DISTILL"] | {"photos": 48, "labels": "none"}]
    sparse = run(recipe(base, steps[:1], out="learned")).state.net
    learned = run(recipe(base, steps, out="learned")).state.net
    for name, weight in weights_of(learned).items():
        before = weights_of(sparse)[name]
        assert ((weight == 0) == (before == 0)).all(), name
        assert (weight != before).any(), name


def test_zeros_stay_while_other_activations_are_made_up_for(base: Path) -> None:
    steps = [SPARSIFY, {"kind": "activations", "photos": 6}]
    sparse = run(recipe(base, steps[:1], out="swapped")).state.net
    swapped = run(recipe(base, steps, out="swapped")).state.net
    for name, weight in weights_of(swapped).items():
        before = weights_of(sparse)[name]
        assert not weight[before == 0].any(), name
    assert any((weights_of(swapped)[n] != w).any() for n, w in weights_of(sparse).items())


def test_a_refit_keeps_the_zeros_that_the_network_came_in_with(base: Path) -> None:
    state = copy.deepcopy(run(recipe(base, [SPARSIFY], out="came")).state)
    came = replace(state, base_edits=state.edits, edits=())
    before = {name: weight.clone() for name, weight in weights_of(state.net).items()}
    batches = calibration_batches(state.job.photos.train_paths, state.spec, 6)
    refit_to_original(came, batches)
    for name, weight in weights_of(came.net).items():
        assert not weight[before[name] == 0].any(), name
    assert any((weights_of(came.net)[name] != weight).any() for name, weight in before.items())


@pytest.mark.parametrize("passes", [0, 48])
def test_zeros_stay_in_weights_of_few_bits_and_while_they_are_trained(
    base: Path, monkeypatch: pytest.MonkeyPatch, passes: int
) -> None:
    monkeypatch.setattr(lowbit, "CODES_MIN", 16)  # the tiny network has no larger layers
    monkeypatch.setattr(lowbit_train, "RATE", 0.1)  # in a few steps: nearer or not, it is looked at
    monkeypatch.setattr(
        lowbit_train, "kept_if_nearer", lambda *given: (given[5](), {"photos": given[4]}, ())
    )
    few = {"kind": "quantize", "photos": 6, "weights": 3, "refine": passes}
    result = run(recipe(base, [SPARSIFY | {"pattern": "2:4"}, few], out=f"few{passes}"))
    report = figures(result, 2)["few bits"]
    assert set(report["bits"].values()) == {3}
    assert report.get("refined", {}).get("photos", 0) == passes
    floats, rounded = conv_weights(result.float_file), unpacked_weights(result.final)
    sparse = [w for w in floats if (w == 0).mean() > 0.4]
    assert len(sparse) > 3
    for weight in sparse:  # the order of the nodes changes on the way
        alike = [r for r in rounded if r.shape == weight.shape]
        assert any(not r[weight == 0].any() for r in alike), weight.shape


def test_any_onnx_file_can_be_made_sparse(base: Path) -> None:
    kit: Any = runpy.run_path(str(HERE / "prune_kit.py"))
    kit["write_onnx"](base / "foreign.onnx")
    wanted = recipe(base, [SPARSIFY], model={"file": "foreign.onnx"}, out="foreign")
    result = run(wanted)
    stored = sum(int((w == 0).sum()) for w in conv_weights(result.final))
    assert stored == figures(result)["zeros_after"] >= 0.49 * figures(result)["weights"]
    assert run(wanted).rows[1].resumed


def test_a_broken_off_run_ends_with_the_same_file(base: Path) -> None:
    steps = [SPARSIFY | {"rounds": 2}, SPARSIFY | {"sparsity": 0.8}]
    unbroken = run(recipe(base, steps, out="unbroken"))
    again = run(recipe(base, steps, out="unbroken"))
    assert all(row.resumed for row in again.rows[1:])
    assert masks_of(again.state.net) is not None, "a stored state knows that it is sparse"
    run(recipe(base, steps[:1], out="broken"))
    broken = run(recipe(base, steps, out="broken"))
    assert broken.rows[1].resumed
    assert not broken.rows[2].resumed
    assert sha256(broken.final) == sha256(unbroken.final) == sha256(again.final)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"pattern": "4:2"}, "N below M, as 2:4, found '4:2'"),
        ({"pattern": "half"}, "pattern"),
        ({"method": "threshold"}, "method = 'threshold' and a threshold together"),
        ({"threshold": 0.1}, "method = 'threshold' and a threshold together"),
        ({"method": "threshold", "threshold": 0.1, "pattern": "2:4"}, "a threshold or a pattern"),
        ({"sparsity": 1.0}, "less than 1"),
        ({"method": "random"}, "'magnitude', 'threshold', 'gradient' or 'taylor'"),
    ],
)
def test_settings_that_make_no_sense(base: Path, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        recipe(base, [SPARSIFY | settings])


def test_goals_out_of_reach_and_wrong_orders_are_one_line(base: Path) -> None:
    far = SPARSIFY | {"method": "magnitude", "scope": "global", "sparsity": 0.9, "keep_min": 0.5}
    with pytest.raises(
        RecipeError, match=r"sparsify: expected at most 0\.5\d* .* found 0\.9; lower"
    ):
        run(recipe(base, [far], out="far"))
    with pytest.raises(RecipeError, match="2:64 needs layers of 64 input channels"):
        run(recipe(base, [SPARSIFY | {"pattern": "2:64"}], out="far"))
    assert not list((base / "far").rglob("state.json"))
    for late in ("prune", "factorise"):
        with pytest.raises(RecipeError, match=f"{late} before sparsify"):
            recipe(base, [SPARSIFY, {"kind": late}])


def test_the_shipped_detector_comes_out_sparse_and_comes_in_again(tmp_path: Path) -> None:
    photos = tmp_path / "photos"
    photos.mkdir()
    for path in sorted((HERE.parent / "device_app/samples").glob("*.jpg")):
        shutil.copy(path, photos)
    steps = [SPARSIFY | {"sparsity": 0.3, "photos": 4}]
    data = {"photos": "photos", "step_photos": 5}
    wanted = recipe(tmp_path, steps, model="shipped", data=data)
    result = run(wanted)
    row = result.rows[1]
    assert 0.7 < figures(result)["density"] < 0.73, "depthwise layers stay dense"
    assert row.score is not None
    assert row.score["value"] > 50, "it still sees much of what the original sees"
    again = source.enter(ModelSource(file=result.float_file))
    masks = masks_of(again.net)
    assert masks is not None, "the file says that it is sparse"
    assert zero_count(again.net) == figures(result)["zeros_after"]
    resumed = run(wanted)
    assert resumed.rows[1].resumed
    assert sha256(resumed.final) == sha256(result.final)
