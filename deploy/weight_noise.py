"""Models that differ a little from a given one: its weights with noise, without the onnx package.

Values are changed where they stand in the file, so nothing else of it moves.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from ..models.errors import ModelFileError
from ..models.external_data import INNER, _fields

DIMS, DATA_TYPE, RAW_DATA = 1, 2, 9
"""Field numbers of a TensorProto."""
KINDS: dict[int, np.dtype[Any]] = {
    1: np.dtype("<f4"),
    2: np.dtype("u1"),
    3: np.dtype("i1"),
    10: np.dtype("<f2"),
}
"""Data types of a TensorProto that weights are stored in."""


def noisy_weights(model: bytes, share: float, seed: int) -> bytes:
    """Returns an ONNX model whose convolutions' weights have normal noise added.

    Where a model has no convolution, matrices are changed. Integers are changed by whole steps.

    Args:
        model: The whole file.
        share: Standard deviation of the noise as a share of that of the weights of the same
            output channel.
        seed: Of the noise.

    Raises:
        ModelFileError: The file is no ONNX model, or stores no weights in a way known here.
    """
    data = bytearray(model)
    random = np.random.default_rng(seed)
    try:
        tensors = list(_tensors(memoryview(data), "model"))
    except ValueError as error:
        message = f"expected an ONNX model, found {error}; copy or export it again"
        raise ModelFileError(message) from None
    chosen = [one for one in tensors if len(one[0]) == 4]
    chosen = chosen or [one for one in tensors if len(one[0]) == 2]
    if not chosen:
        message = "expected weights stored within the ONNX file, found none; export it again"
        raise ModelFileError(message)
    for shape, kind, raw in chosen:
        weights = np.frombuffer(raw, kind).astype(np.float64).reshape(shape[0], -1)
        noise = random.normal(size=weights.shape) * share * weights.std(axis=1, keepdims=True)
        weights += noise
        if kind.kind != "f":
            limits = np.iinfo(kind)
            weights = np.clip(np.rint(weights), limits.min, limits.max)
        raw[:] = weights.astype(kind).tobytes()
    return bytes(data)


def _tensors(
    data: memoryview, kind: str
) -> Iterator[tuple[tuple[int, ...], np.dtype[Any], memoryview]]:
    """Yields shape, type and stored bytes of the tensors of a graph, those of branches too."""
    if kind == "tensor":
        shape, type_, raw = _tensor(data)
        if type_ in KINDS and shape and raw is not None:
            dtype = KINDS[type_]
            if len(raw) == dtype.itemsize * int(np.prod(shape)) and len(raw):
                yield shape, dtype, raw
        return
    for number, value in _fields(data):
        if isinstance(value, memoryview) and number in INNER[kind]:
            yield from _tensors(value, INNER[kind][number])


def _tensor(data: memoryview) -> tuple[tuple[int, ...], int, memoryview | None]:
    shape: list[int] = []
    type_, raw = 0, None
    for number, value in _fields(data):
        if number == DIMS:
            shape += [value] if isinstance(value, int) else _packed(value)
        elif number == DATA_TYPE and isinstance(value, int):
            type_ = value
        elif number == RAW_DATA and isinstance(value, memoryview):
            raw = value
    return tuple(shape), type_, raw


def _packed(data: memoryview) -> list[int]:
    """Returns the numbers of a packed list: 7 bits a byte, the last byte of each below 128."""
    numbers, value, shift = [], 0, 0
    for byte in data:
        value |= (byte & 0x7F) << shift
        shift += 7
        if byte < 0x80:
            numbers.append(value)
            value = shift = 0
    return numbers
