"""Chains: a dense layer replaced by smaller ones with nothing in between, as data and as modules.

==========  ==========================================  =====================================
``how``     chain                                       source
==========  ==========================================  =====================================
svd         k x k to ``rank``, 1x1                      arXiv 1505.06798, section 3.1
spatial     k x 1 to ``rank``, 1 x k                    arXiv 1405.3866, scheme 2
tucker      1x1 to ``in``, k x k to ``out``, 1x1        arXiv 1511.06530
cp          1x1 to ``rank``, k x 1 and 1 x k each for   arXiv 1412.6553
            every channel by itself, 1x1
==========  ==========================================  =====================================

The last layer of the chain for ``a.conv`` is called ``a.conv.whole``: it gives what ``a.conv``
gave. What is compared between a network and the one it came from goes by ``whole_name``.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

Matrix = npt.NDArray[np.float64]
Ranks = tuple[int, ...]
Layer = nn.Conv2d | nn.Linear
HOWS: Final = ("svd", "spatial", "tucker", "cp")
WHOLE: Final = "whole"
"""Name of the last layer of a chain."""


def whole_name(name: str) -> str:
    """Returns the name of the layer whose outputs a layer gives: ``a.conv.whole`` -> ``a.conv``."""
    while name.endswith(f".{WHOLE}"):
        name = name.removesuffix(f".{WHOLE}")
    return name


@dataclass(frozen=True)
class Factor:
    """Shape of one convolution of a chain; pairs are ``(vertical, horizontal)``."""

    inputs: int
    outputs: int
    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int] | str
    dilation: tuple[int, int]
    groups: int = 1

    def size_after(self, size: tuple[int, int]) -> tuple[int, int]:
        """Returns height and width of what it makes of a map of this height and width."""
        return self._after(size, 0), self._after(size, 1)

    def _after(self, size: tuple[int, int], axis: int) -> int:
        if self.padding == "same":
            return size[axis]
        pad = 0 if isinstance(self.padding, str) else self.padding[axis]
        seen = self.dilation[axis] * (self.kernel[axis] - 1) + 1
        return (size[axis] + 2 * pad - seen) // self.stride[axis] + 1


def full_ranks(layer: Layer, how: str) -> Ranks:
    """Returns the ranks at which a chain can give exactly what the layer gives.

    Raises:
        ValueError: ``how`` is not known, or not for a layer of this shape.
    """
    if how not in HOWS:
        message = f"expected a way of factorising out of {', '.join(HOWS)}, found {how!r}"
        raise ValueError(message)
    kh, kw = _pair(layer.kernel_size) if isinstance(layer, nn.Conv2d) else (1, 1)
    if how != "svd" and kh * kw == 1:
        message = f"expected a kernel larger than 1x1 for {how}, found {layer}"
        raise ValueError(message)
    outputs, inputs = layer.weight.shape[:2]
    if how == "svd":
        return (min(outputs, inputs * kh * kw),)
    if how == "spatial":
        return (min(inputs * kh, outputs * kw),)
    if how == "tucker":
        return (inputs, outputs)
    return (min(inputs, outputs) * kh * kw,)


def as_factor(layer: Layer) -> Factor:
    """Returns the shape of a layer itself; a linear layer is a 1x1 convolution."""
    outputs, inputs = layer.weight.shape[:2]
    if isinstance(layer, nn.Linear):
        return _point(inputs, outputs)
    padding = layer.padding if isinstance(layer.padding, str) else _pair(layer.padding)
    kernel, stride, dilation = map(_pair, (layer.kernel_size, layer.stride, layer.dilation))
    return Factor(inputs, outputs, kernel, stride, padding, dilation, layer.groups)


def chain_of(layer: Layer, how: str, ranks: Sequence[int]) -> list[Factor]:
    """Returns the layers that stand for ``layer``, in order.

    Args:
        layer: Dense; a convolution pads with zeros.
        how: Out of ``HOWS``.
        ranks: One; for ``tucker`` two, of the inputs and of the outputs.

    Raises:
        ValueError: The ranks do not fit, or ``how`` is not for such a layer.
    """
    most = full_ranks(layer, how)
    good = len(ranks) == len(most) and all(type(r) is int for r in ranks)
    if not good or not all(1 <= r <= full for r, full in zip(ranks, most, strict=True)):
        message = f"expected ranks within 1..{list(most)} for {how} of {layer}, found {ranks}"
        raise ValueError(message)
    outputs, inputs = layer.weight.shape[:2]
    rank = ranks[0]
    if isinstance(layer, nn.Linear):
        return [_point(inputs, rank), _point(rank, outputs)]
    if layer.groups != 1 or layer.padding_mode != "zeros":
        message = f"expected a dense convolution that pads with zeros, found {layer}"
        raise ValueError(message)
    own = as_factor(layer)
    kernel, stride, padding, dilation = own.kernel, own.stride, own.padding, own.dilation
    whole = (kernel, stride, padding, dilation)
    if how == "svd":
        return [Factor(inputs, rank, *whole), _point(rank, outputs)]
    if how == "tucker":
        core = Factor(rank, ranks[1], *whole)
        return [_point(inputs, rank), core, _point(ranks[1], outputs)]
    down, across = (
        (padding, padding) if isinstance(padding, str) else ((padding[0], 0), (0, padding[1]))
    )
    vertical = ((kernel[0], 1), (stride[0], 1), down, (dilation[0], 1))
    horizontal = ((1, kernel[1]), (1, stride[1]), across, (1, dilation[1]))
    if how == "spatial":
        return [Factor(inputs, rank, *vertical), Factor(rank, outputs, *horizontal)]
    return [
        _point(inputs, rank),
        Factor(rank, rank, *vertical, groups=rank),
        Factor(rank, rank, *horizontal, groups=rank),
        _point(rank, outputs),
    ]


def _pair(value: Sequence[int]) -> tuple[int, int]:
    return value[0], value[1]


def _point(inputs: int, outputs: int) -> Factor:
    return Factor(inputs, outputs, (1, 1), (1, 1), (0, 0), (1, 1))


@torch.no_grad()
def stand_in(
    layer: Layer,
    how: str,
    ranks: Sequence[int],
    weights: Sequence[Matrix] | None = None,
    bias_change: Matrix | None = None,
) -> nn.Sequential:
    """Returns the chain that stands for a layer; its last layer has a bias, the others none.

    Args:
        layer: As for ``chain_of``.
        how: As for ``chain_of``.
        ranks: As for ``chain_of``.
        weights: From ``lowrank.decompose``; zeros if None, for weights that are loaded later.
        bias_change: float64 ``(out,)``, added to the layer's bias.

    Raises:
        ValueError: As from ``chain_of``.
    """
    parts: list[Layer] = []
    for f in chain_of(layer, how, ranks):
        if isinstance(layer, nn.Linear):
            parts.append(nn.Linear(f.inputs, f.outputs, bias=False, device="meta"))
        else:
            shape = (f.kernel, f.stride, f.padding, f.dilation, f.groups, False)
            parts.append(nn.Conv2d(f.inputs, f.outputs, *shape, device="meta"))
    like = layer.weight.detach()
    for i, part in enumerate(parts):
        value = like.new_zeros(part.weight.shape)
        if weights is not None:
            value.copy_(torch.from_numpy(weights[i]).reshape(value.shape))
        part.weight = nn.Parameter(value)
    bias = like.new_zeros(len(like)) if layer.bias is None else layer.bias.detach().clone()
    if bias_change is not None:
        bias += torch.from_numpy(bias_change).to(bias)
    parts[-1].bias = nn.Parameter(bias)
    names = [f"factor{i}" for i in range(len(parts) - 1)] + [WHOLE]
    return nn.Sequential(OrderedDict(zip(names, parts, strict=True))).train(layer.training)


def put(net: nn.Module, name: str, chain: nn.Module) -> None:
    """Puts a chain in the place of a layer."""
    owner, _, attribute = name.rpartition(".")
    setattr(net.get_submodule(owner), attribute, chain)


def with_chains(net: nn.Module, layers: Mapping[str, Mapping[str, Any]]) -> nn.Module:
    """Returns a copy of a network with layers replaced by chains whose weights are zero.

    Args:
        net: The network; stays as it is.
        layers: Layer name -> ``{"how": ..., "ranks": [...]}``.

    Raises:
        ValueError: A layer is not there, or cannot be factorised so.
    """
    result = copy.deepcopy(net)
    modules = dict(result.named_modules())
    for name, plan in layers.items():
        layer = modules.get(name)
        if not isinstance(layer, (nn.Conv2d, nn.Linear)):
            message = f"expected a convolution or linear layer called {name}, found {layer}"
            raise ValueError(message)
        put(result, name, stand_in(layer, plan["how"], plan["ranks"]))
    return result
