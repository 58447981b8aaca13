"""The pipeline: steps in order, stored, resumed to the same result, and never half done."""

from __future__ import annotations

import hashlib
import json
import os
import runpy
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from edgesight.compression import foreign as foreign_module
from edgesight.compression import pipeline as pipeline_module
from edgesight.compression.arrange import unknown_arrangement
from edgesight.compression.data import open_photos, photo_labels
from edgesight.compression.pipeline import RunResult, run_recipe, step_key
from edgesight.compression.recipe import Recipe, make_recipe
from edgesight.compression.source import Entered
from edgesight.compression.state import rows_kept
from edgesight.models.detections import Detections
from edgesight.models.detector import OnnxDetector
from edgesight.models.errors import DatasetError, RecipeError
from edgesight.models.files import sha256

HERE = Path(__file__).parent
ROOT = HERE.parent
tools: Any = runpy.run_path(str(HERE / "tiny_recipe.py"))
PRUNE, DISTILL = tools["PRUNE"], tools["DISTILL"]


@pytest.fixture(scope="module", autouse=True)
def tiny_net() -> Iterator[None]:
    """Lets recipes find ``tiny_net`` and computes with one thread, as the subprocesses do."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    module = ModuleType("tiny_net")
    vars(module).update(runpy.run_path(str(HERE / "tiny_net.py")))
    sys.modules["tiny_net"] = module
    yield
    del sys.modules["tiny_net"]
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with photos."""
    folder = tmp_path_factory.mktemp("recipe")
    tools["draw_photos"](folder / "photos")
    return folder


def recipe(base: Path, steps: list[dict[str, Any]] | None = None, **changes: Any) -> Recipe:
    return make_recipe(tools["tiny_recipe"](steps, **changes), base)


def run(wanted: Recipe, **options: Any) -> RunResult:
    return run_recipe(wanted, progress=False, say=lambda line: None, **options)


@pytest.fixture(scope="module")
def whole(base: Path) -> RunResult:
    """The whole recipe, once."""
    return run(recipe(base))


def test_every_step_did_its_work(whole: RunResult) -> None:
    original, prune, distill, quantize, verify = whole.rows
    assert prune.macs <= 0.6 * original.macs
    assert prune.parameters < original.parameters
    assert distill.macs == quantize.macs == prune.macs
    assert quantize.bytes < original.bytes
    for row in (original, prune, distill, quantize):
        assert row.score is not None
        assert row.score["value"] is not None
    assert verify.score is None
    found = OnnxDetector(whole.final)
    assert found.spec.input_hw == (64, 64)
    assert found.spec.classes == ("a", "b", "c")
    assert whole.verified is not None
    assert whole.verified["passed"]
    assert whole.verified["integer"]["quantized"]
    assert whole.verified["photos_from"] == "held out"
    assert whole.final.stat().st_size < whole.float_file.stat().st_size


def test_a_second_run_does_nothing_again(
    whole: RunResult, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*args: Any) -> Any:
        pytest.fail("a step was done again")

    monkeypatch.setattr(pipeline_module, "STEPS", dict.fromkeys(pipeline_module.STEPS, never))
    before = sha256(whole.final)
    again = run(recipe(base))
    assert all(row.resumed for row in again.rows[1:])
    assert [r.score for r in again.rows] == [r.score for r in whole.rows]
    assert sha256(again.final) == before


def test_a_damaged_store_is_made_again(base: Path) -> None:
    wanted = recipe(base, [PRUNE], out="damaged")
    first = run(wanted)
    (weights,) = (base / "damaged").rglob("weights.safetensors")
    good = weights.read_bytes()
    weights.write_bytes(good[:-8] + b"damaged!")
    again = run(wanted)
    assert not again.rows[1].resumed
    assert weights.read_bytes() == good
    assert sha256(again.final) == sha256(first.final)
    assert not run(wanted, restart=True).rows[1].resumed


def test_what_a_key_depends_on(base: Path) -> None:
    entered = Entered(torch.nn.Module(), spec_of_tiny(), "digest")  # type: ignore[arg-type]

    def key(wanted: Recipe, index: int = 1, train: str = "t", check: str = "c") -> str:
        return step_key(wanted, index, entered, train, check)

    same = key(recipe(base))
    assert key(recipe(base, [PRUNE, DISTILL, {"kind": "verify"}])) == same, "later steps"
    assert key(recipe(base, [PRUNE, DISTILL | {"save_s": 1.0}])) == same, "checkpoint interval"
    assert key(recipe(base, out="elsewhere", target={"core": "x86-64"})) == same
    assert key(recipe(base), check="other") == same
    different = [
        key(recipe(base), 0),
        key(recipe(base, [PRUNE | {"macs_ratio": 0.5}, DISTILL])),
        key(recipe(base, seed=1)),
        key(recipe(base), train="other"),
        key(recipe(base, data={"photos": "photos", "input_hw": [32, 32]})),
        step_key(recipe(base), 1, replace(entered, digest="other"), "t", "c"),
    ]
    assert len({same, *different}) == len(different) + 1
    quantize = key(recipe(base), 2)
    assert quantize != key(recipe(base, target={"core": "x86-64"}), 2)


