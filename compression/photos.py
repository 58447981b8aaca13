"""Photos for training and calibration: augmented, resized as at run time, reproducible."""

from __future__ import annotations

import hashlib
import math
import queue
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ..models.boxes import box_area, clip_boxes
from ..models.dataset import load_image
from ..models.detections import FloatArray, IntArray
from ..models.preprocess import Image, Placement, fit, normalise
from ..models.spec import ModelSpec
from .assign import Targets


def as_tensor(image: Image, spec: ModelSpec) -> Tensor:
    """Returns one picture as the network sees it at run time, float32 ``(1, 3, h, w)``."""
    return torch.from_numpy(normalise(fit(image, spec)[0], spec))


def calibration_batches(
    paths: Sequence[Path], spec: ModelSpec, count: int, batch: int = 8
) -> list[Tensor]:
    """Returns ``count`` photos spread evenly over ``paths``, in batches, not augmented."""
    index = np.linspace(0, len(paths) - 1, min(max(count, 1), len(paths))).round().astype(int)
    chosen = [paths[i] for i in index]
    tensors = [as_tensor(load_image(path), spec) for path in chosen]
    return [torch.cat(tensors[k : k + batch]) for k in range(0, len(tensors), batch)]


Matrix = npt.NDArray[np.float64]


def augment(image: Image, rng: np.random.Generator, spec: ModelSpec) -> tuple[Image, Matrix]:
    """Flips, zooms and recolours one picture.

    Returns:
        The picture, and float64 ``(2, 3)``: where a point of the source lies in it.
    """
    height, width = image.shape[:2]
    matrix = np.array([[1.0, 0, 0], [0, 1, 0]])
    if rng.random() < 0.5:
        image = np.ascontiguousarray(image[:, ::-1])
        matrix = np.array([[-1.0, 0, width], [0, 1, 0]])
    if rng.random() < 0.7:  # a crop (objects grow) or a canvas (objects shrink)
        zoom = float(rng.uniform(0.6, 1.3))
        stretch = math.sqrt(float(rng.uniform(0.8, 1.25)))
        view_w, view_h = width * zoom * stretch, height * zoom / stretch
        left = float(rng.uniform(min(0.0, width - view_w), max(0.0, width - view_w)))
        top = float(rng.uniform(min(0.0, height - view_h), max(0.0, height - view_h)))
        scale = min(1.0, 1.5 * max(spec.input_hw) / max(view_w, view_h))
        size = (max(8, round(view_w * scale)), max(8, round(view_h * scale)))
        zoom_x, zoom_y = size[0] / view_w, size[1] / view_h
        view = np.array([[zoom_x, 0, -left * zoom_x], [0, zoom_y, -top * zoom_y]])
        grey = (spec.pad_value,) * 3
        image = np.asarray(cv2.warpAffine(image, view, size, borderValue=grey), np.uint8)
        matrix = view @ np.vstack([matrix, [0, 0, 1]])
    if rng.random() < 0.5:
        gain = rng.uniform(0.7, 1.3) * rng.uniform(0.9, 1.1, 3)
        shift = rng.uniform(-20, 20)
        bright = image * gain.astype(np.float32) + np.float32(shift)
        image = np.clip(bright, 0, 255).astype(np.uint8)
    return image, matrix


def drawn(
    paths: Sequence[Path], spec: ModelSpec, seed: int, position: int
) -> tuple[int, Image, Matrix]:
    """Returns photo number ``position`` of an endless shuffled stream, augmented.

    It depends on nothing but the arguments, so that a stream can go on anywhere.

    Returns:
        Its place in ``paths``, the picture, and where a point of the photo lies in it.
    """
    epoch, index = divmod(position, len(paths))
    order = np.random.default_rng((seed, epoch)).permutation(len(paths))
    rng = np.random.default_rng((seed, epoch, index))
    place = int(order[index])
    image, matrix = augment(load_image(paths[place]), rng, spec)
    return place, image, matrix


@dataclass(frozen=True)
class PhotoLabels:
    """The boxes of one photo: ``xyxy`` in source pixels, ``label``, and ``weight`` 0..1."""

    xyxy: FloatArray
    label: IntArray
    weight: FloatArray


