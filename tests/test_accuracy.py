"""Accuracy on the screen: what is compared, with what, and what it is called."""

from __future__ import annotations

import runpy
import shutil
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from edgesight.device_app import accuracy as accuracy_module
from edgesight.device_app.accuracy import (
    Accuracy,
    LabelAccuracy,
    NoAccuracy,
    ReferenceAccuracy,
    open_accuracy,
)
from edgesight.device_app.frame import Frame
from edgesight.models.dataset import GroundTruth
from edgesight.models.detections import Detections
from edgesight.models.detector import OnnxDetector
from edgesight.models.errors import DatasetError, ModelFileError

kit: Any = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("app_kit.py"))))
GUARD_S = 60


def frame(sequence: int = 0, grey: int = 200, truth: GroundTruth | None = None) -> Frame:
    return Frame(np.full((64, 64, 3), grey, np.uint8), sequence, time.monotonic(), truth)


def boxes(*rows: tuple[float, float, float, float, float, int]) -> Detections:
    columns = np.array(rows, np.float32).reshape(-1, 6)
    return Detections(columns[:, :4], columns[:, 4], columns[:, 5].astype(np.int64))


def wait_for(accuracy: Accuracy, frames: int) -> dict[str, Any]:
    until = time.monotonic() + GUARD_S
    while accuracy.figures()["frames"] < frames:
        assert time.monotonic() < until, "no comparison came"
        time.sleep(0.005)
    return dict(accuracy.figures())


@pytest.fixture
def tiny(tmp_path: Path) -> OnnxDetector:
    return OnnxDetector(kit.build_tiny(tmp_path / "tiny.onnx"))


def reference(path: Path, **changes: Any) -> ReferenceAccuracy:
    options: dict[str, Any] = {"score": 0.35, "budget_percent": 100.0, **changes}
    return ReferenceAccuracy(path, ("bright", "dark"), **options)


# Against labels


def test_labels_give_precision_recall_and_ap50() -> None:
    truth = GroundTruth.of_boxes(
        np.array([[0, 0, 10, 10], [20, 20, 30, 30]], np.float32), np.array([1, 0])
    )
    # The data calls its classes otherwise and has them in another order.
    accuracy = LabelAccuracy(("person", "motorcycle"), ("motorbike", "person"), "folder", 0.35)
    right = boxes((0, 0, 10, 10, 0.9, 0), (20, 20, 30, 30, 0.8, 1))
    accuracy.offer(frame(truth=truth), right)
    figures = accuracy.figures()
    assert figures["kind"] == "labels"
    assert figures["reference"] == "labels of folder"
    assert figures["precision"] == figures["recall"] == figures["f1"] == 100
    assert figures["ap50"] == pytest.approx(100, abs=0.5)
    assert figures["frames"] == 1
    assert figures["text"].startswith("against labels of folder: AP50 100.0 %")

    accuracy.offer(frame(truth=truth), boxes((0, 0, 10, 10, 0.9, 1)))  # right place, wrong class
    accuracy.close()
    figures = accuracy.figures()
    assert figures["frames"] == 2
    assert figures["precision"] == pytest.approx(200 / 3, abs=0.01)
    assert figures["recall"] == 50


def test_labels_count_boxes_below_the_shown_score_for_ap_only() -> None:
    truth = GroundTruth.of_boxes(np.array([[0, 0, 10, 10]], np.float32), np.array([0]))
    accuracy = LabelAccuracy(("a",), ("a",), "folder", 0.35)
    assert accuracy.score_floor == 0.05
    accuracy.offer(frame(truth=truth), boxes((0, 0, 10, 10, 0.2, 0)))
    figures = accuracy.figures()
    assert figures["recall"] == 0
    assert figures["ap50"] == pytest.approx(100, abs=0.5)


def test_labels_without_any_true_box_yet() -> None:
    accuracy = LabelAccuracy(("a",), ("a",), "folder", 0.35)
    accuracy.offer(frame(truth=None), boxes((0, 0, 9, 9, 0.9, 0)))
    figures = accuracy.figures()
    assert figures["kind"] == "labels"
    assert figures["frames"] == 0
    assert "no true box in 0 frames yet" in figures["text"]


def test_labels_of_other_things_are_an_error() -> None:
    with pytest.raises(DatasetError, match="expected categories that the model knows"):
        LabelAccuracy(("person",), ("gearbox",), "folder", 0.35)


# Agreement with a reference


def test_reference_that_sees_the_same_agrees(tmp_path: Path, tiny: OnnxDetector) -> None:
    accuracy = reference(kit.build_tiny(tmp_path / "twin.onnx"))
    assert "no frame compared yet" in accuracy.figures()["text"]
    picture = frame(grey=200)
    accuracy.offer(picture, tiny(picture.image))
    figures = wait_for(accuracy, 1)
    accuracy.close()
    assert figures["kind"] == "agreement"
    assert figures["reference"] == "twin"
    assert figures["f1"] == figures["precision"] == figures["recall"] == 100
    assert figures["f1_low"] < figures["f1"] <= figures["f1_high"]
    assert "ap50" not in figures
    assert "agreement with twin: F1 100.0 %" in figures["text"]
    assert "1 frames" in figures["text"]


