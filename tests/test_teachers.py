"""Teachers of another kind: what they see arrives in the student's cells and classes."""

from __future__ import annotations

import runpy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from edgesight.compression import photos as compression_photos
from edgesight.compression.assign import giou, read_cells
from edgesight.compression.dense import Dense, dense_loss, resample, shown_logits
from edgesight.compression.photos import Batch, PhotoStream
from edgesight.compression.recipe import ModelSource
from edgesight.compression.source import enter
from edgesight.compression.teachers import (
    Panel,
    Seen,
    Stranger,
    Twin,
    class_table,
    is_twin,
)
from edgesight.compression.train import TrainConfig, train
from edgesight.models.heads import HEADS, grid_hw
from edgesight.models.nets.common import DetectorNet
from edgesight.models.nets.yolox import YOLOX
from edgesight.models.preprocess import Placement, fit
from edgesight.models.spec import ModelSpec
from edgesight.models.zoo import shipped_float
from torch import Tensor, nn

kit: Any = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("prune_kit.py"))))
pytestmark = pytest.mark.usefixtures("one_thread")
CLASSES = ("person", "cat")
PICTURE_WH = (200, 100)
BOX = np.array([[60.0, 20.0, 124.0, 68.0]], np.float32)


def net_of(head: str) -> Any:
    return SimpleNamespace(spec_head=head, strides=HEADS[head].strides, num_classes=2)


def spec_of(head: str, input_hw: tuple[int, int], resize: str) -> ModelSpec:
    return ModelSpec(head, input_hw, CLASSES, strides=HEADS[head].strides, resize=resize)


def place_in(spec: ModelSpec) -> Placement:
    return fit(np.zeros((PICTURE_WH[1], PICTURE_WH[0], 3), np.uint8), spec)[1]


def maps(head: str, spec: ModelSpec, sure: float = 4.0) -> list[Tensor]:
    """Raw maps of a network that sees one cat at ``BOX``, in the cells around its middle."""
    box = torch.from_numpy(place_in(spec).to_input(BOX))[0]
    middle = (box[:2] + box[2:]) / 2
    levels = []
    for number, stride in enumerate(spec.strides):
        rows, columns = grid_hw(spec.input_hw, stride)
        level = torch.full((1, 7 if head == "yolox" else 34, rows, columns), -8.0)
        offset = 0.0 if head == "nanodet_plus" else 0.5
        y, x = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
        centre = (torch.stack([x, y], -1) + offset) * stride
        away = ((centre - middle) / stride).square().sum(-1)
        near = torch.full_like(away, number == 1, dtype=torch.bool)
        logit = (sure - 1.5 * away).clamp_min(-8.0)[near]
        if head == "yolox":
            level[0, 4:][:, near] = torch.stack([logit, -8 + 0 * logit, logit])
            cell = torch.stack([x, y], -1)
            level[0, :2] = (middle / stride - cell).permute(2, 0, 1)
            level[0, 2:4] = ((box[2:] - box[:2]) / stride).log()[:, None, None]
        else:
            level[0, 1][near] = logit
            sides = torch.cat([centre - box[:2], box[2:] - centre], -1) / stride
            bins = torch.arange(8.0)
            # two neighbouring bins, as the distribution focal loss wants them
            part = (1 - (sides[..., None].clamp(0, 7) - bins).abs()).clamp_min(1e-9).log()
            level[0, 2:] = part.flatten(2).permute(2, 0, 1)
        levels.append(level)
    return levels


KINDS = [
    ("yolox", (96, 128), "letterbox_topleft"),
    ("yolox", (160, 160), "letterbox_center"),
    ("nanodet_plus", (128, 160), "stretch"),
]


def scale(spec: ModelSpec) -> float:
    return float(np.sqrt(np.prod(place_in(spec).scale_xy)))


def brought(teacher: tuple[Any, ...], student: tuple[Any, ...], sure: float = 4.0) -> Any:
    """What a teacher says in the student's cells, and those cells."""
    theirs, ours = spec_of(*teacher), spec_of(*student)
    cells = read_cells(net_of(student[0]), maps(student[0], ours, sure))
    levels = maps(teacher[0], theirs)
    return asked(read_cells(net_of(teacher[0]), levels), theirs, cells, ours), cells, ours


