"""Reads ONNX graphs: parameters, multiply-accumulates, what really runs as integers; edits them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .errors import MissingExtraError, ModelFileError
from .files import is_file

QUANTIZERS = ("QuantizeLinear", "DequantizeLinear")
MAC_OPS = ("Conv", "Gemm", "MatMul")
FLOAT_CONV_OPS = ("Conv", "FusedConv", "NhwcFusedConv")
UNPACKING_OPS = ("Add", "Cast", "Gather", "Reshape", "Slice")
"""What weights of few bits, or of 16, are made of on loading."""
INTEGER_CONV_OPS = ("QLinearConv", "ConvInteger")
INTEGER_OPS = (
    *INTEGER_CONV_OPS,
    "QGemm",
    "QLinearMatMul",
    "MatMulInteger",
    "MatMulIntegerToFloat",
    "DynamicQuantizeMatMul",
)


def require_onnx() -> Any:
    """Returns the ``onnx`` module.

    Raises:
        MissingExtraError: It is not installed; boards do without it.
    """
    try:
        import onnx
        import onnx.numpy_helper
        import onnx.shape_inference
    except ImportError as error:
        message = (
            "this needs the package onnx, which the board install leaves out; pip install onnx"
        )
        raise MissingExtraError(message) from error
    return onnx


def load_model(path: Path | str) -> Any:
    """Reads an ONNX file as an ``onnx.ModelProto``.

    Raises:
        ModelFileError: The file is missing, not ONNX, or damaged.
    """
    onnx = require_onnx()
    path = Path(path)
    if not is_file(path):
        message = f"{path}: expected an ONNX model, found no such file; check the path"
        raise ModelFileError(message)
    try:
        model = onnx.load(path)
    except Exception as error:  # protobuf raises its own kinds; each means the file is unusable
        message = (
            f"{path}: expected an ONNX model, found {path.stat().st_size} bytes that are none; "
            "copy or export it again"
        )
        raise ModelFileError(message) from error
    if not model.graph.node or not model.opset_import:
        message = f"{path}: expected an ONNX model, found a file without operators; export it again"
        raise ModelFileError(message)
    return model


def copied(message: Any) -> Any:
    """Returns a copy of a model, a node or another ONNX message."""
    result = type(message)()
    result.CopyFrom(message)
    return result


def attributes(node: Any) -> dict[str, Any]:
    """Returns a node's attributes by name; those that it leaves at their defaults are missing.

    Texts are bytes, lists are Python lists.
    """
    value = require_onnx().helper.get_attribute_value
    return {attribute.name: value(attribute) for attribute in node.attribute}


def set_nodes(graph: Any, nodes: Iterable[Any]) -> None:
    """Makes ``nodes`` the graph's nodes, and drops the stored tensors that none of them reads.

    Args:
        graph: ``onnx.GraphProto``, changed in place. Other references to its nodes are void then.
        nodes: New ones, or the graph's own, in the order of execution.
    """
    before = len(graph.node)
    graph.node.extend(list(nodes))  # copies them: the graph's own die when they are taken out
    del graph.node[:before]
    used = {name for node in graph.node for name in tensors_read(node)}
    used |= {output.name for output in graph.output}
    for place in reversed(range(len(graph.initializer))):
        if graph.initializer[place].name not in used:
            del graph.initializer[place]


def drop_dead(model: Any) -> None:
    """Removes operators and stored tensors that no output needs, in place."""
    needed = {output.name for output in model.graph.output}
    nodes = []
    for node in reversed(model.graph.node):
        if needed & set(node.output):
            nodes.append(node)
            needed.update(tensors_read(node))
    set_nodes(model.graph, reversed(nodes))
    del model.graph.value_info[:]


def tensors_read(node: Any) -> Iterator[str]:
    """Yields the tensors that a node reads, those of its branches and loop bodies among them."""
    yield from node.input
    for attribute in node.attribute:
        for graph in (attribute.g, *attribute.graphs):
            yield from (output.name for output in graph.output)
            for inner in graph.node:
                yield from tensors_read(inner)


def opset_of(model: Any) -> int:
    """Returns the version of the standard operator set that a model uses."""
    return max(
        (int(o.version) for o in model.opset_import if o.domain in ("", "ai.onnx")), default=0
    )


def initializers(model: Any) -> dict[str, Any]:
    """Returns the stored tensors of a graph by name, as ``onnx.TensorProto``."""
    return {tensor.name: tensor for tensor in model.graph.initializer}


def parameters(model: Any) -> int:
    """Returns how many weights the network has: numbers stored for convolutions and the like.

    Scales, zero points, shapes and constants are not counted.
    """
    stored = {name: int(np.prod(tensor.dims)) for name, tensor in initializers(model).items()}
    producer = {out: node for node in model.graph.node for out in node.output}
    shapes: dict[str, tuple[int, ...]] | None = None
    for node in model.graph.node:  # weights that are unpacked from stored numbers on loading
        if node.op_type in UNPACKING_OPS and all(name in stored for name in node.input):
            shapes = shapes or tensor_shapes(model)
            stored.update((out, int(np.prod(shapes.get(out, (0,))))) for out in node.output)
    found: set[str] = set()
    for node in model.graph.node:
        if node.op_type in MAC_OPS or node.op_type in INTEGER_OPS or "Conv" in node.op_type:
            for name in node.input:
                source = producer.get(name)
                if source is not None and source.op_type == "DequantizeLinear":
                    name = source.input[0]
                if stored.get(name, 0) > 1:
                    found.add(name)
    return sum(stored[name] for name in found)


def tensor_shapes(model: Any) -> dict[str, tuple[int, ...]]:
    """Returns the shape of every tensor that shape inference finds; unknown sizes are 0."""
    onnx = require_onnx()
    if any(node.op_type in QUANTIZERS and node.domain for node in model.graph.node):
        model = copied(model)  # ONNX does not know the sizes of ONNX Runtime's own 16-bit ones
        for node in model.graph.node:
            if node.op_type in QUANTIZERS:
                node.domain = ""
    try:
        inferred = onnx.shape_inference.infer_shapes(model).graph
    except Exception:  # operators that onnx does not know
        inferred = model.graph
    known = [*inferred.value_info, *inferred.input, *inferred.output]
    shapes = {
        value.name: tuple(int(d.dim_value) for d in value.type.tensor_type.shape.dim)
        for value in known
    }
    shapes.update({t.name: tuple(int(d) for d in t.dims) for t in model.graph.initializer})
    return shapes


def node_macs(model: Any) -> dict[str, int]:
    """Returns multiply-accumulates of each Conv, ConvTranspose, Gemm and MatMul.

    The key is the node's first output.

    Raises:
        ModelFileError: The sizes of the feature maps cannot be inferred.
    """
    shapes = tensor_shapes(model)
    macs: dict[str, int] = {}
    for node in model.graph.node:
        if node.op_type not in (*MAC_OPS, "ConvTranspose"):
            continue
        source, result = shapes.get(node.input[0], ()), shapes.get(node.output[0], ())
        weight = shapes.get(node.input[1], ())
        if not (source and result and weight):
            message = (
                f"expected a graph with fixed sizes, found none for {node.op_type} "
                f"{node.name or node.output[0]!r}; export the model with a fixed input size"
            )
            raise ModelFileError(message)
        if node.op_type == "Conv":
            count = np.prod(result, dtype=np.int64) * np.prod(weight[1:], dtype=np.int64)
        elif node.op_type == "ConvTranspose":
            count = np.prod(source, dtype=np.int64) * np.prod(weight[1:], dtype=np.int64)
        else:
            count = np.prod(result, dtype=np.int64) * source[-1]
        macs[node.output[0]] = int(count)
    return macs


@dataclass(frozen=True)
class IntegerReport:
    """What ONNX Runtime's optimised graph computes with integers.

    Attributes:
        conv_macs_integer: Multiply-accumulates of convolutions that run on 8-bit integers.
        conv_macs_total: Of all convolutions.
        ops: Operator type to count, over the whole optimised graph.
        float_convs: Names of convolutions that run in float.
    """

    conv_macs_integer: int
    conv_macs_total: int
    ops: dict[str, int]
    float_convs: tuple[str, ...] = ()

    @property
    def share(self) -> float:
        """Part of the convolution MACs that run as integers, 0..1."""
        return self.conv_macs_integer / self.conv_macs_total if self.conv_macs_total else 0.0

    @property
    def ops_integer(self) -> dict[str, int]:
        """Operators that compute with integers."""
        return {
            op: n for op, n in self.ops.items() if op.startswith("QLinear") or op in INTEGER_OPS
        }


def integer_share(source: Any, optimised_path: Path | str) -> IntegerReport:
    """Compares a model with what ONNX Runtime made of it.

    ONNX Runtime's optimised graph differs per processor: read the one saved on the target
    (``SessionOptions.optimized_model_filepath``).

    Args:
        source: The ``onnx.ModelProto`` that was loaded; it tells the MACs.
        optimised_path: The graph that ONNX Runtime saved.

    Returns:
        Which share of the convolution MACs runs on integers, and the operators.
    """
    optimised = load_model(optimised_path)
    macs = node_macs(source)
    convs = [n for n in source.graph.node if n.op_type == "Conv"]
    by_name = {n.name: n.output[0] for n in convs if n.name}
    by_weight = _by_weight(source, convs)
    done: set[str] = set()
    for node in optimised.graph.node:
        if node.op_type not in INTEGER_CONV_OPS:
            continue
        weight = node.input[3] if node.op_type == "QLinearConv" else node.input[1]
        output = by_weight.get(weight, by_name.get(node.name))
        if output is not None:
            done.add(output)
    ops = Counter(node.op_type for node in optimised.graph.node)
    return IntegerReport(
        conv_macs_integer=sum(macs[output] for output in done),
        conv_macs_total=sum(macs[n.output[0]] for n in convs),
        ops=dict(ops.most_common()),
        float_convs=tuple(n.name or n.output[0] for n in convs if n.output[0] not in done),
    )


def _by_weight(source: Any, convs: list[Any]) -> Mapping[str, str]:
    """Returns stored weight name -> conv output; weights that two convolutions share are left."""
    producer = {out: node for node in source.graph.node for out in node.output}
    found: dict[str, list[str]] = {}
    for node in convs:
        name = node.input[1]
        maker = producer.get(name)
        if maker is not None and maker.op_type == "DequantizeLinear":
            name = maker.input[0]
        found.setdefault(name, []).append(node.output[0])
    return {name: outputs[0] for name, outputs in found.items() if len(outputs) == 1}
