"""Structured pruning: which channels go, within a budget, at counts that a core is fast with.

Layers go down in steps, from one count that is allowed to the next lower one, and each step is
judged by what it really saves there. That is no constant slope on a processor: an 8-bit depthwise
convolution of 58 channels takes several times the instructions of one of 56.
"""

from __future__ import annotations

import functools
import heapq
import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Final

import torch
from torch import Tensor, nn

from ..models.core_costs import conv_instructions
from .criteria import Harm, Key, layers
from .cut import removed_channels
from .groups import ChannelMap


@dataclass(frozen=True)
class ConvCost:
    """Size of one convolution.

    Attributes:
        outputs: Output channels.
        inputs: Input channels that one output channel reads.
        cells: Output cells per picture, of all its calls.
        kernel: Height and width.
        groups: Of the convolution; more than 1 means depthwise.
        stride: The larger of both.
    """

    outputs: int
    inputs: int
    cells: int
    kernel: tuple[int, int] = (1, 1)
    groups: int = 1
    stride: int = 1

    @property
    def taps(self) -> int:
        """Cells that it reads of each input channel."""
        return self.kernel[0] * self.kernel[1]

    @property
    def macs(self) -> int:
        """Multiply-accumulates per picture."""
        return macs_of(self, self.inputs, self.outputs)


def conv_costs(net: nn.Module, example: Tensor) -> dict[str, ConvCost]:
    """Returns the size of every convolution for a picture of the example's size."""
    costs: dict[str, ConvCost] = {}

    def note(name: str, conv: nn.Conv2d, y: Tensor) -> None:
        inputs = conv.in_channels // conv.groups
        cells = y.shape[2] * y.shape[3] + (costs[name].cells if name in costs else 0)
        kernel, stride = (conv.weight.shape[2], conv.weight.shape[3]), max(conv.stride)
        costs[name] = ConvCost(conv.out_channels, inputs, cells, kernel, conv.groups, stride)

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


CostOf = Callable[[ConvCost, int, int], float]
"""``(layer, inputs, outputs)`` -> what it costs with so many channels."""


def macs_of(layer: ConvCost, inputs: int, outputs: int) -> int:
    """Returns multiply-accumulates per picture."""
    return outputs * inputs * layer.taps * layer.cells


def instructions_on(core: str, kind: str) -> CostOf:
    """Returns a function that tells the instructions of a layer (``models.core_costs``)."""

    @functools.cache
    def instructions(layer: ConvCost, inputs: int, outputs: int) -> float:
        groups, inputs = (outputs, outputs) if layer.groups > 1 else (1, inputs)
        kernel, cells, stride = layer.kernel, layer.cells, layer.stride
        return conv_instructions(core, kind, inputs, outputs, kernel, groups, cells, stride)

    return instructions


COSTS: Final[dict[str, CostOf]] = {
    "macs": macs_of,
    "cortex-a76": instructions_on("cortex-a76", "s8"),
    "cortex-a72": instructions_on("cortex-a72", "u8"),
}
"""What a budget can be counted in; on cores, 8-bit numbers of the sign that is faster there."""


def total_cost(costs: dict[str, ConvCost], cost_of: CostOf) -> float:
    """Returns what all convolutions cost."""
    return sum(cost_of(layer, layer.inputs, layer.outputs) for layer in costs.values())


class PlanError(ValueError):
    """A budget that cannot be reached.

    Args:
        ratio: What was asked for.
        least: What can be had.
    """

    def __init__(self, ratio: float, least: float) -> None:
        super().__init__(
            f"expected a budget that pruning can reach, found {ratio:.4g} of the network's cost; "
            f"the least is {least:.4f}"
        )
        self.ratio, self.least = ratio, least


@dataclass(frozen=True)
class PrunePlan:
    """Which channels go; can be stored as JSON and carried out again.

    Attributes:
        removed: Conv name -> output channels.
        macs_before: Of the dense network.
        macs_after: Of the pruned one.
        kept: Conv name -> (channels kept, channels before).
        cost_before: In the unit of the budget.
        cost_after: Of the pruned one.
    """

    removed: dict[str, list[int]]
    macs_before: int
    macs_after: int
    kept: dict[str, tuple[int, int]]
    cost_before: float
    cost_after: float


