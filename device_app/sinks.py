"""Where results go besides the screen: a JSONL file of detections, an annotated video."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TextIO

import cv2
import numpy as np

from ..models.detections import Detections
from ..models.errors import OutputError
from ..models.files import check_replaceable
from ..models.preprocess import Image
from .frame import Frame
from .sources_opencv import quiet_opencv

FREE_MIN_BYTES = 4 << 20
"""A video stops when less is free: OpenCV does not say when the disk is full."""
FILL_MAX_S = 10.0
LINE_MAX = 1 << 20
"""Bytes; a frame has a hundred boxes at most."""


@dataclass(frozen=True, eq=False)
class Seen:
    """A frame that went through the detector, and what was found.

    Attributes:
        frame: As it came from the source.
        detections: Those at or above the run's score.
        classes: Names of their classes; others after another model was chosen.
        picture: The annotated picture, for sinks that draw; else None.
    """

    frame: Frame
    detections: Detections
    classes: tuple[str, ...]
    picture: Image | None = None


class Sink(Protocol):
    """Takes every frame that went through the detector; all calls come from one thread.

    Attributes:
        draws: Whether it wants the picture with boxes and figures drawn on it.
    """

    draws: bool

    def write(self, seen: Seen) -> None:
        """Takes one frame.

        Raises:
            OutputError: It cannot be written.
        """
        ...

    def close(self, complete: bool = True) -> Path | None:
        """Finishes the result, so that it can be used; may be called twice.

        Args:
            complete: False if the run failed: then the result keeps its temporary name, and an
                earlier one stays as it was.

        Returns:
            Where the result is; None if there is none.

        Raises:
            OutputError: It cannot be finished.
        """
        ...

    def discard(self) -> None:
        """Takes back what was begun, leaving an earlier result as it was."""
        ...


class MemorySink:
    """Keeps everything: the fake that tests use in place of a file."""

    def __init__(self, draws: bool = False) -> None:
        """Starts empty."""
        self.draws = draws
        self.items: list[Seen] = []
        self.closed = False

    def write(self, seen: Seen) -> None:
        """Keeps one frame."""
        self.items.append(seen)

    def close(self, complete: bool = True) -> Path | None:
        """Notes it."""
        self.closed = True
        return None

    def discard(self) -> None:
        """Forgets everything."""
        self.items.clear()


class JsonlSink:
    """One JSON object per frame and line: ``sequence``, ``time``, ``detections``.

    ``time`` is Unix time in seconds at which the frame was captured; a detection has ``label``,
    ``score`` and ``xyxy`` in pixels. The file grows as ``NAME.part`` and gets its name at the end.

    Args:
        path: Of the file.

    Raises:
        OutputError: The file cannot be created.
    """

    draws = False

    def __init__(self, path: Path) -> None:
        """Creates the growing file."""
        self._path = path
        self._part = _part_of(path)
        self._clock_offset_s = time.time() - time.monotonic()
        self._file: TextIO | None = None
        try:
            self._file = self._part.open("w", encoding="utf-8")
        except OSError as error:
            raise _cannot_write(path, error) from error

    def write(self, seen: Seen) -> None:
        """Writes one line."""
        if self._file is None:
            return
        line = {
            "sequence": seen.frame.sequence,
            "time": round(seen.frame.captured_s + self._clock_offset_s, 3),
            "detections": seen.detections.to_dicts(seen.classes),
        }
        try:
            self._file.write(json.dumps(line) + "\n")
        except OSError as error:
            self._fail()
            raise _cannot_write(self._path, error) from error

    def close(self, complete: bool = True) -> Path | None:
        """Gives the file its name; what a full disk cut short keeps its temporary one."""
        if self._file is None:
            return _left_behind(self._part) if self._part.exists() else None
        try:
            self._file.close()
            self._file = None
            if not complete:
                return _left_behind(self._part)
            self._part.replace(self._path)
            return self._path
        except OSError as error:
            self._fail()
            raise _cannot_write(self._path, error) from error

    def _fail(self) -> None:
        """Keeps the lines that are whole: they may be of many hours."""
        file, self._file = self._file, None
        with contextlib.suppress(OSError):  # the same full disk again; what matters has been told
            if file is not None:
                file.close()
        with contextlib.suppress(OSError), self._part.open("r+b") as kept:
            size = kept.seek(0, os.SEEK_END)
            start = max(0, size - LINE_MAX)
            kept.seek(start)
            end = kept.read().rfind(b"\n")
            kept.truncate(start + end + 1)

    def discard(self) -> None:
        """Removes the growing file."""
        file, self._file = self._file, None
        try:
            if file is not None:
                file.close()
        except OSError:
            pass  # the same full disk again; what matters has been told
        self._part.unlink(missing_ok=True)


class VideoSink:
    """The picture with its boxes as a video file (MPEG-4 in MP4), finished at any end of the run.

    It plays as fast as what it shows: frames that were dropped are filled with the one before.

    Args:
        path: Of the file; its suffix says the container: .mp4, .mkv or .avi.
        fps: Frames per second that it plays at.
        live: Whether capture times say when a frame is due; otherwise their numbers do.

    Raises:
        OutputError: The file cannot be created.
    """

    draws = True

    def __init__(self, path: Path, fps: float, *, live: bool = False) -> None:
        """Checks that the file can be created."""
        self._path, self._fps, self._live = path, fps if fps > 0 else 30.0, live
        if path.suffix.lower() not in (".mp4", ".mkv", ".avi"):
            message = (
                f"{path}: expected a video file .mp4, .mkv or .avi, found {path.suffix!r}; "
                "choose one of these"
            )
            raise OutputError(message)
        # The container is chosen by the suffix, so .part comes before it.
        self._part = _part_of(path).with_suffix(f".part{path.suffix}")
        self._writer: Any = None
        self._size_wh = (0, 0)
        self._frames = 0  # that should be there by now; those that are:
        self._written = 0
        self._first: Frame | None = None
        self._closed = False
        self._lock = threading.RLock()  # OpenCV crashes if a file is closed while it is written
        quiet_opencv()
        try:
            self._part.touch()
        except OSError as error:
            raise _cannot_write(path, error) from error

    def write(self, seen: Seen) -> None:
        """Writes one frame; pictures of another size than the first's are fitted into it."""
        frame, picture = seen.frame, seen.picture
        if picture is None or self._closed:
            return
        if self._writer is None:
            self._open(picture)
            self._first = frame
        assert self._first is not None
        due = frame.sequence - self._first.sequence
        if self._live:
            due = round((frame.captured_s - self._first.captured_s) * self._fps)
        shown = fitted(picture, self._size_wh)
        # Not for ever: after a long loss of the camera the video jumps.
        for _ in range(min(due + 1 - self._frames, round(FILL_MAX_S * self._fps))):
            with self._lock:
                if self._closed:
                    return
                if self._written % 50 == 0:
                    self._check_space()
                self._writer.write(shown)
                self._written += 1
        self._frames = max(self._frames, due + 1)

    def close(self, complete: bool = True) -> Path | None:
        """Writes the end of the file, checks that it can be read, and gives it its name."""
        with self._lock:
            if self._closed:
                return None
            self._closed = True
        if self._writer is None:  # no frame came: no video
            self._part.unlink(missing_ok=True)
            return None
        self._writer.release()
        if not complete:
            return _left_behind(self._part)
        check = cv2.VideoCapture(os.fspath(self._part), cv2.CAP_FFMPEG)
        readable = check.isOpened() and check.read()[0]
        check.release()
        try:
            if not readable:
                self._part.unlink(missing_ok=True)
                message = (
                    f"{self._path}: expected a finished video, found a file that cannot be read "
                    "back; is the disk full?"
                )
                raise OutputError(message)
            self._part.replace(self._path)
            return self._path
        except OSError as error:
            raise _cannot_write(self._path, error) from error

    def discard(self) -> None:
        """Removes the growing file."""
        with self._lock:
            self._closed = True
        if self._writer is not None:
            self._writer.release()
        self._part.unlink(missing_ok=True)

    def _open(self, picture: Image) -> None:
        height, width = picture.shape[:2]
        self._size_wh = (width - width % 2, height - height % 2)  # MPEG-4 wants even sizes
        fourcc = cv2.VideoWriter.fourcc(*"mp4v")
        writer = cv2.VideoWriter(os.fspath(self._part), fourcc, self._fps, self._size_wh)
        if not writer.isOpened():
            self._closed = True
            self._part.unlink(missing_ok=True)
            message = (
                f"{self._path}: expected a video writer for {width}x{height} px, found that this "
                "OpenCV cannot open one; install opencv-python-headless from PyPI"
            )
            raise OutputError(message)
        self._writer = writer

    def _check_space(self) -> None:
        free = shutil.disk_usage(self._part.parent).free
        if free < FREE_MIN_BYTES:
            self.close(complete=False)
            message = (
                f"{self._path}: expected space for a video, found {free >> 20} MB free after "
                f"{self._written} frames; free space or choose another place"
            )
            raise OutputError(message)


