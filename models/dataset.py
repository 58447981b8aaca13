"""Photos with or without boxes: COCO JSON and plain folders, checked before anything uses them."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt

from .boxes import box_area
from .coco import canonical_name
from .detections import BoolArray, Detections, FloatArray, IntArray
from .errors import DatasetError
from .files import is_file, is_folder
from .preprocess import Image

PHOTO_SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".webp")
COCO_FILE = "instances.json"
OUTSIDE_MAX = 1.0
"""So many pixels a box may reach over the edge of its photo; exporters round."""


@dataclass(frozen=True, eq=False)
class GroundTruth:
    """The true boxes of one photo, column by column, read-only.

    Attributes:
        xyxy: float32 ``(n, 4)``; left, top, right, bottom in pixels.
        label: int64 ``(n,)``; index into ``Dataset.classes``.
        area: float64 ``(n,)``; the object's area in square pixels as the annotation says: it
            decides between small, medium and large.
        iscrowd: bool ``(n,)``; regions with many objects: detections in them count for nothing.
    """

    xyxy: FloatArray
    label: IntArray
    area: npt.NDArray[np.float64]
    iscrowd: BoolArray

    def __post_init__(self) -> None:
        """Converts the columns to their types, checks their lengths, makes them read-only."""
        columns: dict[str, npt.NDArray[Any]] = {
            "xyxy": np.array(self.xyxy, np.float32).reshape(-1, 4),
            "label": np.array(self.label, np.int64).reshape(-1),
            "area": np.array(self.area, np.float64).reshape(-1),
            "iscrowd": np.array(self.iscrowd, np.bool_).reshape(-1),
        }
        if len({len(column) for column in columns.values()}) != 1:
            lengths = {name: len(column) for name, column in columns.items()}
            message = f"expected columns of one length, got {lengths}"
            raise ValueError(message)
        for name, column in columns.items():
            column.setflags(write=False)
            object.__setattr__(self, name, column)

    @classmethod
    def of_boxes(cls, xyxy: FloatArray, label: IntArray) -> GroundTruth:
        """Returns true boxes from boxes alone: area is the box's, nothing is a crowd."""
        boxes = np.array(xyxy, np.float32).reshape(-1, 4)
        return cls(boxes, label, box_area(boxes).astype(np.float64), np.zeros(len(boxes), np.bool_))

    def __len__(self) -> int:
        """Number of boxes, crowd regions included."""
        return len(self.label)

    def __getitem__(self, index: BoolArray | IntArray | slice) -> GroundTruth:
        """Returns the chosen boxes: a mask, an index array or a slice."""
        return GroundTruth(
            self.xyxy[index], self.label[index], self.area[index], self.iscrowd[index]
        )


@dataclass(frozen=True)
class Photo:
    """One photo of a dataset.

    Attributes:
        path: The file.
        image_id: COCO's image id; in a plain folder the position, from 1.
        size_wh: Width and height in pixels as the annotations say; None in a plain folder.
    """

    path: Path
    image_id: int
    size_wh: tuple[int, int] | None = None

    def load(self) -> Image:
        """Returns the picture, uint8 BGR ``(height, width, 3)``, checked against ``size_wh``.

        Raises:
            DatasetError: The photo cannot be read, or is not of the size its boxes were made for.
        """
        image = load_image(self.path)
        if self.size_wh is None or self.size_wh == (image.shape[1], image.shape[0]):
            return image
        # Boxes may have been drawn on the picture as stored, before the camera's orientation.
        stored = load_image(self.path, oriented=False)
        if self.size_wh == (stored.shape[1], stored.shape[0]):
            return stored
        message = (
            f"{self.path}: expected {self.size_wh[0]}x{self.size_wh[1]} px as its annotation says, "
            f"found {image.shape[1]}x{image.shape[0]}; scale the boxes with the photos"
        )
        raise DatasetError(message)