@dataclass(frozen=True)
class PruneRules:
    """How channels are chosen.

    Attributes:
        budget: What the goal is counted in, a key of ``COSTS``.
        cost: What a step's saving is counted in, a key of ``COSTS``.
        allocation: ``cost``: least harm per cost saved; ``global``: least harm per channel;
            ``uniform``: the same part of every layer.
        align: Counts are a multiple of this where that can be met.
        keep_min: Each layer keeps at least this part of its channels.
        sizes: Channels per layer that ``keep_min`` counts from, where some went before.
    """

    budget: str = "macs"
    cost: str = "macs"
    allocation: str = "cost"
    align: int = 8
    keep_min: float = 0.25
    sizes: dict[Key, int] = field(default_factory=dict)

    def counts(self, key: Key, size: int) -> list[int]:
        """Returns the channel counts below ``size`` that a layer may have, largest first.

        Multiples of ``align``; a layer that is none may also stop at the next multiple of 8, so
        that it need not lose a whole step or stay odd.
        """
        floor = min(size, max(self.align, math.ceil(self.sizes.get(key, size) * self.keep_min)))
        found = {c for c in range(self.align, size, self.align) if c >= floor}
        near = size // 8 * 8
        if self.align % 8 == 0 and size % self.align and floor <= near < size:
            found.add(near)
        return sorted(found, reverse=True)


class _Ledger:
    """What the network costs while groups are taken out of it."""

    def __init__(self, channels: ChannelMap, costs: dict[str, ConvCost]) -> None:
        self.costs = costs
        self.outputs = {n: c.outputs for n, c in costs.items()}
        self.inputs = {n: c.inputs for n, c in costs.items()}
        self.rows = [
            [name for name, _ in g.makers + g.through if name in costs] for g in channels.groups
        ]
        self.columns = [[name for name, _ in g.users] for g in channels.groups]

    def total(self, cost_of: CostOf) -> float:
        return sum(cost_of(c, self.inputs[n], self.outputs[n]) for n, c in self.costs.items())

    def _less(self, numbers: Sequence[int]) -> tuple[Counter[str], Counter[str]]:
        rows = Counter(name for number in numbers for name in self.rows[number])
        return rows, Counter(name for number in numbers for name in self.columns[number])

    def saving(self, numbers: Sequence[int], cost_of: CostOf) -> float:
        """Returns what removing these groups together would save now."""
        rows, columns = self._less(numbers)
        saved = 0.0
        for name in rows.keys() | columns.keys():
            cost, inputs, outputs = self.costs[name], self.inputs[name], self.outputs[name]
            saved += cost_of(cost, inputs, outputs)
            saved -= cost_of(cost, inputs - columns[name], outputs - rows[name])
        return saved

    def remove(self, numbers: Sequence[int]) -> None:
        rows, columns = self._less(numbers)
        for name, count in rows.items():
            self.outputs[name] -= count
        for name, count in columns.items():
            self.inputs[name] -= count


def plan_pruning(
    channels: ChannelMap,
    harm: Harm,
    costs: dict[str, ConvCost],
    ratio: float,
    rules: PruneRules | None = None,
) -> PrunePlan:
    """Chooses the channels that go, until the network is within its budget.

    Args:
        channels: From ``find_groups``.
        harm: From ``harm_of``; it is used up.
        costs: From ``conv_costs``.
        ratio: Cost to be left, as a fraction of the network's.
        rules: How to choose.

    Raises:
        ValueError: The ratio is not within 0..1.
        PlanError: It cannot be reached.
    """
    if not 0 < ratio <= 1:
        message = f"expected a ratio within 0..1, found {ratio}"
        raise ValueError(message)
    rules = rules or PruneRules()
    ledger = _Ledger(channels, costs)
    budget = COSTS[rules.budget]
    before = ledger.total(budget)
    goal = ratio * before * (1 + 1e-9)
    choose = _uniform if rules.allocation == "uniform" else _stepwise
    chosen = choose(layers(channels), harm, ledger, goal, rules)
    after = ledger.total(budget)
    if after > goal:
        raise PlanError(ratio, after / before)
    removed = removed_channels(channels, chosen)
    kept = {
        name: (costs[name].outputs - len(rows), costs[name].outputs)
        for name, rows in removed.items()
    }
    macs = total_cost(costs, macs_of), ledger.total(macs_of)
    return PrunePlan(removed, int(macs[0]), int(macs[1]), kept, before, after)


