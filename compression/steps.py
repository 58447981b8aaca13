"""The steps of a recipe, each a function ``(state, settings) -> (state, StepReport)``."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from tqdm import tqdm

from ..models.dataset import load_image
from ..models.detector import OnnxDetector
from ..models.graph import load_model
from .activations_step import run_activations
from .distill_step import run_distill
from .export import TorchDetector, export_detector, set_metadata
from .half import half_compute, half_weights
from .lowbit import FIT_PHOTOS, LowBitConfig, lower
from .lowrank_step import run_factorise
from .onnx_io import save_model, tidy
from .prune_step import run_prune
from .quantize import QuantizeConfig, quantize
from .settings import HalfStep, QuantizeStep, VerifyStep
from .slim import shorten_names
from .sparse_step import run_sparsify
from .state import NET_KEY, State, StepReport
from .verify import Subject, verify

EXPORT_PHOTOS = 3


def run_quantize(state: State, config: QuantizeStep) -> tuple[State, StepReport]:
    """Exports the network and turns it into 8-bit integers; weights into fewer bits if asked."""
    start = time.monotonic()
    job = state.job
    state = with_file(state)
    assert state.model is not None
    model = load_model(state.model)
    set_metadata(model, NET_KEY, None)  # only float files can be compressed further
    spec = OnnxDetector(state.model).spec
    low = config.weights != 8 or config.bytes_max is not None
    settings = QuantizeConfig(
        target=job.core,
        photos_max=config.photos,
        seed=job.seed,
        integer_share_min=config.integer_share_min,
        refine=config.refine,
        cost_weight=config.cost_weight,
        cost_max=config.cost_max,
        fallback=config.fallback,
    )
    photos, bars = job.photos.train_paths, _progress(job.progress)
    result = quantize(model, spec, photos, settings, progress=bars)
    small, figures, notes = result.model, dict(result.report), result.notes
    if low:
        count = min(config.photos, FIT_PHOTOS)
        few = LowBitConfig(config.weights, config.bytes_max, count, job.seed, config.refine)
        lowered = lower(small, model, spec, photos, few, progress=bars)
        small, notes = lowered.model, notes + lowered.notes
        figures["few bits"] = lowered.report
    path = job.step_folder / "int8.onnx"
    shorten_names(small)
    save_model(small, path, spec)
    OnnxDetector(path)  # it must run before anything is built on it
    done = replace(state, model=path, float_model=state.model)
    return done, StepReport("quantize", time.monotonic() - start, figures, notes)


def run_half(state: State, config: HalfStep) -> tuple[State, StepReport]:
    """Exports the network and turns its weights into 16-bit floats."""
    start = time.monotonic()
    state = with_file(state)
    assert state.model is not None
    model = tidy(load_model(state.model))
    set_metadata(model, NET_KEY, None)  # only float32 files can be compressed further
    small = half_compute(model) if config.compute == "float16" else half_weights(model)
    path = state.job.step_folder / "half.onnx"
    shorten_names(small)
    save_model(small, path, OnnxDetector(state.model).spec)
    OnnxDetector(path)
    figures = {"compute": config.compute, "bytes": path.stat().st_size}
    done = replace(state, model=path, float_model=state.model)
    return done, StepReport("half", time.monotonic() - start, figures)


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
    "prune": run_prune,
    "activations": run_activations,
    "sparsify": run_sparsify,
    "distill": run_distill,
    "factorise": run_factorise,
    "quantize": run_quantize,
    "half": run_half,
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
