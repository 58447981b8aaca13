"""What every layer of a detector costs: parameters, multiply-accumulates, activations, bytes."""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from ..models.errors import ModelFileError
from ..models.graph import QUANTIZERS, attributes, node_macs, opset_of, require_onnx
from .traced import LAYER_OPS, Traced, behind_activation


@dataclass(frozen=True)
class Layer:
    """One operator that multiplies by weights (or two feature maps by one another).

    Attributes:
        name: The node's name, or its output where the node has none of its own.
        op: Operator.
        kind: ``1x1``, ``3x3``, ``5x5 depthwise``, ``3x3 in 4 groups``, ``transposed 2x2``, or
            ``linear``.
        output: The tensor that it makes.
        behind: The same behind its activation function: what the next layers read.
        input_shape: Batch, channels, height, width.
        output_shape: Likewise.
        weight_shape: As stored; empty where it multiplies two feature maps.
        parameters: Weights and biases, without scales and zero points.
        macs: Multiply-accumulates per picture.
        activation_elements: Numbers in its output.
        activation_bytes: Of them, as the next layer reads them: 1 each behind a quantizer.
        weight_bytes: In the file, with scales and zero points.
        quantized: Its weights are stored in 8 bits or fewer.
        last: No other layer lies behind it: its channels are the detector's outputs.
    """

    name: str
    op: str
    kind: str
    output: str
    behind: str
    input_shape: tuple[int, ...]
    output_shape: tuple[int, ...]
    weight_shape: tuple[int, ...]
    parameters: int
    macs: int
    activation_elements: int
    activation_bytes: int
    weight_bytes: int
    quantized: bool
    last: bool

    @property
    def family(self) -> str:
        """``1x1``, ``kxk``, ``depthwise``, ``grouped``, ``transposed`` or ``linear``."""
        if self.kind in ("1x1", "linear"):
            return self.kind
        words = (("groups", "grouped"), ("depthwise",) * 2, ("transposed",) * 2)
        return next((family for word, family in words if word in self.kind), "kxk")


@dataclass(frozen=True)
class OtherOp:
    """What is not counted as multiply-accumulates: all operators of one type.

    Attributes:
        op: Operator, with its domain if it is not ONNX's own.
        count: How many of them the graph has.
        elements: Numbers that they make in all.
        stored: Real numbers in the file that no layer reads, such as a BatchNormalization's.
        unknown: So many of them make tensors of a size that could not be found out.
    """

    op: str
    count: int
    elements: int
    stored: int
    unknown: int


@dataclass(frozen=True)
class Costs:
    """What a file costs, layer by layer, in the order of the graph.

    Attributes:
        layers: What is counted.
        others: What is not.
        parameters: Of all layers; tensors that two of them share count once.
        macs: Of all layers, per picture.
        activation_bytes: Of all layers' outputs.
        weight_bytes: Of all layers in the file.
        stored_bytes: Of every tensor in the file.
        file_bytes: The rest is the description of the graph.
        opset: Of the file.
    """

    layers: tuple[Layer, ...]
    others: tuple[OtherOp, ...]
    parameters: int
    macs: int
    activation_bytes: int
    weight_bytes: int
    stored_bytes: int
    file_bytes: int
    opset: int

    def to_json(self) -> dict[str, Any]:
        """Returns it as a JSON-ready dict."""
        return asdict(self)


def count_costs(traced: Traced, file_bytes: int) -> Costs:
    """Counts what every layer costs, and names what is not counted.

    Args:
        traced: The graph.
        file_bytes: Size of its file.

    Raises:
        ModelFileError: No layer could be counted.
    """
    names = Counter(n.name for n in traced.model.graph.node)
    counted, left = _counted(traced)
    macs = _macs(traced, counted)
    ends = _last(traced)
    layers = []
    for node in counted:
        output = node.output[0]
        read = traced.parameters_of(node)
        behind = behind_activation(traced.links, output)
        elements = int(np.prod(traced.shapes[output], dtype=np.int64))
        weight = node.input[LAYER_OPS[node.op_type][1][0]]
        weight_shape = traced.shapes[weight] if weight in traced.sources else ()
        sources = {s for name in _all_constants(traced, node) for s in traced.sources[name]}
        layers.append(
            Layer(
                name=node.name if node.name and names[node.name] == 1 else output,
                op=node.op_type,
                kind=_kind(node, traced.shapes[weight], traced.shapes[node.input[0]]),
                output=output,
                behind=behind,
                input_shape=traced.shapes[node.input[0]],
                output_shape=traced.shapes[output],
                weight_shape=weight_shape,
                parameters=sum(int(np.prod(traced.shapes[n], dtype=np.int64)) for n in read),
                macs=macs[output],
                activation_elements=elements,
                activation_bytes=elements * _stored_itemsize(traced, behind),
                weight_bytes=sum(traced.stored_bytes[s] for s in sources),
                quantized=_is_quantized(traced, node, weight),
                last=output in ends,
            )
        )
    if not layers:
        message = (
            "expected a network with layers that can be counted, found "
            f"{', '.join(sorted({n.op_type for n in traced.model.graph.node}))}"
            + (f" ({traced.problem})" if traced.problem else "")
            + "; export the model with a fixed input size"
        )
        raise ModelFileError(message)
    shared = {
        traced.sources[name]: int(np.prod(traced.shapes[name], dtype=np.int64))
        for node in counted
        for name in traced.parameters_of(node)
    }
    of_layers = {
        s for n in counted for name in _all_constants(traced, n) for s in traced.sources[name]
    }
    return Costs(
        layers=tuple(layers),
        others=_others(traced, left, of_layers),
        parameters=sum(shared.values()),
        macs=sum(layer.macs for layer in layers),
        activation_bytes=sum(layer.activation_bytes for layer in layers),
        weight_bytes=sum(traced.stored_bytes[s] for s in of_layers),
        stored_bytes=sum(traced.stored_bytes.values()),
        file_bytes=file_bytes,
        opset=opset_of(traced.model),
    )


