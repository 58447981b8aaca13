"""How the inputs and outputs of dense layers vary on photos."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .chain import Layer, Matrix
from .importance import unfold


@dataclass(frozen=True)
class Moments:
    """What one layer reads and gives on photos, over all its calls.

    Attributes:
        mean: Of its inputs, float64 ``(in * kh * kw,)``.
        covariance: Of its inputs, float64 ``(in * kh * kw, in * kh * kw)``.
        variance: Of each output, float64 ``(out,)``.
    """

    mean: Matrix
    covariance: Matrix
    variance: Matrix


class _Sums:
    """Sums over positions; around the first ones' mean, or single precision would eat them."""

    def __init__(self, columns: Tensor) -> None:
        self.centre = columns.mean(0)
        width = columns.shape[1]
        self.count = 0
        self.first = torch.zeros(width, dtype=torch.double)
        self.second = torch.zeros(width, width, dtype=torch.double)

    def add(self, columns: Tensor) -> None:
        columns = columns - self.centre
        self.count += len(columns)
        self.first += columns.sum(0).double()
        self.second += (columns.T @ columns).double()

    def moments(self, weight: Tensor) -> Moments:
        shift = self.first / self.count
        covariance = self.second / self.count - torch.outer(shift, shift)
        rows = weight.detach().cpu().flatten(1).double()
        variance = ((rows @ covariance) * rows).sum(1).clamp_min(0)
        mean = self.centre.double() + shift
        return Moments(mean.numpy(), covariance.numpy(), variance.numpy())


@torch.no_grad()
def collect_moments(
    net: nn.Module, batches: Iterable[Tensor], seed: int = 0, samples_max: int = 2000
) -> dict[str, Moments]:
    """Runs a network on photos and returns layer name -> what the layer reads and gives.

    Args:
        net: In eval mode.
        batches: Normalised float32 ``(b, 3, h, w)``.
        seed: Of the sampled positions.
        samples_max: Positions per batch and layer.
    """
    generator = torch.Generator().manual_seed(seed)
    sums: dict[str, _Sums] = {}
    layers: dict[str, Layer] = {
        name: m
        for name, m in net.named_modules()
        if isinstance(m, nn.Linear) or (isinstance(m, nn.Conv2d) and m.groups == 1)
    }

    def gather(name: str, layer: Layer, x: Tensor) -> None:
        columns = unfold(x, layer).cpu().float()
        if len(columns) > samples_max:
            pick = torch.randperm(len(columns), generator=generator)[:samples_max]
            columns = columns[pick]
        if name not in sums:
            sums[name] = _Sums(columns)
        sums[name].add(columns)

    handles = [
        m.register_forward_hook(lambda m, i, o, name=n: gather(name, m, i[0]))
        for n, m in layers.items()
    ]
    try:
        for batch in batches:
            net(batch)
    finally:
        for handle in handles:
            handle.remove()
    return {name: found.moments(layers[name].weight) for name, found in sums.items()}
