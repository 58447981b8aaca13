"""The columnar type: checked at birth, read-only after it."""

from __future__ import annotations

import numpy as np
import pytest
from edgesight.models.detections import Detections


@pytest.fixture
def three() -> Detections:
    xyxy = np.array([[0, 0, 10, 10], [1.26, 2, 3, 4], [5, 5, 9, 9]], np.float64)
    return Detections(xyxy, np.array([0.9, 0.5, 0.2]), np.array([0, 7, 1]))  # type: ignore[arg-type]


def test_columns_get_their_types_and_are_read_only(three: Detections) -> None:
    assert three.xyxy.dtype == np.float32
    assert three.score.dtype == np.float32
    assert three.label.dtype == np.int64
    for column in (three.xyxy, three.score, three.label):
        with pytest.raises(ValueError, match="read-only"):
            column[0] = 1


def test_the_callers_array_stays_free_and_apart() -> None:
    xyxy = np.zeros((1, 4), np.float32)
    found = Detections(xyxy, np.ones(1, np.float32), np.zeros(1, np.int64))
    xyxy[0, 0] = 5
    assert found.xyxy[0, 0] == 0


@pytest.mark.parametrize(
    ("xyxy", "score", "label", "complaint"),
    [
        ([[0, 0, 1]], [1], [0], r"expected xyxy \(n, 4\)"),
        ([[0, 0, 1, 1]], [1, 1], [0], r"got \(1, 4\), \(2,\)"),
        ([[0, 0, 1, 1]], [1], [0, 1], r"and \(2,\)"),
        ([[0, 0, np.nan, 1]], [1], [0], "expected finite"),
        ([[0, 0, 1, 1]], [np.inf], [0], "expected finite"),
        ([[0, 0, 1, 1]], [1], [-1], "labels >= 0, got -1"),
    ],
)
def test_wrong_columns_are_refused(
    xyxy: list[list[float]], score: list[float], label: list[int], complaint: str
) -> None:
    with pytest.raises(ValueError, match=complaint):
        Detections(np.array(xyxy), np.array(score), np.array(label))


def test_selection_by_mask_index_slice_and_score(three: Detections) -> None:
    assert three[three.label == 7].score.tolist() == [0.5]
    assert three[np.array([2, 0])].label.tolist() == [1, 0]
    assert len(three[:2]) == 2
    assert three.above(0.5).label.tolist() == [0, 7]
    assert [(label, round(score, 1)) for _, score, label in three] == [(0, 0.9), (7, 0.5), (1, 0.2)]


def test_empty_from_nothing_at_all() -> None:
    assert len(Detections.empty()) == 0
    assert Detections(np.zeros(0), np.zeros(0), np.zeros(0)).xyxy.shape == (0, 4)  # type: ignore[arg-type]


def test_dicts_are_ready_for_json(three: Detections) -> None:
    rows = three[:2].to_dicts(("person", "cat"))
    assert rows[0] == {"label": "person", "score": 0.9, "xyxy": [0.0, 0.0, 10.0, 10.0]}
    assert rows[1] == {"label": "7", "score": 0.5, "xyxy": [1.3, 2.0, 3.0, 4.0]}
