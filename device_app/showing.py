"""The picture that people see: boxes, zones and figures drawn on a copy, encoded once for all."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

import cv2
import numpy as np

from ..models.detections import Detections
from ..models.preprocess import Image
from .frame import Frame
from .latest import Latest
from .live import Controls, LiveView
from .stats import Stats
from .watchdog import Watchdog

if TYPE_CHECKING:  # an extra
    from .window import Window

DISPLAY_FPS_MAX = 20.0
"""More pictures per second than this cost CPU and look no better on a web page."""
JPEG_QUALITY = 80
AGAIN_S = 1.0
"""So long it rests after a picture that could not be drawn."""

Shown = tuple[Frame, Detections, tuple[str, ...]]
"""A frame, its boxes, and the names of their classes."""


class Showing:
    """Draws and encodes, in a thread of its own, only while somebody looks.

    Args:
        live: Where pictures go, and what viewers want to see.
        stats: Where times go.
        overlay: Draws more on a picture, in place.
    """

    def __init__(
        self, live: LiveView, stats: Stats, overlay: Callable[[Image], None] | None = None
    ) -> None:
        """Prepares nothing yet."""
        self.slot: Latest[Shown] = Latest()
        self._live, self._stats, self._overlay = live, stats, overlay
        self._screens: list[Window] = []
        self._told = ""

    def add_screen(self, screen: Window) -> None:
        """Shows everything on one more screen, which counts itself as a viewer."""
        self._screens.append(screen)

    def drawn(
        self, image: Image, detections: Detections, classes: tuple[str, ...], controls: Controls
    ) -> Image:
        """Returns a copy of a picture with everything on it that the controls ask for."""
        from ..models.draw import draw_detections
        from .hud import draw_hud

        began = time.perf_counter()
        picture = image.copy()
        if controls.boxes:
            draw_detections(picture, chosen(detections, classes, controls.classes), classes)
            if self._overlay is not None:
                self._overlay(picture)
        if not controls.plain:
            draw_hud(picture, self._live.figures())
        self._stats.times["draw"].add(time.perf_counter() - began)
        return picture

    def run(self, stop: threading.Event, watchdog: Watchdog) -> None:
        """Shows the newest frames until the slot is closed, or until ``stop`` is set."""
        interval_s = 1 / DISPLAY_FPS_MAX
        due_s = time.monotonic()
        while (item := self.slot.get()) is not None:
            watchdog.begin("encoding")
            try:
                self._show(*item)
            except Exception as error:  # a picture less is no reason to stop looking
                text = f"a picture could not be drawn: {error}"
                if text != self._told:
                    self._told = text
                    self._live.events.add("sink", text)
                due_s = time.monotonic() + AGAIN_S
            finally:
                watchdog.end("encoding")
            now = time.monotonic()
            due_s = max(due_s + interval_s, now)
            if due_s > now and stop.wait(due_s - now):
                break

    def _show(self, frame: Frame, found: Detections, classes: tuple[str, ...]) -> None:
        live, controls = self._live, self._live.controls
        picture = self.drawn(frame.image, found.above(controls.score_min), classes, controls)
        watching = [screen for screen in self._screens if screen.watching]
        for screen in watching:
            screen.show(picture, frame.sequence)
        if live.viewers > len(watching):
            began = time.perf_counter()
            ok, data = cv2.imencode(".jpg", picture, [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY])
            self._stats.times["encode"].add(time.perf_counter() - began)
            if not ok:
                return
            live.publish(data.tobytes(), frame.sequence)
        self._stats.latency.add(time.monotonic() - frame.captured_s)
        self._stats.display.tick()


def chosen(
    found: Detections, classes: tuple[str, ...], wanted: frozenset[str] | None
) -> Detections:
    """Returns the boxes of the classes that a viewer wants to see; None: of all."""
    if wanted is None:
        return found
    numbers = [i for i, name in enumerate(classes) if name in wanted]
    return found[np.isin(found.label, numbers)]
