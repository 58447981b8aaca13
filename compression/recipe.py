"""A recipe says in one TOML file what to make small, with which photos, for which core, and how.

In place of steps a table ``[search]`` may say what to look for: see ``targets.Search``.

::

    version = 1
    out = "runs/small"          # like every path, relative to this file

    [model]
    name = "yolox_nano"         # or module = "package.module:function", or file = "any.onnx"
    weights = "yolox_nano.onnx" # .onnx, .safetensors or .pth

    [data]
    photos = ["photos"]         # folders; those with COCO boxes in instances.json are labelled
    eval = "labelled"           # optional: AP before and after is measured here

    [target]
    core = "cortex-a76"

    [[steps]]
    kind = "prune"
    macs_ratio = 0.6

    [[steps]]
    kind = "distill"
    photos = 20000

    [[steps]]
    kind = "quantize"

    [[steps]]
    kind = "verify"
"""

from __future__ import annotations

import difflib
import itertools
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final, Literal

from pydantic import BaseModel, Field, ValidationError, field_validator, model_validator

from ..models.errors import RecipeError
from ..models.spec import COLORS, RESIZES
from .settings import STEP_KINDS, DistillStep, PruneStep, Step, Strict, TermWeights
from .targets import Search, Side

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

RECIPE_VERSION: Final = 1
Core = Literal["cortex-a76", "cortex-a72", "x86-64"]


class ModelSource(Strict):
    """Where the detector comes from.

    Attributes:
        name: A network of ours (``edgesight.models.nets.build.NETS``); wants ``weights``.
        module: ``package.module:function`` that returns a torch detector.
        file: Any ONNX detector.
        weights: Weights for ``name`` or ``module``: ``.onnx``, ``.safetensors``, ``.pth``.
        head: Head kind where the file does not tell.
        classes: Class names, in the order of the network's scores.
        input_hw: Height and width the network was trained for, in pixels.
        color: Channel order, where the head's usual one is wrong.
        resize: How pictures are fitted, where the head's usual way is wrong.
    """

    name: str | None = None
    module: str | None = None
    file: Path | None = None
    weights: Path | None = None
    head: str | None = None
    classes: tuple[str, ...] | None = None
    input_hw: tuple[Side, Side] | None = None
    color: str | None = None
    resize: str | None = None

    @model_validator(mode="after")
    def _one_source(self) -> ModelSource:
        given = [k for k in ("name", "module", "file") if getattr(self, k) is not None]
        if len(given) != 1:
            message = f"one of name, module or file, found {' and '.join(given) or 'none'}"
            raise ValueError(message)
        if self.name is not None and self.weights is None:
            message = "weights beside name (edgesight fetch gets known ones), found none"
            raise ValueError(message)
        for key, known in (("color", COLORS), ("resize", RESIZES)):
            if getattr(self, key) not in (None, *known):
                message = f"{key} to be one of {', '.join(known)}, found {getattr(self, key)!r}"
                raise ValueError(message)
        return self


class Data(Strict):
    """Photos.

    Attributes:
        photos: Folders (or COCO files) to prune, distil and calibrate with.
        eval: Labelled folder for AP before and after; never trained on.
        input_hw: New input size of the detector in pixels; the model's own if missing.
        hold_out: Of ``photos``, those whose id (in a plain folder: number) is a multiple of this
            are not learned from. If missing: 10 without ``eval``, where they are what is measured
            on; none with it.
        step_photos: So many photos measure the model after each step; 0: none.
    """

    photos: tuple[Path, ...]
    eval: Path | None = None
    input_hw: tuple[Side, Side] | None = None
    hold_out: int | None = Field(None, ge=2)
    step_photos: int = Field(100, ge=0)

    @field_validator("photos", mode="before")
    @classmethod
    def _one_or_many(cls, value: Any) -> Any:
        return [value] if isinstance(value, str | Path) else value

    @field_validator("photos")
    @classmethod
    def _some(cls, value: tuple[Path, ...]) -> tuple[Path, ...]:
        if not value:
            message = "at least one folder, found none"
            raise ValueError(message)
        return value


class Target(Strict):
    """The processor core that the detector is for."""

    core: Core = "cortex-a76"


class Recipe(Strict):
    """A whole recipe; see the module's text for its TOML form. It has ``steps`` or ``search``.

    Without ``out``, results go to ``runs/NAME`` in the current folder, NAME being the recipe's.
    ``name`` is what the result calls itself on screens; without it, as the model it came from.
    """

    version: Literal[1]
    out: Path = Path("runs")
    name: str | None = Field(None, min_length=1, max_length=80)
    seed: int = Field(0, ge=0, lt=2**63)
    model: ModelSource | Literal["shipped"] = "shipped"
    data: Data
    target: Target = Target()
    steps: tuple[Step, ...] = ()
    search: Search | None = None

    @model_validator(mode="after")
    def _order(self) -> Recipe:
        if bool(self.steps) == (self.search is not None):
            found = "both; leave one out" if self.steps else "neither"
            message = f"steps: at least 1 step [[steps]], or a table [search], found {found}"
            raise ValueError(message)
        kinds = [step.kind for step in self.steps]
        for final in ("quantize", "half"):
            rest = kinds[kinds.index(final) + 1 :] if final in kinds else []
            late = [kind for kind in rest if kind != "verify"]
            if late:
                advice = "leave one out" if late[0] in ("quantize", "half") else "put it before"
                message = f"steps: only verify after {final}, found {late[0]}; {advice}"
                raise ValueError(message)
        rest = kinds[kinds.index("sparsify") :] if "sparsify" in kinds else []
        for filling in ("prune", "factorise"):  # they fit all weights anew
            if filling in rest:
                message = f"steps: {filling} before sparsify (it fills zeros), found it after"
                raise ValueError(message)
        budgets = [s.budget for s in self.steps if isinstance(s, PruneStep) and s.plan is None]
        for (unit, first), (next_unit, second) in itertools.pairwise(budgets):
            if unit == next_unit and second >= first:
                message = (
                    "steps: each prune to leave less than the one before it (its ratio counts "
                    f"from the original model), found {first} and then {second}"
                )
                raise ValueError(message)
        return self


