"""The loop when something fails: its error ends the run, nothing hangs, files are finished."""

from __future__ import annotations

import contextlib
import runpy
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from edgesight.device_app.accuracy import ReferenceAccuracy
from edgesight.device_app.live import LiveView
from edgesight.device_app.loop import Loop
from edgesight.device_app.sinks import MemorySink, Seen
from edgesight.device_app.sources import BaseSource, ListSource, Picture, ReopeningSource, Source
from edgesight.models.errors import EdgeSightError, ModelFileError, OutputError, SourceError

kit: Any = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("app_kit.py"))))
loops: Any = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("loop_kit.py"))))
pictures, run, until, GUARD_S = loops.pictures, loops.run, loops.until, loops.GUARD_S
pytestmark = pytest.mark.usefixtures("no_thread_left")


@pytest.fixture
def detector(tmp_path: Path) -> Any:
    return loops.SlowDetector(kit.build_tiny(tmp_path / "tiny.onnx"))


def fails_at(detector: Any, fails: Callable[[int], bool]) -> list[int]:
    """Makes the network fail on some of its calls, which are counted from 1."""
    calls: list[int] = []

    def infer(tensor: Any) -> Any:
        calls.append(len(calls) + 1)
        if fails(calls[-1]):
            message = "out of memory"
            raise RuntimeError(message)
        return original(tensor)

    original = detector.infer
    detector.infer = infer
    return calls


def test_network_that_fails_for_good_ends_the_run_with_its_error(detector: Any) -> None:
    fails_at(detector, lambda call: call >= 5)
    sink = MemorySink()
    camera = ListSource(pictures(5), fps=100, live=True, paced=True, loop=True)
    loop = Loop(camera, detector, sinks=[sink])
    loop.start()
    assert loop.wait(GUARD_S)
    with pytest.raises(EdgeSightError, match="30 in a row that fail: out of memory"):
        loop.finish()
    assert sink.closed
    assert len(sink.items) == 4


def test_network_that_fails_now_and_then_does_not_end_the_run(detector: Any) -> None:
    calls = fails_at(detector, lambda call: call % 3 == 0)
    camera = ListSource(pictures(5), fps=300, live=True, paced=True, loop=True)
    sink = MemorySink()
    run(Loop(camera, detector, sinks=[sink], frames=100))
    assert len(sink.items) == 100
    assert len(calls) >= 148


def test_file_of_which_a_frame_fails_ends_with_its_error(detector: Any) -> None:
    fails_at(detector, lambda call: call == 5)
    loop = Loop(ListSource(pictures(20)), detector, lossless=True)
    loop.start()
    assert loop.wait(GUARD_S)
    with pytest.raises(RuntimeError, match="out of memory"):
        loop.finish()


def test_camera_whose_read_fails_now_and_then_goes_on(detector: Any) -> None:
    class Shaky(ListSource):
        def _next(self) -> Picture | None:
            if self._sequence % 4 == 3 and not shaken.get(self._sequence):
                shaken[self._sequence] = True
                message = "a frame that no driver should give"
                raise ValueError(message)
            return super()._next()

    shaken: dict[int, bool] = {}
    sink = MemorySink()
    run(Loop(Shaky(pictures(5), loop=True), detector, sinks=[sink], frames=12))
    assert len(sink.items) == 12
    assert shaken


class Full(MemorySink):
    """A file on a disk that is full after three frames."""

    def write(self, seen: Seen) -> None:
        if len(self.items) >= 3:
            message = "cannot write x: disk full; free space"
            raise OutputError(message)
        super().write(seen)


def test_sink_that_fails_ends_the_run_of_a_file_with_its_error(detector: Any) -> None:
    sink = Full()
    loop = Loop(ListSource(pictures(20), loop=True), detector, sinks=[sink], lossless=True)
    loop.start()
    assert loop.wait(GUARD_S)
    with pytest.raises(OutputError, match="disk full"):
        loop.finish()
    assert sink.closed


def test_sink_that_fails_is_told_and_a_camera_goes_on(detector: Any) -> None:
    full, whole = Full(), MemorySink()
    camera = ListSource(pictures(5), fps=300, live=True, paced=True, loop=True)
    loop = Loop(camera, detector, sinks=[full, whole], frames=60)
    loop.start()
    assert loop.wait(GUARD_S)
    with pytest.raises(OutputError, match="disk full"):  # told at the end, too
        loop.finish()
    assert (len(full.items), len(whole.items)) == (3, 60)
    assert full.closed
    assert whole.closed
    assert loop.live.figures()["warnings"] == ["cannot write x: disk full; free space"]
    assert [event.kind for event in loop.live.events.after()] == ["sink"]