def asked(teacher: Any, theirs: ModelSpec, student: Any, ours: ModelSpec) -> Any:
    """What a teacher's cells say in the student's cells, of both classes."""
    return resample(
        teacher,
        [grid_hw(theirs.input_hw, s) for s in theirs.strides],
        [place_in(theirs)],
        torch.tensor([0, 1]),
        student,
        [grid_hw(ours.input_hw, s) for s in ours.strides],
        [place_in(ours)],
    )


@pytest.mark.parametrize("student", KINDS)
@pytest.mark.parametrize("teacher", KINDS)
def test_a_teachers_cells_arrive_where_the_object_is(teacher: Any, student: Any) -> None:
    """NanoDet-Plus into YOLOX and back, and from larger and smaller inputs."""
    goal, cells, ours = brought(teacher, student)
    score = goal.score[0]
    best = int(score[:, 1].argmax())
    assert score[best, 1] > 0.8
    assert score[:, 0].max() < 0.1
    box = place_in(ours).to_input(BOX)[0]
    np.testing.assert_allclose(goal.boxes[0, best].numpy(), box, atol=0.6)
    middle = (box[:2] + box[2:]) / 2
    stride = float(cells.stride[best])
    assert np.abs(cells.centre[best].numpy() - middle).max() <= 2.5 * stride
    ratio = stride / 16 * scale(spec_of(*teacher)) / scale(ours)
    assert 2**-0.51 < ratio < 2**0.51, "cells of about the same size in the picture"
    inside = goal.inside[0].bool()
    width, height = place_in(ours).to_input(np.array([[0, 0, *PICTURE_WH]], np.float32))[0, 2:]
    if ours.resize == "letterbox_topleft":
        outside = (cells.centre[:, 0] > width + 1) | (cells.centre[:, 1] > height + 1)
        assert outside.any()
        assert not inside[outside].any()
        assert inside[~outside & (cells.centre < torch.tensor([width, height]) - 1).all(1)].all()


@pytest.mark.parametrize("kind", KINDS)
def test_no_loss_for_who_says_the_same(kind: Any) -> None:
    goal, cells, _ = brought(kind, kind)
    scores, boxes = dense_loss(cells, torch.tensor([0, 1]), goal)
    assert float(scores) == pytest.approx(0, abs=1e-4)
    assert float(boxes) == pytest.approx(0, abs=1e-4)
    for change, by in (("score", -0.3), ("boxes", 3.0)):
        other = Dense(**{**vars(goal), change: (getattr(goal, change) + by).clamp_min(1e-3)})
        terms = [float(term) for term in dense_loss(cells, torch.tensor([0, 1]), other)]
        assert max(terms) > 0.01


def test_another_heads_score_of_nothing_is_not_learned() -> None:
    """NanoDet-Plus says 0.1 of every class in empty cells; a YOLOX student's background stays."""
    teacher, student = KINDS[2], KINDS[0]
    theirs, ours = spec_of(*teacher), spec_of(*student)
    levels = maps("nanodet_plus", theirs)
    for level in levels:
        level[:, :2] = level[:, :2].clamp_min(-2.2)  # a floor of 0.1
    student_maps = [m.requires_grad_() for m in maps("yolox", ours)]
    cells = read_cells(net_of("yolox"), student_maps)
    goal = asked(read_cells(net_of("nanodet_plus"), levels), theirs, cells, ours)
    assert goal.score.median() < 0.01
    assert goal.score.max() > 0.8
    sum(dense_loss(cells, torch.tensor([0, 1]), goal)).backward()
    coarse = student_maps[2].grad
    assert coarse is not None
    assert float(coarse[:, 4:].abs().max()) < 1e-3, "nobody sees anything at this level"
    learned = [m.grad for m in student_maps]
    assert max(float(g[:, 6].abs().max()) for g in learned if g is not None) > 1e-2


def test_a_confident_miss_costs_more_than_another_kind_of_head() -> None:
    teacher, student = ("nanodet_plus", (96, 160), "stretch"), KINDS[1]
    losses = []
    for sure in (4.0, -8.0):
        goal, cells, _ = brought(teacher, student, sure)
        losses.append(float(dense_loss(cells, torch.tensor([0, 1]), goal)[0]))
    assert losses[1] > 3 * losses[0]


