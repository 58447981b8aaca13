"""Sources made of photos: the samples that ship with the package, and folders of the user's."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np

from ..models.dataset import Dataset, Photo, load_image, open_dataset
from ..models.errors import SourceError
from ..models.preprocess import Image
from .sources import BaseSource, Picture

SAMPLES = Path(__file__).parent / "samples"
FOOTAGE_WH = (640, 480)
FOOTAGE_FPS = 30.0
SECONDS_PER_PHOTO = 8.0
ZOOM = (1.03, 1.3)
"""Least and greatest magnification; the least leaves room to pan on both axes."""
PHOTOS_PER_SECOND = 2.0
"""Photos have no recorded speed; this one lets a person look at each."""


class SampleFootage(BaseSource):
    """Footage made of real photos: a slow pan and zoom over one after another, for ever.

    Args:
        photos: The files; those of the package by default.
        paced: At 30 frames per second, else as fast as they are asked for.

    Raises:
        SourceError: There are none.
        DatasetError: One of them cannot be read.
    """

    def __init__(self, photos: Sequence[Path] | None = None, *, paced: bool = True) -> None:
        """Finds the photos and loads the first."""
        super().__init__("samples", FOOTAGE_FPS, paced=paced)
        self._photos = sorted(SAMPLES.glob("*.jpg")) if photos is None else list(photos)
        if not self._photos:
            message = (
                f"samples: expected sample photos in {SAMPLES}, found none; "
                "install edgesight again, or use --source FILE"
            )
            raise SourceError(message)
        self._loaded: tuple[int, Image] = (0, load_image(self._photos[0]))
        self._at = 0

    def _next(self) -> Picture:
        per_photo = round(SECONDS_PER_PHOTO * FOOTAGE_FPS)
        turn, step = divmod(self._at, per_photo)
        place = turn % len(self._photos)
        if self._loaded[0] != place:
            self._loaded = (place, load_image(self._photos[place]))
        self._at += 1
        return Picture(pan_and_zoom(self._loaded[1], step / per_photo, leftwards=turn % 2 == 1))


def pan_and_zoom(image: Image, progress: float, *, leftwards: bool = False) -> Image:
    """Returns one frame of a slow camera move over a photo.

    Args:
        image: The photo, BGR.
        progress: 0..1, from the beginning of the move to its end.
        leftwards: Whether it goes from right to left.

    Returns:
        uint8 ``(480, 640, 3)``; wholly inside the photo.
    """
    height, width = image.shape[:2]
    out_w, out_h = FOOTAGE_WH
    swing = (1 - math.cos(2 * math.pi * progress)) / 2  # in and out again
    across = (1 - math.cos(math.pi * progress)) / 2
    if leftwards:
        across = 1 - across
    zoom = ZOOM[0] + (ZOOM[1] - ZOOM[0]) * swing
    scale = min(width / out_w, height / out_h) / zoom  # photo pixels per frame pixel
    left = (width - out_w * scale) * across
    # Rather the upper part: that is where people have their heads.
    top = (height - out_h * scale) * (0.3 + 0.25 * math.sin(2 * math.pi * progress))
    # Between pixels too: whole-pixel steps would make a slow move tremble.
    matrix = np.array([[scale, 0, left], [0, scale, top]], np.float64)
    flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
    moved = cv2.warpAffine(image, matrix, FOOTAGE_WH, flags=flags, borderMode=cv2.BORDER_REPLICATE)
    return np.asarray(moved, np.uint8)


class PhotoFolder(BaseSource):
    """The photos of a dataset one after another, with their true boxes where it has labels.

    Args:
        dataset: The photos.
        paced: Two per second, so that a person can look; else as fast as they are asked for.
        loop: Whether it starts again at its end. From then on it gives no true boxes: the same
            photos again are no further evidence, and would narrow the interval of the accuracy.
    """

    still = True

    def __init__(self, dataset: Dataset, *, paced: bool = True, loop: bool = False) -> None:
        """Starts before the first photo."""
        super().__init__(dataset.name, PHOTOS_PER_SECOND, paced=paced)
        self.classes = dataset.classes
        self._dataset, self._loop, self._at = dataset, loop, 0
        self._truths = dataset.truths

    def _next(self) -> Picture | None:
        if self._at == len(self._dataset) and self._loop:
            self._at, self._truths = 0, None
        if self._at == len(self._dataset):
            return None
        truth = None if self._truths is None else self._truths[self._at]
        image = self._dataset.photos[self._at].load()
        self._at += 1
        return Picture(image, truth)


def open_photos(path: Path, *, paced: bool, loop: bool) -> PhotoFolder:
    """Opens one photo, a folder of photos, or a COCO-labelled folder or JSON file.

    Raises:
        DatasetError: It is empty, or its photos or boxes are wrong.
    """
    if path.is_dir() or path.suffix.lower() == ".json":
        return PhotoFolder(open_dataset(path), paced=paced, loop=loop)
    photo = Photo(path, 1)
    photo.load()  # a photo that is none should be told now
    return PhotoFolder(Dataset(path.name, (photo,)), paced=paced, loop=loop)
