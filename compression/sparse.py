"""Sparse weights: which ones become zero, and masks that keep them zero in later training.

A network that was made sparse carries a mark; where its zeros are is read from the weights
themselves, so nothing has to be stored beside them.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Final

import numpy as np
import torch
from torch import Tensor, nn

from ..models.nets.common import DetectorNet
from .levels import probe_gradients
from .qdq_weights import weight_scales

SPARSE_MARK: Final = "edgesight_sparse"
"""Attribute of a network whose zero weights are to stay zero."""
Scores = Mapping[str, Tensor]
"""Layer -> how much each of its weights matters, float ``weight.shape``."""
Kept = dict[str, Tensor]
"""Layer -> which of its weights stay, bool ``weight.shape``."""


@dataclass(frozen=True)
class SparseMasks:
    """Where a sparse network is zero; call ``apply_`` after each step of an optimizer.

    Attributes:
        kept: Layer with zeros -> which of its weights are not zero, bool ``weight.shape``.
    """

    kept: Mapping[str, Tensor]

    @torch.no_grad()
    def apply_(self, net: nn.Module) -> None:
        """Makes the weights zero again that training has moved, in place."""
        weights = weights_of(net)
        for name, kept in self.kept.items():
            weights[name].masked_fill_(~kept.to(weights[name].device), 0)


def masks_of(net: nn.Module) -> SparseMasks | None:
    """Returns where a sparse network is zero now; None if it was never made sparse."""
    if not getattr(net, SPARSE_MARK, False):
        return None
    zero = {name: weight.detach() == 0 for name, weight in weights_of(net).items()}
    return SparseMasks({name: ~gone for name, gone in zero.items() if bool(gone.any())})


def mark_sparse(net: nn.Module) -> None:
    """Says of a network that its zeros are to stay, in place; copies of it keep the mark."""
    setattr(net, SPARSE_MARK, True)


def weights_of(net: nn.Module) -> dict[str, Tensor]:
    """Returns the weights of all convolutions and linear layers by the layers' names."""
    return {n: m.weight for n, m in net.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)}


def is_depthwise(weight: Tensor) -> bool:
    """Whether each output channel sees one input channel only (also true of a grey stem)."""
    return weight.ndim == 4 and weight.shape[1] == 1


def magnitude_scores(net: nn.Module) -> dict[str, Tensor]:
    """Returns each weight's absolute value."""
    return {name: weight.detach().abs() for name, weight in weights_of(net).items()}


def gradient_scores(
    net: DetectorNet, batches: Iterable[Tensor], times_weight: bool, seed: int = 0
) -> dict[str, Tensor]:
    """Returns how much the outputs that matter change with each weight.

    The root mean square, over random projections of the outputs (``levels.probe_loss``), of the
    gradient ``g``; with ``times_weight`` of the first-order Taylor term ``w * g``, which is what
    removing the weight changes (Molchanov et al., arXiv 1611.06440). No labels are needed. A loss
    of distance to the uncut network would not do: where both are equal its gradient is zero.

    Args:
        net: In eval mode.
        batches: Normalised float32 ``(b, 3, h, w)``.
        times_weight: ``w * g`` instead of ``g``.
        seed: Of the projections.

    Raises:
        ValueError: The network's head is not known.
    """
    generator = torch.Generator().manual_seed(seed)
    weights = weights_of(net)
    square = {name: torch.zeros_like(weight) for name, weight in weights.items()}
    count = 0
    for _ in probe_gradients(net, batches, generator):
        for name, weight in weights.items():
            if weight.grad is not None:
                square[name] += weight.grad.square()
        count += 1
    scores = {name: (total / max(count, 1)).sqrt() for name, total in square.items()}
    if times_weight:
        scores = {name: score * weights[name].detach().abs() for name, score in scores.items()}
    return scores


def keep_largest(scores: Tensor, count: int) -> Tensor:
    """Returns which entries are the ``count`` largest, bool; of equal ones the first stay."""
    order = scores.flatten().argsort(descending=True, stable=True)
    kept = torch.zeros(scores.numel(), dtype=torch.bool, device=scores.device)
    kept[order[:count]] = True
    return kept.reshape(scores.shape)


def keep_per_layer(scores: Scores, sparsity: float, keep_min: float = 0.0) -> Kept:
    """Returns masks in which each layer loses the same part of its weights: the smallest scores.

    Args:
        scores: Of the layers that take part.
        sparsity: Part of each layer's weights to become zero, 0..1.
        keep_min: Each layer keeps at least this part (and one weight), 0..1.
    """
    kept = {}
    for name, score in scores.items():
        size = score.numel()
        kept[name] = keep_largest(score, max(size - round(sparsity * size), least(size, keep_min)))
    return kept


def keep_per_channel(scores: Scores, sparsity: float, keep_min: float = 0.0) -> Kept:
    """Returns masks in which each output channel loses the same part of its weights.

    Weights of two channels differ many times in size where the normalisation is folded into them,
    which says nothing of what they are worth; within a channel sizes can be compared.

    Args:
        scores: Of the layers that take part.
        sparsity: Part of each channel's weights to become zero, 0..1.
        keep_min: Each channel keeps at least this part (and one weight), 0..1.
    """
    kept = {}
    for name, score in scores.items():
        rows = score.flatten(1)
        size = rows.shape[1]
        count = max(size - round(sparsity * size), least(size, keep_min))
        order = rows.argsort(dim=1, descending=True, stable=True)[:, :count]
        mask = torch.zeros_like(rows, dtype=torch.bool)
        mask.scatter_(1, order, torch.ones_like(order, dtype=torch.bool))
        kept[name] = mask.reshape(score.shape)
    return kept


