"""Puts QuantizeLinear/DequantizeLinear pairs into a float graph, as ONNX Runtime fuses them."""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ..models.detections import FloatArray
from ..models.graph import attributes, copied, require_onnx, set_nodes, tensor_shapes
from .calibrate import Grid
from .qdq_weights import Weights, bias_fits, stored_in_8_bits

WEIGHT_OPS = ("Conv", "Gemm", "MatMul")
SAME_GRID_OPS = (
    "Flatten",
    "Gather",
    "MaxPool",
    "Reshape",
    "Resize",
    "Slice",
    "Split",
    "Squeeze",
    "Transpose",
    "Unsqueeze",
)
"""Operators that move values and do not change them: input and output share one grid."""
ARITHMETIC_OPS = (
    "Add",
    "AveragePool",
    "Concat",
    "GlobalAveragePool",
    "LeakyRelu",
    "Mul",
    "Sigmoid",
)
CLIPPING_OPS = ("Relu", "Clip")
"""Run inside the integer convolution before them: the lower end of the grid does the work."""
DEQUANTIZED = "/dq"
"""Ending of a tensor's value after it was rounded to its grid."""
FACTOR_STEP = 1 / 16
"""Factors of equalisation are multiples of it, so that 8 bits hold them exactly."""
INTEGER_READY = (*WEIGHT_OPS, *SAME_GRID_OPS, *ARITHMETIC_OPS, *CLIPPING_OPS)


class Links:
    """Who makes and who reads each tensor of a graph."""

    def __init__(self, graph: Any) -> None:
        """Reads the graph once; make a new one after changing it."""
        self.graph = graph
        self.stored = {t.name: t for t in graph.initializer}
        self.maker: dict[str, Any] = {}
        self.readers: dict[str, list[Any]] = defaultdict(list)
        for node in graph.node:
            for name in node.output:
                self.maker[name] = node
            for name in node.input:
                if name and name not in self.stored:
                    self.readers[name].append(node)
        self.outputs = {o.name for o in graph.output}

    def data_inputs(self, node: Any) -> list[str]:
        """Returns the tensors that a node computes on, without stored and shape inputs."""
        names = node.input[:1] if node.op_type in SAME_GRID_OPS else node.input
        return [n for n in names if n and n not in self.stored]


def widened_codes(links: Links) -> dict[str, str]:
    """Returns tensors that are stored codes, widened on loading -> the stored ones."""
    return {
        node.output[0]: str(node.input[0])
        for node in links.graph.node
        if node.op_type == "Expand" and node.input[0] in links.stored
    }


def is_weighted(node: Any, stored: Collection[str]) -> bool:
    """Whether a node multiplies its data by stored weights."""
    return node.op_type in WEIGHT_OPS and len(node.input) > 1 and node.input[1] in stored


def truncates(node: Any) -> bool:
    """Whether ONNX Runtime cuts digits off instead of rounding when a node runs on 8 bits.

    Its interpolating Resize does, which moves every value down by half a step.
    """
    return bool(node.op_type == "Resize" and attributes(node).get("mode", b"nearest") != b"nearest")


def body_nodes(model: Any) -> list[Any]:
    """Returns the nodes that some convolution lies behind, and the convolutions themselves.

    The rest is the head's tail (sigmoid of scores, concatenation of scores and boxes, decoding):
    it is cheap, and 8 bits destroy it.
    """
    links = Links(model.graph)
    leads: set[str] = set()
    body: list[Any] = []
    for node in reversed(model.graph.node):
        if is_weighted(node, links.stored) or any(name in leads for name in node.output):
            body.append(node)
            leads.update(name for name in node.input if name)
    return body[::-1]


@dataclass(frozen=True)
class Layout:
    """Which nodes compute with integers, and which tensors are therefore stored in 8 bits.

    Attributes:
        nodes: Names of the integer nodes.
        tensors: Tensors on a grid, in the order in which they are made.
        group: Tensor -> the first tensor of those that share its grid.
    """

    nodes: frozenset[str]
    tensors: tuple[str, ...]
    group: Mapping[str, str]


def plan_layout(model: Any, float_nodes: Collection[str] = ()) -> Layout:
    """Decides which tensors get a grid.

    Args:
        model: A float graph with named nodes.
        float_nodes: Names of nodes that have to compute in float.
    """
    links = Links(model.graph)
    nodes: set[str] = set()
    for node in body_nodes(model):
        ready = node.op_type in INTEGER_READY and node.name not in float_nodes
        ready = ready and not truncates(node)
        if node.op_type in WEIGHT_OPS:
            ready = ready and is_weighted(node, links.stored) and bias_fits(node, links)
        elif node.op_type in CLIPPING_OPS:
            source = links.maker.get(node.input[0])
            ready = ready and source is not None and source.name in nodes
            ready = ready and len(links.readers[node.input[0]]) == 1
        if ready:
            nodes.add(node.name)
    # Moving values around in float between float neighbours needs no grid.
    for node in model.graph.node:
        if node.name in nodes and node.op_type in SAME_GRID_OPS:
            source = links.maker.get(node.input[0])
            around = [source] if source is not None else []
            around += [r for out in node.output for r in links.readers[out]]
            if not any(other.name in nodes for other in around):
                nodes.discard(node.name)
    on_grid: dict[str, None] = {}
    for node in model.graph.node:
        if node.name not in nodes:
            continue
        for name in (*links.data_inputs(node), *node.output):
            fused = [r for r in links.readers[name] if r.op_type in CLIPPING_OPS]
            if not (fused and fused[0].name in nodes):
                on_grid[name] = None
    group = {name: name for name in on_grid}

    def first(name: str) -> str:
        while group[name] != name:
            name = group[name]
        return name

    clipped: set[str] = set()  # never below its bound, because the grid ends there
    for node in model.graph.node:
        if node.name not in nodes:
            continue
        sources = links.data_inputs(node)
        own = clipped.intersection(sources)
        if node.op_type in CLIPPING_OPS:
            clipped.update(node.output)
        if node.op_type in SAME_GRID_OPS or node.op_type == "Concat":
            if sources and clipped.issuperset(sources):
                clipped.update(node.output)
                own = set()
            # On a grid with others that do fall below zero it would have to be clipped in float,
            # and the convolution before it computed there: ONNX Runtime concatenates two grids.
            joined = [n for n in (*sources, *node.output) if n in group and n not in own]
            for other in joined[1:]:
                group[first(other)] = first(joined[0])
    return Layout(frozenset(nodes), tuple(on_grid), {name: first(name) for name in on_grid})


