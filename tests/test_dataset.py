"""Datasets: what is read, and one clear line for everything that can be wrong with one."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from edgesight.models import dataset
from edgesight.models.coco import COCO_CLASSES
from edgesight.models.dataset import (
    ClassMap,
    Dataset,
    GroundTruth,
    Photo,
    load_image,
    map_classes,
    open_dataset,
)
from edgesight.models.detections import Detections
from edgesight.models.errors import DatasetError

Content = dict[str, Any]


def photo(path: Path, wh: tuple[int, int] = (20, 10)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(0).integers(0, 256, (wh[1], wh[0], 3), dtype=np.uint8)
    assert cv2.imwrite(str(path), noise)
    return path


def test_a_coco_folder(tiny_coco: Any) -> None:
    content = tiny_coco.content(photos=3)
    content["images"].reverse()
    content["annotations"][0] |= {"area": 100.5, "iscrowd": 1}
    content["annotations"] = content["annotations"][:4]
    data = open_dataset(tiny_coco(content))
    assert (data.name, len(data), data.box_count) == ("data", 3, 4)
    assert data.classes == ("person", "motorbike")
    assert [p.image_id for p in data.photos] == [1, 2, 3]
    assert data.photos[0].size_wh == (64, 48)
    assert data.photos[0].load().shape == (48, 64, 3)
    _, truths = data.labels()
    assert truths[0].xyxy.tolist() == [[8, 16, 40, 48], [32, 32, 64, 48]]
    assert truths[0].xyxy.dtype == np.float32
    assert truths[0].label.tolist() == [0, 1]
    assert truths[0].area.tolist() == [100.5, 512]
    assert truths[0].iscrowd.tolist() == [True, False]
    assert len(truths[2]) == 0


def test_the_json_itself_photos_beside_it_and_cocos_own_layout(
    tiny_coco: Any, tmp_path: Path
) -> None:
    folder = tiny_coco()
    assert len(open_dataset(folder / "instances.json")) == 2
    for name in ("1.png", "2.png"):
        (folder / "images" / name).rename(folder / name)
    assert len(open_dataset(folder)) == 2
    official = tmp_path / "coco" / "annotations" / "instances_val2017.json"
    official.parent.mkdir(parents=True)
    (folder / "instances.json").rename(official)
    for name in ("1.png", "2.png"):
        photo(tmp_path / "coco" / "val2017" / name, (64, 48))
    assert len(open_dataset(official)) == 2


def test_a_plain_folder(tmp_path: Path) -> None:
    for name in ("b.JPG", "a.png", "sub/c.jpeg", "d.bmp", "e.webp", ".hidden/f.png", ".g.png"):
        photo(tmp_path / name)
    (tmp_path / "notes.txt").write_text("no photo")
    data = open_dataset(tmp_path)
    names = [str(p.path.relative_to(tmp_path)) for p in data.photos]
    assert names == ["a.png", "b.JPG", "d.bmp", "e.webp", "sub/c.jpeg"]
    assert data.truths is None
    assert [p.image_id for p in data.photos] == [1, 2, 3, 4, 5]
    assert all(p.load().shape == (10, 20, 3) for p in data.photos)
    with pytest.raises(DatasetError, match=r"expected photos with boxes.*instances\.json"):
        data.labels()


def test_subset_and_limit_keep_photos_and_boxes_together(tiny_coco: Any) -> None:
    data = open_dataset(tiny_coco(tiny_coco.content(photos=10)))
    odd = data.subset(lambda p: p.image_id % 2 == 1)
    assert [p.image_id for p in odd.photos] == [1, 3, 5, 7, 9]
    some = odd.limit(2)
    assert [p.image_id for p in some.photos] == [1, 5]
    assert some.truths is not None
    assert odd.truths is not None
    assert some.truths[1] is odd.truths[2]
    assert data.limit(None) is data
    assert data.limit(99) is data
    with pytest.raises(DatasetError, match="at least one photo"):
        data.subset(lambda p: False)
    with pytest.raises(DatasetError, match="at least 1 photo, found 0"):
        data.limit(0)


def set_in(key: str, field: str, value: Any) -> Callable[[Content], Any]:
    """Returns what sets a field of the second item of a list."""
    return lambda content: content[key][1].update({field: value})


IMAGE, NOTE = "images", "annotations"
WRONG: list[tuple[Callable[[Content], Any], str]] = [
    (lambda c: c.pop("images"), "key 'images': expected a list, found NoneType"),
    (lambda c: c.update(annotations={}), "key 'annotations': expected a list, found dict"),
    (lambda c: c.update(categories=[]), "categories: expected at least one"),
    (lambda c: c.update(images=[], annotations=[]), "images: expected at least one"),
    (lambda c: c["images"].append(7), r"images.2.: expected an object, found int"),
    (lambda c: c["images"][1].pop("id"), "image id: expected a whole number, found None"),
    (set_in(IMAGE, "id", True), "image id: expected a whole number, found True"),
    (set_in(IMAGE, "id", 1), "image id: expected each id once, found 1 twice"),
    (set_in(NOTE, "id", 2), "annotation id: expected each id once, found 2 twice"),
    (set_in("categories", "id", 1), "category id: expected each id once, found 1 twice"),
    (set_in("categories", "name", ""), "category 4: name: expected a text, found ''"),
    (lambda c: c["images"][1].pop("width"), "image 2: width: expected pixels >= 1, found None"),
    (set_in(IMAGE, "height", 0), "image 2: height: expected pixels >= 1, found 0"),
    (set_in(IMAGE, "file_name", None), "image 2: file_name: expected the name"),
    (set_in(IMAGE, "file_name", "a\0.png"), "image 2: file_name: expected the name"),
    (set_in(IMAGE, "file_name", "../1.png"), "expected a path below the photo folder"),
    (set_in(IMAGE, "file_name", "x/../../1.png"), "expected a path below the photo folder"),
    (set_in(IMAGE, "file_name", "/etc/hostname"), "expected a path below the photo folder"),
    (set_in(IMAGE, "file_name", "..\\1.png"), "expected a path below the photo folder"),
    (set_in(IMAGE, "file_name", "C:\\1.png"), "expected a path below the photo folder"),
    (set_in(NOTE, "image_id", 99), "annotation 3: image_id: expected one of the 2 ids"),
    (set_in(NOTE, "image_id", [1]), "annotation 3: image_id: expected one of the 2 ids"),
    (set_in(NOTE, "category_id", 2), "annotation 3: category_id: expected one of .*, found 2"),
    (set_in(NOTE, "bbox", None), "annotation 3: bbox: expected .x, y, width, height."),
    (set_in(NOTE, "bbox", [1, 2, 3]), "annotation 3: bbox: expected .x, y, width, height."),
    (set_in(NOTE, "bbox", [1, 2, "3", 4]), "annotation 3: bbox: expected .* finite"),
    (set_in(NOTE, "bbox", [1, 2, math.nan, 4]), "annotation 3: bbox: expected .* finite"),
    (set_in(NOTE, "bbox", [1, 2, math.inf, 4]), "annotation 3: bbox: expected .* finite"),
    (set_in(NOTE, "bbox", [1, 2, 10**400, 4]), "annotation 3: bbox: expected .* finite"),
    (set_in(NOTE, "bbox", [20, 2, -9, 4]), "annotation 3: bbox: expected width and height >= 0"),
    (set_in(NOTE, "bbox", [40, 2, 30, 4]), "annotation 3: .*64x48 px of image 1.* 6.0 px outside"),
    (set_in(NOTE, "bbox", [-2, 2, 30, 4]), "annotation 3: bbox: .*2.0 px outside"),
    (set_in(NOTE, "bbox", [0, 2, 30, 49]), "annotation 3: bbox: .*3.0 px outside"),
    (set_in(NOTE, "area", -1), "annotation 3: area: expected square pixels >= 0"),
    (set_in(NOTE, "area", math.nan), "annotation 3: area: expected square pixels >= 0"),
    (set_in(NOTE, "iscrowd", 2), "annotation 3: iscrowd: expected 0 or 1, found 2"),
]


@pytest.mark.parametrize(("spoil", "complaint"), WRONG, ids=range(len(WRONG)))
def test_a_wrong_coco_file_is_told_in_one_line(
    tiny_coco: Any, spoil: Callable[[Content], Any], complaint: str
) -> None:
    content = tiny_coco.content()
    folder = tiny_coco(content)
    spoil(content)
    (folder / "instances.json").write_text(json.dumps(content))
    with pytest.raises(DatasetError, match=complaint) as caught:
        open_dataset(folder)
    assert str(caught.value).startswith(str(folder / "instances.json"))
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400 + 2 * len(str(folder))


@pytest.mark.parametrize("text", ["", "{", "\xff", "[" * 100_000, "hello"])
def test_what_is_not_json(tmp_path: Path, text: str) -> None:
    (tmp_path / "instances.json").write_text(text)
    with pytest.raises(DatasetError, match=r"expected JSON, found: .*; export or copy it again"):
        open_dataset(tmp_path)


def test_what_is_allowed_though_odd(tiny_coco: Any) -> None:
    """Rounding over the edge, boxes without extent, one name twice, photos without boxes."""
    content = tiny_coco.content()
    content["annotations"][0]["bbox"] = [-0.9, 0, 64, 48.9]
    content["annotations"][1]["bbox"] = [5, 5, 0, 0]
    content["annotations"] = content["annotations"][:2]
    content["categories"].append({"id": 9, "name": "person"})
    content["annotations"][1]["category_id"] = 9
    _, truths = open_dataset(tiny_coco(content)).labels()
    assert truths[0].label.tolist() == [0, 0]


def test_missing_places_and_photos(tiny_coco: Any, tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="found nothing there; check the path"):
        open_dataset(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(
        DatasetError, match=r"expected photos .jpg|expected photos .bmp.*found none"
    ):
        open_dataset(tmp_path / "empty")
    (tmp_path / "empty" / "labels.json").write_text("{}")
    with pytest.raises(DatasetError, match=r"if labels.json is a COCO file, name it itself"):
        open_dataset(tmp_path / "empty")
    folder = tiny_coco()
    (folder / "images" / "2.png").unlink()
    with pytest.raises(DatasetError, match=r"image 2: .*found no file '2.png'; copy the photos"):
        open_dataset(folder)
    content = json.loads((folder / "instances.json").read_text())
    content["images"][1]["file_name"] = "a" * 300
    (folder / "instances.json").write_text(json.dumps(content))
    with pytest.raises(DatasetError, match=r"image 2: .*found no file 'aaa"):
        open_dataset(folder)
    with pytest.raises(DatasetError, match="found nothing there"):
        open_dataset(tmp_path / ("a" * 300))


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "bmp"])
def test_a_broken_photo_is_an_error_and_not_half_a_picture(tmp_path: Path, suffix: str) -> None:
    path = photo(tmp_path / f"p.{suffix}", (200, 150))
    data = path.read_bytes()
    assert load_image(path).shape == (150, 200, 3)
    for share in (0.02, 0.5, 0.95):
        path.write_bytes(data[: int(len(data) * share)])
        with pytest.raises(
            DatasetError, match=r"found an? (truncated|unreadable) file of"
        ) as caught:
            load_image(path)
        assert str(path) in str(caught.value)
    path.write_bytes(b"")
    with pytest.raises(DatasetError, match="found an empty file of 0 bytes; copy it again"):
        load_image(path)
    path.write_text("<html>")
    with pytest.raises(DatasetError, match="found an unreadable file"):
        load_image(path)
    path.unlink()
    with pytest.raises(DatasetError, match="No such file"):
        load_image(path)
    path.mkdir()
    with pytest.raises(DatasetError, match="expected a photo, found"):
        load_image(path)


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp"])
def test_truncation_is_seen_without_opencvs_help(tmp_path: Path, suffix: str) -> None:
    """Older OpenCV decodes half a JPEG and fills the rest with grey."""
    data = photo(tmp_path / f"p.{suffix}", (200, 150)).read_bytes()
    assert not dataset._truncated(data)
    for length in (20, len(data) // 2, len(data) - 20):
        assert dataset._truncated(data[:length])


def test_a_thumbnails_end_is_not_the_photos(tmp_path: Path) -> None:
    """A JPEG inside the EXIF block has an end mark of its own; and trailing bytes are allowed."""
    whole = photo(tmp_path / "p.jpg", (200, 150)).read_bytes()
    block = b"Exif\0\0" + photo(tmp_path / "thumb.jpg", (8, 8)).read_bytes()
    nested = whole[:2] + b"\xff\xe1" + (len(block) + 2).to_bytes(2, "big") + block + whole[2:]
    path = tmp_path / "q.jpg"
    path.write_bytes(nested + b"trailer \xff\xda of a camera")
    assert load_image(path).shape == (150, 200, 3)
    path.write_bytes(nested[:-500])
    with pytest.raises(DatasetError, match="a truncated file"):
        load_image(path)


def test_grey_and_transparent_photos_become_bgr(tmp_path: Path) -> None:
    cv2.imwrite(str(tmp_path / "grey.png"), np.full((4, 6), 99, np.uint8))
    assert (load_image(tmp_path / "grey.png") == np.full((4, 6, 3), 99)).all()
    cv2.imwrite(str(tmp_path / "clear.png"), np.full((4, 6, 4), 50, np.uint8))
    assert load_image(tmp_path / "clear.png").shape == (4, 6, 3)


def rotated_jpeg(path: Path) -> Path:
    """Writes a 20x10 photo whose EXIF block says: turn me by a quarter."""
    data = photo(path, (20, 10)).read_bytes()
    exif = b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x06\0\0\0\0\0\0"
    path.write_bytes(data[:2] + b"\xff\xe1" + (len(exif) + 2).to_bytes(2, "big") + exif + data[2:])
    return path


def test_orientation_is_applied_unless_the_boxes_say_otherwise(tmp_path: Path) -> None:
    path = rotated_jpeg(tmp_path / "p.jpg")
    assert load_image(path).shape == (20, 10, 3)
    assert load_image(path, oriented=False).shape == (10, 20, 3)
    assert Photo(path, 1).load().shape == (20, 10, 3)
    assert Photo(path, 1, (10, 20)).load().shape == (20, 10, 3)
    assert Photo(path, 1, (20, 10)).load().shape == (10, 20, 3)
    with pytest.raises(DatasetError, match="expected 40x20 px as its annotation says, found 10x20"):
        Photo(path, 1, (40, 20)).load()


def some_detections(*labels: int) -> Detections:
    n = len(labels)
    return Detections(np.zeros((n, 4), np.float32), np.ones(n, np.float32), np.array(labels))


def test_classes_are_paired_by_name_in_cocos_spelling() -> None:
    shared = map_classes(COCO_CLASSES, ("tvmonitor", "Person", "unicorn", "motorbike"))
    assert shared.names == ("person", "motorcycle", "tv")
    assert shared.from_data.tolist() == [2, 0, -1, 1]
    assert shared.detections(some_detections(0, 1, 3, 62, 200)).label.tolist() == [0, 1, 2]
    assert shared.reference(some_detections(0, 2, 3)).label.tolist() == [2, 1]
    boxes = np.arange(16, dtype=np.float32).reshape(4, 4)
    truth = shared.truth(GroundTruth.of_boxes(boxes, np.arange(4)))
    assert truth.label.tolist() == [2, 0, 1]
    assert truth.xyxy.tolist() == boxes[[0, 1, 3]].tolist()
    note = shared.note(COCO_CLASSES, ("tvmonitor", "Person", "unicorn", "motorbike"))
    assert note is not None
    assert "3 shared classes" in note
    assert "1 of the data's" in note
    assert "77 of the model's" in note
    same: ClassMap = map_classes(("a", "b"), ("B", "a"))
    assert same.note(("a", "b"), ("B", "a")) is None


def test_no_class_in_common() -> None:
    with pytest.raises(DatasetError, match=r"person, bicycle, car and 77 more.*found screw, nut;"):
        map_classes(COCO_CLASSES, ("screw", "nut"))


def test_true_boxes_are_checked() -> None:
    with pytest.raises(ValueError, match="columns of one length"):
        GroundTruth(np.zeros((2, 4)), np.zeros(1), np.zeros(2), np.zeros(2))  # type: ignore[arg-type]


@pytest.mark.shared
def test_the_development_photos(shared: Path) -> None:
    data: Dataset = open_dataset(shared / "data" / "coco-val")
    assert (len(data), data.box_count) == (700, 6832)
    assert data.classes is not None
    assert len(map_classes(COCO_CLASSES, data.classes).names) == 80
    assert open_dataset(shared / "data" / "coco-train").box_count == 13267
