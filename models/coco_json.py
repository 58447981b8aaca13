"""COCO JSON files, read with nothing in them trusted."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path, PureWindowsPath
from typing import Any, NoReturn

import numpy as np

from .dataset import OUTSIDE_MAX, Dataset, GroundTruth, Photo
from .errors import DatasetError
from .files import is_file, is_folder


def open_coco(file: Path, name: str) -> Dataset:
    """Opens one COCO JSON file; ``open_dataset`` calls this.

    Raises:
        DatasetError: Something is missing or inconsistent; the message names the annotation.
    """
    try:
        content = json.loads(file.read_bytes())
    except OSError as error:
        message = f"{file}: expected a COCO JSON file, found: {error.strerror or error}"
        raise DatasetError(message) from error
    except (ValueError, RecursionError) as error:
        message = f"{file}: expected JSON, found: {str(error)[:80]}; export or copy it again"
        raise DatasetError(message) from error
    return _Coco(file, name, content).dataset()


class _Coco:
    """Reads the content of one COCO file, trusting nothing in it."""

    def __init__(self, file: Path, name: str, content: Any) -> None:
        self.file = file
        self.name = name
        if not isinstance(content, dict):
            self._fail("the file", "an object", type(content).__name__)
        self.lists: dict[str, list[Mapping[str, Any]]] = {}
        for key in ("images", "annotations", "categories"):
            items = content.get(key)
            if not isinstance(items, list):
                self._fail(f"key {key!r}", "a list", type(items).__name__)
            for position, item in enumerate(items):
                if not isinstance(item, dict):
                    self._fail(f"{key}[{position}]", "an object", type(item).__name__)
            self.lists[key] = items

    def dataset(self) -> Dataset:
        """Returns the dataset, or raises ``DatasetError`` at the first thing that is wrong."""
        category_to_label, classes = self._categories()
        photos = self._photos()
        rows = self._annotations({p.image_id: p for p in photos}, category_to_label)
        truths = []
        for photo in photos:
            boxes = rows.get(photo.image_id, [])
            xyxy = np.array([b[:4] for b in boxes], np.float64).reshape(-1, 4)
            label, area, crowd = np.array([b[4:] for b in boxes], np.float64).reshape(-1, 3).T
            truths.append(
                GroundTruth(
                    xyxy.astype(np.float32), label.astype(np.int64), area, crowd.astype(np.bool_)
                )
            )
        return Dataset(self.name, photos, classes, tuple(truths))

    def _categories(self) -> tuple[dict[int, int], tuple[str, ...]]:
        names: dict[str, int] = {}
        category_to_label: dict[int, int] = {}
        for item in self.lists["categories"]:
            number = self._id(item, "category", category_to_label)
            title = item.get("name")
            if not isinstance(title, str) or not title.strip():
                self._fail(f"category {number}: name", "a text", repr(title))
            category_to_label[number] = names.setdefault(title, len(names))
        if not names:
            self._fail("categories", "at least one", "none")
        return category_to_label, tuple(names)

    def _photos(self) -> tuple[Photo, ...]:
        photos: dict[int, Photo] = {}
        folders = self._folders()
        for item in self.lists["images"]:
            number = self._id(item, "image", photos)
            size = []
            for key in ("width", "height"):
                value: Any = item.get(key)
                if not _is_int(value) or value < 1:
                    self._fail(f"image {number}: {key}", "pixels >= 1", repr(value))
                size.append(value)
            path = self._photo_path(number, item.get("file_name"), folders)
            photos[number] = Photo(path, number, (size[0], size[1]))
        if not photos:
            self._fail("images", "at least one", "none")
        return tuple(photos[number] for number in sorted(photos))

    def _folders(self) -> list[Path]:
        """Returns where the photos may lie; the last is COCO's own layout."""
        parent = self.file.parent
        official = self.file.stem.removeprefix("instances_")
        folders = [parent / "images", parent, parent.parent / "images", parent.parent / official]
        return [folder for folder in folders if is_folder(folder)]

    def _photo_path(self, number: int, name: Any, folders: Sequence[Path]) -> Path:
        what = f"image {number}: file_name"
        if not isinstance(name, str) or not name or "\0" in name:
            self._fail(what, "the name of a photo", repr(name)[:80])
        pure = PureWindowsPath(name)  # knows both kinds of slash, and drives
        if pure.anchor or name.startswith("/") or ".." in pure.parts:
            self._fail(what, "a path below the photo folder", repr(name)[:80])
        for folder in folders:
            if is_file(folder / name):
                return folder / name
        places = " or ".join(str(folder) for folder in folders[:2])
        self._fail(what, f"a photo in {places}", f"no file {name[:80]!r}", "copy the photos too")

    def _annotations(
        self, photos: Mapping[int, Photo], category_to_label: Mapping[int, int]
    ) -> dict[int, list[tuple[float, ...]]]:
        rows: dict[int, list[tuple[float, ...]]] = {}
        seen: dict[int, bool] = {}
        for item in self.lists["annotations"]:
            number = self._id(item, "annotation", seen)
            seen[number] = True
            what = f"annotation {number}"
            for key, known in (("image_id", photos), ("category_id", category_to_label)):
                if not _is_int(item.get(key)) or item[key] not in known:
                    expected = f"one of the {len(known)} ids in the file"
                    self._fail(f"{what}: {key}", expected, repr(item.get(key))[:80])
            photo = photos[item["image_id"]]
            x, y, width, height = self._box(what, item.get("bbox"), photo)
            area = item.get("area", width * height)
            if not _is_finite(area) or area < 0:
                self._fail(f"{what}: area", "square pixels >= 0", repr(area)[:80])
            crowd = item.get("iscrowd", 0)
            if crowd not in (0, 1):
                self._fail(f"{what}: iscrowd", "0 or 1", repr(crowd)[:80])
            label = category_to_label[item["category_id"]]
            rows.setdefault(photo.image_id, []).append(
                (x, y, x + width, y + height, label, area, crowd)
            )
        return rows

    def _box(self, what: str, box: Any, photo: Photo) -> tuple[float, float, float, float]:
        if not isinstance(box, list) or len(box) != 4 or not all(map(_is_finite, box)):
            self._fail(f"{what}: bbox", "[x, y, width, height] in finite pixels", repr(box)[:80])
        x, y, width, height = map(float, box)
        if width < 0 or height < 0:
            self._fail(f"{what}: bbox", "width and height >= 0", repr(box)[:80])
        assert photo.size_wh is not None
        photo_wh = photo.size_wh
        over = max(-x, -y, x + width - photo_wh[0], y + height - photo_wh[1])
        if over > OUTSIDE_MAX:
            self._fail(
                f"{what}: bbox",
                f"a box within the {photo_wh[0]}x{photo_wh[1]} px of image {photo.image_id}",
                f"{box} (x, y, width, height), {over:.1f} px outside",
                "cut it to the photo, or scale boxes and photos alike",
            )
        return x, y, width, height

    def _id(self, item: Mapping[str, Any], kind: str, seen: Mapping[int, object]) -> int:
        number: Any = item.get("id")
        if not _is_int(number):
            self._fail(f"{kind} id", "a whole number", repr(number)[:80])
        if number in seen:
            self._fail(f"{kind} id", "each id once", f"{number} twice")
        return int(number)

    def _fail(self, what: str, expected: str, found: str, todo: str = "") -> NoReturn:
        todo = todo or "correct the file, or export it again as COCO instances"
        message = f"{self.file}: {what}: expected {expected}, found {found}; {todo}"
        raise DatasetError(message)


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_finite(value: Any) -> bool:
    try:
        return isinstance(value, (int, float)) and math.isfinite(value)
    except OverflowError:  # a whole number with hundreds of digits
        return False
