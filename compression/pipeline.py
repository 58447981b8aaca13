"""Runs a recipe: every finished step is stored, and a rerun goes on behind the last of them."""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from .. import __version__
from ..models.dataset import Dataset
from ..models.detections import Detections
from ..models.detector import OnnxDetector
from ..models.errors import RecipeError
from ..models.evaluate import Detector, run_detector
from ..models.files import atomic_path, read_json, sha256, write_json
from ..models.graph import load_model
from . import parallel
from .data import open_photos
from .distill_step import check_teachers
from .export import TorchDetector, export_detector
from .foreign import ForeignNet
from .measure import score
from .onnx_io import save_model
from .prune import count_macs
from .recipe import Recipe
from .settings import DistillStep, PruneStep, Step
from .source import Entered, enter
from .state import (
    STATE_FILE,
    STATE_VERSION,
    Job,
    State,
    StepReport,
    load_state,
    save_state,
)
from .steps import STEPS, sample, with_file

ORIGINAL_FILE = "original.onnx"
FINAL_FILE = "model.onnx"
FLOAT_FILE = "model_float.onnx"
STEPS_FOLDER = "steps"
MEASURE_FILE = "measure.json"
SHARED = ("distill",)
"""Steps that several processes share; the others are the first one's."""
NOT_IN_KEY = ("save_s", "device")
"""Settings that do not change a result."""


@dataclass(frozen=True)
class StepRow:
    """One line of the summary.

    Attributes:
        title: ``original``, or number and kind of the step.
        parameters: Weights and biases.
        macs: Multiply-accumulates of the convolutions per picture.
        bytes: Of the file (of a torch network: of its weights).
        score: ``measure.Score`` as JSON on the photos that measure steps; None if not measured.
        report: What the step said; None for the original.
        resumed: The step was finished in an earlier run.
    """

    title: str
    parameters: int
    macs: int
    bytes: int
    score: dict[str, Any] | None
    report: StepReport | None = None
    resumed: bool = False


@dataclass(frozen=True)
class RunResult:
    """What a recipe made.

    Attributes:
        state: At the end.
        rows: One per step, the original first.
        final: The result.
        float_file: Its float form.
        seconds: Of this run, steps that were done before not counted.
    """

    state: State
    rows: tuple[StepRow, ...]
    final: Path
    float_file: Path
    seconds: float

    @property
    def verified(self) -> dict[str, Any] | None:
        """Figures of the last verify step; None without one."""
        done = [r.report for r in self.rows if r.report is not None and r.report.kind == "verify"]
        return done[-1].figures if done and done[-1] is not None else None


def run_recipe(
    recipe: Recipe,
    *,
    restart: bool = False,
    progress: bool = True,
    say: Callable[[str], None] | None = None,
) -> RunResult:
    """Carries out a recipe; together with the other processes that ``torchrun`` has started.

    Args:
        recipe: With absolute paths, as ``read_recipe`` returns it.
        restart: Do every step anew.
        progress: Show bars.
        say: Told what is going on, a line at a time.

    Raises:
        EdgeSightError: Something that the recipe names is wrong; finished steps stay stored.
    """
    parallel.start()
    say = say or (lambda line: print(line, file=sys.stderr))
    if not parallel.is_first():
        progress, say = False, lambda line: None
    start = time.monotonic()
    torch.set_flush_denormal(True)  # pruning sets it: a run resumed behind it must compute alike
    photos = open_photos(recipe.data.photos, recipe.data.eval, recipe.data.hold_out)
    where = " (the same ones)" if photos.check_kind == "same photos" else ""
    say(f"{len(photos.train_paths)} photos to learn from, {len(photos.check)} to measure on{where}")
    entered = enter(recipe.model, recipe.seed)
    check_teachers(recipe.steps, entered.spec)
    job = Job(
        recipe.out,
        photos,
        recipe.target.core,
        recipe.seed,
        progress,
        recipe.data.step_photos,
    )
    with parallel.first_alone():
        state = first_state(job, entered, recipe.data.input_hw)
    ruler = Ruler(state, photos.check, photos.check_print, job.step_photos)
    before = ruler.measure(state, None) if parallel.is_first() else None
    rows = [_row("original", state, before)]
    for index, settings in enumerate(recipe.steps):
        key = step_key(recipe, index, entered, photos.train_print, photos.check_print)
        title = f"{index + 1} {settings.kind}"
        folder = recipe.out / STEPS_FOLDER / f"{index + 1}-{settings.kind}-{key[:10]}"
        with parallel.first_alone():
            if restart and folder.exists() and parallel.is_first():
                shutil.rmtree(folder)
        inside = replace(state, job=replace(job, step_folder=folder))
        told = f"step {index + 1} of {len(recipe.steps)}: {settings.kind}"
        state, report, resumed = run_step(inside, settings, key, told, say)
        measured = None
        if settings.kind != "verify" and parallel.is_first():
            measured = ruler.measure(state, folder / MEASURE_FILE)
        rows.append(_row(title, state, measured, report, resumed))
    return _finish(replace(state, job=job), rows, recipe.name, start)