@dataclass(frozen=True)
class _Move:
    """One layer going down to a lower count."""

    numbers: list[int]
    harm: float
    saving: float  # in the unit that steps are compared by
    relief: float  # in the unit of the budget

    def value(self, excess: float) -> float:
        """Returns harm per saving; nothing is gained by saving more than what is over budget."""
        return (self.harm + 1e-12) / (self.saving * min(1.0, excess / self.relief))


def _stepwise(
    spaces: dict[Key, list[int]],
    harm: Harm,
    ledger: _Ledger,
    goal: float,
    rules: PruneRules,
) -> list[int]:
    """Lowers the layer of least harm per saving, again and again, until the goal is met."""
    budget, cost = COSTS[rules.budget], COSTS[rules.cost]
    look = 1 if rules.cost == "macs" else 2  # a processor may reward only the second step
    left = {key: list(members) for key, members in spaces.items()}
    counts = {key: rules.counts(key, len(members)) for key, members in spaces.items()}
    near = {
        key: {name for n in members for name in ledger.rows[n] + ledger.columns[n]}
        for key, members in spaces.items()
    }
    changed: dict[str, int] = {}
    chosen: list[int] = []

    def best_move(key: Key, excess: float) -> _Move | None:
        size = len(left[key])
        lower = [c for c in counts[key] if c < size][:look]
        if not lower:
            return None
        steps = harm.preview(left[key], size - lower[-1])
        moves = []
        for count in lower:
            numbers = [number for number, _ in steps[: size - count]]
            sum_harm = sum(h for _, h in steps[: size - count])
            relief, saving = ledger.saving(numbers, budget), ledger.saving(numbers, cost)
            if rules.allocation == "global":
                saving = float(len(numbers))
            if min(relief, saving) > 0 and math.isfinite(sum_harm):
                moves.append(_Move(numbers, sum_harm, saving, relief))
        return min(moves, key=lambda m: m.value(excess), default=None)

    heap: list[tuple[float, Key, int, _Move]] = []
    parked = list(spaces)  # layers that have no move now, but may have one after the next
    turn = 0
    while (excess := ledger.total(budget) - goal) > 0:
        if not heap:
            found = [(key, best_move(key, excess)) for key in parked]
            parked = [key for key, move in found if move is None]
            heap = [(move.value(excess), key, turn, move) for key, move in found if move]
            heapq.heapify(heap)
            if not heap:
                break
        value, key, seen, move = heapq.heappop(heap)
        if any(changed.get(name, 0) > seen for name in near[key]):
            newer = best_move(key, excess)
            if newer is None:
                parked.append(key)
                continue
            move = newer
        if heap and move.value(excess) > max(value, heap[0][0]):  # worse than it looked
            heapq.heappush(heap, (move.value(excess), key, turn, move))
            continue
        turn += 1
        for number in move.numbers:
            harm.remove(number)
            changed.update(dict.fromkeys(ledger.rows[number] + ledger.columns[number], turn))
        ledger.remove(move.numbers)
        chosen += move.numbers
        gone = set(move.numbers)
        left[key] = [number for number in left[key] if number not in gone]
        following = best_move(key, excess)
        if following is None:
            parked.append(key)
        else:
            heapq.heappush(heap, (following.value(excess), key, turn, following))
    return chosen


def _uniform(
    spaces: dict[Key, list[int]],
    harm: Harm,
    ledger: _Ledger,
    goal: float,
    rules: PruneRules,
) -> list[int]:
    """Keeps the same part of every layer, the largest that meets the goal."""
    budget = COSTS[rules.budget]
    counts = {key: rules.counts(key, len(members)) for key, members in spaces.items()}
    orders: dict[Key, list[int]] = {}
    for key, members in spaces.items():
        most = len(members) - min([*counts[key], len(members)])
        orders[key] = [n for n, h in harm.preview(members, most) if math.isfinite(h)]

    def gone(part: float) -> list[int]:
        result: list[int] = []
        for key, order in orders.items():
            size = len(spaces[key])
            allowed = [c for c in (size, *counts[key]) if size - c <= len(order)]
            count = min(allowed, key=lambda c: abs(c - part * size))
            result += order[: size - count]
        return result

    before = ledger.total(budget)
    fine = 1000  # parts of a whole
    low, high = 0, fine  # the largest part that meets the goal lies in between
    while high - low > 1:
        middle = (low + high) // 2
        fits = before - ledger.saving(gone(middle / fine), budget) <= goal
        low, high = (middle, high) if fits else (low, middle)
    chosen = gone(low / fine)
    ledger.remove(chosen)
    return chosen
