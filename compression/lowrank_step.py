"""The step ``factorise``: dense layers become chains of smaller ones where that costs less."""

from __future__ import annotations

import bisect
import copy
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from ..models.nets.common import DetectorNet
from .chain import HOWS, Factor, Layer, Ranks, as_factor, chain_of, full_ranks, put, stand_in
from .compensate import refit
from .lowrank import Subject, decompose, input_spectrum, output_spectrum, recompose, subject_of
from .moments import Moments, collect_moments
from .photos import calibration_batches
from .prune import COSTS, ConvCost, CostOf, conv_costs, count_macs, macs_of, total_cost
from .settings import FactoriseStep
from .state import State, StepReport, rows_kept

REFIT_PHOTOS_MAX: Final = 320
"""What two networks compute on so many photos is held in memory: some GB."""
REFIT_RIDGE: Final = 1.0
"""Ten times what a cut wants: chains start at their optimum, only what comes in has drifted."""
CHOICES_MAX: Final = 12
"""So many ranks per layer and method are looked at, at most."""
QUIET: Final = 0.01
"""Of the mean variance of a layer's outputs: what varies less than this counts no more."""
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


def run_factorise(state: State, config: FactoriseStep) -> tuple[State, StepReport]:
    """Replaces dense layers by chains of smaller ones, and refits what comes of it."""
    start = time.monotonic()
    job, net, example = state.job, state.net, state.example
    cost_of = COSTS[config.cost]
    batches: list[Tensor] = []
    if config.data_aware or config.refit:
        batches = calibration_batches(job.photos.train_paths, state.spec, config.photos)
    moments: dict[str, Moments] | None = None
    if config.data_aware:
        bar = tqdm(batches, desc="what matters", unit="batch", disable=not job.progress)
        moments = collect_moments(net, bar, job.seed)
    found, alone = candidates(net, example, moments, cost_of)
    for one in found:
        one.choices = choices_of(one, config.methods, config.align, cost_of)
    whole = count_macs(state.teacher, torch.zeros(1, 3, *state.teacher_spec.input_hw))
    now = count_macs(net, example)
    notes = []
    bars: Iterable[Candidate] = tqdm(found, desc="ranks", unit="layer", disable=not job.progress)
    if config.macs_ratio is None:
        assert config.energy is not None, "the settings say so"
        chosen = by_energy(bars, config.energy, config.align)
    else:
        goal = config.macs_ratio * whole
        chosen = by_budget(bars, now - goal, config.align)
    figures: dict[str, Any] = {
        "macs_original": whole,
        "macs_before": now,
        "cost_in": config.cost,
        "cost_before": round(total_cost(conv_costs(net, example), cost_of)),
    }
    changed = state
    if chosen:
        small = replaced(net, found, chosen, moments)
        layers = {n: {"how": c.how, "ranks": list(c.ranks)} for n, c in chosen.items()}
        changed = state.changed(small, {"kind": "factorise", "layers": layers})
        if config.refit:
            few = batches[: max(1, REFIT_PHOTOS_MAX // len(batches[0]))]
            rows = rows_kept(state.teacher, changed.edits)
            zeros = any(e["kind"] == "sparsify" for e in (*state.base_edits, *state.edits))
            refit(
                small,
                state.teacher,
                rows,
                few,
                ridge=REFIT_RIDGE,
                progress=job.progress,
                keep_zeros=zeros,
            )
    figures["macs_after"] = count_macs(changed.net, example)
    figures["cost_after"] = round(total_cost(conv_costs(changed.net, example), cost_of))
    figures["tried"] = [_row(one, chosen.get(one.name)) for one in found]
    if config.macs_ratio is not None and figures["macs_after"] > config.macs_ratio * whole:
        notes.append(
            f"macs_ratio {config.macs_ratio} was not reached: what costs less leaves "
            f"{figures['macs_after'] / whole:.3f} of the original's multiply-accumulates"
        )
    notes += _notes(found, chosen, alone, config)
    return changed, StepReport("factorise", time.monotonic() - start, figures, tuple(notes))


def candidates(
    net: nn.Module, example: Tensor, moments: dict[str, Moments] | None, cost_of: CostOf
) -> tuple[list[Candidate], dict[str, int]]:
    """Returns the layers that could be replaced, and how many others could not, by reason.

    Args:
        net: In eval mode, normalisation folded.
        example: A picture of the network's size.
        moments: From ``collect_moments``; None: what is large in the weights is what matters.
        cost_of: What a layer costs.
    """
    sizes: dict[str, list[tuple[int, int]]] = defaultdict(list)
    alone: Counter[str] = Counter()
    names: dict[int, list[str]] = defaultdict(list)
    for name, module in net.named_modules(remove_duplicate=False):
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            names[id(module)].append(name)

    def note(name: str, module: Layer, x: Tensor) -> None:
        linear = isinstance(module, nn.Linear)
        size = (1, x[..., 0].numel()) if linear else (x.shape[2], x.shape[3])
        sizes[name].append(size)

    modules = dict(net.named_modules())
    layers = {n: m for n, m in modules.items() if isinstance(m, (nn.Conv2d, nn.Linear))}
    handles = [
        m.register_forward_hook(lambda m, i, o, name=n: note(name, m, i[0]))
        for n, m in layers.items()
    ]
    with torch.no_grad():
        net(example)
    for handle in handles:
        handle.remove()
    result = []
    for name, layer in layers.items():
        why = _why_not(layer, names[id(layer)], sizes[name])
        if why:
            alone[why] += 1
            continue
        subject = _relative(layer, None if moments is None else moments[name])
        if isinstance(subject, str):
            alone[subject] += 1
            continue
        own = [as_factor(layer)]
        cost, macs = price(own, sizes[name], cost_of), price(own, sizes[name], macs_of)
        result.append(Candidate(name, layer, sizes[name], cost, macs, subject))
    return result, dict(alone)


def _relative(layer: Layer, moments: Moments | None) -> Subject | str:
    """Returns a layer whose errors are parts of its energy; or why there is none.

    Every output counts by the part of its own variance that is lost. Weighting outputs by their
    gradient instead served the frequent classes and lost the others.
    """
    covariance = importance = None
    if moments is not None:
        covariance, variance = moments.covariance, moments.variance
        importance = 1 / np.maximum(variance + QUIET * variance.mean(), 1e-30)
    known = [layer.weight.detach().cpu().numpy(), *([] if covariance is None else [covariance])]
    if not all(np.isfinite(values).all() for values in known):
        return "gives values that are not finite"
    subject = subject_of(layer, covariance, importance)
    energy = subject.energy()
    if energy < 1e-12:
        return "gives the same on all photos"
    return replace(subject, importance=subject.importance / energy)


def _why_not(layer: Layer, names: list[str], sizes: list[tuple[int, int]]) -> str:
    """Returns why a layer cannot be replaced; empty if it can."""
    if isinstance(layer, nn.Conv2d) and layer.groups > 1:
        return "depthwise or grouped"
    if isinstance(layer, nn.Conv2d) and layer.padding_mode != "zeros":
        return f"pads with {layer.padding_mode}"
    if len(names) > 1:
        return "has several names in the network"
    if not sizes:
        return "no output depends on it"
    return ""


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


@torch.no_grad()
def replaced(
    net: DetectorNet,
    found: Sequence[Candidate],
    chosen: dict[str, Choice],
    moments: dict[str, Moments] | None,
) -> DetectorNet:
    """Returns a copy of a network with the chosen chains in it."""
    result = copy.deepcopy(net)
    for one in found:
        if one.name not in chosen:
            continue
        choice = chosen[one.name]
        weights = decompose(one.subject, choice.how, choice.ranks)
        change = None
        if moments is not None:  # what is lost of a constant input goes into the bias
            lost = one.subject.weight - recompose(weights, choice.how)
            change = lost.reshape(len(lost), -1) @ moments[one.name].mean
        put(result, one.name, stand_in(one.layer, choice.how, choice.ranks, weights, change))
    return result.eval()


def _row(one: Candidate, choice: Choice | None) -> dict[str, Any]:
    row: dict[str, Any] = {
        "name": one.name,
        "weight": list(one.layer.weight.shape),
        "macs": round(one.macs),
        "cost": round(one.cost),
    }
    if choice is None:
        return row | {"kept": False, "why": one.why}
    return row | {
        "kept": True,
        "how": choice.how,
        "ranks": list(choice.ranks),
        "macs_after": round(choice.macs),
        "cost_after": round(choice.cost),
        "energy": round(1 - one.error(choice), 5),
    }


def _notes(
    found: Sequence[Candidate],
    chosen: dict[str, Choice],
    alone: dict[str, int],
    config: FactoriseStep,
) -> list[str]:
    unit = "multiply-accumulates" if config.cost == "macs" else f"instructions on {config.cost}"
    notes = [f"{len(chosen)} of {len(found)} dense layers were factorised; cost is {unit}"]
    if not chosen:
        notes[0] = f"nothing was factorised: none of {len(found)} dense layers would cost less"
    reasons = Counter(
        one.why.split(" at most")[0].split(" 0.")[0] for one in found if one.name not in chosen
    )
    for reason, count in reasons.items():
        notes.append(f"{count} layers stay: {reason}")
    notes += [f"left alone: {count} layers: {why}" for why, count in alone.items()]
    return notes
