"""Structured pruning: which channels go, within a budget of multiply-accumulates, aligned."""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from .cut import removed_channels
from .groups import ChannelMap
from .importance import ConvStats, RemovalState


@dataclass(frozen=True)
class ConvCost:
    """Size of one convolution: what one output channel, one input channel and one cell cost."""

    outputs: int
    inputs: int
    taps: int
    cells: int

    @property
    def macs(self) -> int:
        """Multiply-accumulates per picture."""
        return self.outputs * self.inputs * self.taps * self.cells


def conv_costs(net: nn.Module, example: Tensor) -> dict[str, ConvCost]:
    """Returns the size of every convolution for a picture of the example's size."""
    costs: dict[str, ConvCost] = {}

    def note(name: str, conv: nn.Conv2d, y: Tensor) -> None:
        taps = conv.weight.shape[2] * conv.weight.shape[3]
        inputs = conv.in_channels // conv.groups
        cells = y.shape[2] * y.shape[3] * (1 + costs[name].cells if name in costs else 1)
        costs[name] = ConvCost(conv.out_channels, inputs, taps, cells)

    handles = [
        m.register_forward_hook(lambda m, i, o, name=n: note(name, m, o))
        for n, m in net.named_modules()
        if isinstance(m, nn.Conv2d)
    ]
    with torch.no_grad():
        net(example)
    for handle in handles:
        handle.remove()
    return costs


def count_macs(net: nn.Module, example: Tensor) -> int:
    """Returns the multiply-accumulates of all convolutions for one picture."""
    return sum(c.macs for c in conv_costs(net, example).values())


@dataclass(frozen=True)
class PrunePlan:
    """Which channels go; can be stored as JSON and carried out again.

    Attributes:
        removed: Conv name -> output channels.
        macs_before: Of the dense network.
        macs_after: Of the pruned one.
        kept: Conv name -> (channels kept, channels before).
    """

    removed: dict[str, list[int]]
    macs_before: int
    macs_after: int
    kept: dict[str, tuple[int, int]]


class _Budget:
    """Multiply-accumulates of the network while groups are taken out of it."""

    def __init__(self, channels: ChannelMap, costs: dict[str, ConvCost]) -> None:
        self.channels, self.costs = channels, costs
        self.outputs = {n: c.outputs for n, c in costs.items()}
        self.inputs = {n: c.inputs for n, c in costs.items()}

    def macs(self) -> int:
        return sum(
            self.outputs[n] * self.inputs[n] * c.taps * c.cells for n, c in self.costs.items()
        )

    def savings(self) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
        """Returns what removing each group would save now."""
        per_output = {n: self.inputs[n] * c.taps * c.cells for n, c in self.costs.items()}
        per_input = {n: self.outputs[n] * c.taps * c.cells for n, c in self.costs.items()}
        return np.array(
            [
                sum(per_output[m] for m, _ in g.makers)
                + sum(per_output.get(m, 0) for m, _ in g.through)
                + sum(per_input[m] for m, _ in g.users)
                for g in self.channels.groups
            ],
            dtype=np.float64,
        )

    def remove(self, number: int) -> None:
        group = self.channels.groups[number]
        for name, _ in group.makers + group.through:
            if name in self.outputs:
                self.outputs[name] -= 1
        for name, _ in group.users:
            self.inputs[name] -= 1


def plan_pruning(
    channels: ChannelMap,
    stats: dict[str, ConvStats],
    costs: dict[str, ConvCost],
    macs_ratio: float,
    align: int = 8,
    keep_min: float = 0.25,
) -> PrunePlan:
    """Chooses channels by least harm per multiply-accumulate saved, until the budget is met.

    First freely; then every layer's count is rounded to a multiple of ``align`` (a multiple runs
    faster, often even than a smaller odd count), and the choice is made again within these counts.

    Args:
        channels: From ``find_groups``.
        stats: From ``collect_stats``.
        costs: From ``conv_costs``.
        macs_ratio: Multiply-accumulates to be left, as a fraction of all.
        align: Channels of each layer are a multiple of this where that can be met.
        keep_min: Each layer keeps at least this part of its channels.

    Raises:
        ValueError: The ratio is not within 0..1 or cannot be reached.
    """
    if not 0 < macs_ratio <= 1:
        message = f"expected a macs_ratio within 0..1, found {macs_ratio}"
        raise ValueError(message)
    keys = [tuple(sorted({m for m, _ in g.makers})) for g in channels.groups]
    sizes = Counter(keys)
    floor = {k: max(align, int(np.ceil(n * keep_min))) for k, n in sizes.items()}
    free = {k: max(0, n - min(floor[k], n)) for k, n in sizes.items()}
    goal = macs_ratio * sum(c.macs for c in costs.values())
    chosen, macs = _choose(channels, stats, costs, keys, free, goal)
    # If even this misses the budget, no rounding can meet it.
    biases: list[float] = list(np.linspace(0.5, -1.5, 21)) if macs <= goal else []
    gone = Counter(keys[n] for n in chosen)
    # Rounding may miss the budget: shift the rounding until it is met.
    for bias in biases:
        quota = {}
        for key, size in sizes.items():
            left = size - gone[key]
            rounded = int(np.floor(left / align + bias)) * align
            rounded = min(max(rounded, min(floor[key], size)), size)
            quota[key] = size - rounded if gone[key] or rounded < left else 0
        chosen, macs = _choose(channels, stats, costs, keys, quota, 0.0)
        if macs <= goal:
            break
    else:
        message = f"expected a budget that pruning can reach, found {macs_ratio}; raise it"
        raise ValueError(message)
    removed = removed_channels(channels, chosen)
    kept = {
        name: (costs[name].outputs - len(rows), costs[name].outputs)
        for name, rows in removed.items()
    }
    return PrunePlan(removed, sum(c.macs for c in costs.values()), int(macs), kept)


def _choose(
    channels: ChannelMap,
    stats: dict[str, ConvStats],
    costs: dict[str, ConvCost],
    keys: list[tuple[str, ...]],
    quota: dict[tuple[str, ...], int],
    goal_macs: float,
) -> tuple[list[int], int]:
    """Removes the group of least harm per saving until the goal or all quotas are met."""
    state, budget = RemovalState(channels, stats), _Budget(channels, costs)
    left = dict(quota)
    members: dict[tuple[str, ...], list[int]] = defaultdict(list)
    for number, key in enumerate(keys):
        members[key].append(number)
    open_group = np.array([left[k] > 0 for k in keys])
    chosen: list[int] = []
    savings = budget.savings()
    while open_group.any() and budget.macs() > goal_macs:
        if len(chosen) % 16 == 0:
            savings = budget.savings()
        value = np.where(open_group, (state.costs() + 1e-12) / np.maximum(savings, 1), np.inf)
        best = int(np.argmin(value))
        chosen.append(best)
        state.remove(best)
        budget.remove(best)
        open_group[best] = False
        left[keys[best]] -= 1
        if left[keys[best]] == 0:
            open_group[members[keys[best]]] = False
    return chosen, budget.macs()
