"""Weights in 8 bits, as a QDQ graph stores them: codes, and a scale per output channel."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from ..models.detections import FloatArray
from ..models.graph import attributes, require_onnx
from .calibrate import Grid

if TYPE_CHECKING:
    from .qdq import Links


def bias_fits(node: Any, links: Links) -> bool:
    """Whether a weighted node's bias is one number per output channel, or one for all."""
    if len(node.input) < 3 or node.input[2] not in links.stored:
        return True
    dims = list(links.stored[node.input[2]].dims)
    return all(size == 1 for size in dims[:-1])


def weight_scales(
    flat: FloatArray, least: FloatArray, power: npt.NDArray[Any] | None = None
) -> FloatArray:
    """Returns the symmetric 8-bit scale per output channel with the least square error.

    Args:
        flat: Weights, ``(channels, weights per channel)``; a channel may be all zero.
        least: No scale is smaller than this.
        power: What the square error of each weight is multiplied by.
    """
    top = np.maximum(np.abs(flat).max(axis=1) / 127, least)
    best, cost = top, np.full(len(flat), np.inf, np.float32)
    for shrink in np.arange(1.0, 0.59, -0.04):
        scale = np.maximum(top * np.float32(shrink), least)
        codes = np.clip(np.rint(flat / scale[:, None]), -127, 127)
        square = (codes * scale[:, None] - flat) ** 2
        error = (square if power is None else square * power).sum(axis=1)
        better = error < cost
        best, cost = np.where(better, scale, best), np.where(better, error, cost)
    chosen: FloatArray = best.astype(np.float32)
    return chosen


@dataclass(frozen=True)
class Weights:
    """One convolution's weights in 8 bits: codes int8, a float32 scale per output channel."""

    codes: npt.NDArray[np.int8]
    scales: FloatArray


def quantize_weight(
    weight: FloatArray, bias: FloatArray, input_scale: float, axis: int = 0
) -> Weights:
    """Returns weights rounded to nearest on the best scale per output channel.

    A dead channel (all weights zero) or one with a huge bias gets a scale on which its bias still
    fits into 32 bits with digits to spare.
    """
    first = np.moveaxis(weight, axis, 0)
    flat = first.reshape(len(first), -1)
    least = np.maximum(np.abs(bias) / (2**29 * input_scale), 1e-8).astype(np.float32)
    scales = weight_scales(flat, least)
    codes = np.clip(np.rint(flat / scales[:, None]), -127, 127).astype(np.int8)
    return Weights(np.moveaxis(codes.reshape(first.shape), 0, axis), scales)


def stored_in_8_bits(
    node: Any,
    links: Links,
    grid: Grid,
    store: Callable[[str, Any], str],
    nodes: list[Any],
    given: Weights | None = None,
) -> None:
    """Puts a weighted node's weights in 8 bits and its bias in 32 bits on the matching grid.

    Args:
        node: Changed in place.
        links: Of the float graph.
        grid: Of the node's input.
        store: Keeps a value under a name, and returns the name.
        nodes: Where what the node reads its weights through is put.
        given: Codes to use in place of rounding to nearest.
    """
    onnx = require_onnx()
    numpy_helper = onnx.numpy_helper
    name = node.input[1]
    weight = numpy_helper.to_array(links.stored[name]).astype(np.float32)
    transposed = node.op_type == "Gemm" and bool(attributes(node).get("transB", 0))
    axis = 0 if node.op_type == "Conv" or transposed else weight.ndim - 1
    has_bias = len(node.input) > 2 and node.input[2] in links.stored
    bias = np.zeros(weight.shape[axis], np.float32)
    if has_bias:
        stored = numpy_helper.to_array(links.stored[node.input[2]]).astype(np.float32)
        bias = np.broadcast_to(stored.reshape(-1), bias.shape)
    chosen = given or quantize_weight(weight, bias, grid.scale, axis)
    scales = chosen.scales
    _stored_codes(node, 1, chosen.codes, scales, axis, store, nodes)
    if has_bias:
        step = scales.astype(np.float64) * grid.scale
        limit = 2**31 - 1
        codes = np.clip(np.rint(bias.astype(np.float64) / step), -limit, limit).astype(np.int32)
        _stored_codes(node, 2, codes, step.astype(np.float32), 0, store, nodes)


def _stored_codes(
    node: Any,
    index: int,
    codes: npt.NDArray[Any],
    scales: FloatArray,
    axis: int,
    store: Any,
    nodes: list[Any],
) -> None:
    """Makes a node read stored codes through a DequantizeLinear per channel.

    The zero points are all 0, and the same ones for all nodes: they would be a tenth of the file.
    """
    stem = f"{node.name}/{index}"
    zeros = store(f"zeros/{codes.dtype}/{len(scales)}", np.zeros(len(scales), codes.dtype))
    inputs = [store(f"{stem}/q", codes), store(f"{stem}/scale", scales), zeros]
    nodes.append(require_onnx().helper.make_node("DequantizeLinear", inputs, [stem], axis=axis))
    node.input[index] = stem
