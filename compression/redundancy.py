"""How much of a layer repeats itself: entropy, effective rank, channels that never change."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from ..models.detections import FloatArray
from ..models.graph import attributes, require_onnx
from .analyse import Layer
from .calibrate import session
from .traced import LAYER_OPS, Traced

LEVELS = 256
ENERGY = 0.99
"""A weight matrix's rank is the number of singular values that hold this part of its energy."""
SAMPLE_PER_PHOTO = 4096
CONSTANT = 1e-6
"""A channel whose range is this part of its layer's, or less, says nothing: rounding moves more."""
PIXELS_PER_CHANNEL = 10
"""With fewer pixels the covariance looks poorer in dimensions than the layer is."""

Matrix = npt.NDArray[np.float64]


@dataclass(frozen=True)
class OfWeights:
    """What the stored weights of a layer tell, without photos.

    Attributes:
        entropy_bits: Bits per weight that an ideal entropy coder needs for the 8-bit codes (one
            scale per output channel; a file's own codes where it has any): Shannon's entropy of
            their histogram, 0..8.
        rank: Singular values of the weight matrix (output channels times the rest; of groups,
            summed) that hold ``ENERGY`` of the sum of squares.
        rank_max: Rank that the shape allows.
        zero_channels: Output channels whose weights are all zero.
    """

    entropy_bits: float
    rank: int
    rank_max: int
    zero_channels: int


@dataclass(frozen=True, eq=False)
class OfActivations:
    """What a layer's outputs on photos tell.

    Attributes:
        entropy_bits: Shannon's entropy of a histogram of 256 bins over the range of the values
            behind the activation function: bits per value that carry information, 0..8.
        effective_rank: Of the layer's own output, see ``effective_rank``.
        channels: Its most.
        dead_channels: Channels that never change behind the activation function.
        pixels: Behind these figures, on all photos; few pixels make the rank look small.
        low: Least value behind the activation function.
        high: Greatest value.
        values: A sample behind the activation function, float32 ``(n, 1)``.
    """

    entropy_bits: float
    effective_rank: float
    channels: int
    dead_channels: int
    pixels: int
    low: float
    high: float
    values: FloatArray

    @property
    def sure(self) -> bool:
        """Whether there were pixels enough for the rank."""
        return self.pixels >= PIXELS_PER_CHANNEL * self.channels


def entropy_bits(counts: npt.ArrayLike) -> float:
    """Returns Shannon's entropy of a histogram in bits."""
    part = np.asarray(counts, np.float64).ravel()
    part = part[part > 0] / max(part.sum(), 1e-300)
    return float(max(0.0, -(part * np.log2(part)).sum()))


def effective_rank(spectrum: npt.ArrayLike) -> float:
    """Returns how many dimensions a spectrum spreads over: exp of its Shannon entropy.

    ``exp(-sum p ln p)`` with ``p = s / sum s`` (Roy and Vetterli, "The effective rank: a measure of
    effective dimensionality", EUSIPCO 2007). ``s`` are the singular values of a matrix; those of a
    covariance are its eigenvalues, the variances along its axes. k equal ones give k; a spectrum of
    zeros gives 0.
    """
    values = np.maximum(np.asarray(spectrum, np.float64), 0)
    if values.sum() <= 0:
        return 0.0
    part = values[values > 0] / values.sum()
    return float(np.exp(-(part * np.log(part)).sum()))


