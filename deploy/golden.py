"""Golden photos: a few pictures with boxes that travel with a model, to judge it on its board."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..models.dataset import COCO_FILE, Dataset, GroundTruth, Photo, open_dataset
from ..models.detections import FloatArray
from ..models.detector import OnnxDetector
from ..models.errors import DatasetError
from ..models.files import read_json
from . import manifest
from .manifest import FOLDERS, INSTANCES, PHOTOS

LIMIT = 64
SCORE_MIN = 0.35
"""Of a model's boxes that stand in for labels; it is what is drawn on a live picture."""
BYTES_MAX = 512 << 20
"""Of all photos together."""
NOTICE_NAMES = ("attribution", "copying", "credits", "licence", "license", "notice", "readme")

RIGHTS_KEYS = ("coco_url", "flickr_url", "license")
"""What COCO files say of a photo's origin."""


@dataclass(frozen=True)
class GoldenSet:
    """Golden photos, ready to be written.

    Attributes:
        about: For the manifest.
        files: Path in the bundle -> content.
    """

    about: manifest.Golden
    files: dict[str, bytes]


def collect(data: Path, limit: int, detector: OnnxDetector, source: str) -> GoldenSet:
    """Chooses photos, spread evenly, and brings their boxes.

    Photos keep their bytes and get the names that their place in the choice gives them; their old
    names stay in ``instances.json``. Without labels a detector's boxes stand in: their last digits
    may differ between processors, and so may the bundle's bytes.

    Args:
        data: Folder or COCO JSON file, as ``open_dataset`` takes it.
        limit: Photos at most.
        detector: Draws the boxes where there are no labels.
        source: What it is, ``reference`` or ``model``.

    Raises:
        DatasetError: There are no usable photos, or too many bytes of them.
    """
    whole = open_dataset(data)
    most = FOLDERS[PHOTOS].count_max
    if not 1 <= limit <= most:
        message = f"--golden-limit: expected 1 to {most} photos, found {limit}"
        raise DatasetError(message)
    chosen = whole.limit(limit)
    labelled = chosen.truths is not None
    files = _photos(chosen)
    names = [path.rpartition("/")[2] for path in files]
    rows = list(_labels(chosen) if labelled else _detected(chosen, detector))
    classes = chosen.classes or detector.spec.classes
    title = f"{len(chosen)} of {len(whole)} photos of {_printable(whole.name)}"
    source = "labels" if labelled else source
    content = _coco(chosen, names, rows, classes) | {"info": {"source": source}}
    if labelled:
        licences, rights = _rights(data)
        content |= {"licenses": licences} if isinstance(licences, list) else {}
        for image in content["images"]:
            image |= rights[image["id"]]
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False)
    files[INSTANCES] = text.encode() + b"\n"
    files |= _notices(data if data.is_dir() else data.parent)
    boxes = len(content["annotations"])
    return GoldenSet(manifest.Golden(len(chosen), boxes, source, title), files)


def _photos(chosen: Dataset) -> dict[str, bytes]:
    """Returns path in the bundle -> bytes; each was read as a picture first."""
    files: dict[str, bytes] = {}
    total, most = 0, FOLDERS[PHOTOS].bytes_max
    for number, photo in enumerate(chosen.photos, 1):
        photo.load()  # a photo that the board cannot read is of no use
        data = photo.path.read_bytes()
        total += len(data)
        if len(data) > most or total > BYTES_MAX:
            message = (
                f"{photo.path}: expected photos of at most {most >> 20} MB each and "
                f"{BYTES_MAX >> 20} MB in all, found more; make them smaller or fewer"
            )
            raise DatasetError(message)
        files[f"{PHOTOS}/{number:06}{photo.path.suffix.lower()}"] = data
    return files


def _labels(chosen: Dataset) -> Iterator[tuple[tuple[int, int], GroundTruth, list[float]]]:
    for photo, truth in zip(chosen.photos, chosen.labels()[1], strict=True):
        assert photo.size_wh is not None  # a labelled photo has one
        yield photo.size_wh, truth, []


def _detected(
    chosen: Dataset, detector: OnnxDetector
) -> Iterator[tuple[tuple[int, int], GroundTruth, list[float]]]:
    for photo in chosen.photos:
        image = photo.load()
        height, width = image.shape[:2]
        found = detector(image, SCORE_MIN)
        most = np.array([width, height, width, height], np.float32)
        boxes = np.clip(found.xyxy.round(1), 0, most)
        scores = [round(float(score), 3) for score in found.score]
        yield (width, height), GroundTruth.of_boxes(boxes, found.label), scores


def _coco(
    chosen: Dataset,
    names: Sequence[str],
    rows: Sequence[tuple[tuple[int, int], GroundTruth, list[float]]],
    classes: Sequence[str],
) -> dict[str, Any]:
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for photo, name, ((width, height), truth, scores) in zip(
        chosen.photos, names, rows, strict=True
    ):
        images.append(_image(photo, name, width, height))
        for i in range(len(truth)):
            row = {
                "id": len(annotations) + 1,
                "image_id": photo.image_id,
                "category_id": int(truth.label[i]) + 1,
                "bbox": _box(truth.xyxy[i]),
                "area": float(truth.area[i]),
                "iscrowd": int(truth.iscrowd[i]),
            }
            annotations.append(row | ({"score": scores[i]} if scores else {}))
    categories = [{"id": number, "name": name} for number, name in enumerate(classes, 1)]
    return {"images": images, "annotations": annotations, "categories": categories}


def _image(photo: Photo, name: str, width: int, height: int) -> dict[str, Any]:
    old = _printable(photo.path.name)
    return {
        "id": photo.image_id,
        "file_name": name,
        "original_name": old,
        "width": width,
        "height": height,
    }


def _box(xyxy: FloatArray) -> list[float]:
    """Returns x, y, width, height from which the reader computes the very same corners."""
    left, top, right, bottom = map(float, xyxy)
    return [left, top, right - left, bottom - top]


def _rights(data: Path) -> tuple[Any, dict[int, dict[str, Any]]]:
    """Returns what a COCO file says about its photos' licences: the list, and what each photo has.

    The file was checked; these keys, which nothing else reads, were not.
    """
    content = read_json(data / COCO_FILE if data.is_dir() else data)
    rows = {
        image["id"]: {
            key: image[key] for key in RIGHTS_KEYS if isinstance(image.get(key), (str, int))
        }
        for image in content["images"]
    }
    return content.get("licenses"), rows


def _notices(folder: Path) -> dict[str, bytes]:
    """Returns the licence and attribution texts that lie beside the photos' list."""
    rule = FOLDERS["golden/notices"]
    found: dict[str, bytes] = {}
    for path in sorted(folder.iterdir()):
        stem, suffix = path.stem.lower(), path.suffix.lower()
        if suffix in ("", *rule.suffixes) and stem in NOTICE_NAMES and path.is_file():
            if path.stat().st_size > rule.bytes_max or len(found) == rule.count_max:
                message = (
                    f"{path}: expected {rule.count_max} licence files of at most "
                    f"{rule.bytes_max >> 20} MB, found more; shorten them"
                )
                raise DatasetError(message)
            # The number keeps LICENSE and LICENSE.txt apart.
            name = f"{stem}-{len(found) + 1}{suffix or '.txt'}"
            found[f"golden/notices/{name}"] = path.read_bytes()
    return found


def _printable(text: str) -> str:
    return "".join(c if c.isprintable() else "?" for c in text)[:120] or "?"
