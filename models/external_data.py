"""Looks for weights that an ONNX file keeps in other files, without loading any of it.

Such a file names paths, and older ONNX Runtimes read whatever they are told to. The message types
and field numbers are those of ``onnx.proto3``; everything else in the file is skipped.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

DEPTH_MAX = 64
VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5
EXTERNAL_DATA, DATA_LOCATION = 13, 14  # of a TensorProto
INNER: Mapping[str, Mapping[int, str]] = {
    "model": {7: "graph", 25: "function"},
    "graph": {1: "node", 5: "tensor", 15: "sparse"},
    "node": {5: "attribute"},
    "attribute": {5: "tensor", 6: "graph", 10: "tensor", 11: "graph", 22: "sparse", 23: "sparse"},
    "sparse": {1: "tensor", 2: "tensor"},
    "function": {7: "node", 11: "attribute"},
}


def has_external_data(data: bytes) -> bool:
    """Returns whether a tensor of an ONNX model is kept in another file.

    Args:
        data: The whole file.

    Raises:
        ValueError: It is no ONNX model.
    """
    return _found(memoryview(data), "model", 0)


def _found(data: memoryview, kind: str, depth: int) -> bool:
    if depth > DEPTH_MAX:
        message = f"more than {DEPTH_MAX} levels"
        raise ValueError(message)
    for number, value in _fields(data):
        if kind == "tensor":
            if number == EXTERNAL_DATA or (number == DATA_LOCATION and value != 0):
                return True
        elif (
            isinstance(value, memoryview)
            and number in INNER[kind]
            and _found(value, INNER[kind][number], depth + 1)
        ):
            return True
    return False


def _fields(data: memoryview) -> Iterator[tuple[int, int | memoryview]]:
    """Yields the number and the value of each field of a message."""
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        number, wire = key >> 3, key & 7
        if wire == VARINT:
            value, at = _varint(data, at)
            yield number, value
        elif wire in (FIXED64, FIXED32):
            at += 8 if wire == FIXED64 else 4
        elif wire == BYTES:
            length, at = _varint(data, at)
            if at + length > len(data):
                message = "a part that is longer than the file"
                raise ValueError(message)
            yield number, data[at : at + length]
            at += length
        else:
            message = f"a part of kind {wire}"
            raise ValueError(message)


def _varint(data: memoryview, at: int) -> tuple[int, int]:
    value = shift = 0
    while at < len(data) and shift < 70:
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7
    message = "a number without an end"
    raise ValueError(message)
