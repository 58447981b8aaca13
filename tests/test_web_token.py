"""The token of the live page: asked for beyond loopback, moved into a cookie, told to nobody."""

from __future__ import annotations

import http.client
import json
import os
import re
import runpy
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from edgesight.__main__ import main
from edgesight.device_app import door
from edgesight.device_app.live import LiveView
from edgesight.device_app.web.guard import is_loopback, new_token
from edgesight.device_app.web.server import Server, start_server
from edgesight.models.errors import InputError

browser_kit: Any = SimpleNamespace(
    **runpy.run_path(str(Path(__file__).with_name("test_web_browser.py")))
)
kit: Any = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("app_kit.py"))))
TOKEN = "correct-horse-battery-staple"
PATHS = ("/", "/page.js", "/stream", "/snapshot.jpg", "/api/figures", "/api/controls", "/none")


@pytest.fixture
def live() -> Iterator[LiveView]:
    view = LiveView()
    yield view
    view.close()


@pytest.fixture
def server(live: LiveView) -> Iterator[Server]:
    running = start_server(live, "127.0.0.1", 0, token=TOKEN)
    yield running
    live.close()
    running.stop()


def ask(server: Server, path: str, method: str = "GET", **headers: str) -> Any:
    port = int(server.url.rsplit(":", 1)[1].strip("/"))
    link = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    link.request(method, path, b"{}" if method == "POST" else None, headers)
    answer = link.getresponse()
    found = SimpleNamespace(status=answer.status, headers=answer.headers, body=answer.read(20_000))
    link.close()
    return found


@pytest.mark.parametrize("path", PATHS)
def test_without_it_nothing_is_told(server: Server, path: str) -> None:
    answer = ask(server, path)
    assert answer.status == 401
    assert "set-cookie" not in answer.headers
    assert TOKEN.encode() not in answer.body
    assert answer.headers["x-content-type-options"] == "nosniff"


@pytest.mark.parametrize(
    "headers",
    [
        {"Authorization": "Bearer wrong"},
        {"Authorization": f"Bearer {TOKEN}x"},
        {"Authorization": f"Basic {TOKEN}"},
        {"Authorization": "Bearer ñ"},
        {"Cookie": f"other={TOKEN}"},
        {"Cookie": "edgesight-1=" + TOKEN},
        {"Cookie": ";;;=\x7f"},
    ],
)
def test_a_wrong_one_is_none(server: Server, headers: dict[str, str]) -> None:
    encoded: Any = {k: v.encode("latin-1") for k, v in headers.items()}
    assert ask(server, "/api/figures", **encoded).status == 401


@pytest.mark.parametrize(
    "path", ["/?token=", "/?token=wrong", "/api/figures?token=" + TOKEN, "/?x=" + TOKEN]
)
def test_only_the_right_link_opens(server: Server, path: str) -> None:
    assert ask(server, path).status == 401


def test_an_address_of_a_thousand_fields_is_refused(server: Server) -> None:
    assert ask(server, "/?" + "a=b&" * 1000).status == 400


def test_the_link_becomes_a_cookie_that_scripts_cannot_read(server: Server) -> None:
    answer = ask(server, f"/?token={TOKEN}")
    assert answer.status == 303
    assert answer.headers["location"] == "/", "it must not stay in the address"
    cookie = answer.headers["set-cookie"]
    assert "httponly" in cookie.lower()
    assert "samesite=lax" in cookie.lower()
    name = cookie.split("=")[0]
    assert name.endswith(server.url.rstrip("/").rpartition(":")[2]), "not that of another port"
    found = ask(server, "/api/figures", Cookie=cookie.split(";")[0])
    assert found.status == 200
    assert json.loads(found.body)["viewers"] == 0
    assert ask(server, f"/?token={TOKEN}", "POST").status == 401
    for other in ('x={"a": 1}', "prefs=a b", "u[0]=1", "=", "ü=1"):  # of another port's program
        both = f"{other}; {cookie.split(';')[0]}; {other}".encode("latin-1")
        own: Any = {"Cookie": both}
        assert ask(server, "/api/figures", **own).status == 200


def test_programs_bring_it_in_a_header(server: Server, live: LiveView) -> None:
    assert ask(server, "/api/figures", Authorization=f"Bearer {TOKEN}").status == 200
    assert ask(server, "/api/figures", Authorization=f"bearer  {TOKEN}").status == 200
    strange = {"Authorization": f"Bearer {TOKEN}", "Origin": "http://evil.example"}
    assert ask(server, "/api/controls", "POST", **strange).status == 403


