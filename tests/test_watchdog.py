"""Who hangs is told, what does not come back ends the run, and a sleeping board is no fault."""

from __future__ import annotations

import time

import pytest
from edgesight.device_app.watchdog import FATAL_S, WARN_S, Watchdog
from edgesight.models.errors import EdgeSightError


def looked(dog: Watchdog, seconds: float, quiet: tuple[str, ...] = ()) -> list[str]:
    """Looks four times a second for so long, as the loop does; returns what was said last."""
    start, said = time.monotonic(), []
    for step in range(round(seconds * 4) + 1):
        said = dog.warnings(quiet, start + step / 4)
    return said


def test_thread_that_hangs_is_told_and_ends_the_run_in_the_end() -> None:
    dog = Watchdog()
    dog.begin("inference")
    assert looked(dog, WARN_S - 1) == []
    assert looked(dog, WARN_S + 1) == ["inference has been hanging for 21 s"]
    with pytest.raises(EdgeSightError, match="inference has been hanging for 120 s"):
        looked(dog, FATAL_S + 1)
    dog.end("inference")
    assert looked(dog, FATAL_S + 1) == []


def test_camera_and_pictures_that_hang_end_nothing() -> None:
    dog = Watchdog()
    dog.begin("capture")
    dog.begin("encoding")
    assert len(looked(dog, FATAL_S + 1)) == 2
    assert looked(dog, FATAL_S + 1, quiet=("capture", "encoding")) == []


def test_board_that_was_asleep_is_no_thread_that_hangs() -> None:
    dog = Watchdog()
    dog.begin("inference")
    now = time.monotonic()
    assert dog.warnings((), now) == []
    assert dog.warnings((), now + 10 * FATAL_S) == []


def test_frames_that_fail_are_told_and_too_many_in_a_row_end_the_run() -> None:
    dog = Watchdog()
    for _ in range(29):
        dog.frame_failed(ValueError("torn"))
    assert dog.warnings() == ["frames fail, 29 so far: torn"]
    dog.frame_done()
    for _ in range(29):
        dog.frame_failed(ValueError("torn"))
    with pytest.raises(EdgeSightError, match="30 in a row that fail: torn"):
        dog.frame_failed(ValueError("torn"))
