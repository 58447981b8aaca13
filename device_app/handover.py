"""From one detector to another while frames flow, and back again if the new one fails."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field

from .work import Judged


@dataclass(eq=False)
class Trial:
    """A detector that has just taken over, while the one before waits whether it is needed again.

    Attributes:
        old: The one before.
        new: The one on trial.
        frames: That it still has to see without failing.
        done: Whether it is over.
        error: Why the one before came back; None if it did not.
    """

    old: Judged
    new: Judged
    frames: int
    done: threading.Event = field(default_factory=threading.Event)
    error: Exception | None = None


class Handover:
    """Which detector takes the next frame; every method is safe from any thread.

    Args:
        first: The run's own.

    Attributes:
        now: The one that takes the next frame.
    """

    def __init__(self, first: Judged) -> None:
        """Begins with the run's own."""
        self.now = first
        self._trial: Trial | None = None
        self._lock = threading.Lock()

    def swap(self, new: Judged, frames: int) -> Trial:
        """Lets another detector take the frames from the next one on.

        Args:
            new: The detector, loaded and warm, and how it is judged.
            frames: If it fails within so many frames, the one before comes back by itself.

        Returns:
            How that goes. The one before is kept until the trial is over.
        """
        with self._lock:
            trial = Trial(self.now, new, frames)
            self._trial, self.now = trial, new
        return trial

    def settle(self, trial: Trial) -> None:
        """Ends a trial before its frames have come; the new detector stays."""
        with self._lock:
            if self._trial is trial:
                self._trial = None
        trial.done.set()

    def passed(self, judged: Judged) -> None:
        """A frame went all the way with a detector."""
        trial = self._trial
        if trial is not None and trial.new is judged:
            trial.frames -= 1
            if trial.frames <= 0:
                self.settle(trial)

    def failed(self, judged: Judged, error: Exception) -> bool:
        """A frame failed with a detector.

        Returns:
            Whether that is dealt with: the one before is back, or came back already.
        """
        with self._lock:
            trial = self._trial
            if trial is not None and trial.new is judged:
                self.now, self._trial = trial.old, None
                trial.error = error
                trial.done.set()
                return True
            return judged is not self.now
