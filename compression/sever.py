"""Cuts an ONNX detector in two: a body up to its last convolutions, and the tail after them.

The body becomes a torch network that can be pruned and trained. The tail (sigmoid, reshape,
concatenation, decoding) has nothing to learn; it stays ONNX and is put back unchanged.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ..models.errors import ModelFileError
from ..models.graph import (
    attributes,
    copied,
    drop_dead,
    initializers,
    require_onnx,
    set_nodes,
    tensor_shapes,
)
from ..models.spec import ModelSpec
from .onnx_io import PREPARING, tidy

Ints = npt.NDArray[np.int64]
CONVS = ("Conv", "ConvTranspose")
MOVES = ("Reshape", "Transpose", "Slice", "Split", "Gather", "Squeeze", "Unsqueeze", "Flatten")
"""Operators that only move numbers; a chain of them may be a choice of channels."""


@dataclass(frozen=True)
class Severed:
    """An ONNX detector in two parts.

    Attributes:
        body: Picture to raw maps; batch not fixed by any reshape.
        tail: Raw maps to the outputs of the original, batch of one.
        maps: Names of the raw maps, finest first, then in the order of their convolutions.
        shapes: Shape of each raw map for a batch of one.
    """

    body: Any
    tail: Any
    maps: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]


def prepare(model: Any, spec: ModelSpec) -> tuple[Any, ModelSpec]:
    """Returns the model in plain form, with a float ``(1, 3, h, w)`` input, and its spec.

    Raises:
        ModelFileError: The model is quantized, or its pre-processing cannot be taken off.
    """
    onnx = require_onnx()
    if quantized := {n.op_type for n in model.graph.node if "Linear" in n.op_type}:
        message = (
            f"expected a float model, found quantized operators ({', '.join(sorted(quantized))}); "
            "compress the float model that it was made from"
        )
        raise ModelFileError(message)
    model = copied(model)
    stored = initializers(model)
    inputs = [i for i in model.graph.input if i.name not in stored]
    del model.graph.input[:]
    model.graph.input.extend(inputs)
    height, width = spec.input_hw
    nhwc = spec.input_format == "uint8_nhwc"
    wanted = (1, height, width, 3) if nhwc else (1, 3, height, width)
    for dim, size in zip(inputs[0].type.tensor_type.shape.dim, wanted, strict=True):
        dim.dim_value = size
    model = tidy(model)
    if not nhwc:
        return model, spec
    ends = [n for n in model.graph.node if n.name in PREPARING]
    ends = ends[-1:] or [n for n in model.graph.node if _to_planes(n)][:1]
    if ends:
        planes = ends[0].output[0]
        model.graph.node.remove(ends[0])
        del model.graph.input[:]
        info = onnx.helper.make_tensor_value_info(planes, 1, [1, 3, height, width])
        model.graph.input.append(info)
        drop_dead(model)
        return model, spec.with_changes(input_format="float_nchw")
    message = "expected pre-processing that ends in a transpose, found none; export the model again"
    raise ModelFileError(message)


def _to_planes(node: Any) -> bool:
    return node.op_type == "Transpose" and attributes(node).get("perm") == [0, 3, 1, 2]


def sever(model: Any) -> Severed:
    """Cuts a model from ``prepare`` after the last convolution of each path to an output.

    Convolutions on anything but a grid over the picture (a decoder's sum over bins) are tail.

    Raises:
        ModelFileError: An output does not come from convolutions alone, or sizes are not fixed.
    """
    model = _with_named_outputs(model)
    shapes = tensor_shapes(model)
    stored = initializers(model)
    producer = {out: node for node in model.graph.node for out in node.output}
    picture = model.graph.input[0].name
    input_hw = shapes[picture][2:]
    tail: set[int] = set()
    cuts: dict[str, Any] = {}
    todo = [o.name for o in model.graph.output]
    while todo:
        name = todo.pop()
        node = producer.get(name)
        if node is None:
            if name and name not in stored:
                message = (
                    "expected outputs that come from convolutions, found one that depends on the "
                    f"input {name!r} otherwise; name a network of ours in the recipe instead"
                )
                raise ModelFileError(message)
            continue
        if node.op_type in CONVS and _on_grid(shapes.get(name, ()), input_hw):
            cuts[name] = node
        elif id(node) not in tail:
            tail.add(id(node))
            todo += node.input
    if not cuts:
        message = "expected a network of convolutions, found none; check the file"
        raise ModelFileError(message)
    place = {out: i for i, node in enumerate(model.graph.node) for out in node.output}
    maps = sorted(cuts, key=lambda n: (-shapes[n][2] * shapes[n][3], place[n]))
    tail_nodes = [n for n in model.graph.node if id(n) in tail]
    body = _part(model, list(model.graph.node), model.graph.input, [_info(m, shapes) for m in maps])
    drop_dead(body)
    choose_channels(body)
    _free_batch(body)
    tail_model = _part(model, tail_nodes, [_info(m, shapes) for m in maps], model.graph.output)
    return Severed(body, tail_model, tuple(maps), tuple(shapes[m] for m in maps))


def _with_named_outputs(model: Any) -> Any:
    """Returns a copy in which no output is a convolution's own result, so that there is a tail."""
    onnx = require_onnx()
    model = copied(model)
    outputs = {o.name for o in model.graph.output}
    renamed = {
        n.output[0]: f"{n.output[0]}_map"
        for n in model.graph.node
        if n.op_type in CONVS and n.output[0] in outputs
    }
    for node in model.graph.node:
        for names in (node.input, node.output):
            names[:] = [renamed.get(name, name) for name in names]
    for name, inner in renamed.items():
        model.graph.node.append(onnx.helper.make_node("Identity", [inner], [name], f"{name}_out"))
    return model


def choose_channels(model: Any) -> None:
    """Writes chains of reshapes, transposes and splits as one ``Gather`` of channels, in place.

    Each chain is followed with numbered entries; only where the result is a choice of whole
    channels of the chain's source is it replaced. A channel shuffle then no longer fixes the batch
    size, and pruning can follow it.
    """
    onnx = require_onnx()
    shapes, stored = tensor_shapes(model), initializers(model)
    values: dict[str, tuple[str, Ints]] = {}
    made: dict[str, Any] = {}
    for node in model.graph.node:
        if node.op_type not in MOVES or not all(i in stored for i in node.input[1:] if i):
            continue
        source = node.input[0]
        if source not in values:
            shape = shapes.get(source, ())
            if len(shape) != 4 or shape[0] != 1 or 0 in shape:
                continue
            values[source] = (source, np.arange(np.prod(shape)).reshape(shape))
        root, entries = values[source]
        for name, result in zip(node.output, moved(model, node, entries, stored), strict=True):
            values[name] = (root, result)
            index = _chosen_channels(result, shapes[root])
            if index is not None:
                made[name] = (root, index)
    nodes = []
    for node in model.graph.node:
        gathers = [name for name in node.output if name in made]
        if len(gathers) < len(node.output):
            if gathers:  # one output of a split is no choice of whole channels: keep the split
                made = {k: v for k, v in made.items() if k not in gathers}
            nodes.append(node)
            continue
        for name in gathers:
            root, index = made[name]
            tensor = onnx.numpy_helper.from_array(index, f"{name}_channels")
            model.graph.initializer.append(tensor)
            nodes.append(
                onnx.helper.make_node("Gather", [root, tensor.name], [name], f"{name}_pick", axis=1)
            )
    set_nodes(model.graph, nodes)
    drop_dead(model)


def moved(model: Any, node: Any, entries: Ints, stored: dict[str, Any]) -> list[Ints]:
    """Runs one moving operator on numbered entries."""
    onnx = require_onnx()
    from onnx.reference import ReferenceEvaluator

    helper = onnx.helper
    kind = onnx.TensorProto.INT64
    graph = helper.make_graph(
        [node],
        "move",
        [helper.make_tensor_value_info(node.input[0], kind, entries.shape)],
        [helper.make_tensor_value_info(name, kind, None) for name in node.output],
        [stored[i] for i in dict.fromkeys(node.input[1:]) if i],
    )
    small = helper.make_model(graph, opset_imports=model.opset_import)
    results = ReferenceEvaluator(small).run(None, {node.input[0]: entries})
    return [np.asarray(result, np.int64) for result in results]


def _chosen_channels(entries: Ints, source: tuple[int, ...]) -> Ints | None:
    """Returns which channels of the source these entries are, if they are whole channels."""
    cells = source[2] * source[3]
    if entries.ndim != 4 or entries.shape[0] != 1 or entries.shape[2:] != tuple(source[2:]):
        return None
    flat = entries.reshape(entries.shape[1], cells)
    index = flat[:, 0] // cells
    whole = np.array_equal(flat, index[:, None] * cells + np.arange(cells))
    return index.astype(np.int64) if whole else None


def _free_batch(model: Any) -> None:
    """Takes the batch of one out of what is left of the body's reshapes."""
    onnx = require_onnx()
    shapes, stored = tensor_shapes(model), initializers(model)
    for node in model.graph.node:
        if node.op_type != "Reshape" or node.input[1] not in stored:
            continue
        before, after = shapes.get(node.input[0], ()), shapes.get(node.output[0], ())
        if before[:1] == after[:1] == (1,) and 0 not in after:
            shape = np.array([-1, *after[1:]], np.int64)
            tensor = onnx.numpy_helper.from_array(shape, f"{node.output[0]}_shape")
            model.graph.initializer.append(tensor)
            node.input[1] = tensor.name
    drop_dead(model)


def _on_grid(shape: tuple[int, ...], input_hw: tuple[int, ...]) -> bool:
    """Whether a shape is ``(1, c, h, w)`` with one cell per 1, 2, 4, ... 512 pixels."""
    grids = [tuple(-(-side // 2**k) for side in input_hw) for k in range(10)]
    return len(shape) == 4 and shape[0] == 1 and tuple(shape[2:]) in grids


def _info(name: str, shapes: dict[str, tuple[int, ...]]) -> Any:
    return require_onnx().helper.make_tensor_value_info(name, 1, shapes[name])


def _part(model: Any, nodes: list[Any], inputs: Any, outputs: Any) -> Any:
    """Returns a model of some of the nodes."""
    onnx = require_onnx()
    used = {name for node in nodes for name in node.input}
    kept = [t for t in model.graph.initializer if t.name in used]
    graph = onnx.helper.make_graph(nodes, model.graph.name, list(inputs), list(outputs), kept)
    result = onnx.helper.make_model(graph, opset_imports=model.opset_import)
    result.ir_version = model.ir_version
    return result
