"""The step ``prune``: measure what matters, cut within a budget, refit; once or in parts."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from ..models.errors import RecipeError
from ..models.files import read_json
from ..models.nets.common import DetectorNet
from .compensate import refit_to_original
from .criteria import Key, harm_of, layers
from .cut import chosen_groups, cut
from .groups import ChannelMap, find_groups
from .photos import calibration_batches
from .prune import COSTS, ConvCost, PlanError, PruneRules, conv_costs, plan_pruning, total_cost
from .settings import PruneStep
from .state import State, StepReport

UNITS = {"macs": "multiply-accumulates"}
"""What costs are counted in; instructions of a processor core where it is not said here."""


def run_prune(state: State, config: PruneStep) -> tuple[State, StepReport]:
    """Removes the channels that matter least, and refits what is left.

    The budget counts from the original at its own input size, so a smaller ``data.input_hw``
    already is a part of the saving. With ``iterations`` the way to it is gone in parts of equal
    ratio; each measures anew what matters in the network that the one before has left.

    Raises:
        RecipeError: The budget cannot be met, the criterion does not fit the network, or its head
            is not known to pruning.
    """
    start = time.monotonic()
    net, example = state.net, state.example
    unit, part_left = config.budget
    cost_of = COSTS[unit]
    whole_layers = conv_costs(state.teacher, torch.zeros(1, 3, *state.teacher_spec.input_hw))
    whole = total_cost(whole_layers, cost_of)
    now_layers = conv_costs(net, example)
    now, goal = total_cost(now_layers, cost_of), part_left * whole
    macs = sum(layer.macs for layer in now_layers.values())
    figures: dict[str, Any] = {
        "macs_original": sum(layer.macs for layer in whole_layers.values()),
        "macs_before": macs,
    }
    if unit == "macs":
        figures["macs_goal"] = round(goal)
    else:
        figures |= {"cost": unit, "cost_original": round(whole), "cost_before": round(now)}
        figures["cost_goal"] = round(goal)
    channels = find_groups(net, example)
    notes = [f"left alone: {count} channels at {why}" for why, count in channels.frozen.items()]
    if config.plan is not None:
        done = _cut_and_refit(state, read_plan(config.plan, channels), config)
        return done, _reported(done, now_layers, figures, notes, start)
    if goal >= now:
        notes.insert(0, "nothing to cut: the network is already within the budget")
        figures["macs_after"] = macs
        return state, StepReport("prune", time.monotonic() - start, figures, tuple(notes))
    sizes = {key: len(members) for key, members in layers(channels).items()}
    batches = calibration_batches(state.job.photos.train_paths, state.spec, config.photos)
    try:
        for part in range(1, config.iterations + 1):
            aim = now * (goal / now) ** (part / config.iterations)
            state = _prune_part(state, config, aim, sizes, batches)
    except PlanError as error:
        name = "macs_ratio" if config.macs_ratio is not None else "cost_ratio"
        before = total_cost(conv_costs(state.net, example), cost_of)
        least = math.ceil(1000 * error.least * before / whole) / 1000
        message = (
            f"prune.{name}: {part_left} of the original's {whole / 1e6:.0f} M "
            f"{UNITS.get(unit, f'instructions on {unit}')} cannot be had with keep_min "
            f"{config.keep_min} and align {config.align}: the least is {least}; "
            "raise it, or lower those"
        )
        raise RecipeError(message) from error
    except ValueError as error:
        message = f"prune: {error}; leave the step out, or take criterion = 'l2'"
        raise RecipeError(message) from error
    if unit != "macs":
        figures["cost_after"] = round(total_cost(conv_costs(state.net, example), cost_of))
    return state, _reported(state, now_layers, figures, notes, start)


def _reported(
    state: State,
    before: dict[str, ConvCost],
    figures: dict[str, Any],
    notes: Sequence[str],
    start: float,
) -> StepReport:
    after = conv_costs(state.net, state.example)
    figures["macs_after"] = sum(layer.macs for layer in after.values())
    figures["layers"] = {
        name: [after[name].outputs, layer.outputs]
        for name, layer in before.items()
        if after[name].outputs < layer.outputs
    }
    return StepReport("prune", time.monotonic() - start, figures, tuple(notes))


def read_plan(path: Path, channels: ChannelMap) -> dict[str, list[int]]:
    """Returns a stored plan: layer -> output channels that go.

    Raises:
        RecipeError: The file is none, or of another network.
    """
    stored = read_json(path)
    removed = stored.get("removed", stored) if isinstance(stored, dict) else None
    if not isinstance(removed, dict) or not all(
        isinstance(rows, list) and all(type(row) is int for row in rows)
        for rows in removed.values()
    ):
        message = f"{path}: expected a plan, JSON with layer -> list of channels, found none"
        raise RecipeError(message)
    try:
        chosen_groups(channels, removed)
    except ValueError as error:
        message = f"{path}: {error}; take the plan that was made for it"
        raise RecipeError(message) from error
    return {str(name): rows for name, rows in removed.items()}


def _prune_part(
    state: State, config: PruneStep, aim: float, sizes: dict[Key, int], batches: list[Tensor]
) -> State:
    """Cuts down to a cost of ``aim``, in the unit of the budget, and refits."""
    job, net = state.job, state.net
    costs = conv_costs(net, state.example)
    ratio = aim / total_cost(costs, COSTS[config.budget[0]])
    if ratio >= 1:  # the part before went further than it had to
        return state
    channels = find_groups(net, state.example)
    shown: Iterable[Tensor] = tqdm(
        batches, desc="what matters", unit="batch", disable=not job.progress
    )
    harm = harm_of(config.criterion, net, channels, shown, job.seed)
    rules = PruneRules(
        budget=config.budget[0],
        cost=config.cost,
        allocation=config.allocation,
        align=config.align,
        keep_min=config.keep_min,
        sizes=sizes,
    )
    plan = plan_pruning(channels, harm, costs, ratio, rules)
    return _cut_and_refit(state, plan.removed, config, batches)


def _cut_and_refit(
    state: State,
    removed: dict[str, list[int]],
    config: PruneStep,
    batches: list[Tensor] | None = None,
) -> State:
    job = state.job
    if batches is None:
        batches = calibration_batches(job.photos.train_paths, state.spec, config.photos)
    channels = find_groups(state.net, state.example)
    small = cut(state.net, channels, chosen_groups(channels, removed))
    assert isinstance(small, DetectorNet)
    changed = state.changed(small.eval(), {"kind": "cut", "removed": removed})
    refit_to_original(changed, batches)
    return changed