def insert(
    model: Any,
    layout: Layout,
    grids: Mapping[str, Grid],
    *,
    signed: bool,
    weights: Mapping[str, Weights] | None = None,
) -> Any:
    """Returns a copy of the model in QDQ form.

    Args:
        model: The float graph that the layout was made for.
        layout: What is to be integer.
        grids: Grid of every tensor in ``layout.tensors``.
        signed: int8 activations, else uint8.
        weights: Codes to use in place of rounding to nearest, by node name.

    Returns:
        A new ``onnx.ModelProto``; stored float weights of integer nodes are gone from it.
    """
    onnx = require_onnx()
    helper, numpy_helper = onnx.helper, onnx.numpy_helper
    result = copied(model)
    graph = result.graph
    links = Links(model.graph)
    tensors: dict[str, Any] = {}
    nodes: list[Any] = []
    read_as: dict[str, str] = {}
    constants: set[str] = set()

    def store(name: str, value: npt.ArrayLike) -> str:
        tensors[name] = numpy_helper.from_array(np.asarray(value), name)
        return name

    def pair(name: str) -> None:
        grid = grids[layout.group[name]]
        zero = np.int8(grid.zero_point - 128) if signed else np.uint8(grid.zero_point)
        stem = layout.group[name]
        ends = [store(f"{stem}/scale", np.float32(grid.scale)), store(f"{stem}/zero", zero)]
        read_as[name] = name + DEQUANTIZED
        codes = f"{name}/q"
        nodes.append(helper.make_node("QuantizeLinear", [name, *ends], [codes]))
        nodes.append(helper.make_node("DequantizeLinear", [codes, *ends], [read_as[name]]))

    widths = functools.cache(lambda: _widths(model))
    originals = {node.name: node for node in model.graph.node}

    def constant(name: str, beside: str) -> str:
        value = numpy_helper.to_array(links.stored[name]).astype(np.float32)
        grid = constant_grid(value)
        codes = np.clip(np.rint(value / grid.scale) + grid.zero_point, 0, 255) - 128 * signed
        kind = np.int8 if signed else np.uint8
        ends = [
            store(f"{name}/q", codes.astype(kind)),
            store(f"{name}/scale", np.float32(grid.scale)),
            store(f"{name}/zero", kind(grid.zero_point - 128 * signed)),
        ]
        stem = name
        channelwise = value.ndim == 4 and value.size == value.shape[1] > 1
        if channelwise and (width := widths().get(beside, 1)) > 1:
            # One number per channel makes ONNX Runtime begin anew at every cell; one per channel
            # and column, only in every row. Widened when the file is loaded.
            stem = f"{name}/{width}"
            wide = [ends[0], store(f"{stem}/shape", np.array([1, value.size, 1, width], np.int64))]
            ends[0] = f"{stem}/wide"
            if stem not in constants:
                nodes.append(helper.make_node("Expand", wide, ends[:1]))
        if stem not in constants:
            constants.add(stem)
            nodes.append(helper.make_node("DequantizeLinear", ends, [stem + DEQUANTIZED]))
        return stem + DEQUANTIZED

    for entry in graph.input:
        if entry.name in layout.group:
            pair(entry.name)
    for node in graph.node:
        integer = node.name in layout.nodes
        for index, name in enumerate(node.input):
            if name in read_as:
                node.input[index] = read_as[name]
        if integer and node.op_type in ("Add", "Mul"):
            before = originals[node.name].input
            for index, name in enumerate(node.input):
                if name in links.stored:
                    node.input[index] = constant(name, before[1 - index])
        if integer and is_weighted(node, links.stored):
            source = originals[node.name].input[0]
            grid = grids[layout.group[source]]
            stored_in_8_bits(node, links, grid, store, nodes, (weights or {}).get(node.name))
        nodes.append(node)
        for name in node.output:
            if name in layout.group and name not in links.outputs:
                pair(name)
    kept = [t for t in graph.initializer if t.name not in tensors]
    del graph.initializer[:]
    graph.initializer.extend([*kept, *tensors.values()])
    set_nodes(graph, nodes)
    return result


def constant_grid(value: FloatArray) -> Grid:
    """Returns the grid of a stored operand; the factors of equalisation lie on it exactly."""
    steps = value / FACTOR_STEP
    if steps.min() >= 0 and steps.max() <= 255 and np.array_equal(steps, np.rint(steps)):
        return Grid(FACTOR_STEP, 0)
    return Grid.over(float(value.min()), float(value.max()))


def _widths(model: Any) -> dict[str, int]:
    """Returns the columns of every map."""
    return {name: s[3] for name, s in tensor_shapes(model).items() if len(s) == 4 and s[3] > 0}
