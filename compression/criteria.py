"""Which channels of a layer matter least: the criteria of the literature, for coupled channels.

Every criterion gives one number per group of coupled channels; the *smallest* go first. ``obs`` is
ours (``importance.RemovalState``): it knows what is correlated and what compensation can mend, so
its costs can be added up and compared between layers. The others look at each group by itself:

========== =========================================================================
``l1``      Sum of absolute weights of the filters (Li et al., arXiv 1608.08710).
``l2``      Euclidean norm of the filters.
``bn``      Scale of the batch normalisation behind them (Liu et al., arXiv 1708.06519).
``taylor``  First-order effect of removal, ``|sum of w * dL/dw|`` (arXiv 1906.10771).
``lamp``    Share in what is left of its layer (Lee et al., arXiv 2010.07611), per filter.
``fpgm``    Distance to the other filters of its layer (He et al., arXiv 1811.00250).
========== =========================================================================
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any, Final, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from ..models.errors import RecipeError
from ..models.nets.common import DetectorNet
from .groups import ChannelMap, Group
from .importance import RemovalState, collect_stats
from .levels import probe_gradients

Scores = npt.NDArray[np.float64]
Key = tuple[str, ...]

CRITERIA: Final = ("obs", "l1", "l2", "bn", "taylor", "lamp", "fpgm")
RELATIVE: Final = ("l1", "l2", "fpgm")
"""Criteria whose scale differs from layer to layer: divided by the layer's mean."""


class Harm(Protocol):
    """What removing groups costs, kept true while they are removed."""

    def preview(self, members: Sequence[int], count: int) -> list[tuple[int, float]]:
        """Returns which of these groups would go first and what each would cost by then."""

    def remove(self, number: int) -> None:
        """Removes one group."""


class FixedHarm:
    """Costs that do not depend on what else is removed.

    Args:
        scores: One per group.
    """

    def __init__(self, scores: Scores) -> None:
        self.scores = scores

    def preview(self, members: Sequence[int], count: int) -> list[tuple[int, float]]:
        """Returns the ``count`` groups of the smallest scores, smallest first."""
        order = sorted(members, key=lambda number: (self.scores[number], number))
        return [(number, float(self.scores[number])) for number in order[:count]]

    def remove(self, number: int) -> None:
        """Changes nothing."""


def harm_of(
    criterion: str, net: DetectorNet, channels: ChannelMap, batches: Iterable[Tensor], seed: int = 0
) -> Harm:
    """Returns what removing each group of a network costs by a criterion.

    Args:
        criterion: One of ``CRITERIA``.
        net: In eval mode.
        channels: Of ``find_groups``.
        batches: Normalised float32 ``(b, 3, h, w)`` photos; only ``obs`` and ``taylor`` look.
        seed: Of random projections.

    Raises:
        RecipeError: ``bn`` for a network that came in without its normalisation.
        ValueError: No such criterion, or a head that is not known (``obs``, ``taylor``).
    """
    if criterion == "obs":
        return RemovalState(channels, collect_stats(net, batches, seed))
    if criterion == "taylor":
        return FixedHarm(taylor_scores(net, channels, batches, seed))
    if criterion == "bn":
        return FixedHarm(bn_scores(net, channels))
    if criterion not in CRITERIA:
        message = f"expected a criterion out of {', '.join(CRITERIA)}, found {criterion!r}"
        raise ValueError(message)
    return FixedHarm(weight_scores(criterion, net, channels))


def layer_of(group: Group) -> Key:
    """Returns the convolutions that make a group: groups of one layer have the same."""
    return tuple(sorted({name for name, _ in group.makers}))


def layers(channels: ChannelMap) -> dict[Key, list[int]]:
    """Returns layer -> the numbers of its groups."""
    result: dict[Key, list[int]] = defaultdict(list)
    for number, group in enumerate(channels.groups):
        result[layer_of(group)].append(number)
    return dict(result)


@torch.no_grad()
def weight_scores(criterion: str, net: nn.Module, channels: ChannelMap) -> Scores:
    """Returns ``l1``, ``l2``, ``lamp`` or ``fpgm`` of each group, float64 ``(groups,)``.

    A group's filters are the weights of all convolutions that make it, side by side.
    """
    modules: dict[str, Any] = dict(net.named_modules())
    scores = np.zeros(len(channels.groups))
    for key, members in layers(channels).items():
        parts = []
        for name in key:
            weight: Tensor = modules[name].weight.detach().flatten(1).double().cpu()
            rows = [[i for n, i in channels.groups[m].makers if n == name] for m in members]
            parts.append(torch.stack([weight[r].sum(0) for r in rows]).numpy())
        scores[members] = _FILTER_SCORES[criterion](np.concatenate(parts, axis=1))
        if criterion in RELATIVE:
            scores[members] /= max(float(scores[members].mean()), 1e-30)
    return scores


