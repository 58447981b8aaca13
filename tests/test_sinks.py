"""Files of results: complete or not there, and an earlier one untouched by a failure."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections import namedtuple
from pathlib import Path

import cv2
import numpy as np
import pytest
from edgesight.device_app.frame import Frame
from edgesight.device_app.sinks import JsonlSink, Seen, VideoSink
from edgesight.models.detections import Detections
from edgesight.models.errors import OutputError
from edgesight.models.files import write_text

CLASSES = ("person", "car")
FOUND = Detections(
    np.array([[1, 2, 30.26, 40]], np.float32), np.array([0.9], np.float32), np.array([1])
)


def frame(sequence: int, grey: int = 100, captured_s: float | None = None) -> Frame:
    image = np.full((48, 64, 3), grey, np.uint8)
    return Frame(image, sequence, time.monotonic() if captured_s is None else captured_s)


def frames_of(path: Path) -> list[int]:
    """Returns the mean grey level of each frame of a video."""
    capture = cv2.VideoCapture(os.fspath(path))
    greys = []
    while True:
        ok, image = capture.read()
        if not ok:
            return greys
        greys.append(round(float(image.mean())))


def test_jsonl_has_one_object_per_frame(tmp_path: Path) -> None:
    path = tmp_path / "new folder" / "found.jsonl"
    sink = JsonlSink(path)
    before = time.time()
    sink.write(Seen(frame(7), FOUND, CLASSES))
    sink.write(Seen(frame(9), Detections.empty(), CLASSES))
    assert not path.exists(), "the file gets its name only at the end"
    assert sink.close() == path
    assert sink.close() is None
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["sequence"] for line in lines] == [7, 9]
    assert before - 1 < lines[0]["time"] < time.time() + 1
    assert lines[0]["detections"] == [
        {"label": "car", "score": 0.9, "xyxy": [1.0, 2.0, 30.3, 40.0]}
    ]
    assert lines[1]["detections"] == []
    assert list(path.parent.iterdir()) == [path]


def test_failed_run_keeps_earlier_and_whole_lines_and_keeps_its_own_part(tmp_path: Path) -> None:
    path = tmp_path / "found.jsonl"
    path.write_text("earlier\n")
    sink = JsonlSink(path)
    sink.write(Seen(frame(0), FOUND, CLASSES))
    part = sink.close(complete=False)
    assert path.read_text() == "earlier\n"
    assert part is not None
    assert json.loads(part.read_text())["sequence"] == 0


def test_failed_run_without_a_frame_leaves_nothing(tmp_path: Path) -> None:
    sink = JsonlSink(tmp_path / "a.jsonl")
    assert sink.close(complete=False) is None
    video = VideoSink(tmp_path / "a.mp4", 30)
    assert video.close(complete=False) is None
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs a file size limit")
def test_full_disk_is_one_line_and_keeps_earlier_and_whole_lines(tmp_path: Path) -> None:
    path = tmp_path / "found.jsonl"
    path.write_text("earlier\n")
    program = f"""
import resource, sys
from pathlib import Path
sys.path[:0] = {sys.path!r}
import numpy as np
from edgesight.device_app.frame import Frame
from edgesight.device_app.sinks import JsonlSink, Seen
from edgesight.models.detections import Detections
from edgesight.models.errors import OutputError
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
sink = JsonlSink(Path({os.fspath(path)!r}))
try:
    for i in range(5000):
        frame = Frame(np.zeros((4, 4, 3), np.uint8), i, 0.0)
        sink.write(Seen(frame, Detections.empty(), ("person",)))
except OutputError as error:
    print(error)
    print(i, sink.close(complete=False))
else:
    print("no error")
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60
    )
    assert done.stdout.startswith(f"cannot write {path}: "), done.stdout + done.stderr
    said = done.stdout.splitlines()
    assert len(said) == 2
    assert path.read_text() == "earlier\n"
    part = tmp_path / "found.jsonl.part"
    assert sorted(tmp_path.iterdir()) == [path, part]
    # What was written until then is kept, and every line of it is whole.
    kept = [json.loads(line)["sequence"] for line in part.read_text().splitlines()]
    assert kept == list(range(len(kept)))
    assert 300 < len(kept) <= int(said[1].split()[0])
    assert said[1].split()[1] == str(part)


