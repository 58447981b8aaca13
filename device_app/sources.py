"""Where frames come from: one protocol for every source, and what all of them share."""

from __future__ import annotations

import re
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple, Protocol

import cv2
import numpy as np

from ..models.dataset import GroundTruth
from ..models.errors import SourceError
from ..models.preprocess import Image
from .frame import Frame

BACKOFF_FIRST_S = 0.5
BACKOFF_MAX_S = 10.0
TURNS: dict[int, int | None] = {
    0: None,
    90: cv2.ROTATE_90_CLOCKWISE,
    180: cv2.ROTATE_180,
    270: cv2.ROTATE_90_COUNTERCLOCKWISE,
}
WARNINGS_MAX = 20
CLOSE_WAIT_S = 0.2
"""So long ``close`` waits for a read that is under way; then it leaves the device to its thread."""


class Picture(NamedTuple):
    """What a source has read.

    Attributes:
        image: uint8 ``(height, width, 3)``, BGR.
        truth: The boxes that are known to be there.
        small: The same view with fewer pixels, for the network.
        captured_s: When it was taken, on the monotonic clock in seconds; None: now.
    """

    image: Image
    truth: GroundTruth | None = None
    small: Image | None = None
    captured_s: float | None = None


class Source(Protocol):
    """A source of frames; ``read`` is called from one thread, everything else from any.

    Attributes:
        name: What people call it; without passwords.
        still: Whether its pictures have nothing to do with each other, as photos in a folder.
        live: Whether it goes on whether or not anybody reads: a camera or a stream.
        fps: Frames per second that it means to give; 0 if unknown.
        waited_s: Seconds of the latest ``read`` that were only waiting for the next frame's time.
        state: ``running``, ``retrying: why`` or ``ended``.
        classes: Names behind the labels of its frames' ground truth; None without labels.
        warnings: Lines that a person should see at the end of a run.
    """

    name: str
    live: bool
    still: bool
    fps: float
    waited_s: float
    state: str
    classes: tuple[str, ...] | None
    warnings: list[str]

    def read(self) -> Frame | None:
        """Returns the next frame, waiting for it; None at the end and after ``close``.

        Raises:
            SourceError: A live source was lost, or a picture cannot be read.
        """
        ...

    def close(self) -> None:
        """Gives the device back; may be called twice, and while ``read`` waits."""
        ...


class Pacer:
    """Holds a file back to its recorded speed.

    Args:
        fps: Frames per second; 0 for no pacing.
    """

    def __init__(self, fps: float) -> None:
        """Starts with the first frame due at once."""
        self._interval_s = 1 / fps if fps > 0 else 0.0
        self._due_s: float | None = None

    def wait(self, closing: threading.Event) -> float:
        """Waits until the next frame is due or ``closing`` is set; returns the seconds waited."""
        now = time.monotonic()
        if not self._interval_s:
            return 0.0
        if self._due_s is None or now - self._due_s > 1.0:  # the first, or far behind: no burst
            self._due_s = now
        delay = self._due_s - now
        if delay > 0:
            closing.wait(delay)
        self._due_s += self._interval_s
        return time.monotonic() - now


class BaseSource(ABC):
    """What all sources share: numbering, time stamps, pacing, and an orderly end.

    Args:
        name: What people call it.
        fps: Frames per second that it means to give; 0 if unknown.
        paced: Whether ``read`` holds back to ``fps``.
        rotate_deg: Clockwise turn of the pictures: 0, 90, 180 or 270.
    """

    live = False
    still = False

    def __init__(self, name: str, fps: float, *, paced: bool = False, rotate_deg: int = 0) -> None:
        """Starts before the first frame."""
        self.name = name
        self.fps = fps
        self.waited_s = 0.0
        self.state = "running"
        self.classes: tuple[str, ...] | None = None
        self.warnings: list[str] = []
        self._pacer = Pacer(fps if paced else 0.0)
        self._closing = threading.Event()
        self._lock = threading.Lock()
        self._released = False
        self._sequence = 0
        self._turn = TURNS[rotate_deg]
        self._captured_s = 0.0

    def read(self) -> Frame | None:
        """Returns the next frame, or None at the end."""
        waited = self._pacer.wait(self._closing)
        with self._lock:
            self.waited_s = waited
            try:
                picture = None if self._closing.is_set() else self._next()
            finally:
                if self._closing.is_set():
                    self._release_once()
        if picture is None:
            self.state = "ended"
            return None
        self._sequence += 1
        image, truth, small, captured_s = picture
        if self._turn is not None:
            image = np.asarray(cv2.rotate(image, self._turn), np.uint8)
            small = None if small is None else np.asarray(cv2.rotate(small, self._turn), np.uint8)
        now = time.monotonic()
        # Never from the future, and never before the frame that came before.
        self._captured_s = max(
            self._captured_s, min(now, now if captured_s is None else captured_s)
        )
        return Frame(image, self._sequence - 1, self._captured_s, truth, small)

    def close(self) -> None:
        """Ends a waiting ``read`` and gives the device back."""
        self._closing.set()
        # A device must not be released under a read; a stuck read releases it when it comes back.
        if self._lock.acquire(timeout=CLOSE_WAIT_S):
            try:
                self._release_once()
            finally:
                self._lock.release()

    def _release_once(self) -> None:
        if not self._released:
            self._released = True
            self._release()

    @abstractmethod
    def _next(self) -> Picture | None:
        """Returns the next picture (BGR) and its ground truth, or None at the end."""

    def _release(self) -> None:  # noqa: B027 - files kept in memory have nothing to give back
        """Gives the device back."""


