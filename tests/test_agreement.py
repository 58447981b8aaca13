"""Matching of frames, running agreement and running AP50."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pytest
from edgesight.models.agreement import (
    Estimate,
    RunningAgreement,
    RunningAp50,
    assign,
    match,
    ratio_interval,
)
from edgesight.models.dataset import GroundTruth, map_classes, open_dataset
from edgesight.models.detections import Detections
from edgesight.models.detector import OnnxDetector
from edgesight.models.evaluate import run_detector
from edgesight.models.metrics import evaluate, match_photos

Row = tuple[tuple[float, float, float, float], float, int]


def detections(*rows: Row) -> Detections:
    xyxy = np.array([row[0] for row in rows], np.float32)
    score, label = [row[1] for row in rows], [row[2] for row in rows]
    return Detections(xyxy, np.array(score, np.float32), np.array(label, np.int64))


A, B, FAR = (0.0, 0.0, 10.0, 10.0), (20.0, 0.0, 30.0, 10.0), (90.0, 90.0, 99.0, 99.0)
NEAR_A = (0.0, 0.0, 10.0, 8.0)  # IoU 0.8 with A
HALF_A = (0.0, 0.0, 10.0, 5.0)  # IoU 0.5


@pytest.mark.parametrize(
    ("found", "reference", "counts"),
    [
        ([], [], (0, 0, 0)),
        ([], [(A, 1, 0)], (0, 0, 1)),
        ([(A, 1, 0)], [], (0, 1, 0)),
        ([(A, 1, 0), (B, 1, 1)], [(B, 1, 1), (A, 1, 0)], (2, 0, 0)),
        ([(A, 1, 1)], [(A, 1, 0)], (0, 1, 1)),  # another class
        ([(A, 0.9, 0), (NEAR_A, 0.8, 0)], [(A, 1, 0)], (1, 1, 0)),  # twice
        ([(HALF_A, 1, 0)], [(A, 1, 0)], (1, 0, 0)),  # just so
        ([((0, 0, 10, 4.9), 1, 0)], [(A, 1, 0)], (0, 1, 1)),
        # The better scored one takes what it overlaps most and leaves the other its own.
        ([(HALF_A, 0.5, 0), (A, 0.9, 0)], [(A, 1, 0), (HALF_A, 1, 0)], (2, 0, 0)),
        ([(FAR, 1, 0)], [(A, 1, 0), (B, 1, 0)], (0, 1, 2)),
    ],
)
def test_match_by_hand(found: list[Row], reference: list[Row], counts: tuple[int, ...]) -> None:
    assert match(detections(*found), detections(*reference)) == counts


def test_the_better_score_goes_first_whatever_the_order() -> None:
    found = detections((NEAR_A, 0.4, 0), (A, 0.9, 0))
    hit, counted = assign(found, detections((A, 1, 0)))
    assert hit.tolist() == [False, True]
    assert counted.tolist() == [True, True]


def test_a_higher_iou_asks_for_more() -> None:
    assert match(detections((NEAR_A, 1, 0)), detections((A, 1, 0)), iou=0.85) == (0, 1, 1)


def test_crowds_count_for_nothing() -> None:
    truth = GroundTruth(
        np.array([A, (50, 0, 100, 50)], np.float32),
        np.array([0, 0]),
        np.array([100.0, 2500.0]),
        np.array([False, True]),
    )
    inside: list[Row] = [((60, 10, 70, 20), 0.9, 0), ((80, 10, 90, 20), 0.8, 0)]
    assert match(detections(*inside), truth) == (0, 0, 1)
    assert match(detections((A, 0.5, 0), *inside, (FAR, 0.3, 0)), truth) == (1, 1, 0)
    assert match(detections(((60, 10, 70, 20), 0.9, 1)), truth) == (0, 1, 1)  # another class


def test_running_agreement_sums_frames() -> None:
    running = RunningAgreement()
    assert running.result() is None
    assert running.add(Detections.empty(), Detections.empty()) == (0, 0, 0)
    assert running.result() is None  # an empty frame says nothing
    assert running.add(detections((A, 1, 0), (FAR, 1, 0)), detections((A, 1, 0))) == (1, 1, 0)
    running.add_counts(2, 0, 3)
    result = running.result()
    assert result is not None
    assert (result.tp, result.fp, result.fn, result.frames) == (3, 1, 3, 3)
    assert result.precision.value == pytest.approx(75)
    assert result.recall.value == pytest.approx(50)
    assert result.f1.value == pytest.approx(60)
    for estimate in (result.precision, result.recall, result.f1):
        assert 0 <= estimate.low < estimate.value < estimate.high <= 100
    running.clear()
    assert len(running) == 0
    assert running.result() is None


def test_a_rate_without_boxes_is_unknown() -> None:
    running = RunningAgreement()
    running.add_counts(0, 0, 4)
    result = running.result()
    assert result is not None
    assert result.precision == Estimate(0, 0, 100)
    assert result.recall.value == 0


def test_old_frames_are_forgotten() -> None:
    running = RunningAgreement(window=10)
    for _ in range(50):
        running.add_counts(0, 1, 1)
    for _ in range(10):
        running.add_counts(1, 0, 0)
    result = running.result()
    assert result is not None
    assert (result.frames, result.f1.value) == (10, 100)


def test_perfect_agreement_of_few_frames_is_no_proof() -> None:
    few, some, many = (ratio_interval(np.full(n, 5.0), np.full(n, 5.0)) for n in (3, 20, 300))
    assert few.value == some.high == many.high == 100
    assert few.low < 60
    assert 75 < some.low < 87  # 20 frames, and not 100 boxes
    assert 97 < many.low < 100


def covered(random: np.random.Generator, memory: float, frames: int) -> float:
    """Returns how many of 200 streams' intervals hold the true rate."""

    def stream(n: int) -> tuple[np.ndarray, np.ndarray]:
        mood = np.zeros(n)
        mood[0] = random.normal()
        for i in range(1, n):
            mood[i] = memory * mood[i - 1] + np.sqrt(1 - memory**2) * random.normal()
        whole = random.poisson(4, n)
        return random.binomial(whole, 1 / (1 + np.exp(-1.5 - mood))).astype(float), whole * 1.0

    part, whole = stream(40_000)
    true = 100 * part.sum() / whole.sum()
    intervals = [ratio_interval(*stream(frames)) for _ in range(200)]
    return float(np.mean([i.low <= true <= i.high for i in intervals]))