def test_a_viewer_with_the_link_sees_the_page(tmp_path: Path) -> None:
    feed = browser_kit.Feed()
    feed.show(60)
    running = start_server(feed.live, "127.0.0.1", 0, token=TOKEN)
    with browser_kit.sync_playwright() as playwright:
        chromium = playwright.chromium.launch(
            executable_path=browser_kit.BINARY, args=browser_kit.FLAGS
        )
        tab = chromium.new_page()
        tab.goto(running.url)
        assert "wants the link" in tab.inner_text("body")
        tab.goto(f"{running.url}?token={TOKEN}")
        assert tab.url == running.url
        browser_kit.until_shade(tab, feed, 120)
        with tab.expect_download() as waiting:
            feed.show(130)
            tab.click("#snapshot")
        waiting.value.save_as(tmp_path / "shot.jpg")
        assert (tmp_path / "shot.jpg").stat().st_size > 100
        assert tab.evaluate("document.cookie") == ""
        chromium.close()
    feed.live.close()
    running.stop()


def test_beyond_this_machine_there_always_is_one(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("EDGESIGHT_TOKEN", raising=False)
    for host in ("127.0.0.1", "localhost", "::1", "127.0.0.9"):
        assert is_loopback(host)
        assert door.page_token(host, None) is None
    for host in ("0.0.0.0", "::", "192.168.1.5", "board.local"):
        assert not is_loopback(host)
        first, second = door.page_token(host, None), door.page_token(host, None)
        assert first is not None
        assert first != second
        assert len(first) >= 24
    own = tmp_path / "token"
    own.write_text(TOKEN + "\n")
    assert door.page_token("127.0.0.1", own) == TOKEN
    monkeypatch.setenv("EDGESIGHT_TOKEN", TOKEN[::-1])
    assert door.page_token("0.0.0.0", None) == TOKEN[::-1]
    assert door.page_token("0.0.0.0", own) == TOKEN, "what is named here goes first"


@pytest.mark.parametrize("text", ["", "short", "sixteen letters and blanks", "x" * 201, "ü" * 20])
def test_a_token_that_is_easy_to_guess_or_no_text_is_refused(tmp_path: Path, text: str) -> None:
    own = tmp_path / "token"
    own.write_text(text, encoding="utf-8")
    with pytest.raises(InputError, match="expected a token of 16 to 200") as found:
        door.page_token("0.0.0.0", own)
    assert not text or text not in str(found.value)


def test_a_token_file_that_is_missing_ends_with_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "--token-file", "/nowhere/token"]) == 2
    assert "/nowhere/token: expected a file that holds a token" in capsys.readouterr().err


def test_tokens_are_fit_for_addresses() -> None:
    assert all(re.fullmatch(r"[A-Za-z0-9_-]{24}", new_token()) for _ in range(50))


def test_the_link_is_printed_with_a_qr_code_in_a_terminal(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("SSH_CONNECTION", raising=False)
    monkeypatch.setattr(door, "own_address", lambda: "10.0.0.2")
    lines: list[str] = []
    terminal: Any = SimpleNamespace(isatty=lambda: True, encoding="utf-8")
    here = door.announce("http://0.0.0.0:8765/", "0.0.0.0", TOKEN, lines.append, terminal)
    assert here == f"http://127.0.0.1:8765/?token={TOKEN}"
    assert f"http://10.0.0.2:8765/?token={TOKEN}" in lines[0]
    assert len(lines[-1].splitlines()) > 15, "a QR code"
    for isatty, encoding in ((True, "latin-1"), (True, None), (False, "utf-8")):
        unable: Any = SimpleNamespace(isatty=lambda yes=isatty: yes, encoding=encoding)
        del lines[:]
        door.announce("http://0.0.0.0:8765/", "0.0.0.0", TOKEN, lines.append, unable)
        assert all(len(line.splitlines()) == 1 for line in lines)


@pytest.mark.parametrize("name", ["raspberrypi.lan", "board.fritz.box:9000"])
def test_with_the_token_any_name_of_the_board_is_right(live: LiveView, name: str) -> None:
    running = start_server(live, "0.0.0.0", 0, token=TOKEN)
    try:
        right = {"Authorization": f"Bearer {TOKEN}", "Host": name}
        assert ask(running, "/api/figures", **right).status == 200
        assert ask(running, "/api/figures", Host=name).status == 401
    finally:
        live.close()
        running.stop()


def test_a_run_in_the_network_keeps_strangers_out(tmp_path: Path) -> None:
    tiny = str(kit.build_tiny(tmp_path / "tiny.onnx"))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    line = [sys.executable, "-m", "edgesight", "run", "--model", tiny, "--host", "0.0.0.0"]
    line += ["--port", str(port), "--no-browser", "--reference", "none", "--json"]
    env = {k: v for k, v in os.environ.items() if k not in ("EDGESIGHT_TOKEN", "SSH_CONNECTION")}
    with subprocess.Popen(
        line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env
    ) as process:
        assert process.stderr is not None
        told = process.stderr.readline()
        while "live page" not in told:
            told = process.stderr.readline()
        match = re.search(r"token=(\S+)", told)
        assert match is not None
        token = match[1]
        running: Any = SimpleNamespace(url=f"http://127.0.0.1:{port}/")
        assert ask(running, "/api/figures").status == 401
        answer = ask(running, "/api/figures", Authorization=f"Bearer {token}")
        assert answer.status == 200
        assert token.encode() not in answer.body
        time.sleep(0.5)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert token not in out
    assert token not in err
