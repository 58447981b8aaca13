"""16-bit activations where 8 bits harm: what stays in float gets wider grids instead.

ONNX Runtime's CPU computes such layers in float, and rounds their tensors besides: it is no faster
than leaving them in float. It is for runtimes and accelerators that multiply 16-bit activations by
8-bit weights, which then find nothing in float that the search left there; and its weights take a
quarter of the bytes.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Final

import numpy as np

from ..models.graph import copied, require_onnx, set_nodes
from .calibrate import Grid
from .int8_search import Variant
from .qdq import Layout, Links, body_nodes, is_weighted, plan_layout
from .qdq_weights import bias_fits, stored_in_8_bits
from .rounding import round_weights

WIDE_STEPS: Final = 65535
DOMAIN: Final = "com.microsoft"
"""Whose quantizers know 16 bits in every opset; ONNX's own only from 21 on."""


def widen(quantized: Any, variant: Variant) -> tuple[Any, int]:
    """Gives what a variant leaves in float 16-bit grids and 8-bit weights.

    Args:
        quantized: QDQ ``onnx.ModelProto`` made from the variant; not changed.
        variant: Says which nodes stay in float, and what their tensors were.

    Returns:
        A new model, and how many tensors are on 16-bit grids.
    """
    onnx = require_onnx()
    helper, numpy_helper = onnx.helper, onnx.numpy_helper
    layout = plan_layout(variant.model, variant.float_nodes)
    grids = _wide_grids(variant, layout)
    inputs = _input_grids(variant, layout, grids)
    source_of = {n.name: n.input[0] for n in variant.model.graph.node if n.input}
    nodes_8 = frozenset(n for n in variant.float_nodes if source_of.get(n) in inputs)
    own = replace(layout, nodes=nodes_8, group={name: name for name in inputs})
    fitted, rounded = round_weights(variant.model, own, inputs, variant.seen)
    result = copied(quantized)
    graph = result.graph
    biases = {n.input[2] for n in fitted.graph.node if n.name in rounded}
    fits = [tensor for tensor in fitted.graph.initializer if tensor.name in biases]
    kept = [tensor for tensor in graph.initializer if tensor.name not in biases]
    del graph.initializer[:]
    graph.initializer.extend([*kept, *fits])
    links = Links(graph)
    tensors: dict[str, Any] = {}
    nodes: list[Any] = []
    read_as: dict[str, str] = {}

    def store(name: str, value: Any) -> str:
        tensors[name] = numpy_helper.from_array(np.asarray(value), name)
        return name

    def pair(name: str) -> None:
        grid = grids[name]
        zero = np.uint16(grid.zero_point)
        ends = [store(f"{name}/scale", np.float32(grid.scale)), store(f"{name}/zero", zero)]
        codes, read_as[name] = f"{name}/q", f"{name}/wide"
        for kind, source, end in (
            ("QuantizeLinear", name, codes),
            ("DequantizeLinear", codes, read_as[name]),
        ):
            nodes.append(helper.make_node(kind, [source, *ends], [end], domain=DOMAIN))

    for entry in graph.input:
        if entry.name in grids:
            pair(entry.name)
    for node in graph.node:
        for index, name in enumerate(node.input):
            node.input[index] = read_as.get(name, name)
        if node.name in variant.float_nodes and is_weighted(node, links.stored):
            grid = inputs.get(source_of[node.name])
            if grid is not None and bias_fits(node, links):
                stored_in_8_bits(node, links, grid, store, nodes, rounded.get(node.name))
        nodes.append(node)
        for name in node.output:
            if name in grids:
                pair(name)
    used = {name for node in nodes for name in node.input}
    kept = [t for t in graph.initializer if t.name in used and t.name not in tensors]
    del graph.initializer[:]
    graph.initializer.extend([*kept, *tensors.values()])
    set_nodes(graph, nodes)
    if not any(entry.domain == DOMAIN for entry in result.opset_import):
        result.opset_import.append(helper.make_opsetid(DOMAIN, 1))
    return result, len(grids)


def _input_grids(variant: Variant, layout: Layout, wide: dict[str, Grid]) -> dict[str, Grid]:
    """Returns the grid of each tensor that a weighted node which stays in float reads."""
    links, narrow = Links(variant.model.graph), variant.grids(layout)
    found: dict[str, Grid] = {}
    for node in variant.model.graph.node:
        if node.name not in variant.float_nodes or not is_weighted(node, links.stored):
            continue
        source = node.input[0]
        if source in wide:
            found[source] = wide[source]
        elif source in layout.group:
            found[source] = narrow[layout.group[source]]
    return found


def _wide_grids(variant: Variant, layout: Layout) -> dict[str, Grid]:
    """Returns the 16-bit grid of each tensor between nodes that stay in float."""
    links = Links(variant.model.graph)
    found: dict[str, Grid] = {}
    for node in body_nodes(variant.model):
        if node.name not in variant.float_nodes:
            continue
        for name in (*links.data_inputs(node), *node.output):
            if name in layout.group or name in links.outputs or name not in variant.seen:
                continue
            seen = variant.seen[name]
            found[name] = Grid.over(float(seen.low.min()), float(seen.high.max()), WIDE_STEPS)
    return found