@pytest.mark.parametrize("frames", [10, 100])
def test_the_interval_covers_as_often_as_it_says(frames: int) -> None:
    assert 0.92 <= covered(np.random.default_rng(0), 0.0, frames) <= 1


def test_the_interval_allows_for_frames_that_resemble_each_other() -> None:
    assert covered(np.random.default_rng(0), 0.7, 200) >= 0.87


def labelled_stream(frames: int) -> tuple[list[Detections], list[GroundTruth]]:
    random = np.random.default_rng(0)
    found, truths = [], []
    for _ in range(frames):
        n = int(random.integers(0, 8))
        corner = random.uniform(0, 300, (n, 2))
        boxes = np.hstack([corner, corner + random.uniform(20, 90, (n, 2))]).astype(np.float32)
        label = random.integers(0, 3, n)
        truths.append(GroundTruth(boxes, label, np.ones(n), random.uniform(size=n) < 0.1))
        seen = random.uniform(size=n) < 0.8
        near = boxes[seen] + random.normal(0, 4, (int(seen.sum()), 4))
        stray = random.uniform(0, 300, (3, 2))
        stray = np.hstack([stray, stray + 50])
        score = np.concatenate([random.beta(4, 2, len(near)), random.beta(2, 4, 3)])
        labels = np.concatenate([label[seen], random.integers(0, 3, 3)])
        found.append(Detections(np.vstack([near, stray]).astype(np.float32), score, labels))
    return found, truths


