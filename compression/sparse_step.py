"""The step ``sparsify``: makes weights zero, in rounds, and refits what is left."""

from __future__ import annotations

import copy
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor
from tqdm import tqdm

from ..models.errors import RecipeError
from ..models.nets.common import DetectorNet
from .compensate import refit
from .export import export_detector
from .photos import calibration_batches
from .settings import SparsifyStep
from .sparse import (
    Kept,
    Scores,
    SparseMasks,
    cubic,
    deflated,
    density_by_layer,
    gradient_scores,
    int8_weights,
    is_depthwise,
    keep_above,
    keep_globally,
    keep_pattern,
    keep_per_channel,
    keep_per_layer,
    magnitude_scores,
    mark_sparse,
    relative_limits,
    weights_of,
    zero_count,
)
from .state import State, StepReport

BATCH = 4
"""Photos per batch: each batch is one random projection of the outputs."""
REFIT_PHOTOS_MAX = 64
"""What two networks compute on so many photos is held in memory."""
REFIT_RIDGE = 0.01


def run_sparsify(state: State, config: SparsifyStep) -> tuple[State, StepReport]:
    """Makes the weights zero that matter least; the shapes stay as they are.

    Raises:
        RecipeError: So many zeros cannot be had, no layer fits the pattern, or gradients cannot be
            told because the network's head is not known.
    """
    start = time.monotonic()
    job, before = state.job, state.net
    net = copy.deepcopy(before).eval()
    mark_sparse(net)
    total = sum(weight.numel() for weight in weights_of(net).values())
    zeros = zero_count(net)
    wants_photos = config.refit or config.method in ("gradient", "taylor")
    batches: list[Tensor] = []
    if wants_photos:
        batches = calibration_batches(job.photos.train_paths, state.spec, config.photos, BATCH)
    few = batches[: max(1, REFIT_PHOTOS_MAX // BATCH)]
    densities = []
    for goal in _goals(net, config):
        try:
            scores = _scores(net, config, batches, job.seed, job.progress)
            kept = _chosen(before, scores, config, goal)
        except ValueError as error:
            message = f"sparsify: {error}; {_advice(config)}"
            raise RecipeError(message) from error
        SparseMasks(kept).apply_(net)
        if config.refit:
            options: dict[str, Any] = {"ridge": REFIT_RIDGE, "progress": job.progress}
            refit(net, before, {}, few, keep_zeros=True, **options)
        densities.append(round(1 - zero_count(net) / total, 4))
    changed = state.changed(net, {"kind": "sparsify"})
    sizes = _sizes(state, changed)
    figures: dict[str, Any] = {
        "method": config.method,
        "pattern": config.pattern,
        "weights": total,
        "zeros_before": zeros,
        "zeros_after": zero_count(net),
        "density": densities[-1],
        "density_by_round": densities,
        "density_by_layer": {n: round(d, 4) for n, d in density_by_layer(net).items()},
        "bytes": sizes,
    }
    notes = _notes(net, config, figures, zeros)
    return changed, StepReport("sparsify", time.monotonic() - start, figures, notes)


def takes_part(weight: Tensor, config: SparsifyStep) -> bool:
    """Whether a layer's weights may become zero.

    Depthwise layers hold few weights, each the only one that sees its place: only a choice over
    all layers may take some. A pattern needs a whole group of input channels.
    """
    if config.pattern is not None:
        return weight.shape[1] >= config.counts[1]
    return config.scope == "global" or config.method == "threshold" or not is_depthwise(weight)


def _goals(net: DetectorNet, config: SparsifyStep) -> list[float]:
    """Returns what each round has to reach: sparsity, weights kept of a group, or threshold."""
    if config.pattern is not None:
        count, group = config.counts
        return [round(value) for value in cubic(group, count, config.rounds)]
    if config.method == "threshold":
        assert config.threshold is not None, "the settings say so"
        return cubic(0.0, config.threshold, config.rounds)
    part = [w for w in weights_of(net).values() if takes_part(w, config)]
    zero = sum(int((w == 0).sum()) for w in part) / max(1, sum(w.numel() for w in part))
    return cubic(min(zero, config.sparsity), config.sparsity, config.rounds)


def _scores(
    net: DetectorNet, config: SparsifyStep, batches: Sequence[Tensor], seed: int, progress: bool
) -> Scores:
    """Returns the scores of the layers that take part; what is zero already goes first."""
    if config.method in ("gradient", "taylor"):
        bar = tqdm(batches, desc="what matters", unit="batch", disable=not progress)
        scores = gradient_scores(net, bar, config.method == "taylor", seed)
    else:
        scores = magnitude_scores(net)
    found = {
        name: scores[name].masked_fill(weight.detach() == 0, -1.0)
        for name, weight in weights_of(net).items()
        if takes_part(weight, config)
    }
    if not found:
        message = "expected layers that can take part, found none"
        raise ValueError(message)
    return found


def _chosen(before: DetectorNet, scores: Scores, config: SparsifyStep, goal: float) -> Kept:
    """Returns which weights stay; what is zero stays zero.

    Args:
        before: The network as the step found it: its layers' sizes scale a relative threshold.
        scores: As it is now.
        config: Of the step.
        goal: Of this round.
    """
    if config.pattern is not None:
        kept = keep_pattern(scores, int(goal), config.counts[1])
    elif config.method == "threshold":
        limits = relative_limits(before, goal) if config.relative else dict.fromkeys(scores, goal)
        kept = keep_above(scores, limits, config.keep_min)
    elif config.scope == "global":
        kept = keep_globally(scores, goal, config.keep_min)
    elif config.scope == "layer":
        kept = keep_per_layer(scores, goal, config.keep_min)
    else:
        kept = keep_per_channel(scores, goal, config.keep_min)
    return {name: mask & (scores[name] >= 0) for name, mask in kept.items()}


def _advice(config: SparsifyStep) -> str:
    if config.pattern is not None:
        return f"{config.pattern} needs layers of {config.counts[1]} input channels or more"
    if config.method in ("gradient", "taylor"):
        return "lower sparsity or keep_min, or take method = 'magnitude'"
    return "lower sparsity or keep_min"


def _sizes(before: State, after: State) -> dict[str, dict[str, int]]:
    """Returns the bytes of the float file and of all weights in 8 bits, plain and deflated."""
    found: dict[str, dict[str, int]] = {}
    with tempfile.TemporaryDirectory(prefix="edgesight-") as folder:
        for key, state in (("before", before), ("after", after)):
            path = state.float_model or state.model
            if path is None:
                path = Path(folder) / "float.onnx"
                export_detector(state.net, state.spec, path, description=state.description())
            data, codes = path.read_bytes(), int8_weights(state.net)
            found[key] = {
                "float": len(data),
                "float_deflated": deflated(data),
                "int8_weights": len(codes),
                "int8_weights_deflated": deflated(codes),
            }
    return found


def _notes(
    net: DetectorNet, config: SparsifyStep, figures: dict[str, Any], zeros: int
) -> tuple[str, ...]:
    before, after = figures["bytes"]["before"], figures["bytes"]["after"]
    notes = [
        "zeros do not make a dense runtime faster, nor the file smaller as it lies: ONNX Runtime "
        "and OpenVINO multiply by them like by any number; cut channels (prune) for speed",
        "what zeros win is the compressed file (zip, gzip, a package): float "
        f"{before['float_deflated'] / 1e6:.2f} -> {after['float_deflated'] / 1e6:.2f} MB, weights "
        f"in 8 bits {before['int8_weights_deflated'] / 1e6:.2f} -> "
        f"{after['int8_weights_deflated'] / 1e6:.2f} MB",
    ]
    if config.pattern == "2:4":
        notes.append("2:4 is what the sparse tensor cores of NVIDIA GPUs read (with TensorRT)")
    if figures["zeros_after"] == zeros:
        notes.insert(0, f"nothing became zero: {zeros} of {figures['weights']} weights were before")
    weights = weights_of(net)
    alone = [name for name, weight in weights.items() if not takes_part(weight, config)]
    if alone:
        why = "too few input channels" if config.pattern is not None else "depthwise"
        notes.append(f"left dense: {len(alone)} of {len(weights)} layers ({why})")
    return tuple(notes)
