"""A short training of an INT8 model: weights and biases learn to live with the rounding.

Quantization-aware fine-tuning after calibration (Nagel et al., "A White Paper on Neural Network
Quantization", arXiv 2106.08295, section 5), with the float model as the only teacher: photos need
no labels. The grids stay as calibration has chosen them.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from ..models.dataset import load_image
from ..models.errors import ModelFileError
from ..models.graph import attributes, copied, require_onnx
from ..models.preprocess import prepare
from ..models.spec import ModelSpec
from .calibrate import session
from .distill import bernoulli_divergence
from .photos import drawn
from .qdq import Links
from .rounding import Mask, zeros_of
from .torch_graph import WEIGHT_CODE_MAX, TorchGraph
from .train import RelativeAdam, follow

Student = TypeVar("Student", bound=TorchGraph)
PROBABILITY_MIN = 1e-5
"""Scores are compared as if none were closer to 0 or 1: the rest is rounding."""


@dataclass(frozen=True)
class RefineConfig:
    """How long and how fast to refine.

    Attributes:
        photos: Photo passes in all.
        batch: Photos per step.
        rate: Largest step, relative to each channel's weights.
        warmup: Part of the run in which the rate rises.
        ema: Decay per step of the averaged weights, which are what is kept.
        seed: Of order and augmentation.
    """

    photos: int = 1600
    batch: int = 8
    rate: float = 2e-4
    warmup: float = 0.1
    ema: float = 0.98
    seed: int = 0


TOLERANCE = 1e-3
"""Largest difference allowed between ONNX Runtime and torch, relative to the largest output."""
PASSES_MAX = 20
"""No photo is looked at more often: a handful would be learned by heart."""
SUM_TOLERANCE = 1e-3
"""Of probabilities from 1."""


def refine(
    quantized: Any,
    original: Any,
    spec: ModelSpec,
    photos: Sequence[Path],
    config: RefineConfig,
    *,
    progress: Callable[..., Any] = tqdm,
) -> Any:
    """Returns a QDQ model whose outputs are closer to the float model's.

    Args:
        quantized: QDQ ``onnx.ModelProto``.
        original: The float model, with the same input and outputs.
        spec: Of both.
        photos: To learn from, no labels needed.
        config: How long and how fast.
        progress: Wraps iterables, as ``tqdm`` does.

    Raises:
        ModelFileError: The graph has an operator that training does not know, or not in this form.
        DatasetError: A photo cannot be read.
    """
    student = TorchGraph(quantized)
    held = zeros_of(original, quantized)
    averaged = imitate(student, original, spec, photos, config, held, progress=progress)
    return stored(averaged, quantized)


def imitate(
    student: Student,
    original: Any,
    spec: ModelSpec,
    photos: Sequence[Path],
    config: RefineConfig,
    held: Mapping[str, Mask],
    *,
    progress: Callable[..., Any] = tqdm,
) -> Student:
    """Trains a graph to give what the float model gives; returns the average over the steps.

    Args:
        student: What learns, in place.
        original: The float model, with the same input and outputs.
        spec: Of both.
        photos: To learn from, no labels needed.
        config: How long and how fast.
        held: Tensor in ``student.trained`` -> which of its numbers stay zero (sparsity).
        progress: Wraps iterables, as ``tqdm`` does.

    Raises:
        ModelFileError: The float model does not compute the same in torch.
        DatasetError: A photo cannot be read.
    """
    torch.set_flush_denormal(True)
    teacher = session(original)
    feed = teacher.get_inputs()[0].name
    _expect_same(original, teacher, prepare(load_image(photos[0]), spec)[0])
    student.train()
    zeros = [
        (student.values[student.trained[name]], torch.from_numpy(zero))
        for name, zero in held.items()
        if name in student.trained
    ]
    averaged = copy.deepcopy(student)
    optimizer = RelativeAdam([p for p in student.parameters() if p.requires_grad], config.rate)
    steps = math.ceil(passes(config.photos, photos) / config.batch)
    batches = _batches(photos, spec, config, steps)
    for step, tensors in enumerate(progress(batches, total=steps, desc="refine", unit="step")):
        part = step / steps
        for group in optimizer.param_groups:
            rise = min(1.0, (part + 1 / steps) / config.warmup)
            group["rate"] = config.rate * rise * 0.5 * (1 + math.cos(math.pi * part))
        goals = [teacher.run(None, {feed: tensor}) for tensor in tensors]
        wanted = [torch.from_numpy(np.concatenate(parts)) for parts in zip(*goals, strict=True)]
        loss = output_distance(spec, student(torch.from_numpy(np.concatenate(tensors))), wanted)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        with torch.no_grad():
            for weight, zero in zeros:
                weight.masked_fill_(zero, 0)
        follow(averaged, student, config.ema, step)
    return averaged


def passes(asked: int, photos: Sequence[Path]) -> int:
    """Returns how many photo passes training makes of those asked for: few photos wear out."""
    return min(asked, PASSES_MAX * len(photos))


def kept_if_nearer(
    model: Any,
    original: Any,
    spec: ModelSpec,
    check: Sequence[Path],
    photos: int,
    train: Callable[[], Any],
    before: float | None = None,
) -> tuple[Any, dict[str, Any], tuple[str, ...]]:
    """Trains a quantized model, and keeps the result if it is nearer to the float one.

    Args:
        model: As it is.
        original: The float model.
        spec: Of both.
        check: Photos to compare on.
        photos: Photo passes that training makes (``passes``), for the figures.
        train: Returns the trained model.
        before: The ``distance`` of ``model``, where it is known.

    Returns:
        The better model, figures, and notes; training that does not know something in the graph
        is a note.
    """
    try:
        trained = train()
    except ModelFileError as error:
        return model, {"photos": 0}, (f"not refined by training: {error}",)
    before = distance(model, original, spec, check) if before is None else before
    after = distance(trained, original, spec, check)
    figures = {
        "photos": photos,
        "distance before": float(f"{before:.6g}"),
        "distance after": float(f"{after:.6g}"),
        "kept": after < before,
    }
    return (trained if after < before else model), figures, ()


def _expect_same(model: Any, runner: Any, tensor: Any) -> None:
    """Raises ``ModelFileError`` unless the float graph computes the same in torch, twice at once.

    Operators have forms that nobody here has met; this finds them all.
    """
    wanted = runner.run(None, {runner.get_inputs()[0].name: tensor})
    try:
        with torch.no_grad():
            found = TorchGraph(model)(torch.from_numpy(np.concatenate([tensor, tensor])))
        gaps = [
            float((b - torch.from_numpy(a)).abs().max()) / max(1.0, float(np.abs(a).max()))
            for a, b in zip(wanted, found, strict=True)
        ]
    except (RuntimeError, ValueError, TypeError, IndexError, KeyError, AttributeError) as error:
        message = (
            f"expected a graph that runs in torch, found: {' '.join(str(error).split())[:120]}"
        )
        raise ModelFileError(message) from error
    if not max(gaps) <= TOLERANCE:
        message = f"expected the same outputs in torch, found a difference of {max(gaps):.2g}"
        raise ModelFileError(message)


def _batches(
    photos: Sequence[Path], spec: ModelSpec, config: RefineConfig, steps: int
) -> Iterator[list[Any]]:
    for step in range(steps):
        tensors = []
        for position in range(step * config.batch, (step + 1) * config.batch):
            _, image, _ = drawn(photos, spec, config.seed, position)
            tensors.append(prepare(image, spec)[0])
        yield tensors


def distance(changed: Any, original: Any, spec: ModelSpec, photos: Sequence[Path]) -> float:
    """Returns the mean ``output_distance`` of two models on photos as they are."""
    runners = [session(model) for model in (changed, original)]
    total = 0.0
    for path in photos:
        tensor = prepare(load_image(path), spec)[0]
        found, wanted = (
            [torch.from_numpy(o) for o in r.run(None, {r.get_inputs()[0].name: tensor})]
            for r in runners
        )
        total += float(output_distance(spec, found, wanted))
    return total / len(photos)


def output_distance(spec: ModelSpec, found: Sequence[Tensor], wanted: Sequence[Tensor]) -> Tensor:
    """Returns how far outputs are from the teacher's, a scalar; zero where they agree.

    Cells count by how sure teacher or student is of an object there, as in distillation.

    Args:
        spec: Says which numbers are scores and which are boxes.
        found: The student's outputs.
        wanted: The teacher's.
    """
    if spec.head == "classify":
        return _choice_distance(found[0], wanted[0])
    ours, goal = _parts(spec, found), _parts(spec, wanted)
    sure = _confidence(spec, goal.scores).square()
    weight = torch.maximum(sure, _confidence(spec, ours.scores).square().detach())
    total = sure.sum().clamp_min(1e-6)
    p, q = (
        torch.logit(s.clamp(PROBABILITY_MIN, 1 - PROBABILITY_MIN))
        for s in (ours.scores, goal.scores)
    )
    scores = (bernoulli_divergence(p, q).sum(2) * weight).sum() / total
    if goal.bins:
        shape = (*goal.boxes.shape[:2], 4, goal.bins)
        mine, theirs = (b.reshape(shape).log_softmax(3) for b in (ours.boxes, goal.boxes))
        error = (theirs.exp() * (theirs - mine)).sum(3).sum(2)
    else:
        size = goal.boxes.std(dim=(0, 1)).clamp_min(1e-6)
        error = ((ours.boxes - goal.boxes) / size).square().mean(2)
    return scores + (error * sure).sum() / total


def _choice_distance(found: Tensor, wanted: Tensor) -> Tensor:
    """Returns the divergence of a classifier's choices; of logits, or of probabilities."""
    sums_to_one = (wanted.sum(1) - 1).abs().max() <= SUM_TOLERANCE
    if sums_to_one and wanted.min() >= 0:  # as heads.decode_classify tells them
        p, q = (o.clamp_min(PROBABILITY_MIN).log() for o in (found, wanted))
    else:
        p, q = (o.log_softmax(1) for o in (found, wanted))
    return (q.exp() * (q - p)).sum(1).mean()


