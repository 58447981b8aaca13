"""``edgesight fetch`` against servers on the loopback interface, good ones and bad ones."""

from __future__ import annotations

import errno
import hashlib
import json
import random
import threading
import urllib.request
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from edgesight.__main__ import main
from edgesight.deploy import fetch
from edgesight.deploy.fetch import Remote, download
from edgesight.models.errors import DownloadError, OutputError

CONTENT = random.Random(7).randbytes(300_000)
DIGEST = hashlib.sha256(CONTENT).hexdigest()


class Server(ThreadingHTTPServer):
    """Serves ``content``; the knobs make it misbehave."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.content = CONTENT
        self.ranges = True  # whether Range is honoured
        self.shift = 0  # a 206 that starts so many bytes too late
        self.cut_after: list[int] = []  # bytes after which each next answer is cut
        self.status: list[int] = []  # codes that the next answers give instead of content
        self.redirect = ""
        self.chunked = False  # no Content-Length
        self.requests: list[str | None] = []  # the Range header of every request

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/model.onnx"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        server = self.server
        asked = self.headers["Range"]
        server.requests.append(asked)
        if self.path != "/model.onnx":
            self.send_error(404)
            return
        if server.status:
            self.send_error(server.status.pop(0))
            return
        if server.redirect:
            where, server.redirect = server.redirect, ""
            self.send_response(302)
            self.send_header("Location", where)
            self.end_headers()
            return
        start = 0
        if asked and server.ranges:
            start = int(asked.removeprefix("bytes=").removesuffix("-"))
            if start >= len(server.content):
                self.send_error(416)
                return
            start += server.shift
            self.send_response(206)
            end = len(server.content)
            self.send_header("Content-Range", f"bytes {start}-{end - 1}/{end}")
        else:
            self.send_response(200)
        body = server.content[start:]
        if not server.chunked:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[: server.cut_after.pop(0)] if server.cut_after else body)

    def log_message(self, format: str, *args: Any) -> None:
        """Keeps quiet."""


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setattr(fetch, "BACKOFF_S", 0.001)
    monkeypatch.setenv("no_proxy", "*")
    server = Server()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def remote(server: Server, *, size: int | None = len(CONTENT), sha256: str = DIGEST) -> Remote:
    return Remote(server.url, sha256, size, "Apache-2.0", "a test")


def part(folder: Path) -> Path:
    return folder / "model.onnx.part"


@pytest.mark.parametrize("size", [len(CONTENT), None])
@pytest.mark.parametrize("chunked", [False, True])
def test_brings_the_file(server: Server, tmp_path: Path, size: int | None, chunked: bool) -> None:
    server.chunked = chunked
    path, downloaded = download(remote(server, size=size), tmp_path / "new" / "folder")
    assert downloaded
    assert path.read_bytes() == CONTENT
    assert [p.name for p in path.parent.iterdir()] == ["model.onnx"]


def test_a_right_file_is_not_downloaded_again(server: Server, tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(CONTENT)
    assert download(remote(server), tmp_path) == (tmp_path / "model.onnx", False)
    assert server.requests == []


def test_another_file_of_that_name_stays_unless_forced(server: Server, tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(b"my own work")
    with pytest.raises(OutputError, match="--force"):
        download(remote(server), tmp_path)
    assert (tmp_path / "model.onnx").read_bytes() == b"my own work"
    assert server.requests == []
    download(remote(server), tmp_path, force=True)
    assert (tmp_path / "model.onnx").read_bytes() == CONTENT


def test_goes_on_where_an_earlier_run_stopped(server: Server, tmp_path: Path) -> None:
    part(tmp_path).write_bytes(CONTENT[:100_000])
    path, _ = download(remote(server), tmp_path)
    assert server.requests == ["bytes=100000-"]
    assert path.read_bytes() == CONTENT


def test_goes_on_after_a_cut_connection(server: Server, tmp_path: Path) -> None:
    server.cut_after = [120_000, 70_000]
    path, _ = download(remote(server), tmp_path)
    assert path.read_bytes() == CONTENT
    first, second, third = server.requests
    assert first is None
    assert second is not None
    assert third is not None
    resumed = [int(r.removeprefix("bytes=").removesuffix("-")) for r in (second, third)]
    assert 0 < resumed[0] <= 120_000
    assert resumed[0] < resumed[1] <= 190_000


def test_a_server_that_ignores_range(server: Server, tmp_path: Path) -> None:
    server.ranges = False
    part(tmp_path).write_bytes(CONTENT[:100_000])
    path, _ = download(remote(server), tmp_path)
    assert path.read_bytes() == CONTENT


def test_a_server_that_sends_another_range(server: Server, tmp_path: Path) -> None:
    server.shift = 10
    part(tmp_path).write_bytes(CONTENT[:100_000])
    path, _ = download(remote(server), tmp_path)
    assert path.read_bytes() == CONTENT
    assert server.requests == ["bytes=100000-", None]


def test_a_part_of_something_else_is_dropped(server: Server, tmp_path: Path) -> None:
    part(tmp_path).write_bytes(b"x" * 100_000)
    path, _ = download(remote(server), tmp_path)
    assert path.read_bytes() == CONTENT
    assert server.requests == ["bytes=100000-", None]


def test_a_complete_part_needs_no_more(server: Server, tmp_path: Path) -> None:
    part(tmp_path).write_bytes(CONTENT)
    assert download(remote(server), tmp_path)[0].read_bytes() == CONTENT
    assert server.requests == []
    (tmp_path / "model.onnx").replace(part(tmp_path))
    # Where the size is not known, the server says that there is nothing more.
    assert download(remote(server, size=None), tmp_path)[0].read_bytes() == CONTENT
    assert server.requests == ["bytes=300000-"]


def test_wrong_content_is_thrown_away(server: Server, tmp_path: Path) -> None:
    server.content = CONTENT[:-1] + b"?"
    (tmp_path / "model.onnx").write_bytes(b"earlier")
    with pytest.raises(DownloadError, match=f"expected SHA-256 {DIGEST}, found"):
        download(remote(server), tmp_path, force=True)
    assert (tmp_path / "model.onnx").read_bytes() == b"earlier"
    assert not part(tmp_path).exists()
    assert len(server.requests) == 1


def test_more_than_expected_is_stopped(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for size in (1000, None):
        monkeypatch.setattr(fetch, "SIZE_LIMIT", 1000)
        with pytest.raises(DownloadError, match="expected at most 1000 bytes"):
            download(remote(server, size=size), tmp_path)
        assert list(tmp_path.iterdir()) == []


def test_a_busy_server_is_asked_again(server: Server, tmp_path: Path) -> None:
    server.status = [503, 429, 500]
    path, _ = download(remote(server), tmp_path)
    assert path.read_bytes() == CONTENT
    assert len(server.requests) == 4


def test_gives_up_and_keeps_what_came(
    server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    server.cut_after = [1000] * 20
    with pytest.raises(DownloadError, match=r"cut after \d+ .*run the command again"):
        download(remote(server), tmp_path)
    assert len(server.requests) == fetch.TRIES
    assert not (tmp_path / "model.onnx").exists()
    assert CONTENT.startswith(part(tmp_path).read_bytes())
    assert "trying again" in capsys.readouterr().err


def test_a_missing_file_is_not_asked_for_twice(server: Server, tmp_path: Path) -> None:
    gone = Remote(server.url + ".gone", DIGEST, None, "", "")
    with pytest.raises(DownloadError, match="the server answered 404"):
        download(gone, tmp_path)
    assert len(server.requests) == 1


def test_no_server_at_all(server: Server, tmp_path: Path) -> None:
    there = remote(server)
    server.server_close()  # the port is closed now
    with pytest.raises(DownloadError, match=r"cannot reach 127\.0\.0\.1 \(Connection refused\)"):
        download(there, tmp_path)


@pytest.mark.parametrize("url", ["http://example.com/m.onnx", "ftp://127.0.0.1/m", "file:///m"])
def test_only_https(tmp_path: Path, url: str) -> None:
    with pytest.raises(DownloadError, match="expected an https address"):
        download(Remote(url, DIGEST, None, "", ""), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_redirects(server: Server, tmp_path: Path) -> None:
    server.redirect = "http://example.com/m.onnx"
    with pytest.raises(DownloadError, match="expected an https address, found http://example"):
        download(remote(server), tmp_path)
    server.requests.clear()
    server.redirect = server.url
    part(tmp_path).write_bytes(CONTENT[:5])
    assert download(remote(server), tmp_path)[0].read_bytes() == CONTENT
    assert server.requests == ["bytes=5-", "bytes=5-"]  # the range goes along


def test_a_redirect_from_outside_never_leads_into_this_machine() -> None:
    request = urllib.request.Request("https://example.com/m.onnx")
    with pytest.raises(DownloadError, match="expected an https address"):
        fetch._SafeRedirects().redirect_request(
            request, None, 302, "", {}, "http://127.0.0.1/m.onnx"
        )


def test_a_full_disk(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OutputError, match="No space left on device; free space"):
        download(remote(server), tmp_path)
    assert not (tmp_path / "model.onnx").exists()


def test_a_folder_that_is_a_file(server: Server, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot write"):
        download(remote(server), tmp_path / "file")


def test_the_command(
    server: Server,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(fetch, "FETCHABLE", {"small_one": remote(server)})
    command = ["fetch", "small_one", "--out", str(tmp_path)]
    assert main(command) == 0
    assert capsys.readouterr().out.startswith(f"saved {tmp_path / 'model.onnx'} (0.3 MB, SHA-256")
    assert main([*command, "--json"]) == 0
    row = json.loads(capsys.readouterr().out)
    assert row["path"] == str(tmp_path / "model.onnx")
    assert row["sha256"] == DIGEST
    assert row["downloaded"] is False
    assert main(["fetch", "smal_one"]) == 2
    assert "did you mean 'small_one'?" in capsys.readouterr().err
    assert main(["fetch"]) == 2
    assert "one of small_one" in capsys.readouterr().err


def test_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fetch", "--list", "--json"]) == 0
    table = json.loads(capsys.readouterr().out)
    assert {"yolox_nano", "yolox_tiny", "nanodet_plus_m"} <= set(table)
    for row in table.values():
        assert row["url"].startswith("https://github.com/")
        assert len(bytes.fromhex(row["sha256"])) == 32
    assert main(["fetch", "--list"]) == 0
    assert "yolox_nano.onnx" in capsys.readouterr().out