def run_step(
    state: State, settings: Any, key: str, title: str, say: Callable[[str], None]
) -> tuple[State, StepReport, bool]:
    """Carries out one step and stores it in ``state.job.step_folder``, or reads it from there.

    Args:
        state: Before the step.
        settings: Of the step.
        key: From ``step_key``.
        title: What ``say`` is told.
        say: Told what is going on.

    Returns:
        The state after the step, what the step reports, and whether it had been done before.
    """
    folder = state.job.step_folder
    done = load_state(folder, key, state)
    parallel.meet()  # all have looked before the first one writes
    if done is not None:
        say(f"{title}, done before")
        return *done, True
    say(title)
    if parallel.is_first():
        made, report = STEPS[settings.kind](state, settings)
        save_state(folder, key, made, report)
    elif settings.kind in SHARED:
        STEPS[settings.kind](state, settings)
    parallel.meet()
    done = load_state(folder, key, state)  # so that a resumed run sees the very same
    assert done is not None, "a step that was just stored can be read"
    if parallel.is_first():
        with contextlib.suppress(OSError):
            (folder / "checkpoint.pt").unlink(missing_ok=True)
    return *done, False


def first_state(job: Job, entered: Entered, input_hw: tuple[int, int] | None) -> State:
    """Returns the state before the first step; writes the original as an ONNX file of our form."""
    path = job.folder / ORIGINAL_FILE
    spec = entered.spec
    if input_hw is not None and input_hw != spec.input_hw:
        if isinstance(entered.net, ForeignNet):
            message = (
                f"data.input_hw: expected {list(spec.input_hw)}, the size that is fixed in the "
                f"tail of this ONNX file, found {list(input_hw)}; leave it out, or export the "
                "file at that size"
            )
            raise RecipeError(message)
        spec = spec.with_changes(input_hw=input_hw)
    state = State(
        job,
        entered.net,
        entered.spec,
        path,
        entered.net,
        spec,
        origin=entered.origin,
        base_edits=entered.edits,
    )
    mark = path.with_suffix(".json")
    wanted = {"digest": entered.digest, "spec": entered.spec.to_json(), "version": __version__}
    if not (path.is_file() and read_json(mark) == wanted):
        as_entered = replace(state, spec=entered.spec)
        text = as_entered.description()
        export_detector(entered.net, entered.spec, path, sample(state), text)
        write_json(mark, wanted)
    return state if spec != entered.spec else replace(state, model=path)


def step_key(
    recipe: Recipe, index: int, entered: Entered, train_print: str, check_print: str
) -> str:
    """Returns what tells a step's result from any other: all that has gone into it."""
    steps = recipe.steps[: index + 1]
    settings = [_told(step) for step in steps]
    kinds = {step.kind for step in steps}
    return digest_of(
        STATE_VERSION,
        __version__,
        entered.digest,
        entered.spec.to_json(),
        recipe.data.input_hw,
        recipe.seed,
        train_print,
        settings,
        recipe.target.core if kinds & {"quantize", "verify"} else "",
        check_print if "verify" in kinds else "",
    )