@dataclass(frozen=True)
class _Parts:
    """Scores ``(b, n, k)`` in 0..1 and boxes ``(b, n, m)``; ``bins`` per side, or 0."""

    scores: Tensor
    boxes: Tensor
    bins: int


def _parts(spec: ModelSpec, outputs: Sequence[Tensor]) -> _Parts:
    classes = len(spec.classes)
    first = outputs[0]
    if spec.head == "yolox":
        return _Parts(first[..., 4:], first[..., :4], 0)
    if spec.head == "nanodet_plus":
        return _Parts(first[..., :classes], first[..., classes:], spec.reg_max + 1)
    if spec.head == "yolov8":
        return _Parts(first[:, 4:].transpose(1, 2), first[:, :4].transpose(1, 2), 0)
    if spec.head == "ssdlite":
        logits, deltas = sorted(outputs, key=lambda o: -o.shape[2])  # as its decoder tells them
        return _Parts(logits.softmax(2)[..., 1:], deltas, 0)
    by_size = sorted(outputs, key=lambda o: -o.shape[1])
    scores, boxes = (
        torch.cat([o for o in by_size if (o.shape[2] == classes) == wanted], 1)
        for wanted in (True, False)
    )
    return _Parts(scores, boxes, spec.reg_max + 1)


def _confidence(spec: ModelSpec, scores: Tensor) -> Tensor:
    """Returns ``(b, n)``: how sure the network is of an object in each cell, 0..1."""
    if spec.head == "yolox":
        return scores[..., 0] * scores[..., 1:].amax(2)
    return scores.amax(2)


@torch.no_grad()
def stored(student: TorchGraph, quantized: Any) -> Any:
    """Returns the QDQ model with the student's weights and biases on the same grids."""
    numpy_helper = require_onnx().numpy_helper
    result = copied(quantized)
    links = Links(result.graph)
    for name, index in student.trained.items():
        value = student.values[index].double().numpy()
        maker = links.maker.get(name)
        if maker is None:
            tensor = links.stored[name]
            tensor.CopyFrom(numpy_helper.from_array(value.astype(np.float32), name))
            continue
        codes, scale = (numpy_helper.to_array(links.stored[n]) for n in maker.input[:2])
        axis = attributes(maker).get("axis", 1)
        if scale.ndim:
            scale = scale.reshape([-1 if i == axis % codes.ndim else 1 for i in range(codes.ndim)])
        top = WEIGHT_CODE_MAX if codes.dtype == np.int8 else 2**31 - 1
        new = np.clip(np.rint(value / scale.astype(np.float64)), -top, top).astype(codes.dtype)
        links.stored[maker.input[0]].CopyFrom(numpy_helper.from_array(new, maker.input[0]))
    return result
