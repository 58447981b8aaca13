"""The same network with fewer operators: what quantization does to the front of a graph first.

Nothing here depends on photos. Each rewrite is exact, but for the outermost ring of cells where
``fold_normalisation`` says so.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..models.detections import FloatArray
from ..models.graph import (
    attributes,
    copied,
    drop_dead,
    require_onnx,
    set_nodes,
    tensors_read,
)
from .calibrate import Grid
from .onnx_io import PREPARING
from .qdq import Links

FAR = 2**31 - 1
"""A slice that ends here or later ends at the end."""


def lean(model: Any) -> tuple[Any, dict[str, Grid]]:
    """Returns a copy with a leaner front, and the grids of tensors that hold whole pixel values.

    Args:
        model: Plain float graph (``tidy``), with or without folded pre-processing.
    """
    result = copied(model)
    merge_focus(result)
    pool_first(result)
    grids = fold_normalisation(result)
    if grids:
        pair_columns(result)
    return result, grids


def fold_normalisation(model: Any) -> dict[str, Grid]:
    """Puts mean, deviation and colour order into the first convolution's weights, in place.

    What is left of the pre-processing is ``pixel - offset`` with one whole number for all channels:
    an 8-bit grid of step 1 holds that without any error. The convolution's padding then stands for
    a pixel of ``offset`` in place of each channel's own mean, which are a few grey levels apart;
    all other cells compute what they did.

    Returns:
        Tensor -> its grid; empty if the pre-processing is not ours, or read by anything but
        ordinary convolutions.
    """
    links = Links(model.graph)
    front = [n for n in model.graph.node if n.name in PREPARING]
    if not front or front[0].op_type != "Cast":
        return {}
    last = front[-1].output[0]
    convs = links.readers[last]
    if not convs or last in links.outputs or any(not _foldable(n, links) for n in convs):
        return {}
    values = {n.op_type: _value(links, n.input[1]) for n in front if len(n.input) > 1}
    mean = values.get("Sub", np.zeros(3)).reshape(-1).astype(np.float64)
    std = values.get("Div", np.ones(3)).reshape(-1).astype(np.float64)
    order = values.get("Gather", np.arange(3)).reshape(-1).astype(int)
    offset = round(float(mean.mean()))
    if not 0 <= offset <= 255:  # no pixel is that: there is no grid with such a zero
        return {}
    for conv in convs:
        weight = _value(links, conv.input[1]).astype(np.float64) / std.reshape(1, 3, 1, 1)
        shift = (weight * (offset - mean).reshape(1, 3, 1, 1)).sum((1, 2, 3))
        moved = np.empty_like(weight)
        moved[:, order] = weight
        _store(links, conv, 1, moved)
        _store(links, conv, 2, _value(links, conv.input[2]).astype(np.float64) + shift)
    helper, numpy_helper = require_onnx().helper, require_onnx().numpy_helper
    floats = front[0].output[0]
    nodes = [front[0]]
    if offset:
        amount = numpy_helper.from_array(np.float32(offset), "image_offset")
        model.graph.initializer.append(amount)
        floats = "image_centred"
        ends = [front[0].output[0], amount.name]
        nodes.append(helper.make_node("Sub", ends, [floats], "image_sub"))
    turn = helper.make_node("Transpose", [floats], [last], "image_planes", perm=[0, 3, 1, 2])
    nodes.append(turn)
    rest = [n for n in model.graph.node if n.name not in PREPARING]
    set_nodes(model.graph, [*nodes, *rest])
    return dict.fromkeys((floats, last), Grid(1.0, offset))


def pair_columns(model: Any) -> bool:
    """Reads two neighbouring pixels as one cell of six channels, in place; exact.

    Pixels lie in memory so already. Where the first convolution has even width, padding and stride
    2 (what ``merge_focus`` makes), it is one of half the width and stride 1: an integer
    convolution gathers its cells tap by tap, and over three channels that is most of its work.

    Args:
        model: What ``fold_normalisation`` made.

    Returns:
        Whether it was done.
    """
    links = Links(model.graph)
    cast, turn = (n for n in model.graph.node if n.name in ("image_cast", "image_planes"))
    convs = links.readers[turn.output[0]]
    _, height, width, _ = (d.dim_value for d in model.graph.input[0].type.tensor_type.shape.dim)
    if width % 2 or not all(_pairable(conv, links) for conv in convs):
        return False
    for conv in convs:
        weight, given = _value(links, conv.input[1]), attributes(conv)
        halves = [weight[:, :, :, column::2] for column in (0, 1)]
        _store(links, conv, 1, np.concatenate(halves, 1))
        top, left, bottom, right = given.get("pads", [0] * 4)
        _set_window(
            conv,
            kernel_shape=[weight.shape[2], weight.shape[3] // 2],
            strides=[given["strides"][0], 1],
            pads=[top, left // 2, bottom, right // 2],
        )
    helper, numpy_helper = require_onnx().helper, require_onnx().numpy_helper
    shape = numpy_helper.from_array(
        np.array([-1, height, width // 2, 6], np.int64), "image_pairs_shape"
    )
    model.graph.initializer.append(shape)
    pixels, cast.input[0] = cast.input[0], "image_pairs"
    pairs = helper.make_node("Reshape", [pixels, shape.name], ["image_pairs"], "image_pairs")
    set_nodes(model.graph, [pairs, *model.graph.node])
    del model.graph.value_info[:]
    return True


def _pairable(conv: Any, links: Links) -> bool:
    """Whether a convolution over pixels is one over pairs of them."""
    given, columns = attributes(conv), links.stored[conv.input[1]].dims[3]
    pads = given.get("pads", [0] * 4)
    even = not (columns % 2 or pads[1] % 2 or pads[3] % 2)
    return _plain_window(given) and even and list(given.get("strides", [1, 1]))[1] == 2


def _plain_window(given: dict[str, Any]) -> bool:
    """Whether a convolution has no dilation, and says its padding in numbers."""
    stated = given.get("auto_pad", b"") in (b"", b"NOTSET")
    return stated and set(given.get("dilations", [1])) == {1}


def _set_window(conv: Any, **values: list[int]) -> None:
    """Sets how a convolution goes over its input."""
    for attribute in [a for a in conv.attribute if a.name in values]:
        conv.attribute.remove(attribute)
    make = require_onnx().helper.make_attribute
    conv.attribute.extend(make(name, value) for name, value in values.items())


def _foldable(node: Any, links: Links) -> bool:
    """Whether a node is a convolution over three planes with stored weights and bias."""
    if node.op_type != "Conv" or len(node.input) < 3:
        return False
    if not all(name in links.stored for name in node.input[1:3]):
        return False
    dims = links.stored[node.input[1]].dims
    alone = all(_uses(links, name) == 1 for name in node.input[1:3])
    return len(dims) == 4 and dims[1] == 3 and alone


def merge_focus(model: Any) -> int:
    """Turns YOLOX's Focus and the convolution behind it into one convolution, in place; exact.

    Focus puts the four pixels of each 2x2 square into channels; a k x k convolution of that with
    padding p is a 2k x 2k convolution of the picture with stride 2 and padding 2p. Four slices and
    a concatenation of the largest tensor of the network are saved.

    Returns:
        How many were merged.
    """
    merged = 0
    for conv in [n for n in model.graph.node if n.op_type == "Conv"]:
        links = Links(model.graph)
        concat = links.maker.get(conv.input[0])
        focus = _focus(concat, links) if concat is not None else None
        if focus is None or not _plain_conv(conv, links):
            continue
        if len(links.readers[conv.input[0]]) != 1 or conv.input[0] in links.outputs:
            continue
        weight = _value(links, conv.input[1])
        parts, size = len(focus.corners), weight.shape[2]
        planes = weight.shape[1] // parts
        wide = np.zeros((len(weight), planes, 2 * size, 2 * size), np.float64)
        for number, (y, x) in enumerate(focus.corners):
            part = weight[:, number * planes : (number + 1) * planes]
            wide[:, :, y::2, x::2] += part
        _store(links, conv, 1, wide)
        conv.input[0] = focus.source
        pads = [2 * p for p in attributes(conv).get("pads", [0, 0, 0, 0])]
        _set_window(conv, kernel_shape=[2 * size] * 2, strides=[2, 2], pads=pads)
        merged += 1
    if merged:  # only now: it voids the convolutions that are still to be looked at
        drop_dead(model)
    return merged


def pool_first(model: Any) -> int:
    """Puts a LeakyReLU behind the maximum pooling that alone reads it, in place; exact.

    A function that never falls has its maximum where its argument has it, so the pooled map, which
    is smaller, can be what it is computed on. In 8 bits it is an operator of its own.
    Between a convolution in float and an integer one it does more: ONNX Runtime would round in
    front of the pooling, and 8-bit pooling takes six times the instructions of that in float where
    channels come first.

    Returns:
        How many were moved.
    """
    links = Links(model.graph)
    reads = Counter(name for node in model.graph.node for name in tensors_read(node))
    nodes, moved = list(model.graph.node), 0
    for pool in tuple(nodes):
        if pool.op_type != "MaxPool" or len(pool.output) != 1:
            continue
        activation = links.maker.get(pool.input[0])
        if activation is None or not _never_falls(activation):
            continue
        active, end = activation.output[0], pool.output[0]
        if reads[active] != 1 or active in links.outputs:
            continue
        pool.input[0], pool.output[0] = activation.input[0], f"{end}_pooled"
        activation.input[0], activation.output[0] = pool.output[0], end
        places = [nodes.index(n) for n in (activation, pool)]
        nodes[places[0]], nodes[places[1]] = pool, activation
        moved += 1
    if moved:
        set_nodes(model.graph, nodes)
    return moved


def _never_falls(node: Any) -> bool:
    return node.op_type == "LeakyRelu" and bool(attributes(node).get("alpha", 0.01) >= 0)


@dataclass(frozen=True)
class _Focus:
    """The ``source`` and, in the order of channels, ``(y, x)`` of the pixel each part takes."""

    source: str
    corners: tuple[tuple[int, int], ...]


def _focus(concat: Any, links: Links) -> _Focus | None:
    if concat.op_type != "Concat" or len(concat.input) != 4:
        return None
    if attributes(concat).get("axis", 0) != 1:
        return None
    found = [_corner(name, links) for name in concat.input]
    sources = {source for source, _ in found}
    corners = tuple(corner for _, corner in found)
    wanted = {(y, x) for y in (0, 1) for x in (0, 1)}
    if len(sources) != 1 or set(corners) != wanted:
        return None
    return _Focus(sources.pop(), corners)


def _corner(name: str, links: Links) -> tuple[str, tuple[int, int]]:
    """Follows slices of step 2 upwards; an impossible corner if there is anything else."""
    starts = {2: -1, 3: -1}
    while (node := links.maker.get(name)) is not None and node.op_type == "Slice":
        if not all(i in links.stored for i in node.input[1:]) or len(node.input) != 5:
            break
        start, end, axes, steps = (_whole(links, i) for i in node.input[1:])
        for s, e, axis, step in zip(start, end, axes, steps, strict=True):
            if axis not in starts or step != 2 or s not in (0, 1) or e < FAR or starts[axis] >= 0:
                return name, (-1, -1)
            starts[axis] = s
        name = node.input[0]
    return name, (starts[2], starts[3])


def _plain_conv(node: Any, links: Links) -> bool:
    """Whether a convolution has stored weights, one group, stride 1, no dilation, stated pads."""
    if len(node.input) < 3 or node.input[1] not in links.stored:
        return False
    given = attributes(node)
    if given.get("group", 1) != 1 or not _plain_window(given):
        return False
    weight = links.stored[node.input[1]]
    square = len(weight.dims) == 4 and weight.dims[2] == weight.dims[3]
    alone = _uses(links, node.input[1]) == 1
    return square and alone and set(given.get("strides", [1])) == {1} and not weight.dims[1] % 4


def _uses(links: Links, name: str) -> int:
    return sum(list(node.input).count(name) for node in links.graph.node)


def _value(links: Links, name: str) -> FloatArray:
    value: FloatArray = require_onnx().numpy_helper.to_array(links.stored[name])
    return value


def _whole(links: Links, name: str) -> list[int]:
    return [int(number) for number in _value(links, name).reshape(-1)]


def _store(links: Links, node: Any, index: int, value: Any) -> None:
    tensor = require_onnx().numpy_helper.from_array(
        np.asarray(value, np.float32), node.input[index]
    )
    links.stored[node.input[index]].CopyFrom(tensor)