def test_reference_that_sees_boxes_elsewhere_disagrees(tmp_path: Path, tiny: OnnxDetector) -> None:
    accuracy = reference(kit.build_tiny(tmp_path / "moved.onnx", shift=7))
    picture = frame(grey=200)
    accuracy.offer(picture, tiny(picture.image))
    figures = wait_for(accuracy, 1)
    accuracy.close()
    assert figures["f1"] == 0


def test_both_are_held_to_the_same_score(tmp_path: Path, tiny: OnnxDetector) -> None:
    # At grey 204 the model says bright 0.8 and dark 0.2; the reference says 0.9 to both.
    path = kit.build_tiny(tmp_path / "sure.onnx", always=True)
    for score, recall in ((0.35, 50), (0.1, 100)):
        accuracy = reference(path, score=score)
        picture = frame(grey=204)
        accuracy.offer(picture, tiny(picture.image, score_min=0.05))
        figures = wait_for(accuracy, 1)
        accuracy.close()
        assert figures["recall"] == recall, score
        assert figures["precision"] == 100


def test_boxes_of_the_same_frame_are_compared(tmp_path: Path, tiny: OnnxDetector) -> None:
    accuracy = reference(kit.build_tiny(tmp_path / "twin.onnx"))
    until = time.monotonic() + GUARD_S
    sequence = 0
    while accuracy.figures()["frames"] < 10:
        # Dark and bright by turns: comparing with another frame's boxes would show.
        picture = frame(sequence, grey=30 if sequence % 2 else 230)
        accuracy.offer(picture, tiny(picture.image))
        sequence += 1
        assert time.monotonic() < until
    accuracy.close()
    assert accuracy.figures()["f1"] == 100


def test_the_reference_looks_at_the_small_picture_where_the_model_did(tmp_path: Path) -> None:
    """A grey that is another one in the small picture would show."""
    path = kit.build_tiny(tmp_path / "twin.onnx")
    judged = OnnxDetector(path)
    accuracy = reference(path)
    large, small = np.full((240, 320, 3), 30, np.uint8), np.full((120, 160, 3), 230, np.uint8)
    until = time.monotonic() + GUARD_S
    sequence = 0
    while accuracy.figures()["frames"] < 5:
        found = judged(small, 0.05, 100, (320, 240))
        accuracy.offer(Frame(large, sequence, time.monotonic(), None, small), found)
        sequence += 1
        assert time.monotonic() < until
    accuracy.close()
    assert accuracy.figures()["f1"] == 100