def test_running_ap50_is_cocos() -> None:
    found, truths = labelled_stream(80)
    running = RunningAp50(score_min=0.4)
    assert running.result() is None
    for one, truth in zip(found, truths, strict=True):
        running.add(one, truth)
    result = running.result()
    assert result is not None
    table = match_photos(found, truths, ("a", "b", "c"))
    assert result.ap50.value == pytest.approx(evaluate(table).ap50, abs=1e-6)
    assert 0 < result.ap50.low < result.ap50.value < result.ap50.high < 100
    assert (result.frames, result.classes) == (80, 3)
    counts = np.array([match(f.above(0.4), t) for f, t in zip(found, truths, strict=True)]).sum(
        axis=0
    )
    shown = result.agreement
    assert [shown.tp, shown.fp, shown.fn] == counts.tolist()


def test_running_ap50_narrows_with_frames() -> None:
    found, truths = labelled_stream(600)
    widths = []
    running = RunningAp50()
    for i, (one, truth) in enumerate(zip(found, truths, strict=True), 1):
        running.add(one, truth)
        if i in (40, 600):
            result = running.result()
            assert result is not None
            widths.append(result.ap50.high - result.ap50.low)
    table = match_photos(found, truths, ("a", "b", "c"))
    assert result is not None
    assert result.ap50.value == pytest.approx(evaluate(table).ap50, abs=0.5)
    assert widths[1] < 0.5 * widths[0]


def test_a_class_never_found_counts_as_zero() -> None:
    running = RunningAp50()
    truth = GroundTruth.of_boxes(np.array([A, B], np.float32), np.array([0, 1]))
    running.add(detections((A, 0.9, 0), (FAR, 0.8, 7)), truth)
    result = running.result()
    assert result is not None
    assert result.ap50.value == pytest.approx(50)
    assert result.classes == 2


def test_cheap_enough_for_a_live_screen() -> None:
    """A crowded frame with all 80 classes: a few ms at most, however long the stream."""
    random = np.random.default_rng(0)
    corner = random.uniform(0, 400, (100, 2))
    boxes = np.hstack([corner, corner + 50]).astype(np.float32)
    label = np.arange(100) % 80
    frame = Detections(boxes, random.uniform(0, 1, 100).astype(np.float32), label)
    truth = GroundTruth.of_boxes(boxes, label)
    ap, agreement = RunningAp50(), RunningAgreement()
    for _ in range(50):
        ap.add(frame, truth)
        agreement.add(frame, frame)
    start = time.process_time()
    for _ in range(20):
        ap.add(frame, truth)
        agreement.add(frame, frame)
    per_frame = (time.process_time() - start) / 20
    for _ in range(2000):
        agreement.add_counts(3, 1, 1)
    start = time.process_time()
    for _ in range(5):
        ap.result()
        agreement.result()
    per_result = (time.process_time() - start) / 5
    assert per_frame < 0.05
    assert per_result < 0.3
    assert len(agreement) == 1000


@pytest.mark.shared
def test_running_ap50_on_real_detections(shared: Path) -> None:
    data = open_dataset(shared / "data" / "coco-val").limit(60)
    detector = OnnxDetector(shared / "weights" / "yolox_nano_416.onnx")
    found, _ = run_detector(detector, data, progress=False, score_min=0.05)
    classes, truths = data.labels()
    pairs = map_classes(detector.spec.classes, classes)
    mapped = [pairs.detections(one) for one in found]
    true = [pairs.truth(one) for one in truths]
    running = RunningAp50()
    for one, truth in zip(mapped, true, strict=True):
        running.add(one, truth)
    result = running.result()
    assert result is not None
    exact = evaluate(match_photos(mapped, true, pairs.names)).ap50
    assert result.ap50.value == pytest.approx(exact, abs=0.05)