def _told(step: Step) -> dict[str, Any]:
    """Returns what a step is told: of files what they hold, not where they lie."""
    told = {k: v for k, v in step.model_dump(mode="json").items() if k not in NOT_IN_KEY}
    if isinstance(step, PruneStep) and step.plan is not None:
        told["plan"] = sha256(step.plan)
    if isinstance(step, DistillStep):
        told["teacher"] = [sha256(t) if isinstance(t, Path) else t for t in step.teacher]
    return told


class Ruler:
    """Measures models, always on the same photos.

    Args:
        state: Any of the run; tells the original.
        data: Photos.
        data_print: SHA-256 that tells them from others.
        count: So many of them; 0: nothing is measured.
    """

    def __init__(self, state: State, data: Dataset, data_print: str, count: int) -> None:
        self.data: Dataset | None = data.limit(count) if count else None
        self.original = state.original
        self.progress = state.job.progress
        self.key = digest_of(data_print, count, self.original.read_bytes())
        self._before: list[Detections] | None = None

    def measure(self, state: State, cache: Path | None) -> dict[str, Any] | None:
        """Returns the score of a state; from ``cache`` if it was measured before."""
        if self.data is None:
            return None
        stored = read_json(cache) if cache is not None else None
        if isinstance(stored, dict) and stored.get("key") == self.key:
            found: dict[str, Any] = stored["score"]
            return found
        if self._before is None:
            self._before = self._run(OnnxDetector(self.original), "the original")
        if cache is None:
            after = self._before
        elif state.model is not None:
            after = self._run(OnnxDetector(state.model), "measuring")
        else:
            after = self._run(TorchDetector(state.net, state.spec), "measuring")
        result = score(after, self._before, state.spec.classes, self.data, 400).to_json()
        if cache is not None:
            write_json(cache, {"key": self.key, "score": result})
        return result

    def _run(self, detector: Detector, title: str) -> list[Detections]:
        assert self.data is not None
        return run_detector(detector, self.data, progress=self.progress, title=title)[0]


def _row(
    title: str,
    state: State,
    measured: dict[str, Any] | None,
    report: StepReport | None = None,
    resumed: bool = False,
) -> StepRow:
    count = sum(p.numel() for p in state.net.parameters())
    size = 4 * count if state.model is None else state.model.stat().st_size
    first = report is None
    net, spec = (state.teacher, state.teacher_spec) if first else (state.net, state.spec)
    macs = count_macs(net, torch.zeros(1, 3, *spec.input_hw))
    if first:
        size = state.original.stat().st_size
    return StepRow(title, count, macs, size, measured, report, resumed)


def _finish(state: State, rows: list[StepRow], name: str | None, start: float) -> RunResult:
    folder = state.job.folder
    final, float_file = folder / FINAL_FILE, folder / FLOAT_FILE
    if not parallel.is_first():
        return RunResult(state, tuple(rows), final, float_file, time.monotonic() - start)
    if state.model is None:
        last = replace(state.job, step_folder=folder / STEPS_FOLDER)
        state = with_file(replace(state, job=last))
    assert state.model is not None
    _copy(state.float_model or state.model, float_file, name)
    _copy(state.model, final, name)
    return RunResult(state, tuple(rows), final, float_file, time.monotonic() - start)


def _copy(source: Path, target: Path, name: str | None) -> None:
    """Copies a model; with ``name`` it calls itself so from here on."""
    if name is not None:
        spec = OnnxDetector(source).spec.with_changes(name=name)
        save_model(load_model(source), target, spec)
        return
    with atomic_path(target) as path:
        shutil.copyfile(source, path)


def finished_steps(folder: Path) -> int:
    """Returns how many steps are stored in an output folder."""
    return len(list((folder / STEPS_FOLDER).glob(f"*/{STATE_FILE}")))


def digest_of(*parts: Any) -> str:
    """Returns the SHA-256 over values that JSON knows, and bytes."""
    digest = hashlib.sha256()
    for part in parts:
        data = part if isinstance(part, bytes) else json.dumps(part, sort_keys=True).encode()
        digest.update(data + b"\0")
    return digest.hexdigest()