def test_pauses_keep_to_the_budget(
    tmp_path: Path, tiny: OnnxDetector, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Costly(OnnxDetector):
        def __call__(self, *args: Any, **options: Any) -> Detections:
            until = time.thread_time() + 0.02
            while time.thread_time() < until:
                pass
            return super().__call__(*args, **options)

    pauses: list[float] = []
    wanting: list[bool] = []

    class Noting(threading.Event):
        def wait(self, timeout: float | None = None) -> bool:
            if threading.current_thread() is accuracy._thread:
                pauses.append(timeout or 0)
                wanting.append(accuracy._wanting)
            return super().wait(0)

    monkeypatch.setattr(accuracy_module, "OnnxDetector", Costly)
    accuracy = reference(kit.build_tiny(tmp_path / "twin.onnx"), budget_percent=10)
    accuracy._closing = Noting()
    until = time.monotonic() + GUARD_S
    while len(pauses) < 3:
        picture = frame()
        accuracy.offer(picture, tiny(picture.image))
        time.sleep(0.005)
        assert time.monotonic() < until
    accuracy.close()
    # 20 ms of work and a little more, at ten percent: at least nine times as much pause.
    assert all(0.18 <= pause < 1 for pause in pauses), pauses
    assert not any(wanting), "during a pause no frame is kept"


def test_only_shared_classes_count(tmp_path: Path) -> None:
    path = kit.build_tiny(tmp_path / "other.onnx", classes=("dark", "gearbox"), always=True)
    accuracy = reference(path)
    # The reference's "dark" is in the upper left, its "gearbox" is unknown here; "bright" is
    # unknown there.
    accuracy.offer(frame(), boxes((0, 0, 32, 32, 0.9, 1), (32, 32, 64, 64, 0.9, 0)))
    figures = wait_for(accuracy, 1)
    accuracy.close()
    assert figures["f1"] == 100
    assert "only the 1 classes count that both models have" in figures["text"]


def test_nothing_to_compare_is_said(tmp_path: Path) -> None:
    accuracy = reference(kit.build_tiny(tmp_path / "twin.onnx"), score=0.99)
    accuracy.offer(frame(grey=128), Detections.empty())
    until = time.monotonic() + GUARD_S
    while "no box in 1 frames" not in accuracy.figures()["text"]:
        assert time.monotonic() < until
        time.sleep(0.01)
    accuracy.close()


def test_unusable_named_reference_is_an_error_of_the_run(tmp_path: Path) -> None:
    bad = tmp_path / "bad.onnx"
    bad.write_bytes(b"no model")
    for required in (True, False):
        accuracy = reference(bad, required=required)
        accuracy.offer(frame(), Detections.empty())
        accuracy._thread.join(GUARD_S)
        assert (accuracy.error is not None) == required
        assert accuracy.figures()["kind"] == "none"
        assert "expected an ONNX model" in accuracy.figures()["text"]
        accuracy.close()


def test_reference_that_fails_in_mid_run_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Failing(OnnxDetector):
        def __call__(self, image: Any, *settings: Any) -> Detections:
            message = "out of\nmemory"
            raise RuntimeError(message)

    monkeypatch.setattr(accuracy_module, "OnnxDetector", Failing)
    accuracy = reference(kit.build_tiny(tmp_path / "twin.onnx"))
    accuracy.offer(frame(), Detections.empty())
    accuracy._thread.join(GUARD_S)
    found = accuracy.figures()
    assert found["kind"] == "none"
    assert "the reference model failed: out of memory" in found["text"]


def test_reference_is_not_loaded_before_the_first_frame(tmp_path: Path) -> None:
    path = kit.build_tiny(tmp_path / "twin.onnx")
    accuracy = reference(path)
    time.sleep(0.1)
    path.unlink()
    assert accuracy.error is None
    accuracy.offer(frame(), Detections.empty())
    accuracy._thread.join(GUARD_S)
    assert accuracy.error is not None, "the first frame is what makes it load"


def test_close_waits_for_the_first_comparison_of_a_short_run(
    tmp_path: Path, tiny: OnnxDetector
) -> None:
    accuracy = reference(kit.build_tiny(tmp_path / "twin.onnx"), budget_percent=1)
    picture = frame()
    accuracy.offer(picture, tiny(picture.image))
    accuracy.close(wait_s=GUARD_S)
    assert accuracy.figures()["frames"] == 1


def test_close_ends_the_thread_in_its_pause(tmp_path: Path, tiny: OnnxDetector) -> None:
    accuracy = reference(kit.build_tiny(tmp_path / "slow.onnx", work=20), budget_percent=0.1)
    picture = frame()
    accuracy.offer(picture, tiny(picture.image))
    wait_for(accuracy, 1)
    accuracy.close()
    accuracy._thread.join(GUARD_S)
    assert not accuracy._thread.is_alive()


# Which of them


def choose(tiny: OnnxDetector, classes: tuple[str, ...] | None, reference: str | None) -> Accuracy:
    return open_accuracy(tiny, classes, "source", reference=reference, score=0.35, budget_percent=5)


def test_labels_go_before_the_default_reference(tiny: OnnxDetector) -> None:
    assert isinstance(choose(tiny, ("dark",), None), LabelAccuracy)
    assert isinstance(choose(tiny, ("dark",), "none"), LabelAccuracy)


def test_named_reference_goes_before_labels(tiny: OnnxDetector, tmp_path: Path) -> None:
    found = choose(tiny, ("dark",), str(kit.build_tiny(tmp_path / "x.onnx", always=True)))
    assert isinstance(found, ReferenceAccuracy)
    found.close()


def test_without_any_it_says_so(
    tiny: OnnxDetector, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    off = choose(tiny, None, "none").figures()
    assert off["kind"] == "none"
    assert "--reference none" in off["text"]
    copy = tmp_path / "copy.onnx"
    shutil.copy(tiny.path, copy)
    assert "its own reference" in choose(tiny, None, str(copy)).figures()["text"]

    def missing(name: str) -> Path:
        message = "zoo: expected the shipped detector, found no such file"
        raise ModelFileError(message)

    monkeypatch.setattr(accuracy_module, "model_path", missing)
    default = choose(tiny, None, None)
    assert isinstance(default, NoAccuracy)
    assert "no reference model here" in default.figures()["text"]


def test_missing_named_reference_is_one_line(tiny: OnnxDetector, tmp_path: Path) -> None:
    with pytest.raises(ModelFileError, match="--reference: expected an ONNX model or 'none'"):
        choose(tiny, None, str(tmp_path / "nothing.onnx"))


def test_default_reference_with_other_classes_is_no_error(
    tiny: OnnxDetector, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = kit.build_tiny(tmp_path / "other.onnx", classes=("gearbox", "bolt"))
    monkeypatch.setattr(accuracy_module, "model_path", lambda name: other)
    found = choose(tiny, None, None)
    assert isinstance(found, ReferenceAccuracy)
    found.offer(frame(), Detections.empty())
    found._thread.join(GUARD_S)
    assert found.error is None
    assert found.figures()["kind"] == "none"
    assert "categories" in found.figures()["text"]
    found.close()


def test_no_thread_is_left_behind(tmp_path: Path, tiny: OnnxDetector) -> None:
    accuracy = reference(kit.build_tiny(tmp_path / "twin.onnx"))
    accuracy.close(wait_s=GUARD_S)
    assert not [
        t
        for t in threading.enumerate()
        if t.name == "edgesight-reference" and t is accuracy._thread
    ]
