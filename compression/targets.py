"""Targets of a search: limits on cost, size and lost accuracy, and which model meets them best."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Final

from pydantic import BeforeValidator, Field, model_validator

from .settings import Strict
from .space import known_kinds

BYTE_UNITS: Final = {
    "": 1,
    "b": 1,
    "kb": 10**3,
    "mb": 10**6,
    "gb": 10**9,
    "kib": 2**10,
    "mib": 2**20,
    "gib": 2**30,
}
SECOND_UNITS: Final = {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86400}
POINTS_PER_WHOLE: Final = 10
"""So many points of accuracy too much are as bad as twice the cost that was asked for."""
SIDE_STEP: Final = 32


def parse_bytes(value: Any) -> Any:
    """Returns ``"1.5 MB"`` or ``"900kB"`` as bytes; what is no text stays as it is.

    Raises:
        ValueError: The text is no size.
    """
    if not isinstance(value, str):
        return value
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-z]*)\s*", value.lower())
    if found is None or found[2] not in BYTE_UNITS:
        message = f"a size such as '1 MB' or '900 kB', found {value!r}"
        raise ValueError(message)
    return round(float(found[1]) * BYTE_UNITS[found[2]])


def parse_seconds(text: str) -> float:
    """Returns ``30m``, ``90``, ``1h30m`` or ``45 s`` as seconds.

    Raises:
        ValueError: The text is no time, or none at all.
    """
    tidy = text.lower().replace(" ", "")
    parts = re.findall(r"(\d+(?:\.\d+)?)([smhd]?)", tidy)
    total = sum(float(number) * SECOND_UNITS[unit] for number, unit in parts)
    if "".join(map("".join, parts)) != tidy or not 0 < total < math.inf:
        message = f"a time such as '30m', '1h30m' or '90s', found {text!r}"
        raise ValueError(message)
    return total


Bytes = Annotated[int, BeforeValidator(parse_bytes), Field(ge=1)]
Side = Annotated[int, Field(ge=32, le=4096, multiple_of=SIDE_STEP)]


class Search(Strict):
    """The table ``[search]`` of a recipe: what to look for, and how long.

    ::

        [search]
        cost_max = 0.5
        ap_loss_max = 1.0
        budget_s = 1800

    With ``ap_loss_max`` the cheapest model within all limits is looked for, without it the most
    accurate one. Where no photo has boxes, agreement with the original stands for AP.

    Attributes:
        budget_s: Seconds, at most, over all runs of the same search; what has begun is ended.
        trials: Combinations tried, at most.
        cost_max: Part of the original's cost on ``target.core`` that may be left.
        bytes_max: Size of the file: a number, or text such as ``"1 MB"``.
        ap_loss_max: Points of AP (of agreement, without boxes) that may be lost.
        kinds: Steps to combine; all that a search knows if missing.
        input_hw: Input sizes to try; the model's own and two smaller ones if missing.
        passes: Photo passes of the longest training; from the budget if missing.
        tune_photos: Photos that models are compared on, at most.
        storage: Where the study is kept: an Optuna address such as ``mysql://user@host/name``, so
            that several machines work on one search; a file in ``out`` if missing.
        study: Its name there; from the content of the recipe if missing.
    """

    budget_s: float | None = Field(None, gt=0, allow_inf_nan=False)
    trials: int | None = Field(None, ge=1)
    cost_max: float | None = Field(None, gt=0, le=1)
    bytes_max: Bytes | None = None
    ap_loss_max: float | None = Field(None, ge=0, le=100)
    kinds: tuple[str, ...] | None = Field(None, min_length=1)
    input_hw: tuple[tuple[Side, Side], ...] | None = Field(None, min_length=1)
    passes: int | None = Field(None, ge=1)
    tune_photos: int = Field(300, ge=1)
    storage: str | None = Field(None, min_length=1)
    study: str | None = Field(None, min_length=1, max_length=200)

    @model_validator(mode="after")
    def _complete(self) -> Search:
        if self.budget_s is None and self.trials is None:
            message = "budget_s (seconds) or trials in [search], found neither"
            raise ValueError(message)
        if not self.limits:
            message = "one of cost_max, bytes_max, ap_loss_max in [search], found none"
            raise ValueError(message)
        known = known_kinds()
        wrong = [kind for kind in self.kinds or () if kind not in known]
        if wrong:
            message = f"kinds out of {', '.join(known)}, found {wrong[0]!r}"
            raise ValueError(message)
        return self

    @property
    def limits(self) -> dict[str, float]:
        """What is asked for: limit by name."""
        names = ("cost_max", "bytes_max", "ap_loss_max")
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}

    @property
    def minimises(self) -> str:
        """What is made as small as possible within the limits: ``cost`` or ``loss``."""
        return "cost" if self.ap_loss_max is not None else "loss"


@dataclass(frozen=True)
class Figures:
    """What a model is judged by.

    Attributes:
        loss: Points of AP (of agreement) below the original, on the photos a search may look at.
        cost: Part of the original's.
        bytes: Of the file.
    """

    loss: float
    cost: float
    bytes: int

    def value(self, name: str) -> float:
        """Returns the figure that a limit is about."""
        return {"cost_max": self.cost, "bytes_max": self.bytes, "ap_loss_max": self.loss}[name]


def excess(search: Search, figures: Figures) -> dict[str, float]:
    """Returns by how much each limit is missed; 0 and below: it is kept.

    Cost and bytes relative to the limit; points of accuracy in ``POINTS_PER_WHOLE``.
    """
    found = {}
    for name, limit in search.limits.items():
        gap = figures.value(name) - limit
        found[name] = gap / (POINTS_PER_WHOLE if name == "ap_loss_max" else limit)
    return found


def missed(search: Search, figures: Figures) -> float:
    """Returns by how much the limits are missed in all; 0 if all are kept."""
    return sum(max(0.0, gap) for gap in excess(search, figures).values())


def objective(search: Search, figures: Figures) -> float:
    """Returns what is to be as small as possible: the part of the cost, or the points lost."""
    return figures.cost if search.minimises == "cost" else figures.loss


def merit(search: Search, figures: Figures) -> float:
    """Returns one number to compare unfinished models by, the lower the better.

    A missed limit weighs more than anything that can be won by missing it.
    """
    scale = 1.0 if search.minimises == "cost" else 1 / POINTS_PER_WHOLE
    return objective(search, figures) * scale + 10 * missed(search, figures)


def best_of(search: Search, figures: Sequence[Figures]) -> int:
    """Returns the place of the model that meets the limits best; if none does, of the nearest."""

    def rank(i: int) -> tuple[float, ...]:
        one = figures[i]
        gap = missed(search, one)
        rest = (one.loss, one.cost) if search.minimises == "loss" else (one.cost, one.loss)
        return (gap, objective(search, one), *rest, one.bytes)

    return min(range(len(figures)), key=rank)


def non_dominated(figures: Sequence[Figures]) -> list[int]:
    """Returns the places of all models that no other one beats in accuracy, cost and size at once.

    Of equal ones the first stays.
    """
    rows = [(one.loss, one.cost, one.bytes) for one in figures]

    def beaten(i: int) -> bool:
        return any(
            all(a <= b for a, b in zip(rows[k], rows[i], strict=True))
            and (rows[k] != rows[i] or k < i)
            for k in range(len(rows))
            if k != i
        )

    return [i for i in range(len(rows)) if not beaten(i)]


def asked_text(search: Search) -> str:
    """Returns what is looked for, as a sentence without its end."""
    parts = [_limit_text(name, limit) for name, limit in search.limits.items()]
    goal = "the cheapest model" if search.minimises == "cost" else "the most accurate model"
    return f"{goal} with {', '.join(parts)}"


def shortfall_text(search: Search, figures: Figures) -> str:
    """Returns by how much the limits are missed; empty if they are kept."""
    parts = []
    for name, gap in excess(search, figures).items():
        if gap > 0:
            value = _value_text(name, figures.value(name))
            parts.append(f"{value}, asked: {_limit_text(name, search.limits[name])}")
    return "; ".join(parts)


def _limit_text(name: str, limit: float) -> str:
    return {
        "cost_max": f"at most {100 * limit:g} % of the cost",
        "bytes_max": f"at most {limit / 1e6:g} MB",
        "ap_loss_max": f"at most {limit:g} points lost",
    }[name]


def _value_text(name: str, value: float) -> str:
    return {
        "cost_max": f"{100 * value:.1f} % of the cost",
        "bytes_max": f"{value / 1e6:.3f} MB",
        "ap_loss_max": f"{value:.2f} points lost",
    }[name]