def read_recipe(path: Path | str) -> Recipe:
    """Reads a recipe; its paths become absolute, counted from the recipe's folder.

    Raises:
        RecipeError: No such file, not TOML, an unknown key, or an impossible value.
    """
    path = Path(path)
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        message = f"{path}: expected a recipe, found: {error.strerror or error}; check the path"
        raise RecipeError(message) from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        is_model = path.suffix.lower() == ".onnx"
        advice = "a model goes with --quantize-only MODEL" if is_model else "correct the file"
        message = f"{path}: expected TOML, found: {error}; {advice}"
        raise RecipeError(message) from error
    return make_recipe(values, path.resolve().parent, str(path))


def make_recipe(values: Mapping[str, Any], base: Path, name: str = "recipe") -> Recipe:
    """Checks the content of a recipe.

    Args:
        values: As read from TOML.
        base: Folder that relative paths count from.
        name: To call it in messages.

    Raises:
        RecipeError: An unknown key or an impossible value.
    """
    values = {"out": str(Path.cwd() / "runs" / Path(name).stem)} | dict(values)
    try:
        recipe = Recipe.model_validate(values)
    except ValidationError as error:
        message = f"{name}: {_explain(error)}"
        raise RecipeError(message) from None
    data = recipe.data.model_copy(
        update={
            "photos": tuple(base / folder for folder in recipe.data.photos),
            "eval": None if recipe.data.eval is None else base / recipe.data.eval,
        }
    )
    model = recipe.model
    if isinstance(model, ModelSource):
        paths = {k: base / v for k in ("file", "weights") if (v := getattr(model, k)) is not None}
        model = model.model_copy(update=paths)
    steps = tuple(
        step.with_files(lambda file: base / file)
        if isinstance(step, DistillStep | PruneStep)
        else step
        for step in recipe.steps
    )
    changes = {"out": base / recipe.out, "data": data, "model": model, "steps": steps}
    return recipe.model_copy(update=changes)


def _explain(error: ValidationError) -> str:
    """Returns the first error as one line: where, what was expected, what was found."""
    errors = sorted(error.errors(), key=lambda e: e["type"] != "extra_forbidden")
    # The text alternative of [model] complains beside every mistake in its table.
    errors = [e for e in errors if "literal['shipped']" not in e["loc"]] or errors
    first = errors[0]
    where, found = _where(first["loc"]), repr(first["input"])[:60]
    kind, context = first["type"], first.get("ctx", {})
    if kind == "extra_forbidden":
        return _unknown_key(first["loc"])
    if kind == "missing":
        text = f"expected the key {where}, found none"
    elif kind == "union_tag_not_found":
        text = f"{where}: expected kind = one of {', '.join(STEP_KINDS)}, found none"
    elif kind == "union_tag_invalid":
        text = f"{where}: expected a step out of {', '.join(STEP_KINDS)}, found {context['tag']!r}"
        text += _nearest(str(context["tag"]), STEP_KINDS)
    elif kind == "value_error":
        text = f"{where}: expected {context['error']}" if where else f"expected {context['error']}"
        text = text.replace("expected steps: ", "steps: expected ")
    elif kind == "literal_error":
        text = f"{where}: expected {context['expected']}, found {found}"
    elif kind == "too_short":
        text = f"{where}: expected at least {context['min_length']}, found {found}"
    elif where == "model":
        text = f"model: expected a table [model] or the text 'shipped', found {found}"
    else:
        wanted = first["msg"].replace("Input should be ", "")
        text = f"{where}: expected {wanted[:1].lower() + wanted[1:]}, found {found}"
    return text + (f" (and {len(errors) - 1} more)" if len(errors) > 1 else "")


def _unknown_key(loc: Sequence[int | str]) -> str:
    table: type[BaseModel] = Recipe
    names: dict[str, type[BaseModel]] = {
        "model": ModelSource,
        "data": Data,
        "target": Target,
        "search": Search,
        "weights": TermWeights,
        **STEP_KINDS,
    }
    for part in loc[:-1]:
        table = names.get(str(part), table)
    key, owner = str(loc[-1]), _where(loc[:-1])
    place = f" in [{owner}]" if owner else ""
    hint = _nearest(key, table.model_fields)
    return f"unknown key {key!r}{place}; expected one of {', '.join(table.model_fields)}{hint}"


def _nearest(word: str, known: Mapping[str, Any]) -> str:
    near = difflib.get_close_matches(word, known, 1)
    return f"; did you mean {near[0]!r}?" if near else ""


def _where(loc: Sequence[int | str]) -> str:
    text = ""
    for position, part in enumerate(loc):
        if isinstance(part, int):
            text += f"[{part + 1}]"  # people count from one
        elif "ModelSource" in part or (position == 2 and part in STEP_KINDS):
            continue  # what pydantic adds for alternatives
        else:
            text += f".{part}" if text else part
    return text
