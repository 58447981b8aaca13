"""Rounds weights so that the outputs stay right, not each weight by itself."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from ..models.detections import FloatArray
from ..models.graph import copied, require_onnx
from .bits_graph import levels
from .calibrate import Grid, Seen
from .qdq import WEIGHT_OPS, Layout, Links, is_weighted
from .qdq_weights import Weights, weight_scales

DAMPING = 0.01
"""Added to the inputs' second moments, as a part of their mean: keeps the inverse tame."""
DoubleArray = npt.NDArray[np.float64]
Mask = npt.NDArray[np.bool_]


def round_weights(
    model: Any, layout: Layout, grids: Mapping[str, Grid], seen: Mapping[str, Seen]
) -> tuple[Any, dict[str, Weights]]:
    """Returns the graph with biases that fit rounded weights, and the rounded weights.

    Pointwise convolutions are rounded one input channel after the other; what each rounding does
    to the output is made up for by the channels that are still to come, as far as they go
    together in the photos (optimal brain quantization, in the order-free form of Frantar et al.,
    "GPTQ", arXiv 2210.17323). The others are rounded to nearest. For all, the mean of what is
    left goes into the bias.

    Args:
        model: The float graph that will be quantized.
        layout: What will be integer.
        grids: On which grids.
        seen: What the convolutions' inputs were on photos.
    """
    numpy_helper = require_onnx().numpy_helper
    result = copied(model)
    links = Links(model.graph)
    stored = {t.name: t for t in result.graph.initializer}
    found: dict[str, Weights] = {}
    for node in model.graph.node:
        if node.name not in layout.nodes or node.op_type != "Conv" or len(node.input) < 3:
            continue
        if not is_weighted(node, links.stored) or node.input[2] not in stored:
            continue
        source = node.input[0]
        weight = numpy_helper.to_array(stored[node.input[1]]).astype(np.float32)
        bias = numpy_helper.to_array(stored[node.input[2]]).astype(np.float32)
        values = seen[source].values
        least = least_scales(bias, grids[layout.group[source]].scale)
        flat = weight.reshape(len(weight), -1)
        if weight.shape[1:] == (values.shape[1], *[1] * (weight.ndim - 2)):  # pointwise, dense
            moments = second_moments(values)
            scales = weight_scales(flat, least, np.diag(moments))
            codes = compensated(flat.astype(np.float64), scales, moments)
        else:
            scales = weight_scales(flat, least)
            codes = nearest(flat / scales[:, None], 8)
        found[node.name] = Weights(codes.reshape(weight.shape).astype(np.int8), scales)
        lost = (flat - codes * scales[:, None]).reshape(weight.shape)
        fixed = bias + lost_mean(lost, values.mean(axis=0))
        name = node.input[2]
        stored[name].CopyFrom(numpy_helper.from_array(fixed.astype(np.float32), name))
    return result, found


def least_scales(bias: FloatArray, input_scale: float) -> FloatArray:
    """Returns the scale per channel below which its bias would not fit into 32 bits."""
    least: FloatArray = np.maximum(np.abs(bias) / (2**29 * input_scale), 1e-8).astype(np.float32)
    return least


def second_moments(values: FloatArray) -> DoubleArray:
    """Returns the mean product of each two inputs, ``(inputs, inputs)``, of ``(n, inputs)``."""
    moments: DoubleArray = (values.T.astype(np.float64) @ values) / len(values)
    return moments


def nearest(value: npt.NDArray[Any], bits: int) -> npt.NDArray[Any]:
    """Returns the nearest codes of a width, as floats of the given type."""
    if bits == 1:
        signs: npt.NDArray[Any] = np.where(value < 0, -1.0, 1.0)
        return signs
    allowed = levels(bits)
    clipped: npt.NDArray[Any] = np.clip(np.rint(value), allowed[0], allowed[-1])
    return clipped


def compensated(
    weight: DoubleArray,
    scales: npt.NDArray[Any],
    moments: DoubleArray,
    bits: int = 8,
    zero: Mask | None = None,
) -> DoubleArray:
    """Returns codes ``(channels, inputs)``, rounded input by input with the error fed forward.

    Args:
        weight: ``(channels, inputs)``.
        scales: ``(channels,)``.
        moments: Second moments of the inputs, ``(inputs, inputs)``.
        bits: Width of the codes.
        zero: Which codes are 0, ``(channels, inputs)``: those of a sparse network, which what is
            fed forward must not fill. None: those of the weights that are 0. Of no effect at 1
            bit, which has no 0.
    """
    power = np.diag(moments)
    order = np.argsort(-power)
    damped = moments[np.ix_(order, order)] + DAMPING * max(power.mean(), 1e-12) * np.eye(len(power))
    upper = np.linalg.cholesky(np.linalg.inv(damped)).T
    left = weight[:, order].copy()
    fixed = (left == 0 if zero is None else zero[:, order]) & (bits > 1)
    codes = np.zeros_like(left)
    step = scales.astype(np.float64)
    for j in range(len(order)):
        codes[:, j] = np.where(fixed[:, j], 0, nearest(left[:, j] / step, bits))
        error = (left[:, j] - codes[:, j] * step) / upper[j, j]
        left[:, j + 1 :] -= error[:, None] * upper[j, j + 1 :]
    result = np.empty_like(codes)
    result[:, order] = codes
    return result


def zeros_of(original: Any, quantized: Any) -> dict[str, Mask]:
    """Returns where the weights of a float model are zero, as a QDQ model of it knows them.

    Args:
        original: The float model.
        quantized: Made of it: its nodes have the names that they have there.

    Returns:
        Tensor that a node of ``quantized`` reads as its weight -> mask of the weight's shape; only
        of those with zeros.
    """
    array = require_onnx().numpy_helper.to_array
    floats, codes = Links(original.graph), Links(quantized.graph)
    known = {node.name: node for node in original.graph.node if is_weighted(node, floats.stored)}
    found: dict[str, Mask] = {}
    for node in quantized.graph.node:
        source = known.get(node.name)
        if source is None or node.op_type not in WEIGHT_OPS:
            continue
        maker = codes.maker.get(node.input[1])
        tensor = codes.stored.get(node.input[1] if maker is None else maker.input[0])
        zero = array(floats.stored[source.input[1]]) == 0
        if tensor is not None and zero.shape == tuple(tensor.dims) and zero.any():
            found[node.input[1]] = zero
    return found


def lost_mean(lost: FloatArray, mean: FloatArray) -> DoubleArray:
    """Returns the mean output per channel that the lost part of the weights would have added."""
    groups = len(mean) // lost.shape[1]
    per_input = lost.reshape(len(lost), lost.shape[1], -1).sum(axis=2).astype(np.float64)
    inputs = mean.reshape(groups, lost.shape[1]).repeat(len(lost) // groups, axis=0)
    result: DoubleArray = (per_input * inputs).sum(axis=1)
    return result