def spec_of_tiny() -> Any:
    from edgesight.models.spec import ModelSpec

    return ModelSpec("yolox", (64, 64), ("a", "b", "c"))


@pytest.mark.parametrize("kill", [signal.SIGKILL, signal.SIGINT])
def test_killed_in_a_step_and_resumed_it_ends_with_the_same_model(
    base: Path, kill: signal.Signals
) -> None:
    steps = [PRUNE, DISTILL | {"photos": 240, "save_s": 0.0, "labels": "none"}]
    unbroken = run(recipe(base, steps, out="unbroken"))
    out = base / f"broken{kill}"
    out.mkdir()
    (out / "model.onnx").write_text("an earlier result")
    (out / "report.json").write_text("another")
    file = base / f"r{kill}.toml"
    values = tools["tiny_recipe"](steps, out=out.name)
    file.write_text(tools["as_toml"](values))
    package = base / f"p{kill}"
    package.mkdir()
    (package / "edgesight").symlink_to(ROOT)
    env = os.environ | {
        "PYTHONPATH": f"{package}{os.pathsep}{HERE}",
        "OMP_NUM_THREADS": "1",
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    with subprocess.Popen(
        [sys.executable, "-m", "edgesight", "compress", str(file), "--quiet"],
        env=env,
        cwd=base,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        end = time.monotonic() + 240
        while not list(out.rglob("checkpoint.pt")) and time.monotonic() < end:
            assert process.poll() is None, process.communicate()
            time.sleep(0.005)
        process.send_signal(kill)
        errors = process.communicate(timeout=120)[1]
    assert not list(out.glob("steps/2-distill-*/state.json")), "killed too late to say anything"
    assert list(out.glob("steps/2-distill-*/checkpoint.pt"))
    assert (out / "model.onnx").read_text() == "an earlier result"
    assert (out / "report.json").read_text() == "another"
    if kill == signal.SIGINT:
        assert process.returncode == 130
        assert f"go on with: edgesight compress {file}" in errors
        assert "Traceback" not in errors
    resumed = run(recipe(base, steps, out=out.name))
    assert resumed.rows[1].resumed, "the finished step is not done again"
    assert not resumed.rows[2].resumed
    assert not list(out.rglob("checkpoint.pt"))
    assert weights_of(resumed) == weights_of(unbroken)
    assert sha256(resumed.final) == sha256(unbroken.final)


def weights_of(result: RunResult) -> str:
    (path,) = result.final.parent.glob("steps/2-distill-*/weights.safetensors")
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_the_ratio_counts_from_the_original_at_its_own_size(base: Path) -> None:
    data = {"photos": "photos", "input_hw": [32, 32], "step_photos": 0}
    small = run(recipe(base, [PRUNE | {"macs_ratio": 0.3}], out="small", data=data))
    assert small.rows[1].macs == pytest.approx(small.rows[0].macs / 4, rel=0.05)
    assert small.rows[1].parameters == small.rows[0].parameters
    report = small.rows[1].report
    assert report is not None
    assert "nothing to cut" in report.notes[0]
    assert OnnxDetector(small.final).spec.input_hw == (32, 32)
    both = run(recipe(base, [PRUNE | {"macs_ratio": 0.2}], out="both", data=data))
    assert both.rows[1].macs <= 0.2 * both.rows[0].macs
    assert both.rows[1].parameters < both.rows[0].parameters


def test_a_target_out_of_reach(base: Path) -> None:
    with pytest.raises(RecipeError, match=r"macs_ratio: 0\.01 of the original.*raise it"):
        run(recipe(base, [PRUNE | {"macs_ratio": 0.01}], out="far"))
    assert not list((base / "far").rglob("state.json"))


def test_rows_kept_count_in_the_uncut_network() -> None:
    dense = torch.nn.Sequential()
    dense.add_module("a", torch.nn.Conv2d(3, 6, 1))
    edits = [
        {"kind": "cut", "removed": {"a": [1, 4]}},  # left: 0 2 3 5
        {"kind": "cut", "removed": {"a": [0, 2]}},  # left: 2 5
    ]
    assert rows_kept(dense, edits)["a"].tolist() == [2, 5]
    assert rows_kept(dense, []) == {}


def test_photos_to_measure_on_are_not_learned_from(base: Path) -> None:
    found = open_photos([base / "photos"], None, 4)
    assert len(found.train_paths) == 18
    assert {p.image_id % 4 for p in found.check.photos} == {0}
    assert not {p.path for p in found.check.photos} & set(found.train_paths)
    few = tools["draw_photos"](base / "few", 5)
    assert open_photos([few]).check_kind == "same photos"
    assert len(open_photos([few]).train_paths) == 5


def test_eval_photos_among_the_others_are_refused(tiny_coco: Any, base: Path) -> None:
    folder = tiny_coco()
    with pytest.raises(DatasetError, match="in both photos and eval"):
        open_photos([folder], folder)
    with pytest.raises(DatasetError, match="expected photos with boxes"):
        open_photos([folder], base / "photos")
    found = open_photos([base / "photos"], folder)
    assert found.check_kind == "eval"
    assert len(found.train_paths) == 24, "with eval none need be held out"


def test_the_result_can_have_a_name_of_its_own(base: Path, whole: RunResult) -> None:
    before = whole.final.read_bytes()
    named = run(recipe(base, name="gate camera"))
    assert all(row.resumed for row in named.rows[1:])
    for path in (named.final, named.float_file):
        assert OnnxDetector(path).spec.name == "gate camera"
    again = run(recipe(base))
    assert again.final.read_bytes() == before
    assert OnnxDetector(again.final).spec.name == "tiny"


def test_another_size_for_a_file_with_a_fixed_tail_is_refused_at_once(base: Path) -> None:
    kit = runpy.run_path(str(HERE / "prune_kit.py"))
    kit["write_onnx"](base / "foreign.onnx")
    data = {"photos": "photos", "input_hw": [96, 96], "step_photos": 0}
    wanted = recipe(base, [PRUNE], model={"file": "foreign.onnx"}, data=data, out="foreign")
    with pytest.raises(RecipeError, match="the size that is fixed in the tail"):
        run(wanted)


def test_labels_that_cannot_be_used_are_a_note(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kit = runpy.run_path(str(HERE / "prune_kit.py"))
    kit["write_onnx"](base / "unclear.onnx")
    unclear = lambda tail, shapes, spec, softmax: unknown_arrangement(len(shapes))  # noqa: E731
    monkeypatch.setattr(foreign_module, "arrange", unclear)
    data = {"photos": "photos", "step_photos": 0}
    wanted = recipe(base, [DISTILL], model={"file": "unclear.onnx"}, data=data, out="unclear")
    report = run(wanted).rows[1].report
    assert report is not None
    assert "labels not used" in report.notes[0]
    assert report.figures["photos_labelled"] == 0


class Finder:
    """A detector that finds one box of its class 1 everywhere."""

    spec: Any = None

    def __call__(self, image: Any, score_min: float = 0.0, limit: int = 100) -> Detections:
        return Detections(np.array([[1, 2, 30, 40]]), np.array([0.5]), np.array([1]))


def test_boxes_are_peoples_where_there_are_any_in_the_models_numbers(
    tiny_coco: Any, base: Path
) -> None:
    labelled = open_photos([tiny_coco()]).train[0]
    plain = open_photos([tools["draw_photos"](base / "plain", 5)]).train[0]
    photos = replace(open_photos([base / "photos"]), train=(labelled, plain))
    classes = ("cat", "motorcycle", "person")  # the data's are person, motorbike
    found = photo_labels(photos, classes, Finder(), progress=False)
    assert len(found) == len(photos.train_paths)
    assert found[0].label.tolist() == [2, 1]
    assert found[0].weight.tolist() == [1, 1]
    assert found[-1].label.tolist() == [1]
    assert found[-1].weight.tolist() == [0.5]


def test_the_uncut_network_is_asked_for_classes_that_nobody_labelled(
    tiny_coco: Any, base: Path
) -> None:
    photos = open_photos([tiny_coco()])
    classes = ("person", "dog", "motorcycle")  # the data know no dog; Finder sees one everywhere
    found = photo_labels(photos, classes, Finder(), progress=False)
    assert found[0].label.tolist() == [0, 2, 1]
    assert found[0].weight.tolist() == [1, 1, 0.5]


def test_a_folder_that_cannot_be_parted_is_not_called_held_out(base: Path) -> None:
    folder = base / "multiples"
    names = sorted(p.name for p in tools["draw_photos"](folder / "images").iterdir())
    images = [
        {"id": 10 * (i + 1), "file_name": name, "width": 96, "height": 72}
        for i, name in enumerate(names)
    ]
    box = {"id": 1, "image_id": 10, "category_id": 1, "bbox": [1, 1, 20, 20], "area": 400}
    kinds = [{"id": 1, "name": "person"}]
    content = {"images": images, "annotations": [box | {"iscrowd": 0}], "categories": kinds}
    (folder / "instances.json").write_text(json.dumps(content))
    found = open_photos([folder])  # every tenth is held out: here all, so none
    assert len(found.train_paths) == len(found.check) == 24
    assert found.check_kind == "same photos"
    both = open_photos([base / "photos", folder])
    assert both.check_kind == "held out"
    assert not {p.path for p in both.check.photos} & set(both.train_paths)


def test_stored_steps_hold_no_pickles_and_no_folders_of_this_machine(whole: RunResult) -> None:
    folder = whole.final.parent
    names = {p.suffix for p in folder.rglob("*") if p.is_file()}
    assert names <= {".json", ".safetensors", ".onnx"}
    for path in folder.rglob("*.json"):
        assert str(folder) not in path.read_text()
        json.loads(path.read_text())
