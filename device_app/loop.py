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
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from ..models.detections import Detections
from ..models.detector import SCORE_MIN_EVAL, OnnxDetector
from ..models.errors import EdgeSightError, SourceError
from .accuracy import Accuracy, NoAccuracy
from .following import Following
from .frame import Frame
from .handover import Handover
from .health import Health
from .latest import Latest
from .live import SCORE_DEFAULT, Figures, LiveView
from .showing import Showing
from .sinks import Sink
from .sources import Source
from .stats import Stats
from .watchdog import Watchdog
from .work import Judged, Work
from .writing import Writing
from .zones import Zones

REFRESH_S = 0.25
"""Seconds between two updates of the figures."""
JOIN_S = 0.3
"""So long ``stop`` waits for the threads; a read that hangs in a driver is left behind."""
PAUSE_S = 0.1
"""So long the capture rests after a read that failed."""


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
        zones: Parts of the picture to watch; none by default.
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
        zones: Zones | None = None,
    ) -> None:
        """Prepares the threads; ``start`` starts them."""
        self.source = source
        self.live = live or LiveView()
        self.stats = stats or Stats()
        self.first_result_s: float | None = None
        self.newest: tuple[Frame, Detections] | None = None
        """The last frame that went all the way, and its boxes at or above the score."""
        first = Judged(detector, accuracy or NoAccuracy("not judged"), required=True)
        self.handover = Handover(first)
        self._score, self._frames, self._lossless = score, frames, lossless
        self._captured: Latest[Work] = Latest(lossless)
        self._ran: Latest[Work] = Latest(lossless=True)
        self.showing = Showing(self.live, self.stats, zones.draw if zones else None)
        self._writing = Writing(sinks, self.showing, self.live.events, lossless)
        self.watchdog = Watchdog()
        self._warnings: list[str] = []
        self._stop = threading.Event()
        self._done = threading.Event()
        self._error: BaseException | None = None
        self._health = Health()
        events = self.live.events
        self._following = Following(score, track, source, self.stats, events, zones)
        self._source_state = "running"
        self._more: list[Callable[[Figures], None]] = []
        self._threads = [
            self._thread("capture", self._capture),
            self._thread("inference", self._infer),
            self._thread("results", self._results),
        ]
        if display:
            showing = partial(self.showing.run, self._stop, self.watchdog)
            self._threads.append(self._thread("encoding", showing))

    @property
    def detector(self) -> OnnxDetector:
        """The detector that takes the next frame."""
        return self.handover.now.detector

    @property
    def accuracy(self) -> Accuracy:
        """How that one is judged."""
        return self.handover.now.accuracy

    @property
    def written(self) -> list[Path]:
        """The files that are there at the end."""
        return self._writing.written

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
            self._look_after()
            self.live.set_figures(self.figures())
            if until is not None and time.monotonic() >= until:
                return False

    def stop(self) -> None:
        """Asks the run to end at once; never waits."""
        self._stop.set()
        self._captured.close(discard=True)
        self._ran.close(discard=True)
        self.showing.slot.close(discard=True)
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
        error = self._error or self.handover.now.error
        unfinished = self._writing.close(complete=error is None)
        error = error or unfinished
        self.live.set_figures(self.figures())
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
            "detections": self._following.counts,
            "elapsed_s": round(stats.elapsed_s(), 2),
            "board": self._health.figures(
                stages["inference"]["p50"] if "inference" in stages else None
            ),
            "classes": list(self.detector.spec.classes),
            "warnings": [*self._warnings, *self._writing.warnings()],
        }
        if (zones := self._following.zones) is not None:
            figures["zones"] = zones.counts()
            figures["warnings"] += zones.warnings(self.detector.spec.classes)
        if stats.latency.n:
            figures["latency_ms"] = stats.latency.recent()
        for add in self._more:
            add(figures)
        return figures

    def add_figures(self, add: Callable[[Figures], None]) -> None:
        """Lets somebody else add to the figures whenever they are made."""
        self._more.append(add)

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

    def _look_after(self) -> None:
        """Ends the run if that is all that is left, and says who hangs."""
        error = self.handover.now.error
        state = self.source.state
        if state != self._source_state and not self._done.is_set():
            self.live.events.add("source", f"{self.source.name}: {state}", state=state)
            self._source_state = state
        try:
            quiet = ("capture",) if self.source.state != "running" else ()  # that says why itself
            self._warnings = self.watchdog.warnings(quiet)
        except EdgeSightError as hangs:
            error = error or hangs
        if error is not None:
            self._fail(error)

    def _capture(self) -> None:
        taken = 0
        while not self._stop.is_set():
            began = time.perf_counter()
            self.watchdog.begin("capture")
            try:
                frame = self.source.read()
            except EdgeSightError:
                raise  # its own word that nothing more will come
            except Exception as error:
                if self._lossless:
                    raise
                self.watchdog.frame_failed(error)
                self._stop.wait(PAUSE_S)
                continue
            finally:
                self.watchdog.end("capture")
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
        judged, image = self.handover.now, work.frame.image
        detector = judged.detector
        tensor, placement = detector.preprocess(work.frame.for_network(detector.spec.input_hw))
        placement = placement.seen_from((image.shape[1], image.shape[0]))
        self.stats.times["preprocess"].add(time.perf_counter() - began)
        return Work(work.frame, judged, tensor, placement)

    def _infer(self) -> None:
        while (work := self._captured.get()) is not None:
            self.watchdog.begin("inference")
            judged = work.judged or self.handover.now
            try:
                if work.tensor is None:
                    work = self._prepared(work)
                judged = work.judged or judged
                assert work.tensor is not None
                began = time.perf_counter()
                outputs = judged.detector.infer(work.tensor)
                self.stats.times["inference"].add(time.perf_counter() - began)
            except Exception as error:
                self._frame_failed(judged, error)
                continue
            finally:
                self.watchdog.end("inference")
            if not self._ran.put(Work(work.frame, judged, None, work.placement, outputs)):
                break
        self._ran.close()

    def _frame_failed(self, judged: Judged, error: Exception) -> None:
        """Goes on after a frame that failed: with the detector before, if this one is on trial.

        Raises:
            Exception: ``error``: every frame counts, or too many have failed.
        """
        if self.handover.failed(judged, error):
            return
        if self._lossless:
            raise error
        self.watchdog.frame_failed(error)

    def _results(self) -> None:
        seen_by = self.handover.now
        while (work := self._ran.get()) is not None and not self._stop.is_set():
            assert work.judged is not None
            self.watchdog.begin("results")
            if work.judged is not seen_by:
                self.stats.new_detector()  # what the one before took says nothing any more
                self._health.forget_usual()
                seen_by = work.judged
            try:
                found = self._found(work, work.judged)
            except Exception as error:
                self.watchdog.end("results")
                self._frame_failed(work.judged, error)
                continue
            self._result(work.frame, found, work.judged)  # its errors are no fault of the detector
            self.watchdog.end("results")
            self.watchdog.frame_done()
            self.handover.passed(work.judged)
            if self._frames is not None and self.stats.inference.n >= self._frames:
                break
        self._following.end()
        self._captured.close(discard=True)
        self._ran.close(discard=True)
        self.showing.slot.close()
        self._done.set()
        self.live.close()

    def _found(self, work: Work, judged: Judged) -> Detections:
        """Returns the boxes of a frame that went through the network, down to what is needed."""
        assert work.outputs is not None
        assert work.placement is not None
        floor = min(self._following.floor, judged.accuracy.score_floor)
        if self.live.viewers > 0:
            floor = min(floor, self.live.controls.score_min)
        began = time.perf_counter()
        floor = max(floor, SCORE_MIN_EVAL)
        found = judged.detector.postprocess(work.outputs, work.placement, floor)
        self.stats.times["postprocess"].add(time.perf_counter() - began)
        return found

    def _result(self, frame: Frame, found: Detections, judged: Judged) -> None:
        classes = judged.detector.spec.classes
        found = self._following.update(found, frame, classes)
        counted = found.above(self._score)
        judged.accuracy.offer(frame, found)
        self._writing.write(frame, counted, classes)
        if self.live.viewers > 0:
            self.showing.slot.put((frame, found, classes))
        self.newest = (frame, counted)
        if self.first_result_s is None:
            self.first_result_s = time.monotonic()
        self.stats.inference.tick()
