"""What the loop hands to its viewers: the newest encoded picture, the figures, the controls."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass
from typing import TypedDict

from .events import Events
from .health import HealthFigures

SCORE_DEFAULT = 0.35
"""Score from which a box counts as a detection: drawn, written, and compared for accuracy."""


class StageFigures(TypedDict):
    """Percentiles of one stage over its latest frames, in milliseconds."""

    p50: float
    p90: float
    p99: float


class AccuracyFigures(TypedDict, total=False):
    """How good the boxes are, and how we know; only ``kind`` and ``text`` are always there.

    ``precision``, ``recall``, ``f1`` and ``ap50`` are in percent, None until there is a frame.
    """

    kind: str
    """``labels``: against the source's own boxes; ``agreement``: with a reference model; ``none``.
    """
    text: str
    """One line for people: what is shown, or why nothing is."""
    precision: float | None
    recall: float | None
    f1: float | None
    f1_low: float | None
    """95 % interval of ``f1``."""
    f1_high: float | None
    ap50: float | None
    """Only with ``labels``."""
    frames: int
    """Frames behind the figures."""
    reference: str | None
    """Name of the reference model, or of the labels."""


class Figures(TypedDict, total=False):
    """Everything that a HUD or a web page shows; JSON-ready. Keys may be absent at the start."""

    model: str
    source: str
    source_state: str
    """``running``, ``retrying: why`` or ``ended``."""
    frames: int
    """Frames that went through the detector."""
    dropped: int
    """Frames that the camera gave and that were never looked at, because newer ones came."""
    capture_fps: float
    inference_fps: float
    display_fps: float
    stages_ms: dict[str, StageFigures]
    """By stage: capture, preprocess, inference, postprocess, draw, encode; only those that ran."""
    accuracy: AccuracyFigures
    detections: dict[str, int]
    """Boxes on the newest frame, per class name."""
    elapsed_s: float
    latency_ms: StageFigures
    """From capture to the encoded picture, handed to the viewers; only while somebody looks."""
    board: HealthFigures
    classes: list[str]
    """Names of everything that the model knows."""
    zones: dict[str, dict[str, int]]
    """By zone: objects inside it, per class name; only with zones."""
    recording: RecordingFigures
    mqtt: str
    """``connected`` or ``retrying: why``; only with a broker."""
    warnings: list[str]
    """What does not work while the run goes on; one line each."""


class RecordingFigures(TypedDict):
    """How the recording is."""

    on: bool
    name: str | None
    """Of the file that grows; None while nothing is recorded."""
    seconds: float
    pre_roll_s: float
    """Seconds before the button that a recording begins with, if there were pictures."""
    error: str | None
    """Why the last one ended by itself."""


@dataclass
class Controls:
    """What a viewer may change while the loop runs; plain attributes, read once per frame.

    Attributes:
        boxes: Whether boxes are drawn.
        score_min: Score 0..1 from which a box is drawn. Accuracy and files keep the run's own.
        classes: Names of the classes whose boxes are drawn; None: all.
        plain: Whether the figures stay off the picture: a plain mode for cameras.
    """

    boxes: bool = True
    score_min: float = SCORE_DEFAULT
    classes: frozenset[str] | None = None
    plain: bool = False


class LiveView:
    """Hand-over between the loop and its viewers; every method is safe from any thread.

    One picture is encoded for all viewers; a slow one misses pictures and holds up nobody.

    Args:
        controls: The viewers' settings; new ones by default.

    Attributes:
        events: What happens in the run.
    """

    def __init__(self, controls: Controls | None = None) -> None:
        """Starts with no picture and no figures."""
        self.controls = controls or Controls()
        self.events = Events()
        self._condition = threading.Condition()
        self._jpeg: bytes | None = None
        self._sequence = -1
        self._figures: Figures = {}
        self._viewers = 0
        self._closed = False

    @property
    def viewers(self) -> int:
        """Number of connected viewers."""
        return self._viewers

    @property
    def closed(self) -> bool:
        """Whether the run is over: no newer picture will come."""
        return self._closed

    def viewer_came(self) -> None:
        """Counts one more viewer; from now on pictures are encoded."""
        with self._condition:
            self._viewers += 1

    def viewer_left(self) -> None:
        """Counts one viewer less."""
        with self._condition:
            self._viewers = max(0, self._viewers - 1)

    def publish(self, jpeg: bytes, sequence: int) -> None:
        """Makes this the newest picture and wakes everybody who waits for one.

        Args:
            jpeg: The encoded picture.
            sequence: Number of its frame; rises.
        """
        with self._condition:
            self._jpeg, self._sequence = jpeg, sequence
            self._condition.notify_all()

    def wait_newer(self, sequence: int, timeout_s: float) -> tuple[bytes, int] | None:
        """Blocks until there is a picture newer than ``sequence``.

        Args:
            sequence: Number of the picture that the caller has; -1 for none.
            timeout_s: Seconds to wait at most.

        Returns:
            The picture as JPEG and its number; None after the time, or at once when the run is
            over (``closed``).
        """
        until = time.monotonic() + timeout_s
        with self._condition:
            while self._jpeg is None or self._sequence <= sequence:
                left = until - time.monotonic()
                if self._closed or left <= 0:
                    return None
                self._condition.wait(left)
            return self._jpeg, self._sequence

    def set_figures(self, figures: Figures) -> None:
        """Replaces the figures; the caller must not change them afterwards."""
        self._figures = figures

    def figures(self) -> Figures:
        """Returns the newest figures, JSON-ready."""
        return self._figures.copy()

    def close(self) -> None:
        """Says that the run is over and wakes everybody who waits."""
        with self._condition:
            self._closed = True
            self._condition.notify_all()
