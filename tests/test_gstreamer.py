"""GStreamer pipelines, and RTSP from a real server, where Debian's packages are installed.

``EDGESIGHT_GSTREAMER_PYTHON`` names a Python whose OpenCV has GStreamer, with onnxruntime and
pytest: README's install "with no OpenCV of its own". The RTSP server wants python3-gi and
gir1.2-gst-rtsp-server-1.0 of the system's Python.
"""

from __future__ import annotations

import os
import runpy
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from edgesight.device_app import sources_gstreamer
from edgesight.device_app.camera_options import CameraOptions
from edgesight.device_app.open_source import open_source
from edgesight.device_app.sources_gstreamer import jetson_pipeline, shortened, whole_pipeline
from edgesight.models.errors import SourceError

PYTHON = os.environ.get("EDGESIGHT_GSTREAMER_PYTHON", "")
SYSTEM_PYTHON = "/usr/bin/python3"
INSIDE = Path(__file__).parent / "inside"
contract: Any = SimpleNamespace(
    **runpy.run_path(str(Path(__file__).with_name("source_contract.py")))
)


def has_rtsp_server() -> bool:
    code = (
        "import gi; gi.require_version('GstRtspServer', '1.0'); import gi.repository.GstRtspServer"
    )
    try:
        done = subprocess.run([SYSTEM_PYTHON, "-c", code], capture_output=True, check=False)
    except OSError:
        return False
    return done.returncode == 0


def test_without_gstreamer_the_way_to_it_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources_gstreamer, "has_gstreamer", lambda: False)
    for text in ("gst:videotestsrc", "jetson"):
        with pytest.raises(SourceError, match=r"expected an OpenCV with GStreamer.*JetPack"):
            open_source(text)


def test_a_pipeline_ends_in_the_newest_picture_for_opencv() -> None:
    whole = whole_pipeline("v4l2src ! ")
    assert whole.startswith("v4l2src ! videoconvert ! video/x-raw,format=BGR ! appsink drop=true")
    own = "v4l2src ! appsink"
    assert whole_pipeline(own) == own


def test_what_a_jetsons_camera_is_asked_for() -> None:
    options = CameraOptions(size_wh=(1920, 1080), fps=25.0, exposure_us=2000)
    text = jetson_pipeline(1, options)
    assert "sensor-id=1" in text
    assert 'exposuretimerange="2000000 2000000"' in text
    assert "width=1920,height=1080,framerate=25/1" in text
    assert "framerate=15/2" in jetson_pipeline(0, CameraOptions(fps=7.5))
    assert "drop=true max-buffers=1" in text


def test_no_password_is_shown() -> None:
    text = shortened('rtspsrc location=rtsp://me:secret@camera/1 user-pw="secret 2" ! decodebin')
    assert "secret" not in text
    assert "rtsp://***@camera/1" in text


@pytest.mark.skipif(not PYTHON, reason="EDGESIGHT_GSTREAMER_PYTHON names no Python")
@pytest.mark.timeout(300)
def test_pipelines_as_cameras(tmp_path: Path) -> None:
    (tmp_path / "edgesight").symlink_to(Path(__file__).parents[1], target_is_directory=True)
    line = [PYTHON, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--noconftest"]
    line += ["-c", os.devnull, "--rootdir", str(INSIDE), str(INSIDE / "gstreamer_checks.py")]
    env = {**os.environ, "PYTHONPATH": str(tmp_path), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(
        line, capture_output=True, text=True, timeout=280, check=False, env=env, cwd=tmp_path
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert "skipped" not in done.stdout


@pytest.fixture
def server() -> Iterator[tuple[str, subprocess.Popen[str]]]:
    line = [SYSTEM_PYTHON, str(INSIDE / "rtsp_server.py"), "0"]
    with subprocess.Popen(line, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        yield process.stdout.readline().strip(), process
        process.kill()


@pytest.fixture
def rtsp(server: tuple[str, Any]) -> Iterator[Callable[[], Any]]:
    opened: list[Any] = []

    def open_it() -> Any:
        opened.append(open_source(server[0]))
        return opened[-1]

    yield open_it
    for source in opened:
        source.close()


needs_server = pytest.mark.skipif(not has_rtsp_server(), reason="no gst-rtsp-server for Python")


@needs_server
@pytest.mark.parametrize("check", contract.ALWAYS, ids=lambda check: check.__name__)
def test_contract_of_rtsp(rtsp: Callable[[], Any], check: Callable[[Any], None]) -> None:
    check(rtsp)


@needs_server
def test_a_lost_stream_is_told_and_its_end_too(server: tuple[str, Any], rtsp: Any) -> None:
    source = rtsp()
    assert source.read().image.shape == (240, 320, 3)
    process = server[1]
    process.kill()
    process.wait()
    reader = threading.Thread(target=lambda: [source.read() for _ in range(400)], daemon=True)
    reader.start()
    until = time.monotonic() + contract.GUARD_S
    while source.state == "running" and time.monotonic() < until:
        time.sleep(0.05)
    assert source.state.startswith("retrying: ")
    source.close()
    reader.join(contract.GUARD_S)
    assert not reader.is_alive()
    assert any("was lost after" in line for line in source.warnings)