def keep_globally(scores: Scores, sparsity: float, keep_min: float = 0.0) -> Kept:
    """Returns masks without the smallest scores of all layers together.

    Args:
        scores: Of the layers that take part.
        sparsity: Part of all weights to become zero, 0..1; met exactly.
        keep_min: Each layer keeps at least this part (and one weight), 0..1: its largest scores.

    Raises:
        ValueError: ``keep_min`` does not allow so many zeros.
    """
    raised = []
    for score in scores.values():
        safe = keep_largest(score, least(score.numel(), keep_min))
        raised.append(score.double().masked_fill(safe, float("inf")).flatten())
    everything = torch.cat(raised)
    count = len(everything) - round(sparsity * len(everything))
    protected = int(everything.isinf().sum())
    if count < protected:
        most = 1 - protected / len(everything)
        message = f"expected at most {most:.4f} of the weights to become zero, found {sparsity}"
        raise ValueError(message)
    sizes = [score.numel() for score in scores.values()]
    parts = torch.split(keep_largest(everything, count), sizes)
    return {
        name: part.reshape(score.shape)
        for (name, score), part in zip(scores.items(), parts, strict=True)
    }


def keep_above(scores: Scores, limit: Mapping[str, float], keep_min: float = 0.0) -> Kept:
    """Returns masks of the scores that reach their layer's limit.

    Args:
        scores: Of the layers that take part.
        limit: Layer -> smallest score that stays.
        keep_min: Each layer keeps at least this part (and one weight), 0..1: its largest scores.
    """
    return {
        name: (score >= limit[name]) | keep_largest(score, least(score.numel(), keep_min))
        for name, score in scores.items()
    }


def keep_pattern(scores: Scores, count: int, group: int) -> Kept:
    """Returns masks of the ``count`` largest scores among every ``group`` input channels (N:M).

    Groups are counted along the input channels, for each output channel and kernel position apart
    (Mishra et al., arXiv 2104.08378). The last group may be smaller: it counts as filled up with
    zeros.

    Args:
        scores: Of the layers that take part, ``(out, in, ...)``.
        count: N.
        group: M.
    """
    kept = {}
    for name, score in scores.items():
        rows = score.movedim(1, -1)
        inputs = rows.shape[-1]
        filled = nn.functional.pad(rows, (0, -inputs % group), value=-1.0)
        groups = filled.reshape(*rows.shape[:-1], -1, group)
        order = groups.argsort(dim=-1, descending=True, stable=True)
        mask = torch.zeros_like(groups, dtype=torch.bool)
        mask.scatter_(-1, order[..., :count], torch.ones_like(mask[..., :count]))
        kept[name] = mask.flatten(-2)[..., :inputs].movedim(-1, 1).contiguous()
    return kept


def least(size: int, keep_min: float) -> int:
    """Returns how many weights a layer of this size keeps at least."""
    return max(1, int(np.ceil(keep_min * size)))


def cubic(start: float, end: float, rounds: int) -> list[float]:
    """Returns a value per round, from ``start`` (not included) to ``end``: fast first, then slow.

    The schedule of Zhu & Gupta (arXiv 1710.01878): the more is gone, the less goes at once.
    """
    return [end + (start - end) * (1 - step / rounds) ** 3 for step in range(1, rounds)] + [end]


def relative_limits(net: nn.Module, factor: float) -> dict[str, float]:
    """Returns per layer ``factor`` times the root mean square of its weights."""
    return {
        n: factor * float(w.detach().square().mean().sqrt()) for n, w in weights_of(net).items()
    }


def zero_count(net: nn.Module) -> int:
    """Returns how many weights of convolutions and linear layers are zero."""
    return sum(int((weight == 0).sum()) for weight in weights_of(net).values())


def density_by_layer(net: nn.Module) -> dict[str, float]:
    """Returns per layer the part of its weights that is not zero, 0..1."""
    return {n: float((w != 0).float().mean()) for n, w in weights_of(net).items()}


def deflated(data: bytes) -> int:
    """Returns how many bytes zip, gzip or HTTP make of a file at their strongest (zlib level 9)."""
    return len(zlib.compress(data, 9))


def int8_weights(net: nn.Module) -> bytes:
    """Returns all weights as one symmetric 8-bit code each, a zero as code 0.

    On the scale per output channel that ``quantize`` begins with; scales and biases, which both
    files hold alike, are not among them.
    """
    codes = []
    for weight in weights_of(net).values():
        flat = weight.detach().cpu().float().flatten(1).numpy()
        scales = weight_scales(flat, np.full(len(flat), 1e-8, np.float32))
        codes.append(np.clip(np.rint(flat / scales[:, None]), -127, 127).astype(np.int8).tobytes())
    return b"".join(codes)
