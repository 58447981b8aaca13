"""Run by a Python whose OpenCV has GStreamer (Debian's, JetPack's): pipelines as cameras."""

from __future__ import annotations

import json
import runpy
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from edgesight.__main__ import main
from edgesight.device_app import sources_gstreamer
from edgesight.device_app.camera_options import CameraOptions
from edgesight.device_app.open_source import open_source
from edgesight.device_app.sources_gstreamer import GStreamer, has_gstreamer
from edgesight.models.errors import SourceError

HERE = Path(__file__).parent
contract: Any = SimpleNamespace(**runpy.run_path(str(HERE.parent / "source_contract.py")))
BALL = "videotestsrc is-live=true pattern=ball ! video/x-raw,width=320,height=240,framerate=30/1"
BARS = "videotestsrc is-live=true pattern=smpte ! video/x-raw,width=320,height=240"


@pytest.fixture(autouse=True)
def _nothing_hangs() -> None:
    sources_gstreamer._stuck.clear()  # of the tests before


@pytest.fixture
def ball() -> Iterator[Callable[[], Any]]:
    opened: list[Any] = []

    def open_it() -> Any:
        opened.append(open_source(f"gst:{BALL}"))
        return opened[-1]

    yield open_it
    for source in opened:
        source.close()


def read(source: Any, count: int) -> None:
    for _ in range(count):
        source.read()


def test_this_opencv_has_it() -> None:
    assert has_gstreamer()


@pytest.mark.parametrize("check", contract.ALWAYS, ids=lambda check: check.__name__)
def test_contract(ball: Callable[[], Any], check: Any) -> None:
    check(ball)


def test_no_old_frames_wait(ball: Callable[[], Any]) -> None:
    contract.no_old_frames_wait_for_a_slow_reader(ball, 30)


def test_the_pixels_are_bgr(ball: Callable[[], Any]) -> None:
    source = GStreamer(BARS)
    image = source.read().image
    source.close()
    assert image.shape == (240, 320, 3)
    # SMPTE's bars from left to right: grey, yellow, cyan, green, magenta, red, blue
    bars = [image[60, round((i + 0.5) * 320 / 7)].tolist() for i in range(7)]
    high = [[value > 128 for value in bar] for bar in bars]
    assert high == [
        [True, True, True],
        [False, True, True],
        [True, True, False],
        [False, True, False],
        [True, False, True],
        [False, False, True],
        [True, False, False],
    ]


def test_it_can_be_turned() -> None:
    source = GStreamer(BARS, CameraOptions(rotate_deg=90))
    image = source.read().image
    source.close()
    assert image.shape == (320, 240, 3)
    blue, green, red = image[-20, 120].tolist()  # the right end is below now: blue
    assert blue > 128 > max(green, red)


def test_its_end_is_told() -> None:
    source = GStreamer(f"videotestsrc num-buffers=20 ! {BALL.split('! ')[1]}")
    with pytest.raises(SourceError, match="expected a frame, found none"):
        read(source, 40)
    source.close()


def test_one_that_stalls_is_told() -> None:
    """A server that gives 20 pictures and then nothing, but does not hang up."""
    ended = threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as server:

        def feed() -> None:
            link, _ = server.accept()
            with link:
                for number in range(20):
                    link.sendall(bytes([10 * number]) * (320 * 240 * 3))
                ended.wait(60)

        feeder = threading.Thread(target=feed, daemon=True)
        feeder.start()
        caps = "rawvideoparse width=320 height=240 format=bgr framerate=30/1"
        port = server.getsockname()[1]
        source = open_source(f"gst:tcpclientsrc host=127.0.0.1 port={port} ! {caps}")
        assert source.read().image.shape == (240, 320, 3)
        reader = threading.Thread(target=lambda: [source.read() for _ in range(50)], daemon=True)
        reader.start()
        until = time.monotonic() + 30
        while source.state == "running" and time.monotonic() < until:
            time.sleep(0.05)
        assert source.state.startswith("retrying: ")
        source.close()
        ended.set()
        reader.join(30)
        assert not reader.is_alive()


def test_pipelines_that_hang_are_not_piled_up() -> None:
    hanging = threading.Event()
    threads = [threading.Thread(target=hanging.wait, daemon=True) for _ in range(3)]
    for thread in threads:
        thread.start()
    sources_gstreamer._stuck.extend(threads)
    with pytest.raises(SourceError, match="found that it hangs"):
        GStreamer(BALL)
    hanging.set()
    for thread in threads:
        thread.join()
    GStreamer(BALL).close()


@pytest.mark.parametrize(
    "pipeline", ["nosuchsrc", "videotestsrc ! nosuchfilter", "filesrc location=/none"]
)
def test_a_wrong_pipeline_is_one_line(pipeline: str) -> None:
    with pytest.raises(SourceError, match=r"gst-launch-1\.0"):
        open_source(f"gst:{pipeline}")


def test_a_jetsons_camera_needs_a_jetson() -> None:
    with pytest.raises(SourceError, match=r"jetson: expected a pipeline that starts"):
        open_source("jetson")


def test_options_belong_into_the_pipeline() -> None:
    with pytest.raises(SourceError, match="expected --size in the pipeline itself"):
        open_source(f"gst:{BALL}", camera=CameraOptions(size_wh=(640, 480)))


def test_the_app_runs_on_it(capfd: pytest.CaptureFixture[str]) -> None:
    line = ["run", "--source", f"gst:{BALL}", "--display", "none", "--frames", "20"]
    assert main([*line, "--reference", "none", "--json"]) == 0
    told = json.loads(capfd.readouterr().out.splitlines()[-1])
    assert told["frames"] == 20
    assert told["source"] == "gst"
    assert Path(told["model_file"]).name == "edgesight_nano.onnx"
