"""Boxes of several teachers: fused into one, with the student's classes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from edgesight.compression.fuse import fuse_boxes
from edgesight.compression.teachers import FusedDetector, class_table
from edgesight.models.detections import Detections
from edgesight.models.detector import OnnxDetector
from edgesight.models.errors import RecipeError


def seen(*rows: tuple[float, float, float, float, float, int]) -> Detections:
    table = np.array(rows, np.float32).reshape(-1, 6)
    return Detections(table[:, :4], table[:, 4], table[:, 5].astype(np.int64))


def test_boxes_of_two_are_fused() -> None:
    one = seen((0, 0, 10, 10, 0.9, 1), (50, 50, 60, 60, 0.8, 0))
    two = seen((1, 0, 11, 10, 0.3, 1), (50, 50, 60, 60, 0.4, 1))
    fused = fuse_boxes([one, two])
    assert fused.label.tolist() == [1, 0, 1]
    np.testing.assert_allclose(fused.score, [0.6, 0.4, 0.2], atol=1e-6)
    np.testing.assert_allclose(fused.xyxy[0], [0.25, 0, 10.25, 10], atol=1e-5)
    alone = fuse_boxes([one, two], np.array([1, 2]))
    assert alone.score.tolist() == pytest.approx([0.8, 0.6, 0.2]), "only one knows class 0"
    assert len(fuse_boxes([Detections.empty(), Detections.empty()])) == 0


def test_classes_are_brought_together_by_name() -> None:
    table = class_table("t.onnx", ("cat", "zebra", "motorbike"), ("motorcycle", "dog", "cat"))
    assert table.tolist() == [2, -1, 0]
    with pytest.raises(RecipeError, match=r"t\.onnx and the detector share no class") as caught:
        class_table("t.onnx", ("zebra",), ("cat",))
    assert "\n" not in str(caught.value)


def test_detectors_with_other_classes_as_one(tiny_onnx: Any) -> None:
    """The fake sees the same in every picture: fused with itself it sees the same again."""
    detector = OnnxDetector(tiny_onnx())
    picture = np.zeros((64, 64, 3), np.uint8)
    alone = detector(picture, 0.3)
    classes = detector.spec.classes
    twice = [(detector, np.arange(len(classes)))] * 2
    both = FusedDetector(twice, detector.spec)(picture, 0.3)
    assert sorted(both.label.tolist()) == sorted(alone.label.tolist())
    np.testing.assert_allclose(np.sort(both.score), np.sort(alone.score), atol=1e-5)
    assert len(alone)
    none = [(detector, np.full(len(classes), -1))]
    assert len(FusedDetector(none, detector.spec)(picture, 0.3)) == 0
