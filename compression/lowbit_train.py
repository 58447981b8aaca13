"""Training of a model with weights of few bits: as ``refine``, with each weight on its own width.

Gradients pass the rounding (straight-through, arXiv 1308.3432). With 3 bits and more the scales
stay as they were fitted. With 1 and 2 bits they follow the mean magnitude of the weights that are
trained, per channel, as in XNOR-Net (arXiv 1603.05279).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from ..models.graph import require_onnx
from ..models.spec import ModelSpec
from .bits_graph import levels
from .calibrate import chosen_photos
from .lowbit import LowBitConfig
from .lowbit_round import Layer, put_weight
from .refine import RefineConfig, distance, imitate, kept_if_nearer, passes, stored
from .rounding import nearest, zeros_of
from .torch_graph import TorchGraph

FEW_BITS: Final = 2
"""Up to here scales follow the weights."""
RATE_FEW_BITS: Final = 1e-3
RATE: Final = 2e-4
ROOM: Final = 0.49
"""A weight starts where it was, but no further from its code than this part of a step."""
PASS_MAX: Final = 3.0
"""Gradients of a sign pass up to so many scales."""
CHECK_PHOTOS: Final = 64
MOVED: Final = 1.25
"""Training is worth its time if rounding made the distance to the float model so much larger.

At 1.16 the shipped detector had lost no AP, and 400 photo passes made the distance larger.
"""


class LowBitGraph(TorchGraph):
    """A QDQ graph in torch, some of whose weights are rounded to fewer than 8 bits.

    Args:
        model: QDQ; the codes of those weights fit their widths.
        reference: The same with 8-bit weights: where the trained weights start, as far as they
            round to the codes of ``model``.
        layers: Of the model.
        widths: Layer -> bits.
    """

    def __init__(
        self, model: Any, reference: Any, layers: Sequence[Layer], widths: Mapping[str, int]
    ) -> None:
        super().__init__(model)
        self.few = {x.real: (x, widths[x.name]) for x in layers if widths[x.name] < 8}
        array = require_onnx().numpy_helper.to_array
        whole = {t.name: t for t in reference.graph.initializer}
        self.ratios = nn.ParameterDict()  # moves and is averaged with the rest, never trained
        for real, (layer, bits) in self.few.items():
            codes = np.moveaxis(array(whole[layer.codes]).astype(np.float64), layer.axis, 0)
            column = [-1, *[1] * (codes.ndim - 1)]
            wanted = codes * array(whole[layer.scale]).astype(np.float64).reshape(column)
            latent = self.values[self.trained[real]]
            scale = self._stored[layer.scale].double().numpy().reshape(column)
            rounded = np.moveaxis(latent.detach().double().numpy(), layer.axis, 0)
            if bits == 1:
                least = (1 - 2 * ROOM) * scale
                start = np.where(rounded > 0, np.maximum(wanted, least), np.minimum(wanted, -least))
            else:
                start = np.clip(wanted, rounded - ROOM * scale, rounded + ROOM * scale)
            with torch.no_grad():
                latent.copy_(torch.from_numpy(np.moveaxis(start, 0, layer.axis)))
            mean = np.abs(start).reshape(len(start), -1).mean(1)
            ratio = torch.from_numpy(scale.reshape(-1) / np.maximum(mean, 1e-12)).float()
            self.ratios[_key(real)] = nn.Parameter(ratio, requires_grad=False)

    def scale(self, real: str) -> Tensor:
        """Returns the scale per output channel that a weight has now."""
        layer, bits = self.few[real]
        if bits > FEW_BITS:
            return self._stored[layer.scale]
        weight = self.values[self.trained[real]].movedim(layer.axis, 0)
        size: Tensor = weight.flatten(1).abs().mean(1) * self.ratios[_key(real)]
        return size.clamp_min(1e-8)

    def _dequantized(self, node: Any, attributes: dict[str, Any], known: dict[str, Any]) -> Tensor:
        out = node.output[0]
        if out not in self.few:
            return super()._dequantized(node, attributes, known)
        layer, bits = self.few[out]
        value = self.values[self.trained[out]]
        shape = [-1 if i == layer.axis else 1 for i in range(value.ndim)]
        scale = self.scale(out).reshape(shape)
        inner = value / scale
        if bits == 1:
            inner = inner.clamp(-PASS_MAX, PASS_MAX)
            code = torch.where(inner < 0, -1.0, 1.0)
        else:
            ends = levels(bits)
            inner = inner.clamp(float(ends[0]), float(ends[-1]))
            code = inner.round()
        result: Tensor = (inner + (code - inner).detach()) * scale
        return result


def _key(name: str) -> str:
    return name.replace(".", "/")


@torch.no_grad()
def stored_lowbit(student: LowBitGraph, model: Any) -> Any:
    """Returns the QDQ model with what was trained, each code within its width."""
    result = stored(student, model)
    biases = {n.input[1]: n.input[2] for n in model.graph.node if len(n.input) > 2}
    for real, (layer, bits) in student.few.items():
        weight = student.values[student.trained[real]].double().movedim(layer.axis, 0).numpy()
        scale = student.scale(real).double().numpy()
        codes = nearest(weight / scale.reshape(-1, *[1] * (weight.ndim - 1)), bits)
        bias = None
        if layer.bias is not None:
            bias = student.values[student.trained[biases[real]]].double().numpy()
        put_weight(result, layer, codes.astype(np.int8), scale, bias=bias)
    return result


def train_lowbit(
    model: Any,
    reference: Any,
    original: Any,
    spec: ModelSpec,
    photos: Sequence[Path],
    layers: Sequence[Layer],
    widths: Mapping[str, int],
    config: LowBitConfig,
    progress: Callable[..., Any] = tqdm,
) -> tuple[Any, dict[str, Any], tuple[str, ...]]:
    """Trains a rounded model towards the float one; it is kept if its outputs come nearer.

    A model that rounding to few bits has hardly changed is left alone.

    Args:
        model: QDQ with codes that fit ``widths``.
        reference: The same with 8-bit weights.
        original: The float model.
        spec: Of all.
        photos: To learn from; some are held out to compare on, where there are enough.
        layers: Of the model.
        widths: Layer -> bits.
        config: How long.
        progress: Wraps iterables.

    Returns:
        The better model, figures, and notes.
    """
    check = chosen_photos(photos, CHECK_PHOTOS, config.seed + 1)
    held = set(check)
    others = [path for path in photos if path not in held] or list(photos)
    whole, before = (distance(m, original, spec, check) for m in (reference, model))
    figures = {"distance 8 bits": _short(whole), "distance before": _short(before)}
    if before <= MOVED * whole:
        return model, figures | {"photos": 0}, ("not trained again: few bits changed little",)

    def train() -> Any:
        student = LowBitGraph(model, reference, layers, widths)
        rate = RATE_FEW_BITS if min(widths.values()) <= FEW_BITS else RATE
        plan = RefineConfig(config.refine, rate=rate, seed=config.seed)
        signs = {x.real for x in layers if widths[x.name] == 1}  # they have no zero to keep
        zeros = {n: zero for n, zero in zeros_of(original, model).items() if n not in signs}
        averaged = imitate(student, original, spec, others, plan, zeros, progress=progress)
        return stored_lowbit(averaged, model)

    made = passes(config.refine, others)
    better, found, notes = kept_if_nearer(model, original, spec, check, made, train, before)
    return better, figures | found, notes


def _short(value: float) -> float:
    return float(f"{value:.6g}")
