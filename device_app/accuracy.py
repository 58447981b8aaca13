"""Accuracy on the screen: against the source's own boxes, or agreement with a reference model.

Two different things, and the figures always say which of them is shown. Both compare boxes of the
very same frame, at the same score (0.35 unless told otherwise): what the viewer sees is what is
judged. Estimates that need no reference at all will be another kind, beside these.
"""

from __future__ import annotations

import filecmp
import os
import sys
import threading
import time
from pathlib import Path
from typing import Protocol

from ..models.agreement import Agreement, RunningAgreement, RunningAp50
from ..models.dataset import ClassMap, map_classes
from ..models.detections import Detections
from ..models.detector import SCORE_MIN_EVAL, OnnxDetector
from ..models.errors import EdgeSightError, ModelFileError
from ..models.files import is_file
from ..models.zoo import model_path
from .frame import Frame
from .latest import Latest
from .live import AccuracyFigures

REFRESH_S = 1.0
"""AP over many classes takes tens of milliseconds: no more often than this."""
NICENESS = 10
"""Of the reference's thread: the loop goes first."""


class Accuracy(Protocol):
    """Judges a run; ``offer`` is called from one thread, everything else from any.

    Attributes:
        score_floor: Lowest score of detections that it needs to see.
        error: What went wrong in its own thread, if that must end the run.
    """

    score_floor: float
    error: EdgeSightError | None

    def offer(self, frame: Frame, detections: Detections) -> None:
        """Takes one frame and its detections down to ``score_floor``; never waits."""
        ...

    def figures(self) -> AccuracyFigures:
        """Returns what to show, JSON-ready."""
        ...

    def close(self, wait_s: float = 0.0) -> None:
        """Ends it; waits so many seconds at most for a comparison that is under way."""
        ...


class NoAccuracy:
    """Shows why there is no figure.

    Args:
        why: One line.
    """

    score_floor = 1.0
    error: EdgeSightError | None = None

    def __init__(self, why: str) -> None:
        """Keeps the reason."""
        self._why = why

    def offer(self, frame: Frame, detections: Detections) -> None:
        """Does nothing."""

    def figures(self) -> AccuracyFigures:
        """Returns the reason."""
        return {"kind": "none", "text": self._why, "frames": 0, "reference": None}

    def close(self, wait_s: float = 0.0) -> None:
        """Does nothing."""


class LabelAccuracy:
    """Precision, recall and AP50 against the boxes that the source brings along.

    Args:
        model_classes: The model's class names.
        data_classes: The source's class names.
        source: Name of the source, for the text.
        score: Score from which a box counts for precision and recall.

    Raises:
        DatasetError: Model and source share no class.
    """

    score_floor = SCORE_MIN_EVAL
    error: EdgeSightError | None = None

    def __init__(
        self,
        model_classes: tuple[str, ...],
        data_classes: tuple[str, ...],
        source: str,
        score: float,
    ) -> None:
        """Pairs the classes by name."""
        self._map = map_classes(model_classes, data_classes)
        self._note = self._map.note(model_classes, data_classes)
        self._source, self._score = source, score
        self._running = RunningAp50(score_min=score)
        self._lock = threading.Lock()
        self._shown: AccuracyFigures | None = None
        self._shown_s = 0.0

    def offer(self, frame: Frame, detections: Detections) -> None:
        """Adds one frame."""
        if frame.truth is None:
            return
        found, truth = self._map.detections(detections), self._map.truth(frame.truth)
        with self._lock:
            self._running.add(found, truth)

    def figures(self) -> AccuracyFigures:
        """Returns the figures, computed at most once a second."""
        now = time.monotonic()
        if self._shown is None or now - self._shown_s >= REFRESH_S:
            with self._lock:
                result, frames = self._running.result(), self._running.frames
            name = f"labels of {self._source}"
            figures: AccuracyFigures = {"kind": "labels", "frames": frames, "reference": name}
            if result is None:
                figures["text"] = f"against {name}: no true box in {frames} frames yet"
            else:
                _put_agreement(figures, result.agreement)
                figures["ap50"] = round(result.ap50.value, 2)
                note = f"; {self._note}" if self._note else ""
                figures["text"] = (
                    f"against {name}: AP50 {result.ap50.value:.1f} % "
                    f"({result.ap50.low:.1f} to {result.ap50.high:.1f}), "
                    f"precision {result.agreement.precision.value:.1f} %, "
                    f"recall {result.agreement.recall.value:.1f} % at score {self._score:g}, "
                    f"{frames} frames{note}"
                )
            self._shown, self._shown_s = figures, now
        return self._shown

    def close(self, wait_s: float = 0.0) -> None:
        """Lets the next ``figures`` count every frame."""
        self._shown = None


