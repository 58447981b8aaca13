"""Rounds weights so that the outputs stay right, not each weight by itself."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from ..models.detections import FloatArray
from ..models.graph import copied, require_onnx
from .calibrate import Grid, Seen
from .qdq import Layout, Links, Weights, is_weighted, weight_scales

DAMPING = 0.01
"""Added to the inputs' second moments, as a part of their mean: keeps the inverse tame."""
DoubleArray = npt.NDArray[np.float64]


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
            moments = (values.T.astype(np.float64) @ values) / len(values)
            scales = weight_scales(flat, least, np.diag(moments))
            codes = compensated(flat.astype(np.float64), scales, moments)
        else:
            scales = weight_scales(flat, least)
            codes = np.clip(np.rint(flat / scales[:, None]), -127, 127)
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


def compensated(weight: DoubleArray, scales: FloatArray, moments: DoubleArray) -> DoubleArray:
    """Returns codes ``(channels, inputs)``, rounded with the error fed forward; zeros stay zero.

    Args:
        weight: ``(channels, inputs)``.
        scales: ``(channels,)``.
        moments: Second moments of the inputs, ``(inputs, inputs)``.
    """
    power = np.diag(moments)
    order = np.argsort(-power)
    damped = moments[np.ix_(order, order)] + DAMPING * max(power.mean(), 1e-12) * np.eye(len(power))
    upper = np.linalg.cholesky(np.linalg.inv(damped)).T
    left = weight[:, order].copy()
    zero = left == 0  # a sparse network's: what is fed forward must not fill them
    codes = np.zeros_like(left)
    step = scales.astype(np.float64)
    for j in range(len(order)):
        rounded = np.clip(np.rint(left[:, j] / step), -127, 127)
        codes[:, j] = np.where(zero[:, j], 0, rounded)
        error = (left[:, j] - codes[:, j] * step) / upper[j, j]
        left[:, j + 1 :] -= error[:, None] * upper[j, j + 1 :]
    result = np.empty_like(codes)
    result[:, order] = codes
    return result


def lost_mean(lost: FloatArray, mean: FloatArray) -> DoubleArray:
    """Returns the mean output per channel that the lost part of the weights would have added."""
    groups = len(mean) // lost.shape[1]
    per_input = lost.reshape(len(lost), lost.shape[1], -1).sum(axis=2).astype(np.float64)
    inputs = mean.reshape(groups, lost.shape[1]).repeat(len(lost) // groups, axis=0)
    result: DoubleArray = (per_input * inputs).sum(axis=1)
    return result
