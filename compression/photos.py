"""Photos for training and calibration: augmented, resized as at run time, reproducible."""

from __future__ import annotations

import hashlib
import queue
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..models.boxes import box_area, clip_boxes
from ..models.dataset import load_image
from ..models.detections import FloatArray, IntArray
from ..models.preprocess import Image, Placement, fit, normalise, prepare
from ..models.spec import ModelSpec
from .assign import Targets
from .augment import Matrix, Piece, augment, mosaic


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


def move_labels(labels: PhotoLabels, piece: Piece, placement: Placement) -> Targets:
    """Returns boxes where augmentation and resizing have put them; lost ones are dropped.

    Args:
        labels: In source pixels.
        piece: Where the photo shows in the augmented picture.
        placement: From ``fit``.
    """
    left, top, right, bottom = piece.region
    corners = labels.xyxy.reshape(-1, 2) @ piece.matrix[:, :2].T + piece.matrix[:, 2]
    pairs = corners.reshape(-1, 2, 2)
    moved = np.concatenate([pairs.min(1), pairs.max(1)], 1).astype(np.float32)
    corner = np.array([left, top, left, top], np.float32)
    seen = clip_boxes(moved - corner, (right - left, bottom - top)) + corner
    visible = box_area(seen) > 0.3 * box_area(moved)
    boxes = placement.to_input(seen)
    kept = visible & ((boxes[:, 2:] - boxes[:, :2]).min(1, initial=np.inf) > 2)
    return Targets(
        torch.from_numpy(boxes[kept]),
        torch.from_numpy(labels.label[kept]),
        torch.from_numpy(labels.weight[kept]),
    )


def join_targets(parts: Sequence[Targets]) -> Targets:
    """Returns the boxes of several photos that share a picture."""
    return Targets(
        torch.cat([p.xyxy for p in parts]),
        torch.cat([p.label for p in parts]),
        torch.cat([p.weight for p in parts]),
    )


@dataclass(frozen=True)
class Mosaic:
    """How often four photos are put into one picture.

    Attributes:
        share: Part of the pictures, 0..1.
        stop: From this position of the stream on: none (the last pictures should look real).
    """

    share: float = 0.0
    stop: int = 0


NO_MOSAIC = Mosaic()


@dataclass(frozen=True)
class View:
    """A batch as a network of another kind sees it.

    Attributes:
        inputs: ``(b, ...)`` as its spec's ``input_format`` says.
        placements: Where each picture lies in it.
    """

    inputs: Tensor
    placements: tuple[Placement, ...]


@dataclass(frozen=True)
class Batch:
    """Augmented pictures.

    Attributes:
        images: float32 ``(b, 3, h, w)``, as the student sees them.
        targets: One entry per picture, or None without labels.
        placements: Where each picture lies in ``images``.
        views: The same pictures for others, one entry per spec.
    """

    images: Tensor
    targets: list[Targets] | None
    placements: tuple[Placement, ...] = ()
    views: tuple[View, ...] = ()


class PhotoStream:
    """An endless stream of augmented batches; batch ``k`` depends only on the seed and ``k``.

    Args:
        paths: The photos.
        spec: Of the network.
        batch: Photos per batch.
        seed: Of order and augmentation.
        labels: Boxes per photo; without them batches have no targets.
        ahead: Batches made ahead in a thread of their own.
        mosaic: How often four photos share a picture.
        views: Specs of other networks that are to see the pictures, too.
        part: Number and count of the processes that share each batch.
    """

    def __init__(
        self,
        paths: Sequence[Path],
        spec: ModelSpec,
        batch: int,
        seed: int = 0,
        labels: Sequence[PhotoLabels] | None = None,
        ahead: int = 4,
        mosaic: Mosaic = NO_MOSAIC,
        views: Sequence[ModelSpec] = (),
        part: tuple[int, int] = (0, 1),
    ) -> None:
        self.paths, self.spec, self.batch, self.seed = paths, spec, batch, seed
        self.labels, self.ahead, self.mosaic, self.views = labels, ahead, mosaic, views
        self.part = part

    def description(self) -> list[str]:
        """Returns what the stream's batches depend on, to tell one run from another."""
        digest = hashlib.sha256()
        for labels in self.labels or ():
            for column in (labels.xyxy, labels.label, labels.weight):
                digest.update(np.ascontiguousarray(column).tobytes())
        names = [path.name for path in self.paths]
        numbers = [str(self.batch), str(self.seed), repr(self.mosaic)]
        return [self.spec.to_json(), *numbers, digest.hexdigest(), *names]

    def picture(self, position: int) -> tuple[Image, list[Piece]]:
        """Returns picture number ``position`` of the stream, and which photos it shows where."""
        if position < self.mosaic.stop and self.mosaic.share:
            epoch, index = divmod(position, len(self.paths))
            rng = np.random.default_rng((self.seed, epoch, index, 4))
            if rng.random() < self.mosaic.share:
                order = np.random.default_rng((self.seed, epoch)).permutation(len(self.paths))
                others = rng.integers(0, len(self.paths), 3)
                places = [int(order[index]), *map(int, others)]
                images = [load_image(self.paths[place]) for place in places]
                return mosaic(images, places, rng, self.spec)
        place, image, matrix = drawn(self.paths, self.spec, self.seed, position)
        return image, [Piece(place, matrix, (0, 0, image.shape[1], image.shape[0]))]

    def make(self, step: int) -> Batch:
        """Returns batch number ``step``, or this process' part of it."""
        tensors, targets, placements = [], [], []
        seen: list[list[tuple[Tensor, Placement]]] = [[] for _ in self.views]
        number, count = self.part
        share = self.batch // count
        first = step * self.batch + number * share
        for position in range(first, first + share):
            image, pieces = self.picture(position)
            fitted, placement = fit(image, self.spec)
            tensors.append(torch.from_numpy(normalise(fitted, self.spec)))
            placements.append(placement)
            for view, spec in zip(seen, self.views, strict=True):
                values, where = prepare(image, spec)
                view.append((torch.from_numpy(values), where))
            if self.labels is not None:
                parts = [move_labels(self.labels[p.place], p, placement) for p in pieces]
                targets.append(parts[0] if len(parts) == 1 else join_targets(parts))
        views = tuple(
            View(torch.cat([values for values, _ in view]), tuple(where for _, where in view))
            for view in seen
        )
        labelled = targets if self.labels is not None else None
        return Batch(torch.cat(tensors), labelled, tuple(placements), views)

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
