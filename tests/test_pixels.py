"""Camera buffers become the pictures that they are, whatever the format and the padding."""

from __future__ import annotations

from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
import pytest
from edgesight.device_app.pixels import CONVERTERS, to_bgr

WIDTH, HEIGHT = 48, 32


def picture() -> npt.NDArray[np.uint8]:
    """A picture whose three colours differ everywhere, smooth enough for halved chroma."""
    y, x = np.mgrid[0:HEIGHT, 0:WIDTH]
    return np.stack([20 + 4 * x, 200 - 3 * y, 60 + 2 * x + 2 * y], axis=2).astype(np.uint8)


def padded(rows: npt.NDArray[np.uint8], stride: int) -> npt.NDArray[np.uint8]:
    """Rows with rubbish behind each up to ``stride`` bytes, in one line."""
    out = np.full((len(rows), stride), 0xAB, np.uint8)
    out[:, : rows.shape[1]] = rows
    return out.reshape(-1)


def buffer_of(pixel_format: str, padding: int) -> tuple[npt.NDArray[np.uint8], int]:
    """What a camera would give: built byte by byte, not by the code under test."""
    bgr = picture()
    dull = np.full((HEIGHT, WIDTH, 1), 7, np.uint8)
    packed: dict[str, Any] = {
        "RGB888": bgr,
        "BGR888": bgr[:, :, ::-1],
        "XRGB8888": np.concatenate([bgr, dull], axis=2),
        "XBGR8888": np.concatenate([bgr[:, :, ::-1], dull], axis=2),
    }
    if pixel_format in packed:
        rows = packed[pixel_format].reshape(HEIGHT, -1)
        stride = rows.shape[1] + padding
        return padded(rows, stride), stride
    planes = cv2.cvtColor(bgr, cv2.COLOR_BGR2YUV_I420).reshape(-1)
    luma = planes[: HEIGHT * WIDTH].reshape(HEIGHT, WIDTH)
    u, v = planes[HEIGHT * WIDTH :].reshape(2, HEIGHT // 2, WIDTH // 2)
    stride = WIDTH + padding
    if pixel_format == "NV12":
        both = np.stack([u, v], axis=2).reshape(HEIGHT // 2, WIDTH)
        return np.concatenate([padded(luma, stride), padded(both, stride)]), stride
    half = stride // 2
    return np.concatenate([padded(luma, stride), padded(u, half), padded(v, half)]), stride


@pytest.mark.parametrize("padding", [0, 16, 80])
@pytest.mark.parametrize("pixel_format", sorted(CONVERTERS))
def test_each_format_with_and_without_padding(pixel_format: str, padding: int) -> None:
    buffer, stride = buffer_of(pixel_format, padding)
    found = to_bgr(buffer, pixel_format, (WIDTH, HEIGHT), stride)
    assert found.shape == (HEIGHT, WIDTH, 3)
    assert found.dtype == np.uint8
    assert found.flags.c_contiguous
    assert not np.shares_memory(found, buffer), "the camera wants its buffer back"
    lossy = pixel_format in ("NV12", "YUV420")
    assert np.abs(found.astype(int) - picture()).max() <= (6 if lossy else 0)


@pytest.mark.parametrize("pixel_format", sorted(CONVERTERS))
def test_a_buffer_longer_than_the_picture_or_without_its_last_padding(pixel_format: str) -> None:
    buffer, stride = buffer_of(pixel_format, 16)
    whole = to_bgr(buffer, pixel_format, (WIDTH, HEIGHT), stride)
    longer = np.concatenate([buffer, np.zeros(4096, np.uint8)])
    np.testing.assert_array_equal(to_bgr(longer, pixel_format, (WIDTH, HEIGHT), stride), whole)
    cut = 8 if pixel_format == "YUV420" else 16
    shorter = to_bgr(buffer[:-cut], pixel_format, (WIDTH, HEIGHT), stride)
    np.testing.assert_array_equal(shorter, whole)


@pytest.mark.parametrize("pixel_format", sorted(CONVERTERS))
def test_a_short_buffer_is_refused(pixel_format: str) -> None:
    buffer, stride = buffer_of(pixel_format, 0)
    with pytest.raises(ValueError, match="found a buffer of"):
        to_bgr(buffer[: len(buffer) // 2], pixel_format, (WIDTH, HEIGHT), stride)


def test_a_stride_below_the_width_and_an_unknown_format_are_refused() -> None:
    buffer, stride = buffer_of("RGB888", 0)
    with pytest.raises(ValueError, match="expected 32 rows of 144 bytes"):
        to_bgr(buffer, "RGB888", (WIDTH, HEIGHT), stride - 1)
    with pytest.raises(ValueError, match=r"expected one of RGB888.*found MJPEG"):
        to_bgr(buffer, "MJPEG", (WIDTH, HEIGHT), stride)
