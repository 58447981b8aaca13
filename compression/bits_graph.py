"""Stores weights of 1 to 7 bits in ONNX files, as bytes that any ONNX Runtime unpacks on loading.

A byte of the file holds several codes. A table of 256 rows says which: ``Gather`` looks the bytes
up, ``Reshape`` gives the weight its shape. All of it is computed from stored numbers alone, so
ONNX Runtime does it once, on loading (constant folding), and then runs the same integer
convolutions as with 8-bit weights: nothing of it is left in the running graph.

Needs no more than opset 13 and was seen to fold in ONNX Runtime 1.17 to 1.31. ONNX's own INT4 was
tried and is not used: read by DequantizeLinear the convolution computes in float, and with a Cast
to INT8 in front ONNX Runtime 1.17 to 1.20 refuse the file.

Widths that are no power of two are sums: 6 bits are a plane of 4 and a plane of 2.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from ..models.errors import ModelFileError
from ..models.graph import copied, require_onnx, set_nodes
from .qdq import Links

Codes = npt.NDArray[np.int8]
Bytes = npt.NDArray[np.uint8]
PLANES: Final[dict[int, tuple[int, ...]]] = {
    1: (1,),
    2: (2,),
    3: (2, 1),
    4: (4,),
    5: (4, 1),
    6: (4, 2),
    7: (4, 2, 1),
}
"""Width -> bits of its planes, highest first; each fills a byte with whole codes."""
WIDTHS: Final = (8, *sorted(PLANES, reverse=True))
BLOCK: Final = 8
"""Codes are padded to a multiple of it, so that every plane ends with a whole byte."""


def levels(bits: int) -> Codes:
    """Returns the codes that a width can hold, ascending: -1 and 1 for 1 bit, else with a 0."""
    if bits == 1:
        return np.array([-1, 1], np.int8)
    if bits == 8:
        return np.arange(-127, 128).astype(np.int8)
    half = 1 << (bits - 1)
    return np.arange(-half, half).astype(np.int8)


def pack(codes: Codes, bits: int) -> list[Bytes]:
    """Returns the bytes of each plane of a width, for codes of any shape.

    Raises:
        ModelFileError: A code is none of ``levels(bits)``.
    """
    allowed = levels(bits)
    flat = codes.reshape(-1)
    index = np.searchsorted(allowed, flat).clip(0, len(allowed) - 1)
    if not np.array_equal(allowed[index], flat):
        message = (
            f"expected codes of {bits} bits, {allowed[0]}..{allowed[-1]}, found "
            f"{flat.min()}..{flat.max()}; a defect of the step that rounded them"
        )
        raise ModelFileError(message)
    padded = np.zeros(-(-len(flat) // BLOCK) * BLOCK, np.uint8)
    padded[: len(flat)] = index
    planes: list[Bytes] = []
    left = bits
    for width in PLANES[bits]:
        left -= width
        parts = ((padded >> left) & ((1 << width) - 1)).reshape(-1, 8 // width)
        shifts = np.arange(8 // width, dtype=np.uint8) * width
        planes.append(np.bitwise_or.reduce(parts << shifts, axis=1).astype(np.uint8))
    return planes


def table(bits: int, plane: int) -> Codes:
    """Returns what each byte of a plane stands for, ``(256, codes per byte)``.

    The planes' values add up to the codes.
    """
    width = PLANES[bits][plane]
    shifts = np.arange(8 // width) * width
    values = (np.arange(256)[:, None] >> shifts) & ((1 << width) - 1)
    if bits == 1:
        return (2 * values - 1).astype(np.int8)
    values = values << sum(PLANES[bits][plane + 1 :])
    return (values - (plane == 0) * (1 << (bits - 1))).astype(np.int8)


def packed_bytes(count: int, bits: int) -> int:
    """Returns what so many codes take in a file, without the operators that unpack them."""
    return count if bits == 8 else -(-count // BLOCK) * bits


def store_packed(model: Any, widths: Mapping[str, int]) -> Any:
    """Returns a copy of a QDQ model whose weights are stored in fewer bits; it computes the same.

    Args:
        model: With weights as int8 initializers.
        widths: Initializer -> bits; 8 leaves it as it is.

    Raises:
        ModelFileError: A weight has codes that do not fit its width.
    """
    onnx = require_onnx()
    helper, numpy_helper = onnx.helper, onnx.numpy_helper
    result = copied(model)
    graph = result.graph
    stored = {t.name: t for t in graph.initializer}
    nodes: list[Any] = []
    shared: set[str] = set()
    added: dict[str, Any] = {}

    def store(name: str, value: npt.NDArray[Any]) -> str:
        added[name] = numpy_helper.from_array(value, name)
        return name

    def node(op: str, inputs: list[str], output: str, **attributes: Any) -> str:
        nodes.append(helper.make_node(op, inputs, [output], **attributes))
        return output

    def unpacked(name: str, part: Bytes, bits: int, plane: int) -> str:
        """Adds what turns one plane's bytes into numbers, ``(bytes, codes per byte)``."""
        stem = f"{name}/{plane}"
        index = node("Cast", [store(f"{stem}/p", part)], f"{stem}/i", to=onnx.TensorProto.INT32)
        key = f"bits/{bits}/{plane}"
        source = store(key, table(bits, plane))
        if len(PLANES[bits]) == 1:
            return node("Gather", [source, index], f"{stem}/v")
        if key not in shared:  # ONNX Runtime adds no 8-bit numbers
            shared.add(key)
            node("Cast", [source], f"{key}/wide", to=onnx.TensorProto.INT32)
        found = node("Gather", [f"{key}/wide", index], f"{stem}/v")
        if plane == len(PLANES[bits]) - 1:
            return found
        shape = store(f"bits/row/{bits}", np.array([-1, 8 // PLANES[bits][-1]], np.int64))
        return node("Reshape", [found, shape], f"{stem}/r")

    for name, bits in widths.items():
        if bits == 8:
            continue
        codes = numpy_helper.to_array(stored[name])
        parts = [unpacked(name, p, bits, i) for i, p in enumerate(pack(codes, bits))]
        value = parts[0]
        for i, other in enumerate(parts[1:]):
            value = node("Add", [value, other], f"{name}/sum{i}")
        if len(parts) > 1:
            value = node("Cast", [value], f"{name}/narrow", to=onnx.TensorProto.INT8)
        if codes.size % BLOCK:
            value = node("Reshape", [value, store("bits/flat", np.array([-1]))], f"{name}/flat")
            ends = [store("bits/first", np.array([0]))]
            ends.append(store(f"bits/{codes.size}", np.array([codes.size])))
            value = node("Slice", [value, *ends], f"{name}/cut")
        shape = store("bits/" + "x".join(map(str, codes.shape)), np.array(codes.shape, np.int64))
        node("Reshape", [value, shape], name)
        graph.initializer.remove(stored[name])
    graph.initializer.extend(added.values())
    set_nodes(graph, [*nodes, *graph.node])
    return result


def store_sparingly(model: Any) -> Any:
    """Returns a copy of a QDQ model without what can be computed on loading; it computes the same.

    A bias's scale is its weight's times its input's (an integer convolution does not read it);
    indices take as many bytes as they need; attributes that say what they would be anyway go.
    """
    onnx = require_onnx()
    helper, numpy_helper = onnx.helper, onnx.numpy_helper
    result = copied(model)
    graph = result.graph
    links = Links(graph)
    nodes: list[Any] = []
    done: set[str] = set()
    for node in graph.node:
        if node.op_type == "Conv":
            _drop_defaults(node)
            made: list[Any] = [links.maker.get(name) for name in node.input]
            product = _bias_scale(made, links.stored)
            if product is not None and made[2].input[1] not in done:
                name = made[2].input[1]
                done.add(name)
                nodes.append(helper.make_node("Mul", product, [name]))
                graph.initializer.remove(links.stored[name])
        elif node.op_type == "Gather" and node.input[1] in links.stored:
            name = node.input[1]
            index = numpy_helper.to_array(links.stored[name])
            kind = np.uint8 if index.max(initial=0) < 256 else np.uint16
            worth = index.size * (index.itemsize - np.dtype(kind).itemsize) > 64
            if name not in done and worth and index.min(initial=0) >= 0:
                done.add(name)
                links.stored[name].CopyFrom(
                    numpy_helper.from_array(index.astype(kind), f"{name}/n")
                )
                wide = onnx.TensorProto.INT32
                nodes.append(helper.make_node("Cast", [f"{name}/n"], [name], to=wide))
    set_nodes(graph, [*nodes, *graph.node])
    return result


def _drop_defaults(conv: Any) -> None:
    defaults = {"group": 1, "auto_pad": b"NOTSET"}
    for attribute in list(conv.attribute):
        value = require_onnx().helper.get_attribute_value(attribute)
        plain = attribute.name == "dilations" and set(value) == {1}
        plain = plain or (attribute.name == "pads" and not any(value))
        if plain or defaults.get(attribute.name) == value:
            conv.attribute.remove(attribute)


def _bias_scale(made: list[Any], stored: Mapping[str, Any]) -> list[str] | None:
    """Returns the two scales whose product a convolution's bias scale is; None if it is not."""
    if len(made) < 3 or any(m is None or m.op_type != "DequantizeLinear" for m in made):
        return None
    names = [m.input[1] for m in made]
    if any(name not in stored for name in names):
        return None
    array = require_onnx().numpy_helper.to_array
    source, weight, bias = (array(stored[name]) for name in names)
    same = bias.shape == weight.shape and np.allclose(weight * source, bias, rtol=1e-6, atol=0)
    return [names[1], names[0]] if same else None
