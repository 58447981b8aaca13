"""Run inside the root that ``.ci/picamera-root`` makes: PiCamera on a real Picamera2.

The camera is libcamera's "virtual" one: it shows ``/frames/0.jpg`` and so on, in NV12 only, and as
fast as it is asked.
"""

from __future__ import annotations

import json
import os
import runpy
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cv2
import numpy as np
import pytest

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))
os.environ.setdefault("LIBCAMERA_LOG_LEVELS", "*:ERROR")

from softcam import SoftPicamera2  # before picamera2: it stands in for what is missing

import picamera2

picamera2.Picamera2 = SoftPicamera2

from edgesight.__main__ import main
from edgesight.device_app import picamera as picamera_file
from edgesight.device_app.camera_options import CameraOptions
from edgesight.device_app.open_source import open_source
from edgesight.device_app.picamera import PiCamera
from edgesight.models.errors import SourceError

contract: Any = SimpleNamespace(**runpy.run_path(str(HERE.parent / "source_contract.py")))
SIZE_WH = (1280, 720)
COLOURS = ((0, 0, 255), (0, 255, 0), (255, 0, 0))  # BGR; each with a white mark on the upper left


@pytest.fixture
def opened() -> Iterator[Any]:
    sources = []

    def open_it(**options: Any) -> Any:
        sources.append(PiCamera(0, CameraOptions(**options)))
        return sources[-1]

    yield open_it
    for source in sources:
        source.close()


@pytest.mark.parametrize("check", contract.ALWAYS, ids=lambda check: check.__name__)
def test_contract(check: Any) -> None:
    sources = []

    def open_it() -> Any:
        for source in sources:
            source.close()  # there is one camera
        sources.append(open_source("picamera"))
        return sources[-1]

    try:
        check(open_it)
    finally:
        sources[-1].close()


def test_a_slow_reader_gets_new_frames(opened: Any) -> None:
    contract.a_slow_reader_gets_new_frames(opened, 0.2)