def _counted(traced: Traced) -> tuple[list[Any], list[Any]]:
    """Returns the nodes that can be counted, and all others."""
    counted: list[Any] = []
    left: list[Any] = []
    for node in traced.model.graph.node:
        needed: tuple[str, ...] = ()
        if node.op_type in LAYER_OPS and node.output[0] not in traced.sources:
            weight = LAYER_OPS[node.op_type][1][0]
            needed = (node.input[0], node.input[weight], node.output[0])
        known = needed and all(len(traced.shapes.get(name, ())) > 1 for name in needed)
        (counted if known else left).append(node)
    return counted, left


def _macs(traced: Traced, counted: list[Any]) -> dict[str, int]:
    """Has ``graph.node_macs`` count a graph of the layers alone, with every size filled in."""
    onnx = require_onnx()
    proxy = onnx.ModelProto()
    proxy.opset_import.add(domain="", version=opset_of(traced.model))
    shown: set[str] = set()
    for node in counted:
        plain, places = LAYER_OPS[node.op_type]
        names = [node.input[0], node.input[places[0]], node.output[0]]
        # In a domain of its own, so that shape inference leaves the sizes as they are.
        made = onnx.helper.make_node(plain, names[:2], names[2:], domain="edgesight")
        proxy.graph.node.append(made)
        for name in names:
            if name not in shown:
                shown.add(name)
                proxy.graph.value_info.append(
                    onnx.helper.make_tensor_value_info(name, 1, traced.shapes[name])
                )
    return node_macs(proxy)


def _last(traced: Traced) -> set[str]:
    """Returns the outputs of the layers that no other layer lies behind."""
    leads: set[str] = set()
    ends: set[str] = set()
    for node in reversed(traced.model.graph.node):
        layer = node.op_type in LAYER_OPS and node.output[0] not in traced.sources
        before = any(name in leads for name in node.output)
        if layer and not before:
            ends.add(node.output[0])
        if layer or before:
            leads.update(name for name in node.input if name)
    return ends


def _others(traced: Traced, nodes: list[Any], of_layers: set[str]) -> tuple[OtherOp, ...]:
    groups: dict[str, list[Any]] = defaultdict(list)
    for node in nodes:
        own = node.domain in ("", "ai.onnx")
        groups[node.op_type if own else f"{node.domain}:{node.op_type}"].append(node)
    found = []
    for op, members in groups.items():
        made = [o for node in members for o in node.output if o and o not in traced.sources]
        read = {
            s
            for node in members
            for name in node.input
            if name in traced.sources and op not in QUANTIZERS
            for s in traced.sources[name]
            if s not in of_layers and _is_float(traced, s)
        }
        found.append(
            OtherOp(
                op,
                len(members),
                sum(int(np.prod(traced.shapes.get(o, 0), dtype=np.int64)) for o in made),
                sum(int(np.prod(traced.links.stored[s].dims, dtype=np.int64)) for s in read),
                sum(any(o in made and o not in traced.shapes for o in n.output) for n in members),
            )
        )
    return tuple(sorted(found, key=lambda o: (-o.count, o.op)))


def _is_float(traced: Traced, name: str) -> bool:
    """Whether a stored tensor holds real numbers: not a shape, an index or a zero point."""
    stored = traced.links.stored.get(name)
    return stored is not None and int(stored.data_type) in (1, 10, 11, 16)


def _all_constants(traced: Traced, node: Any) -> list[str]:
    return [name for name in node.input if name in traced.sources]


def _is_quantized(traced: Traced, node: Any, weight: str) -> bool:
    if node.op_type.startswith("Q") or node.op_type.endswith("Integer"):
        return True
    maker = traced.links.maker.get(weight)
    return maker is not None and maker.op_type == "DequantizeLinear"


def _stored_itemsize(traced: Traced, name: str) -> int:
    """Returns the bytes per element that go to memory: a quantizer's, if it is the only reader."""
    readers = traced.links.readers[name]
    if len(readers) == 1 and readers[0].op_type == "QuantizeLinear":
        name = readers[0].output[0]
    return traced.itemsize[name]


def _kind(node: Any, weight: tuple[int, ...], source: tuple[int, ...]) -> str:
    plain = LAYER_OPS[node.op_type][0]
    if "Conv" not in plain:
        return "linear"
    size = "x".join(str(n) for n in weight[2:])
    group = attributes(node).get("group", 1)
    if plain == "ConvTranspose":
        size = f"transposed {size}"
    if group == 1:
        return size
    return f"{size} depthwise" if group == source[1] else f"{size} in {group} groups"
