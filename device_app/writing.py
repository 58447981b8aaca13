"""Gives what was seen to the sinks; one that fails does not take the others with it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..models.detections import Detections
from .events import Events
from .frame import Frame
from .live import Controls
from .showing import Showing
from .sinks import Seen, Sink


class Writing:
    """All sinks of a run.

    Args:
        sinks: That the run writes to.
        showing: Draws for those that want a picture.
        events: Where a sink's failure is told.
        all_or_nothing: Whether a sink that fails ends the run: a file that is read as a whole is
            read for the sake of what is written. A camera goes on without it.
    """

    def __init__(
        self, sinks: Sequence[Sink], showing: Showing, events: Events, all_or_nothing: bool
    ) -> None:
        """Begins with all of them."""
        self.written: list[Path] = []
        self.broken: list[tuple[Sink, Exception]] = []
        self._sinks, self._showing, self._events = list(sinks), showing, events
        self._all_or_nothing = all_or_nothing

    def write(self, frame: Frame, counted: Detections, classes: tuple[str, ...]) -> None:
        """Gives every sink the frame; one that fails is left out from then on.

        Raises:
            Exception: What a sink raised, if that ends the run.
        """
        plain = Seen(frame, counted, classes)
        drawn: Seen | None = None
        for sink in tuple(self._sinks):
            try:
                if sink.draws and drawn is None:
                    picture = self._showing.drawn(frame.image, counted, classes, Controls())
                    drawn = Seen(frame, counted, classes, picture)
                sink.write(drawn if sink.draws and drawn is not None else plain)
            except Exception as error:
                if self._all_or_nothing:
                    raise
                self._sinks.remove(sink)
                self.broken.append((sink, error))
                self._events.add("sink", str(error))

    def close(self, complete: bool) -> Exception | None:
        """Finishes all sinks, the whole ones as wanted; returns the first error there was."""
        first = self.broken[0][1] if self.broken else None
        for sink in self._sinks:
            try:
                if (path := sink.close(complete=complete)) is not None:
                    self.written.append(path)
            except Exception as problem:
                first = first or problem
        for sink, _ in self.broken:
            try:
                if (path := sink.close(complete=False)) is not None:
                    self.written.append(path)
            except Exception as problem:
                first = first or problem
        return first

    def warnings(self) -> list[str]:
        """Returns one line for each sink that failed."""
        return [str(error) for _, error in self.broken]
