"""Verification: it must notice what is wrong, and say how sure it is."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from edgesight.compression.latency import latency
from edgesight.compression.measure import parity, score
from edgesight.compression.verify import Subject, verify
from edgesight.models.dataset import Dataset, open_dataset
from edgesight.models.detections import Detections
from edgesight.models.detector import OnnxDetector
from edgesight.models.errors import DatasetError
from edgesight.models.evaluate import Detector
from edgesight.models.preprocess import Image

build_tiny: Any = runpy.run_path(str(Path(__file__).with_name("app_kit.py")))["build_tiny"]


def boxes(*rows: tuple[float, ...], label: int = 0) -> Detections:
    xyxy = np.array([row[:4] for row in rows], np.float32)
    values = np.array([row[4] for row in rows], np.float32)
    return Detections(xyxy, values, np.full(len(rows), label))


@pytest.fixture
def photos(tmp_path: Path) -> Dataset:
    folder = tmp_path / "photos"
    folder.mkdir()
    for i in range(6):
        cv2.imwrite(str(folder / f"{i}.png"), np.full((40, 40, 3), 150 + 15 * i, np.uint8))
    return open_dataset(folder)


class Shifted:
    """A detector whose pre-processing is off: what verification is there to find."""

    def __init__(self, inner: Detector, pixels: float, scale: float = 1.0) -> None:
        self.inner, self.spec = inner, inner.spec
        self.pixels, self.scale = pixels, scale

    def __call__(self, image: Image, score_min: float = 0.0, limit: int = 100) -> Detections:
        found = self.inner(image, score_min, limit)
        return Detections(found.xyxy + self.pixels, found.score * self.scale, found.label)


def check(subject: Subject, data: Dataset, kind: str = "held out", **more: Any) -> dict[str, Any]:
    settings = {"resamples": 30, "latency_rounds": 2, "progress": False} | more
    return verify(subject, data, kind, **settings)


def test_the_same_file_on_both_sides(tmp_path: Path, photos: Dataset) -> None:
    path = build_tiny(tmp_path / "a.onnx")
    found = check(Subject(path, path, torch_side=OnnxDetector(path)), photos)
    assert found["passed"]
    assert found["agreement"]["value"] == 100
    assert found["after"]["kind"] == "f1"
    assert found["parity"]["torch and float file"]["boxes"] > 0
    assert found["parity"]["torch and float file"]["box_px"] == 0
    assert found["size"]["ratio"] == 1
    assert found["integer"]["share"] == 0
    assert not found["integer"]["quantized"]
    for row in found["cores"]:
        assert row["instructions"] is not None or row["reason"]
    assert [row["core"] for row in found["cores"] if row["target"]] == ["cortex-a76"]


@pytest.mark.parametrize(("pixels", "scale"), [(2.0, 1.0), (0.0, 0.97)])
def test_another_preprocessing_is_noticed(
    pixels: float, scale: float, tmp_path: Path, photos: Dataset
) -> None:
    path = build_tiny(tmp_path / "a.onnx")
    found = check(
        Subject(path, path, torch_side=Shifted(OnnxDetector(path), pixels, scale)), photos
    )
    assert not found["passed"]
    assert "do not see the same" in found["notes"][0]


def test_agreement_falls_when_boxes_move(tmp_path: Path, photos: Dataset) -> None:
    path = build_tiny(tmp_path / "a.onnx")
    moved = build_tiny(tmp_path / "b.onnx", shift=12)
    found = check(Subject(path, moved), photos)
    assert found["agreement"]["value"] < 50
    assert found["agreement"]["low"] <= found["agreement"]["value"] <= found["agreement"]["high"]


def test_ap_before_and_after_with_labels(tmp_path: Path, tiny_coco: Any) -> None:
    content = tiny_coco.content(photos=5, wh=(64, 64))
    for annotation in content["annotations"]:
        annotation["bbox"] = [0, 0, 32, 32]  # where the detector sees its first class
    data = open_dataset(tiny_coco(content))
    person = build_tiny(tmp_path / "a.onnx", classes=("person", "x"), always=True)
    worse = build_tiny(tmp_path / "b.onnx", classes=("person", "x"), shift=3.0, always=True)
    found = check(Subject(person, worse), data, "eval")
    before, after = found["before"], found["after"]
    assert before["kind"] == after["kind"] == "ap"
    assert before["value"] > after["value"] > 0
    assert after["loss"] == pytest.approx(before["value"] - after["value"])
    assert after["loss_low"] <= after["loss"] <= after["loss_high"]
    assert any("shared classes" in note for note in found["notes"])
    strangers = build_tiny(tmp_path / "c.onnx", classes=("x", "y"))
    with pytest.raises(DatasetError, match="categories that the model knows"):
        check(Subject(strangers, strangers), data, "eval")


def test_it_says_when_figures_flatter_and_when_it_is_slower(
    tmp_path: Path, photos: Dataset
) -> None:
    fast = build_tiny(tmp_path / "a.onnx")
    slow = build_tiny(tmp_path / "b.onnx", work=40)
    found = check(Subject(fast, slow), photos, "same photos", latency_rounds=9)
    assert found["latency"]["ratio"] > 2
    assert any("figures flatter" in note for note in found["notes"])
    assert any("slower on this machine" in note for note in found["notes"])
    back = latency(OnnxDetector(slow), OnnxDetector(fast), photos, 9)
    assert back is not None
    assert back["ratio"] < 0.5
    assert latency(OnnxDetector(slow), OnnxDetector(fast), photos, 0) is None


def test_parity_counts_lost_boxes_in_both_directions() -> None:
    one = boxes((0, 0, 10, 10, 0.9))
    two = boxes((0, 0, 10, 10, 0.9), (20, 20, 40, 40, 0.5))
    assert parity([one], [one]).same
    assert parity([one], [two]).lost == parity([two], [one]).lost == 1
    assert not parity([one], [two]).same
    assert not parity([one], [boxes((0, 0, 10, 10, 0.9), label=1)]).same
    close = boxes((0.5, 0, 10, 10, 0.9))
    assert parity([one], [close]).same
    assert parity([one], [close]).box_px == pytest.approx(0.5)


def test_parity_forgives_boxes_at_the_floor() -> None:
    base = (0, 0, 10, 10, 0.9)
    assert parity([boxes(base, (20, 20, 40, 40, 0.0501))], [boxes(base)]).same
    assert not parity([boxes(base, (20, 20, 40, 40, 0.07))], [boxes(base)]).same


def test_no_boxes_at_all_is_not_perfect(photos: Dataset) -> None:
    nothing = [Detections.empty()] * len(photos)
    found = score(list(nothing), list(nothing), ("a",), photos)
    assert found.value is None
    assert found.note is not None
