"""Another detector takes over while frames flow, and gives back what it cannot do."""

from __future__ import annotations

import runpy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from edgesight.device_app.accuracy import NoAccuracy
from edgesight.device_app.loop import Loop
from edgesight.device_app.sinks import MemorySink
from edgesight.device_app.sources import ListSource
from edgesight.device_app.work import Judged
from edgesight.models.detector import OnnxDetector

kit: Any = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("app_kit.py"))))
loops: Any = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("loop_kit.py"))))
until, GUARD_S = loops.until, loops.GUARD_S
pytestmark = pytest.mark.usefixtures("no_thread_left")
BRIGHT = [np.full((64, 64, 3), 230, np.uint8)]


def judged(path: Path, **changes: Any) -> Judged:
    return Judged(OnnxDetector(kit.build_tiny(path, **changes)), NoAccuracy("a test"))


def camera() -> ListSource:
    return ListSource(BRIGHT, fps=200, live=True, paced=True, loop=True)


def test_frames_are_never_begun_by_one_detector_and_ended_by_another(tmp_path: Path) -> None:
    first = judged(tmp_path / "a.onnx")
    other = judged(tmp_path / "b.onnx", classes=("lamp", "night"), shift=4)
    sink = MemorySink()
    loop = Loop(camera(), first.detector, sinks=[sink], track=True)
    loop.start()
    for turn in range(20):
        n = len(sink.items)
        until(lambda n=n: len(sink.items) > n + 2)
        loop.handover.swap(other if turn % 2 == 0 else first, frames=2)
    until(lambda: loop.figures()["model"] == "a")
    loop.finish()
    seen = {(s.classes, round(float(s.detections.xyxy[0, 0]))) for s in sink.items}
    # 4 of 32 input pixels are 8 of 64 in the picture.
    assert seen == {(("bright", "dark"), 0), (("lamp", "night"), 8)}
    numbers = [s.frame.sequence for s in sink.items]
    assert numbers == sorted(set(numbers))


def test_objects_of_another_models_classes_are_new_objects(tmp_path: Path) -> None:
    first = judged(tmp_path / "a.onnx")
    loop = Loop(camera(), first.detector, track=True)
    loop.start()
    until(lambda: loop.figures()["detections"] == {"bright": 1})
    loop.handover.swap(judged(tmp_path / "b.onnx", classes=("lamp", "night")), frames=1)
    until(lambda: loop.figures()["detections"] == {"lamp": 1})
    assert loop.figures()["classes"] == ["lamp", "night"]
    loop.finish()


def test_detector_that_fails_on_trial_gives_the_one_before_back(tmp_path: Path) -> None:
    class Failing(OnnxDetector):
        broken = False

        def infer(self, tensor: Any) -> Any:
            if self.broken:
                message = "illegal instruction"
                raise RuntimeError(message)
            return super().infer(tensor)

    bad = Failing(kit.build_tiny(tmp_path / "b.onnx"))
    bad.broken = True
    sink = MemorySink()
    loop = Loop(camera(), judged(tmp_path / "a.onnx").detector, sinks=[sink])
    loop.start()
    until(lambda: len(sink.items) > 3)
    trial = loop.handover.swap(Judged(bad, NoAccuracy("a test")), frames=30)
    assert trial.done.wait(GUARD_S)
    assert "illegal instruction" in str(trial.error)
    n = len(sink.items)
    until(lambda: len(sink.items) > n + 20)
    assert loop.figures()["model"] == "a"
    loop.finish()


def test_trial_ends_after_its_frames(tmp_path: Path) -> None:
    loop = Loop(camera(), judged(tmp_path / "a.onnx").detector)
    loop.start()
    trial = loop.handover.swap(judged(tmp_path / "b.onnx"), frames=5)
    assert trial.done.wait(GUARD_S)
    assert trial.error is None
    assert trial.frames == 0
    loop.finish()
