"""How much each channel matters: the error its removal leaves after the best compensation.

For a convolution that reads a channel, removing it and refitting the others in the least-squares
sense costs ``w_c^2 / [G^-1]_cc`` with ``G`` the covariance of its inputs: the Optimal Brain Surgeon
(Hassibi & Stork 1993) at the level of channels. Output channels are weighted by how much the
detector's outputs depend on them, so costs of different layers can be compared.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..models.nets.common import DetectorNet
from .groups import ChannelMap
from .levels import probe_gradients

Matrix = npt.NDArray[np.float64]


@dataclass
class ConvStats:
    """What pruning needs to know of one convolution.

    Attributes:
        weight: float64 ``(out, in * k * k)``.
        gram: Second moment of its inputs, float64 ``(in * k * k, in * k * k)``.
        sensitivity: Squared effect of an error in each output channel, float64 ``(out,)``.
        cells: Output positions per photo.
        taps: ``k * k``.
    """

    weight: Matrix
    gram: Matrix
    sensitivity: Matrix
    cells: int
    taps: int


def collect_stats(
    net: DetectorNet, batches: Iterable[Tensor], seed: int = 0, samples_max: int = 400
) -> dict[str, ConvStats]:
    """Runs the network on photos and gathers the statistics of all dense convolutions.

    Args:
        net: In eval mode, normalisation folded.
        batches: Normalised float32 ``(b, 3, h, w)``.
        seed: Of the random projections and of the sampled positions.
        samples_max: Positions per batch and layer that go into the covariance.
    """
    generator = torch.Generator().manual_seed(seed)
    convs = {
        name: m for name, m in net.named_modules() if isinstance(m, nn.Conv2d) and m.groups == 1
    }
    stats: dict[str, ConvStats] = {}

    def remember(name: str, module: nn.Conv2d, x: Tensor, y: Tensor) -> None:
        x = x.detach()  # of this call: a shared convolution has several
        y.register_hook(lambda grad: gather(name, module, x, grad))  # type: ignore[no-untyped-call]

    def gather(name: str, module: nn.Conv2d, x: Tensor, grad: Tensor) -> None:
        grad = grad.float()
        columns = unfold(x, module).float()
        energy = grad.square().sum((0, 2, 3)).double().numpy()
        weights = grad.square().sum(1).flatten()
        weights = weights / weights.mean().clamp_min(1e-30) + 0.2  # objects first, but not only
        if len(columns) > samples_max:
            pick = torch.randperm(len(columns), generator=generator)[:samples_max]
            columns, weights = columns[pick], weights[pick]
        columns = columns * weights[:, None].sqrt()
        gram = (columns.T @ columns / weights.sum()).double().numpy()
        if name not in stats:
            weight = module.weight.detach().flatten(1).double().numpy().copy()
            taps = module.weight.shape[2] * module.weight.shape[3]
            cells = grad.shape[2] * grad.shape[3]
            zero = np.zeros(len(weight))
            stats[name] = ConvStats(weight, np.zeros_like(gram), zero, cells, taps)
        stats[name].gram += gram
        stats[name].sensitivity += energy

    handles: list[RemovableHandle] = []
    for name, module in convs.items():
        handles.append(
            module.register_forward_hook(lambda m, i, o, name=name: remember(name, m, i[0], o))
        )
    count = 0
    try:
        for _ in probe_gradients(net, batches, generator):
            count += 1
    finally:
        for handle in handles:
            handle.remove()
    for stat in stats.values():
        stat.gram /= count
    return stats


def unfold(x: Tensor, conv: nn.Conv2d | nn.Linear) -> Tensor:
    """Returns what a layer reads at each position, ``(positions, in * k * k)``."""
    if isinstance(conv, nn.Linear):
        return x.flatten(0, -2)
    padding = conv.padding
    if isinstance(padding, str):  # "same" has odd kernels here, or torch pads unevenly itself
        sides = zip(conv.dilation, conv.kernel_size, strict=True)
        padding = tuple(d * (k - 1) // 2 if padding == "same" else 0 for d, k in sides)
    if conv.kernel_size == (1, 1) and conv.stride == (1, 1) and not any(padding):
        return x.permute(0, 2, 3, 1).flatten(0, 2)
    columns = nn.functional.unfold(
        x,
        conv.kernel_size,
        dilation=conv.dilation,
        padding=padding,
        stride=conv.stride,
    )
    return columns.transpose(1, 2).flatten(0, 1)


class RemovalState:
    """Costs of removing each group, kept true while groups are removed one by one.

    Args:
        channels: The network's groups.
        stats: From ``collect_stats``.
        ridge: Added to the covariance, relative to its mean diagonal.
    """

    def __init__(
        self, channels: ChannelMap, stats: dict[str, ConvStats], ridge: float = 1e-3
    ) -> None:
        self.channels = channels
        self.stats = stats
        self.weight = {name: s.weight.copy() for name, s in stats.items()}
        self.inverse = {}
        for name, s in stats.items():
            damping = ridge * max(float(np.trace(s.gram)) / len(s.gram), 1e-12)
            self.inverse[name] = np.linalg.inv(s.gram + damping * np.eye(len(s.gram)))
        self.offset: dict[str, int] = {}
        total = 0
        for name, s in stats.items():
            self.offset[name] = total
            total += s.weight.shape[1] // s.taps
        self.cost_flat = np.zeros(total)
        pairs = [
            (n, self.offset[conv] + i)
            for n, g in enumerate(channels.groups)
            for conv, i in g.users
            if conv in self.offset  # else nothing that it makes reaches an output
        ]
        self._group = np.array([p[0] for p in pairs], dtype=np.int64)
        self._slot = np.array([p[1] for p in pairs], dtype=np.int64)
        self.gone: set[int] = set()
        for name in stats:
            self._refresh(name)

    def costs(self) -> Matrix:
        """Returns the cost of removing each group now, float64 ``(groups,)``."""
        weights = self.cost_flat[self._slot]
        return np.bincount(
            self._group, weights=weights, minlength=len(self.channels.groups)
        ).astype(np.float64)

    def preview(self, members: Sequence[int], count: int) -> list[tuple[int, float]]:
        """Returns which of these groups would go first and what each would cost by then.

        Args:
            members: Groups to choose among.
            count: How many are to go.

        Returns:
            ``(group, cost)`` in the order of removal. Nothing is removed.
        """
        place = np.full(len(self.channels.groups), -1)
        place[list(members)] = np.arange(len(members))
        mine = place[self._group] >= 0
        slots, owner = self._slot[mine], place[self._group[mine]]
        convs = {
            name
            for n in members
            for name, _ in self.channels.groups[n].users + self.channels.groups[n].makers
            if name in self.stats
        }
        weight, inverse = dict(self.weight), dict(self.inverse)
        cost_flat, gone = self.cost_flat.copy(), set(self.gone)
        if count > 1:  # of one removal only the cost now is asked
            self.weight.update({name: weight[name].copy() for name in convs})
            self.inverse.update({name: inverse[name].copy() for name in convs})
        result: list[tuple[int, float]] = []
        done = np.zeros(len(members))
        for step in range(count):
            costs = np.bincount(owner, self.cost_flat[slots], len(members)) + done
            best = int(np.argmin(costs))
            result.append((members[best], float(max(costs[best], 0.0))))
            done[best] = np.inf
            if step < count - 1:
                self.remove(members[best])
        self.weight, self.inverse = weight, inverse
        self.cost_flat, self.gone = cost_flat, gone
        return result

    def remove(self, number: int) -> None:
        """Removes one group: the other weights take over what they can."""
        group = self.channels.groups[number]
        self.gone.add(number)
        touched = set()
        for conv, index in group.users:
            if conv not in self.stats:
                continue
            taps = self.stats[conv].taps
            block = np.arange(index * taps, (index + 1) * taps)
            inverse, weight = self.inverse[conv], self.weight[conv]
            gain = np.linalg.solve(inverse[np.ix_(block, block)], inverse[block])
            weight -= weight[:, block] @ gain
            inverse -= inverse[:, block] @ gain
            weight[:, block] = 0
            inverse[np.ix_(block, block)] += np.eye(taps)  # keeps later solves regular
            touched.add(conv)
        for conv, index in group.makers:
            if conv in self.weight:
                self.weight[conv][index] = 0
                touched.add(conv)
        for conv in touched:
            self._refresh(conv)

    def _refresh(self, name: str) -> None:
        stat = self.stats[name]
        weight, inverse = self.weight[name], self.inverse[name]
        if stat.taps == 1:
            energy = (weight.T**2) @ stat.sensitivity
            cost = energy / np.maximum(np.diag(inverse), 1e-30)
        else:
            count = weight.shape[1] // stat.taps
            square = inverse.reshape(count, stat.taps, count, stat.taps)
            blocks = square[np.arange(count), :, np.arange(count)]  # (in, taps, taps)
            parts = weight.reshape(len(weight), count, stat.taps).transpose(1, 2, 0)
            cost = (parts * np.linalg.solve(blocks, parts)).sum(1) @ stat.sensitivity
        self.cost_flat[self.offset[name] : self.offset[name] + len(cost)] = cost