def test_the_shown_score_is_objectness_times_class() -> None:
    cells = read_cells(net_of("yolox"), maps("yolox", spec_of(*KINDS[0])))
    generator = torch.Generator().manual_seed(0)
    o, c = (torch.randn(1, 5, k, generator=generator) * 3 for k in (1, 2))
    made = SimpleNamespace(objectness=o[..., 0], logits=c)
    wanted = (o.sigmoid() * c.sigmoid()).logit()
    torch.testing.assert_close(shown_logits(made), wanted)  # type: ignore[arg-type]
    extreme = SimpleNamespace(
        objectness=torch.full((1, 1), -200.0), logits=torch.full((1, 1, 1), 90.0)
    )
    assert torch.isfinite(shown_logits(extreme)).all()  # type: ignore[arg-type]
    assert shown_logits(cells).shape == cells.logits.shape


def test_who_is_a_twin() -> None:
    spec = spec_of(*KINDS[0])
    assert is_twin(spec.with_changes(name="other", nms_iou=0.5), spec)
    for change in ({"input_hw": (64, 64)}, {"classes": ("cat", "person")}, {"color": "rgb"}):
        assert not is_twin(spec.with_changes(**change), spec)


class Net(kit.Folded):  # type: ignore[misc]
    """YOLOX's head on a few convolutions, sure of things here and there."""

    def __init__(self, width: int = 16, seed: int = 0) -> None:
        torch.manual_seed(seed)
        super().__init__(width)
        self.eval()
        with torch.no_grad():
            for last in self.last:
                last.weight.mul_(4)

    def tail(self, levels: list[Tensor]) -> Tensor:
        """Return [B, N, 7], as YOLOX's file has it."""
        tail: Tensor = YOLOX.tail(self, levels)  # type: ignore[arg-type]
        return tail


def config(**changes: Any) -> TrainConfig:
    return TrainConfig(
        **{"photos": 48, "batch": 4, "rate": 1e-2, "save_s": 1e9, "mixed": False, **changes}
    )


STUDENT = ModelSpec("yolox", (64, 64), CLASSES, mean=(114.0,) * 3, std=(60.0,) * 3)


def weights(net: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in net.parameters()]


def stranger(net: DetectorNet, input_hw: tuple[int, int]) -> Stranger:
    spec = STUDENT.with_changes(input_hw=input_hw, resize="stretch")
    return Stranger("t", "t", spec, net, None, np.array([0, 1]))


def gap(net: DetectorNet, panel: Panel, stream: PhotoStream) -> dict[str, float]:
    """The terms of the loss on a batch that was not trained on."""
    batch: Batch = stream.make(99)
    panel.begin(net, torch.device("cpu"), 0)
    with torch.no_grad():
        goal = panel.look(batch.images, batch.views)
        terms = panel.terms(net, Seen(net(batch.images), {}), goal, batch, 1.0)
    return {name: float(term) for name, term in terms}


def test_a_student_learns_from_a_net_with_a_larger_input(
    photos: list[Path], tmp_path: Path
) -> None:
    member = stranger(Net(24, 5), (96, 128))
    panel = Panel([member], STUDENT)
    stream = PhotoStream(photos, STUDENT, 4, views=panel.views)
    net = Net(16, 1)
    before = gap(net, panel, stream)
    assert set(before) == {"scores", "boxes", "found"}
    net = train(net, [panel], stream, config(photos=320), tmp_path / "c.pt", progress=False)
    after = gap(net, panel, stream)
    assert after["scores"] < 0.7 * before["scores"]
    assert after["boxes"] < 0.9 * before["boxes"]


