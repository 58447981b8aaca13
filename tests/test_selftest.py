"""The gate's trials of itself: models of known difference, rates with intervals, seeded draws."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from edgesight.deploy import selftest as module
from edgesight.deploy.gate_latency import Pairs, latency_checks
from edgesight.deploy.selftest import (
    Rate,
    SelfTest,
    Slower,
    accuracy_trials,
    exactly,
    latency_trials,
    selftest,
    wilson,
)
from edgesight.deploy.selftest_models import ap_of, blurred, closest
from edgesight.deploy.weight_noise import noisy_weights
from edgesight.models.dataset import GroundTruth, open_dataset
from edgesight.models.detections import Detections
from edgesight.models.errors import InputError, ModelFileError
from edgesight.models.metrics import match_photos
from onnx import helper, numpy_helper

CLASSES = ("a", "b")
PHOTOS = 60


def scene(seed: int = 0, photos: int = PHOTOS) -> tuple[list[Detections], list[GroundTruth]]:
    """Returns good detections of four boxes per photo, and the boxes."""
    random = np.random.default_rng(seed)
    found, truths = [], []
    for _ in range(photos):
        corner = np.array([[0, 0], [300, 0], [0, 300], [300, 300]]) + random.uniform(0, 50, (4, 2))
        xyxy = np.hstack([corner, corner + np.exp(random.uniform(3, 5, (4, 2)))])
        label = random.integers(0, 2, 4)
        truths.append(GroundTruth.of_boxes(xyxy, label))
        moved = xyxy + random.normal(0, 2, xyxy.shape)
        stray = moved[:2] + 150
        score = np.concatenate([random.uniform(0.5, 0.9, 4), random.uniform(0.1, 0.6, 2)])
        every = np.concatenate([moved, stray]).astype(np.float32)
        labels = np.concatenate([label, label[:2]])
        found.append(Detections(every, score.astype(np.float32), labels))
    return found, truths


@pytest.mark.parametrize("kind", ["scores", "boxes"])
@pytest.mark.parametrize("loss", [1.5, 6.0])
def test_a_seeded_loss_is_exact(kind: Any, loss: float) -> None:
    found, truths = scene()
    old = match_photos(found, truths, CLASSES)
    new = blurred(found, old, truths, loss, kind=kind)
    assert ap_of(old) - ap_of(new) == pytest.approx(loss, abs=0.1)
    if kind == "boxes":
        assert new.score.tolist() == old.score.tolist()


def test_a_loss_that_no_blur_gives_is_refused() -> None:
    found, truths = scene(photos=5)
    old = match_photos(found, truths, CLASSES)
    with pytest.raises(InputError, match=r"found .*; take more photos"):
        blurred(found, old, truths, 99.0)


def test_pairs_are_those_of_equal_ap() -> None:
    found, truths = scene()
    whole = match_photos(found, truths, CLASSES)
    tables = [
        whole,
        blurred(found, whole, truths, 3.0),
        blurred(found, whole, truths, 3.0, seed=1),
        blurred(found, whole, truths, 9.0),
    ]
    assert closest(tables, 3) == [(1, 2)]
    with pytest.raises(InputError, match="take more variants or less noise"):
        closest(tables[2:], 3)


def test_trials_tell_equal_from_worse() -> None:
    found, truths = scene()
    old = match_photos(found, truths, CLASSES)
    worse = blurred(found, old, truths, 8.0)
    options: dict[str, Any] = {"resamples": 60, "progress": False}
    assert accuracy_trials([(old, old)], 5, **options) == {"pass": 5}
    said = accuracy_trials([(worse, old)], 10, **options)
    assert said["fail"] >= 9
    assert said == accuracy_trials([(worse, old)], 10, **options)
    halves = accuracy_trials([(worse, old), (old, worse)], 10, **options)
    assert halves["pass"] == 5


def test_latency_trials_find_the_slower_and_not_the_equal() -> None:
    random = np.random.default_rng(0)
    new, old = 20 * np.exp(random.normal(0, 0.05, (2, 100, 8)))
    equal = latency_trials(Pairs(new, old, new, old), 40)
    slow = exactly(Pairs(new * 1.3, old, new * 1.3, old), 1.05)
    assert latency_checks(slow)[-1].figures["ratio"] == pytest.approx(1.05, abs=1e-3)
    slower = latency_trials(slow, 40)
    assert equal["fail"] <= 4
    assert slower["fail"] >= 34
    assert sum(equal.values()) == 40


def test_slower_works_longer() -> None:
    def work(image: Any) -> Detections:
        until = time.process_time() + 0.02
        while time.process_time() < until:
            pass
        return Detections.empty()

    began = time.process_time()
    Slower(work, 1.0)(np.zeros((2, 2, 3), np.uint8))
    assert time.process_time() - began >= 0.04


def test_rates_and_their_intervals() -> None:
    assert wilson(5, 200) == pytest.approx((0.01072, 0.05715), abs=1e-4)
    assert wilson(0, 0) == (0, 1)
    assert wilson(0, 200)[0] == 0
    assert wilson(200, 200)[1] == pytest.approx(1)
    few = Rate("equal AP, not passed", 10, 200, 0.05, True, {"pass": 190})
    many = Rate("found", 170, 200, 0.9, False)
    assert (few.met, many.met) == (True, False)
    assert not SelfTest((few, many), {}).met
    report = json.loads(json.dumps(SelfTest((few,), {"photos": 7}).to_json()))
    assert (report["met"], report["photos"], report["rates"][0]["rate"]) == (True, 7, 0.05)


def conv_model(weights: np.ndarray[Any, Any], *, raw: bool = True) -> bytes:
    """Returns the file of one convolution with a bias of its own."""
    tensor = numpy_helper.from_array(weights, "w")
    if not raw:
        tensor = helper.make_tensor("w", 1, weights.shape, weights.ravel().tolist())
    graph = helper.make_graph(
        [helper.make_node("Conv", ["x", "w", "b"], ["y"])],
        "one",
        [helper.make_tensor_value_info("x", 1, [1, 3, 8, 8])],
        [helper.make_tensor_value_info("y", 1, [1, len(weights), 6, 6])],
        [tensor, numpy_helper.from_array(np.ones(len(weights), np.float32), "b")],
    )
    content: bytes = helper.make_model(graph).SerializeToString()
    return content


def stored(content: bytes) -> dict[str, np.ndarray[Any, Any]]:
    model = onnx.load_from_string(content)
    return {one.name: numpy_helper.to_array(one) for one in model.graph.initializer}


@pytest.mark.parametrize("kind", [np.float32, np.float16, np.int8])
def test_noise_is_on_the_weights_and_on_nothing_else(kind: Any) -> None:
    random = np.random.default_rng(0)
    scale = np.array([1.0, 10.0, 0.0, 3.0])[:, None, None, None]
    weights = (random.normal(0, 4, (4, 64, 3, 3)) * scale).astype(kind)
    before = conv_model(weights)
    after = noisy_weights(before, 0.1, seed=0)
    assert len(after) == len(before)
    assert after == noisy_weights(before, 0.1, seed=0) != noisy_weights(before, 0.1, seed=1)
    assert (stored(after)["b"] == 1).all()
    change = stored(after)["w"].astype(float) - weights.astype(float)
    spread = weights.astype(float).reshape(4, -1).std(axis=1)
    rounding = 0.5 if kind is np.int8 else 0.0
    measured = change.reshape(4, -1).std(axis=1)
    assert measured == pytest.approx(0.1 * spread, rel=0.1, abs=rounding)
    assert measured[2] == 0


def test_a_file_without_weights_that_can_be_changed_is_refused() -> None:
    weights = np.ones((2, 3, 3, 3), np.float32)
    with pytest.raises(ModelFileError, match="expected weights stored within the ONNX file"):
        noisy_weights(conv_model(weights, raw=False), 0.1, 0)
    with pytest.raises(ModelFileError, match="expected an ONNX model, found"):
        noisy_weights(b"\x3f no model at all", 0.1, 0)


@pytest.mark.shared
def test_the_whole_selftest_on_real_photos(shared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "POOL_BLOCKS", 12)
    data = open_dataset(shared / "data" / "coco-val").limit(40)
    found = selftest(
        shared / "weights" / "yolox_nano_416.onnx",
        data,
        trials=4,
        resamples=30,
        variants=4,
        noise=0.002,
        margin_ap=5.0,
        progress=False,
    )
    report = json.loads(json.dumps(found.to_json()))
    assert [rate["trials"] for rate in report["rates"]] == [4] * 4
    assert all(abs(one) <= 0.1 for one in report["equal_differences_ap"])
    assert all(-7.6 <= one <= -7.4 for one in report["loss_differences_ap"])
    assert len(set(report["variants_ap"])) > 1
    assert report["photos"] == 40
