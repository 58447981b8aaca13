"""The loop: newest frames or all of them, and pictures only for those who look."""

from __future__ import annotations

import runpy
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cv2
import numpy as np
import pytest
from edgesight.device_app.accuracy import LabelAccuracy
from edgesight.device_app.live import LiveView
from edgesight.device_app.loop import Loop
from edgesight.device_app.showing import DISPLAY_FPS_MAX
from edgesight.device_app.sinks import MemorySink, Seen
from edgesight.device_app.sources import BaseSource, ListSource, Picture
from edgesight.models.dataset import GroundTruth
from edgesight.models.preprocess import Image

kit: Any = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("app_kit.py"))))
loops: Any = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("loop_kit.py"))))
pictures, run, until, GUARD_S = loops.pictures, loops.run, loops.until, loops.GUARD_S
pytestmark = pytest.mark.usefixtures("no_thread_left")


@pytest.fixture
def detector(tmp_path: Path) -> Any:
    return loops.SlowDetector(kit.build_tiny(tmp_path / "tiny.onnx"))


def test_file_at_full_speed_loses_nothing_and_boxes_belong_to_their_frames(
    detector: Any,
) -> None:
    sink = MemorySink()
    detector.delay_s = 0.002
    loop = run(Loop(ListSource(pictures(60)), detector, sinks=[sink], lossless=True))
    assert [seen.frame.sequence for seen in sink.items] == list(range(60))
    for seen in sink.items:
        frame, found, picture = seen.frame, seen.detections, seen.picture
        assert picture is None
        bright = found[found.label == 0]
        assert float(bright.score[0]) == pytest.approx(frame.image.mean() / 255, abs=1e-3)
        assert bright.xyxy.tolist() == [[0, 0, 32, 32]], "boxes are in pixels of the picture"
    assert sink.closed
    assert loop.dropped == 0
    assert loop.figures()["frames"] == 60
    assert loop.figures()["source_state"] == "ended"


def test_file_is_read_and_prepared_while_the_network_works(detector: Any) -> None:
    inside = threading.Event()
    overlapped: list[int] = []

    class Watched(ListSource):
        def _next(self) -> Picture | None:
            if inside.is_set():
                overlapped.append(self._sequence)
            return super()._next()

    original = detector.infer

    def infer(tensor: Any) -> Any:
        inside.set()
        time.sleep(0.005)
        try:
            return original(tensor)
        finally:
            inside.clear()

    prepare = detector.preprocess
    prepared: list[int] = []

    def preprocess(image: Image) -> Any:
        if inside.is_set():
            prepared.append(1)
        return prepare(image)

    detector.infer = infer  # type: ignore[method-assign]
    detector.preprocess = preprocess  # type: ignore[method-assign]
    run(Loop(Watched(pictures(20)), detector, lossless=True))
    assert len(overlapped) > 10
    assert len(prepared) > 10


def test_slow_network_on_a_fast_camera_sees_new_frames_only(detector: Any) -> None:
    detector.delay_s = 0.02
    ages: list[float] = []

    class Ages(MemorySink):
        def write(self, seen: Seen) -> None:
            ages.append(time.monotonic() - seen.frame.captured_s)
            super().write(seen)

    sink = Ages()
    camera = ListSource(pictures(10), fps=500, live=True, paced=True, loop=True)
    loop = run(Loop(camera, detector, sinks=[sink], frames=30))
    numbers = [seen.frame.sequence for seen in sink.items]
    assert len(numbers) == 30
    assert numbers == sorted(set(numbers))
    assert loop.dropped > 30, "most frames came while the network was busy"
    assert loop.stats.capture.n >= numbers[-1] + 1
    assert np.median(ages) < 1.0, "a queue of old frames would grow"
    seen = numbers[-1] + 1 - len(numbers)
    assert loop.dropped >= seen, "every frame that was passed over is counted"
    assert loop.stats.capture.overall() > 2 * loop.stats.inference.overall()


def test_number_of_frames_is_exact_and_the_source_is_read_no_further(
    detector: Any,
) -> None:
    source = ListSource(pictures(100))
    sink = MemorySink()
    run(Loop(source, detector, sinks=[sink], frames=7, lossless=True))
    assert len(sink.items) == 7
    following = source.read()
    assert following is not None
    assert following.sequence == 7


def test_only_boxes_from_the_score_up_are_written(detector: Any) -> None:
    images = [np.full((64, 64, 3), 51, np.uint8)]  # bright 0.2, dark 0.8
    classes = detector.spec.classes
    for score, labels in ((0.35, [1]), (0.1, [1, 0]), (0.9, [])):
        sink = MemorySink()
        accuracy = LabelAccuracy(classes, classes, "test", 0.35)  # looks at all from 0.05 up
        loop = Loop(
            ListSource(images),
            detector,
            sinks=[sink],
            score=score,
            lossless=True,
            accuracy=accuracy,
        )
        run(loop)
        assert sink.items[0].detections.label.tolist() == labels
        names = {"dark": 1, "bright": 1}
        assert loop.figures()["detections"] == {
            name: n for name, n in names.items() if detector.spec.classes.index(name) in labels
        }


def test_nothing_is_drawn_or_encoded_when_nobody_looks(detector: Any) -> None:
    live = LiveView()
    loop = run(Loop(ListSource(pictures(20)), detector, live=live, display=True, lossless=True))
    assert set(loop.stats.summary_ms()) == {"capture", "preprocess", "inference", "postprocess"}
    assert live.wait_newer(-1, 0.01) is None
    assert live.closed


