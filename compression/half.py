"""FP16: weights in 16 bits for half the file, or a whole network that computes in 16 bits.

On most processors ONNX Runtime computes in float32 whatever a file says. So ``half_weights`` only
stores in 16 bits: a Cast per weight, done once on loading, and the same speed as before.
``half_compute`` is for GPUs and for cores with 16-bit arithmetic: the shipped detector's float file
took 0.63 of its instructions on a Cortex-A76 that way, but 1.09 on a Cortex-A72, which has none
(ONNX Runtime 1.31).

That is also the way to have more than 8 bits: for integers of 16 bits ONNX Runtime has no
convolution, so that all of them compute in float, between quantizers that cost extra.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np

from ..models.errors import ModelFileError
from ..models.graph import copied, require_onnx, set_nodes
from .qdq import Links, body_nodes, is_weighted

ELEMENTS_MIN: Final = 64
"""Smaller tensors stay in 32 bits: the Cast would take what they save."""
HALF_MAX: Final = float(np.finfo(np.float16).max)
FLOAT_INPUTS: Final = {"Resize": 1}
"""Operators of which only so many inputs, from the first, may be 16 bits."""


def half_weights(model: Any, axes_min: int = 0) -> Any:
    """Returns a copy of a model with its float32 weights stored in 16 bits, computing in 32.

    Tensors with a value beyond 65504 stay as they are, and those with fewer axes than
    ``axes_min``: 2 spares scales and biases.
    """
    onnx = require_onnx()
    result = copied(model)
    graph = result.graph
    casts = []
    for tensor in graph.initializer:
        if tensor.data_type != onnx.TensorProto.FLOAT or len(tensor.dims) < axes_min:
            continue
        value = onnx.numpy_helper.to_array(tensor)
        if value.size < ELEMENTS_MIN or not np.abs(value).max() <= HALF_MAX:
            continue
        name = tensor.name
        tensor.CopyFrom(onnx.numpy_helper.from_array(value.astype(np.float16), f"{name}/half"))
        casts.append(onnx.helper.make_node("Cast", [f"{name}/half"], [name], to=1))
    set_nodes(graph, [*casts, *graph.node])
    return result


def half_compute(model: Any) -> Any:
    """Returns a copy of a float model whose body computes in float16.

    What comes before the first convolution (normalisation) and the head's tail behind the last
    ones (scores, boxes) stay in float32, and so do input and outputs.

    Args:
        model: Float32, with named nodes and fixed sizes (``onnx_io.tidy``).

    Raises:
        ModelFileError: There is no convolution, or a weight does not fit into 16 bits.
    """
    onnx = require_onnx()
    helper, numpy_helper = onnx.helper, onnx.numpy_helper
    kinds = _kinds(model)
    links = Links(model.graph)
    inner = _between(model, links)
    if not inner:
        message = "expected convolutions with stored weights, found none; export a detector"
        raise ModelFileError(message)
    result = copied(model)
    graph = result.graph
    nodes: list[Any] = []
    made: dict[str, str] = {}  # tensor of the float graph -> its 16-bit form
    added: set[str] = set()

    def cast(source: str, target: str, kind: int) -> str:
        if target not in added:
            added.add(target)
            nodes.append(helper.make_node("Cast", [source], [target], to=kind))
        return target

    def stored(name: str) -> str:
        half = f"{name}/half"
        if half not in added:
            added.add(half)
            value = numpy_helper.to_array(links.stored[name])
            if not np.abs(value).max(initial=0) <= HALF_MAX:
                message = (
                    f"expected weights up to {HALF_MAX:g}, found more in {name!r}; keep 32 bits"
                )
                raise ModelFileError(message)
            graph.initializer.append(numpy_helper.from_array(value.astype(np.float16), half))
        return half

    for node in graph.node:
        whole = node.name not in inner
        for index, name in enumerate(node.input):
            if kinds.get(name) != onnx.TensorProto.FLOAT:
                continue
            if whole or index >= FLOAT_INPUTS.get(node.op_type, len(node.input)):
                if name in made:
                    node.input[index] = cast(made[name], name, onnx.TensorProto.FLOAT)
            elif name in links.stored:
                node.input[index] = stored(name)
            else:
                half = made.get(name) or cast(name, f"{name}/half", onnx.TensorProto.FLOAT16)
                node.input[index] = half
        nodes.append(node)
        if not whole:
            for index, name in enumerate(node.output):
                if kinds.get(name) == onnx.TensorProto.FLOAT:
                    made[name] = node.output[index] = f"{name}/half"
    for output in graph.output:
        if output.name in made:
            cast(made[output.name], output.name, onnx.TensorProto.FLOAT)
    set_nodes(graph, nodes)
    del graph.value_info[:]
    return result


def _kinds(model: Any) -> dict[str, int]:
    """Returns the element type of every tensor."""
    inferred = require_onnx().shape_inference.infer_shapes(model).graph
    values = [*inferred.value_info, *inferred.input, *inferred.output]
    kinds = {v.name: int(v.type.tensor_type.elem_type) for v in values}
    kinds.update({t.name: int(t.data_type) for t in model.graph.initializer})
    return kinds


def _between(model: Any, links: Links) -> set[str]:
    """Returns the nodes from the first convolution to the last ones; casts are not among them."""
    behind: set[str] = set()
    found: set[str] = set()
    for node in body_nodes(model):
        if is_weighted(node, links.stored) or any(name in behind for name in node.input):
            behind.update(node.output)
            if node.op_type != "Cast":
                found.add(node.name)
    return found
