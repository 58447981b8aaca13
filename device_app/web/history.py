"""The last minutes of a run in bounded memory, so that a new viewer sees the past."""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
from collections import deque
from typing import Any

from ..live import LiveView

INTERVAL_S = 1.0
KEPT = 600
SEEN_MAX = 200
"""Classes whose last sight is remembered."""
COLUMNS = (
    "inference_fps", "inference_ms", "latency_ms", "accuracy", "accuracy_low", "accuracy_high",
    "temperature_c", "cpu_percent",
)  # fmt: skip


class History:
    """Keeps one row of figures a second; everything here runs in the server's event loop.

    Args:
        live: Where the figures come from.
        kept: Rows that are kept.
    """

    def __init__(self, live: LiveView, kept: int = KEPT) -> None:
        """Starts empty."""
        self._live = live
        self._rows: deque[tuple[float, tuple[float | None, ...]]] = deque(maxlen=kept)
        self._latest = 0
        self._seen: dict[str, float] = {}

    async def follow(self) -> None:
        """Takes a row a second until the run is over or the task is cancelled."""
        due_s = time.monotonic()
        while not self._live.closed:
            with contextlib.suppress(Exception):  # a row less is better than no more rows
                self.sample(time.monotonic())
            due_s = max(due_s + INTERVAL_S, time.monotonic())
            await asyncio.sleep(due_s - time.monotonic())

    def sample(self, now_s: float) -> None:
        """Takes one row.

        Args:
            now_s: Monotonic time in seconds.
        """
        figures: dict[str, Any] = dict(self._live.figures())
        if "frames" not in figures:  # the run has not begun
            return
        accuracy = figures.get("accuracy", {})
        labels = accuracy.get("kind") == "labels"
        latency = figures.get("latency_ms", {}) if self._live.viewers else {}  # else: of long ago
        board = figures.get("board", {})
        row = (
            figures.get("inference_fps"),
            figures.get("stages_ms", {}).get("inference", {}).get("p50"),
            latency.get("p50"),
            accuracy.get("ap50") if labels else accuracy.get("f1"),
            None if labels else accuracy.get("f1_low"),
            None if labels else accuracy.get("f1_high"),
            board.get("temperature_c"),
            board.get("cpu_percent"),
        )
        self._rows.append((now_s, tuple(_number(value) for value in row)))
        self._latest += 1
        for name in figures.get("detections", {}):
            self._seen.pop(name, None)
            self._seen[name] = now_s
        while len(self._seen) > SEEN_MAX:
            del self._seen[next(iter(self._seen))]

    def after(self, number: int, now_s: float) -> dict[str, Any]:
        """Returns the rows after one, by column, JSON-ready.

        Args:
            number: Of the last row that the viewer has; 0 for none.
            now_s: Monotonic time in seconds.
        """
        first = self._latest - len(self._rows)
        rows = [row for i, row in enumerate(self._rows, first + 1) if i > number]
        return {
            "latest": self._latest,
            "interval_s": INTERVAL_S,
            "kept": self._rows.maxlen,
            "age_s": [round(now_s - at, 1) for at, _ in rows],
            **{name: [values[i] for _, values in rows] for i, name in enumerate(COLUMNS)},
            "seen_s": {name: round(now_s - at, 1) for name, at in self._seen.items()},
        }


def _number(value: Any) -> float | None:
    known = isinstance(value, (int, float)) and math.isfinite(value)
    return round(value, 2) if known else None
