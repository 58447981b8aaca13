"""Which layers of an INT8 model get how few bits, so that its file keeps within a size."""

from __future__ import annotations

import bisect
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np

from ..models.graph import QUANTIZERS, attributes, copied, require_onnx, set_nodes
from ..models.spec import ModelSpec
from .bits_graph import PLANES, packed_bytes
from .calibrate import read_photos, session
from .lowbit_round import Fit, Layer, as_column, file_bytes, packed_model, weight_count
from .qdq import Links, widened_codes

PROBE_BITS: Final = 4
"""Width at which each layer's harm is measured; at others it goes with the layer's own error."""
UNPACK_BYTES: Final = {1: 150, 2: 300, 3: 450}
"""What the operators that unpack one weight take in a file, by planes."""
BITS_MIN: Final = 2
"""A single bit is not chosen by itself: without long training it leaves nothing of a layer."""
SPARE_BYTES: Final = 96
"""For the name that a recipe may give the result, which is in the file."""


def widths_within(
    model: Any,
    layers: Sequence[Layer],
    fits: Mapping[str, Fit],
    photos: Sequence[Path],
    spec: ModelSpec,
    bytes_max: int,
    progress: Callable[..., Any],
) -> tuple[dict[str, int], tuple[str, ...]]:
    """Returns the widths that keep a file within a size with the least harm, and notes."""
    most = {layer.name: 8 for layer in layers}
    limit = bytes_max - SPARE_BYTES

    def size(widths: Mapping[str, int]) -> int:
        return file_bytes(_any_codes(model, layers, widths))

    if size(most) <= limit:
        return most, ("weights stay at 8 bits: the file is small enough",)
    options = {}
    for layer, harm in harms(model, layers, fits, photos, spec, progress):
        fit, count = fits[layer.name], weight_count(model, layer)
        own = max(fit.error(PROBE_BITS), 1e-30)
        options[layer.name] = [(8, count, 0.0)] + [
            (
                bits,
                packed_bytes(count, bits) + UNPACK_BYTES[len(PLANES[bits])],
                harm * fit.error(bits) / own,
            )
            for bits in sorted(PLANES, reverse=True)
            if bits >= BITS_MIN
        ]
    steps = least_harm_first(options)

    def after(count: int) -> dict[str, int]:
        return most | dict(steps[:count])  # of a layer's steps the last one counts

    count = bisect.bisect_left(range(len(steps) + 1), True, key=lambda k: size(after(k)) <= limit)
    if count <= len(steps):
        return after(count), ()
    widths = after(len(steps))
    found = size(widths) + SPARE_BYTES
    note = (
        f"quantize.bytes_max: expected at most {bytes_max} bytes, found no way below {found}: "
        "this is the smallest file; cut channels (prune) to get further"
    )
    return widths, (note,)


def _any_codes(model: Any, layers: Sequence[Layer], widths: Mapping[str, int]) -> Any:
    """Returns a file as large as the one with these widths; its codes, all 1, fit every width."""
    numpy_helper = require_onnx().numpy_helper
    blank = copied(model)
    names = {layer.codes for layer in layers}
    for tensor in blank.graph.initializer:
        if tensor.name in names:
            ones = np.ones(tuple(tensor.dims), np.int8)
            tensor.CopyFrom(numpy_helper.from_array(ones, tensor.name))
    return packed_model(blank, layers, widths)


def harms(
    model: Any,
    layers: Sequence[Layer],
    fits: Mapping[str, Fit],
    photos: Sequence[Path],
    spec: ModelSpec,
    progress: Callable[..., Any],
) -> Iterator[tuple[Layer, float]]:
    """Yields how far the outputs move when one layer has ``PROBE_BITS`` bits.

    Activations are in float meanwhile: on their grids, any small change rolls the dice of all
    roundings behind it, and hides what the layer itself does.
    """
    import torch

    from .refine import output_distance

    plain = in_float(model)
    feeds = list(read_photos(photos, spec))

    def outputs(changed: Any) -> list[list[Any]]:
        runner = session(changed)
        name = runner.get_inputs()[0].name
        return [[torch.from_numpy(o) for o in runner.run(None, {name: f})] for f in feeds]

    wanted = outputs(plain)
    numpy_helper = require_onnx().numpy_helper
    stored = {t.name: t for t in plain.graph.initializer}
    for layer in progress(layers, desc="harm", unit="layer"):
        tensor = stored[layer.real]
        kept = tensor.SerializeToString()
        codes, scales = fits[layer.name].rounded(PROBE_BITS)
        value = np.moveaxis(codes * as_column(scales, codes.ndim), 0, layer.axis)
        value = np.ascontiguousarray(value, np.float32)
        tensor.CopyFrom(numpy_helper.from_array(value, layer.real))
        pairs = zip(outputs(plain), wanted, strict=True)
        yield layer, float(np.mean([float(output_distance(spec, a, b)) for a, b in pairs]))
        tensor.ParseFromString(kept)


def in_float(model: Any) -> Any:
    """Returns a QDQ model without its grids: 8-bit weights as floats, activations not rounded."""
    onnx = require_onnx()
    result = copied(model)
    graph = result.graph
    links = Links(model.graph)
    array = onnx.numpy_helper.to_array
    same: dict[str, str] = {}
    nodes = []
    widened = widened_codes(links)
    stored = {**links.stored, **{new: links.stored[old] for new, old in widened.items()}}
    for node in graph.node:
        if node.output[0] in widened:
            continue
        for index, name in enumerate(node.input):
            node.input[index] = same.get(name, name)
        is_stored = node.op_type == "DequantizeLinear" and node.input[0] in stored
        if node.op_type in QUANTIZERS and not is_stored:
            same[node.output[0]] = node.input[0]
        elif is_stored:
            codes, scale, *zero = (array(stored[name]) for name in node.input)
            axis = attributes(node).get("axis", 1)
            ends = [scale, *zero]
            if scale.ndim:
                shape = [-1 if i == axis % codes.ndim else 1 for i in range(codes.ndim)]
                ends = [e.reshape(shape) for e in ends]
            shift = ends[1].astype(np.float64) if zero else 0.0
            real = (codes.astype(np.float64) - shift) * ends[0]
            graph.initializer.append(
                onnx.numpy_helper.from_array(real.astype(np.float32), node.output[0])
            )
        else:
            nodes.append(node)
    outputs = {o.name for o in graph.output}
    nodes += [onnx.helper.make_node("Identity", [same[n]], [n]) for n in same if n in outputs]
    set_nodes(graph, nodes)
    return result


def least_harm_first(
    options: Mapping[str, Sequence[tuple[int, float, float]]],
) -> list[tuple[str, int]]:
    """Returns steps (layer, bits) in the order of harm per byte saved.

    Steps go along each layer's lower convex hull, so that a layer's own steps keep their order.

    Args:
        options: Layer -> (bits, bytes, harm), the first the one to start from.
    """
    steps: list[tuple[float, str, int]] = []
    for name, rows in options.items():
        at = rows[0]
        while below := [r for r in rows if r[1] < at[1]]:
            best = min(below, key=lambda r: ((r[2] - at[2]) / (at[1] - r[1]), r[1]))
            steps.append(((best[2] - at[2]) / (at[1] - best[1]), name, best[0]))
            at = best
    return [(name, bits) for _, name, bits in sorted(steps, key=lambda step: step[0])]
