"""Recipes: what is read, and what is refused in one clear line."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from edgesight.compression import recipe as recipe_module
from edgesight.compression.recipe import ModelSource, make_recipe, read_recipe
from edgesight.compression.settings import STEP_KINDS, PruneStep
from edgesight.compression.steps import STEPS
from edgesight.compression.train import TrainConfig
from edgesight.models.errors import RecipeError

GOOD: dict[str, Any] = {
    "version": 1,
    "out": "runs/x",
    "model": {"name": "yolox_nano", "weights": "w.onnx"},
    "data": {"photos": "photos"},
    "steps": [{"kind": "prune", "macs_ratio": 0.5}, {"kind": "quantize"}, {"kind": "verify"}],
}


def changed(change: Callable[[dict[str, Any]], object]) -> dict[str, Any]:
    values = copy.deepcopy(GOOD)
    change(values)
    return values


def test_paths_count_from_the_recipes_folder(tmp_path: Path) -> None:
    file = tmp_path / "sub" / "r.toml"
    file.parent.mkdir()
    file.write_text(
        'version = 1\nout = "o"\n[model]\nname = "yolox_nano"\nweights = "../w.onnx"\n'
        '[data]\nphotos = ["a", "/b"]\neval = "c"\n[[steps]]\nkind = "prune"\n'
    )
    recipe = read_recipe(file)
    base = file.parent.resolve()
    assert recipe.out == base / "o"
    assert recipe.data.photos == (base / "a", Path("/b"))
    assert recipe.data.eval == base / "c"
    assert isinstance(recipe.model, ModelSource)
    assert recipe.model.weights == base / "../w.onnx"
    assert recipe.target.core == "cortex-a76"


def test_one_folder_need_not_be_a_list_and_the_default_model_is_the_shipped_one() -> None:
    recipe = make_recipe(changed(lambda r: r.pop("model")), Path("/r"))
    assert recipe.model == "shipped"
    assert recipe.data.photos == (Path("/r/photos"),)
    assert isinstance(recipe.steps[0], PruneStep)


def test_the_example_in_the_text_is_a_recipe(tmp_path: Path) -> None:
    text = (recipe_module.__doc__ or "").split("::\n", 1)[1]
    file = tmp_path / "r.toml"
    file.write_text("\n".join(line[4:] for line in text.splitlines()))
    assert [s.kind for s in read_recipe(file).steps] == ["prune", "distill", "quantize", "verify"]


def test_the_shipped_detectors_recipe_is_one() -> None:
    file = Path(recipe_module.__file__).parent.parent / "models/zoo/edgesight_nano.toml"
    assert "quantize" in [s.kind for s in read_recipe(file).steps]


def test_every_kind_of_step_has_a_function() -> None:
    assert set(STEP_KINDS) == set(STEPS)


def test_the_default_rate_is_the_trainers() -> None:
    assert STEP_KINDS["distill"].model_fields["rate"].default == TrainConfig().rate


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            lambda r: r.update(sede=1),
            "unknown key 'sede'; expected one of version, out, name,",
        ),
        (lambda r: r.update(sede=1), "did you mean 'seed'?"),
        (lambda r: r["steps"][0].update(macs_ration=1), "'macs_ration' in [steps[1]]"),
        (lambda r: r["steps"][0].update(macs_ration=1), "did you mean 'macs_ratio'?"),
        (lambda r: r["model"].update(weight="x"), "'weight' in [model]"),
        (lambda r: r["data"].update(photo="x"), "did you mean 'photos'?"),
        (lambda r: r["steps"][0].update(macs_ratio=1.5), "steps[1].macs_ratio: expected less"),
        (lambda r: r["steps"][0].update(macs_ratio=0), "steps[1].macs_ratio: expected greater"),
        (lambda r: r["steps"][0].update(macs_ratio=float("nan")), "found nan"),
        (lambda r: r["steps"][0].update(kind="prun"), "did you mean 'prune'?"),
        (lambda r: r["steps"][0].pop("kind"), "expected kind = one of prune, "),
        (lambda r: r.pop("version"), "expected the key version, found none"),
        (lambda r: r.update(version=2), "version: expected 1, found 2"),
        (lambda r: r.update(steps=[]), "steps: expected at least 1"),
        (lambda r: r.update(target={"core": "m4"}), "'cortex-a76', 'cortex-a72' or 'x86-64'"),
        (lambda r: r["steps"].insert(0, {"kind": "quantize"}), "only verify after quantize"),
        (
            lambda r: r["steps"].insert(1, {"kind": "prune", "macs_ratio": 0.5}),
            "found 0.5 and then 0.5",
        ),
        (lambda r: r["data"].update(photos=[]), "data.photos: expected at least one folder"),
        (lambda r: r["data"].update(input_hw=[300, 320]), "expected a multiple of 32"),
        (lambda r: r.update(model="shiped"), "model: expected a table [model] or"),
        (lambda r: r["model"].pop("weights"), "expected weights beside name"),
        (lambda r: r["model"].update(file="x"), "found name and file"),
        (lambda r: r["model"].update(color="cmyk"), "bgr, rgb, found 'cmyk'"),
        (lambda r: r.update(seed=2**64), "seed: expected"),
    ],
)
def test_refused_in_one_line(change: Callable[[dict[str, Any]], object], words: str) -> None:
    with pytest.raises(RecipeError) as caught:
        make_recipe(changed(change), Path("/r"), "r.toml")
    message = str(caught.value)
    assert words in message
    assert message.startswith("r.toml: ")
    assert "\n" not in message
    assert "function-" not in message


@pytest.mark.parametrize(
    "content", [b"version = \n", b"\xff\xfe\x00", b"x = " + b"[" * 20000, None]
)
def test_no_toml(content: bytes | None, tmp_path: Path) -> None:
    file = tmp_path / "r.toml"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(RecipeError, match=r"r\.toml: expected"):
        read_recipe(file)
