"""Distillation of detectors: what the student should match in the teacher, cell by cell.

All terms are zero for equal networks. Scores are compared as yes/no probabilities (Kullback-Leibler
divergence of Bernoulli variables, taken on log-sigmoids), box distributions by their divergence
(localisation distillation, arXiv 2102.12252), offsets by their distance, and the outputs of all
dense convolutions by their error relative to the teacher's variance. Cells count by how sure
teacher or student is of an object there, so that background does not drown the objects.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..models.nets.common import DetectorNet
from .levels import take_apart


@dataclass(frozen=True)
class LossWeights:
    """Weight of each term of the distillation loss."""

    scores: float = 1.0
    boxes: float = 1.0
    features: float = 1.0
    labels: float = 0.5


def bernoulli_divergence(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """Returns the divergence of each yes/no question, same shape; zero where both agree."""
    p = teacher_logits.sigmoid()
    yes = p * (F.logsigmoid(teacher_logits) - F.logsigmoid(student_logits))
    no = (1 - p) * (F.logsigmoid(-teacher_logits) - F.logsigmoid(-student_logits))
    return yes + no


def output_loss(
    net: DetectorNet, student: Sequence[Tensor], teacher: Sequence[Tensor]
) -> tuple[Tensor, Tensor]:
    """Returns the score term and the box term of a batch of raw maps, each a scalar."""
    scores = student[0].new_zeros(())
    boxes = student[0].new_zeros(())
    total = student[0].new_zeros(())
    for mine, theirs in zip(student, teacher, strict=True):
        ours, goal = take_apart(net, mine), take_apart(net, theirs)
        weight = torch.maximum(ours.confidence, goal.confidence).square()
        scores = scores + (bernoulli_divergence(ours.logits, goal.logits) * weight).sum()
        sure = goal.confidence.square()
        if goal.bins:
            b, _, h, w = goal.boxes.shape
            shape = (b, 4, goal.bins, h, w)
            mine_log = ours.boxes.reshape(shape).log_softmax(2)
            goal_log = goal.boxes.reshape(shape).log_softmax(2)
            divergence = (goal_log.exp() * (goal_log - mine_log)).sum(2)
            boxes = boxes + (divergence * sure).sum()
        else:
            boxes = (
                boxes + (F.smooth_l1_loss(ours.boxes, goal.boxes, reduction="none") * sure).sum()
            )
        total = total + sure.sum()
    total = total.clamp_min(1e-6)
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
        self.features[name] = y[:, self._rows[name]] if name in self._rows else y

    def take(self) -> dict[str, Tensor]:
        """Returns the features since the last call."""
        features, self.features = self.features, {}
        return features

    def close(self) -> None:
        """Stops listening."""
        for handle in self._handles:
            handle.remove()


def feature_loss(student: dict[str, Tensor], teacher: dict[str, Tensor]) -> Tensor:
    """Returns the mean over layers of error energy relative to the teacher's variance."""
    terms = []
    for name, goal in teacher.items():
        if name in student and student[name].shape == goal.shape:
            goal = goal.float()
            error = F.mse_loss(student[name].float(), goal)
            terms.append(error / goal.var().clamp_min(1e-6))
    return torch.stack(terms).mean() if terms else torch.zeros(())
