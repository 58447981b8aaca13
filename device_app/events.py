"""What happens in a run, told once to everybody who wants to know: page, MQTT, files."""

from __future__ import annotations

import threading
import time
from collections import deque
from dataclasses import asdict, dataclass, field
from typing import Any

KEPT = 200
"""Events that a viewer who comes later still gets."""
WAITING_MAX = 1000
"""Events that wait for a slow listener; the oldest go first."""


@dataclass(frozen=True)
class Event:
    """One thing that happened.

    Attributes:
        kind: ``enter``, ``leave`` (of a zone), ``source`` (lost, back), ``model`` (swapped,
            refused, rolled back), ``recording`` (begun, ended), ``sink`` (a file failed), ``page``
            (it fails).
        text: One line for people.
        time: Unix time in seconds.
        data: More of it, JSON-ready; keys depend on the kind.
        number: Its place in the run, from 1; given by ``Events.add``.
    """

    kind: str
    text: str
    time: float = field(default_factory=time.time)
    data: dict[str, Any] = field(default_factory=dict)
    number: int = 0

    def to_dict(self) -> dict[str, Any]:
        """Returns it JSON-ready."""
        return {**asdict(self), "time": round(self.time, 3)}


class Events:
    """Where events are told and heard; every method is safe from any thread and never waits."""

    def __init__(self) -> None:
        """Starts with none."""
        self._lock = threading.Lock()
        self._latest: deque[Event] = deque(maxlen=KEPT)
        self._listeners: list[Listener] = []
        self._number = 0

    def add(self, kind: str, text: str, time_s: float | None = None, **data: Any) -> Event:
        """Tells everybody.

        Args:
            kind: As in ``Event``.
            text: One line for people.
            time_s: Unix time; now by default.
            **data: More of it, JSON-ready.
        """
        with self._lock:
            self._number += 1
            when = time.time() if time_s is None else time_s
            event = Event(kind, text, when, data, self._number)
            self._latest.append(event)
            listeners = tuple(self._listeners)
        for listener in listeners:
            listener.hear(event)
        return event

    def after(self, number: int = 0) -> list[Event]:
        """Returns the latest events with a higher number, the oldest first."""
        with self._lock:
            return [event for event in self._latest if event.number > number]

    def listen(self) -> Listener:
        """Returns somebody who hears everything from now on, until closed."""
        listener = Listener(self)
        with self._lock:
            self._listeners.append(listener)
        return listener

    def forget(self, listener: Listener) -> None:
        """Tells a listener nothing any more."""
        with self._lock:
            if listener in self._listeners:
                self._listeners.remove(listener)


class Listener:
    """A queue of events with an end; made by ``Events.listen``.

    Attributes:
        missed: Events that were thrown away because nobody took them in time.
    """

    def __init__(self, events: Events) -> None:
        """Starts empty."""
        self.missed = 0
        self._events = events
        self._condition = threading.Condition()
        self._waiting: deque[Event] = deque()
        self._closed = False

    def hear(self, event: Event) -> None:
        """Puts an event into the queue; the oldest goes if there are too many."""
        with self._condition:
            if len(self._waiting) >= WAITING_MAX:
                self._waiting.popleft()
                self.missed += 1
            self._waiting.append(event)
            self._condition.notify()

    def get(self, timeout_s: float) -> Event | None:
        """Takes the next event; None after the time, or once it is closed and empty."""
        until = time.monotonic() + timeout_s
        with self._condition:
            while not self._waiting:
                left = until - time.monotonic()
                if self._closed or left <= 0:
                    return None
                self._condition.wait(left)
            return self._waiting.popleft()

    @property
    def closed(self) -> bool:
        """Whether nothing new comes in any more."""
        return self._closed

    def close(self) -> None:
        """Ends it; what waits can still be taken."""
        self._events.forget(self)
        with self._condition:
            self._closed = True
            self._condition.notify_all()
