"""The steps of a recipe, each a function ``(state, settings) -> (state, StepReport)``."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import torch
from tqdm import tqdm

from ..models.dataset import load_image
from ..models.detector import OnnxDetector
from ..models.errors import OutputError, RecipeError
from ..models.graph import load_model
from .data import photo_labels
from .export import TorchDetector, export_detector, set_metadata
from .levels import layout_of
from .lowrank_step import run_factorise
from .onnx_io import save_model
from .photos import PhotoStream
from .prune_step import run_prune
from .quantize import QuantizeConfig, quantize
from .settings import DistillStep, QuantizeStep, VerifyStep
from .slim import shorten_names
from .sparse_step import run_sparsify
from .state import NET_KEY, State, StepReport, rows_kept
from .train import TrainConfig, train
from .verify import Subject, verify

EXPORT_PHOTOS = 3


def run_distill(state: State, config: DistillStep) -> tuple[State, StepReport]:
    """Trains the network towards the uncut one; goes on from its checkpoint if there is one."""
    start = time.monotonic()
    job = state.job
    labels, notes = None, []
    try:
        learns_boxes = layout_of(state.net).learns_boxes
    except ValueError as error:  # a head that the losses do not know
        message = f"distill: {error}; leave the step out"
        raise RecipeError(message) from error
    if config.labels == "auto" and not learns_boxes:
        notes.append("labels not used: how this network's maps hold its boxes is not known")
    elif config.labels == "auto":
        teacher = OnnxDetector(state.original)
        labels = photo_labels(job.photos, state.spec.classes, teacher, job.progress)
    paths = job.photos.train_paths
    stream = PhotoStream(paths, state.spec, config.batch, job.seed, labels)
    settings = TrainConfig(
        photos=config.photos,
        batch=config.batch,
        rate=config.rate,
        warmup=config.warmup,
        ema=config.ema,
        seed=job.seed,
        save_s=config.save_s,
        mixed=config.mixed,
    )
    try:
        trained = train(
            copy.deepcopy(state.net),
            state.teacher,
            stream,
            settings,
            job.step_folder / "checkpoint.pt",
            rows_kept(state.teacher, state.edits),
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
        "threads": torch.get_num_threads(),
    }
    done = StepReport("distill", time.monotonic() - start, figures, tuple(notes))
    return state.changed(trained.eval()), done


def run_quantize(state: State, config: QuantizeStep) -> tuple[State, StepReport]:
    """Exports the network and turns it into 8-bit integers."""
    start = time.monotonic()
    job = state.job
    state = with_file(state)
    assert state.model is not None
    model = load_model(state.model)
    set_metadata(model, NET_KEY, None)  # only float files can be compressed further
    spec = OnnxDetector(state.model).spec
    settings = QuantizeConfig(
        target=job.core,
        photos_max=config.photos,
        seed=job.seed,
        integer_share_min=config.integer_share_min,
        refine=config.refine,
    )
    result = quantize(
        model, spec, job.photos.train_paths, settings, progress=_progress(job.progress)
    )
    path = job.step_folder / "int8.onnx"
    shorten_names(result.model)
    save_model(result.model, path, spec)
    OnnxDetector(path)  # it must run before anything is built on it
    done = replace(state, model=path, float_model=state.model)
    figures = dict(result.report)
    return done, StepReport("quantize", time.monotonic() - start, figures, result.notes)


def run_verify(state: State, config: VerifyStep) -> tuple[State, StepReport]:
    """Compares the result with the original on the photos to measure on."""
    start = time.monotonic()
    job = state.job
    state = with_file(state)
    assert state.model is not None
    subject = Subject(
        state.original,
        state.model,
        state.float_model,
        TorchDetector(state.net, state.spec),
        job.core,
    )
    photos = job.photos
    count = min(config.train_photos, config.photos_max, len(photos.check))
    apart = photos.check_kind != "same photos"  # else there is nothing to set side by side
    figures = verify(
        subject,
        photos.check.limit(config.photos_max),
        photos.check_kind,
        resamples=config.resamples,
        latency_rounds=config.latency_rounds,
        seed=job.seed,
        progress=job.progress,
        train=photos.train_sample(count) if apart and count else None,
    )
    notes = tuple(figures.pop("notes"))
    return state, StepReport("verify", time.monotonic() - start, figures, notes)


StepFunction = Callable[[State, Any], tuple[State, StepReport]]
STEPS: Final[dict[str, StepFunction]] = {
    "factorise": run_factorise,
    "prune": run_prune,
    "sparsify": run_sparsify,
    "distill": run_distill,
    "quantize": run_quantize,
    "verify": run_verify,
}
"""Kind of step -> function; a new kind needs an entry here and a class in ``settings.Step``."""


def with_file(state: State) -> State:
    """Returns the state with an ONNX file of the network as it is; exports it if there is none."""
    if state.model is not None:
        return state
    path = state.job.step_folder / "float.onnx"
    export_detector(state.net, state.spec, path, sample(state), state.description())
    return replace(state, model=path, float_model=None)


def sample(state: State) -> list[Any]:
    """Returns a few photos to compare torch and ONNX Runtime on."""
    photos: Iterable[Path] = state.job.photos.train_paths[:EXPORT_PHOTOS]
    return [load_image(path) for path in photos]


def _progress(shown: bool) -> Callable[..., Any]:
    def wrap(items: Any, **settings: Any) -> Any:
        return tqdm(items, disable=not shown, **settings)

    return wrap
