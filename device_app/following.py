"""What goes on over many frames: objects that are followed, and what they do in zones."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence

from ..models.detections import Detections
from .events import Events
from .frame import Frame
from .sources import Source
from .stats import Stats
from .tracking import Tracker
from .zones import Change, Zones


class Following:
    """Turns the boxes of single frames into counts that do not flicker.

    Args:
        score: From which a box counts.
        track: Whether objects are followed from frame to frame.
        source: Says how its frames' times are to be read.
        stats: Where the time it takes goes.
        events: Where it is told who enters and leaves a zone.
        zones: Parts of the picture to watch; None: there are none.

    Attributes:
        counts: Objects on the newest frame, per class name.
    """

    def __init__(
        self,
        score: float,
        track: bool,
        source: Source,
        stats: Stats,
        events: Events,
        zones: Zones | None = None,
    ) -> None:
        """Starts with nothing seen."""
        self.counts: dict[str, int] = {}
        self.zones = zones
        self._score, self._source, self._stats, self._events = score, source, stats, events
        self._tracker = Tracker(score) if track else None
        self._classes: tuple[str, ...] = ()

    @property
    def floor(self) -> float:
        """Lowest score of boxes that it can use."""
        return self._score if self._tracker is None else min(self._score, self._tracker.floor)

    def update(self, found: Detections, frame: Frame, classes: tuple[str, ...]) -> Detections:
        """Takes a frame's boxes.

        Args:
            found: Down to ``floor``.
            frame: Where they were found.
            classes: Names of their classes; others than before after another model was chosen.

        Returns:
            The same boxes, with their tracks if they are followed.
        """
        if classes != self._classes:
            self._classes = classes
            if self._tracker is not None:
                self._tracker.forget()
        if self._tracker is None:
            numbers = Counter(found.above(self._score).label.tolist())
        else:
            began = time.perf_counter()
            found = self._tracker.update(found, self._time_s(frame))
            numbers = self._tracker.counts()
            self._stats.times["track"].add(time.perf_counter() - began)
        if self.zones is not None:
            self._watch(self.zones, found, frame)
        self.counts = {classes[i] if i < len(classes) else str(i): n for i, n in numbers.items()}
        return found

    def end(self) -> None:
        """Tells that everybody leaves; called once, after the last frame."""
        if self.zones is not None:
            self._tell(self.zones.end(), None)

    def _watch(self, zones: Zones, found: Detections, frame: Frame) -> None:
        """Looks who is in which zone; an object that is not sure yet is in none."""
        counted = found.above(self._score) if found.track is None else found[found.track > 0]
        height, width = frame.image.shape[:2]
        now_s = self._time_s(frame)
        self._tell(zones.update(counted, self._classes, (width, height), now_s), now_s)

    def _tell(self, changes: Sequence[Change], now_s: float | None) -> None:
        for change in changes:
            ago_s = 0.0 if now_s is None else now_s - change.time_s
            self._events.add(
                change.kind,
                change.text,
                time.time() - ago_s,
                zone=change.zone,
                label=change.label,
                track=change.track,
                seconds=change.seconds,
                xyxy=change.xyxy,
                score=change.score,
            )

    def _time_s(self, frame: Frame) -> float:
        """Returns when a frame was taken; those of a file may come faster than recorded."""
        source = self._source
        if not source.live and source.fps > 0:
            return frame.sequence / source.fps
        return frame.captured_s
