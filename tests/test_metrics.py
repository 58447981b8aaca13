"""AP equals pycocotools', and the fast bootstrap equals evaluating the resample itself."""

from __future__ import annotations

import contextlib
import io
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from edgesight.models import metrics
from edgesight.models.dataset import GroundTruth, map_classes, open_dataset
from edgesight.models.detections import Detections
from edgesight.models.detector import OnnxDetector
from edgesight.models.evaluate import evaluate_detections, run_detector
from edgesight.models.metrics import (
    bootstrap,
    draw,
    evaluate,
    match_photos,
    paired_bootstrap,
    resampled_ap,
)

CLASSES = ("a", "b", "c", "never")


def random_scene(
    photos: int, seed: int, noise: float = 0.15
) -> tuple[list[Detections], list[GroundTruth]]:
    """Returns true boxes of all sizes, some of them crowds, and detections near some of them.

    Scores are rounded, so that many are equal; areas are not the boxes'.
    """
    random = np.random.default_rng(seed)
    found, truths = [], []
    for _ in range(photos):
        n = int(random.integers(0, 12))
        corner, side = random.uniform(0, 300, (n, 2)), np.exp(random.uniform(1, 5.5, (n, 2)))
        boxes = np.hstack([corner, corner + side])
        label = random.integers(0, 3, n)
        # Many lie on top of another: one of them may count and the other not.
        pair = np.flatnonzero(random.uniform(size=n) < 0.4)
        boxes[pair], label[pair] = boxes[pair - 1] + random.normal(0, 1), label[pair - 1]
        crowd = random.uniform(size=n) < 0.15
        side = boxes[:, 2:] - boxes[:, :2]
        area = side.prod(axis=1) * random.uniform(0.4, 1, n)
        truths.append(GroundTruth(boxes.astype(np.float32), label, area, crowd))
        copies = np.repeat(np.arange(n), random.integers(0, 4, n))
        spread = np.tile(side[copies], 2) * random.normal(0, noise, (len(copies), 4))
        extra = int(random.integers(0, 30))
        stray = random.uniform(0, 300, (extra, 2))
        stray = np.hstack([stray, stray + np.exp(random.uniform(1, 5.5, (extra, 2)))])
        xyxy = np.vstack([boxes[copies] + spread, stray])
        xyxy[:, 2:] = np.maximum(xyxy[:, :2] + 1, xyxy[:, 2:])
        labels = np.concatenate([label[copies], random.integers(0, 3, extra)])
        wrong = random.uniform(size=len(labels)) < 0.1
        labels[wrong] = random.integers(0, 3, int(wrong.sum()))
        score = np.round(random.uniform(0, 1, len(labels)), 2)
        found.append(Detections(xyxy.astype(np.float32), score.astype(np.float32), labels))
    return found, truths


def pycocotools_stats(
    found: list[Detections], truths: list[GroundTruth], classes: int
) -> tuple[list[float], Any]:
    """Returns pycocotools' twelve figures (0..1) and its precision table."""
    coco = pytest.importorskip("pycocotools.coco")
    cocoeval = pytest.importorskip("pycocotools.cocoeval")
    reference = coco.COCO()
    notes: list[dict[str, Any]] = []
    results: list[dict[str, Any]] = []

    def xywh(box: Any) -> list[float]:
        x1, y1, x2, y2 = map(float, box)
        return [x1, y1, x2 - x1, y2 - y1]

    for image, (some, truth) in enumerate(zip(found, truths, strict=True), 1):
        for box, label, area, crowd in zip(
            truth.xyxy, truth.label, truth.area, truth.iscrowd, strict=True
        ):
            note = {"id": len(notes) + 1, "image_id": image, "category_id": int(label) + 1}
            notes.append(note | {"bbox": xywh(box), "area": float(area), "iscrowd": int(crowd)})
        for box, score, label in some:
            result = {"image_id": image, "category_id": label + 1}
            results.append(result | {"bbox": xywh(box), "score": score})
    reference.dataset = {
        "info": {},
        "images": [{"id": i} for i in range(1, len(found) + 1)],
        "categories": [{"id": i, "name": str(i)} for i in range(1, classes + 1)],
        "annotations": notes,
    }
    with contextlib.redirect_stdout(io.StringIO()):
        reference.createIndex()
        judge = cocoeval.COCOeval(reference, reference.loadRes(results), "bbox")
        judge.evaluate()
        judge.accumulate()
        judge.summarize()
    return list(judge.stats), judge.eval["precision"]


