"""Ways to replace a layer by a chain of smaller ones, and which of them to take."""

from __future__ import annotations

import bisect
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Final

import numpy as np

from .chain import HOWS, Factor, Layer, Ranks, chain_of, full_ranks
from .lowrank import Subject, decompose, input_spectrum, output_spectrum
from .prune import ConvCost, CostOf, macs_of

CHOICES_MAX: Final = 12
"""So many ranks per layer and method are looked at, at most."""
LOST_PARTS: Final = (0.3, 0.2, 0.13, 0.08, 0.05, 0.03, 0.02, 0.01, 0.005, 0.002, 0.0005, 0.0)
"""Of the energy of either side of a layer: what pairs of Tucker ranks leave away."""


@dataclass(frozen=True)
class Choice:
    """One way to replace a layer: cost in the step's unit, multiply-accumulates per picture."""

    how: str
    ranks: Ranks
    cost: float
    macs: float


@dataclass
class Candidate:
    """A dense layer and the ways to replace it that cost less than it does.

    Attributes:
        name: Of the layer.
        layer: It.
        sizes: Height and width of what it reads, for every call.
        cost: Of the layer as it is, in the step's unit.
        macs: Of the layer as it is.
        subject: Its weights, and what errors count.
        choices: Per method, the cheapest first.
        errors: Choice -> part of the variance of the layer's outputs that the chain loses.
        why: Why it stays as it is; empty for one that is replaced.
    """

    name: str
    layer: Layer
    sizes: list[tuple[int, int]]
    cost: float
    macs: float
    subject: Subject
    choices: dict[str, list[Choice]] = field(default_factory=dict)
    errors: dict[Choice, float] = field(default_factory=dict)
    why: str = ""

    def error(self, choice: Choice) -> float:
        """Returns the part of the variance of the layer's outputs that a chain loses."""
        if choice not in self.errors:
            weights = decompose(self.subject, choice.how, choice.ranks)
            self.errors[choice] = self.subject.error(weights, choice.how)
        return self.errors[choice]


def price(factors: Sequence[Factor], sizes: Sequence[tuple[int, int]], cost_of: CostOf) -> float:
    """Returns what a chain costs per picture.

    Args:
        factors: The layers, in order.
        sizes: Height and width of what the first reads, for every call.
        cost_of: What one layer costs.
    """
    cells = [0] * len(factors)
    for size in sizes:
        for i, factor in enumerate(factors):
            size = factor.size_after(size)
            cells[i] += size[0] * size[1]
    total = 0.0
    for f, count in zip(factors, cells, strict=True):
        inputs = f.inputs // f.groups
        shape = ConvCost(f.outputs, inputs, count, f.kernel, f.groups)
        total += cost_of(shape, inputs, f.outputs)
    return total


def choices_of(
    one: Candidate, methods: Sequence[str], align: int, cost_of: CostOf
) -> dict[str, list[Choice]]:
    """Returns per method what costs less than the layer, the smallest ranks first."""
    result: dict[str, list[Choice]] = {}
    for how in HOWS:
        if how not in methods or (how != "svd" and one.subject.weight.shape[2:] == (1, 1)):
            continue
        chosen = []
        for ranks in _ranks(one, how, align):
            chain = chain_of(one.layer, how, ranks)
            cost = price(chain, one.sizes, cost_of)
            if cost < one.cost:
                chosen.append(Choice(how, ranks, cost, price(chain, one.sizes, macs_of)))
        few = np.linspace(0, len(chosen) - 1, min(CHOICES_MAX, len(chosen))).round().astype(int)
        if chosen:
            result[how] = [chosen[i] for i in few]
    return result


def _ranks(one: Candidate, how: str, align: int) -> list[Ranks]:
    """Returns ranks worth looking at, rising."""
    most = full_ranks(one.layer, how)
    if how != "tucker":
        return [(rank,) for rank in range(align, most[0] + 1, align)]
    spectra = input_spectrum(one.subject), output_spectrum(one.subject)
    pairs = []
    for part in LOST_PARTS:
        pair = []
        for values, full in zip(spectra, most, strict=True):
            kept = np.cumsum(values) / values.sum()
            rank = int(np.searchsorted(kept, 1 - part)) + 1
            pair.append(min(-(-rank // align) * align, full))
        pairs.append(tuple(pair))
    return list(dict.fromkeys(pairs))


def by_energy(found: Iterable[Candidate], energy: float, align: int) -> dict[str, Choice]:
    """Returns per layer the cheapest chain that keeps the energy; notes why others stay."""
    chosen: dict[str, Choice] = {}
    for one in found:
        enough = []
        for choices in one.choices.values():
            place = bisect.bisect_left(
                choices,
                True,
                key=lambda c: one.error(c) <= 1 - energy + 1e-9,
            )
            enough += choices[place : place + 1]
        if enough:
            chosen[one.name] = min(enough, key=lambda c: c.cost)
        elif one.choices:
            best = 1 - min(one.error(choices[-1]) for choices in one.choices.values())
            one.why = f"keeps {best:.3f} at most where it costs less"
        else:
            one.why = _too_dear(align)
    return chosen


def by_budget(found: Iterable[Candidate], saving: float, align: int) -> dict[str, Choice]:
    """Returns per layer which chain to take to save so many multiply-accumulates in all.

    Each layer offers the corners of the lower hull of error over saved cost; they are taken by the
    least error per cost saved, which for such hulls is the best choice at every point on the way.

    Args:
        found: The layers.
        saving: Multiply-accumulates to save.
        align: Only to explain.
    """
    steps: list[tuple[float, str, Choice]] = []
    macs: dict[str, float] = {}
    for one in found:
        macs[one.name] = one.macs
        if not one.choices:
            one.why = _too_dear(align)
            continue
        one.why = "its errors count for more than those of others"
        before = (0.0, 0.0)
        for choice in _hull(one):
            point = (one.cost - choice.cost, one.error(choice))
            steps.append(((point[1] - before[1]) / (point[0] - before[0]), one.name, choice))
            before = point
    chosen: dict[str, Choice] = {}
    for _, name, choice in sorted(steps, key=lambda s: s[0]):
        if saving <= 0:
            break
        saving -= macs[name] - choice.macs
        macs[name] = choice.macs
        chosen[name] = choice
    return chosen


def _hull(one: Candidate) -> list[Choice]:
    """Returns the choices on the lower convex hull of error over saved cost, rising."""
    points = [(one.cost - c.cost, one.error(c), c) for cs in one.choices.values() for c in cs]
    hull: list[tuple[float, float, Choice | None]] = [(0.0, 0.0, None)]
    for saved, error, choice in sorted(points, key=lambda p: (p[0], p[1])):
        if saved <= hull[-1][0]:
            continue
        while len(hull) > 1:
            (x0, y0, _), (x1, y1, _) = hull[-2:]
            if (y1 - y0) * (saved - x0) < (error - y0) * (x1 - x0):
                break
            hull.pop()
        hull.append((saved, error, choice))
    return [choice for _, _, choice in hull if choice is not None]


def _too_dear(align: int) -> str:
    return f"costs more at every rank that is a multiple of {align}"
