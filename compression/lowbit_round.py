"""Rounds the weights of an INT8 model to fewer bits, so that its outputs stay right.

Error feedback while rounding is optimal brain quantization in the order-free form of Frantar et
al., "GPTQ" (arXiv 2210.17323); 1 bit is a sign times a scale per channel as in Rastegari et al.,
"XNOR-Net" (arXiv 1603.05279).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from ..models.detections import FloatArray
from ..models.graph import attributes, copied, require_onnx
from .bits_graph import levels, store_packed, store_sparingly
from .calibrate import Seen
from .half import half_weights
from .qdq import WEIGHT_OPS, Links
from .rounding import DoubleArray, Mask, compensated, lost_mean, nearest, second_moments
from .slim import shorten_names

SHRINKS: Final = np.geomspace(1.0, 0.25, 25)


@dataclass(frozen=True)
class Layer:
    """One weighted node of a QDQ model.

    Attributes:
        name: The node's first output.
        real: Tensor that its DequantizeLinear makes of the codes.
        codes: Initializer, int8.
        scale: Initializer, float32 per output channel.
        axis: Of the output channels.
        bias: Initializers of the bias: codes int32 and scale; None if it has none.
        source: Its data input.
        input_scale: Of that, or None if it is in float.
    """

    name: str
    real: str
    codes: str
    scale: str
    axis: int
    bias: tuple[str, str] | None
    source: str
    input_scale: float | None


def find_layers(model: Any) -> list[Layer]:
    """Returns the weighted nodes of a QDQ model whose weights are stored as int8."""
    onnx = require_onnx()
    links = Links(model.graph)
    array = onnx.numpy_helper.to_array
    found: list[Layer] = []
    taken: set[str] = set()
    for node in model.graph.node:
        if node.op_type not in WEIGHT_OPS:
            continue
        makers: list[Any] = [links.maker.get(name) for name in node.input]
        data, weight, *rest = makers
        if not _is_stored(weight, links, onnx.TensorProto.INT8) or weight.input[0] in taken:
            continue
        bias = None
        if rest and _is_stored(rest[0], links, onnx.TensorProto.INT32):
            bias = (rest[0].input[0], rest[0].input[1])
        elif len(node.input) > 2:
            continue  # a bias in float: not of our making
        on_grid = data is not None and data.op_type == "DequantizeLinear"
        step = float(array(links.stored[data.input[1]])) if on_grid else None
        axis = attributes(weight).get("axis", 1)
        taken.add(weight.input[0])
        found.append(
            Layer(
                node.output[0],
                node.input[1],
                weight.input[0],
                weight.input[1],
                axis % len(links.stored[weight.input[0]].dims),
                bias,
                node.input[0],
                step,
            )
        )
    return found


def _is_stored(maker: Any, links: Links, kind: int) -> bool:
    """Whether a node is a DequantizeLinear of stored codes, with a scale per channel."""
    if maker is None or maker.op_type != "DequantizeLinear":
        return False
    if any(name not in links.stored for name in maker.input[:2]):
        return False
    codes, scale = (links.stored[name] for name in maker.input[:2])
    return bool(codes.data_type == kind and len(scale.dims) == 1)


def weight_count(model: Any, layer: Layer) -> int:
    """Returns how many weights a layer has."""
    dims = next(t.dims for t in model.graph.initializer if t.name == layer.codes)
    return int(np.prod(dims))


@dataclass(frozen=True)
class Fit:
    """A layer's weights and what is needed to round them well.

    Attributes:
        weight: As 8 bits have it, float64 ``(channels, inputs / groups, ...)``.
        mean: Mean of each input channel.
        moments: Second moments of the inputs, ``(inputs, inputs)``; None where the kernel sees
            more than one pixel or one group: those weights are rounded to nearest.
        zero: Which weights stay zero, of the shape of ``weight``; None: none has to. A single bit
            has no zero.
    """

    weight: DoubleArray
    mean: FloatArray
    moments: DoubleArray | None
    zero: Mask | None = None

    @classmethod
    def of(cls, model: Any, layer: Layer, seen: Seen, zero: Mask | None = None) -> Fit:
        """Reads a layer's weights and the moments of its inputs; ``zero`` lies as they do."""
        stored = {t.name: t for t in model.graph.initializer}
        array = require_onnx().numpy_helper.to_array
        codes = np.moveaxis(array(stored[layer.codes]).astype(np.float64), layer.axis, 0)
        weight = codes * as_column(array(stored[layer.scale]).astype(np.float64), codes.ndim)
        values, moments = seen.values, None
        if weight[0].size == values.shape[1] == weight.shape[1]:
            moments = second_moments(values)
        zero = None if zero is None else np.moveaxis(zero, layer.axis, 0)
        return cls(weight, values.mean(axis=0), moments, zero)

    def rounded(self, bits: int) -> tuple[npt.NDArray[np.int8], DoubleArray]:
        """Returns the weights as codes of a width, and the scale per channel."""
        flat = self.weight.reshape(len(self.weight), -1)
        power = None if self.moments is None else np.diag(self.moments)
        scales = fitted_scales(flat, bits, power)
        if self.moments is None:
            codes = nearest(flat / scales[:, None], bits)
        else:
            # Code 0 of 8 bits is not enough: small weights of a dense network have it, too.
            zero = np.zeros(flat.shape, bool) if self.zero is None else self.zero
            codes = compensated(flat, scales, self.moments, bits, zero.reshape(flat.shape))
            scales = refitted(flat, codes, scales, self.moments)
        return codes.reshape(self.weight.shape).astype(np.int8), scales

    def error(self, bits: int) -> float:
        """Returns the square error of the output that rounding leaves, summed over channels."""
        codes, scales = self.rounded(bits)
        lost = (codes * as_column(scales, codes.ndim) - self.weight).reshape(len(codes), -1)
        if self.moments is None:
            return float((lost**2).sum())
        centred = self.moments - np.outer(self.mean, self.mean)  # the mean goes into the bias
        return float(np.einsum("oi,ij,oj->", lost, centred, lost))


