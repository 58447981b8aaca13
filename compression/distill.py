"""Distillation of detectors: what the student should match in the teacher, cell by cell.

All terms are zero for equal networks. Scores are compared as yes/no probabilities (Kullback-Leibler
divergence of Bernoulli variables, taken on log-sigmoids), a classifier's as one choice (on
log-softmaxes), box distributions by their divergence (localisation distillation, arXiv 2102.12252;
on log-softmaxes), offsets by their distance, and the outputs of all dense convolutions by their
error relative to the teacher's variance. Cells count by how sure teacher or student is of an object
there, so that background does not drown the objects.

A temperature above 1 softens both sides of a divergence; it is then multiplied by the temperature's
square, so that gradients keep their size (Hinton et al., arXiv 1503.02531).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..models.nets.common import DetectorNet
from . import parallel
from .chain import whole_name
from .levels import take_apart


@dataclass(frozen=True)
class LossWeights:
    """Weight of each term of the distillation loss.

    Attributes:
        scores: Of what the teachers score in each cell.
        boxes: Of where they see its box.
        features: Of what they compute on the way.
        labels: Of the photos' boxes.
        found: Of the boxes that teachers of another kind find in each augmented picture.
    """

    scores: float = 1.0
    boxes: float = 1.0
    features: float = 1.0
    labels: float = 0.5
    found: float = 0.5


def bernoulli_divergence(
    student_logits: Tensor, teacher_logits: Tensor, temperature: float = 1.0
) -> Tensor:
    """Returns the divergence of each yes/no question, same shape; zero where both agree."""
    ours, goal = _soft(student_logits, temperature), _soft(teacher_logits, temperature)
    p = goal.sigmoid()
    yes = p * (F.logsigmoid(goal) - F.logsigmoid(ours))
    no = (1 - p) * (F.logsigmoid(-goal) - F.logsigmoid(-ours))
    return (yes + no) * temperature**2


def softmax_divergence(
    student_logits: Tensor, teacher_logits: Tensor, dim: int, temperature: float = 1.0
) -> Tensor:
    """Returns the divergence of each choice among the entries of ``dim``, which falls away."""
    ours = _soft(student_logits, temperature).log_softmax(dim)
    goal = _soft(teacher_logits, temperature).log_softmax(dim)
    return (goal.exp() * (goal - ours)).sum(dim) * temperature**2


def _soft(logits: Tensor, temperature: float) -> Tensor:
    """Returns logits at a temperature; at 1 they are untouched, so that sums keep their order."""
    return logits if temperature == 1 else logits / temperature


def output_loss(
    net: DetectorNet,
    student: Sequence[Tensor],
    teacher: Sequence[Tensor],
    temperature: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Returns the score term and the box term of a batch of raw maps, each a scalar."""
    scores = student[0].new_zeros(())
    boxes = student[0].new_zeros(())
    total = student[0].new_zeros(())
    for mine, theirs in zip(student, teacher, strict=True):
        ours, goal = take_apart(net, mine), take_apart(net, theirs)
        weight = torch.maximum(ours.confidence, goal.confidence).square()
        if ours.choice:
            divergence = softmax_divergence(ours.logits, goal.logits, 1, temperature)[:, None]
        else:
            divergence = bernoulli_divergence(ours.logits, goal.logits, temperature)
        scores = scores + (divergence * weight).sum()
        sure = goal.confidence.square()
        if goal.bins:
            b, _, h, w = goal.boxes.shape
            shape = (b, 4, goal.bins, h, w)
            bins, goal_bins = ours.boxes.reshape(shape), goal.boxes.reshape(shape)
            divergence = softmax_divergence(bins, goal_bins, 2, temperature)
            boxes = boxes + (divergence * sure).sum()
        else:
            boxes = (
                boxes + (F.smooth_l1_loss(ours.boxes, goal.boxes, reduction="none") * sure).sum()
            )
        total = total + sure.sum()
    total = parallel.total(total).clamp_min(1e-6)
    return scores / total, boxes / total


class FeatureTap:
    """Keeps the outputs of the dense convolutions of one forward pass.

    Args:
        net: The network to listen to.
        rows: Conv name -> int64 indices of the output channels to keep (all if missing).
    """

    def __init__(self, net: nn.Module, rows: dict[str, Tensor] | None = None) -> None:
        self.features: dict[str, Tensor] = {}
        self._rows = rows or {}
        self._handles: list[RemovableHandle] = [
            m.register_forward_hook(lambda m, i, o, name=n: self._keep(name, o))
            for n, m in net.named_modules()
            if isinstance(m, nn.Conv2d) and m.groups == 1
        ]

    def _keep(self, name: str, y: Tensor) -> None:
        name = whole_name(name)
        self.features[name] = y[:, self._rows[name]] if name in self._rows else y

    def take(self) -> dict[str, Tensor]:
        """Returns the features since the last call."""
        features, self.features = self.features, {}
        return features

    def close(self) -> None:
        """Stops listening."""
        for handle in self._handles:
            handle.remove()


class Adapters(nn.Module):
    """1x1 convolutions that bring features of the student to the teacher's width (FitNets).

    They are trained along with the student and dropped at the end (Romero et al., arXiv
    1412.6550).

    Args:
        widths: Layer -> channels of the student and of the teacher.
        seed: Of the first weights.
    """

    def __init__(self, widths: Mapping[str, tuple[int, int]], seed: int = 0) -> None:
        super().__init__()
        self.names = tuple(widths)
        self.convs = nn.ModuleList(nn.Conv2d(*pair, 1) for pair in widths.values())
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for conv, (width, _) in zip(self.convs, widths.values(), strict=True):
                assert isinstance(conv, nn.Conv2d)
                assert conv.bias is not None
                nn.init.normal_(conv.weight, std=width**-0.5, generator=generator)
                nn.init.zeros_(conv.bias)

    def forward(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
        """Returns the features by name; those of other widths ``(b, teacher's, h, w)``."""
        wider = {
            n: conv(features[n].float()) for n, conv in zip(self.names, self.convs, strict=True)
        }
        return features | wider


def feature_loss(student: dict[str, Tensor], teacher: dict[str, Tensor]) -> Tensor:
    """Returns the mean over layers of error energy relative to the teacher's variance.

    Layers correspond by name; those of another shape are left out.
    """
    terms = []
    for name, goal in teacher.items():
        if name in student and student[name].shape == goal.shape:
            goal = goal.float()
            error = F.mse_loss(student[name].float(), goal)
            terms.append(error / parallel.variance(goal).clamp_min(1e-6))
    return torch.stack(terms).mean() / parallel.count() if terms else torch.zeros(())
