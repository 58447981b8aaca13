"""Changed pictures to learn from: flipped, zoomed, recoloured, or four photos side by side.

Everything is drawn from the generator that is handed in, and comes with the matrix that says where
a point of the photo has gone, so that boxes can follow.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np
import numpy.typing as npt

from ..models.preprocess import Image
from ..models.spec import ModelSpec

Matrix = npt.NDArray[np.float64]
"""float64 ``(2, 3)``: where a point of the photo lies in the picture, both in pixels."""
UNMOVED: Matrix = np.array([[1.0, 0, 0], [0, 1, 0]])
TILE_ZOOM = (0.8, 1.6)
"""A photo in a mosaic is this much larger than what just fills its tile."""


@dataclass(frozen=True)
class Piece:
    """Where one photo shows in a picture.

    Attributes:
        place: The photo's number.
        matrix: Where a point of it lies in the picture.
        region: Left, top, right, bottom of what it fills, in pixels of the picture.
    """

    place: int
    matrix: Matrix
    region: tuple[int, int, int, int]


def augment(image: Image, rng: np.random.Generator, spec: ModelSpec) -> tuple[Image, Matrix]:
    """Flips, zooms and recolours one picture; a classifier's is not flipped, and hardly cropped.

    Returns:
        The picture, and where a point of the source lies in it.
    """
    whole = spec.head == "classify"  # the object is the whole picture, and mirrored, a 2 is none
    image, matrix = (image, UNMOVED.copy()) if whole else _flipped(image, rng)
    height, width = image.shape[:2]
    if rng.random() < 0.7:  # a crop (objects grow) or a canvas (objects shrink)
        zoom = float(rng.uniform(0.9 if whole else 0.6, 1.3))
        stretch = math.sqrt(float(rng.uniform(0.8, 1.25)))
        view_w, view_h = width * zoom * stretch, height * zoom / stretch
        left = float(rng.uniform(min(0.0, width - view_w), max(0.0, width - view_w)))
        top = float(rng.uniform(min(0.0, height - view_h), max(0.0, height - view_h)))
        scale = min(1.0, 1.5 * max(spec.input_hw) / max(view_w, view_h))
        size = (max(8, round(view_w * scale)), max(8, round(view_h * scale)))
        zoom_x, zoom_y = size[0] / view_w, size[1] / view_h
        view = np.array([[zoom_x, 0, -left * zoom_x], [0, zoom_y, -top * zoom_y]])
        image = _seen(image, view, size, spec)
        matrix = _then(matrix, view)
    return _recoloured(image, rng), matrix


def mosaic(
    images: Sequence[Image], places: Sequence[int], rng: np.random.Generator, spec: ModelSpec
) -> tuple[Image, list[Piece]]:
    """Puts four photos around one point (YOLOv4, arXiv 2004.10934; as YOLOX, arXiv 2107.08430).

    Each is flipped, recoloured and zoomed by itself, so that one picture shows many sizes of
    object. The result has the first photo's aspect and about the network's size.

    Args:
        images: Four photos.
        places: Their numbers.
        rng: To draw from.
        spec: Of the network.
    """
    first_h, first_w = images[0].shape[:2]
    scale = max(spec.input_hw) / max(first_h, first_w)
    width, height = max(16, round(first_w * scale)), max(16, round(first_h * scale))
    x = round(float(rng.uniform(0.3, 0.7)) * width)
    y = round(float(rng.uniform(0.3, 0.7)) * height)
    canvas = np.full((height, width, 3), spec.pad_value, np.uint8)
    pieces = []
    regions = ((0, 0, x, y), (x, 0, width, y), (0, y, x, height), (x, y, width, height))
    for image, place, region in zip(images, places, regions, strict=True):
        image, matrix = _flipped(image, rng)
        left, top, right, bottom = region
        tile_w, tile_h = right - left, bottom - top
        fill = max(tile_w / image.shape[1], tile_h / image.shape[0])
        zoom = fill * float(rng.uniform(*TILE_ZOOM))
        shift_x = _shift(zoom * image.shape[1], tile_w, left == x, rng)
        shift_y = _shift(zoom * image.shape[0], tile_h, top == y, rng)
        view = np.array([[zoom, 0, shift_x], [0, zoom, shift_y]])
        tile = _recoloured(_seen(image, view, (tile_w, tile_h), spec), rng)
        canvas[top:bottom, left:right] = tile
        moved = view + np.array([[0, 0, left], [0, 0, top]])
        pieces.append(Piece(place, _then(matrix, moved), region))
    return canvas, pieces


def _shift(photo: float, tile: int, behind: bool, rng: np.random.Generator) -> float:
    """Returns where a photo begins in its tile along one axis, in pixels.

    A larger one shows any part; a smaller one touches the middle, which is at the tile's end or,
    ``behind`` the middle, at its beginning.
    """
    draw = float(rng.random())
    if photo >= tile:
        return -draw * (photo - tile)
    return 0.0 if behind else tile - photo


def _flipped(image: Image, rng: np.random.Generator) -> tuple[Image, Matrix]:
    if rng.random() < 0.5:
        mirrored = np.array([[-1.0, 0, image.shape[1]], [0, 1, 0]])
        return np.ascontiguousarray(image[:, ::-1]), mirrored
    return image, UNMOVED.copy()


def _seen(image: Image, view: Matrix, size_wh: tuple[int, int], spec: ModelSpec) -> Image:
    grey = (spec.pad_value,) * 3
    return np.asarray(cv2.warpAffine(image, view, size_wh, borderValue=grey), np.uint8)


def _recoloured(image: Image, rng: np.random.Generator) -> Image:
    if rng.random() < 0.5:
        gain = rng.uniform(0.7, 1.3) * rng.uniform(0.9, 1.1, 3)
        shift = rng.uniform(-20, 20)
        bright = image * gain.astype(np.float32) + np.float32(shift)
        return np.asarray(np.clip(bright, 0, 255), np.uint8)
    return image


def _then(first: Matrix, second: Matrix) -> Matrix:
    """Returns the matrix that does one after the other."""
    both: Matrix = second @ np.vstack([first, [0, 0, 1]])
    return both
