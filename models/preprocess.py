"""From a picture to the network's input, and from its boxes back to the picture."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt

from .boxes import clip_boxes
from .detections import FloatArray
from .spec import ModelSpec

Image = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class Placement:
    """Where a picture lies in the network's input; undoes the resize.

    Attributes:
        scale_xy: Input pixels per source pixel.
        offset_xy: Left and top padding in input pixels.
        source_wh: Size of the source picture in pixels.
    """

    scale_xy: tuple[float, float]
    offset_xy: tuple[int, int]
    source_wh: tuple[int, int]

    def to_source(self, xyxy: FloatArray) -> FloatArray:
        """Returns boxes given in input pixels as source pixels, cut to the picture."""
        offset = np.array(self.offset_xy * 2, np.float32)
        scale = np.array(self.scale_xy * 2, np.float32)
        return clip_boxes((xyxy - offset) / scale, self.source_wh)

    def seen_from(self, size_wh: tuple[int, int]) -> Placement:
        """Returns the placement for another size of the same view, as a camera's larger stream.

        Args:
            size_wh: Of the picture whose pixels boxes are to be given in.
        """
        ratio_x, ratio_y = (own / other for own, other in zip(self.source_wh, size_wh, strict=True))
        scale = (self.scale_xy[0] * ratio_x, self.scale_xy[1] * ratio_y)
        return Placement(scale, self.offset_xy, size_wh)

    def to_input(self, xyxy: FloatArray) -> FloatArray:
        """Returns boxes given in source pixels as input pixels."""
        moved: FloatArray = xyxy * np.array(self.scale_xy * 2, np.float32)
        moved += np.array(self.offset_xy * 2, np.float32)
        return moved


def fit(image: Image, spec: ModelSpec) -> tuple[Image, Placement]:
    """Resizes a picture to the network's size, as ``spec.resize`` says.

    Args:
        image: uint8 ``(height, width, 3)``, BGR.
        spec: Of the network.

    Returns:
        uint8 ``(*spec.input_hw, 3)`` BGR, and the placement that undoes the resize.

    Raises:
        ValueError: The picture is not uint8 with three channels, or is empty.
    """
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or image.size == 0:
        message = f"expected a uint8 picture (height, width, 3), got {image.dtype} {image.shape}"
        raise ValueError(message)
    height, width = image.shape[:2]
    in_h, in_w = spec.input_hw
    if spec.resize == "stretch":
        placement = Placement((in_w / width, in_h / height), (0, 0), (width, height))
        return _resized(image, (in_w, in_h)), placement
    scale = min(in_w / width, in_h / height)
    new_w = min(in_w, max(1, round(width * scale)))
    new_h = min(in_h, max(1, round(height * scale)))
    left, top = 0, 0
    if spec.resize == "letterbox_center":
        left, top = (in_w - new_w) // 2, (in_h - new_h) // 2
    placement = Placement((new_w / width, new_h / height), (left, top), (width, height))
    resized = _resized(image, (new_w, new_h))
    if (new_w, new_h) == (in_w, in_h):
        return resized, placement
    canvas = np.full((in_h, in_w, 3), spec.pad_value, np.uint8)
    canvas[top : top + new_h, left : left + new_w] = resized
    return canvas, placement


def normalise(fitted: Image, spec: ModelSpec) -> FloatArray:
    """Returns a fitted picture as float32 ``(1, 3, h, w)`` in the network's colours and scale."""
    planes = cv2.split(fitted)
    if spec.color == "rgb":
        planes = planes[::-1]
    values = np.empty((1, 3, *fitted.shape[:2]), np.float32)
    for out, plane, mean, std in zip(values[0], planes, spec.mean, spec.std, strict=True):
        np.subtract(plane, np.float32(mean), out=out, dtype=np.float32)
        if std != 1.0:
            out /= np.float32(std)
    return values


def prepare(image: Image, spec: ModelSpec) -> tuple[npt.NDArray[Any], Placement]:
    """Returns the network's input tensor, as ``spec.input_format`` says, and the placement."""
    fitted, placement = fit(image, spec)
    if spec.input_format == "uint8_nhwc":
        return fitted[None], placement
    return normalise(fitted, spec), placement


def _resized(image: Image, size_wh: tuple[int, int]) -> Image:
    if (image.shape[1], image.shape[0]) == size_wh:
        return np.ascontiguousarray(image)
    resized = cv2.resize(image, size_wh, interpolation=cv2.INTER_LINEAR)
    return np.asarray(resized, np.uint8)