def test_resumed_with_adapters_to_the_bit(photos: list[Path], tmp_path: Path) -> None:
    def run(file: str, limit: int | None = None) -> DetectorNet:
        net = Net(16, 1)
        guides = [
            Twin(Net(24), name="wide"),
            Panel([stranger(Net(seed=3), (96, 96))], STUDENT),
        ]
        stream = PhotoStream(photos, STUDENT, 4, views=guides[1].views)
        if limit is not None:
            make = stream.make

            def made(step: int) -> Batch:
                if step == limit:
                    raise KeyboardInterrupt
                return make(step)

            stream.make = made  # type: ignore[method-assign]
        return train(net, guides, stream, config(), tmp_path / file, progress=False)

    torch.manual_seed(0)
    whole = run("whole.pt")
    torch.manual_seed(0)
    with pytest.raises(KeyboardInterrupt):
        run("part.pt", 5)
    saved = torch.load(tmp_path / "part.pt", weights_only=True)
    assert saved["step"] == 5
    assert len(saved["adapters"]) == 2 * 4, "stem and down differ in width, the heads do not"
    torch.manual_seed(0)
    resumed = run("part.pt")
    assert all(torch.equal(a, b) for a, b in zip(weights(whole), weights(resumed), strict=True))
    assert {n for n, _ in resumed.named_parameters()} == {n for n, _ in Net().named_parameters()}


def test_classes_that_no_teacher_knows_are_left_alone(photos: list[Path]) -> None:
    full, half = (
        Panel(
            [Stranger("t", "t", STUDENT, Net(seed=5), None, np.array(table))],
            STUDENT,
        )
        for table in ([0, 1], [-1, 1])
    )
    touched = []
    for panel in (full, half):
        net = Net(seed=1)
        stream = PhotoStream(photos, STUDENT, 4, views=panel.views)
        batch = stream.make(0)
        panel.begin(net, torch.device("cpu"), 0)
        with torch.no_grad():
            goal = panel.look(batch.images, batch.views)
        output = net(batch.images)
        loss = sum(t for _, t in panel.terms(net, Seen(output, {}), goal, batch, 1.0))
        gradients = torch.autograd.grad(loss, output)
        touched.append([max(float(g[:, c].abs().max()) for g in gradients) for c in (5, 6)])
    assert min(touched[0]) > 0
    assert touched[1][0] == 0
    assert touched[1][1] > 0


def agreement(
    teacher: ModelSource, student: ModelSource, teacher_hw: Any, photos: list[Path]
) -> float:
    """Overlap of the boxes of two real detectors in the student's cells where both are sure."""
    theirs, ours = enter(teacher), enter(student)
    spec = theirs.spec.with_changes(input_hw=teacher_hw or theirs.spec.input_hw)
    table = class_table("t", spec.classes, ours.spec.classes)
    panel = Panel([Stranger("t", "t", spec, theirs.net, None, table)], ours.spec)
    stream = PhotoStream(photos, ours.spec, len(photos), views=panel.views)
    batch = stream.make(0)
    with torch.no_grad():
        goal = panel.look(batch.images, batch.views)
        cells = read_cells(ours.net, ours.net(batch.images))
        levels = goal.levels[0]
        shapes = [(level.shape[2], level.shape[3]) for level in levels]
        our_shapes = [(m.shape[2], m.shape[3]) for m in ours.net(batch.images)]
        columns = torch.from_numpy(np.flatnonzero(table >= 0))
        dense = resample(
            read_cells(theirs.net, levels), shapes, batch.views[0].placements, columns,
            cells, our_shapes, batch.placements,
        )  # fmt: skip
        mine = shown_logits(cells)[..., torch.from_numpy(table[columns.numpy()])].sigmoid()
        both = torch.minimum(dense.score, mine).amax(2) > 0.4
        assert int(both.sum()) >= 5
        assert any(len(found) for found in goal.boxes)
        return float(giou(cells.boxes[both], dense.boxes[both]).mean())


def test_the_shipped_detector_teaches_itself_from_a_larger_size() -> None:
    samples = Path(compression_photos.__file__).parent.parent / "device_app" / "samples"
    source = ModelSource(file=shipped_float())
    assert agreement(source, source, (416, 416), sorted(samples.glob("*.jpg"))[:4]) > 0.6


@pytest.mark.shared
@pytest.mark.parametrize("turned", [False, True])
def test_nanodet_plus_and_yolox_mean_the_same_places(turned: bool, shared: Path) -> None:
    files = ["nanodet_plus_m_416.onnx", "yolox_nano_416.onnx"]
    first, second = (ModelSource(file=shared / "weights" / f) for f in files)
    photos = sorted((shared / "data/coco-train/images").iterdir())[:4]
    pair = (second, first) if turned else (first, second)
    assert agreement(*pair, None, photos) > 0.6