@dataclass(frozen=True)
class Dataset:
    """Photos, and where there are labels, their true boxes.

    Attributes:
        name: Of the folder or file it came from.
        photos: By image id (labelled) or by path (plain folder).
        classes: Category names as the file spells them; None without labels.
        truths: The true boxes of each photo; None without labels.
    """

    name: str
    photos: tuple[Photo, ...]
    classes: tuple[str, ...] | None = None
    truths: tuple[GroundTruth, ...] | None = None

    def __len__(self) -> int:
        """Number of photos."""
        return len(self.photos)

    @property
    def box_count(self) -> int:
        """Number of true boxes, crowd regions included; 0 without labels."""
        return sum(map(len, self.truths or ()))

    def labels(self) -> tuple[tuple[str, ...], tuple[GroundTruth, ...]]:
        """Returns the class names and the true boxes.

        Raises:
            DatasetError: The dataset has no labels.
        """
        if self.classes is None or self.truths is None:
            message = (
                f"{self.name}: expected photos with boxes, found a plain folder of photos; "
                f"put a COCO JSON file named {COCO_FILE} into it, or name the JSON file itself"
            )
            raise DatasetError(message)
        return self.classes, self.truths

    def subset(self, keep: Callable[[Photo], bool]) -> Dataset:
        """Returns the photos for which ``keep`` is true, as ``lambda p: p.image_id % 5 == 0``.

        Raises:
            DatasetError: No photo is left.
        """
        return self._take([i for i, photo in enumerate(self.photos) if keep(photo)])

    def limit(self, n: int | None) -> Dataset:
        """Returns ``n`` photos spread evenly over the dataset, always the same; None: all."""
        if n is None or n >= len(self.photos):
            return self
        if n < 1:
            message = f"{self.name}: expected a limit of at least 1 photo, found {n}"
            raise DatasetError(message)
        return self._take([i * len(self.photos) // n for i in range(n)])

    def _take(self, index: Sequence[int]) -> Dataset:
        if not index:
            message = f"{self.name}: expected at least one photo in the subset, found none"
            raise DatasetError(message)
        truths = None if self.truths is None else tuple(self.truths[i] for i in index)
        return replace(self, photos=tuple(self.photos[i] for i in index), truths=truths)


@dataclass(frozen=True)
class ClassMap:
    """Two lists of classes brought to one: those that both have.

    Attributes:
        names: The shared classes, COCO's spelling, in the model's order.
        from_model: int64 ``(model classes,)``: index into ``names``, or -1 if not shared.
        from_data: The same for the other list (a dataset's, or another model's).
    """

    names: tuple[str, ...]
    from_model: IntArray
    from_data: IntArray

    def detections(self, found: Detections) -> Detections:
        """Returns the model's detections of shared classes, renumbered."""
        label = _renumber(self.from_model, found.label)
        keep = label >= 0
        return Detections(found.xyxy[keep], found.score[keep], label[keep])

    def reference(self, found: Detections) -> Detections:
        """Returns the other model's detections of shared classes, renumbered."""
        label = _renumber(self.from_data, found.label)
        keep = label >= 0
        return Detections(found.xyxy[keep], found.score[keep], label[keep])

    def truth(self, truth: GroundTruth) -> GroundTruth:
        """Returns the true boxes of shared classes, renumbered."""
        label = _renumber(self.from_data, truth.label)
        keep = label >= 0
        return GroundTruth(truth.xyxy[keep], label[keep], truth.area[keep], truth.iscrowd[keep])

    def note(self, model_classes: Sequence[str], data_classes: Sequence[str]) -> str | None:
        """Returns a sentence saying what is left out; None if nothing is."""
        missing = len(set(map(canonical_name, data_classes))) - len(self.names)
        extra = len(set(map(canonical_name, model_classes))) - len(self.names)
        if not missing and not extra:
            return None
        return (
            f"only the {len(self.names)} shared classes count: {missing} of the data's classes "
            f"are not in the model, {extra} of the model's not in the data"
        )


def map_classes(model_classes: Sequence[str], data_classes: Sequence[str]) -> ClassMap:
    """Pairs a model's classes with a dataset's (or another model's) by name.

    Names are compared in COCO's spelling (``coco.canonical_name``): "motorbike" is "motorcycle".

    Raises:
        DatasetError: They share no class.
    """
    model = [canonical_name(name) for name in model_classes]
    data = [canonical_name(name) for name in data_classes]
    names = tuple(dict.fromkeys(name for name in model if name in set(data)))
    if not names:
        message = (
            f"expected categories that the model knows ({_some(model_classes)}), "
            f"found {_some(data_classes)}; rename the categories or use another model"
        )
        raise DatasetError(message)
    index = {name: i for i, name in enumerate(names)}
    return ClassMap(
        names,
        np.array([index.get(name, -1) for name in model], np.int64),
        np.array([index.get(name, -1) for name in data], np.int64),
    )


def load_image(path: Path | str, *, oriented: bool = True) -> Image:
    """Reads a photo as uint8 BGR ``(height, width, 3)``.

    What ``cv2.imread`` gives by default, and so what detectors are usually trained on: grey
    becomes BGR, transparency is dropped, and the orientation that a camera noted (EXIF) is
    applied. Unlike it, a truncated file is an error and not a half-grey picture.

    Args:
        path: The file.
        oriented: False leaves the picture as it is stored.

    Raises:
        DatasetError: The file is missing, empty, truncated or not a photo.
    """
    path = Path(path)
    try:
        data = path.read_bytes()
    except OSError as error:
        message = f"{path}: expected a photo, found: {error.strerror or error}; check the path"
        raise DatasetError(message) from error
    flags = cv2.IMREAD_COLOR
    if not oriented:
        flags |= cv2.IMREAD_IGNORE_ORIENTATION
    image = None
    if data and not _truncated(data):
        try:
            image = cv2.imdecode(np.frombuffer(data, np.uint8), flags)
        except cv2.error:  # too large for OpenCV, or damaged beyond its patience
            image = None
    if image is None or image.size == 0:
        state = "a truncated" if _truncated(data) else "an unreadable" if data else "an empty"
        message = (
            f"{path}: expected a photo (jpg, png, bmp, webp), found {state} file of "
            f"{len(data)} bytes; copy it again or take it out"
        )
        raise DatasetError(message)
    return np.asarray(image, np.uint8)


def open_dataset(path: Path | str) -> Dataset:
    """Opens a dataset and checks all of it except the pixels.

    Args:
        path: A folder with ``instances.json`` (COCO format) and its photos in ``images/`` or
            beside it; or a COCO JSON file; or a folder of photos without labels (with its
            sub-folders, except hidden ones).

    Raises:
        DatasetError: Something is missing or inconsistent; the message names the annotation.
    """
    from .coco_json import open_coco  # it needs the types above

    path = Path(path)
    if is_folder(path):
        if is_file(path / COCO_FILE):
            return open_coco(path / COCO_FILE, path.resolve().name)
        return _open_folder(path)
    if not is_file(path):
        message = (
            f"{path}: expected a folder of photos or a COCO JSON file, found nothing there; "
            "check the path"
        )
        raise DatasetError(message)
    return open_coco(path, path.name)


def _open_folder(folder: Path) -> Dataset:
    found: list[Path] = []
    try:
        others = sorted(p.name for p in folder.iterdir() if p.suffix == ".json")
        for parent, folders, files in os.walk(folder):
            folders[:] = [name for name in folders if not name.startswith(".")]
            found += [
                Path(parent, name)
                for name in files
                if name.lower().endswith(PHOTO_SUFFIXES) and not name.startswith(".")
            ]
    except OSError as error:  # only of the folder itself: os.walk passes over closed ones below it
        message = f"{folder}: expected a folder of photos, found: {error.strerror or error}"
        raise DatasetError(message) from error
    if not found:
        hint = f"; if {others[0]} is a COCO file, name it itself" if others else ""
        message = (
            f"{folder}: expected photos ({', '.join(s[1:] for s in PHOTO_SUFFIXES)}), "
            f"found none; name a folder with photos{hint}"
        )
        raise DatasetError(message)
    found.sort()
    return Dataset(
        folder.resolve().name, tuple(Photo(photo, i) for i, photo in enumerate(found, 1))
    )


def _renumber(table: IntArray, label: IntArray) -> IntArray:
    known = label < len(table)
    result: IntArray = np.where(known, table[np.minimum(label, len(table) - 1)], -1)
    return result


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _truncated(data: bytes) -> bool:
    """Returns whether a JPEG, PNG or WebP file ends before its own end mark."""
    if data.startswith(b"\x89PNG"):
        return b"IEND" not in data
    if data.startswith(b"RIFF") and data[8:12] == b"WEBP":
        return int.from_bytes(data[4:8], "little") + 8 > len(data)
    if not data.startswith(b"\xff\xd8"):
        return False
    place = 2  # walk the segments, so that a thumbnail's end is not taken for the photo's
    while place + 4 <= len(data) and data[place] == 0xFF:
        marker = data[place + 1]
        if marker == 0xFF:  # fill byte
            place += 1
        elif marker == 0xDA:  # the scan: from here on only the end mark ends the photo
            return data.find(b"\xff\xd9", place) < 0
        else:
            place += 2 + int.from_bytes(data[place + 2 : place + 4], "big")
    return True
