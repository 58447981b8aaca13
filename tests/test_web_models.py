"""The model choice over HTTP: streamed in, with limits, refused whole, chosen in a real run."""

from __future__ import annotations

import http.client
import json
import runpy
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from edgesight.device_app.accuracy import NoAccuracy
from edgesight.device_app.live import LiveView
from edgesight.device_app.loop import Loop
from edgesight.device_app.model_choice import ModelChoice
from edgesight.device_app.model_store import ModelStore
from edgesight.device_app.sources import ListSource
from edgesight.device_app.web import uploads
from edgesight.device_app.web.server import Server, start_server
from edgesight.models.detector import OnnxDetector
from edgesight.models.errors import OutputError

kit: Any = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("web_kit.py"))))
app: Any = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("app_kit.py"))))
until, GOOD = kit.until, kit.GOOD
TOKEN = "correct-horse-battery-staple"
BEARER = f"Bearer {TOKEN}"
THERE = ["blind.onnx", "first.onnx", "second.onnx"]


@pytest.fixture
def models(tmp_path: Path) -> Any:
    return kit.FakeModels(tmp_path)


@pytest.fixture
def live() -> LiveView:
    view = LiveView()
    view.set_figures(kit.figures())
    return view


@pytest.fixture
def site(live: LiveView, models: Any) -> Iterator[Server]:
    running = start_server(live, "127.0.0.1", 0, token=TOKEN, models=models, stall_s=5.0)
    yield running
    models.go.set()
    live.close()
    running.stop()


def ask(site: Server, method: str, path: str, body: Any = None) -> Any:
    return kit.ask(site, method, path, body, Authorization=BEARER)


def begin(site: Server, name: str, length: int, first: bytes) -> http.client.HTTPConnection:
    """Begins to send a file and leaves it at that."""
    link = http.client.HTTPConnection("127.0.0.1", kit.port_of(site), timeout=kit.GUARD_S)
    link.putrequest("PUT", f"/api/models/{name}")
    link.putheader("Authorization", BEARER)
    link.putheader("Content-Length", str(length))
    link.endheaders(first)
    return link


def under_way(models: Any) -> bool:
    return models.names() != THERE


def test_a_file_is_taken_listed_and_chosen(site: Server, models: Any) -> None:
    body = GOOD * 5000
    answer = ask(site, "PUT", "/api/models/new.onnx", body)
    assert answer.status == 201
    assert {"name": "new.onnx", "bytes": len(body), "current": False} in answer.json["models"]
    assert (models.folder / "new.onnx").read_bytes() == body
    answer = ask(site, "POST", "/api/model", {"name": "new.onnx"})
    assert (answer.status, answer.json["busy"]) == (202, "new.onnx")
    busy = ask(site, "POST", "/api/model", {"name": "second.onnx"})
    assert busy.status == 409
    assert "one model at a time" in busy.json["error"]
    models.go.set()
    until(lambda: ask(site, "GET", "/api/models").json["current"] == "new.onnx")


def test_a_refused_file_leaves_nothing(site: Server, models: Any) -> None:
    answer = ask(site, "PUT", "/api/models/new.onnx", b"no model")
    assert answer.status == 400
    assert "expected an ONNX model, found something else" in answer.json["error"]
    assert ask(site, "PUT", "/api/models/new.onnx", b"").status == 400
    assert models.names() == THERE


@pytest.mark.parametrize(
    "name",
    ["..", "%2e%2e%2fx.onnx", ".hidden.onnx", "a%00.onnx", "x" * 121 + ".onnx", "a%5cb.onnx",
     "model.txt", "first.onnx"],
)  # fmt: skip
def test_a_strange_name_is_refused(site: Server, models: Any, name: str) -> None:
    before = (models.folder / "first.onnx").read_bytes()
    assert ask(site, "PUT", f"/api/models/{name}", GOOD).status in (400, 404, 405)
    assert models.names() == THERE
    assert (models.folder / "first.onnx").read_bytes() == before
    assert sorted(p.name for p in models.folder.parent.glob("*.onnx")) == []