def matrices(weight: npt.NDArray[Any], node: Any) -> list[Matrix]:
    """Returns the matrix of each of a layer's groups: output channels times all that they weigh.

    Args:
        weight: As stored.
        node: Conv, ConvTranspose, Gemm or MatMul.
    """
    value = np.asarray(weight, np.float64)
    group = attributes(node).get("group", 1)
    kind = LAYER_OPS[node.op_type][0]
    if kind == "Conv":
        return list(value.reshape(group, value.shape[0] // group, -1))
    if kind == "ConvTranspose":
        split = value.reshape(group, value.shape[0] // group, *value.shape[1:])
        return [np.moveaxis(one, 1, 0).reshape(one.shape[1], -1) for one in split]
    if kind == "Gemm" and attributes(node).get("transB", 0):
        return [value]
    return [value.T]


def stored_form(rows: Sequence[Matrix], weight: npt.NDArray[Any], node: Any) -> npt.NDArray[Any]:
    """Undoes ``matrices``: returns weights of the shape and type of ``weight``."""
    kind = LAYER_OPS[node.op_type][0]
    if kind == "Conv":
        value = np.concatenate(rows).reshape(weight.shape)
    elif kind == "ConvTranspose":
        inner = (weight.shape[1], weight.shape[0] // len(rows), *weight.shape[2:])
        value = np.concatenate([np.moveaxis(one.reshape(inner), 1, 0) for one in rows])
    elif kind == "Gemm" and attributes(node).get("transB", 0):
        value = rows[0]
    else:
        value = rows[0].T
    return np.ascontiguousarray(value).astype(weight.dtype)


def energy_rank(matrix: Matrix, energy: float = ENERGY) -> int:
    """Returns the least number of singular values that hold a part of the sum of their squares."""
    squares = np.linalg.svd(matrix, compute_uv=False) ** 2
    if squares.sum() <= 0:
        return 0
    return int(np.searchsorted(np.cumsum(squares) / squares.sum(), energy - 1e-12) + 1)


def of_weights(traced: Traced, node: Any) -> OfWeights | None:
    """Returns what a layer's weights tell; None where it has none, or of more than a matrix."""
    weight = float_weight(traced, node)
    if weight is None:
        return None
    rows = matrices(weight, node)
    codes = _codes(traced, node)
    if codes is None:
        scale = np.concatenate([np.abs(m).max(axis=1, keepdims=True) for m in rows])
        whole = np.concatenate([m.reshape(len(m), -1) for m in rows])
        codes = np.rint(127 * whole / np.where(scale > 0, scale, 1)).astype(np.int64)
    return OfWeights(
        entropy_bits(np.unique(codes, return_counts=True)[1]),
        sum(energy_rank(m) for m in rows),
        sum(min(m.shape) for m in rows),
        sum(int((~m.any(axis=1)).sum()) for m in rows),
    )


def float_weight(traced: Traced, node: Any) -> npt.NDArray[Any] | None:
    """Returns a layer's weights if they are real numbers in the form of a matrix per group."""
    if LAYER_OPS[node.op_type][0] != node.op_type:
        return None
    weight = traced.weight_of(node)
    if weight is None or not np.issubdtype(weight.dtype, np.floating) or weight.size == 0:
        return None
    return weight if "Conv" in node.op_type or weight.ndim == 2 else None


def of_activations(
    traced: Traced,
    layers: Sequence[Layer],
    inputs: Iterable[npt.NDArray[Any]],
    *,
    total: int | None = None,
    seed: int = 0,
    progress: Callable[..., Any] = tqdm,
) -> dict[str, OfActivations]:
    """Runs the model on photos and returns what each layer's output tells.

    Args:
        traced: The graph.
        layers: Of it.
        inputs: The network's input, photo by photo.
        total: Number of photos, for the bar.
        seed: Of the sample that is kept.
        progress: Like ``tqdm``.

    Returns:
        By ``Layer.output``.
    """
    names = list(dict.fromkeys(n for layer in layers for n in (layer.output, layer.behind)))
    runner = session(traced.model, names)
    feed = runner.get_inputs()[0].name
    rng = np.random.default_rng(seed)
    gathered = {layer.output: _Gathered() for layer in layers}
    for tensor in progress(inputs, total=total, desc="activations", unit="photo"):
        values = dict(zip(names, runner.run(names, {feed: tensor}), strict=True))
        for layer in layers:
            spread = LAYER_OPS[layer.op][0] in ("Conv", "ConvTranspose")
            own, behind = (_pixels(values[n], spread) for n in (layer.output, layer.behind))
            gathered[layer.output].add(own, behind, rng)
    return {name: one.result() for name, one in gathered.items() if one.pixels}


class _Gathered:
    """Sums over the pixels of one layer, photo after photo."""

    def __init__(self) -> None:
        self.pixels = 0
        self._shift: Matrix = np.zeros(0)
        self._sum: Matrix = np.zeros(0)
        self._outer: Matrix = np.zeros((0, 0))
        self._low: FloatArray = np.zeros(0, np.float32)
        self._high: FloatArray = np.zeros(0, np.float32)
        self._values: list[FloatArray] = []

    def add(self, own: FloatArray, behind: FloatArray, rng: np.random.Generator) -> None:
        """Adds one photo: float32 ``(pixels, channels)`` before and behind the activation."""
        if not self.pixels:
            # Around the first photo's mean the sums stay small, and so does their rounding.
            self._shift = own.mean(axis=0, dtype=np.float64)
            self._sum = np.zeros_like(self._shift)
            self._outer = np.zeros((own.shape[1],) * 2)
            self._low, self._high = behind.min(axis=0), behind.max(axis=0)
        centred = own - self._shift.astype(np.float32)
        self.pixels += len(own)
        self._sum += centred.sum(axis=0, dtype=np.float64)
        self._outer += centred.T @ centred
        self._low = np.minimum(self._low, behind.min(axis=0))
        self._high = np.maximum(self._high, behind.max(axis=0))
        flat = behind.ravel()
        place = rng.integers(0, flat.size, min(flat.size, SAMPLE_PER_PHOTO))
        self._values.append(flat[place])

    def result(self) -> OfActivations:
        """Returns what it comes to."""
        mean = self._sum / self.pixels
        covariance = self._outer / self.pixels - np.outer(mean, mean)
        finite = np.isfinite(covariance).all()
        spectrum = np.linalg.eigvalsh(covariance) if finite else np.zeros(1)
        spectrum[spectrum < 1e-9 * max(spectrum.max(), 0)] = 0  # rounding
        low, high = float(self._low.min()), float(self._high.max())
        values = np.concatenate(self._values)
        values = values[np.isfinite(values)]
        counts = np.zeros(1)
        if high > low and np.isfinite([low, high]).all():
            counts, _ = np.histogram(values, bins=LEVELS, range=(low, high))
        still = (self._high - self._low) <= CONSTANT * max(high - low, 1e-30)
        return OfActivations(
            entropy_bits(counts),
            effective_rank(spectrum),
            len(mean),
            int(still.sum()),
            self.pixels,
            low,
            high,
            values[:, None],
        )


def _pixels(value: npt.NDArray[Any], spread: bool) -> FloatArray:
    """Returns ``(pixels, channels)``: channels are axis 1 of a feature map, else the last."""
    flat = np.asarray(value, np.float32)
    if spread:
        flat = np.moveaxis(flat, 1, -1)
    return flat.reshape(-1, flat.shape[-1])


def _codes(traced: Traced, node: Any) -> npt.NDArray[np.int64] | None:
    """Returns the stored codes of quantized weights."""
    maker = traced.links.maker.get(node.input[LAYER_OPS[node.op_type][1][0]])
    if maker is None or maker.op_type != "DequantizeLinear":
        return None
    stored = traced.links.stored.get(maker.input[0])
    if stored is None:
        return None
    return np.asarray(require_onnx().numpy_helper.to_array(stored)).astype(np.int64)
