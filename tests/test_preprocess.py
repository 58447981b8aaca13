"""Resizing undoes itself, for any picture, and normalisation is what was published."""

from __future__ import annotations

import itertools

import cv2
import numpy as np
import pytest
from edgesight.models.detections import FloatArray
from edgesight.models.preprocess import fit, normalise, prepare
from edgesight.models.spec import ModelSpec

SIZES = [(1, 1), (1, 500), (500, 1), (3, 2000), (48, 64), (416, 416), (417, 415), (333, 97)]
RESIZES = ["letterbox_topleft", "letterbox_center", "stretch"]


@pytest.mark.parametrize(
    ("resize", "hw", "input_hw"),
    list(itertools.product(RESIZES, SIZES, [(416, 416), (320, 192)])),
)
def test_resize_undoes_itself(
    tiny_spec: ModelSpec, resize: str, hw: tuple[int, int], input_hw: tuple[int, int]
) -> None:
    spec = tiny_spec.with_changes(resize=resize, input_hw=input_hw)
    height, width = hw
    fitted, placement = fit(np.zeros((height, width, 3), np.uint8), spec)
    assert fitted.shape == (*input_hw, 3)
    random = np.random.default_rng(0)
    ends = np.sort(random.uniform(0, 1, (50, 2, 2)), axis=1)
    boxes: FloatArray = (ends.reshape(50, 4) * [width, height, width, height]).astype(np.float32)
    inside = placement.to_input(boxes)
    assert (inside >= -0.01).all()
    assert (inside <= np.array([input_hw[1], input_hw[0]] * 2) + 0.01).all()
    np.testing.assert_allclose(placement.to_source(inside), boxes, atol=0.01)


@pytest.mark.parametrize("resize", RESIZES)
@pytest.mark.parametrize("hw", [(60, 200), (200, 60), (416, 416), (30, 31)])
def test_pixels_lie_where_the_placement_says(
    tiny_spec: ModelSpec, resize: str, hw: tuple[int, int]
) -> None:
    """A white block comes out where its box does, within a pixel of the input."""
    spec = tiny_spec.with_changes(resize=resize, input_hw=(256, 320), pad_value=0)
    image = np.zeros((*hw, 3), np.uint8)
    x1, y1, x2, y2 = hw[1] // 3, hw[0] // 4, hw[1] * 2 // 3, hw[0] * 3 // 4
    image[y1:y2, x1:x2] = 255
    fitted, placement = fit(image, spec)
    wanted = placement.to_input(np.array([[x1, y1, x2, y2]], np.float32))[0]
    rows, cols = np.nonzero(fitted[:, :, 0] > 127)
    found = [cols.min(), rows.min(), cols.max() + 1, rows.max() + 1]
    np.testing.assert_allclose(found, wanted, atol=1.0)


@pytest.mark.parametrize("resize", RESIZES)
@pytest.mark.parametrize("hw", SIZES)
def test_the_whole_picture_covers_whole_pixels(
    tiny_spec: ModelSpec, resize: str, hw: tuple[int, int]
) -> None:
    """Also where rounding (3x2000 becomes 1 pixel high) makes the two scales differ."""
    spec = tiny_spec.with_changes(resize=resize, input_hw=(416, 416), pad_value=0)
    fitted, placement = fit(np.full((*hw, 3), 255, np.uint8), spec)
    rows, cols = np.nonzero(fitted[:, :, 0])
    found = [cols.min(), rows.min(), cols.max() + 1, rows.max() + 1]
    wanted = placement.to_input(np.array([[0, 0, hw[1], hw[0]]], np.float32))[0]
    np.testing.assert_allclose(found, wanted, atol=0.01)


def test_letterbox_keeps_the_aspect_and_pads_with_grey(tiny_spec: ModelSpec) -> None:
    image = np.full((50, 100, 3), 255, np.uint8)
    top, _ = fit(image, tiny_spec)
    assert (top[:16] == 255).all()
    assert (top[16:] == 114).all()
    middle, placement = fit(image, tiny_spec.with_changes(resize="letterbox_center", pad_value=7))
    assert (middle[8:24] == 255).all()
    assert (middle[:8] == 7).all()
    assert (middle[24:] == 7).all()
    assert placement.offset_xy == (0, 8)
    turned = np.ascontiguousarray(image.transpose(1, 0, 2))
    tall, placement = fit(turned, tiny_spec.with_changes(resize="letterbox_center"))
    assert (tall[:, 8:24] == 255).all()
    assert placement.offset_xy == (8, 0)


def test_boxes_are_cut_to_the_source(tiny_spec: ModelSpec) -> None:
    _, placement = fit(np.zeros((50, 100, 3), np.uint8), tiny_spec)
    box = placement.to_source(np.array([[-5, -5, 40, 40]], np.float32))
    assert box.tolist() == [[0, 0, 100, 50]]


def test_normalise_is_the_published_formula(tiny_spec: ModelSpec) -> None:
    random = np.random.default_rng(0)
    image = random.integers(0, 256, (32, 32, 3), dtype=np.uint8)
    mean, std = (103.53, 116.28, 123.675), (57.375, 57.12, 58.395)
    spec = tiny_spec.with_changes(mean=mean, std=std)
    out = normalise(image, spec)
    assert out.shape == (1, 3, 32, 32)
    assert out.dtype == np.float32
    assert out.flags.c_contiguous
    for y, x, c in ((0, 0, 0), (5, 9, 1), (31, 31, 2)):
        assert out[0, c, y, x] == pytest.approx((image[y, x, c] - mean[c]) / std[c], abs=1e-6)
    turned = normalise(image, spec.with_changes(color="rgb"))
    assert turned[0, 0, 3, 4] == pytest.approx((image[3, 4, 2] - mean[0]) / std[0], abs=1e-6)
    plain = normalise(image, tiny_spec)
    assert (plain[0] == image.transpose(2, 0, 1)).all()


def test_uint8_input_is_the_fitted_picture_itself(tiny_spec: ModelSpec) -> None:
    image = np.random.default_rng(0).integers(0, 256, (40, 80, 3), dtype=np.uint8)
    spec = tiny_spec.with_changes(input_format="uint8_nhwc", color="rgb", mean=(9, 9, 9))
    tensor, _ = prepare(image, spec)
    assert tensor.dtype == np.uint8
    assert tensor.shape == (1, 32, 32, 3)
    assert (tensor[0, :16] == cv2.resize(image, (32, 16))).all()


@pytest.mark.parametrize(
    "image",
    [
        np.zeros((4, 4), np.uint8),
        np.zeros((4, 4, 4), np.uint8),
        np.zeros((4, 4, 3), np.float32),
        np.zeros((0, 4, 3), np.uint8),
    ],
)
def test_what_is_no_picture_is_refused(tiny_spec: ModelSpec, image: np.ndarray) -> None:
    with pytest.raises(ValueError, match="expected a uint8 picture"):
        fit(image, tiny_spec)