def test_the_pixels_are_those_of_the_scene_in_both_streams(opened: Any) -> None:
    source = opened()
    seen = set()
    for _ in range(40):
        frame = source.read()
        assert frame.image.shape == (SIZE_WH[1], SIZE_WH[0], 3)
        assert frame.small.shape == (360, 640, 3)
        for image in (frame.image, frame.small):
            height, width = image.shape[:2]
            assert (image[height // 4, width // 8] > 225).all(), "the white mark"
            pixel = image[height * 3 // 4, width * 3 // 4].astype(int)
            nearest = int(np.argmin([np.abs(pixel - c).sum() for c in COLOURS]))
            assert np.abs(pixel - COLOURS[nearest]).max() < 30, pixel
            seen.add(nearest)
    assert seen == {0, 1, 2}


def test_a_small_picture_needs_no_second_stream(opened: Any) -> None:
    frame = opened(size_wh=(640, 480)).read()
    assert frame.image.shape == (480, 640, 3)
    assert frame.small is None


@pytest.mark.parametrize(("degrees", "mark"), [(90, (1, 0)), (180, (1, 1)), (270, (0, 1))])
def test_it_can_hang_any_way(opened: Any, degrees: int, mark: tuple[int, int]) -> None:
    frame = opened(rotate_deg=degrees).read()
    for image in (frame.image, frame.small):
        height, width = image.shape[:2]
        assert (height > width) == (degrees != 180)
        across, down = mark
        long, short = (0.125, 0.25) if degrees == 180 else (0.25, 0.125)
        x = width * (1 - long if across else long)
        y = height * (1 - short if down else short)
        assert (image[int(y), int(x)] > 225).all()


def test_the_time_is_the_sensors(opened: Any) -> None:
    source = opened()
    before = time.monotonic()
    stamps = [source.read().captured_s for _ in range(20)]
    assert before - 0.2 < stamps[0]
    assert stamps[-1] <= time.monotonic()
    assert len(set(stamps)) > 10


def test_frames_are_given_back(opened: Any) -> None:
    source = opened()
    for _ in range(200):  # the camera has four buffers
        assert source.read() is not None


def test_a_busy_camera_is_one_line_and_free_again_afterwards(opened: Any) -> None:
    first = opened()
    with pytest.raises(SourceError, match="picamera 0: expected a free camera, found it busy"):
        PiCamera()
    first.close()
    assert opened().read() is not None


def test_an_absent_camera_is_one_line() -> None:
    with pytest.raises(SourceError, match=r"picamera 7: expected camera 7, found soft"):
        PiCamera(7)


def test_what_it_cannot_do_is_refused_and_it_is_free_afterwards(opened: Any) -> None:
    for options in ({"focus": "auto"}, {"exposure_us": 1000}):
        with pytest.raises(SourceError, match="found: it has no"):
            PiCamera(0, CameraOptions(**options))
    assert opened().read() is not None


def test_close_ends_a_read_that_waits(opened: Any) -> None:
    source = opened()
    source.read()
    closer = threading.Timer(0.3, source.close)
    closer.start()
    until = time.monotonic() + contract.GUARD_S
    while source.read() is not None:
        assert time.monotonic() < until
    closer.join()


def test_frames_that_stop_are_told_and_it_is_opened_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(picamera_file, "TIMEOUT_S", 1.0)
    source = open_source("picamera")
    for _ in range(3):
        assert source.read() is not None
    camera, lost = source._inner._camera, []
    process = camera.process_requests

    def without_frames(display: Any) -> None:
        """As with a cable that comes off: what the camera has finished never arrives."""
        with camera._requestslock:
            lost.extend(camera._requests)
            camera._requests = []
        process(display)

    camera.process_requests = without_frames
    states = []
    until = time.monotonic() + contract.GUARD_S
    reader = threading.Thread(target=lambda: [source.read() for _ in range(40)], daemon=True)
    reader.start()
    while reader.is_alive() and time.monotonic() < until:
        states.append(source.state)
        time.sleep(0.01)
    assert not reader.is_alive(), "it hangs"
    assert any(state.startswith("retrying: ") for state in states)
    assert source.state == "running"
    source.close()


def test_what_it_cannot_give_in_size_is_told_to_the_person(opened: Any) -> None:
    source = open_source("picamera", camera=CameraOptions(size_wh=(1000, 700)))
    try:
        assert any("asked for 1000x700 px" in line for line in source.warnings), source.warnings
    finally:
        source.close()


def test_the_whole_app_runs_on_it(capsys: pytest.CaptureFixture[str]) -> None:
    line = ["run", "--source", "picamera", "--size", "1280x720", "--display", "none"]
    assert main([*line, "--frames", "30", "--reference", "none", "--json"]) == 0
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert told["frames"] == 30
    assert told["source"] == "picamera 0"
    assert told["stages"]["inference"]["p50"] > 0


def test_boxes_are_in_pixels_of_the_large_picture(tmp_path: Path) -> None:
    photo = sorted((HERE / "samples").glob("*.jpg"))[0]
    image = cv2.imread(str(photo))
    boxes = {}
    for name, size in (("large", SIZE_WH), ("small", (640, 360))):
        fitted = cv2.resize(image, size)
        for number in range(len(COLOURS)):
            cv2.imwrite(f"/frames/{number}.jpg", fitted)
        out = tmp_path / f"{name}.jsonl"
        line = ["run", "--source", "picamera", "--size", "x".join(map(str, size))]
        line += ["--display", "none", "--frames", "3", "--reference", "none", "--jsonl", str(out)]
        assert main(line) == 0
        found = json.loads(out.read_text().splitlines()[-1])["detections"]
        assert found
        boxes[name] = np.array(found[0]["xyxy"])
    np.testing.assert_allclose(boxes["large"], 2 * boxes["small"], atol=16)