def test_viewers_get_pictures_at_a_bounded_rate_with_boxes_as_they_wish(
    detector: Any,
) -> None:
    live = LiveView()
    live.viewer_came()
    camera = ListSource([np.full((240, 320, 3), 190, np.uint8)], fps=200, live=True, paced=True)
    camera._loop = True
    loop = Loop(camera, detector, live=live, display=True, score=0.35)
    loop.start()

    def next_picture(after: int) -> tuple[Image, int]:
        item = live.wait_newer(after, GUARD_S)
        assert item is not None
        image = cv2.imdecode(np.frombuffer(item[0], np.uint8), cv2.IMREAD_COLOR)
        return np.asarray(image, np.uint8), item[1]

    def lower_right(image: Image) -> float:
        """How much is drawn where only the box of ``dark`` reaches."""
        return float(np.abs(image[130:, 170:].astype(int) - 190).mean())

    until(lambda: loop.wait(0) or bool(live.figures().get("frames")))
    # At this grey "bright" has 0.75 and "dark", in the lower right, 0.25.
    first, number = next_picture(-1)
    assert first.shape == (240, 320, 3)
    assert lower_right(first) < 0.5
    wishes = ((True, 0.1, True), (False, 0.1, False), (True, 0.2, True), (True, 0.3, False))
    for boxes, score_min, there in wishes:
        live.controls.boxes, live.controls.score_min = boxes, score_min
        deadline = time.monotonic() + GUARD_S
        while True:
            picture, number = next_picture(number)
            if (lower_right(picture) > 0.5) == there:
                break
            assert time.monotonic() < deadline, (boxes, score_min)
    time.sleep(1)
    loop.stop()
    loop.finish()
    assert loop.stats.display.overall() < DISPLAY_FPS_MAX * 1.2
    assert loop.stats.inference.n > 2 * loop.stats.display.n
    assert {"draw", "encode"} <= set(loop.stats.summary_ms())
    assert camera.read() is not None, "the source stays the caller's"
    assert (camera._images[0] == 190).all(), "nobody draws on the frame itself"


def test_video_sink_gets_drawn_pictures(detector: Any) -> None:
    sink = MemorySink(draws=True)
    images = [np.full((240, 320, 3), 128, np.uint8)] * 3
    run(Loop(ListSource(images), detector, sinks=[sink], lossless=True))
    for seen in sink.items:
        frame, picture = seen.frame, seen.picture
        assert picture is not None
        assert picture.shape == frame.image.shape
        assert (picture != frame.image).any()
        assert (frame.image == 128).all()


def test_judged_frames_are_those_of_the_source(detector: Any, tmp_path: Path) -> None:
    class Labelled(BaseSource):
        def _next(self) -> Picture | None:
            if self._sequence == 10:
                return None
            grey = 230 if self._sequence % 2 else 20
            box, label = ([0, 0, 32, 32], 0) if grey == 230 else ([32, 32, 64, 64], 1)
            truth = GroundTruth.of_boxes(np.array([box], np.float32), np.array([label]))
            return Picture(np.full((64, 64, 3), grey, np.uint8), truth)

    accuracy = LabelAccuracy(detector.spec.classes, detector.spec.classes, "test", 0.35)
    loop = run(Loop(Labelled("labelled", 0), detector, accuracy=accuracy, lossless=True))
    figures = loop.figures()["accuracy"]
    assert figures["kind"] == "labels"
    assert figures["frames"] == 10
    assert figures["precision"] == figures["recall"] == 100


def test_latency_is_from_capture_to_the_encoded_picture(detector: Any) -> None:
    class Old(BaseSource):
        """Its pictures are a fifth of a second old when they come."""

        def _next(self) -> Picture | None:
            now = time.monotonic()
            return Picture(np.zeros((64, 64, 3), np.uint8), captured_s=now - 0.2)

    live = LiveView()
    live.viewer_came()
    loop = run(Loop(Old("old", 30, paced=True), detector, live=live, display=True, frames=30))
    figures = loop.figures()
    assert 200 <= figures["latency_ms"]["p50"] < 2000
    assert figures["board"]["memory_mb"]
    live = LiveView()
    loop = run(Loop(ListSource(pictures(5)), detector, live=live, display=True, lossless=True))
    assert "latency_ms" not in loop.figures(), "nobody looked"


def test_live_view_hands_over_the_newest_picture_only() -> None:
    live = LiveView()
    assert live.wait_newer(-1, 0.01) is None
    live.publish(b"a", 3)
    live.publish(b"b", 4)
    assert live.wait_newer(-1, 0) == (b"b", 4)
    assert live.wait_newer(4, 0.01) is None
    threading.Timer(0.05, live.publish, (b"c", 5)).start()
    assert live.wait_newer(4, GUARD_S) == (b"c", 5)
    live.viewer_came()
    live.viewer_left()
    live.viewer_left()
    assert live.viewers == 0


def test_figures_are_ready_for_json(detector: Any) -> None:
    import json

    loop = run(Loop(ListSource(pictures(10)), detector, lossless=True))
    figures = json.loads(json.dumps(loop.live.figures()))
    assert figures["model"] == "tiny"
    assert figures["source"] == "list"
    assert set(figures["stages_ms"]["inference"]) == {"p50", "p90", "p99"}
    assert figures["accuracy"]["kind"] == "none"
    assert {"capture_fps", "inference_fps", "display_fps", "dropped", "elapsed_s"} <= set(figures)
