"""What a model costs on the core it is for, in the best unit that can be had here."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from ..models.core_costs import CORES
from ..models.errors import EdgeSightError, ModelFileError, RecipeError
from ..models.graph import load_model, node_macs
from .predict import predicted_instructions

INT64: Final = 7
"""Type of numbers in ONNX files."""
COUNTED_BUDGET_S: Final = 1200.0
"""With less time a search does not count in the emulated computer: that takes up to a minute."""


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


def _counted(core: str) -> Price | None:
    """Instructions counted in an emulated computer, if it has been made here."""
    if not can_count(core):
        return None
    known: dict[str, float] = {}

    def of(path: Path) -> float:
        # Instructions depend on the graph, not on the weights: training does not change them.
        key = graph_print(load_model(path))
        if key not in known:
            known[key] = float(count_instructions([path], core)[0])
        return known[key]

    return Price("counted", f"instructions, counted on an emulated {core}", of)


def _predicted(core: str) -> Price | None:
    if core not in CORES:
        return None
    text = f"instructions on {core}, from a table of common operators (edgesight cost counts all)"
    return Price("predicted", text, lambda path: predicted_instructions(load_model(path), core))


def _macs(core: str) -> Price:
    text = "multiply-accumulates: they are the same on every core, and INT8 does not lower them"
    return Price("macs", text, lambda path: float(sum(node_macs(load_model(path)).values())))


PRICES: Final[dict[str, Callable[[str], Price | None]]] = {
    "counted": _counted,
    "predicted": _predicted,
    "macs": _macs,
}
"""Ways to tell a cost, the best first; one that is not to be had for a core here gives None."""


def price_for(core: str, kind: str | None = None, budget_s: float | None = None) -> Price:
    """Returns the best way to tell what a model costs on a core.

    Args:
        core: A recipe's ``target.core``.
        kind: Take this one, because others count with it already.
        budget_s: Seconds there are for the whole search; None: as many as it takes.

    Raises:
        RecipeError: ``kind`` is not to be had here.
    """
    hurried = budget_s is not None and budget_s < COUNTED_BUDGET_S
    for name, make in PRICES.items():
        if kind is None and hurried and name == "counted":
            continue
        if kind in (None, name) and (price := make(core)) is not None:
            return price
    message = (
        f"expected costs to be {kind}, as the study began with, found that this machine cannot say "
        "them; work on it where it was begun, or begin one of another name (search.study)"
    )
    raise RecipeError(message)


def can_count(core: str) -> bool:
    """Says whether an emulated computer of this core is there and ready."""
    from ..models.emulator import find_guest, find_qemu

    if core not in CORES:
        return False
    try:
        find_qemu()
    except EdgeSightError:
        return False
    return find_guest() is not None


def count_instructions(paths: list[Path], core: str) -> list[int]:
    """Returns the instructions of one inference of each file, counted in an emulated computer.

    Raises:
        ModelFileError: One cannot be counted.
    """
    from ..models.cost import count

    found = []
    for path, cost in zip(paths, count(paths, core, progress=False), strict=True):
        if isinstance(cost, ModelFileError):
            message = f"{path.name}: {cost}"
            raise ModelFileError(message) from cost
        found.append(cost.instructions)
    return found


def graph_print(model: Any) -> str:
    """Returns what two files share whose graphs differ in nothing but numbers stored in them."""
    digest = hashlib.sha256()
    for node in model.graph.node:
        digest.update(node.SerializeToString(deterministic=True))
    for tensor in model.graph.initializer:
        digest.update(f"{tensor.name}{list(tensor.dims)}{tensor.data_type};".encode())
        if tensor.data_type == INT64:  # shapes and axes: they do decide what is computed
            digest.update(tensor.SerializeToString())
    return digest.hexdigest()
