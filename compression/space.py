"""What a search may choose: which steps, in which order, how strong, and at which input size.

A step joins by one function, which turns choices into the step's settings, and one line of
``KNOBS``.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal, Protocol

from .settings import STEP_KINDS

SHARES: Final = (1 / 9, 1 / 3, 1.0)
"""Effort of a trial from rung to rung: parts of the longest training and of all photos.

A third of the trials goes on to the next rung (successive halving, arXiv 1810.05934).
"""
RATIO: Final = 3
PRUNE_PHOTOS: Final = 96
CALIBRATION_PHOTOS: Final = 320
CALIBRATION_MIN: Final = 24
BATCH: Final = 8
REFINE_PART: Final = 0.25
"""Photo passes of refining INT8, as a part of the longest training."""
NONE: Final = "none"
SMALLER: Final = (0.75, 0.5)
SIDE_STEP: Final = 32
SIDE_MIN: Final = 96
"""Input sizes below this are not proposed; a recipe may name them."""


class Pick(Protocol):
    """What chooses: an Optuna trial, running or finished."""

    def suggest_float(
        self, name: str, low: float, high: float, *, step: float | None = None, log: bool = False
    ) -> float:
        """Returns a number within limits."""

    def suggest_categorical(self, name: str, choices: Any) -> Any:
        """Returns one of some numbers or texts."""


@dataclass(frozen=True)
class Space:
    """What does not change from trial to trial.

    Attributes:
        kinds: Steps to combine, out of ``KNOBS``.
        sizes: Input heights and widths to choose from, in pixels.
        whole_hw: The original's.
        passes: Photo passes of the longest training.
        photos: To learn from.
        core: That the model is for.
        bytes_max: What the file may have, where that is a target.
    """

    kinds: tuple[str, ...]
    sizes: tuple[tuple[int, int], ...]
    whole_hw: tuple[int, int]
    passes: int
    photos: int
    core: str = "x86-64"
    bytes_max: int | None = None


@dataclass(frozen=True)
class Draw:
    """What a step's function knows.

    Attributes:
        pick: Chooses; every name begins with the kind of the step.
        space: The space.
        share: Effort of this rung, 0..1.
        area: Part of the original's input that is left.
    """

    pick: Pick
    space: Space
    share: float
    area: float

    def some(self, whole: float, least: int) -> int:
        """Returns a number that grows with the effort."""
        return max(least, round(whole * self.share))


Settings = dict[str, Any]


@dataclass(frozen=True)
class Knobs:
    """How a search handles one kind of step.

    Attributes:
        place: ``body``: in any order among its like; ``train``: after those; ``last``: one at most
            of its like, at the end.
        settings: Chooses the settings; the kind itself is added.
    """

    place: Literal["body", "train", "last"]
    settings: Callable[[Draw], Settings]


def _prune(draw: Draw) -> Settings:
    # Chosen is what is left of the channels, so that it means the same at every input size.
    left = draw.pick.suggest_float("prune.left", 0.25, 0.95, step=0.05)
    return {
        "macs_ratio": round(left * draw.area, 4),
        "align": draw.pick.suggest_categorical("prune.align", (8, 16)),
        "keep_min": round(min(0.25, left / 3), 3),
        "photos": PRUNE_PHOTOS,
    }


def _factorise(draw: Draw) -> Settings:
    return {
        "energy": draw.pick.suggest_float("factorise.energy", 0.85, 0.99, step=0.02),
        "cost": draw.space.core if draw.space.core.startswith("cortex") else "macs",
        "photos": PRUNE_PHOTOS,
    }


def _activations(draw: Draw) -> Settings:
    return {"to": draw.pick.suggest_categorical("activations.to", ("relu", "relu6"))}


def _distill(draw: Draw) -> Settings:
    length = draw.pick.suggest_categorical("distill.length", (0.5, 1.0))
    return {
        "photos": draw.some(length * draw.space.passes, BATCH),
        "batch": BATCH,
        "rate": round(draw.pick.suggest_float("distill.rate", 2e-4, 1.5e-3, log=True), 6),
    }


def _quantize(draw: Draw) -> Settings:
    refine = draw.pick.suggest_categorical("quantize.refine", (0.0, REFINE_PART))
    size: Settings = {}
    if draw.space.bytes_max is not None and draw.pick.suggest_categorical(
        "quantize.fit", (False, True)
    ):
        size = {"bytes_max": draw.space.bytes_max}  # with fewer bits where they harm least
    return size | {
        "photos": draw.some(min(CALIBRATION_PHOTOS, draw.space.photos), CALIBRATION_MIN),
        "integer_share_min": draw.pick.suggest_categorical("quantize.share", (0.8, 0.9, 0.98)),
        "refine": draw.some(refine * draw.space.passes, BATCH) if refine else 0,
    }


def _half(draw: Draw) -> Settings:
    return {}


KNOBS: Final[dict[str, Knobs]] = {
    "activations": Knobs("body", _activations),
    "factorise": Knobs("body", _factorise),
    "prune": Knobs("body", _prune),
    "distill": Knobs("train", _distill),
    "quantize": Knobs("last", _quantize),
    "half": Knobs("last", _half),
}
"""Kind of step -> how a search handles it. Zeros alone (``sparsify``) save no cost and no bytes."""
FIRST: Final[tuple[dict[str, Any], ...]] = (
    {"use": ("quantize",)},
    {"use": ("prune", "distill", "quantize"), "prune.left": 0.5, "prune.align": 16},
    {"use": ("prune", "distill"), "prune.left": 0.7, "prune.align": 16},
)
"""What is tried first: what people would try; anything not named is chosen as always."""


def known_kinds(wanted: Sequence[str] | None = None) -> tuple[str, ...]:
    """Returns the steps that a search can combine, of those wanted; all without ``wanted``."""
    return tuple(k for k in KNOBS if k in STEP_KINDS and (wanted is None or k in wanted))


def sizes_near(whole_hw: tuple[int, int]) -> tuple[tuple[int, int], ...]:
    """Returns an input size and smaller ones of about its shape."""
    found = [whole_hw]
    for scale in SMALLER:
        height, width = (SIDE_STEP * int(s * scale / SIDE_STEP + 0.5) for s in whole_hw)
        if (height, width) not in found and min(height, width) >= SIDE_MIN:
            found.append((height, width))
    return tuple(found)


def first_choices(space: Space) -> list[dict[str, Any]]:
    """Returns what is tried first, as values by name; only of steps that the space has."""
    found: list[dict[str, Any]] = []
    for seed in FIRST:
        used = [kind for kind in seed["use"] if kind in space.kinds]
        values: dict[str, Any] = {f"use.{kind}": kind in used for kind in space.kinds}
        last = _last_kinds(space)
        if len(last) > 1:
            values = {k: v for k, v in values.items() if k.removeprefix("use.") not in last}
            values["last"] = next((kind for kind in last if kind in used), NONE)
        values |= {k: v for k, v in seed.items() if k.partition(".")[0] in used}
        if len(space.sizes) > 1:
            values["input"] = size_text(space.whole_hw)
        if used and values not in found:
            found.append(values)
    return found


def _last_kinds(space: Space) -> tuple[str, ...]:
    return tuple(kind for kind in space.kinds if KNOBS[kind].place == "last")


def _used(pick: Pick, space: Space) -> list[str]:
    """Chooses which steps there are."""
    last = _last_kinds(space)
    single = last if len(last) > 1 else ()
    each = [kind for kind in space.kinds if kind not in single]
    used = [kind for kind in each if pick.suggest_categorical(f"use.{kind}", (True, False))]
    if single and (kind := pick.suggest_categorical("last", (*single, NONE))) != NONE:
        used.append(kind)
    return used


def draw_recipe(
    pick: Pick, space: Space, share: float
) -> tuple[tuple[int, int], tuple[dict[str, Any], ...]]:
    """Chooses a recipe.

    Called again with the same trial it gives the same recipe, with more effort if ``share`` is
    greater: longer training, more photos.

    Args:
        pick: An Optuna trial.
        space: What there is to choose from.
        share: Effort, 0..1.

    Returns:
        Input height and width in pixels, and the settings of each step in order; perhaps none.
    """
    hw = space.whole_hw
    if len(space.sizes) > 1:
        names = {size_text(size): size for size in space.sizes}
        hw = names[pick.suggest_categorical("input", tuple(names))]
    elif space.sizes:
        hw = space.sizes[0]
    area = hw[0] * hw[1] / (space.whole_hw[0] * space.whole_hw[1])
    draw = Draw(pick, space, share, area)
    used = _used(pick, space)
    chosen = {kind: {"kind": kind, **KNOBS[kind].settings(draw)} for kind in used}
    order = list(_body_order(pick, [k for k in used if KNOBS[k].place == "body"]))
    for place in ("train", "last"):
        order += [kind for kind in used if KNOBS[kind].place == place]
    return hw, tuple(chosen[kind] for kind in order)


def _body_order(pick: Pick, kinds: list[str]) -> Sequence[str]:
    if len(kinds) < 2:
        return kinds
    orders = {" ".join(order): order for order in itertools.permutations(kinds)}
    return orders[pick.suggest_categorical(f"order {' '.join(kinds)}", tuple(orders))]


def size_text(hw: tuple[int, int]) -> str:
    """Returns height and width as ``288x384``."""
    return f"{hw[0]}x{hw[1]}"


def recipe_text(hw: tuple[int, int], steps: Sequence[dict[str, Any]]) -> str:
    """Returns a recipe in a few words, for one line of a table."""
    shown = {"macs_ratio": "MACs", "photos": "photos", "refine": "refine"}
    parts = []
    for step in steps:
        told = [
            f"{text} {step[key]:g}"
            for key, text in shown.items()
            if step.get(key) and (key, step["kind"]) != ("photos", "prune")
        ]
        parts.append(f"{step['kind']} ({', '.join(told)})" if told else step["kind"])
    return f"{size_text(hw)}: {' > '.join(parts) or 'as it is'}"


def same_recipe(hw: tuple[int, int], steps: Sequence[dict[str, Any]]) -> str:
    """Returns a text that two recipes share if they are the same."""
    return json.dumps([list(hw), list(steps)], sort_keys=True)
