"""Who the student learns from: the uncut network, any ONNX detector, or several of them.

There are two kinds of teacher. A *twin* has raw maps that mean what the student's mean (the uncut
network, or a larger one with the same head and input): they are compared cell by cell, and so are
features of the same name. Any other is a *stranger*, another architecture or another input size:
the boxes that strangers find in each augmented picture are fused and learned from as soft labels,
and where a stranger's cells can be read, what it says in each of them is learned from, too.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn

from ..models.dataset import map_classes
from ..models.detections import Detections, IntArray
from ..models.detector import OnnxDetector, decode
from ..models.errors import DatasetError, RecipeError
from ..models.nets.common import DetectorNet
from ..models.preprocess import Image
from ..models.spec import ModelSpec
from .assign import Targets, label_loss, read_cells
from .chain import whole_name
from .data import TEACHER_SCORE
from .dense import dense_loss, resample
from .distill import Adapters, FeatureTap, feature_loss, output_loss
from .fuse import fuse_boxes
from .levels import layout_of
from .photos import Batch, View

SCORE_MIN = 0.2
"""Boxes of a single detector below this score are not fused with others'."""
SAME_MAPS = (
    "head", "input_hw", "classes", "color", "mean", "std", "resize", "pad_value", "strides",
    "reg_max",
)  # fmt: skip
"""Fields of a spec that a twin shares with the student."""

Term = tuple[str, Tensor]


@dataclass(frozen=True)
class Seen:
    """What the student makes of a batch.

    Attributes:
        output: Its raw maps, float32, finest first.
        features: What its dense convolutions gave, by name.
    """

    output: list[Tensor]
    features: dict[str, Tensor]


class Guide(Protocol):
    """What the training loop asks of teachers."""

    @property
    def adapters(self) -> nn.Module | None:
        """What is trained along and dropped at the end; known after ``begin``."""

    @property
    def views(self) -> tuple[ModelSpec, ...]:
        """Specs of what it wants to see of each picture beside the student's input."""

    def describe(self) -> list[str]:
        """Returns what its lessons depend on, to tell one run from another."""

    def begin(self, student: DetectorNet, device: torch.device, seed: int) -> None:
        """Gets ready for this student."""

    def look(self, images: Tensor, views: Sequence[View]) -> object:
        """Returns what it makes of a batch; called without gradient."""

    def terms(
        self, student: DetectorNet, seen: Seen, goal: object, batch: Batch, temperature: float
    ) -> list[Term]:
        """Returns the terms of the loss by the names of ``LossWeights``; like ones are averaged."""

    def close(self) -> None:
        """Lets go of what ``begin`` took."""


class Twin:
    """A teacher whose raw maps mean what the student's do.

    Args:
        net: The teacher; copied.
        rows: Conv name -> its output channels that the student still has.
        features: Compare convolutions of the same name.
        name: What to call it.
    """

    views: tuple[ModelSpec, ...] = ()

    def __init__(
        self,
        net: DetectorNet,
        rows: dict[str, Tensor] | None = None,
        features: bool = True,
        name: str = "self",
    ) -> None:
        self.net = copy.deepcopy(net).eval()
        self.adapters: Adapters | None = None
        self._rows, self._features, self._name = rows or {}, features, name
        self._tap: FeatureTap | None = None

    def describe(self) -> list[str]:
        """Returns its name and the channels that are left of it."""
        kept = sorted((name, index.tolist()) for name, index in self._rows.items())
        return [self._name, str(kept), str(self._features)]

    def begin(self, student: DetectorNet, device: torch.device, seed: int) -> None:
        """Gets ready for this student; makes adapters where layers differ in width."""
        self.net.to(device).to(memory_format=torch.channels_last)
        if not self._features:
            return
        self._tap = FeatureTap(self.net, {n: r.to(device) for n, r in self._rows.items()})
        widths = self._widths(student)
        self.adapters = Adapters(widths, seed).to(device) if widths else None

    def _widths(self, student: DetectorNet) -> dict[str, tuple[int, int]]:
        """Returns layers of the same name whose widths differ: the student's and the teacher's."""
        own = {whole_name(n): m for n, m in self.net.named_modules() if isinstance(m, nn.Conv2d)}
        widths = {}
        for place, conv in student.named_modules():
            name = whole_name(place)
            if not isinstance(conv, nn.Conv2d) or conv.groups != 1 or name not in own:
                continue
            theirs = len(self._rows[name]) if name in self._rows else own[name].out_channels
            if own[name].groups == 1 and theirs != conv.out_channels:
                widths[name] = (conv.out_channels, theirs)
        return widths

    def look(self, images: Tensor, views: Sequence[View]) -> list[Tensor]:
        """Returns its raw maps."""
        return [level.float() for level in self.net(images)]

    def terms(
        self, student: DetectorNet, seen: Seen, goal: object, batch: Batch, temperature: float
    ) -> list[Term]:
        """Returns the terms ``scores``, ``boxes`` and ``features``."""
        assert isinstance(goal, list)
        scores, boxes = output_loss(student, seen.output, goal, temperature)
        if self._tap is None:
            return [("scores", scores), ("boxes", boxes)]
        ours = seen.features if self.adapters is None else self.adapters(seen.features)
        features = feature_loss(ours, self._tap.take())
        return [("scores", scores), ("boxes", boxes), ("features", features)]

    def close(self) -> None:
        """Stops listening to features."""
        if self._tap is not None:
            self._tap.close()


