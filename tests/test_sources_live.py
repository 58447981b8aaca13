"""The contract that all sources keep; cameras and streams that are absent, die, come back."""

from __future__ import annotations

import http.server
import os
import runpy
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from edgesight.device_app import sources_opencv
from edgesight.device_app.frame import Frame
from edgesight.device_app.open_source import open_source
from edgesight.device_app.sources import (
    BaseSource,
    ListSource,
    Picture,
    ReopeningSource,
    Source,
    redacted,
)
from edgesight.models.errors import SourceError

kit: Any = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("app_kit.py"))))
contract: Any = SimpleNamespace(
    **runpy.run_path(str(Path(__file__).with_name("source_contract.py")))
)
GUARD_S = contract.GUARD_S


@pytest.fixture
def camera() -> Iterator[Any]:
    server = kit.MjpegServer()
    yield server
    server.close()


def open_samples(folder: Path) -> Source:
    return open_source("samples", max_speed=True)


def open_video(folder: Path) -> Source:
    return open_source(os.fspath(kit.write_video(folder / "a.mp4")), max_speed=True)


def open_folder(folder: Path) -> Source:
    for i in range(12):
        kit.write_photo(folder / "photos" / f"{i:02}.png", grey=10 * i)
    return open_source(os.fspath(folder / "photos"), max_speed=True)


def open_list(folder: Path) -> Source:
    return ListSource([np.full((48, 64, 3), 10 * i, np.uint8) for i in range(12)])


@pytest.fixture(params=["samples", "video", "folder", "list", "stream"])
def any_source(
    request: pytest.FixtureRequest, tmp_path: Path, camera: Any
) -> Iterator[Callable[[], Source]]:
    """A function that opens a source of each kind, for the contract that all of them keep."""
    opened: list[Source] = []

    def open_it() -> Source:
        ways = {
            "samples": open_samples,
            "video": open_video,
            "folder": open_folder,
            "list": open_list,
            "stream": lambda _: open_source(camera.url),
        }
        opened.append(ways[request.param](tmp_path))
        return opened[-1]

    yield open_it
    for source in opened:
        source.close()


@pytest.mark.parametrize("check", contract.ALWAYS, ids=lambda check: check.__name__)
def test_contract(any_source: Callable[[], Source], check: Callable[[Any], None]) -> None:
    check(any_source)


def all_frames(source: Source) -> list[Frame]:
    frames = []
    while (frame := source.read()) is not None:
        frames.append(frame)
    return frames


# Cameras and streams


def test_absent_camera_is_one_line(capfd: pytest.CaptureFixture[str]) -> None:
    for text in ("97", "/dev/video97"):
        with pytest.raises(SourceError, match=r"camera 97: expected .* --source samples"):
            open_source(text)
    assert capfd.readouterr().err == "", "OpenCV's own lines must not reach the terminal"


def test_unknown_scheme_and_dead_address_are_source_errors(camera: Any) -> None:
    with pytest.raises(SourceError, match="expected an address of rtsp"):
        open_source("gopher://user:secret@host/x")
    camera.mode = "refusing"
    with pytest.raises(SourceError, match="expected a video stream") as caught:
        open_source(camera.url.replace("//", "//user:secret@"))
    assert "secret" not in str(caught.value)


def test_passwords_are_not_shown() -> None:
    assert redacted("rtsp://me:pass@10.0.0.2/a@b") == "rtsp://***@10.0.0.2/a@b"
    assert redacted("rtsp://me:p@ss@10.0.0.2/live") == "rtsp://***@10.0.0.2/live"
    assert redacted("rtsp://10.0.0.2/live") == "rtsp://10.0.0.2/live"


def test_finite_video_behind_an_address_ends(tmp_path: Path) -> None:
    kit.write_video(tmp_path / "a.mp4", frames=15)

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args: object) -> None:
            super().__init__(*args, directory=os.fspath(tmp_path))  # type: ignore[arg-type]

        def log_message(self, *_: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Quiet)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        source = open_source(f"http://127.0.0.1:{server.server_port}/a.mp4", max_speed=True)
        assert not source.live
        assert len(all_frames(source)) == 15
    finally:
        server.shutdown()
        server.server_close()


