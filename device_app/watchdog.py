"""Keeps an eye on the loop's threads: who hangs, who fails again and again."""

from __future__ import annotations

import time

from ..models.errors import EdgeSightError

WARN_S = 20.0
"""So long a thread may be busy with one frame before the screen says so."""
FATAL_S = 120.0
"""A network that hangs for so long does not come back: the run ends, for a service to restart."""
FAILURES_MAX = 30
"""Frames in a row that may fail before the run ends."""
AWAY_S = 5.0
"""We are asked several times a second; a longer pause is no thread's fault."""
FAILED_SHOWN_S = 10.0
"""So long the screen says that a frame has failed."""
MENDS_ITSELF = ("capture", "encoding")
"""Threads whose hanging ends nothing: a source looks after itself, a picture is not the work."""


class Watchdog:
    """Knows since when each thread has been busy with its frame, and which frames failed."""

    def __init__(self) -> None:
        """Starts with every thread waiting."""
        self._since: dict[str, float] = {}
        self._looked_s = time.monotonic()
        self._in_a_row = 0
        self._failed_s, self._failed_why = -FAILED_SHOWN_S, ""
        self.failed = 0
        """Frames that failed, in all."""

    def begin(self, name: str) -> None:
        """A thread begins with a frame."""
        self._since[name] = time.monotonic()

    def end(self, name: str) -> None:
        """A thread waits for the next frame."""
        self._since.pop(name, None)

    def busy_s(self, name: str) -> float:
        """Returns how long a thread has been busy with its frame."""
        since = self._since.get(name)
        return 0.0 if since is None else time.monotonic() - since

    def warnings(self, quiet: tuple[str, ...] = (), now_s: float | None = None) -> list[str]:
        """Returns one line for each thread that hangs.

        Args:
            quiet: Threads of which nothing is to be said.
            now_s: Monotonic time in seconds.

        Raises:
            EdgeSightError: The network has been hanging for too long to wait on.
        """
        now = time.monotonic() if now_s is None else now_s
        away_s = now - self._looked_s
        self._looked_s = now
        if away_s > AWAY_S:  # the whole process was stopped, or the board asleep: nobody hung
            for name, since in list(self._since.items()):
                self._since[name] = since + away_s
        lines = []
        if now - self._failed_s < FAILED_SHOWN_S:
            lines.append(f"frames fail, {self.failed} so far: {self._failed_why}")
        for name, since in list(self._since.items()):
            busy_s = now - since
            if busy_s >= FATAL_S and name not in MENDS_ITSELF:
                message = (
                    f"{name} has been hanging for {busy_s:.0f} s, expected an end within "
                    f"{FATAL_S:.0f} s; start again, or try another --engine"
                )
                raise EdgeSightError(message)
            if busy_s >= WARN_S and name not in quiet:
                lines.append(f"{name} has been hanging for {busy_s:.0f} s")
        return lines

    def frame_done(self) -> None:
        """A frame went all the way."""
        self._in_a_row = 0

    def frame_failed(self, error: Exception) -> None:
        """A frame did not; the run goes on, unless they all fail.

        Raises:
            EdgeSightError: It is one too many in a row.
        """
        self.failed += 1
        self._failed_s, self._failed_why = time.monotonic(), str(error) or type(error).__name__
        self._in_a_row += 1
        if self._in_a_row >= FAILURES_MAX:
            message = (
                f"expected frames that can be read and run, found {FAILURES_MAX} in a row that "
                f"fail: {self._failed_why}; check the source, or try another --engine"
            )
            raise EdgeSightError(message) from error