@dataclass(frozen=True)
class Stranger:
    """A teacher of another kind, with its own input and classes.

    Attributes:
        name: What to call it.
        digest: SHA-256 of its file.
        spec: Of what ``infer`` takes.
        net: Its network, where cells can be read.
        detector: Its file in ONNX Runtime, where they cannot.
        to_student: int64, its class -> the student's, or -1.
    """

    name: str
    digest: str
    spec: ModelSpec
    net: DetectorNet | None
    detector: OnnxDetector | None
    to_student: IntArray

    def outputs(self, inputs: Tensor) -> tuple[list[Tensor], list[list[np.ndarray]]]:
        """Returns its raw maps (none without a network), and its file's outputs per picture."""
        if self.net is None:
            assert self.detector is not None
            return [], [self.detector.infer(one[None].numpy()) for one in inputs]
        device = next(self.net.parameters()).device
        images = inputs.to(device, memory_format=torch.channels_last)
        levels = [level.float() for level in self.net(images)]
        with torch.autocast("cpu", enabled=False):  # boxes need all their digits
            made = self.net.tail([level.cpu() for level in levels])
        parts = made if isinstance(made, tuple) else (made,)
        flat = [part.float().numpy() for part in parts]
        return levels, [[part[i : i + 1] for part in flat] for i in range(len(inputs))]


@dataclass(frozen=True)
class _Opinion:
    """What strangers make of a batch: boxes per picture, and raw maps (none if not readable)."""

    boxes: list[Detections]
    levels: list[list[Tensor]]


class Panel:
    """One or more strangers who teach together.

    Args:
        members: The strangers.
        student: The student's spec.
    """

    adapters: nn.Module | None = None

    def __init__(self, members: Sequence[Stranger], student: ModelSpec) -> None:
        self.members, self._student = tuple(members), student
        self.views = tuple(m.spec for m in members)
        self._voters = voters([m.to_student for m in members], len(student.classes))
        # Where no box is found, a member whose cells are read says itself how sure it is of none.
        read = any(m.net is not None for m in members)
        self._silent = torch.from_numpy((self._voters > 0) & (not read))

    def describe(self) -> list[str]:
        """Returns the files and what they are given."""
        return [text for m in self.members for text in (m.digest, m.spec.to_json())]

    def begin(self, student: DetectorNet, device: torch.device, seed: int) -> None:
        """Moves the networks to the device."""
        for member in self.members:
            if member.net is not None:
                member.net.eval().to(device).to(memory_format=torch.channels_last)
        self._silent = self._silent.to(device)

    def look(self, images: Tensor, views: Sequence[View]) -> _Opinion:
        """Returns the boxes and cells that the members see."""
        found: list[list[Detections]] = [[] for _ in images]
        maps: list[list[Tensor]] = []
        for member, view in zip(self.members, views, strict=True):
            levels, outputs = member.outputs(view.inputs)
            for boxes, raw, place in zip(found, outputs, view.placements, strict=True):
                seen = decode(raw, member.spec, place, SCORE_MIN)
                boxes.append(renumbered(seen, member.to_student))
            maps.append(levels)
        return _Opinion([agree(boxes, self._voters, TEACHER_SCORE) for boxes in found], maps)

    def terms(
        self, student: DetectorNet, seen: Seen, goal: object, batch: Batch, temperature: float
    ) -> list[Term]:
        """Returns the terms ``scores`` and ``boxes`` of each readable member, and ``found``."""
        assert isinstance(goal, _Opinion)
        device = seen.output[0].device
        ours = read_cells(student, seen.output)
        result: list[Term] = []
        for member, view, levels in zip(self.members, batch.views, goal.levels, strict=True):
            if member.net is None:
                continue
            theirs = np.flatnonzero(member.to_student >= 0)
            columns = torch.from_numpy(theirs).to(device)
            mine = torch.from_numpy(member.to_student[theirs]).to(device)
            theirs_here = read_cells(member.net, levels), _shapes(levels), view.placements
            ours_here = ours, _shapes(seen.output), batch.placements
            dense = resample(*theirs_here, columns, *ours_here)
            scores, boxes = dense_loss(ours, mine, dense, temperature)
            result += [("scores", scores), ("boxes", boxes)]
        targets = [
            _targets(found, place.to_input(found.xyxy), device)
            for found, place in zip(goal.boxes, batch.placements, strict=True)
        ]
        scores, boxes = label_loss(student, seen.output, targets, self._silent)
        return [*result, ("found", scores + boxes)]

    def close(self) -> None:
        """Nothing to let go of."""