def _l1(filters: Scores) -> Scores:
    return np.asarray(np.abs(filters).sum(1))


def _l2(filters: Scores) -> Scores:
    return np.asarray(np.sqrt((filters**2).sum(1)))


def _lamp(filters: Scores) -> Scores:
    """Returns each filter's energy over that of itself and all that are at least as strong."""
    energy = (filters**2).sum(1)
    order = np.argsort(energy, kind="stable")
    left = np.cumsum(energy[order][::-1])[::-1]
    result = np.empty(len(energy))
    result[order] = energy[order] / np.maximum(left, 1e-30)
    return result


def _fpgm(filters: Scores) -> Scores:
    """Returns the sum of distances to all filters: smallest near the geometric median."""
    energy = (filters**2).sum(1)
    square = energy[:, None] + energy[None] - 2 * filters @ filters.T
    return np.asarray(np.sqrt(np.maximum(square, 0)).sum(1))


_FILTER_SCORES: Final = {"l1": _l1, "l2": _l2, "lamp": _lamp, "fpgm": _fpgm}


def bn_scores(net: nn.Module, channels: ChannelMap) -> Scores:
    """Returns the mean normalisation scale of each group; infinite where none is known.

    Scales are those of normalisations that are still there, and of folded ones if they were
    remembered (``fold_batchnorm(..., remember=True)``).

    Raises:
        RecipeError: No scale is known anywhere.
    """
    modules: dict[str, Any] = dict(net.named_modules())
    scores = np.full(len(channels.groups), np.inf)
    for number, group in enumerate(channels.groups):
        found = [
            float(scale[index].abs())
            for name, index in group.makers + group.through
            if (scale := _scale_of(modules[name])) is not None
        ]
        if found:
            scores[number] = np.mean(found)
    if not np.isfinite(scores).any():
        message = (
            "prune.criterion: expected a network whose batch normalisation is known for 'bn', "
            "found one without (it is folded in every ONNX file); take weights with it (.pth, "
            ".safetensors), or another criterion"
        )
        raise RecipeError(message)
    return scores


def _scale_of(module: nn.Module) -> Tensor | None:
    scale = (
        module.weight if isinstance(module, nn.BatchNorm2d) else getattr(module, "bn_scale", None)
    )
    return scale.detach() if isinstance(scale, Tensor) else None


def taylor_scores(
    net: DetectorNet, channels: ChannelMap, batches: Iterable[Tensor], seed: int = 0
) -> Scores:
    """Returns ``|sum of w * dL/dw|`` over each group's filters and biases, averaged over batches.

    No labels are needed: ``L`` is a random projection of the outputs that matter
    (``levels.probe_loss``), so what counts is how much the outputs would change.
    """
    generator = torch.Generator().manual_seed(seed)
    modules: dict[str, Any] = dict(net.named_modules())
    rows = [group.makers + group.through for group in channels.groups]
    names = sorted({name for row in rows for name, _ in row})
    start: dict[str, int] = {}
    total = 0
    for name in names:
        start[name] = total
        total += len(modules[name].weight)
    owner = np.concatenate(
        [np.full(len(row), n) for n, row in enumerate(rows)] or [np.zeros(0, int)]
    )
    slot = np.array([start[name] + i for row in rows for name, i in row], dtype=np.int64)
    scores, count = np.zeros(len(rows)), 0
    needed = {p: p.requires_grad for p in net.parameters()}
    net.requires_grad_(True)
    try:
        for _ in probe_gradients(net, batches, generator):
            flat = np.concatenate([_first_order(modules[name]) for name in names])
            scores += np.abs(np.bincount(owner, flat[slot], len(rows)))
            count += 1
    finally:
        for parameter, before in needed.items():
            parameter.requires_grad_(before)
    return scores / max(count, 1)


@torch.no_grad()
def _first_order(module: nn.Module) -> Scores:
    """Returns ``sum of w * dL/dw`` of each output channel; 0 where nothing reaches an output."""
    weight = module.weight
    assert isinstance(weight, Tensor)
    result = torch.zeros(len(weight), dtype=torch.float64)
    for value in (weight, getattr(module, "bias", None)):
        if isinstance(value, Tensor) and value.grad is not None:
            result += (value * value.grad).reshape(len(weight), -1).double().sum(1).cpu()
    return result.numpy()