@pytest.mark.parametrize("body", [{}, {"name": 1}, {"name": ""}, {"name": "x" * 201}, [], {"x": 1},
                                  {"name": "first.onnx", "force": True}])  # fmt: skip
def test_a_strange_choice_is_refused(site: Server, models: Any, body: Any) -> None:
    assert ask(site, "POST", "/api/model", body).status == 400
    assert models.state()["busy"] is None
    assert ask(site, "POST", "/api/model", {"name": "../../etc/passwd"}).status == 404


def test_without_a_token_nothing_is_taken(live: LiveView, models: Any) -> None:
    running = start_server(live, "127.0.0.1", 0, models=models)
    try:
        answer = kit.ask(running, "PUT", "/api/models/new.onnx", GOOD)
        assert answer.status == 403
        assert "--token-file" in answer.json["error"]
        told = kit.ask(running, "GET", "/api/models").json
        assert told["uploads"] is False
        assert told["uploads_refused"] == answer.json["error"]
        assert kit.ask(running, "POST", "/api/model", {"name": "second.onnx"}).status == 202
    finally:
        running.stop()
    assert models.names() == THERE


def test_with_a_token_a_wrong_one_takes_nothing(site: Server, models: Any) -> None:
    for header in ({}, {"Authorization": "Bearer wrong"}):
        assert kit.ask(site, "PUT", "/api/models/new.onnx", GOOD, **header).status == 401
    evil = {"Authorization": BEARER, "Origin": "http://evil.example"}
    assert kit.ask(site, "PUT", "/api/models/new.onnx", GOOD, **evil).status == 403
    assert models.names() == THERE


def test_a_file_that_is_too_large_is_told_so_while_it_is_sent(site: Server, models: Any) -> None:
    # The answer comes although the sender has not finished, and is not lost with its connection.
    answer = ask(site, "PUT", "/api/models/new.onnx", GOOD * 1_500_000)
    assert answer.status == 413
    assert "at most 100000 bytes" in answer.json["error"]
    told = begin(site, "new.onnx", 10**12, b"")
    assert told.getresponse().status == 413, "before anything of it is sent"
    told.close()
    chunked = (GOOD * 100 for _ in range(1000))  # and without telling its length
    link = http.client.HTTPConnection("127.0.0.1", kit.port_of(site), timeout=kit.GUARD_S)
    link.request("PUT", "/api/models/new.onnx", chunked, {"Authorization": BEARER})
    assert link.getresponse().status == 413
    link.close()
    assert models.names() == THERE


def test_one_upload_at_a_time(site: Server, models: Any) -> None:
    first = begin(site, "slow.onnx", 1000, GOOD)
    until(lambda: under_way(models))
    answer = ask(site, "PUT", "/api/models/new.onnx", GOOD)
    assert answer.status == 409
    assert "another under way" in answer.json["error"]
    first.close()
    until(lambda: not under_way(models))
    assert ask(site, "PUT", "/api/models/new.onnx", GOOD).status == 201


def test_a_sender_that_goes_stalls_or_takes_for_ever_leaves_nothing(
    site: Server, models: Any, live: LiveView, monkeypatch: pytest.MonkeyPatch
) -> None:
    gone = begin(site, "gone.onnx", 1000, GOOD)
    until(lambda: under_way(models))
    gone.sock.shutdown(socket.SHUT_RDWR)
    gone.close()
    until(lambda: not under_way(models), "what a lost sender began is still there")
    quick = start_server(live, "127.0.0.1", 0, token=TOKEN, models=models, stall_s=0.3)
    try:
        stalled = begin(quick, "stalled.onnx", 1000, GOOD)
        answer = stalled.getresponse()
        assert answer.status == 408
        assert "within 0.3 s" in json.loads(answer.read())["error"]
    finally:
        quick.stop()
    monkeypatch.setattr(uploads, "UPLOAD_S", 0.5)
    slow = begin(site, "slow.onnx", 1000, GOOD)
    ending = threading.Event()

    def trickle() -> None:
        while not ending.wait(0.05):
            try:
                slow.send(b"x")
            except OSError:
                return

    thread = threading.Thread(target=trickle)
    thread.start()
    assert slow.getresponse().status == 408
    ending.set()
    thread.join()
    until(lambda: not under_way(models))


