"""The photos of a run: which to learn from, which to measure on, and the boxes they come with."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..models.dataset import Dataset, GroundTruth, Photo, map_classes, open_dataset
from ..models.detections import IntArray
from ..models.errors import DatasetError
from ..models.evaluate import Detector, bar
from .photos import PhotoLabels

SPLIT_MIN = 20
"""With fewer photos than this none are held out: there would be too few on either side."""
HOLD_OUT = 10
TEACHER_SCORE = 0.35
"""Boxes of the uncut network at or above this score are learned from, weighted by it."""


@dataclass(frozen=True)
class PhotoSet:
    """The photos of a run.

    Attributes:
        train: To prune, distil and calibrate with; one dataset per folder.
        check: To measure on.
        check_kind: ``eval`` (a labelled folder of its own), ``held out``, or ``same photos``
            (too few to hold any out: the figures flatter).
        train_print: SHA-256 over names, sizes and beginnings of the training photos.
        check_print: The same of the others.
    """

    train: tuple[Dataset, ...]
    check: Dataset
    check_kind: str
    train_print: str
    check_print: str

    @property
    def train_paths(self) -> list[Path]:
        """Files of all training photos, in a fixed order."""
        return [photo.path for data in self.train for photo in data.photos]

    def train_sample(self, count: int) -> Dataset:
        """Returns ``count`` photos that are learned from; of those with boxes if there are any."""
        return _joined(self.train).limit(count)


def open_photos(
    folders: Sequence[Path], eval_folder: Path | None = None, hold_out: int | None = None
) -> PhotoSet:
    """Opens the folders of a recipe.

    Args:
        folders: Plain or labelled, to learn from.
        eval_folder: Labelled; measured on and nothing else.
        hold_out: Photos whose id is a multiple of this are never learned from (plain folders
            number their photos from 1). Without ``eval_folder`` they are what is measured on. None:
            10 without ``eval_folder``, none with it.

    Raises:
        DatasetError: A folder is missing, empty or inconsistent, or a photo of ``eval_folder`` is
            also among those to learn from.
    """
    opened = [open_dataset(folder) for folder in folders]
    split = sum(map(len, opened)) >= SPLIT_MIN and (hold_out is not None or eval_folder is None)
    hold_out = hold_out or HOLD_OUT
    # A folder whose every number is such a multiple is learned from whole.
    parted = [split and any(p.image_id % hold_out for p in d.photos) for d in opened]
    train = tuple(
        d.subset(lambda p: p.image_id % hold_out != 0) if parts else d
        for d, parts in zip(opened, parted, strict=True)
    )
    if eval_folder is not None:
        check, kind = open_dataset(eval_folder), "eval"
        check.labels()
        refuse_overlap(train, check)
    elif held := [
        h for d, parts in zip(opened, parted, strict=True) if parts and (h := _held(d, hold_out))
    ]:
        check, kind = _joined(held), "held out"
    else:
        check, kind = _joined(opened), "same photos"
    return PhotoSet(train, check, kind, _fingerprint(train), _fingerprint([check]))


def _held(data: Dataset, hold_out: int) -> Dataset | None:
    if not any(p.image_id % hold_out == 0 for p in data.photos):
        return None
    return data.subset(lambda p: p.image_id % hold_out == 0)


def _joined(parts: Sequence[Dataset]) -> Dataset:
    """Returns one dataset; labelled parts alone if some are, because only there AP is known."""
    known = [p for p in parts if p.truths is not None]
    labelled = [p for p in known if p.classes == known[0].classes]
    if labelled:
        truths: tuple[GroundTruth, ...] = ()
        for part in labelled:
            truths += part.truths or ()
        photos = tuple(photo for part in labelled for photo in part.photos)
        return Dataset(" + ".join(p.name for p in labelled), photos, known[0].classes, truths)
    photos = tuple(photo for part in parts for photo in part.photos)
    return Dataset(" + ".join(p.name for p in parts), photos)


def refuse_overlap(train: Sequence[Dataset], check: Dataset) -> None:
    """Raises ``DatasetError`` if a photo to measure on is also one to learn from."""
    learned = {photo.path.resolve() for data in train for photo in data.photos}
    both = [photo.path for photo in check.photos if photo.path.resolve() in learned]
    if both:
        message = (
            f"{both[0]}: expected photos to measure on that are not learned from, found "
            f"{len(both)} in both photos and eval; take them out of one"
        )
        raise DatasetError(message)


def _fingerprint(datasets: Sequence[Dataset]) -> str:
    digest = hashlib.sha256()
    for data in datasets:
        for photo in data.photos:
            try:
                with photo.path.open("rb") as file:
                    start = file.read(4096)
                size = photo.path.stat().st_size
            except OSError as error:
                message = f"{photo.path}: expected a photo, found: {error.strerror}"
                raise DatasetError(message) from error
            digest.update(f"{photo.path.name}|{photo.image_id}|{size}|".encode() + start)
        for truth in data.truths or ():
            digest.update(truth.xyxy.tobytes() + truth.label.tobytes())
        digest.update("|".join(data.classes or ()).encode())
    return digest.hexdigest()


def photo_labels(
    photos: PhotoSet, classes: Sequence[str], teacher: Detector, progress: bool = True
) -> list[PhotoLabels]:
    """Returns boxes for each of ``photos.train_paths``: people's, else the uncut network's.

    Args:
        photos: The photos.
        classes: Of the network that learns.
        teacher: Finds the boxes where people drew none.
        progress: Show a bar.
    """
    result: list[PhotoLabels] = []
    for data in photos.train:
        if data.truths is not None and data.classes is not None:
            shared = map_classes(classes, data.classes)
            place = np.flatnonzero(shared.from_model >= 0)  # shared class -> the model's number
            order = np.argsort(shared.from_model[place], kind="stable")
            numbers = place[order]
            unseen = np.flatnonzero(shared.from_model < 0)
            pairs = list(zip(data.photos, data.truths, strict=True))
            title = "boxes of classes without labels"
            for photo, truth in bar(pairs, title, progress and len(unseen) > 0):
                known = shared.truth(truth)
                keep = ~known.iscrowd
                ones = np.ones(int(keep.sum()), np.float32)
                people = PhotoLabels(known.xyxy[keep], numbers[known.label[keep]], ones)
                # What nobody looked for is not absent: there the uncut network is asked.
                result.append(_with_teacher(people, photo, teacher, unseen))
            continue
        for photo in bar(data.photos, "boxes of the uncut network", progress):
            found = teacher(photo.load(), TEACHER_SCORE, 100)
            result.append(PhotoLabels(found.xyxy, found.label, found.score))
    return result


def _with_teacher(
    people: PhotoLabels, photo: Photo, teacher: Detector, classes: IntArray
) -> PhotoLabels:
    """Returns people's boxes, and the uncut network's of these classes."""
    if not len(classes):
        return people
    found = teacher(photo.load(), TEACHER_SCORE, 100)
    mine = np.isin(found.label, classes)
    return PhotoLabels(
        np.concatenate([people.xyxy, found.xyxy[mine]]),
        np.concatenate([people.label, found.label[mine]]),
        np.concatenate([people.weight, found.score[mine]]),
    )