def test_folder_without_permission_is_an_output_error(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    root = os.getuid() == 0
    if root:  # root may write anywhere: be nobody for a moment
        os.seteuid(65534)
    try:
        with pytest.raises(OutputError, match="cannot write"):
            JsonlSink(tmp_path / "a.jsonl")
    finally:
        if root:
            os.seteuid(0)


def test_path_that_is_a_folder_or_below_a_file_is_an_output_error(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="found a folder"):
        JsonlSink(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="cannot write"):
        VideoSink(tmp_path / "file" / "a.mp4", 30)


@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".avi"])
def test_video_has_every_frame_and_its_speed(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"seen{suffix}"
    sink = VideoSink(path, 12.0)
    for i in range(10):
        sink.write(Seen(frame(i), FOUND, CLASSES, np.full((48, 64, 3), 20 * i, np.uint8)))
    assert not path.exists()
    assert sink.close() == path
    assert frames_of(path) == pytest.approx([20 * i for i in range(10)], abs=6)
    assert cv2.VideoCapture(os.fspath(path)).get(cv2.CAP_PROP_FPS) == pytest.approx(12)
    assert list(tmp_path.iterdir()) == [path]


def test_dropped_frames_are_filled_so_that_the_video_plays_at_its_own_speed(tmp_path: Path) -> None:
    path = tmp_path / "seen.mp4"
    sink = VideoSink(path, 30)
    for sequence, grey in ((5, 40), (6, 80), (9, 160)):
        sink.write(Seen(frame(sequence), FOUND, CLASSES, np.full((48, 64, 3), grey, np.uint8)))
    sink.close()
    assert frames_of(path) == pytest.approx([40, 80, 160, 160, 160], abs=6)


def test_live_video_follows_the_clock(tmp_path: Path) -> None:
    path = tmp_path / "seen.mp4"
    sink = VideoSink(path, 10, live=True)
    for i, at_s in enumerate((50.0, 50.01, 50.1, 50.5)):
        picture = np.full((48, 64, 3), 40 * (i + 1), np.uint8)
        sink.write(Seen(frame(i, captured_s=at_s), FOUND, CLASSES, picture))
    sink.close()
    assert frames_of(path) == pytest.approx([40, 120, 160, 160, 160, 160], abs=8)


def test_pictures_of_other_sizes_are_fitted_into_the_first(tmp_path: Path) -> None:
    path = tmp_path / "seen.mp4"
    sink = VideoSink(path, 10)
    for i, size in enumerate([(48, 64), (96, 32), (301, 17), (5, 500)]):
        sink.write(Seen(frame(i), FOUND, CLASSES, np.full((*size, 3), 200, np.uint8)))
    sink.close()
    capture = cv2.VideoCapture(os.fspath(path))
    first, second = capture.read()[1], capture.read()[1]
    assert first.shape == second.shape == (48, 64, 3)
    assert second[24, 32].mean() > 150, "the tall picture is in the middle"
    assert second[24, 4].mean() < 60, "beside it is black"
    assert len(frames_of(path)) == 4


def test_video_of_a_failed_run_is_kept_beside_the_earlier_one(tmp_path: Path) -> None:
    path = tmp_path / "seen.mp4"
    path.write_bytes(b"earlier")
    sink = VideoSink(path, 10)
    sink.write(Seen(frame(0), FOUND, CLASSES, np.full((48, 64, 3), 200, np.uint8)))
    part = sink.close(complete=False)
    assert path.read_bytes() == b"earlier"
    assert part is not None
    assert len(frames_of(part)) == 1


def test_video_stops_before_the_disk_is_full(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    sink = VideoSink(tmp_path / "seen.mp4", 10)
    picture = np.full((48, 64, 3), 200, np.uint8)
    sink.write(Seen(frame(0), FOUND, CLASSES, picture))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(100, 99, 1))
    with pytest.raises(OutputError, match="0 MB free"):
        sink.write(Seen(frame(90), FOUND, CLASSES, picture))
    assert not (tmp_path / "seen.mp4").exists()


def test_unknown_container_is_an_output_error(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="expected a video file"):
        VideoSink(tmp_path / "seen.txt", 30)
    assert list(tmp_path.iterdir()) == []


def test_discard_leaves_an_earlier_result(tmp_path: Path) -> None:
    for name in ("a.jsonl", "a.mp4"):
        (tmp_path / name).write_text("earlier")
    sinks = [JsonlSink(tmp_path / "a.jsonl"), VideoSink(tmp_path / "a.mp4", 30)]
    for sink in sinks:
        sink.write(Seen(frame(0), FOUND, CLASSES, np.zeros((48, 64, 3), np.uint8)))
        sink.discard()
        assert sink.close() is None
    assert {p.name: p.read_text() for p in tmp_path.iterdir()} == {
        "a.jsonl": "earlier",
        "a.mp4": "earlier",
    }


def test_a_device_is_not_replaced_by_a_file(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe.mp4"
    os.mkfifo(pipe)
    for make in (
        lambda: JsonlSink(pipe),
        lambda: VideoSink(pipe, 30),
        lambda: JsonlSink(Path("/dev/no-such-device")),
        lambda: write_text(pipe, ""),
    ):
        with pytest.raises(OutputError, match="expected the name of a file, found a device"):
            make()
    assert pipe.is_fifo()
    assert [path.name for path in tmp_path.iterdir()] == ["pipe.mp4"]


def test_a_name_that_is_too_long_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="cannot write"):
        JsonlSink(tmp_path / ("a" * 300))


def test_a_video_is_not_closed_while_it_is_written(tmp_path: Path) -> None:
    sink = VideoSink(tmp_path / "out.mp4", 30)
    sink.write(Seen(frame(0), FOUND, CLASSES, frame(0).image))
    inner, writing, overlaps = sink._writer, threading.Event(), []

    class Slow:
        def write(self, picture: object) -> None:
            writing.set()
            time.sleep(0.1)
            overlaps.append(sink._closed)
            inner.write(picture)

        def release(self) -> None:
            inner.release()

    sink._writer = Slow()
    last = frame(200)  # many frames to fill, as after a camera was away
    thread = threading.Thread(target=lambda: sink.write(Seen(last, FOUND, CLASSES, last.image)))
    thread.start()
    assert writing.wait(5)
    assert sink.close() == tmp_path / "out.mp4"
    thread.join(5)
    assert not thread.is_alive()
    assert overlaps
    assert not any(overlaps)
