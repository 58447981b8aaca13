"""What the tests of the loop share; loaded with runpy."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
from edgesight.device_app.loop import Loop
from edgesight.models.detector import OnnxDetector
from edgesight.models.preprocess import Image

GUARD_S = 60


class SlowDetector(OnnxDetector):
    """Takes its time, as a big network on a small board does."""

    delay_s = 0.0

    def infer(self, tensor: Any) -> Any:
        time.sleep(self.delay_s)
        return super().infer(tensor)


def pictures(n: int) -> list[Image]:
    """Returns pictures whose brightness tells their number: 100, 102, ..."""
    return [np.full((64, 64, 3), 100 + 2 * (i % 70), np.uint8) for i in range(n)]


def run(loop: Loop) -> Loop:
    loop.start()
    assert loop.wait(GUARD_S)
    loop.finish()
    return loop


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + GUARD_S
    while not condition():
        assert time.monotonic() < deadline, "it never came"
        time.sleep(0.005)