def as_column(values: DoubleArray, ndim: int) -> DoubleArray:
    """Returns one number per output channel in the shape that meets ``ndim`` axes of weights."""
    return values.reshape(-1, *[1] * (ndim - 1))


def fitted_scales(flat: DoubleArray, bits: int, power: DoubleArray | None) -> DoubleArray:
    """Returns the scale per channel with the least square error.

    Args:
        flat: Weights, ``(channels, weights per channel)``; a channel may be all zero.
        bits: Width.
        power: What the square error of each weight is multiplied by.
    """
    by = np.ones(flat.shape[1]) if power is None else power + 1e-12
    if bits == 1:  # the least squares of a sign times a scale: the mean magnitude
        mean: DoubleArray = np.maximum((np.abs(flat) * by).sum(axis=1) / by.sum(), 1e-8)
        return mean
    allowed = levels(bits).astype(np.float64)
    top = np.maximum(flat.max(axis=1) / allowed[-1], flat.min(axis=1) / allowed[0])
    best: DoubleArray = np.maximum(top, 1e-8)
    cost = np.full(len(flat), np.inf)
    for shrink in SHRINKS:
        scale = np.maximum(top * shrink, 1e-8)
        error = ((nearest(flat / scale[:, None], bits) * scale[:, None] - flat) ** 2 * by).sum(1)
        best, cost = np.where(error < cost, scale, best), np.minimum(error, cost)
    return best


def refitted(
    flat: DoubleArray, codes: DoubleArray, scales: DoubleArray, moments: DoubleArray
) -> DoubleArray:
    """Returns the scales with the least square error of the output, now that codes are fixed."""
    past = codes @ moments
    best = (past * flat).sum(axis=1) / np.maximum((past * codes).sum(axis=1), 1e-30)
    return np.where((best > 0.5 * scales) & (best < 2 * scales), best, scales)


def rounded_model(
    quantized: Any, layers: Sequence[Layer], fits: Mapping[str, Fit], widths: Mapping[str, int]
) -> Any:
    """Returns the QDQ model with codes of the given widths, each still in a byte.

    What rounding moves the mean of an output by goes into the bias.
    """
    result = copied(quantized)
    for layer in layers:
        fit, bits = fits[layer.name], widths[layer.name]
        if bits == 8:
            continue
        codes, scales = fit.rounded(bits)
        lost = fit.weight - codes * as_column(scales, codes.ndim)
        put_weight(result, layer, codes, scales, lost_mean(lost.astype(np.float32), fit.mean))
    return result


def put_weight(
    model: Any,
    layer: Layer,
    codes: npt.NDArray[np.int8],
    scales: DoubleArray,
    bias_change: DoubleArray | None = None,
    bias: DoubleArray | None = None,
) -> None:
    """Stores a layer's codes and scales in place; its bias moves onto the new scales.

    Args:
        model: QDQ.
        layer: Of it.
        codes: Output channels first.
        scales: One per output channel.
        bias_change: What is added to the bias as it is.
        bias: A new bias, in its place.
    """
    numpy_helper = require_onnx().numpy_helper
    stored = {t.name: t for t in model.graph.initializer}

    def put(name: str, value: npt.NDArray[Any]) -> None:
        stored[name].CopyFrom(numpy_helper.from_array(np.ascontiguousarray(value), name))

    if layer.bias is not None:
        old, step = (numpy_helper.to_array(stored[n]).astype(np.float64) for n in layer.bias)
        real = old * step if bias is None else bias
        real = real if bias_change is None else real + bias_change
        unit = layer.input_scale or 1.0
        limit = 2**31 - 1
        # A dead channel's scale would push its bias out of 32 bits.
        scales = np.maximum(scales, np.abs(real) / (2**29 * unit))
        scales = scales.astype(np.float32).astype(np.float64)
        fresh = scales * unit
        put(layer.bias[0], np.clip(np.rint(real / fresh), -limit, limit).astype(np.int32))
        put(layer.bias[1], fresh.astype(np.float32))
    put(layer.codes, np.moveaxis(codes, 0, layer.axis))
    put(layer.scale, scales.astype(np.float32))


def packed_model(model: Any, layers: Sequence[Layer], widths: Mapping[str, int]) -> Any:
    """Returns the file's form of a model whose codes fit their widths; it computes the same.

    Only weights that were left in float change: they are stored in 16 bits.
    """
    packed = store_packed(store_sparingly(model), {x.codes: widths[x.name] for x in layers})
    packed = half_weights(packed, axes_min=2)
    shorten_names(packed)
    return packed


def file_bytes(model: Any) -> int:
    """Returns how long a model's file is."""
    return len(model.SerializeToString())
