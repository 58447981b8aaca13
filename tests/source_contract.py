"""The contract that every source keeps; used by tests in this suite, and where cameras live."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np

GUARD_S = 60
"""No test should ever wait so long; it only keeps a hang from blocking the suite."""

Open = Callable[[], Any]


def frames_are_bgr_numbered_and_stamped(open_it: Open) -> None:
    source = open_it()
    assert source.state == "running"
    assert source.name
    frames = [source.read() for _ in range(10)]
    stamps = []
    for i, frame in enumerate(frames):
        assert frame is not None
        for image in (frame.image, *([] if frame.small is None else [frame.small])):
            assert image.dtype == np.uint8
            assert image.ndim == 3
            assert image.shape[2] == 3
        assert frame.image.shape == frames[0].image.shape
        assert frame.sequence == i
        stamps.append(frame.captured_s)
    assert stamps == sorted(stamps)
    assert stamps[-1] <= time.monotonic()
    assert abs(stamps[-1] - time.monotonic()) < GUARD_S
    different = [not np.array_equal(frames[0].image, frame.image) for frame in frames[1:]]
    assert any(different), "a later read must not overwrite a frame"


def close_is_idempotent_and_reopening_works(open_it: Open) -> None:
    source = open_it()
    assert source.read() is not None
    source.close()
    source.close()
    assert source.read() is None
    assert source.state == "ended"
    again = open_it()
    frame = again.read()
    assert frame is not None
    assert frame.sequence == 0


def close_from_another_thread_ends_reading(open_it: Open) -> None:
    source = open_it()

    def read_on() -> None:
        while source.read() is not None:
            time.sleep(0.001)

    reader = threading.Thread(target=read_on, daemon=True)
    reader.start()
    time.sleep(0.05)
    source.close()
    reader.join(GUARD_S)
    assert not reader.is_alive()


def a_slow_reader_gets_new_frames(open_it: Open, age_max_s: float = 0.5) -> None:
    """Only of sources that know when a picture was taken: after a pause it is a new one."""
    source = open_it()
    for _ in range(3):
        assert source.read() is not None
    ages = []
    for _ in range(4):
        time.sleep(0.4)
        frame = source.read()
        assert frame is not None
        ages.append(time.monotonic() - frame.captured_s)
    assert sorted(ages)[1] < age_max_s, ages


def no_old_frames_wait_for_a_slow_reader(open_it: Open, fps: float, waiting_max: int = 2) -> None:
    """Only of live sources: after a pause frames come at the camera's pace, not in a burst."""
    source = open_it()
    for _ in range(5):
        assert source.read() is not None
    time.sleep(30 / fps)
    began, count = time.monotonic(), waiting_max + 10
    for _ in range(count):
        assert source.read() is not None
    assert time.monotonic() - began > 0.6 * (count - waiting_max) / fps


ALWAYS = (
    frames_are_bgr_numbered_and_stamped,
    close_is_idempotent_and_reopening_works,
    close_from_another_thread_ends_reading,
)
