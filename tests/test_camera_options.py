"""What cameras are asked for: told on the command line, refused where there is no camera."""

from __future__ import annotations

import argparse
from typing import Any

import cv2
import numpy as np
import pytest
from edgesight.__main__ import main
from edgesight.device_app import sources_opencv
from edgesight.device_app.camera_options import (
    CameraOptions,
    add_camera_arguments,
    camera_options,
)
from edgesight.device_app.open_source import open_source
from edgesight.device_app.sources import BaseSource, Picture, ReopeningSource
from edgesight.models.errors import SourceError
from edgesight.models.preprocess import Placement


def parsed(*words: str) -> CameraOptions:
    parser = argparse.ArgumentParser()
    add_camera_arguments(parser)
    return camera_options(parser.parse_args(words))


def test_nothing_asked_leaves_the_camera_alone() -> None:
    assert parsed() == CameraOptions()
    assert parsed().given == []


def test_everything_asked() -> None:
    line = [
        "--size",
        "1280x720",
        "--fps",
        "12.5",
        "--rotate",
        "270",
        "--focus",
        "2.5",
        "--exposure-us",
        "8000",
    ]
    options = parsed(*line)
    assert options == CameraOptions((1280, 720), 12.5, 270, "fixed", 2.5, 8000)
    assert options.given == ["--size", "--fps", "--rotate", "--focus", "--exposure-us"]
    assert parsed("--focus", "auto") == CameraOptions(focus="auto")
    assert parsed("--focus", "0").focus_dioptres == 0


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--size", "1280"),
        ("--size", "0x720"),
        ("--size", "99999x9"),
        ("--fps", "0"),
        ("--fps", "nan"),
        ("--rotate", "45"),
        ("--focus", "sharp"),
        ("--focus", "-1"),
        ("--exposure-us", "0"),
    ],
)
def test_bad_values_end_with_2(option: str, value: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["run", option, value])
    assert ended.value.code == 2
    assert option in capsys.readouterr().err


@pytest.mark.parametrize("source", ["samples", "rtsp://127.0.0.1:1/x"])
def test_what_only_cameras_have_is_refused_elsewhere(source: str) -> None:
    with pytest.raises(SourceError, match="expected a camera for --size, --rotate"):
        open_source(source, camera=CameraOptions(size_wh=(640, 480), rotate_deg=90))


class FakeCapture:
    """A V4L2 camera that can do one size and has no focus motor."""

    def __init__(self) -> None:
        self.values = {cv2.CAP_PROP_FRAME_WIDTH: 640.0, cv2.CAP_PROP_FRAME_HEIGHT: 480.0}

    def set(self, key: int, value: float) -> bool:
        if key in (cv2.CAP_PROP_AUTOFOCUS, cv2.CAP_PROP_FOCUS):
            return False
        if key in (cv2.CAP_PROP_FRAME_WIDTH, cv2.CAP_PROP_FRAME_HEIGHT):
            return True  # and goes on as before, as many do
        self.values[key] = value
        return True

    def get(self, key: int) -> float:
        return self.values.get(key, 0.0)


def test_what_a_webcam_does_not_do_is_told() -> None:
    camera: Any = FakeCapture()
    asked = CameraOptions(size_wh=(1920, 1080), fps=15, focus="auto", exposure_us=5000)
    assert sources_opencv._set(camera, asked) == [
        "asked for 1920x1080 px, gives 640x480",
        "asked for focus, does not do it",
    ]
    assert camera.get(cv2.CAP_PROP_EXPOSURE) == 50, "V4L2 counts in 100 microseconds"
    assert sources_opencv._set(camera, CameraOptions(size_wh=(640, 480))) == []


@pytest.mark.parametrize(
    ("text", "options"),
    [
        ("0", CameraOptions(focus="fixed", focus_dioptres=2)),
        ("jetson", CameraOptions(focus="auto")),
    ],
)
def test_a_focus_that_a_camera_does_not_have_is_refused(text: str, options: CameraOptions) -> None:
    with pytest.raises(SourceError, match="--focus"):
        open_source(text, camera=options)


def test_a_cameras_warnings_reach_the_person() -> None:
    def open_it() -> Any:
        source = Corner("corner", 0)
        source.warnings.append("asked for much, gives little")
        return source

    assert ReopeningSource(open_it).warnings == ["asked for much, gives little"]


@pytest.mark.parametrize(
    ("input_hw", "small"), [((20, 30), True), ((16, 16), True), ((32, 24), False)]
)
def test_a_network_gets_the_small_picture_where_that_has_its_pixels(
    input_hw: tuple[int, int], small: bool
) -> None:
    frame = Corner("corner", 0).read()
    assert frame is not None
    assert (frame.for_network(input_hw) is frame.small) == small


class Corner(BaseSource):
    """A white corner on the upper left of a black picture; in two sizes."""

    def _next(self) -> Picture:
        large, small = np.zeros((40, 60, 3), np.uint8), np.zeros((20, 30, 3), np.uint8)
        large[0, 0] = small[0, 0] = 255
        return Picture(large, small=small, captured_s=self._sequence * 1e9)


@pytest.mark.parametrize(
    ("degrees", "shape", "corner"),
    [
        (0, (40, 60, 3), (0, 0)),
        (90, (60, 40, 3), (0, -1)),
        (180, (40, 60, 3), (-1, -1)),
        (270, (60, 40, 3), (-1, 0)),
    ],
)
def test_both_pictures_are_turned_clockwise(
    degrees: int, shape: tuple[int, ...], corner: tuple[int, int]
) -> None:
    frame = Corner("corner", 0, rotate_deg=degrees).read()
    assert frame is not None
    assert frame.small is not None
    assert frame.image.shape == shape
    for image in (frame.image, frame.small):
        assert image[corner].tolist() == [255, 255, 255]
        assert int(image.sum()) == 3 * 255


def test_a_sensors_clock_that_runs_ahead_is_held_back() -> None:
    import time

    source = Corner("corner", 0)
    stamps = [frame.captured_s for _ in range(3) if (frame := source.read()) is not None]
    assert stamps == sorted(stamps)
    assert stamps[-1] <= time.monotonic()


def test_boxes_found_in_a_small_picture_are_given_in_the_large_one() -> None:
    placement = Placement((0.5, 0.8), (3, 4), (640, 360))
    box = np.array([[10, 20, 110, 220]], np.float32)
    small = placement.to_source(placement.to_input(box))
    large = placement.seen_from((1920, 720))
    np.testing.assert_allclose(small, box, atol=1e-3)
    np.testing.assert_allclose(
        large.to_source(placement.to_input(box)), box * [3, 2, 3, 2], atol=1e-3
    )