def move_labels(
    labels: PhotoLabels, matrix: Matrix, placement: Placement, view_wh: tuple[int, int]
) -> Targets:
    """Returns boxes where augmentation and resizing have put them; lost ones are dropped.

    Args:
        labels: In source pixels.
        matrix: From ``augment``.
        placement: From ``fit``.
        view_wh: Size of the augmented picture in pixels.
    """
    corners = labels.xyxy.reshape(-1, 2) @ matrix[:, :2].T + matrix[:, 2]
    pairs = corners.reshape(-1, 2, 2)
    moved = np.concatenate([pairs.min(1), pairs.max(1)], 1).astype(np.float32)
    seen = clip_boxes(moved, view_wh)
    visible = box_area(seen) > 0.3 * box_area(moved)
    boxes = placement.to_input(seen)
    kept = visible & ((boxes[:, 2:] - boxes[:, :2]).min(1, initial=np.inf) > 2)
    return Targets(
        torch.from_numpy(boxes[kept]),
        torch.from_numpy(labels.label[kept]),
        torch.from_numpy(labels.weight[kept]),
    )


@dataclass(frozen=True)
class Batch:
    """``images`` float32 ``(b, 3, h, w)``; ``targets`` one entry per photo, or None."""

    images: Tensor
    targets: list[Targets] | None


class PhotoStream:
    """An endless stream of augmented batches; batch ``k`` depends only on the seed and ``k``.

    Args:
        paths: The photos.
        spec: Of the network.
        batch: Photos per batch.
        seed: Of order and augmentation.
        labels: Boxes per photo; without them batches have no targets.
        ahead: Batches made ahead in a thread of their own.
    """

    def __init__(
        self,
        paths: Sequence[Path],
        spec: ModelSpec,
        batch: int,
        seed: int = 0,
        labels: Sequence[PhotoLabels] | None = None,
        ahead: int = 4,
    ) -> None:
        self.paths, self.spec, self.batch, self.seed = paths, spec, batch, seed
        self.labels, self.ahead = labels, ahead

    def description(self) -> list[str]:
        """Returns what the stream's batches depend on, to tell one run from another."""
        digest = hashlib.sha256()
        for labels in self.labels or ():
            for column in (labels.xyxy, labels.label, labels.weight):
                digest.update(np.ascontiguousarray(column).tobytes())
        names = [path.name for path in self.paths]
        return [self.spec.to_json(), str(self.batch), str(self.seed), digest.hexdigest(), *names]

    def make(self, step: int) -> Batch:
        """Returns batch number ``step``."""
        tensors, targets = [], []
        for position in range(step * self.batch, (step + 1) * self.batch):
            place, image, matrix = drawn(self.paths, self.spec, self.seed, position)
            fitted, placement = fit(image, self.spec)
            tensors.append(torch.from_numpy(normalise(fitted, self.spec)))
            if self.labels is not None:
                size = (image.shape[1], image.shape[0])
                targets.append(move_labels(self.labels[place], matrix, placement, size))
        return Batch(torch.cat(tensors), targets if self.labels is not None else None)

    def batches(self, first: int, stop: int) -> Iterator[Batch]:
        """Yields batches ``first`` to ``stop - 1``, made ahead of time."""
        ready: queue.Queue[Batch | BaseException] = queue.Queue(self.ahead)
        closing = threading.Event()

        def put(item: Batch | BaseException) -> None:
            while not closing.is_set():
                try:
                    ready.put(item, timeout=0.2)
                except queue.Full:
                    continue
                return

        def work() -> None:
            try:
                for step in range(first, stop):
                    if closing.is_set():
                        return
                    put(self.make(step))
            except BaseException as error:  # handed to the consumer, which raises it
                put(error)

        thread = threading.Thread(target=work, name="photos", daemon=True)
        thread.start()
        try:
            for _ in range(first, stop):
                item = ready.get()
                if isinstance(item, BaseException):
                    raise item
                yield item
        finally:
            closing.set()
            thread.join()
