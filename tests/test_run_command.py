"""``edgesight run`` as a user has it: a real process, real files, real signals."""

from __future__ import annotations

import json
import os
import runpy
import signal
import socket
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cv2
import numpy as np
import pytest
from edgesight.__main__ import main
from edgesight.device_app.summary import table

kit: Any = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("app_kit.py"))))
GUARD_S = 60
NO_DISPLAY = ("--display", "none", "--reference", "none")


def run_in_process(args: Sequence[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    code = main(["run", *args])
    seen = capsys.readouterr()
    return code, seen.out, seen.err


@pytest.fixture
def tiny(tmp_path: Path) -> str:
    return str(kit.build_tiny(tmp_path / "tiny.onnx"))


@pytest.fixture
def video(tmp_path: Path) -> str:
    path = tmp_path / "in.mp4"
    writer = cv2.VideoWriter(os.fspath(path), cv2.VideoWriter.fourcc(*"mp4v"), 25, (64, 48))
    for i in range(40):
        writer.write(np.full((48, 64, 3), 100 + 3 * i, np.uint8))
    writer.release()
    return str(path)


def last_object(out: str) -> dict[str, Any]:
    found = json.loads(out.splitlines()[-1])
    assert isinstance(found, dict)
    return found


def test_script_gets_one_json_object_and_no_frame_is_dropped(
    tiny: str, video: str, capsys: pytest.CaptureFixture[str]
) -> None:
    args = ["--model", tiny, "--source", video, *NO_DISPLAY, "--json"]
    code, out, err = run_in_process(args, capsys)
    assert code == 0
    assert out.count("\n") == 1, "only the object is on stdout"
    found = last_object(out)
    assert found["frames"] == 40
    assert found["dropped"] == 0
    assert found["fps"] > 0
    assert set(found["stages"]) == {"capture", "preprocess", "inference", "postprocess", "track"}
    assert set(found["stages"]["inference"]) == {"p50", "p90", "p99", "mean", "n"}
    assert found["stages"]["inference"]["n"] == 40
    assert found["accuracy"]["kind"] == "none"
    assert not found["interrupted"]
    assert found["first_boxes_s"] > 0
    assert "tiny on" in err, "people read the table on stderr"


def test_table_for_people(tiny: str, video: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run_in_process(["--model", tiny, "--source", video, *NO_DISPLAY], capsys)
    assert code == 0
    assert "40 frames in" in out
    assert "0 dropped" in out
    for stage in ("capture", "preprocess", "inference", "postprocess"):
        assert f"\n  {stage} " in out
    assert "p50      p90      p99" in out
    assert "accuracy    no labels, and no reference model" in out


def test_frames_limit_and_jsonl(
    tiny: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "found.jsonl"
    args = ["--model", tiny, *NO_DISPLAY, "--frames", "15", "--jsonl", str(path), "--json"]
    code, out, _ = run_in_process(args, capsys)  # the samples, which have no end
    assert code == 0
    assert last_object(out)["frames"] == 15
    assert last_object(out)["written"] == [str(path)]
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["sequence"] for line in lines] == list(range(15))
    assert {d["label"] for line in lines for d in line["detections"]} <= {"bright", "dark"}
    assert any(line["detections"] for line in lines)


def test_labelled_folder_is_judged_by_its_boxes(
    tiny: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images, annotations = [], []
    for i in range(1, 9):
        bright = i % 2 == 0
        photo = np.full((64, 64, 3), 240 if bright else 20, np.uint8)
        cv2.imwrite(str(tmp_path / f"{i}.png"), photo)
        images.append({"id": i, "file_name": f"{i}.png", "width": 64, "height": 64})
        corner = 0 if bright or i == 1 else 32  # photo 1's box is in the wrong place
        annotations.append(
            {"id": i, "image_id": i, "category_id": 1 if bright else 2, "area": 1024}
            | {"bbox": [corner, corner, 32, 32]}
        )
    categories = [{"id": 1, "name": "bright"}, {"id": 2, "name": "dark"}]
    (tmp_path / "instances.json").write_text(
        json.dumps({"images": images, "annotations": annotations, "categories": categories})
    )
    args = ["--model", tiny, "--source", str(tmp_path), "--display", "none", "--json"]
    code, out, _ = run_in_process(args, capsys)
    assert code == 0
    accuracy = last_object(out)["accuracy"]
    assert accuracy["kind"] == "labels"
    assert accuracy["frames"] == 8
    assert accuracy["precision"] == accuracy["recall"] == pytest.approx(100 * 7 / 8, abs=0.01)
    assert 70 < accuracy["ap50"] < 95


def test_named_reference_is_compared_with(
    tiny: str, video: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    reference = str(kit.build_tiny(tmp_path / "reference.onnx", shift=0.5))
    args = ["--model", tiny, "--source", video, "--reference", reference, "--display", "none"]
    code, out, _ = run_in_process([*args, "--json"], capsys)
    assert code == 0
    accuracy = last_object(out)["accuracy"]
    assert accuracy["kind"] == "agreement"
    assert accuracy["reference"] == "reference"
    assert accuracy["frames"] >= 1, "also a run of a second compares at least one frame"
    assert accuracy["f1"] == 100


def test_annotated_video(
    tiny: str, video: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "out.mp4"
    args = ["--model", tiny, "--source", video, *NO_DISPLAY, "--video", str(path)]
    code, _, _ = run_in_process(args, capsys)
    assert code == 0
    capture = cv2.VideoCapture(str(path))
    assert capture.get(cv2.CAP_PROP_FRAME_COUNT) == 40
    assert capture.get(cv2.CAP_PROP_FPS) == pytest.approx(25)


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        (["--source", "nothing.mp4"], "found no such file"),
        (["--source", "97"], "camera 97: expected"),
        (["--source", "http://127.0.0.1:9/x"], "expected a video stream"),
        (["--model", "nothing.onnx"], "expected an ONNX model"),
        (["--reference", "nothing.onnx"], "--reference: expected"),
        (["--head", "nonsense"], "--head: expected one of"),
        (["--jsonl", "/proc/x.jsonl"], "cannot write /proc/x.jsonl"),
        (["--video", "x.txt"], "expected a video file"),
    ],
)
def test_wrong_input_is_one_line_and_exit_code_2(
    args: list[str], expected: str, tiny: str, tmp_path: Path
) -> None:
    fixed = ("--model", tiny, "--display", "none", "--frames", "3")
    with kit.process("-m", "edgesight", "run", *fixed, *args) as running:
        out, err = running.communicate(timeout=GUARD_S)
    assert running.returncode == 2
    assert out == ""
    assert err.startswith("edgesight: error: ")
    assert err.count("\n") == 1, "OpenCV's and FFMPEG's own lines must not reach the terminal"
    assert expected in err


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--frames", "0"),
        ("--frames", "many"),
        ("--score", "1.5"),
        ("--port", "70000"),
        ("--threads", "0"),
        ("--accuracy-budget", "0"),
        ("--accuracy-budget", "nan"),
        ("--speed", "fast"),
        ("--display", "paper"),
    ],
)
def test_option_outside_its_range_is_refused(
    option: str, value: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["run", option, value])
    assert stop.value.code == 2
    assert option in capsys.readouterr().err


def test_damaged_photo_in_mid_run_tells_what_was_seen_and_keeps_the_earlier_file(
    tiny: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "photos"
    folder.mkdir()
    for i in range(3):
        cv2.imwrite(str(folder / f"{i}.png"), np.full((32, 32, 3), 200, np.uint8))
    (folder / "3.png").write_bytes(b"no photo")
    path = tmp_path / "found.jsonl"
    path.write_text("earlier\n")
    args = ["--model", tiny, "--source", str(folder), *NO_DISPLAY, "--jsonl", str(path)]
    code, out, err = run_in_process(args, capsys)
    assert code == 2
    assert err.startswith("edgesight: error: ")
    assert "3.png" in err
    assert path.read_text() == "earlier\n"
    if "frames in" in out:  # how far the network came before the photo was met is left to chance
        assert "found.jsonl.part" in out


def wait_for_frames(running: subprocess.Popen[str], part: Path) -> None:
    """Waits until the growing JSONL file says that frames go through."""
    until = time.monotonic() + GUARD_S
    while not (part.exists() and part.stat().st_size > 2000):
        assert running.poll() is None, running.communicate()
        assert time.monotonic() < until
        time.sleep(0.02)


@pytest.mark.skipif(os.name != "posix", reason="POSIX signals")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_ctrl_c_ends_at_once_finishes_the_files_and_prints_the_summary(
    number: signal.Signals, tmp_path: Path
) -> None:
    model = str(kit.build_tiny(tmp_path / "busy.onnx", work=10))
    reference = str(kit.build_tiny(tmp_path / "reference.onnx", work=10))
    jsonl, video = tmp_path / "found.jsonl", tmp_path / "seen.mp4"
    with kit.process(
        *("-m", "edgesight", "run", "--model", model, "--reference", reference, "--json"),
        *("--display", "none", "--jsonl", str(jsonl), "--video", str(video)),
    ) as running:
        wait_for_frames(running, tmp_path / "found.jsonl.part")
        running.send_signal(number)
        began = time.monotonic()
        out, err = running.communicate(timeout=GUARD_S)
        took = time.monotonic() - began
    assert running.returncode == 0, err
    assert took < kit.end_limit_s()
    found = last_object(out)
    assert found["interrupted"]
    assert found["frames"] > 0
    assert "frames in" in err
    assert "Traceback" not in err
    written = jsonl.read_text().splitlines()
    assert found["frames"] == len(written)
    assert json.loads(written[-1])["sequence"] == found["frames"] - 1
    capture = cv2.VideoCapture(str(video))
    assert capture.isOpened(), "the video must be finished"
    assert capture.get(cv2.CAP_PROP_FRAME_COUNT) == found["frames"]
    assert not list(tmp_path.glob("*.part*"))


@pytest.mark.skipif(os.name != "posix", reason="POSIX signals")
def test_second_ctrl_c_does_not_cut_off_the_end(tmp_path: Path, tiny: str) -> None:
    jsonl = tmp_path / "found.jsonl"
    args = ("-m", "edgesight", "run", "--model", tiny, *NO_DISPLAY, "--jsonl", str(jsonl))
    with kit.process(*args) as running:
        wait_for_frames(running, tmp_path / "found.jsonl.part")
        for _ in range(5):
            running.send_signal(signal.SIGINT)
            time.sleep(0.002)
        out, err = running.communicate(timeout=GUARD_S)
    # A late one may meet Python itself while it ends, when all is done.
    assert running.returncode in (0, 130, -signal.SIGINT), out + err
    assert jsonl.exists(), out + err
    assert "written" in out
    assert "Traceback" not in err


@pytest.mark.skipif(os.name != "posix", reason="POSIX signals")
def test_ctrl_c_while_a_dead_stream_is_being_opened(tiny: str) -> None:
    # A server that takes the connection and says nothing: opening would wait for seconds.
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"http://127.0.0.1:{server.getsockname()[1]}/camera"
        args = ("-m", "edgesight", "run", "--model", tiny, *NO_DISPLAY, "--source", address)
        with kit.process(*args) as running:
            connection, _ = server.accept()
            time.sleep(1)  # the model is loaded by now, too
            running.send_signal(signal.SIGINT)
            began = time.monotonic()
            out, err = running.communicate(timeout=GUARD_S)
            took = time.monotonic() - began
            connection.close()
    assert running.returncode == 130, out + err
    assert took < kit.end_limit_s()
    assert err.strip() == "edgesight: interrupted"


def test_run_imports_nothing_heavy(tiny: str) -> None:
    program = f"""
import sys
from edgesight.__main__ import main
code = main(["run", "--model", {tiny!r}, "--display", "none", "--frames", "5"])
names = ("torch", "onnx", "matplotlib", "torchvision", "pycocotools")
heavy = [name for name in names if name in sys.modules]
print("heavy:", heavy, "code:", code)
"""
    with kit.process("-c", program) as running:
        out, err = running.communicate(timeout=GUARD_S)
    assert "heavy: [] code: 0" in out, out + err


def test_stuck_driver_does_not_keep_the_process(tmp_path: Path, tiny: str) -> None:
    program = f"""
import atexit, sys, threading, time
atexit.register(print, "Python was taken apart")
from edgesight.device_app import open_source, sources
class Stuck(sources.BaseSource):
    live = True
    def _next(self):
        import numpy as np
        if self._sequence == 20:
            time.sleep(1000)
        time.sleep(0.01)
        return sources.Picture(np.zeros((32, 32, 3), np.uint8))
open_source.open_source = lambda *args, **options: Stuck("stuck", 30)
threading.Timer(3, lambda: __import__("os").kill(__import__("os").getpid(), 2)).start()
from edgesight.__main__ import main
sys.exit(main(["run", "--model", {tiny!r}, "--display", "none", "--reference", "none"]))
"""
    with kit.process("-c", program) as running:
        out, err = running.communicate(timeout=GUARD_S)
    assert running.returncode == 0, out + err
    assert "tiny on stuck: " in out
    assert "Python was taken apart" not in out, "under the feet of a thread in a driver"
    assert "frames in" in out


def test_table_shows_what_was_written_and_what_went_wrong() -> None:
    text = table(
        {
            "model": "m",
            "source": "s",
            "frames": 1,
            "elapsed_s": 2.0,
            "dropped": 3,
            "engine": "onnxruntime",
            "threads": 1,
            "first_boxes_s": None,
            "capture_fps": 4.0,
            "fps": 5.0,
            "display_fps": 6.0,
            "stages": {"inference": {"p50": 1.0, "p90": 2.0, "p99": 3.0}},
            "latency": {"p50": 41.0, "p99": 77.0},
            "board": {"throttled_before": ["under-voltage"]},
            "accuracy": {"text": "fine"},
            "written": ["a.jsonl"],
            "warnings": ["camera 0 was lost"],
        }
    )
    assert "written     a.jsonl" in text
    assert "note        camera 0 was lost" in text
    assert "accuracy    fine" in text
    assert "capture to display  41 ms, p99 77 ms" in text
    assert "held back since it was switched on: under-voltage" in text
    assert "engine      onnxruntime, 1 thread(s)" in text
