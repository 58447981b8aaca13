"""The step in a recipe: whom it learns from, and what is said of teachers that do not fit."""

from __future__ import annotations

import runpy
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from edgesight.compression.command import _shown
from edgesight.compression.export import export_detector
from edgesight.compression.pipeline import RunResult, run_recipe
from edgesight.compression.recipe import make_recipe
from edgesight.models.errors import EdgeSightError, RecipeError
from edgesight.models.spec import ModelSpec

HERE = Path(__file__).parent
kit: Any = SimpleNamespace(**runpy.run_path(str(HERE / "tiny_recipe.py")))
tiny: Any = SimpleNamespace(**runpy.run_path(str(HERE / "tiny_net.py")))
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.syspath_prepend(HERE)
    kit.draw_photos(tmp_path / "photos", 8)
    return tmp_path


def other(path: Path, classes: tuple[str, ...] = ("c", "b"), seed: int = 3) -> Path:
    """A teacher of another input size with other classes, the second of which is ours."""
    torch.manual_seed(seed)
    spec = ModelSpec("yolox", (96, 96), classes, resize="stretch")
    export_detector(tiny.make(len(classes)), spec, path)
    return path


def run(folder: Path, **step: Any) -> RunResult:
    values = kit.tiny_recipe(
        [{"kind": "distill", "photos": 8, "batch": 4, **step}],
        data={"photos": "photos", "step_photos": 0},
    )
    return run_recipe(make_recipe(values, folder), progress=False, say=lambda line: None)


def report(result: RunResult) -> Any:
    found = result.rows[-1].report
    assert found is not None
    return found


def test_from_a_file_and_from_itself(folder: Path) -> None:
    other(folder / "other.onnx")
    said = report(run(folder, teacher=["self", "other.onnx"], mosaic=0.5, temperature=2))
    assert said.figures["teachers"] == ["self", "other.onnx"]
    assert said.notes == ("teacher other.onnx: 1 of the detector's classes it does not know",)


def test_a_file_whose_cells_cannot_be_read_teaches_by_its_boxes(
    folder: Path, tiny_onnx: Any
) -> None:
    spec = ModelSpec("yolox", (32, 32), tuple("abc"))
    file = tiny_onnx(spec=spec, name="table.onnx")
    result = run(folder, teacher=str(file), labels="none", rate=0.1)
    (note,) = report(result).notes
    assert note.startswith("teacher table.onnx: only the boxes that it finds are learned from")
    before = dict(result.state.teacher.named_parameters())
    moved = [not torch.equal(p, before[n]) for n, p in result.state.net.named_parameters()]
    assert any(moved)


def test_from_itself_at_a_larger_size(folder: Path) -> None:
    results = [run(folder, teacher_hw=hw, labels="none") for hw in ([96, 128], [64, 64])]
    same = run(folder, labels="none")
    assert report(results[0]).figures["teachers"] == ["self", "self at 96x128"]
    assert report(results[1]).figures["teachers"] == ["self"]
    nets = [list(r.state.net.parameters()) for r in (*results, same)]
    assert not all(torch.equal(a, b) for a, b in zip(nets[0], nets[2], strict=True))
    assert all(torch.equal(a, b) for a, b in zip(nets[1], nets[2], strict=True)), "its own size"


@pytest.mark.parametrize(
    ("step", "words"),
    [
        ({"teacher": "none.onnx"}, "none.onnx: expected an ONNX model, found no such file"),
        ({"teacher": "photos"}, "photos: expected an ONNX model"),
        ({"teacher": ["self", "strange.onnx"]}, "strange.onnx and the detector share no class"),
    ],
)
def test_a_teacher_that_does_not_fit_is_named_before_anything_is_done(
    step: dict[str, Any], words: str, folder: Path
) -> None:
    other(folder / "strange.onnx", ("zebra", "violin"))
    with pytest.raises(EdgeSightError, match=words) as caught:
        run(folder, **step)
    assert "\n" not in str(caught.value)
    assert not (folder / "out").exists()


@pytest.mark.parametrize(
    ("step", "words"),
    [
        ({"teacher": []}, "teacher: expected at least 1"),
        ({"teacher": ["self", "self"]}, "expected each teacher once"),
        ({"teacher": "a.onnx", "teacher_hw": [64, 64]}, "expected teacher_hw with teacher"),
        ({"teacher_hw": [60, 64]}, "expected a multiple of 32"),
        ({"temperature": 0}, "steps[1].temperature: expected greater"),
        ({"mosaic": 1.5}, "steps[1].mosaic: expected less"),
        ({"weights": {"feature": 0}}, "did you mean 'features'?"),
        ({"device": "tpu"}, "'auto', 'cpu' or 'cuda'"),
    ],
)
def test_refused_in_one_line(step: dict[str, Any], words: str) -> None:
    with pytest.raises(RecipeError) as caught:
        make_recipe(kit.tiny_recipe([{"kind": "distill", **step}]), Path("/r"), "r.toml")
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_term_can_be_switched_off(folder: Path) -> None:
    """Without any weight on what teachers say, nothing is learned."""
    nothing = dict.fromkeys(("scores", "boxes", "features", "labels", "found"), 0)
    result = run(folder, weights=nothing)
    before = dict(result.state.teacher.named_parameters())
    for name, value in result.state.net.named_parameters():
        np.testing.assert_allclose(value.detach(), before[name].detach(), atol=1e-6)


def test_a_teacher_is_told_by_what_its_file_holds(folder: Path) -> None:
    file = other(folder / "other.onnx")
    first = run(folder, teacher=str(file))
    assert not first.rows[-1].resumed
    moved = Path(shutil.move(file, folder / "moved.onnx"))
    assert run(folder, teacher=str(moved)).rows[-1].resumed
    other(moved, seed=4)
    assert not run(folder, teacher=str(moved)).rows[-1].resumed


def test_reports_name_teachers_without_their_folders() -> None:
    steps = [{"kind": "distill", "teacher": ["self", "/secret/place/big.onnx"]}]
    shown = _shown(make_recipe(kit.tiny_recipe(steps), Path("/r")))
    assert shown["steps"][0]["teacher"] == ["self", "big.onnx"]
    assert "secret" not in str(shown)
