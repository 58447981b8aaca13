"""Sources made of files: samples, videos, photos; whole, cut short, corrupt, missing."""

from __future__ import annotations

import json
import os
import runpy
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cv2
import numpy as np
import pytest
from edgesight.device_app import sources_photos
from edgesight.device_app.frame import Frame
from edgesight.device_app.open_source import open_source
from edgesight.device_app.sources import ListSource, Pacer, Source
from edgesight.device_app.sources_photos import PhotoFolder
from edgesight.models.dataset import Dataset, GroundTruth, Photo
from edgesight.models.errors import DatasetError, SourceError

kit: Any = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("app_kit.py"))))


def all_frames(source: Source) -> list[Frame]:
    frames = []
    while (frame := source.read()) is not None:
        frames.append(frame)
    return frames


# Samples


def test_samples_are_smooth_footage() -> None:
    source = open_source("samples", max_speed=True)
    per_photo = round(sources_photos.SECONDS_PER_PHOTO * sources_photos.FOOTAGE_FPS)
    first = source.read()
    assert first is not None
    assert first.image.shape == (480, 640, 3)
    assert source.fps == 30
    before, steps = first.image.astype(np.int16), []
    for _ in range(per_photo):
        frame = source.read()
        assert frame is not None
        image = frame.image.astype(np.int16)
        steps.append(float(np.abs(image - before).mean()))
        before = image
    cut = steps.pop()
    assert min(steps) > 0
    assert max(steps) < 12, "neighbouring frames of one photo differ little"
    assert cut > 2 * max(steps), "then comes the next photo"


def test_samples_go_round_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources_photos, "SECONDS_PER_PHOTO", 0.1)  # 3 frames
    source = open_source("samples", max_speed=True)
    photos = len(list(sources_photos.SAMPLES.glob("*.jpg")))
    frames = [source.read() for _ in range(6 * photos + 1)]
    starts = [frame.image for frame in frames[::3] if frame is not None]
    assert len({image.tobytes() for image in starts[:photos]}) == photos
    # Every second move goes the other way, so only after two rounds it is the same again,
    # or after one where the number of photos is even.
    assert np.array_equal(starts[0], starts[2 * photos])


def test_pan_stays_inside_photos_of_any_shape() -> None:
    for height, width in ((100, 900), (900, 100), (480, 640), (60, 50)):
        photo = np.zeros((height, width, 3), np.uint8)
        photo[:, :, 0] = np.linspace(0, 255, width)[None, :]  # outside, the ramps would stand still
        photo[:, :, 1] = np.linspace(0, 255, height)[:, None]
        for progress in np.linspace(0, 1, 9):
            for leftwards in (False, True):
                moved = sources_photos.pan_and_zoom(photo, float(progress), leftwards=leftwards)
                assert moved.shape == (480, 640, 3)
                across, down = moved[240, :, 0].astype(int), moved[:, 320, 1].astype(int)
                for ramp in (across, down):
                    middle = (ramp[-1] - ramp[0]) / len(ramp)
                    assert ramp[60] - ramp[0] >= 60 * middle * 0.8 - 1.5
                    assert ramp[-1] - ramp[-61] >= 60 * middle * 0.8 - 1.5


def test_missing_samples_are_a_source_error() -> None:
    with pytest.raises(SourceError, match="expected sample photos"):
        sources_photos.SampleFootage([])


# Video files


def test_video_gives_every_frame_and_ends(tmp_path: Path) -> None:
    path = kit.write_video(tmp_path / "a.mp4", frames=20)
    source = open_source(os.fspath(path), max_speed=True)
    assert not source.live
    assert source.fps == pytest.approx(50)
    frames = all_frames(source)
    greys = [round(float(frame.image.mean())) for frame in frames]
    assert greys == pytest.approx([10 * i for i in range(20)], abs=4)
    assert source.state == "ended"
    assert source.read() is None
    assert source.warnings == []


def test_video_at_recorded_speed_takes_its_time(tmp_path: Path) -> None:
    path = os.fspath(kit.write_video(tmp_path / "a.mp4", frames=20, fps=50))
    for max_speed, at_least in ((False, 0.37), (True, 0.0)):
        source = open_source(path, max_speed=max_speed)
        frames = all_frames(source)
        assert frames[-1].captured_s - frames[0].captured_s >= at_least
        assert len(frames) == 20
    assert source.waited_s == 0


def test_waiting_for_a_frame_is_told_apart_from_reading_it() -> None:
    source = ListSource([np.zeros((4, 4, 3), np.uint8)] * 3, fps=10, paced=True)
    source.read()
    source.read()
    assert source.waited_s == pytest.approx(0.1, abs=0.09)


def test_pacer_makes_no_burst_after_a_pause() -> None:
    pacer, never = Pacer(10), threading.Event()
    pacer.wait(never)
    time.sleep(1.3)
    pacer.wait(never)
    assert pacer.wait(never) > 0.05, "the frames missed in the pause must not come all at once"


