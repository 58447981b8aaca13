"""Recording what the viewers see, from some seconds before the button on.

::

    LiveView ---> edgesight-recording ---> edgesight-recording-disk, one for each recording
                  (keeps the last seconds,  (writes what waits for it, gives the file its name,
                   never waits for a disk)   makes it WebM if that is wanted)

The JPEGs of the live page go into the file as they are, with the times at which they came: nothing
is encoded again. Such a file (Matroska) plays in VLC, mpv and ffmpeg, not in a browser: browsers
take no JPEGs as video, and OpenCV's encoders for what they take are too slow for a small board. So
WebM is made afterwards, if at all, at the lowest priority.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from ..models.errors import InputError, OutputError
from . import recordings_folder as files
from .live import LiveView, RecordingFigures
from .recordings_folder import RecordingsFolder, VideoFile

WAITING_MAX_BYTES = 32 << 20
"""Of pictures before the button, and of those that wait for a slow disk; the oldest go first."""
CHECK_S = 2.0
"""Seconds between two looks at the disk; a power cut costs about as much of a recording."""
POLL_S = 0.5
END_WAIT_S = 10.0
"""So long ``stop`` waits for a slow disk; the recording is finished later, then."""

Shot = tuple[float, bytes]
"""When a picture came, by the monotonic clock, and its JPEG."""


class Waiting:
    """Pictures as they came, bounded in bytes and perhaps in seconds; ``lost`` found no room."""

    def __init__(self, seconds: float | None = None) -> None:
        """Starts empty."""
        self.shots: deque[Shot] = deque()
        self.lost = 0
        self._bytes, self._seconds = 0, seconds

    def add(self, shot: Shot) -> None:
        """Adds the newest; the oldest make room."""
        self.shots.append(shot)
        self._bytes += len(shot[1])
        while self._bytes > WAITING_MAX_BYTES:
            self.take()
            self.lost += 1
        self.forget(shot[0])

    def take(self) -> Shot:
        """Takes the oldest out."""
        shot = self.shots.popleft()
        self._bytes -= len(shot[1])
        return shot

    def forget(self, now_s: float) -> None:
        """Throws away what is too old by now."""
        while self._seconds is not None and self.shots:
            if self.shots[0][0] >= now_s - self._seconds:
                break
            self.take()


class Take:
    """One recording on its way into its file; all but ``write`` never wait for the disk.

    Args:
        name: That the file is to have.
        file: Where it grows.
        folder: Whose space it takes.
        before: Pictures from before the button, which is pressed now.
        seconds_max: It ends so long after the button.

    Attributes:
        waiting: Pictures that are not written yet.
        stopped: Whether no more of them are taken.
        written: Set when all is done, told, and the file has its name.
        error: Why it ended by itself, if it did.
        seconds: How long it plays by now.
        removed: Names of older recordings that made room for it.
    """

    def __init__(
        self,
        name: str,
        file: BinaryIO,
        folder: RecordingsFolder,
        before: Sequence[Shot],
        seconds_max: float,
    ) -> None:
        """Begins."""
        self.name, self.stopped, self.seconds = name, False, 0.0
        self.written = threading.Event()
        self.error: str | None = None
        self.removed: list[str] = []
        self.waiting = Waiting()
        for shot in before:
            self.waiting.add(shot)
        self._file, self._folder, self._seconds_max = file, folder, seconds_max
        self._checked_s = time.monotonic()
        self._end_s = self._checked_s + seconds_max
        # It gets the size that pictures have now, even if those before had another.
        self._size_wh = files.jpeg_size(before[-1][1]) if before else None
        self._first_s = 0.0
        self._last: Shot | None = None
        self._video: VideoFile | None = None
        self._changed = threading.Condition()

    def offer(self, shot: Shot) -> None:
        """Takes a picture that came."""
        with self._changed:
            if not self.stopped:
                self.waiting.add(shot)
                self._changed.notify()

    def stop(self) -> None:
        """Ends it now; what waits is still written."""
        with self._changed:
            if not self.stopped:
                self.stopped = True
                self._end_s = min(self._end_s, time.monotonic())
                self._changed.notify()

    def write(self) -> Path | None:
        """Writes to the end and gives the file its name; returns it if there is one."""
        try:
            while (shot := self._next()) is not None:
                self._put(shot)
        except Exception as error:  # whatever it is: it is shown, and the run goes on
            self._fail(error)
        self.stop()
        try:
            return self._finish()
        except Exception as error:
            self._fail(error)
            return None
        finally:
            with contextlib.suppress(OSError):
                self._file.close()

    def _fail(self, error: Exception) -> None:
        shown = self._folder.cannot_write(error) if isinstance(error, OSError) else error
        self.error = self.error or str(shown) or type(error).__name__

    def _next(self) -> Shot | None:
        """Waits for a picture; None at the end."""
        while True:
            self._check()
            with self._changed:
                if not self.waiting.shots and not self.stopped:
                    self._changed.wait(POLL_S)
                shot = self.waiting.take() if self.waiting.shots else None
                if shot is None and self.stopped:
                    return None
            if (shot[0] if shot else time.monotonic()) > self._end_s:
                self.error = f"it had {self._seconds_max:g} s, the longest that one may be"
                return None
            if shot is not None:
                return shot

    def _put(self, shot: Shot) -> None:
        time_s, jpeg = shot
        size_wh = files.jpeg_size(jpeg)
        if size_wh is None:
            return
        if self._video is None:
            self._size_wh, self._first_s = self._size_wh or size_wh, time_s
            self._video = VideoFile(self._file, files.MJPEG, self._size_wh)
        assert self._size_wh is not None
        if size_wh != self._size_wh:  # another camera: its pictures are fitted into this size
            jpeg = files.encoded(jpeg, self._size_wh, ".jpg")
        self._video.add(round((time_s - self._first_s) * 1000), jpeg)
        self._last = (time_s, jpeg)
        self.seconds = time_s - self._first_s

    def _check(self) -> None:
        if (now := time.monotonic()) < self._checked_s + CHECK_S:
            return
        self._checked_s = now
        self._folder.check_space()
        self.removed += self._folder.make_room(self._video.length if self._video else 0)
        os.fsync(self._file.fileno())

    def _finish(self) -> Path | None:
        part = self._folder.part(self.name)
        if self._video is None or self._last is None:
            part.unlink(missing_ok=True)
            self.error = self.error or "no picture came; is anything running?"
            return None
        end_s = max(self._end_s, self._last[0])
        end_ms = round((end_s - self._first_s) * 1000)
        with contextlib.suppress(OSError):  # the full disk that ended it
            self._video.add(end_ms, self._last[1])  # so that players show the last one to the end
        self._video.finish(end_ms)
        self.seconds = end_ms / 1000
        with contextlib.suppress(InputError, OSError):  # the recording itself is whole
            self.removed += self._folder.make_room(self._video.length)
        return part.replace(self._folder.folder / self.name)


class Recorder:
    """Records what the viewers see; every method is safe from any thread.

    Args:
        live: Where the pictures come from. While one records, the recorder is a viewer of it.
        folder: Where recordings go; made with the first.
        pre_roll_s: Seconds before the button that a recording begins with. Only pictures that
            were made then can be kept: while nobody looked, there were none, unless ``always``.
        seconds_max: A recording ends by itself so long after the button.
        bytes_max_total: Of all recordings in the folder; the oldest go first.
        always: Whether pictures are made all the time, so that there always is pre-roll.
        webm: Whether recordings are made WebM afterwards, which browsers play: some 20 ms of a
            PC's core for a picture of 640x480, several times that on a small board.

    Raises:
        InputError: A number is out of its range.
    """

    def __init__(
        self,
        live: LiveView,
        folder: Path,
        *,
        pre_roll_s: float = 5.0,
        seconds_max: float = 600.0,
        bytes_max_total: int = 2_000_000_000,
        always: bool = False,
        webm: bool = False,
    ) -> None:
        """Starts to follow the pictures, and to mend what a crash left."""
        lengths = ("pre_roll_s", pre_roll_s, 0.0), ("seconds_max", seconds_max, 1.0)
        for name, value, least in (*lengths, ("bytes_max_total", bytes_max_total, 1e6)):
            if not least <= value < float("inf"):
                message = f"{name}: expected {least:g} or more, found {value}; choose another"
                raise InputError(message)
        self._live, self._pre_roll_s, self._seconds_max = live, pre_roll_s, seconds_max
        self._always, self._webm = always, webm
        self._folder = RecordingsFolder(folder, bytes_max_total)
        self._before = Waiting(pre_roll_s)
        self._take: Take | None = None
        self._error: str | None = None
        self._lock = threading.Lock()  # of these; never held while a disk works
        self._buttons = threading.Lock()  # one start at a time
        self._making = threading.Lock()  # one WebM at a time
        self._closed = threading.Event()
        self._threads: list[threading.Thread] = []
        old = live.wait_newer(-1, 0.0)  # from some time or other
        if always:
            live.viewer_came()
        self._run("edgesight-recording", self._follow, -1 if old is None else old[1])
        if left := self._folder.leftovers():
            self._run("edgesight-recording-mend", self._mend, left)

    def start(self) -> str:
        """Begins a recording and returns its name; the running one's if there is one.

        Raises:
            OutputError: It cannot be written.
        """
        with self._buttons:
            take = self._take
            if take is not None and not take.stopped:
                return take.name
            try:
                if take is not None and not take.written.wait(END_WAIT_S):
                    message = "expected a disk that keeps up, found it still busy; try again later"
                    raise OutputError(message)
                if self._closed.is_set() or self._live.closed:
                    message = "expected a run that goes on, found that it is over; start it again"
                    raise OutputError(message)
                name, file = self._folder.create()
            except OutputError as error:
                self._error = str(error)
                raise
            with self._lock:
                self._before.forget(time.monotonic())
                take = Take(name, file, self._folder, [*self._before.shots], self._seconds_max)
                self._take, self._error = take, None
            self._live.viewer_came()
            self._tell(f"began {name}", name=name)
            self._run("edgesight-recording-disk", self._write, take)
            return name

    def stop(self) -> str | None:
        """Ends the recording, waits until its file has its name, and returns that, if any."""
        if (take := self._take) is None:
            return None
        take.stop()
        take.written.wait(END_WAIT_S)
        return take.name

    def state(self) -> RecordingFigures:
        """Returns how it is; never waits."""
        take = self._take
        name, seconds = (take.name, round(take.seconds, 1)) if take else (None, 0.0)
        return {
            "on": take is not None, "name": name, "seconds": seconds,
            "pre_roll_s": self._pre_roll_s, "error": self._error,
        }  # fmt: skip

    def open_file(self, name: str) -> Path | None:
        """Returns the file of a finished recording; None for every other name."""
        return self._folder.open_file(name)

    def delete(self, name: str) -> bool:
        """Removes a finished recording; returns whether there was one, or raises OutputError."""
        if there := self._folder.delete(name):
            self._tell(f"deleted {name}", name=name)
        return there

    def list(self) -> Sequence[files.RecordingEntry]:
        """Returns the finished recordings, the newest first."""
        return self._folder.entries()

    def close(self) -> None:
        """Ends a recording and the threads; may be called twice."""
        with self._buttons:
            first = not self._closed.is_set()
            self._closed.set()
        self.stop()
        if self._always and first:
            self._live.viewer_left()
        until = time.monotonic() + END_WAIT_S
        for thread in self._threads:
            thread.join(max(0.0, until - time.monotonic()))

    def _run(self, name: str, target: Callable[..., None], *args: object) -> None:
        thread = threading.Thread(target=target, args=args, name=name, daemon=True)
        self._threads = [*filter(threading.Thread.is_alive, self._threads), thread]
        thread.start()

    def _tell(self, text: str, **data: Any) -> None:
        self._live.events.add("recording", text, **data)

    def _follow(self, sequence: int) -> None:
        while not self._closed.is_set():
            newer = self._live.wait_newer(sequence, POLL_S)
            now = time.monotonic()
            with self._lock:
                self._before.forget(now)
                if newer is not None:
                    self._before.add((now, newer[0]))
                    sequence = newer[1]
                    if self._take is not None:
                        self._take.offer((now, newer[0]))
            if newer is None and self._live.closed:
                break
        if (take := self._take) is not None:
            take.stop()

    def _write(self, take: Take) -> None:
        path = take.write()
        for name in take.removed:
            self._tell(f"removed {name}: there were too many recordings", name=name)
        text = f"ended {take.name}: {take.seconds:.1f} s" + (
            f"; {take.error}" if take.error else ""
        )
        self._tell(text, name=take.name, seconds=take.seconds, lost=take.waiting.lost)
        self._live.viewer_left()
        with self._lock:
            self._take, self._error = None, take.error
        take.written.set()
        if path is not None and self._webm:
            self._make_webm(path)

    def _make_webm(self, path: Path) -> None:
        with contextlib.suppress(OSError, AttributeError):  # of this thread, on Linux
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 19)
        with self._making:
            try:
                made = files.to_webm(path, self._folder, self._closed.is_set)
            except Exception as error:  # the recording itself is there
                self._tell(f"{path.name} stays as it is, no WebM: {error}", name=path.name)
                return
        if made is not None:
            self._tell(f"{path.name} is {made.name} now", name=made.name, before=path.name)

    def _mend(self, left: Sequence[Path]) -> None:
        for part in left:
            try:
                done = files.mend(part)
            except OSError as error:
                done = self._error = f"cannot mend {part}: {error.strerror or error}; remove it"
            if done is not None:
                self._tell(done, name=part.stem)