class ReopeningSource:
    """A live source that is opened again when it dies, with growing pauses.

    Args:
        open_one: Opens the source; what it raises at the first time goes to the caller.
        first_s: Seconds before the first attempt; doubles with each.
        longest_s: Seconds between attempts at most.
    """

    live = True
    still = False

    def __init__(
        self,
        open_one: Callable[[], Source],
        *,
        first_s: float = BACKOFF_FIRST_S,
        longest_s: float = BACKOFF_MAX_S,
    ) -> None:
        """Opens the source for the first time."""
        self._open_one = open_one
        self._first_s, self._longest_s = first_s, longest_s
        self._closing = threading.Event()
        self._inner: Source | None = open_one()
        self._sequence = 0
        self.name = self._inner.name
        self.fps = self._inner.fps
        self.waited_s = 0.0
        self.state = "running"
        self.classes: tuple[str, ...] | None = None
        self.warnings: list[str] = list(self._inner.warnings)

    def read(self) -> Frame | None:
        """Returns the next frame, however long the source is away; None only after ``close``."""
        pause_s = self._first_s
        started = time.monotonic()
        while not self._closing.is_set():
            inner = self._inner
            if inner is None:
                self._closing.wait(pause_s)
                pause_s = min(pause_s * 2, self._longest_s)
                self._reopen()
                continue
            why = "it gave no further frame"
            try:
                frame = inner.read()
            except SourceError as error:
                frame, why = None, self._reason(error)
            if frame is not None:
                lost = self.state != "running"
                self.waited_s = time.monotonic() - started if lost else inner.waited_s
                self.state = "running"
                self._sequence += 1
                return replace(frame, sequence=self._sequence - 1)
            if not self._closing.is_set():
                self.state = f"retrying: {why}"
                self.warnings.append(f"{self.name} was lost after {self._sequence} frames: {why}")
                del self.warnings[:-WARNINGS_MAX]
            self._inner = None
            inner.close()
        self.state = "ended"
        return None

    def close(self) -> None:
        """Ends a waiting ``read`` and gives the device back."""
        self._closing.set()
        inner = self._inner  # the reading thread may take it away meanwhile
        if inner is not None:
            inner.close()

    def _reopen(self) -> None:
        if self._closing.is_set():
            return
        try:
            inner = self._open_one()
        except SourceError as error:
            self.state = f"retrying: {self._reason(error)}"
            return
        self._inner = inner
        self.warnings += [line for line in inner.warnings if line not in self.warnings]
        del self.warnings[:-WARNINGS_MAX]
        if self._closing.is_set():  # closed while it was being opened
            inner.close()

    def _reason(self, error: SourceError) -> str:
        """Returns what was expected and found: the screen has no room for more."""
        return str(error).split(";")[0].removeprefix(f"{self.name}: ")


class ListSource(BaseSource):
    """Pictures from memory: the fake that tests use in place of a camera.

    Args:
        images: BGR pictures in order.
        fps: Frames per second.
        live: What it says about itself.
        paced: Whether ``read`` holds back to ``fps``.
        loop: Whether it starts again at its end.
    """

    def __init__(
        self,
        images: Sequence[Image],
        *,
        fps: float = 30.0,
        live: bool = False,
        paced: bool = False,
        loop: bool = False,
    ) -> None:
        """Keeps the pictures."""
        super().__init__("list", fps, paced=paced)
        self.live = live
        self._images, self._loop, self._at = images, loop, 0

    def _next(self) -> Picture | None:
        if self._loop and self._images:
            self._at %= len(self._images)
        if self._at >= len(self._images):
            return None
        self._at += 1
        return Picture(self._images[self._at - 1])


def redacted(address: str) -> str:
    """Returns an address without the user name and password in it."""
    return re.sub(r"(?<=://)[^/\s]*@", "***@", address)