class ReferenceAccuracy:
    """Agreement with a reference model, run on sampled frames within a CPU budget.

    The reference is loaded after the first frame and runs in a thread of low priority. It
    measures the CPU time that each comparison took and pauses so long that the thread stays
    within its share of one core.

    Args:
        reference: The reference model's file.
        model_classes: The class names of the model that is judged.
        score: Score from which a box counts, in both models.
        budget_percent: Share of one core.
        head: The reference's head, where its file does not tell.
        required: Whether a reference that cannot be used ends the run; otherwise the text says so.
    """

    def __init__(
        self,
        reference: Path,
        model_classes: tuple[str, ...],
        *,
        score: float,
        budget_percent: float,
        head: str | None = None,
        required: bool = True,
    ) -> None:
        """Starts the thread, which waits for the first frame."""
        self.score_floor = score
        self.error: EdgeSightError | None = None
        self._path, self._head, self._classes = reference, head, model_classes
        self._score, self._required = score, required
        self._pause_per_work = 100 / budget_percent - 1
        self._why_none: str | None = None
        self._note = ""
        self._running = RunningAgreement()
        self._compared = 0
        self._lock = threading.Lock()
        self._slot: Latest[tuple[Frame, Detections]] = Latest()
        self._wanting = True
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="edgesight-reference", daemon=True)
        self._thread.start()

    def offer(self, frame: Frame, detections: Detections) -> None:
        """Keeps the frame if the thread waits for one."""
        if self._wanting:
            self._slot.put((frame, detections))

    def figures(self) -> AccuracyFigures:
        """Returns F1 with its interval and the number of frames behind it."""
        if self._why_none is not None:
            return NoAccuracy(self._why_none).figures()
        with self._lock:
            result, compared = self._running.result(), self._compared
        name = self._path.stem
        figures: AccuracyFigures = {
            "kind": "agreement",
            "frames": compared if result is None else result.frames,
            "reference": name,
        }
        if result is None:
            state = f"no box in {compared} frames" if compared else "no frame compared"
            figures["text"] = f"agreement with {name}: {state} yet"
            return figures
        _put_agreement(figures, result)
        figures["text"] = (
            f"agreement with {name}: F1 {result.f1.value:.1f} % "
            f"({result.f1.low:.1f} to {result.f1.high:.1f}) at IoU 0.5, "
            f"score {self._score:g}, {result.frames} frames{self._note}"
        )
        return figures

    def close(self, wait_s: float = 0.0) -> None:
        """Ends the thread."""
        until = time.monotonic() + wait_s
        self._slot.close(discard=wait_s <= 0)
        if self._compared or wait_s <= 0:
            self._closing.set()
        self._thread.join(max(0.0, until - time.monotonic()))
        self._closing.set()

    def _run(self) -> None:
        if sys.platform.startswith("linux"):  # there, niceness belongs to the thread
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICENESS)
        try:
            self._compare_all()
        except EdgeSightError as error:
            self._why_none = str(error)
            if self._required:
                self.error = error
        except Exception as error:  # of the runtime: the live view goes on, and says so
            self._why_none = f"the reference model failed: {' '.join(str(error).split())[:160]}"

    def _compare_all(self) -> None:
        detector: OnnxDetector | None = None
        shared: ClassMap | None = None
        while (item := self._slot.get()) is not None:
            if detector is None or shared is None:
                detector = OnnxDetector(self._path, head=self._head)
                shared = map_classes(self._classes, detector.spec.classes)
                if shared.note(self._classes, detector.spec.classes):
                    self._note = (
                        f"; only the {len(shared.names)} classes count that both models have"
                    )
                item = self._slot.get(0) or item  # loading took time: rather a newer frame
            self._wanting = False
            began = time.thread_time()
            frame, detections = item
            # Of the same picture as the model that is judged, where a camera gives two.
            picture = frame.for_network(detector.spec.input_hw)
            whole_wh = frame.image.shape[1], frame.image.shape[0]
            theirs = shared.reference(detector(picture, self._score, 100, whole_wh))
            ours = shared.detections(detections.above(self._score))
            with self._lock:
                self._running.add(ours, theirs)
                self._compared += 1
            del item, frame, picture, detections  # a picture is a megabyte: not through the pause
            work_s = time.thread_time() - began
            if self._closing.wait(work_s * self._pause_per_work):
                return
            self._wanting = True


def open_accuracy(
    detector: OnnxDetector,
    source_classes: tuple[str, ...] | None,
    source_name: str,
    *,
    reference: str | None,
    score: float,
    budget_percent: float,
) -> Accuracy:
    """Chooses how a run is judged.

    Args:
        detector: The model that is judged.
        source_classes: Class names of a labelled source; None without labels.
        source_name: For the text.
        reference: A model file, ``none``, or None for the default: labels where there are some,
            else the shipped float detector.
        score: Score from which a box counts.
        budget_percent: Share of one core for the reference, in percent.

    Raises:
        ModelFileError: The named reference does not exist.
        DatasetError: Model and labelled source share no class.
    """
    classes = detector.spec.classes
    named = reference not in (None, "none")
    if source_classes is not None and not named:
        return LabelAccuracy(classes, source_classes, source_name, score)
    if reference == "none":
        return NoAccuracy("no labels, and no reference model (--reference none)")
    try:
        path = model_path(reference or "shipped-float")
    except ModelFileError:
        return NoAccuracy("no labels, and no reference model here; --reference FILE names one")
    if not is_file(path):
        message = (
            f"--reference: expected an ONNX model or 'none', found no file {path}; check the path"
        )
        raise ModelFileError(message)
    if filecmp.cmp(path, detector.path, shallow=False):
        return NoAccuracy("the model is its own reference; --reference FILE names another one")
    if not named:
        # The default reference knows COCO's classes: a model with others has just no figure.
        return ReferenceAccuracy(
            path, classes, score=score, budget_percent=budget_percent, required=False
        )
    return ReferenceAccuracy(path, classes, score=score, budget_percent=budget_percent)


def _put_agreement(figures: AccuracyFigures, agreement: Agreement) -> None:
    figures["precision"] = round(agreement.precision.value, 2)
    figures["recall"] = round(agreement.recall.value, 2)
    figures["f1"] = round(agreement.f1.value, 2)
    figures["f1_low"] = round(agreement.f1.low, 2)
    figures["f1_high"] = round(agreement.f1.high, 2)