def check_same_as_pycocotools(
    found: list[Detections], truths: list[GroundTruth], classes: tuple[str, ...]
) -> None:
    stats, precision = pycocotools_stats(found, truths, len(classes))
    ours = evaluate(match_photos(found, truths, classes))
    mine = [ours.ap, ours.ap50, ours.ap75, ours.ap_small, ours.ap_medium, ours.ap_large]
    np.testing.assert_allclose(np.array(mine) / 100, stats[:6], rtol=0, atol=1e-6)
    for c, name in enumerate(classes):
        table = precision[:, :, c, 0, 2]
        theirs = table[table > -1].mean() if (table > -1).any() else np.nan
        np.testing.assert_allclose(ours.per_class[name] / 100, theirs, rtol=0, atol=1e-6)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("noise", [0.02, 0.15])
def test_equal_to_pycocotools_with_crowds_areas_and_ties(seed: int, noise: float) -> None:
    found, truths = random_scene(40, seed, noise)
    check_same_as_pycocotools(found, truths, CLASSES)


def test_equal_to_pycocotools_beyond_a_hundred_boxes_per_photo() -> None:
    found, truths = random_scene(4, 9)
    many = []
    for i, some in enumerate(found):
        stray = random_scene(20, 50 + i)[0]
        many.append(
            Detections(
                np.concatenate([some.xyxy, *(s.xyxy for s in stray)]),
                np.concatenate([some.score, *(s.score for s in stray)]),
                np.concatenate([some.label, *(s.label * 0 for s in stray)]),
            )
        )
    assert min(map(len, many)) > 150
    check_same_as_pycocotools(many, truths, CLASSES)


@pytest.mark.shared
def test_equal_to_pycocotools_on_real_detections(shared: Path) -> None:
    data = open_dataset(shared / "data" / "coco-val").limit(150)
    detector = OnnxDetector(shared / "weights" / "yolox_nano_416.onnx")
    found, _ = run_detector(detector, data, progress=False)
    classes, truths = data.labels()
    pairs = map_classes(detector.spec.classes, classes)
    check_same_as_pycocotools(
        [pairs.detections(one) for one in found], [pairs.truth(t) for t in truths], pairs.names
    )
    result = evaluate_detections(found, detector.spec.classes, data).result
    assert (result.photos, result.boxes) == (150, sum(map(len, truths)))


def box(*xyxy: float) -> list[float]:
    return list(xyxy)


def detections(*rows: tuple[list[float], float, int]) -> Detections:
    xyxy, score, label = zip(*rows, strict=True) if rows else ((), (), ())
    return Detections(np.array(xyxy), np.array(score), np.array(label))


def test_ap_by_hand() -> None:
    """Two true boxes; found with 0.9, missed once with 0.8, found with 0.7 at IoU 0.8."""
    truth = GroundTruth.of_boxes(
        np.array([[0, 0, 50, 50], [100, 100, 150, 150]], np.float32), np.zeros(2, np.int64)
    )
    found = detections(
        (box(0, 0, 50, 50), 0.9, 0),
        (box(200, 200, 250, 250), 0.8, 0),
        (box(100, 100, 150, 140), 0.7, 0),
    )
    result = evaluate(match_photos([found], [truth], ("thing", "other")))
    whole = (51 + 50 * 2 / 3) / 101  # recall 0 .. 0.5 at precision 1, to 1.0 at 2/3
    half = 51 / 101
    assert result.ap50 == pytest.approx(100 * whole)
    assert result.ap75 == pytest.approx(100 * whole)
    # IoU 0.8 = 2000 / 2500 exactly: matches at 0.80 as well, so at 7 of the 10 thresholds.
    assert result.ap == pytest.approx(100 * (7 * whole + 3 * half) / 10)
    assert result.ap_medium == pytest.approx(result.ap)
    assert np.isnan(result.ap_small)
    assert np.isnan(result.per_class["other"])
    assert (result.photos, result.boxes) == (1, 2)


def test_nothing_found_and_nothing_there() -> None:
    truth = GroundTruth.of_boxes(np.array([[0, 0, 9, 9]], np.float32), np.zeros(1, np.int64))
    none = GroundTruth.of_boxes(np.zeros((0, 4), np.float32), np.zeros(0, np.int64))
    found = detections((box(0, 0, 9, 9), 0.9, 0))
    assert evaluate(match_photos([Detections.empty()], [truth], ("a",))).ap == 0
    assert np.isnan(evaluate(match_photos([found], [none], ("a",))).ap)
    assert np.isnan(evaluate(match_photos([Detections.empty()], [none], ("a",))).ap)
    assert np.isnan(bootstrap(match_photos([found], [none], ("a",)), 10).low)
    with pytest.raises(ValueError, match="as many photos on both sides"):
        match_photos([found], [], ("a",))


