"""Another model while the run goes on: tried, compared, warmed up beside the old one, swapped.

The order is: the file runs in a process of its own; it is loaded; it sees roughly what the running
model sees (the gate); it takes the frames from the next one on; and if it fails within its first
frames the old one, which is kept until then, comes back.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..models.agreement import RunningAgreement
from ..models.dataset import load_image, map_classes
from ..models.detector import OnnxDetector
from ..models.errors import DatasetError, EdgeSightError, InputError, ModelFileError
from ..models.preprocess import Image
from ..models.trial_run import trial_run
from .accuracy import Accuracy, NoAccuracy
from .loop import Loop
from .model_store import BYTES_MAX, ModelStore, Upload
from .sources_photos import SAMPLES
from .work import Judged

GATE_PERCENT = 30.0
"""Agreement (F1) with the running model below which another one is refused."""
BOXES_MIN = 10
"""Fewer boxes than this say nothing about a model."""
TRIAL_FRAMES = 30
TRIAL_S = 20.0
"""A trial ends after so long, too: a source may give no frames."""
HANGS_S = 5.0
CLOSE_S = 1.0
GATE_S = 30.0
"""So long a model may take for all pictures of the comparison."""
FRAMES, FRAMES_S = 4, 1.0
"""Pictures of the source that both models look at, and how long they are waited for."""

Open = Callable[[Path], OnnxDetector]
Judge = Callable[[OnnxDetector], Accuracy]


class Busy(InputError):
    """Another model is on its way already."""


class ModelChoice:
    """Chooses models for a loop.

    Args:
        loop: Whose detector is changed.
        store: The files to choose from.
        open_detector: Loads one, as the run's own was loaded.
        judge: Says how a detector is judged.
        score: Score from which a box counts.
        gate_percent: See ``GATE_PERCENT``; 0 takes every model that runs.
        trial_s: Seconds after which a trial ends.
    """

    Busy = Busy
    bytes_max = BYTES_MAX

    def __init__(
        self,
        loop: Loop,
        store: ModelStore,
        open_detector: Open,
        judge: Judge,
        *,
        score: float,
        gate_percent: float = GATE_PERCENT,
        trial_s: float = TRIAL_S,
    ) -> None:
        """Changes nothing yet."""
        self._loop, self._store = loop, store
        self._open, self._judge = open_detector, judge
        self._score, self._gate_percent, self._trial_s = score, gate_percent, trial_s
        self._current = loop.detector.path.name
        self._loaded = _state(loop.detector.path)
        self._busy: str | None = None
        self._phase = ""
        self._error: str | None = None
        self._tried: set[tuple[str, int, int, int]] = set()
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._closed = threading.Event()

    @property
    def uploads(self) -> bool:
        """Whether models can be uploaded."""
        return self._store.uploads

    def state(self) -> dict[str, Any]:
        """Returns what there is to choose from and how it goes, JSON-ready."""
        models = []
        for name, path in self._store.files().items():
            state = _state(path)
            if state is None:
                continue  # removed a moment ago
            current = name == self._current and state == self._loaded  # not one put in its place
            models.append({"name": name, "bytes": state[0], "current": current})
        return {
            "current": self._current,
            "busy": self._busy,
            "phase": self._phase,
            "error": self._error,
            "uploads": self.uploads,
            "models": models,
        }

    def choose(self, name: str) -> None:
        """Begins to change to another model; ``state`` tells how it goes.

        Raises:
            Busy: Another one is on its way.
            InputError: There is no model of that name.
        """
        path = self._store.files().get(name)
        if path is None:
            message = f"expected a model of the list, found {name[:80]!r}; see /api/models"
            raise InputError(message)
        with self._lock:
            if self._busy is not None:
                message = f"expected one model at a time, found that {self._busy} is on its way"
                raise Busy(message)
            self._busy, self._phase, self._error = name, "trying", None
        self._thread = threading.Thread(
            target=self._change, args=(name, path), name="edgesight-model", daemon=True
        )
        try:
            self._thread.start()
        except RuntimeError as error:  # memory is short
            self._thread, self._busy, self._phase = None, None, ""
            self._error = f"{name}: expected to begin to try it, found: {error}; try again later"
            self._loop.live.events.add("model", f"stays {self._current}: {self._error}", name=name)
            raise Busy(self._error) from error

    def receive(self, name: str) -> Upload:
        """Begins an upload; see ``ModelStore.receive``."""
        return self._store.receive(name, self._try_out)

    def wait(self, timeout_s: float) -> bool:
        """Waits until no model is on its way; returns whether that is so."""
        thread = self._thread
        if thread is not None:
            thread.join(timeout_s)
        return self._busy is None

    def close(self) -> None:
        """Ends waiting; a model that is being loaded is left to its thread."""
        self._closed.set()
        self.wait(CLOSE_S)  # a file that is being tried has a process, which must not be left

    def _change(self, name: str, path: Path) -> None:
        events = self._loop.live.events
        before = self._current
        try:
            text = self._changed(name, path)
        except Exception as error:
            why = (
                str(error)
                if isinstance(error, EdgeSightError)
                else f"{type(error).__name__}: {error}"
            )
            self._error = f"{name}: {' '.join(why.split())[:300]}"
            events.add("model", f"stays {before}: {self._error}", name=before, refused=name)
        else:
            events.add("model", text, name=name, before=before)
        finally:
            self._loop.detector.shrink()  # the other one is gone, its memory is not
            self._busy, self._phase = None, ""

    def _changed(self, name: str, path: Path) -> str:
        """Changes to a model; returns what there is to tell."""
        self._try_out(path)
        self._phase = "loading"
        loaded = _state(path)
        detector = self._open(path)
        self._phase = "comparing"
        seen = self._gate(detector)
        self._phase = "swapping"
        new = Judged(detector, self._judged_how(detector))
        if self._closed.is_set():
            new.accuracy.close()
            message = "the run is over"
            raise ModelFileError(message)
        if detector.spec.classes != self._loop.detector.spec.classes:
            self._loop.live.controls.classes = None  # a filter of names that are not known now
        trial = self._loop.handover.swap(new, TRIAL_FRAMES)
        before, self._loaded = self._loaded, loaded
        self._current = name
        until = time.monotonic() + self._trial_s
        while not trial.done.wait(0.05) and time.monotonic() < until:
            if self._closed.is_set():
                break
        if not trial.done.is_set() and self._loop.watchdog.busy_s("inference") > HANGS_S:
            detector.abort()  # which fails its frame, and brings the one before back
            trial.done.wait(self._trial_s)
        self._loop.handover.settle(trial)
        if trial.error is not None:
            self._current, self._loaded = trial.old.detector.path.name, before
            new.accuracy.close()
            message = f"rolled back, it failed while it ran: {trial.error}"
            raise ModelFileError(message)
        trial.old.accuracy.close()
        return f"changed to {name}; {seen}"

    def _try_out(self, path: Path) -> None:
        """Runs a file elsewhere, once for each state of it.

        Raises:
            ModelFileError: It is no usable model.
        """
        state = _state(path)
        if state is None:
            message = f"{path.name}: expected a file, found none; it was removed"
            raise ModelFileError(message)
        key = (path.name, *state)
        if key not in self._tried:
            trial_run(path, engine=self._loop.detector.engine, stop=self._closed)
            self._tried.add(key)

    def _gate(self, new: OnnxDetector) -> str:
        """Compares a model with the running one; returns what was seen.

        Raises:
            ModelFileError: It sees something else.
        """
        running = self._loop.detector
        if self._gate_percent == 0:
            return "not compared"
        try:
            shared = map_classes(new.spec.classes, running.spec.classes)
        except DatasetError:
            return "it shares no class with the one before: not compared"
        agreement = RunningAgreement()
        limit = threading.Timer(GATE_S, new.abort)
        limit.daemon = True
        limit.start()
        for picture in self._pictures():
            theirs = running(picture, self._score)
            ours = new(picture, self._score)
            agreement.add(shared.detections(ours), shared.reference(theirs))
        limit.cancel()
        result = agreement.result()
        boxes = 0 if result is None else result.tp + result.fp + result.fn
        if result is None or boxes < BOXES_MIN:
            return f"only {boxes} boxes to compare"
        found = (
            f"agreement with {running.spec.name or running.path.stem}: "
            f"F1 {result.f1.value:.0f} % in {result.frames} pictures"
        )
        if result.f1.value < self._gate_percent:
            message = f"expected to see what the running model sees, found {found}; --model-gate 0"
            raise ModelFileError(message)
        return found

    def _pictures(self) -> list[Image]:
        """Returns the sample photos and what the source shows now."""
        images = [load_image(photo) for photo in sorted(SAMPLES.glob("*.jpg"))]
        last, until = -1, time.monotonic() + FRAMES_S
        newest: list[Image] = []
        while len(newest) < FRAMES and time.monotonic() < until and not self._closed.is_set():
            seen = self._loop.newest
            if seen is not None and seen[0].sequence != last:
                last = seen[0].sequence
                newest.append(seen[0].image)
            time.sleep(FRAMES_S / (2 * FRAMES))
        return images + newest

    def _judged_how(self, detector: OnnxDetector) -> Accuracy:
        try:
            return self._judge(detector)
        except EdgeSightError as error:
            return NoAccuracy(str(error))


def _state(path: Path) -> tuple[int, int, int] | None:
    """Returns size, time and number of a file: another one in its place has others."""
    try:
        stat = path.stat()
    except OSError:
        return None
    return stat.st_size, stat.st_mtime_ns, stat.st_ino
