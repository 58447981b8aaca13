"""Reads of an ONNX graph what the gate looks at, without the package onnx, which boards lack.

The message types and field numbers are those of ``onnx.proto3``.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from math import prod
from pathlib import Path

from ..models.errors import ModelFileError
from ..models.external_data import _fields as wire_fields
from ..models.external_data import _varint as varint
from ..models.files import is_file
from ..models.graph import FLOAT_CONV_OPS, INTEGER_CONV_OPS, MAC_OPS

GRAPH, METADATA = 7, 14  # of a ModelProto
NODE, INITIALIZER, OUTPUT = 1, 5, 12  # of a GraphProto
SHAPE_ONLY_OPS = (
    "DequantizeLinear", "Expand", "Flatten", "Gather", "Identity", "MaxPool", "QuantizeLinear",
    "Reshape", "Resize", "Slice", "Split", "Squeeze", "Transpose", "Unsqueeze",
)  # fmt: skip
"""Move values, or round them: what is quantized behind them was made before them."""
BODY_OPS = (*MAC_OPS, "Clip", "ConvTranspose", "LeakyRelu", "PRelu", "QGemm", "Relu")
"""What a quantizer behind it belongs to the network's body, not to the head's decoding."""


@dataclass(frozen=True)
class Node:
    """One operator.

    Attributes:
        op: Its type.
        name: Its own, or that of its first output.
        inputs: Tensors that it reads; an empty name is one left out.
        outputs: Tensors that it makes.
    """

    op: str
    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


@dataclass(frozen=True)
class Graph:
    """What a file holds.

    Attributes:
        nodes: In the order of execution.
        stored: Shape of each stored tensor.
        outputs: Of the whole network.
        metadata: The file's own notes.
    """

    nodes: tuple[Node, ...] = ()
    stored: dict[str, tuple[int, ...]] = field(default_factory=dict)
    outputs: tuple[str, ...] = ()
    metadata: dict[str, str] = field(default_factory=dict)


def read_graph(path: Path) -> Graph:
    """Reads an ONNX file.

    Raises:
        ModelFileError: It is missing, not ONNX, or cut off.
    """
    if not is_file(path):
        message = f"{path}: expected an ONNX model, found no such file; check the path"
        raise ModelFileError(message)
    data = path.read_bytes()
    try:
        parts = list(wire_fields(memoryview(data)))
        metadata = dict(_entry(value) for number, value in _inner(parts, METADATA))
        graph = next((value for _, value in _inner(parts, GRAPH)), memoryview(b""))
        return _graph(graph, metadata)
    except ValueError as error:
        message = (
            f"{path}: expected an ONNX model, found {len(data)} bytes that are none ({error}); "
            "copy or export it again"
        )
        raise ModelFileError(message) from error


def convolutions(graph: Graph) -> tuple[int, int]:
    """Returns how many convolutions compute with integers, and how many in float."""
    ops = [node.op for node in graph.nodes]
    return sum(op in INTEGER_CONV_OPS for op in ops), sum(op in FLOAT_CONV_OPS for op in ops)


def weight_scales(graph: Graph) -> tuple[int, int]:
    """Returns how many quantized convolutions have a scale per channel, and how many only one.

    Convolutions of a single output channel count for neither.
    """
    makers = {out: node for node in graph.nodes for out in node.outputs}
    per_channel = per_tensor = 0
    for node in graph.nodes:
        if node.op == "QLinearConv" and len(node.inputs) > 4:
            weight, scale = node.inputs[3], node.inputs[4]
        elif node.op in FLOAT_CONV_OPS and len(node.inputs) > 1:
            maker = makers.get(node.inputs[1])
            if maker is None or maker.op != "DequantizeLinear" or len(maker.inputs) < 2:
                continue
            weight, scale = maker.inputs[0], maker.inputs[1]
        else:
            continue
        channels = next(iter(graph.stored.get(weight, ())), 0)
        if scale not in graph.stored or channels == 1:
            continue
        if prod(graph.stored[scale]) > 1:
            per_channel += 1
        else:
            per_tensor += 1
    return per_channel, per_tensor


def quantized_tail(graph: Graph) -> tuple[str, ...]:
    """Returns the operators of the head's decoding whose results are rounded to 8 bits.

    The decoding is what no convolution lies behind: sigmoids, concatenations of scores with boxes.
    """
    leads: set[str] = set()
    tail: set[str] = set()
    for node in reversed(graph.nodes):
        convolves = node.op in (*MAC_OPS, *INTEGER_CONV_OPS, "ConvTranspose")
        if convolves or leads.intersection(node.outputs):
            leads.update(name for name in node.inputs if name)
        else:
            tail.update(node.outputs)
    makers = {out: node for node in graph.nodes for out in node.outputs}
    found: dict[str, None] = {}
    for node in graph.nodes:
        if node.op != "QuantizeLinear" or not tail.intersection(node.outputs) or not node.inputs:
            continue
        maker = makers.get(node.inputs[0])
        steps = 0
        while maker is not None and maker.op in SHAPE_ONLY_OPS and maker.inputs and steps < 64:
            maker = makers.get(maker.inputs[0])
            steps += 1
        if maker is not None and maker.op not in (*BODY_OPS, *INTEGER_CONV_OPS):
            found[f"{maker.op} {maker.name}"] = None
    return tuple(found)


def quantizers(graph: Graph) -> int:
    """Returns how many operators round to 8 bits."""
    return sum(node.op in ("QuantizeLinear", "QLinearConv") for node in graph.nodes)


def _graph(data: memoryview, metadata: dict[str, str]) -> Graph:
    nodes: list[Node] = []
    stored: dict[str, tuple[int, ...]] = {}
    outputs: list[str] = []
    for number, value in wire_fields(data):
        if not isinstance(value, memoryview):
            continue
        if number == NODE:
            node, constant = _node(value)
            nodes.append(node)
            if constant is not None and node.outputs:
                stored[node.outputs[0]] = constant
        elif number == INITIALIZER:
            name, dims = _tensor(value)
            stored[name] = dims
        elif number == OUTPUT:
            outputs += [_text(part) for _, part in _inner(list(wire_fields(value)), 1)]
    return Graph(tuple(nodes), stored, tuple(outputs), metadata)


def _node(data: memoryview) -> tuple[Node, tuple[int, ...] | None]:
    """Returns an operator, and the shape of the tensor that it is, if it is a constant."""
    inputs: list[str] = []
    outputs: list[str] = []
    name = op = ""
    shape = None
    for number, value in wire_fields(data):
        if not isinstance(value, memoryview):
            continue
        if number == 1:
            inputs.append(_text(value))
        elif number == 2:
            outputs.append(_text(value))
        elif number == 3:
            name = _text(value)
        elif number == 4:
            op = _text(value)
        elif number == 5 and op in ("", "Constant"):
            for _, tensor in _inner(list(wire_fields(value)), 5):
                shape = _tensor(tensor)[1]
    node = Node(op, name or (outputs[0] if outputs else ""), tuple(inputs), tuple(outputs))
    return node, shape if op == "Constant" else None


def _tensor(data: memoryview) -> tuple[str, tuple[int, ...]]:
    name = ""
    dims: list[int] = []
    for number, value in wire_fields(data):
        if number == 1 and isinstance(value, int):
            dims.append(value)
        elif number == 1 and isinstance(value, memoryview):  # packed
            at = 0
            while at < len(value):
                size, at = varint(value, at)
                dims.append(size)
        elif number == 8 and isinstance(value, memoryview):
            name = _text(value)
    return name, tuple(dims)


def _entry(data: memoryview) -> tuple[str, str]:
    parts = {n: _text(v) for n, v in wire_fields(data) if isinstance(v, memoryview)}
    return parts.get(1, ""), parts.get(2, "")


def _inner(
    parts: list[tuple[int, int | memoryview]], wanted: int
) -> Iterator[tuple[int, memoryview]]:
    for number, value in parts:
        if number == wanted and isinstance(value, memoryview):
            yield number, value


def _text(data: memoryview) -> str:
    return bytes(data).decode("utf-8", "replace")
