"""The live page of ``edgesight run``: port, address, the way over SSH, browser, end."""

from __future__ import annotations

import os
import runpy
import signal
import socket
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from edgesight.__main__ import main
from edgesight.device_app import command, door
from edgesight.models.errors import OutputError

kit: Any = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("app_kit.py"))))
GUARD_S = 60


@pytest.fixture
def tiny(tmp_path: Path) -> str:
    return str(kit.build_tiny(tmp_path / "tiny.onnx"))


# The live page


class FakeServer:
    """Stands in for the web server: what the command does with one."""

    def __init__(self, host: str, port: int) -> None:
        self.url = f"http://{host}:{port}/"
        self.stopped = False

    def stop(self) -> None:
        self.stopped = True


def test_default_port_moves_on_and_a_chosen_one_does_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import errno
    import socket
    import types

    def start_server(
        live: Any, host: str, port: int, *, token: str | None, models: Any, recorder: Any
    ) -> FakeServer:
        if port in (8765, 8766):
            message = f"{host}:{port}: expected a free port, found it in use; choose another"
            raise OutputError(message) from OSError(errno.EADDRINUSE, "in use")
        asked.append(port)
        if host == "nowhere":
            raise OutputError(host) from socket.gaierror(socket.EAI_NONAME, "unknown")
        return FakeServer(host, port)

    asked: list[int] = []
    fake = types.ModuleType("edgesight.device_app.web.server")
    fake.start_server = start_server  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "edgesight.device_app.web.server", fake)
    assert door.open_server(None, "127.0.0.1", None).url == "http://127.0.0.1:8767/"
    assert door.open_server(None, "127.0.0.1", 9000).url == "http://127.0.0.1:9000/"
    with pytest.raises(OutputError, match="8765"):
        door.open_server(None, "127.0.0.1", 8765)
    asked.clear()
    with pytest.raises(OutputError, match="nowhere"):  # told at once: each look-up takes seconds
        door.open_server(None, "nowhere", None)
    assert asked == [8767]


def said(url: str, host: str, token: str | None = None) -> str:
    lines: list[str] = []
    door.announce(url, host, token, lines.append)
    return "\n".join(lines)


def test_address_and_over_ssh_the_way_to_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SSH_CONNECTION", raising=False)
    url = "http://127.0.0.1:8765/"
    assert url in said(url, "127.0.0.1")
    assert "ssh" not in said(url, "127.0.0.1")
    monkeypatch.setattr(door, "_user", lambda: "pi")
    monkeypatch.setenv("SSH_CONNECTION", "10.0.0.9 50000 10.0.0.2 22")
    assert "ssh -N -L 8765:127.0.0.1:8765 pi@10.0.0.2" in said(url, "127.0.0.1")
    monkeypatch.setenv("SSH_CONNECTION", "10.0.0.9 50000 10.0.0.2 2222")
    assert "ssh -p 2222 -N -L 8765:127.0.0.1:8765 pi@10.0.0.2" in said(url, "127.0.0.1")
    outside = said("http://0.0.0.0:8765/", "0.0.0.0", "a-token")
    assert "http://10.0.0.2:8765/?token=a-token" in outside
    assert "ssh" not in outside
    assert "whoever has this link" in outside


def test_browser_opens_only_in_front_of_the_user(monkeypatch: pytest.MonkeyPatch) -> None:
    for key in ("SSH_CONNECTION", "SSH_CLIENT", "SSH_TTY", "DISPLAY", "WAYLAND_DISPLAY"):
        monkeypatch.delenv(key, raising=False)
    monkeypatch.setattr(sys, "platform", "linux")
    assert not door.has_desktop()
    monkeypatch.setenv("DISPLAY", ":0")
    assert door.has_desktop()
    monkeypatch.setenv("SSH_TTY", "/dev/pts/1")
    assert not door.has_desktop()
    monkeypatch.delenv("SSH_TTY")
    monkeypatch.delenv("DISPLAY")
    monkeypatch.setenv("WAYLAND_DISPLAY", "wayland-0")
    assert door.has_desktop()


def test_default_threads_leave_a_core() -> None:
    threads = command.default_threads()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    assert 1 <= threads <= 4
    assert threads < (cores or 1) or cores == 1


@pytest.mark.skipif(os.name != "posix", reason="POSIX signals")
def test_web_run_serves_a_page_until_ctrl_c(tiny: str) -> None:
    import urllib.request

    args = ("-m", "edgesight", "run", "--model", tiny, "--port", "0", "--no-browser")
    with kit.process(*args, "--reference", "none") as running:
        assert running.stdout is not None
        line = running.stdout.readline()
        assert line.startswith("live page: http://127.0.0.1:"), line
        url = line.split()[2]
        with urllib.request.urlopen(url, timeout=GUARD_S) as answer:
            assert answer.status == 200
            assert b"<html" in answer.read(2000).lower()
        time.sleep(0.5)
        running.send_signal(signal.SIGINT)
        began = time.monotonic()
        out, err = running.communicate(timeout=GUARD_S)
        took = time.monotonic() - began
    assert running.returncode == 0, err
    assert took < kit.end_limit_s()
    assert "tiny on samples" in out
    assert "Traceback" not in err


def test_chosen_port_in_use_is_one_line(
    tiny: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    events = str(tmp_path / "events.jsonl")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        code = main(["run", "--model", tiny, "--port", port, "--no-browser", "--events", events])
    err = capfd.readouterr().err
    assert code == 2
    assert err.startswith("edgesight: error: ")
    assert err.count("\n") == 1
    assert port in err
    assert list(tmp_path.glob("events*")) == [], "of a run that did not begin"


def test_an_option_without_effect_is_told(
    tiny: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--fullscreen", "--recordings", str(tmp_path / "rec"), "--plain"]
    asked = ["run", "--model", tiny, "--display", "none", "--frames", "2", "--reference", "none"]
    assert main([*asked, *words]) == 0
    out = capsys.readouterr().out
    for name in ("--fullscreen", "--recordings", "--plain"):
        assert f"note: {name} has no effect without" in out
    assert main(asked) == 0
    assert "has no effect" not in capsys.readouterr().out
