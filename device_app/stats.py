"""Times and rates of a run in bounded memory, however long it runs."""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from typing import TypedDict

import numpy as np

from .live import StageFigures

STAGES = ("capture", "preprocess", "inference", "postprocess", "track", "draw", "encode")
RECENT = 500
"""Samples per stage behind the percentiles on the screen."""
RATE_WINDOW_S = 3.0
"""Seconds behind the rates on the screen."""
_BIN = 1.01  # ratio of neighbouring bins, so percentiles of a whole run are within 1 %
_SMALLEST_MS = 1e-3
_BINS = math.ceil(math.log(1e5 / _SMALLEST_MS) / math.log(_BIN))  # up to 100 s


class StageSummary(TypedDict):
    """One stage over a whole run; milliseconds, and the number of samples."""

    p50: float
    p90: float
    p99: float
    mean: float
    n: int


class Times:
    """Durations of one stage: the latest ones as they are, the whole run as a histogram."""

    def __init__(self) -> None:
        """Starts with no sample."""
        self._recent: deque[float] = deque(maxlen=RECENT)
        self._counts = np.zeros(_BINS, np.int64)
        self._sum_ms = 0.0
        self._n = 0
        self._lock = threading.Lock()

    def add(self, seconds: float) -> None:
        """Adds one duration in seconds."""
        ms = seconds * 1e3
        place = int(math.log(max(ms, _SMALLEST_MS) / _SMALLEST_MS) / math.log(_BIN))
        with self._lock:
            self._recent.append(ms)
            self._counts[min(place, _BINS - 1)] += 1
            self._sum_ms += ms
            self._n += 1

    @property
    def n(self) -> int:
        """Number of samples."""
        return self._n

    @property
    def has_recent(self) -> bool:
        """Whether ``recent`` has something to tell."""
        return bool(self._recent)

    def forget_recent(self) -> None:
        """Lets ``recent`` begin anew, for instance with another model."""
        with self._lock:
            self._recent.clear()

    def recent(self) -> StageFigures:
        """Returns percentiles of the latest samples in milliseconds."""
        with self._lock:
            values = list(self._recent) or [0.0]  # forgotten since somebody asked for them
        p50, p90, p99 = (round(float(v), 3) for v in np.percentile(values, (50, 90, 99)))
        return {"p50": p50, "p90": p90, "p99": p99}

    def summary(self) -> StageSummary:
        """Returns percentiles of all samples in milliseconds, exact within 1 %."""
        with self._lock:
            counts, total, n = self._counts.copy(), self._sum_ms, self._n
        cumulated = np.cumsum(counts)
        places = np.searchsorted(cumulated, [n * 0.5, n * 0.9, n * 0.99])
        p50, p90, p99 = (
            round(float(v), 3) for v in _SMALLEST_MS * _BIN ** (np.minimum(places, _BINS - 1) + 0.5)
        )
        return {"p50": p50, "p90": p90, "p99": p99, "mean": round(total / max(n, 1), 3), "n": n}


class Rate:
    """Events per second: of the latest seconds, and of the whole run."""

    def __init__(self) -> None:
        """Starts with no event."""
        self._recent: deque[float] = deque(maxlen=4096)
        self._first_s: float | None = None
        self._last_s = 0.0
        self._n = 0
        self._lock = threading.Lock()

    def tick(self, now_s: float | None = None) -> None:
        """Counts an event; ``now_s`` is on the monotonic clock, in seconds."""
        now = time.monotonic() if now_s is None else now_s
        with self._lock:
            if self._first_s is None:
                self._first_s = now
            self._last_s = now
            self._n += 1
            self._recent.append(now)
            while self._recent[0] < now - RATE_WINDOW_S:
                self._recent.popleft()

    @property
    def n(self) -> int:
        """Number of events."""
        return self._n

    @property
    def last_s(self) -> float:
        """When the latest event was, on the monotonic clock in seconds."""
        return self._last_s

    def recent(self, now_s: float | None = None) -> float:
        """Returns events per second over the latest seconds; falls to 0 when they stop."""
        now = time.monotonic() if now_s is None else now_s
        with self._lock:
            times = [t for t in self._recent if t >= now - RATE_WINDOW_S]
        if len(times) < 2:
            return 0.0
        # Between events when they flow, up to now when the next one is overdue.
        gap = (times[-1] - times[0]) / (len(times) - 1)
        span = times[-1] - times[0] + max(0.0, now - times[-1] - 2 * gap)
        return (len(times) - 1) / span if span > 0 else 0.0

    def overall(self) -> float:
        """Returns events per second between the first and the last event; 0 if there are < 2."""
        with self._lock:
            first, last, n = self._first_s, self._last_s, self._n
        return (n - 1) / (last - first) if first is not None and last > first else 0.0


class Stats:
    """All times and rates of one run; every method is safe from any thread.

    The three rates are different things: ``capture`` counts frames that the source gave,
    ``inference`` frames that went through the detector, ``display`` pictures given to viewers.

    Args:
        times: By stage; those of an earlier run to go on with them.
    """

    def __init__(self, times: dict[str, Times] | None = None) -> None:
        """Starts the clock."""
        self.started_s = time.monotonic()
        self.times = {stage: Times() for stage in STAGES} if times is None else times
        self.latency = Times()
        """From capture to the encoded picture, handed to the viewers."""
        self.capture = Rate()
        self.inference = Rate()
        self.display = Rate()

    def new_detector(self) -> None:
        """Begins anew with the latest times of the stages that depend on the detector."""
        for stage in ("preprocess", "inference", "postprocess"):
            self.times[stage].forget_recent()

    def elapsed_s(self) -> float:
        """Returns seconds since the start."""
        return time.monotonic() - self.started_s

    def stages_ms(self) -> dict[str, StageFigures]:
        """Returns the latest percentiles of each stage that ran."""
        return {name: times.recent() for name, times in self.times.items() if times.has_recent}

    def summary_ms(self) -> dict[str, StageSummary]:
        """Returns the percentiles of each stage that ran, over the whole run."""
        return {name: times.summary() for name, times in self.times.items() if times.n}