def test_resampled_ap_is_that_of_the_resample_itself() -> None:
    """Photos really repeated and matched again give the same AP, crowds included."""
    found, truths = random_scene(25, 3)
    random = np.random.default_rng(0)
    found = [
        Detections(d.xyxy, d.score * random.uniform(0.5, 1, len(d)).astype(np.float32), d.label)
        for d in found
    ]
    # A class with boxes in one photo only: many resamples lack it, and must leave it out.
    truths[4] = GroundTruth(
        truths[4].xyxy, truths[4].label * 0 + 3, truths[4].area, truths[4].iscrowd & False
    )
    assert len(truths[4]) > 0
    weights = draw(25, 20, seed=1)
    assert 0 in weights[:, 4]
    assert weights.sum(axis=1).tolist() == [25] * 20
    fast = resampled_ap(match_photos(found, truths, CLASSES), weights)
    for one, ap in zip(weights, fast, strict=True):
        index = np.repeat(np.arange(25), one)
        again = match_photos([found[i] for i in index], [truths[i] for i in index], CLASSES)
        assert evaluate(again).ap == pytest.approx(ap, abs=1e-9)


def test_interval_is_seeded_and_about_the_value() -> None:
    found, truths = random_scene(60, 5)
    table = match_photos(found, truths, CLASSES)
    one = bootstrap(table, 200, seed=1)
    assert one == bootstrap(table, 200, seed=1)
    assert one != bootstrap(table, 200, seed=2)
    assert one.value == pytest.approx(evaluate(table).ap)
    assert one.low < one.value < one.high
    narrow = bootstrap(table, 200, seed=1, level=0.5)
    assert narrow.high - narrow.low < 0.6 * (one.high - one.low)
    assert one.resamples == 200


def test_a_paired_difference_knows_the_photos() -> None:
    found, truths = random_scene(60, 6, noise=0.08)
    random = np.random.default_rng(0)
    worse = [
        Detections(
            (d.xyxy + random.normal(0, 1, d.xyxy.shape)).astype(np.float32), d.score, d.label
        )
        for d in found
    ]
    a, b = match_photos(found, truths, CLASSES), match_photos(worse, truths, CLASSES)
    same = paired_bootstrap(a, a, 100)
    assert (same.value, same.low, same.high) == (0, 0, 0)
    both = paired_bootstrap(a, b, 200)
    assert both.value == pytest.approx(evaluate(a).ap - evaluate(b).ap)
    assert 0 < both.low < both.value < both.high
    alone = bootstrap(a, 200)
    assert both.high - both.low < 0.7 * (alone.high - alone.low)
    turned = paired_bootstrap(b, a, 200)
    assert (turned.low, turned.high) == pytest.approx((-both.high, -both.low))
    with pytest.raises(ValueError, match="same photos, got 60 and 2"):
        paired_bootstrap(a, match_photos(found[:2], truths[:2], CLASSES))


def test_the_interval_covers_as_often_as_it_says() -> None:
    """Many draws of 50 photos from one population: about 95 % of intervals hold the mean AP."""
    population = 200
    table = match_photos(*random_scene(population, 7), CLASSES)
    random = np.random.default_rng(0)
    draws = random.multinomial(50, np.full(population, 1 / population), size=60)
    estimates = resampled_ap(table, draws)
    covered = 0
    for one, value in zip(draws, estimates, strict=True):
        again = resampled_ap(table, random.multinomial(50, one / 50, size=50))
        interval = metrics._interval(value, again, 0.95)
        covered += interval.low <= estimates.mean() <= interval.high
    assert 51 <= covered <= 60


@pytest.mark.shared
def test_a_thousand_paired_resamples_take_seconds(shared: Path) -> None:
    data = open_dataset(shared / "data" / "coco-val")
    classes, truths = data.labels()
    random = np.random.default_rng(0)
    found = [
        Detections(
            np.tile(t.xyxy, (3, 1)) + random.normal(0, 4, (3 * len(t), 4)).astype(np.float32),
            random.uniform(0, 1, 3 * len(t)).astype(np.float32),
            np.tile(t.label, 3),
        )
        for t in truths
    ]
    start = time.process_time()
    table = match_photos(found, truths, classes)
    evaluate(table)
    middle = time.process_time()
    paired_bootstrap(table, table, 1000)
    assert middle - start < 10
    assert time.process_time() - middle < 60