def test_stream_that_dies_is_retried_and_comes_back(camera: Any) -> None:
    source = open_source(camera.url)
    assert source.live
    frames = [source.read() for _ in range(5)]
    states: list[str] = []
    done = threading.Event()

    def watch() -> None:
        while not done.wait(0.005):
            if not states or states[-1] != source.state:
                states.append(source.state)

    watcher = threading.Thread(target=watch)
    watcher.start()
    while not states:
        time.sleep(0.005)
    camera.mode = "refusing"
    threading.Timer(0.8, setattr, (camera, "mode", "sending")).start()
    began = time.monotonic()
    while not (source.state == "running" and len(states) > 1):
        frame = source.read()
        assert frame is not None
        frames.append(frame)
        assert time.monotonic() - began < GUARD_S
    done.set()
    watcher.join()
    source.close()
    assert states[0] == "running"
    assert states[1].startswith("retrying: expected a frame, found none")
    assert any(s.startswith("retrying: expected a video stream") for s in states), states
    assert [f.sequence for f in frames if f] == list(range(len(frames))), "numbers go on"
    assert len(source.warnings) == 1
    assert "was lost after" in source.warnings[0]


def test_stalled_stream_counts_as_lost(camera: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources_opencv, "TIMEOUT_MS", 400)
    stream = sources_opencv.Stream(camera.url)
    assert stream.read() is not None
    camera.mode = "stalled"

    def read_all() -> None:
        for _ in range(1000):
            stream.read()

    with pytest.raises(SourceError, match="expected a frame, found none"):
        read_all()
    stream.close()


class Flaky(BaseSource):
    """Gives two frames, then is gone."""

    live = True

    def _next(self) -> Picture | None:
        if self._sequence == 2:
            message = "flaky: expected a frame, found none; check the cable"
            raise SourceError(message)
        return Picture(np.zeros((4, 4, 3), np.uint8))


def test_pauses_between_attempts_grow_up_to_a_limit() -> None:
    attempts: list[float] = []

    def open_one() -> Source:
        attempts.append(time.monotonic())
        if 1 < len(attempts) < 7:
            message = "flaky: expected a camera, found none; plug it in"
            raise SourceError(message)
        return Flaky("flaky", 30)

    source = ReopeningSource(open_one, first_s=0.05, longest_s=0.2)
    assert [f.sequence for f in (source.read() for _ in range(4)) if f] == [0, 1, 2, 3]
    pauses = np.diff(attempts)[1:]
    assert len(pauses) == 5
    assert (pauses >= np.array([0.1, 0.2, 0.2, 0.2, 0.2]) - 0.01).all(), pauses
    source.close()


def test_closing_ends_a_pause_at_once() -> None:
    opened: list[Source] = []

    def open_one() -> Source:
        if opened:
            message = "flaky: expected a camera, found none; plug it in"
            raise SourceError(message)
        opened.append(Flaky("flaky", 30))
        return opened[0]

    source = ReopeningSource(open_one, first_s=1000)
    answers: list[object] = []
    reader = threading.Thread(
        target=lambda: answers.extend(source.read() for _ in range(3)), daemon=True
    )
    reader.start()
    while source.state == "running":
        time.sleep(0.01)
    assert source.state == "retrying: expected a frame, found none"
    source.close()
    reader.join(GUARD_S)
    assert answers[-1] is None
    assert source.state == "ended"


def test_first_opening_is_not_retried() -> None:
    def open_one() -> Source:
        message = "camera 0: expected a camera, found none; plug it in"
        raise SourceError(message)

    with pytest.raises(SourceError, match="camera 0"):
        ReopeningSource(open_one)


def test_close_during_a_hanging_read_returns_and_the_device_is_given_back_later() -> None:
    entered, go_on, released = threading.Event(), threading.Event(), threading.Event()

    class Hanging(BaseSource):
        def _next(self) -> Picture | None:
            entered.set()
            go_on.wait(GUARD_S)
            return Picture(np.zeros((4, 4, 3), np.uint8))

        def _release(self) -> None:
            assert go_on.is_set(), "released under a read that is under way"
            released.set()

    source = Hanging("hanging", 30)
    reader = threading.Thread(target=source.read, daemon=True)
    reader.start()
    assert entered.wait(GUARD_S)
    source.close()
    assert not released.is_set()
    go_on.set()
    assert released.wait(GUARD_S)
    reader.join(GUARD_S)
