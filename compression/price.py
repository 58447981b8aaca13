"""What a model costs on the core it is for, in the best unit that can be had here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from ..models.errors import RecipeError
from ..models.graph import load_model, node_macs


@dataclass(frozen=True)
class Price:
    """A way to tell the cost of a model.

    Attributes:
        kind: Key of ``PRICES``.
        text: What is counted, for people.
        of: ONNX file -> cost per picture.
    """

    kind: str
    text: str
    of: Callable[[Path], float]


def _macs(core: str) -> Price:
    text = "multiply-accumulates: they are the same on every core, and INT8 does not lower them"
    return Price("macs", text, lambda path: float(sum(node_macs(load_model(path)).values())))


PRICES: Final[dict[str, Callable[[str], Price | None]]] = {"macs": _macs}
"""Ways to tell a cost, the best first; one that is not to be had for a core here gives None."""


def price_for(core: str, kind: str | None = None) -> Price:
    """Returns the best way to tell what a model costs on a core.

    Args:
        core: A recipe's ``target.core``.
        kind: Take this one, because others count with it already.

    Raises:
        RecipeError: ``kind`` is not to be had here.
    """
    for name, make in PRICES.items():
        if kind in (None, name) and (price := make(core)) is not None:
            return price
    message = (
        f"expected costs in {kind}, as the study began with, found that this machine cannot count "
        "them; work on it where it was begun, or begin one of another name (search.study)"
    )
    raise RecipeError(message)
