"""A stored baseline: the last good model's boxes on a data set, in one JSON file, without pickles.

Who reads one believes nothing of it that was not checked: it may come from anywhere.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from ..models.dataset import Dataset
from ..models.detections import Detections
from ..models.errors import InputError
from ..models.files import is_file, write_text
from ..models.machine import machine
from ..models.metrics import PER_PHOTO_MAX
from .gate_structure import FileFacts

KIND, VERSION = "edgesight baseline", 1
BYTES_MAX = 64 << 20
COLUMNS = 6  # label, score, left, top, right, bottom
KEYS = {"kind", "version", "model", "data", "score_min", "detections", "machine"}


@dataclass(frozen=True)
class Baseline:
    """What the gate keeps of the last good model.

    Attributes:
        model: The model's facts; its spec has the classes.
        data: Hash of the photos and boxes, from ``data_hash``.
        photos: How many.
        score_min: Weaker boxes were left out.
        detections: Per photo, labelled with the model's classes.
    """

    model: FileFacts
    data: str
    photos: int
    score_min: float
    detections: tuple[Detections, ...]


def data_hash(data: Dataset) -> str:
    """Returns a SHA-256 over the photos' files, their order, the true boxes and the classes."""
    digest = hashlib.sha256(json.dumps([len(data), data.classes]).encode())
    for number, photo in enumerate(data.photos):
        try:
            content = photo.path.read_bytes()
        except OSError as error:
            message = f"{photo.path}: expected a photo, found: {error.strerror}; check the path"
            raise InputError(message) from error
        digest.update(hashlib.sha256(content).digest())
        digest.update(json.dumps([photo.image_id, photo.size_wh]).encode())
        if data.truths is not None:
            truth = data.truths[number]
            for column in (truth.xyxy, truth.label, truth.area, truth.iscrowd):
                digest.update(hashlib.sha256(np.ascontiguousarray(column).tobytes()).digest())
    return digest.hexdigest()


def store_baseline(
    target: Path, model: FileFacts, data: Dataset, found: Sequence[Detections], score_min: float
) -> None:
    """Writes a baseline whole or not at all.

    Raises:
        OutputError: The file cannot be written.
    """
    content = {
        "kind": KIND,
        "version": VERSION,
        "model": model.to_json(),
        "data": {"sha256": data_hash(data), "photos": len(data)},
        "score_min": score_min,
        "machine": machine(),
        "detections": [_packed(one) for one in found],
    }
    write_text(target, json.dumps(content, indent=1) + "\n")


def load_baseline(path: Path) -> Baseline:
    """Reads and checks a baseline.

    Raises:
        InputError: It is missing, too large, or not one.
    """

    def refuse(what: str) -> NoReturn:
        message = f"{path}: expected a baseline of edgesight regress, found {what}; store it again"
        raise InputError(message)

    if not is_file(path):
        refuse("no such file")
    try:
        size = path.stat().st_size
        if size > BYTES_MAX:
            refuse(f"{size / 1e6:.0f} MB, where {BYTES_MAX / 1e6:.0f} MB are the most")
        content = json.loads(path.read_bytes())
    except OSError as error:
        refuse(error.strerror or str(error))
    except (ValueError, RecursionError):
        refuse("no JSON")
    if not isinstance(content, dict) or content.get("kind") != KIND:
        refuse("another kind of JSON")
    if content.get("version") != VERSION:
        refuse(f"version {content.get('version')!a:.20}, this edgesight knows {VERSION}")
    if content.keys() != KEYS:
        refuse(f"missing or unknown keys {sorted(content.keys() ^ KEYS)!a:.80}")
    try:
        model = FileFacts.from_json(content["model"])
    except InputError as error:
        refuse(str(error).split(";")[0])
    data, rows, floor = content["data"], content["detections"], content["score_min"]
    if not (isinstance(data, dict) and isinstance(data.get("sha256"), str)):
        refuse("no hash of its data")
    if not isinstance(rows, list) or len(rows) != data.get("photos") or not rows:
        refuse("boxes for another number of photos than it names")
    if type(floor) not in (int, float) or not math.isfinite(floor) or not 0 <= floor <= 1:
        refuse("a score floor that is none")
    found = []
    for number, row in enumerate(rows):
        try:
            found.append(_unpacked(row, len(model.spec.classes)))
        except (ValueError, TypeError, binascii.Error) as error:
            refuse(f"damaged boxes of photo {number} ({error})")
    return Baseline(model, data["sha256"], len(rows), float(floor), tuple(found))


def check_data(baseline: Baseline, data: Dataset, path: Path) -> None:
    """Refuses a baseline of other photos or boxes.

    Raises:
        InputError: It is of another data set.
    """
    if baseline.photos == len(data) and baseline.data == data_hash(data):
        return
    why = "other photos or boxes"
    if baseline.photos != len(data):
        why = f"{baseline.photos} photos where --data has {len(data)}"
    message = (
        f"{path}: expected a baseline of the data set {data.name}, found one of {why}; "
        "name the data (and --limit) that it was stored with, or store a new one"
    )
    raise InputError(message)


def model_beside(path: Path, baseline: Baseline) -> Path | None:
    """Returns the old model's file, if it lies beside the baseline unchanged; else None."""
    from ..models.files import sha256

    name = Path(baseline.model.name).name
    beside = path.parent / name
    if not name or name != baseline.model.name or not is_file(beside):
        return None
    same = beside.stat().st_size == baseline.model.bytes
    return beside if same and sha256(beside) == baseline.model.sha256 else None


def _packed(found: Detections) -> str:
    table = np.empty((len(found), COLUMNS), "<f4")
    table[:, 0], table[:, 1], table[:, 2:] = found.label, found.score, found.xyxy
    return base64.b64encode(table.tobytes()).decode()


def _unpacked(text: Any, classes: int) -> Detections:
    if not isinstance(text, str):
        message = "no text"
        raise ValueError(message)
    data = base64.b64decode(text, validate=True)
    count, rest = divmod(len(data), 4 * COLUMNS)
    if rest or count > PER_PHOTO_MAX:
        message = f"{len(data)} bytes"
        raise ValueError(message)
    table = np.frombuffer(data, "<f4").reshape(count, COLUMNS).astype(np.float32)
    if not np.isfinite(table).all():
        message = "numbers that are not finite"
        raise ValueError(message)
    label = table[:, 0].astype(np.int64)
    if (label != table[:, 0]).any() or (count and (label.min() < 0 or label.max() >= classes)):
        message = "labels outside its classes"
        raise ValueError(message)
    score, xyxy = table[:, 1], table[:, 2:]
    if count and (score.min() < 0 or score.max() > 1 or (xyxy[:, 2:] < xyxy[:, :2]).any()):
        message = "scores or corners that are none"
        raise ValueError(message)
    return Detections(xyxy, score, label)
