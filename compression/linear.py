"""Linear layers behind a flattened map, written as the convolutions that they are.

The classic classifier flattens its last map and goes on with linear layers. Each of them is a
convolution whose kernel is the whole map; written so, the steps that prune, factorise and quantize
convolutions need not know it.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ..models.graph import (
    attributes,
    copied,
    drop_dead,
    initializers,
    require_onnx,
    set_nodes,
    tensor_shapes,
)
from .sever import MOVES, Ints, moved

LINEAR = ("Gemm", "MatMul")
UNARY = (
    "Relu", "LeakyRelu", "Sigmoid", "HardSigmoid", "HardSwish", "Tanh", "Elu", "Selu", "Softplus",
    "Identity", "Dropout", "Clip", "Mish", "Gelu",
)  # fmt: skip
"""Operators that work on each number by itself; their further inputs are constants."""


def linear_as_convs(model: Any) -> Any:
    """Returns a copy of a model in which linear layers behind flattened maps are convolutions.

    Whatever order a map is flattened in (Keras' channels last, too), the weights are put in the
    order of the map. Linear layers behind anything else stay as they are.

    Args:
        model: From ``onnx_io.tidy``, batch of one.
    """
    onnx = require_onnx()
    result = copied(model)
    graph = result.graph
    if not any(node.op_type in LINEAR for node in graph.node):
        return result
    shapes, stored = tensor_shapes(result), initializers(result)
    entries: dict[str, tuple[str, Ints]] = {}  # a tensor -> the map whose numbers it holds, where
    nodes: list[Any] = []
    for node in graph.node:
        source = node.input[0] if node.input else ""
        constants = all(name in stored for name in node.input[1:] if name)
        moves = node.op_type in MOVES
        if constants and moves and source not in entries and _is_map(shapes.get(source, ())):
            entries[source] = (source, np.arange(np.prod(shapes[source])).reshape(shapes[source]))
        if not constants or source not in entries:
            nodes.append(node)
            continue
        root, order = entries[source]
        if node.op_type in LINEAR and order.ndim == 2:
            made = _as_conv(node, root, order, shapes[root], stored)
            if made is None:
                nodes.append(node)
                continue
            conv, tensors = made
            graph.initializer.extend(tensors)
            name = conv.output[0]
            shapes[name] = (1, tensors[0].dims[0], 1, 1)
            flatten = onnx.helper.make_node("Flatten", [name], node.output, f"{name}_flat", axis=1)
            nodes += [conv, flatten]
            entries[node.output[0]] = (name, np.arange(shapes[name][1])[None])
            continue
        nodes.append(node)
        if moves:
            results = moved(result, node, order, stored)
            entries.update(zip(node.output, ((root, r) for r in results), strict=True))
        elif node.op_type in UNARY and order.ndim == 2 and shapes[root][2:] == (1, 1):
            twin = _on_map(node, root)  # the one on the flat numbers stays for who else reads it
            nodes.append(twin)
            shapes[twin.output[0]] = shapes[root]
            entries[node.output[0]] = (twin.output[0], order)
    set_nodes(graph, nodes)
    drop_dead(result)
    return result


def _is_map(shape: tuple[int, ...]) -> bool:
    return len(shape) == 4 and shape[0] == 1 and 0 not in shape


def _as_conv(
    node: Any, root: str, order: Ints, shape: tuple[int, ...], stored: dict[str, Any]
) -> tuple[Any, list[Any]] | None:
    """Returns a linear layer as a convolution, and its weights; None if it is not a plain one."""
    onnx = require_onnx()
    helper, numpy_helper = onnx.helper, onnx.numpy_helper
    given = attributes(node)
    if given.get("alpha", 1.0) != 1 or given.get("beta", 1.0) != 1 or given.get("transA", 0):
        return None
    weight = numpy_helper.to_array(stored[node.input[1]])
    if weight.ndim != 2 or weight.dtype != np.float32:
        return None
    weight = weight if given.get("transB", 0) else weight.T
    outputs, inputs = weight.shape
    every = np.arange(np.prod(shape))
    if order.shape != (1, inputs) or not np.array_equal(np.sort(order[0]), every):
        return None  # it reads a part of the map, or parts of it twice
    bias = np.zeros(outputs, np.float32)
    if len(node.input) > 2 and node.input[2]:
        bias = bias + numpy_helper.to_array(stored[node.input[2]]).reshape(-1)
    kernel = np.empty_like(weight)
    kernel[:, order[0]] = weight
    name = f"{node.output[0]}_map"
    tensors = [
        numpy_helper.from_array(kernel.reshape(outputs, *shape[1:]), f"{name}_weight"),
        numpy_helper.from_array(bias, f"{name}_bias"),
    ]
    inputs_of = [root, *(t.name for t in tensors)]
    conv = helper.make_node("Conv", inputs_of, [name], name, kernel_shape=list(shape[2:]))
    return conv, tensors


def _on_map(node: Any, root: str) -> Any:
    """Returns a copy of an operator that works on the map in place of its flat numbers."""
    twin = copied(node)
    twin.input[0] = root
    twin.name = f"{node.name}_map"
    twin.output[:] = [f"{name}_map" if name else "" for name in node.output]
    return twin