def test_the_end_of_the_run_ends_an_upload(live: LiveView, models: Any) -> None:
    running = start_server(live, "127.0.0.1", 0, token=TOKEN, models=models)
    link = begin(running, "slow.onnx", 1000, GOOD)
    until(lambda: under_way(models))
    running.stop()
    assert models.names() == THERE
    link.close()


def test_a_full_disk_is_told(site: Server, models: Any) -> None:
    def full(name: str) -> Any:
        message = f"cannot keep {name}: No space left on device; free space"
        raise OutputError(message)

    models.receive = full
    answer = ask(site, "PUT", "/api/models/new.onnx", GOOD)
    assert (answer.status, "No space left" in answer.json["error"]) == (507, True)


def test_no_uploads_without_a_folder(site: Server, models: Any) -> None:
    models._store.uploads = False
    answer = ask(site, "PUT", "/api/models/new.onnx", GOOD)
    assert (answer.status, "expected a folder" in answer.json["error"]) == (403, True)
    told = ask(site, "GET", "/api/models").json
    assert (told["uploads"], "--models FOLDER" in told["uploads_refused"]) == (False, True)


def test_pictures_go_on_while_a_disk_is_slow(site: Server, models: Any) -> None:
    writing, go = threading.Event(), threading.Event()
    receive = models.receive

    def slow(name: str) -> Any:
        upload = receive(name)
        write = upload.write

        def wait_and_write(data: bytes) -> None:
            writing.set()
            go.wait(kit.GUARD_S)
            write(data)

        upload.write = wait_and_write
        return upload

    models.receive = slow
    sending = threading.Thread(target=ask, args=(site, "PUT", "/api/models/new.onnx", GOOD))
    sending.start()
    assert writing.wait(kit.GUARD_S)
    began = time.monotonic()
    assert ask(site, "GET", "/api/figures").status == 200
    assert time.monotonic() - began < kit.GUARD_S / 2
    go.set()
    sending.join()
    assert "new.onnx" in models.names()


def test_a_real_run_takes_a_real_model(tmp_path: Path) -> None:
    folder = tmp_path / "models"
    folder.mkdir()
    first = app.build_tiny(tmp_path / "first.onnx")
    other = app.build_tiny(tmp_path / "other.onnx", shift=1).read_bytes()
    source = ListSource(
        [np.full((64, 64, 3), 230, np.uint8)], fps=50, live=True, paced=True, loop=True
    )
    live = LiveView()
    loop = Loop(source, OnnxDetector(first), live=live)
    store = ModelStore(first, folder, uploads=True)
    choice = ModelChoice(loop, store, OnnxDetector, lambda _: NoAccuracy(""), score=0.35, trial_s=3)
    running = start_server(live, "127.0.0.1", 0, token=TOKEN, models=choice)
    loop.start()
    try:
        refused = ask(running, "PUT", "/api/models/bad.onnx", b"no model at all")
        assert refused.status == 400
        assert "expected" in refused.json["error"]
        assert ask(running, "PUT", "/api/models/other.onnx", other).status == 201
        assert ask(running, "POST", "/api/model", {"name": "other.onnx"}).status == 202
        until(lambda: ask(running, "GET", "/api/models").json["busy"] is None)
        state = ask(running, "GET", "/api/models").json
        assert (state["current"], state["error"]) == ("other.onnx", None)
        assert ask(running, "GET", "/api/events").json["events"][-1]["kind"] == "model"
    finally:
        choice.close()
        choice.wait(kit.GUARD_S)
        running.stop()
        loop.stop()
        source.close()
        loop.finish()
    assert [p.name for p in folder.iterdir()] == ["other.onnx"]
