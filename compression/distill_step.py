"""The recipe step ``distill``: opens the teachers, makes the stream of photos, and trains."""

from __future__ import annotations

import copy
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from ..models.detector import OnnxDetector
from ..models.errors import InputError, OutputError, RecipeError
from ..models.evaluate import Detector
from ..models.files import sha256
from ..models.spec import ModelSpec
from . import parallel
from .data import photo_labels
from .distill import LossWeights
from .foreign import ForeignNet
from .levels import layout_of
from .photos import Mosaic, PhotoLabels, PhotoStream
from .recipe import ModelSource
from .settings import DistillStep
from .source import enter
from .state import State, StepReport, rows_kept
from .teachers import FusedDetector, Guide, Panel, Stranger, Twin, class_table, is_twin, readable
from .train import TrainConfig, train

PLAIN_END = 6
"""The last sixth of a run sees no mosaics: the end should look like what is detected in."""


def run_distill(state: State, config: DistillStep) -> tuple[State, StepReport]:
    """Trains the network towards its teachers; goes on from its checkpoint if there is one.

    Raises:
        RecipeError: The losses do not know the network's head, a teacher does not fit, or the loss
            becomes infinite.
        ModelFileError: A teacher's file cannot be used.
    """
    start = time.monotonic()
    job = state.job
    try:
        layout_of(state.net)
    except ValueError as error:  # a head that the losses do not know
        message = f"distill: {error}; leave the step out"
        raise RecipeError(message) from error
    teachers = open_teachers(state, config)
    labels, note = _labels(state, config, teachers.detector)
    paths = job.photos.train_paths
    stream = PhotoStream(
        paths,
        state.spec,
        config.batch,
        job.seed,
        labels,
        mosaic=Mosaic(config.mosaic, config.photos - config.photos // PLAIN_END),
        views=[spec for guide in teachers.guides for spec in guide.views],
        part=(parallel.rank(), parallel.count()),
    )
    settings = TrainConfig(
        photos=config.photos,
        batch=config.batch,
        rate=config.rate,
        warmup=config.warmup,
        ema=config.ema,
        seed=job.seed,
        save_s=config.save_s,
        mixed=config.mixed,
        weights=LossWeights(**config.weights.model_dump()),
        temperature=config.temperature,
        device=config.device,
    )
    try:
        trained = train(
            copy.deepcopy(state.net),
            teachers.guides,
            stream,
            settings,
            job.step_folder / "checkpoint.pt",
            progress=job.progress,
        )
    except RuntimeError as error:
        if "PytorchStreamWriter" not in str(error):
            raise
        message = f"cannot write {job.step_folder}: disk full?; free space or choose another place"
        raise OutputError(message) from error
    people = sum(len(d) for d in job.photos.train if d.truths is not None) if labels else 0
    figures = {
        "photos": len(paths),
        "photo_passes": config.photos,
        "photos_labelled": people,
        "teachers": teachers.names,
        "processes": parallel.count(),
        "threads": torch.get_num_threads(),
    }
    notes = (*note, *teachers.notes)
    done = StepReport("distill", time.monotonic() - start, figures, notes)
    return state.changed(trained.eval()), done


def check_teachers(steps: Sequence[object], spec: ModelSpec) -> None:
    """Raises, before anything is done, if a teacher that a step names cannot be one.

    Args:
        steps: Of a recipe.
        spec: Of the detector.

    Raises:
        ModelFileError: A file is missing, damaged, or fits no head.
        RecipeError: A teacher shares no class with the detector.
    """
    for step in steps:
        for file in step.teacher_files if isinstance(step, DistillStep) else ():
            class_table(file.name, OnnxDetector(file).spec.classes, spec.classes)


@dataclass
class Teachers:
    """The teachers of a run.

    Attributes:
        guides: What the training loop learns from.
        detector: Finds boxes in photos where nobody drew any.
        names: What to call them.
        notes: Sentences for the reader.
    """

    guides: list[Guide] = field(default_factory=list)
    detector: Detector | None = None
    names: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def open_teachers(state: State, config: DistillStep) -> Teachers:
    """Opens the teachers that a step names.

    Raises:
        ModelFileError: A file is missing, damaged, or fits no head.
        RecipeError: A teacher shares no class with the detector, or cannot have ``teacher_hw``.
    """
    result = Teachers()
    strangers: list[Stranger] = []
    files = []
    for teacher in config.teacher:
        if isinstance(teacher, str):
            result.names.append("self")
            result.guides.append(Twin(state.teacher, rows_kept(state.teacher, state.edits)))
            if config.teacher_hw is not None and config.teacher_hw != state.spec.input_hw:
                larger = _open_self(state, config.teacher_hw)
                result.names.append(larger.name)
                strangers.append(larger)
            continue
        detector = OnnxDetector(teacher)
        table = class_table(teacher.name, detector.spec.classes, state.spec.classes)
        files.append((detector, table))
        guide = _open_file(teacher, detector, state, result.notes)
        result.names.append(teacher.name)
        if isinstance(guide, Stranger):
            strangers.append(guide)
        else:
            result.guides.append(guide)
    if strangers:
        result.guides.append(Panel(strangers, state.spec))
    if strangers and layout_of(state.net).choice:
        message = (
            f"distill.teacher: expected a classifier with the detector's classes, input size and "
            f"normalisation, and nothing but a softmax behind its scores, found {strangers[0].name}"
            '; export it so, or say teacher = "self"'
        )
        raise RecipeError(message)
    if strangers and not readable(state.net):
        message = (
            f"distill.teacher: {strangers[0].name} has other maps than the detector, and how the "
            'detector\'s own maps hold its boxes is not known; say teacher = "self"'
        )
        raise RecipeError(message)
    if "self" in config.teacher:
        result.detector = OnnxDetector(state.original)
    else:
        result.detector = FusedDetector(files, state.spec)
    return result


def _open_self(state: State, input_hw: tuple[int, int]) -> Stranger:
    """Returns the uncut network at another input size than the student's."""
    if isinstance(state.teacher, ForeignNet) and input_hw != state.teacher_spec.input_hw:
        message = (
            f"distill.teacher_hw: expected {list(state.teacher_spec.input_hw)}, the size that is "
            f"fixed in the tail of this ONNX file, found {list(input_hw)}; leave it out"
        )
        raise RecipeError(message)
    if not readable(state.teacher):
        message = (
            "distill.teacher_hw: expected a head whose boxes can be read, found one whose maps are "
            "only compared as they are; leave it out"
        )
        raise RecipeError(message)
    spec = state.teacher_spec.with_changes(input_hw=input_hw)
    table = class_table("self", spec.classes, state.spec.classes)
    name = f"self at {input_hw[0]}x{input_hw[1]}"
    return Stranger(name, "self", spec, copy.deepcopy(state.teacher), None, table)


def _open_file(
    path: Path, detector: OnnxDetector, state: State, notes: list[str]
) -> Twin | Stranger:
    """Opens a file as a network whose cells can be read, else as a detector that finds boxes."""
    table = class_table(path.name, detector.spec.classes, state.spec.classes)
    missing = len(state.spec.classes) - len(set(table[table >= 0].tolist()))
    if missing:
        notes.append(f"teacher {path.name}: {missing} of the detector's classes it does not know")
    digest = sha256(path)
    try:
        entered = enter(ModelSource(file=path), state.job.seed)
    except InputError as error:
        why = str(error).removeprefix(f"{path}: ")
        notes.append(f"teacher {path.name}: only the boxes that it finds are learned from ({why})")
        return Stranger(path.name, digest, detector.spec, None, detector, table)
    layout = layout_of(state.net)
    twin = is_twin(entered.spec, state.spec) and layout_of(entered.net) == layout
    if twin and (layout.learns_boxes or layout.choice):
        alike = type(entered.net) is type(state.net) and not isinstance(state.net, ForeignNet)
        return Twin(entered.net, features=alike, name=digest)
    if not readable(entered.net):
        notes.append(f"teacher {path.name}: only the boxes that it finds are learned from")
        return Stranger(path.name, digest, detector.spec, None, detector, table)
    return Stranger(path.name, digest, entered.spec, entered.net, None, table)


def _labels(
    state: State, config: DistillStep, detector: Detector | None
) -> tuple[Sequence[PhotoLabels] | None, tuple[str, ...]]:
    """Returns the boxes to learn from, or why there are none."""
    if config.labels == "none":
        return None, ()
    layout = layout_of(state.net)
    if layout.choice:
        return None, ("labels not used: a classifier learns from its teachers",)
    if not layout.learns_boxes:
        note = "labels not used: how this network's maps hold its boxes is not known"
        return None, (note,)
    assert detector is not None
    job = state.job
    return photo_labels(job.photos, state.spec.classes, detector, job.progress), ()