def test_looped_video_starts_again(tmp_path: Path) -> None:
    path = kit.write_video(tmp_path / "a.mp4", frames=5)
    source = open_source(os.fspath(path), max_speed=True, loop=True)
    frames = [source.read() for _ in range(12)]
    greys = [round(float(f.image.mean())) for f in frames if f is not None]
    assert greys == pytest.approx([0, 10, 20, 30, 40, 0, 10, 20, 30, 40, 0, 10], abs=4)
    assert [f.sequence for f in frames if f is not None] == list(range(12))
    source.close()


@pytest.mark.parametrize("content", [b"", b"this is no video\n" * 50, None])
def test_corrupt_video_is_one_line(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "a.mp4"
    if content is None:  # cut short: the index at the end of an MP4 is gone
        content = kit.write_video(tmp_path / "whole.mp4").read_bytes()
        content = content[: len(content) // 2]
    path.write_bytes(content)
    with pytest.raises(SourceError, match=r"expected a video, found .* no frame") as caught:
        open_source(os.fspath(path))
    assert "\n" not in str(caught.value)


def test_video_that_breaks_off_is_told(tmp_path: Path) -> None:
    path = kit.write_video(tmp_path / "whole.avi", frames=60)
    data = path.read_bytes()
    cut = tmp_path / "cut.avi"
    cut.write_bytes(data[: len(data) // 2])
    source = open_source(os.fspath(cut), max_speed=True)
    frames = all_frames(source)
    assert 0 < len(frames) < 54
    # Where the container has lost the number of frames, too, nobody can tell; AVI keeps it.
    assert len(source.warnings) == 1
    assert "cut short" in source.warnings[0]


def test_missing_file_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="found no such file; check the path"):
        open_source(os.fspath(tmp_path / "nothing.mp4"))


# Photos


def test_photo_folder_in_order_without_boxes(tmp_path: Path) -> None:
    for i in (2, 0, 1):
        kit.write_photo(tmp_path / "p" / f"{i}.png", grey=50 * i)
    source = open_source(os.fspath(tmp_path / "p"), max_speed=True)
    frames = all_frames(source)
    assert [int(f.image.mean()) for f in frames] == [0, 50, 100]
    assert [f.truth for f in frames] == [None] * 3
    assert source.classes is None


def test_labelled_folder_brings_its_boxes(tmp_path: Path) -> None:
    for i in (1, 2):
        kit.write_photo(tmp_path / "images" / f"{i}.png", grey=50 * i)
    content = {
        "images": [{"id": i, "file_name": f"{i}.png", "width": 40, "height": 30} for i in (1, 2)],
        "annotations": [
            {"id": 1, "image_id": 2, "category_id": 3, "bbox": [1, 2, 10, 20], "area": 200}
        ],
        "categories": [{"id": 3, "name": "car"}],
    }
    (tmp_path / "instances.json").write_text(json.dumps(content))
    for text in (tmp_path, tmp_path / "instances.json"):
        source = open_source(os.fspath(text), max_speed=True)
        assert source.classes == ("car",)
        truths = [f.truth for f in all_frames(source)]
        assert truths[0] is not None
        assert truths[1] is not None
        assert len(truths[0]) == 0
        assert truths[1].xyxy.tolist() == [[1, 2, 11, 22]]


def test_single_photo_and_its_loop(tmp_path: Path) -> None:
    path = os.fspath(kit.write_photo(tmp_path / "a.png"))
    assert len(all_frames(open_source(path, max_speed=True))) == 1
    looped = open_source(path, max_speed=True, loop=True)
    assert [f.sequence for f in (looped.read(), looped.read()) if f] == [0, 1]


def test_empty_folder_and_corrupt_photo_are_errors(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(DatasetError, match="expected photos"):
        open_source(os.fspath(tmp_path / "empty"))
    bad = tmp_path / "bad.jpg"
    bad.write_bytes(b"no photo")
    with pytest.raises(DatasetError, match="unreadable"):
        open_source(os.fspath(bad))
    kit.write_photo(tmp_path / "mixed" / "a.png")
    (tmp_path / "mixed" / "b.png").write_bytes(b"no photo")
    source = open_source(os.fspath(tmp_path / "mixed"), max_speed=True)
    assert source.read() is not None
    with pytest.raises(DatasetError, match=r"b\.png"):
        source.read()


@pytest.mark.parametrize("text", ["a" * 300, ""])
def test_nonsense_as_a_source_is_one_line(text: str) -> None:
    with pytest.raises(SourceError, match="found no such file"):
        open_source(text)


def test_a_second_lap_is_no_further_evidence(tmp_path: Path) -> None:
    truth = GroundTruth.of_boxes(np.array([[0, 0, 9, 9]], np.float32), np.array([0]))
    path = tmp_path / "a.png"
    cv2.imwrite(os.fspath(path), np.zeros((10, 10, 3), np.uint8))
    source = PhotoFolder(
        Dataset("a", (Photo(path, 1),), ("cat",), (truth,)), paced=False, loop=True
    )
    laps = [source.read() for _ in range(3)]
    assert [lap is not None and lap.truth is not None for lap in laps] == [True, False, False]
