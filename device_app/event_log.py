"""The events of a run in a file: one JSON object a line, for ``tail -F`` and log shippers.

It does what ``logging.handlers`` do in two classes (rotation by size, and a look whether the file
is still the one at its path), but a line that a full disk cut off is finished once there is room:
those would leave the half of it in the file, and report the failure to nobody but stderr.
"""

from __future__ import annotations

import contextlib
import json
import os
import threading
import time
from pathlib import Path

from ..models.errors import OutputError
from ..models.files import check_replaceable
from .events import Event, Events

BYTES_MAX = 10_000_000
FILES = 5
RETRY_S = 2.0
"""Seconds between two attempts to write what could not be written."""
TELL_S = 60.0
"""A disk that fails and works in turns is told of no more often than this."""
QUIET_S = 60.0
"""Waiting for an event is begun anew after this."""
CLOSE_S = 2.0
"""So long ``close`` waits; a disk that hangs must not hold up the end of the run."""


class EventLog:
    """Appends every event to a file, from a thread of its own.

    What cannot be written waits, as much as a ``Listener`` holds, and is tried again; that is told
    once, as an event of the kind ``sink``. Lines that were lost show as gaps in ``number``.

    Args:
        path: Of the file, in a folder that exists; an earlier one is continued. No folder is made,
            at no time: while a disk is not mounted, its log would fill the one below.
        events: What to write.
        bytes_max: Size at which the file becomes ``NAME.1``, that ``NAME.2``, and so on.
        files: Older files that are kept, at least 1.

    Raises:
        OutputError: The file cannot be written.
    """

    def __init__(
        self, path: Path, events: Events, *, bytes_max: int = BYTES_MAX, files: int = FILES
    ) -> None:
        """Opens the file and starts to listen."""
        self.path = path
        self._bytes_max, self._files = bytes_max, max(1, files)
        self._handle = -1
        self._at = 0  # bytes of the line that are in the file
        self._error: str | None = None
        self._told, self._told_s = False, -TELL_S
        try:
            check_replaceable(path)
            self._new = not path.exists()
            self._open()
        except (OSError, ValueError) as error:  # of a name that no file can have
            reason = getattr(error, "strerror", None) or str(error)
            message = (
                f"cannot write {path}: {reason}; create its folder, free space or choose another "
                "place"
            )
            raise OutputError(message) from error
        self._events, self._listener = events, events.listen()
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="edgesight-event-log", daemon=True)
        self._thread.start()

    @property
    def error(self) -> str | None:
        """Why events cannot be written at the moment, in one line; None while all is well."""
        return self._error

    @property
    def missed(self) -> int:
        """Events that were thrown away because the file could not be written for too long."""
        return self._listener.missed

    def close(self) -> None:
        """Writes what waits and closes the file; may be called twice."""
        self._listener.close()
        self._closing.set()
        self._thread.join(CLOSE_S)
        if self._new and not self._thread.is_alive():  # of a run that did not begin
            with contextlib.suppress(OSError):
                if self.path.stat().st_size == 0:
                    self.path.unlink()

    def _run(self) -> None:
        while True:
            last = self._listener.closed  # asked first: what came until then is still taken
            event = self._listener.get(QUIET_S)
            if event is None:
                if last:
                    break
                continue
            if not self._kept_trying(_line(event)):
                break  # still a full disk, and the run is over
        self._shut()

    def _kept_trying(self, line: bytes) -> bool:
        """Writes a line, whatever time it takes; False if ``close`` came before that."""
        while not self._written(line):
            if self._closing.wait(RETRY_S):
                return self._written(line)
        return True

    def _written(self, line: bytes) -> bool:
        """Writes a line, or as much of it as can be; returns whether it is in the file."""
        problem = None
        try:
            if self._replaced():
                self._shut()
                self._open()
            if self._at == 0 and self._full(len(line)):
                try:
                    self._rotate()
                except OSError as error:  # a file that grows is better than one that ends
                    problem = f"{self.path.name}: cannot be rotated: {error.strerror or error}"
                    if self._handle < 0:
                        self._open()
            while self._at < len(line):
                self._at += os.write(self._handle, line[self._at :])
        except OSError as error:
            reason = error.strerror or str(error)
            self._settle(f"{self.path.name}: events cannot be written: {reason}; tried again")
            return False
        self._at = 0
        self._settle(problem)
        return True

    def _settle(self, problem: str | None) -> None:
        """Notes how it is; tells a problem once, and no other one a moment later."""
        self._error = problem
        if problem is None:
            self._told = False
            return
        now = time.monotonic()
        # Telling puts a line into our own queue: never one for each line that fails.
        if not self._told and now - self._told_s >= TELL_S:
            self._told, self._told_s = True, now
            self._events.add("sink", problem, file=self.path.name)

    def _open(self) -> None:
        """Opens the file to continue it, in a line of its own."""
        flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | getattr(os, "O_BINARY", 0)
        handle = os.open(self.path, flags, 0o666)
        try:
            size = os.fstat(handle).st_size
            if size:  # after a loss of power it may end in the middle of one
                os.lseek(handle, size - 1, os.SEEK_SET)
                if os.read(handle, 1) != b"\n":
                    os.write(handle, b"\n")
        except OSError:
            os.close(handle)
            raise
        self._handle, self._at = handle, 0

    def _shut(self) -> None:
        handle, self._handle = self._handle, -1
        if handle >= 0:
            with contextlib.suppress(OSError):
                os.close(handle)

    def _replaced(self) -> bool:
        """Returns whether the file at the path is not the one that is open, or there is none."""
        if self._handle < 0:
            return True
        try:
            there = self.path.stat()
        except OSError:
            return True
        return not os.path.samestat(there, os.fstat(self._handle))

    def _full(self, more: int) -> bool:
        size = os.fstat(self._handle).st_size
        return size > 0 and size + more > self._bytes_max

    def _rotate(self) -> None:
        """Moves the files on by one, the last one out, and begins a new one."""
        self._shut()  # first: some systems do not rename what is open
        places = [self.path, *(Path(f"{self.path}.{i}") for i in range(1, self._files + 1))]
        # Only up to a gap: if one of them cannot be moved, trying again throws nothing away.
        gap = next((i for i, place in enumerate(places) if not place.exists()), self._files)
        for i in range(gap, 0, -1):
            places[i - 1].replace(places[i])
        self._open()


def _line(event: Event) -> bytes:
    """Returns an event as one line; without its data if that is nothing for JSON."""
    try:
        text = json.dumps(event.to_dict(), allow_nan=False)
    except (TypeError, ValueError):
        bare = Event(event.kind, event.text, event.time, {}, event.number)
        text = json.dumps(bare.to_dict())
    return text.encode() + b"\n"
