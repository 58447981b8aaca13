"""Zones in a run: who comes and goes is told once, counts are steady, pictures show the outline."""

from __future__ import annotations

import runpy
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cv2
import numpy as np
import pytest
from edgesight.device_app.live import LiveView
from edgesight.device_app.loop import Loop
from edgesight.device_app.sources import ListSource, Picture
from edgesight.device_app.zones import Zone, Zones
from edgesight.models.detector import OnnxDetector

kit: Any = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("app_kit.py"))))
loops: Any = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("loop_kit.py"))))
until = loops.until
pytestmark = pytest.mark.usefixtures("no_thread_left")

# The tiny detector's "bright" box ends at (0.25, 0.5) with its feet, "dark" at (0.75, 1).
LEFT = Zone("left", ((0.1, 0.3), (0.45, 0.3), (0.45, 0.7), (0.1, 0.7)))


class Light(ListSource):
    """A camera on a lamp that can be switched."""

    def __init__(self) -> None:
        super().__init__([], fps=60, live=True, paced=True)
        self.on = False

    def _next(self) -> Picture | None:
        return Picture(np.full((64, 64, 3), 240 if self.on else 20, np.uint8))


def test_coming_and_going_is_told_once_and_counted(tmp_path: Path) -> None:
    camera = Light()
    detector = OnnxDetector(kit.build_tiny(tmp_path / "a.onnx"))
    loop = Loop(camera, detector, track=True, zones=Zones([LEFT]))
    events = loop.live.events
    loop.start()
    until(lambda: loop.figures()["detections"] == {"dark": 1})
    assert loop.figures()["zones"] == {"left": {}}
    before = time.time()
    camera.on = True
    until(lambda: any(e.kind == "enter" for e in events.after()))
    assert loop.figures()["zones"] == {"left": {"bright": 1}}
    camera.on = False
    until(lambda: any(e.kind == "leave" for e in events.after()))
    enter, leave = events.after()
    assert (enter.kind, enter.data["zone"], enter.data["label"]) == ("enter", "left", "bright")
    assert leave.data["seconds"] > 0
    assert before - 1 < enter.time <= leave.time < time.time()
    assert loop.figures()["zones"] == {"left": {}}
    loop.stop()
    camera.close()
    loop.finish()


def test_end_of_the_run_lets_everybody_leave(tmp_path: Path) -> None:
    camera = Light()
    camera.on = True
    detector = OnnxDetector(kit.build_tiny(tmp_path / "a.onnx"))
    loop = Loop(camera, detector, track=True, zones=Zones([LEFT]))
    loop.start()
    until(lambda: len(loop.live.events.after()) == 1)
    loop.stop()
    camera.close()
    loop.finish()
    assert [e.kind for e in loop.live.events.after()] == ["enter", "leave"]


def test_zone_is_drawn_for_viewers_and_not_in_the_source(tmp_path: Path) -> None:
    camera = Light()
    live = LiveView()
    live.controls.plain = True
    live.controls.score_min = 1.0
    detector = OnnxDetector(kit.build_tiny(tmp_path / "a.onnx"))
    loop = Loop(camera, detector, live=live, display=True, zones=Zones([LEFT]))
    loop.start()
    live.viewer_came()
    found = live.wait_newer(-1, loops.GUARD_S)
    assert found is not None
    picture = cv2.imdecode(np.frombuffer(found[0], np.uint8), cv2.IMREAD_COLOR)
    assert picture is not None
    outline = picture[22:40, 5:9].max()  # its left edge
    assert outline > 100
    assert picture[50:, 40:].max() < 60, "nothing elsewhere"
    loop.stop()
    camera.close()
    loop.finish()


def test_zone_of_a_class_that_the_model_lacks_is_a_warning(tmp_path: Path) -> None:
    zone = Zone("door", LEFT.polygon, ("zebra",))
    camera = Light()
    detector = OnnxDetector(kit.build_tiny(tmp_path / "a.onnx"))
    loop = Loop(camera, detector, zones=Zones([zone]))
    assert any("zebra" in line for line in loop.figures()["warnings"])