def test_failed_run_does_not_complete_its_sinks(detector: Any) -> None:
    completed: list[bool] = []

    class Noting(MemorySink):
        def close(self, complete: bool = True) -> Path | None:
            completed.append(complete)
            return Path("written")

    class Dying(ListSource):
        def _next(self) -> Picture | None:
            if self._sequence == 4:
                message = "dying: expected a photo, found none; copy it again"
                raise SourceError(message)
            return super()._next()

    loop = Loop(Dying(pictures(9)), detector, sinks=[Noting()], lossless=True)
    loop.start()
    assert loop.wait(GUARD_S)
    with pytest.raises(SourceError, match="dying"):
        loop.finish()
    run(Loop(ListSource(pictures(3)), detector, sinks=[Noting()], lossless=True))
    assert completed == [False, True]


def test_source_without_a_frame_is_an_error(detector: Any) -> None:
    loop = Loop(ListSource([]), detector, lossless=True)
    with pytest.raises(SourceError, match="expected frames, found none"):
        loop.run()


def test_reference_that_cannot_be_loaded_ends_the_run(detector: Any, tmp_path: Path) -> None:
    (tmp_path / "bad.onnx").write_bytes(b"no model")
    accuracy = ReferenceAccuracy(
        tmp_path / "bad.onnx", detector.spec.classes, score=0.35, budget_percent=5
    )
    camera = ListSource(pictures(5), fps=50, live=True, paced=True, loop=True)
    loop = Loop(camera, detector, accuracy=accuracy)
    loop.start()
    assert loop.wait(GUARD_S)
    with pytest.raises(ModelFileError, match="expected an ONNX model"):
        loop.finish()


def test_lost_source_is_shown_and_the_run_goes_on(detector: Any) -> None:
    opened: list[Source] = []

    class Dying(ListSource):
        def _next(self) -> Picture | None:
            picture = super()._next()
            if picture is None:
                message = "list: expected a frame, found none; check the cable"
                raise SourceError(message)
            return picture

    def open_one() -> Source:
        opened.append(Dying(pictures(5), live=True))
        return opened[-1]

    source = ReopeningSource(open_one, first_s=0.4)
    loop = Loop(source, detector)
    loop.start()
    states = set()

    def came_back() -> bool:
        assert not loop.wait(0.02)
        states.add(loop.live.figures()["source_state"])
        return len(opened) >= 2 and loop.stats.inference.n > 5

    until(came_back)
    loop.stop()
    source.close()
    loop.finish()
    assert "retrying: expected a frame, found none" in states


def test_stop_during_a_hanging_read_ends_all_the_same(detector: Any) -> None:
    entered, go_on = threading.Event(), threading.Event()

    class Hanging(BaseSource):
        live = True

        def _next(self) -> Picture | None:
            entered.set()
            go_on.wait(GUARD_S)
            return None

    source = Hanging("hanging", 30)
    loop = Loop(source, detector)
    loop.start()
    assert entered.wait(GUARD_S)
    loop.stop()
    source.close()
    began = time.monotonic()
    loop.finish()
    assert time.monotonic() - began < GUARD_S / 2, "it waited for the driver"
    go_on.set()


@pytest.mark.parametrize("fails", [False, True])
def test_end_of_the_run_wakes_waiting_viewers(detector: Any, fails: bool) -> None:
    live = LiveView()
    answers: list[object] = []
    viewer = threading.Thread(target=lambda: answers.append(live.wait_newer(-1, GUARD_S)))
    viewer.start()

    class Failing(MemorySink):
        def write(self, *_: object) -> None:
            if fails:
                message = "cannot write x: disk full; free space"
                raise OutputError(message)

    loop = Loop(ListSource(pictures(3)), detector, live=live, sinks=[Failing()], lossless=True)
    loop.start()
    assert loop.wait(GUARD_S)
    viewer.join(GUARD_S / 2)
    assert answers == [None]
    with contextlib.suppress(OutputError):
        loop.finish()
