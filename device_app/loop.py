"""The loop: source -> newest frame -> detector -> results, each in its own thread.

::

    capture ---> inference ---> results ---> encoding
    (reads)      (network)      (decode,     (draws and encodes the newest picture,
                                 judges,      only while somebody looks)
                                 writes)

With a camera the hand-over to inference holds the newest frame only, and preparing it is left to
the last moment: the network never sees an old frame. With a file at full speed nothing is dropped,
and the capture thread prepares the next frame while the network works on this one.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy.typing as npt

from ..models.detections import Detections
from ..models.detector import SCORE_MIN_EVAL, OnnxDetector
from ..models.errors import SourceError
from ..models.preprocess import Image, Placement
from .accuracy import Accuracy, NoAccuracy
from .frame import Frame
from .health import Health
from .latest import Latest
from .live import SCORE_DEFAULT, Figures, LiveView
from .sinks import Sink
from .sources import Source
from .stats import Stats
from .tracking import Tracker

DISPLAY_FPS_MAX = 20.0
"""More pictures per second than this cost CPU and look no better on a web page."""
JPEG_QUALITY = 80
REFRESH_S = 0.25
"""Seconds between two updates of the figures."""
JOIN_S = 0.3
"""So long ``stop`` waits for the threads; a read that hangs in a driver is left behind."""


@dataclass(frozen=True, eq=False)
class Work:
    """A frame on its way through the network: not prepared yet, prepared, or run."""

    frame: Frame
    tensor: npt.NDArray[Any] | None = None
    placement: Placement | None = None
    outputs: list[Any] | None = None


class Loop:
    """Runs a detector on a source until it ends, is stopped, or fails.

    Args:
        source: Stays the caller's: the loop does not close it.
        detector: The model.
        score: Score from which a box counts: written to sinks, and judged.
        live: Where pictures and figures go; one of its own by default.
        display: Whether there are viewers at all; without, nothing is drawn or encoded.
        accuracy: How the run is judged; not at all by default.
        sinks: Files to write; the loop closes them.
        frames: Ends after so many frames; None for no limit.
        track: Whether objects are followed from frame to frame, so that counts do not flicker.
        lossless: Whether every frame of the source is looked at, whatever time it takes.
        stats: Where times and rates go; new ones by default.
    """

    def __init__(
        self,
        source: Source,
        detector: OnnxDetector,
        *,
        score: float = SCORE_DEFAULT,
        live: LiveView | None = None,
        display: bool = False,
        accuracy: Accuracy | None = None,
        sinks: Sequence[Sink] = (),
        frames: int | None = None,
        track: bool = False,
        lossless: bool = False,
        stats: Stats | None = None,
    ) -> None:
        """Prepares the threads; ``start`` starts them."""
        self.source, self.detector = source, detector
        self.live = live or LiveView()
        self.stats = stats or Stats()
        self.accuracy = accuracy or NoAccuracy("not judged")
        self.first_result_s: float | None = None
        self.written: list[Path] = []
        self._score, self._frames, self._lossless = score, frames, lossless
        self._sinks = sinks
        self._captured: Latest[Work] = Latest(lossless)
        self._ran: Latest[Work] = Latest(lossless=True)
        self._shown: Latest[tuple[Frame, Detections]] = Latest()
        self._stop = threading.Event()
        self._done = threading.Event()
        self._error: BaseException | None = None
        self._counts: Counter[str] = Counter()
        self._health = Health()
        self._tracker = Tracker(score) if track else None
        self._threads = [
            self._thread("capture", self._capture),
            self._thread("inference", self._infer),
            self._thread("results", self._results),
        ]
        if display:
            self._threads.append(self._thread("encoding", self._encode))

    @property
    def dropped(self) -> int:
        """Frames that nobody looked at because newer ones came."""
        return self._captured.dropped

    def start(self) -> None:
        """Starts the threads."""
        self.stats.started_s = time.monotonic()
        for thread in self._threads:
            thread.start()

    def wait(self, timeout_s: float | None = None) -> bool:
        """Waits for the end of the run, keeping the figures fresh; call it from one thread.

        Args:
            timeout_s: Seconds to wait at most; for ever by default.

        Returns:
            Whether the run has ended.
        """
        until = None if timeout_s is None else time.monotonic() + timeout_s
        while True:
            left = REFRESH_S if until is None else min(REFRESH_S, until - time.monotonic())
            if self._done.wait(max(0.0, left)):
                return True
            self.live.set_figures(self.figures())
            if self.accuracy.error is not None:
                self._fail(self.accuracy.error)
            if until is not None and time.monotonic() >= until:
                return False

    def stop(self) -> None:
        """Asks the run to end at once; never waits."""
        self._stop.set()
        self._captured.close(discard=True)
        self._ran.close(discard=True)
        self._shown.close(discard=True)
        self._done.set()
        self.live.close()

    def stop_unless_done(self) -> None:
        """Asks the run to end at once unless it has ended by itself."""
        if not self._done.is_set():
            self.stop()

    def finish(self, wait_s: float = JOIN_S) -> None:
        """Ends the run if it still goes on, finishes the sinks, and tells what went wrong.

        Args:
            wait_s: Seconds to wait for the threads; the source may be closed meanwhile.

        Raises:
            EdgeSightError: What ended the run, or what kept a sink from being finished.
        """
        natural = self._done.is_set() and not self._stop.is_set()
        self.stop()
        self.accuracy.close(2.0 if natural else 0.1)
        until = time.monotonic() + wait_s
        for thread in self._threads:
            if thread.ident is not None:
                thread.join(max(0.0, until - time.monotonic()))
        failed = (self._error or self.accuracy.error) is not None
        for sink in self._sinks:
            try:
                if (written := sink.close(complete=not failed)) is not None:
                    self.written.append(written)
            except Exception as problem:
                self._error = self._error or problem
        self.live.set_figures(self.figures())
        error = self._error or self.accuracy.error
        if error is not None:
            raise error

    def run(self) -> None:
        """Starts, waits for the end, and finishes: the whole run in one call."""
        self.start()
        try:
            self.wait()
        finally:
            self.finish()

    def figures(self) -> Figures:
        """Returns everything that a HUD shows, JSON-ready."""
        stats = self.stats
        stages = stats.stages_ms()
        figures: Figures = {
            "model": self.detector.spec.name or self.detector.path.stem,
            "source": self.source.name,
            "source_state": "ended" if self._done.is_set() else self.source.state,
            "frames": stats.inference.n,
            "dropped": self.dropped,
            "capture_fps": round(stats.capture.recent(), 1),
            "inference_fps": round(stats.inference.recent(), 1),
            "display_fps": round(stats.display.recent(), 1),
            "stages_ms": stages,
            "accuracy": self.accuracy.figures(),
            "detections": dict(self._counts),
            "elapsed_s": round(stats.elapsed_s(), 2),
            "board": self._health.figures(
                stages["inference"]["p50"] if "inference" in stages else None
            ),
        }
        if stats.latency.n:
            figures["latency_ms"] = stats.latency.recent()
        return figures

    def _thread(self, name: str, target: Callable[[], None]) -> threading.Thread:
        def guarded() -> None:
            try:
                target()
            except BaseException as error:
                self._fail(error)

        return threading.Thread(target=guarded, name=f"edgesight-{name}", daemon=True)

    def _fail(self, error: BaseException) -> None:
        if not (self._stop.is_set() or self._done.is_set()):  # later ones are only echoes
            self._error = self._error or error
        self.stop()

    def _capture(self) -> None:
        taken = 0
        while not self._stop.is_set():
            began = time.perf_counter()
            frame = self.source.read()
            if frame is None:
                break
            self.stats.times["capture"].add(
                max(0.0, time.perf_counter() - began - self.source.waited_s)
            )
            self.stats.capture.tick()
            taken += 1
            work = Work(frame)
            if not self._captured.put(self._prepared(work) if self._lossless else work):
                break
            if self._lossless and taken == self._frames:
                break
        if not self._stop.is_set() and taken == 0:
            message = f"{self.source.name}: expected frames, found none; check the source"
            raise SourceError(message)
        self._captured.close()

    def _prepared(self, work: Work) -> Work:
        began = time.perf_counter()
        image = work.frame.image
        tensor, placement = self.detector.preprocess(
            work.frame.for_network(self.detector.spec.input_hw)
        )
        placement = placement.seen_from((image.shape[1], image.shape[0]))
        self.stats.times["preprocess"].add(time.perf_counter() - began)
        return Work(work.frame, tensor, placement)

    def _infer(self) -> None:
        while (work := self._captured.get()) is not None:
            if work.tensor is None:
                work = self._prepared(work)
            assert work.tensor is not None
            began = time.perf_counter()
            outputs = self.detector.infer(work.tensor)
            self.stats.times["inference"].add(time.perf_counter() - began)
            if not self._ran.put(Work(work.frame, None, work.placement, outputs)):
                break
        self._ran.close()

    def _results(self) -> None:
        classes = self.detector.spec.classes
        controls = self.live.controls
        drawing = any(sink.draws for sink in self._sinks)
        while (work := self._ran.get()) is not None and not self._stop.is_set():
            assert work.outputs is not None
            assert work.placement is not None
            frame = work.frame
            viewed = self.live.viewers > 0
            floor = min(self._score, self.accuracy.score_floor)
            if viewed:
                floor = min(floor, controls.score_min)
            if self._tracker is not None:
                floor = min(floor, self._tracker.floor)
            began = time.perf_counter()
            found = self.detector.postprocess(
                work.outputs, work.placement, max(floor, SCORE_MIN_EVAL)
            )
            self.stats.times["postprocess"].add(time.perf_counter() - began)
            found, counts = self._followed(found, frame)
            counted = found.above(self._score)
            self._counts = Counter(
                {classes[i] if i < len(classes) else str(i): n for i, n in counts.items()}
            )
            self.accuracy.offer(frame, found)
            if self._sinks:
                picture = self._drawn(frame.image, counted) if drawing else None
                for sink in self._sinks:
                    sink.write(frame, counted, picture if sink.draws else None)
            if viewed:
                self._shown.put((frame, found))
            if self.first_result_s is None:
                self.first_result_s = time.monotonic()
            self.stats.inference.tick()
            if self._frames is not None and self.stats.inference.n >= self._frames:
                break
        self._captured.close(discard=True)
        self._ran.close(discard=True)
        self._shown.close()
        self._done.set()
        self.live.close()

    def _followed(self, found: Detections, frame: Frame) -> tuple[Detections, Counter[int]]:
        """Returns the boxes, with their tracks if they are followed, and counts of each class."""
        if self._tracker is None:
            return found, Counter(found.above(self._score).label.tolist())
        began = time.perf_counter()
        source = self.source
        file = not source.live and source.fps > 0  # whose frames may come faster than recorded
        time_s = frame.sequence / source.fps if file else frame.captured_s
        followed = self._tracker.update(found, time_s)
        self.stats.times["track"].add(time.perf_counter() - began)
        return followed, self._tracker.counts()

    def _drawn(self, image: Image, detections: Detections, boxes: bool = True) -> Image:
        from ..models.draw import draw_detections
        from .hud import draw_hud

        began = time.perf_counter()
        picture = image.copy()
        if boxes:
            draw_detections(picture, detections, self.detector.spec.classes)
        draw_hud(picture, self.live.figures())
        self.stats.times["draw"].add(time.perf_counter() - began)
        return picture

    def _encode(self) -> None:
        interval_s = 1 / DISPLAY_FPS_MAX
        due_s = time.monotonic()
        while (item := self._shown.get()) is not None:
            frame, found = item
            controls = self.live.controls
            picture = self._drawn(frame.image, found.above(controls.score_min), controls.boxes)
            began = time.perf_counter()
            ok, data = cv2.imencode(".jpg", picture, [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY])
            self.stats.times["encode"].add(time.perf_counter() - began)
            if ok:
                self.live.publish(data.tobytes(), frame.sequence)
                self.stats.latency.add(time.monotonic() - frame.captured_s)
                self.stats.display.tick()
            now = time.monotonic()
            due_s = max(due_s + interval_s, now)
            if due_s > now and self._stop.wait(due_s - now):
                break