def _part_of(path: Path) -> Path:
    try:
        check_replaceable(path)
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _cannot_write(path, error) from error
    return path.with_name(path.name + ".part")


def _left_behind(part: Path) -> Path | None:
    """Returns what a failed run left, or removes it if there is nothing in it."""
    if part.stat().st_size:
        return part
    part.unlink()
    return None


def _cannot_write(path: Path, error: OSError) -> OutputError:
    reason = error.strerror or str(error)
    return OutputError(f"cannot write {path}: {reason}; free space or choose another place")


def fitted(picture: Image, size_wh: tuple[int, int]) -> Image:
    """Returns the picture in the video's size, its aspect kept, the rest black."""
    width, height = size_wh
    if picture.shape[1::-1] == size_wh:
        return picture
    scale = min(width / picture.shape[1], height / picture.shape[0])
    new_wh = (
        max(1, min(width, round(picture.shape[1] * scale))),
        max(1, min(height, round(picture.shape[0] * scale))),
    )
    canvas = np.zeros((height, width, 3), np.uint8)
    left, top = (width - new_wh[0]) // 2, (height - new_wh[1]) // 2
    resized = cv2.resize(picture, new_wh, interpolation=cv2.INTER_AREA)
    canvas[top : top + new_wh[1], left : left + new_wh[0]] = resized
    return canvas
