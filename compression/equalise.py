"""Gives the channels of each tensor equal ranges, without changing what the network computes.

An 8-bit grid spans a whole tensor, so a channel that is a hundred times smaller than another is
left with two or three codes. Dividing a convolution's output channel by ``a`` and multiplying the
weights that read it by ``a`` changes nothing in float, and lets every channel use the grid
(cross-layer equalisation: Nagel et al., "Data-Free Quantization Through Weight Equalization and
Bias Correction", arXiv 1906.04721). Here the channels are followed through activations,
concatenation, splits, shuffles, additions and resizes, so that whole networks can be equalised
and not only pairs of neighbours.

What is not homogeneous stops it, with two exceptions. SiLU: ``x * sigmoid(x)`` becomes
``x' * sigmoid(a * x')``, which is the wanted output divided by ``a``. The head's tail: a
multiplication by ``a`` in float gives it the values it had.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ..models.detections import FloatArray
from ..models.graph import attributes, copied, require_onnx, set_nodes, tensor_shapes
from .calibrate import Seen
from .qdq import FACTOR_STEP, Links, body_nodes, is_weighted

Labels = npt.NDArray[np.int64]
FIXED = 0
"""Label of channels that must keep their scale."""
HOMOGENEOUS_OPS = (
    "AveragePool",
    "GlobalAveragePool",
    "Identity",
    "LeakyRelu",
    "MaxPool",
    "Relu",
    "Resize",
)
BACK = "_back"
"""Ending of tensors that the tail reads after they were multiplied back."""
RESHAPING_OPS = ("Flatten", "Reshape", "Squeeze", "Transpose", "Unsqueeze")


@dataclass(frozen=True)
class ChannelLabels:
    """Which channels have to be scaled together.

    Attributes:
        of: Tensor -> label per channel, int64 ``(channels,)``; equal labels share a factor.
        count: Labels are 0..count - 1; label 0 is fixed at 1.
        gates: Names of Sigmoid nodes that need their input multiplied back.
        tail: Tensors that the head's tail reads and that need multiplying back.
    """

    of: Mapping[str, Labels]
    count: int
    gates: tuple[str, ...]
    tail: tuple[str, ...]


class _Joined:
    """Sets of labels that grow together (union-find)."""

    def __init__(self) -> None:
        """Starts with the fixed label only."""
        self.parent = [FIXED]

    def new(self, count: int) -> Labels:
        start = len(self.parent)
        self.parent.extend(range(start, start + count))
        return np.arange(start, start + count)

    def find(self, label: int) -> int:
        while self.parent[label] != label:
            self.parent[label] = self.parent[self.parent[label]]
            label = self.parent[label]
        return label

    def join(self, a: Labels, b: Labels) -> None:
        for pair in np.unique(np.stack([a.ravel(), b.ravel()]), axis=1).T:
            low, high = sorted((self.find(int(pair[0])), self.find(int(pair[1]))))
            self.parent[high] = low

    def fix(self, labels: Labels) -> None:
        unique = np.unique(labels)
        self.join(unique, np.zeros_like(unique))


def silu_gates(model: Any) -> dict[str, str]:
    """Returns Sigmoid node name -> its input, for every ``Mul(x, Sigmoid(x))`` of the body."""
    links = Links(model.graph)
    found: dict[str, str] = {}
    for node in body_nodes(model):
        if node.op_type != "Sigmoid":
            continue
        readers = links.readers[node.output[0]]
        if len(readers) == 1 and readers[0].op_type == "Mul" and node.input[0] in readers[0].input:
            found[node.name] = node.input[0]
    return found


def label_channels(model: Any, open_gates: Collection[str] = ()) -> ChannelLabels:
    """Follows every channel through the network.

    Args:
        model: A float graph with named nodes and fixed sizes.
        open_gates: Sigmoid nodes of SiLUs that may be equalised through, at the price of one
            multiplication each.
    """
    links = Links(model.graph)
    shapes = tensor_shapes(model)
    body = {node.name for node in body_nodes(model)}
    gates = {n: x for n, x in silu_gates(model).items() if n in open_gates}
    joined = _Joined()
    full: dict[str, Labels] = {}
    used: dict[str, Labels] = {}

    def labels(name: str) -> Labels:
        if name not in full:
            full[name] = np.broadcast_to(np.int64(FIXED), shapes.get(name) or (1, 1))
        return full[name]

    def per_channel(name: str) -> Labels:
        """Labels of axis 1; joined where a tensor mixes channels along other axes."""
        array = labels(name)
        if array.ndim < 2:
            joined.fix(array)
            return np.zeros(1, np.int64)
        first = array[(slice(0, 1), slice(None), *[slice(0, 1)] * (array.ndim - 2))]
        if not np.array_equal(np.broadcast_to(first, array.shape), array):
            joined.join(np.broadcast_to(first, array.shape), array)
        used[name] = first.reshape(-1)
        return used[name]

    for entry in model.graph.input:
        per_channel(entry.name)
    tail: dict[str, None] = {}
    for node in model.graph.node:
        data = links.data_inputs(node)
        out = node.output[0]
        shape = shapes.get(out, ())
        if node.name not in body:
            for name in data:
                maker = links.maker.get(name)
                if maker is not None and maker.op_type == "Conv" and len(shapes[name]) == 4:
                    tail[name] = None
                else:
                    joined.fix(labels(name))
        elif node.op_type == "Conv" and is_weighted(node, links.stored):
            per_channel(data[0])
            ids = joined.new(shape[1]).reshape(1, -1, *[1] * (len(shape) - 2))
            full[out] = np.broadcast_to(ids, shape)
            per_channel(out)
        elif node.op_type in HOMOGENEOUS_OPS and _keeps_channels(shapes[data[0]], shape):
            ids = per_channel(data[0]).reshape(1, -1, *[1] * (len(shape) - 2))
            full[out] = np.broadcast_to(ids, shape)
        elif node.op_type in RESHAPING_OPS and shape and 0 not in shape:
            full[out] = _moved(node, labels(data[0]), shape)
        elif node.op_type == "Concat":
            axis = attributes(node)["axis"]
            full[out] = np.concatenate([labels(n) for n in node.input], axis=axis)
        elif node.op_type == "Split":
            axis = attributes(node).get("axis", 0)
            ends = np.cumsum([shapes[n][axis] for n in node.output])[:-1]
            for name, part in zip(node.output, np.split(labels(data[0]), ends, axis), strict=True):
                full[name] = part
        elif node.op_type == "Add" and len(data) == 2 and shapes[data[0]] == shapes[data[1]]:
            joined.join(labels(data[0]), labels(data[1]))
            full[out] = labels(data[0])
        elif node.op_type == "Sigmoid" and node.name in gates:
            pass
        elif node.op_type == "Mul" and _gate_of(node, links) in gates:
            full[out] = labels(gates[_gate_of(node, links)])
        else:
            for name in data:
                joined.fix(labels(name))
    for entry in model.graph.output:
        joined.fix(labels(entry.name))
    for name in full:
        per_channel(name)
    roots = sorted({joined.find(i) for i in range(len(joined.parent))})
    number = {root: i for i, root in enumerate(roots)}
    lookup = np.array([number[joined.find(i)] for i in range(len(joined.parent))], np.int64)
    of = {name: lookup[ids] for name, ids in used.items()}
    return ChannelLabels(of, len(roots), tuple(gates), tuple(tail))


def _gate_of(node: Any, links: Links) -> str:
    for name in node.input:
        maker = links.maker.get(name)
        if maker is not None and maker.op_type == "Sigmoid":
            return str(maker.name)
    return ""


def _keeps_channels(before: tuple[int, ...], after: tuple[int, ...]) -> bool:
    return len(before) == len(after) and len(after) > 1 and before[1] == after[1] > 0


def _moved(node: Any, labels: Labels, shape: tuple[int, ...]) -> Labels:
    if node.op_type != "Transpose":
        return labels.reshape(shape)
    return labels.transpose(attributes(node).get("perm"))


def rescale(model: Any, labels: ChannelLabels, factor: FloatArray) -> Any:
    """Returns the same network with every channel divided by its label's factor.

    Args:
        model: The graph that was labelled.
        labels: Its channels.
        factor: float ``(labels.count,)``, positive; ``factor[0]`` is 1.
    """
    onnx = require_onnx()
    helper, numpy_helper = onnx.helper, onnx.numpy_helper
    result = copied(model)
    graph = result.graph
    links = Links(model.graph)
    shapes = tensor_shapes(model)
    changed: dict[str, FloatArray] = {}
    body = {node.name for node in body_nodes(model)}
    nodes: list[Any] = []
    renamed: dict[str, str] = {}

    def back(name: str, stem: str) -> str | None:
        """Adds ``name * factor``, and returns its name; None where all factors are 1."""
        by = factor[labels.of[name]].astype(np.float32)
        if (by == 1).all():
            return None
        shape = [1, -1, *[1] * (len(shapes[name]) - 2)]
        stored = numpy_helper.from_array(by.reshape(shape), f"{stem}_factor")
        graph.initializer.append(stored)
        nodes.append(helper.make_node("Mul", [name, stored.name], [stem], f"{stem}_mul"))
        return stem

    for node in graph.node:
        original = [str(n) for n in node.input]
        if node.op_type == "Conv" and is_weighted(node, links.stored):
            _rescale_conv(node, links, labels, factor, changed)
        elif node.name in labels.gates:
            scaled = back(original[0], f"{original[0]}_gate")
            node.input[0] = scaled or original[0]
        elif node.name not in body:
            for index, name in enumerate(original):
                if name in labels.tail:
                    if name not in renamed:
                        renamed[name] = back(name, f"{name}{BACK}") or name
                    node.input[index] = renamed[name]
        nodes.append(node)
    graph.initializer.extend(numpy_helper.from_array(v, name) for name, v in changed.items())
    set_nodes(graph, nodes)
    return result


def _rescale_conv(
    node: Any,
    links: Links,
    labels: ChannelLabels,
    factor: FloatArray,
    changed: dict[str, FloatArray],
) -> None:
    numpy_helper = require_onnx().numpy_helper
    weight = numpy_helper.to_array(links.stored[node.input[1]]).astype(np.float64)
    before = factor[labels.of[node.input[0]]].astype(np.float64)
    after = factor[labels.of[node.output[0]]].astype(np.float64)
    groups = len(before) // weight.shape[1]
    spread = before.reshape(groups, 1, weight.shape[1]).repeat(len(weight) // groups, axis=1)
    shape = [*weight.shape[:2], *[1] * (weight.ndim - 2)]
    weight *= spread.reshape(shape) / after.reshape(-1, *[1] * (weight.ndim - 1))
    stem = node.name
    changed[f"{stem}/scaled"] = weight.astype(np.float32)
    node.input[1] = f"{stem}/scaled"
    if len(node.input) > 2 and node.input[2] in links.stored:
        bias = numpy_helper.to_array(links.stored[node.input[2]]) / after
        changed[f"{stem}/scaled_bias"] = bias.astype(np.float32)
        node.input[2] = f"{stem}/scaled_bias"


REACH = 0.9999
"""This part of a channel's values lies within its reach; a few wild ones do not set its factor."""
SILU_FLOOR = -4.0
"""Below it SiLU is flat: values there need no codes."""


