"""Turns camera buffers into BGR pictures: six formats of libcamera, with padded rows.

The names are libcamera's, and say the order in a little-endian word: ``RGB888`` lies in memory as
B, G, R, which is what OpenCV calls BGR. Rows are ``stride`` bytes apart, often more than they need.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import cv2
import numpy as np
import numpy.typing as npt

from ..models.preprocess import Image

Buffer = npt.NDArray[np.uint8]


def _rows(buffer: Buffer, start: int, rows: int, stride: int, used: int) -> Buffer:
    """Returns a view of a plane: ``rows`` rows of ``used`` bytes, ``stride`` apart."""
    end = start + rows * stride
    if used > stride or len(buffer) < end - stride + used:
        message = (
            f"expected {rows} rows of {used} bytes, {stride} apart, found a buffer of "
            f"{len(buffer)} bytes"
        )
        raise ValueError(message)
    plane = buffer[start:end]
    if len(plane) < rows * stride:  # the last row may lack its padding
        plane = np.concatenate([plane, np.zeros(rows * stride - len(plane), np.uint8)])
    view: Buffer = plane.reshape(rows, stride)[:, :used]
    return view


def _packed(channels: int, *, swap: bool) -> Callable[[Buffer, int, int, int], Image]:
    code = cv2.COLOR_RGB2BGR if channels == 3 else cv2.COLOR_RGBA2BGR

    def convert(buffer: Buffer, width: int, height: int, stride: int) -> Image:
        rows = _rows(buffer, 0, height, stride, width * channels)
        pixels = rows.reshape(height, width, channels)
        if swap:
            return np.asarray(cv2.cvtColor(pixels, code), np.uint8)
        return np.array(pixels[:, :, :3], order="C")  # a copy: the camera wants its buffer back

    return convert


def _nv12(buffer: Buffer, width: int, height: int, stride: int) -> Image:
    luma = _rows(buffer, 0, height, stride, width)
    chroma = _rows(buffer, height * stride, height // 2, stride, width)
    pairs = np.ascontiguousarray(chroma).reshape(height // 2, width // 2, 2)
    picture = cv2.cvtColorTwoPlane(np.ascontiguousarray(luma), pairs, cv2.COLOR_YUV2BGR_NV12)
    return np.asarray(picture, np.uint8)


def _yuv420(buffer: Buffer, width: int, height: int, stride: int) -> Image:
    if stride == width and len(buffer) >= height * width * 3 // 2:
        planes = buffer[: height * width * 3 // 2].reshape(height * 3 // 2, width)
    else:
        half, start = stride // 2, height * stride
        planes = np.empty((height * 3 // 2, width), np.uint8)
        planes[:height] = _rows(buffer, 0, height, stride, width)
        size = height // 2 * (width // 2)
        flat = planes[height:].reshape(-1)
        for number in range(2):
            place = start + number * height // 2 * half
            plane = _rows(buffer, place, height // 2, half, width // 2)
            flat[number * size : (number + 1) * size] = plane.reshape(-1)
    return np.asarray(cv2.cvtColor(planes, cv2.COLOR_YUV2BGR_I420), np.uint8)


CONVERTERS: Mapping[str, Callable[[Buffer, int, int, int], Image]] = {
    "RGB888": _packed(3, swap=False),
    "BGR888": _packed(3, swap=True),
    "XRGB8888": _packed(4, swap=False),
    "XBGR8888": _packed(4, swap=True),
    "YUV420": _yuv420,
    "NV12": _nv12,
}
"""libcamera's name of a pixel format -> what turns ``(buffer, width, height, stride)`` into BGR.

YUV is taken as BT.601 with limited range, as OpenCV does.
"""


def to_bgr(buffer: Buffer, pixel_format: str, size_wh: tuple[int, int], stride: int) -> Image:
    """Returns a camera buffer as a picture.

    Args:
        buffer: uint8 ``(bytes,)``, as it comes from the camera.
        pixel_format: Key of ``CONVERTERS``.
        size_wh: Of the picture, in pixels; even numbers for YUV.
        stride: Bytes from one row (of the first plane) to the next.

    Returns:
        uint8 ``(height, width, 3)``, BGR, contiguous.

    Raises:
        ValueError: The format is not known, or the buffer is too short.
    """
    convert = CONVERTERS.get(pixel_format)
    if convert is None:
        message = f"expected one of {', '.join(CONVERTERS)}, found {pixel_format}"
        raise ValueError(message)
    width, height = size_wh
    return convert(buffer, width, height, stride)
