"""The step ``factorise``: dense layers become chains of smaller ones where that costs less."""

from __future__ import annotations

import copy
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from ..models.nets.common import DetectorNet
from .chain import Layer, as_factor, put, stand_in
from .compensate import refit_to_original
from .lowrank import Subject, decompose, recompose, subject_of
from .lowrank_choice import Candidate, Choice, by_budget, by_energy, choices_of, price
from .moments import Moments, collect_moments
from .photos import calibration_batches
from .prune import COSTS, CostOf, conv_costs, count_macs, macs_of, total_cost
from .settings import FactoriseStep
from .state import State, StepReport

REFIT_RIDGE: Final = 1.0
"""Ten times what a cut wants: chains start at their optimum, only what comes in has drifted."""
QUIET: Final = 0.01
"""Of the mean variance of a layer's outputs: what varies less than this counts no more."""


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
            refit_to_original(changed, batches, REFIT_RIDGE)
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