def channel_factors(
    model: Any,
    labels: ChannelLabels,
    seen: Mapping[str, Seen],
    group: Mapping[str, str],
    strength: float,
) -> FloatArray:
    """Returns the factor of every label that brings its channels near their grids' medians.

    Factors are multiples of 1/16 up to 16, which 8 bits hold exactly where an equalised SiLU needs
    them in the graph.

    Args:
        model: The graph that was labelled.
        labels: Its channels.
        seen: What the tensors were on photos.
        group: Tensor -> group of tensors that share a grid.
        strength: 0 leaves all as it is; 1 gives all channels on a grid the same reach, which
            makes the weights that read them uneven in turn.
    """
    links = Links(model.graph)
    reach: dict[str, FloatArray] = {}
    for name, ids in labels.of.items():
        if name not in group or len(seen[name].low) != len(ids):
            continue
        values = seen[name].values
        if {r.op_type for r in links.readers[name]} == {"Mul", "Sigmoid"}:
            values = np.maximum(values, SILU_FLOOR)
        far = np.quantile(np.abs(values), REACH, axis=0).astype(np.float32)
        of_group = reach.setdefault(group[name], np.zeros(labels.count, np.float32))
        np.maximum.at(of_group, ids, far)
    total, count = np.zeros(labels.count), np.zeros(labels.count)
    for of_group in reach.values():
        alive = of_group > 1e-6
        if alive.any():
            total[alive] += np.log(of_group[alive] / np.median(of_group[alive]))
            count += alive
    wanted = np.exp(np.clip(strength * total / np.maximum(count, 1), -20, 20))
    factor = np.clip(np.rint(wanted / FACTOR_STEP), 1, 255) * FACTOR_STEP
    factor[FIXED] = 1.0
    result: FloatArray = factor.astype(np.float32)
    return result


def rescaled_seen(
    seen: Mapping[str, Seen], labels: ChannelLabels, factor: FloatArray, rescaled: Any
) -> dict[str, Seen]:
    """Returns what the rescaled graph's tensors would have been on the same photos."""
    result = dict(seen)
    for name, ids in labels.of.items():
        if name in seen and len(seen[name].low) == len(ids):
            result[name] = seen[name].divided(factor[ids])
    for node in rescaled.graph.node:
        if node.op_type == "Mul" and node.output[0] not in result and node.input[0] in seen:
            result[node.output[0]] = seen[node.input[0]]  # multiplied back
    return result