class FusedDetector:
    """Several detectors as one, with the student's classes.

    Args:
        members: Detectors, and their classes as the student's numbers (-1: none).
        spec: The student's; of the classes.
    """

    def __init__(self, members: Sequence[tuple[OnnxDetector, IntArray]], spec: ModelSpec) -> None:
        self.spec = spec
        self._members = members
        self._voters = voters([table for _, table in members], len(spec.classes))

    def __call__(self, image: Image, score_min: float = 0.05, limit: int = 100) -> Detections:
        """Detects in one BGR picture, uint8 ``(height, width, 3)``."""
        found = []
        for detector, table in self._members:
            one = detector(image, min(score_min, SCORE_MIN), limit)
            found.append(renumbered(one, table))
        return agree(found, self._voters, score_min)[:limit]


def _shapes(levels: Sequence[Tensor]) -> list[tuple[int, int]]:
    return [(level.shape[2], level.shape[3]) for level in levels]


def _targets(found: Detections, xyxy: np.ndarray, device: torch.device) -> Targets:
    large = (xyxy[:, 2:] - xyxy[:, :2]).min(1, initial=np.inf) > 2
    columns = (xyxy[large], found.label[large], found.score[large])
    return Targets(*(torch.from_numpy(np.array(c)).to(device) for c in columns))


def renumbered(found: Detections, to_student: IntArray) -> Detections:
    """Returns detections with the student's class numbers; others are dropped.

    Args:
        found: By a teacher.
        to_student: int64, its class -> the student's, or -1.
    """
    label = to_student[found.label]
    kept = label >= 0
    return Detections(found.xyxy[kept], found.score[kept], label[kept])


def voters(tables: Sequence[IntArray], classes: int) -> IntArray:
    """Returns how many teachers know each of the student's classes, int64 ``(classes,)``."""
    counts = np.zeros(classes, np.int64)
    for table in tables:
        counts[np.unique(table[table >= 0])] += 1
    return counts


def agree(found: Sequence[Detections], known: IntArray, score_min: float) -> Detections:
    """Returns what detectors see together, fused if there are several, above a score."""
    together = found[0] if len(found) == 1 else fuse_boxes(found, known)
    return together.above(score_min)


def class_table(name: str, theirs: Sequence[str], student: Sequence[str]) -> IntArray:
    """Returns the student's number of each class of a teacher, int64; -1 where it has none.

    Raises:
        RecipeError: They share no class.
    """
    try:
        shared = map_classes(theirs, student)
    except DatasetError as error:
        message = f"distill.teacher: {name} and the detector share no class: {error}"
        raise RecipeError(message) from error
    number = np.full(len(shared.names), -1, np.int64)
    for ours in range(len(student) - 1, -1, -1):
        if shared.from_data[ours] >= 0:
            number[shared.from_data[ours]] = ours
    return np.where(shared.from_model >= 0, number[np.maximum(shared.from_model, 0)], -1)


def is_twin(theirs: ModelSpec, student: ModelSpec) -> bool:
    """Returns whether raw maps of two detectors mean the same, for the same input."""
    return all(getattr(theirs, key) == getattr(student, key) for key in SAME_MAPS)


def readable(net: DetectorNet) -> bool:
    """Returns whether the cells of a network's raw maps can be read."""
    try:
        return layout_of(net).learns_boxes
    except ValueError:
        return False
