"""The page's API: as it is described, with limits, and nothing changed by a bad request."""

from __future__ import annotations

import http.client
import json
import re
import runpy
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jsonschema
import pytest
from edgesight.device_app.live import LiveView
from edgesight.device_app.web.api import Api
from edgesight.device_app.web.history import COLUMNS, History
from edgesight.device_app.web.openapi import description
from edgesight.device_app.web.server import Server, start_server
from edgesight.device_app.web.stream import Relay
from openapi_spec_validator import OpenAPIV31SpecValidator

kit: Any = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("web_kit.py"))))
ask, until = kit.ask, kit.until
TOKEN = "correct-horse-battery-staple"


@pytest.fixture
def live() -> Iterator[LiveView]:
    view = LiveView()
    view.set_figures(kit.figures())
    view.publish(kit.jpeg(), 1)
    yield view
    view.close()


@pytest.fixture
def recorder(tmp_path: Path, live: LiveView) -> Any:
    (tmp_path / "recordings").mkdir()
    return kit.FakeRecorder(tmp_path / "recordings", live)


@pytest.fixture
def site(tmp_path: Path, live: LiveView, recorder: Any) -> Iterator[Server]:
    (tmp_path / "models").mkdir()
    models = kit.FakeModels(tmp_path / "models")
    running = start_server(live, "127.0.0.1", 0, recorder=recorder, models=models)
    yield running
    models.go.set()
    live.close()
    running.stop()


def check(path: str, method: str, answer: Any, url: str | None = None) -> None:
    """Checks an answer against what the description says of it."""
    told = description()["paths"][path][method.lower()]["responses"]
    assert str(answer.status) in told, f"{method} {url or path}: {answer.status} is not described"
    content = told[str(answer.status)].get("content", {})
    kind = answer.headers.get("content-type", "").partition(";")[0]
    if not content:
        assert answer.body == b""
        return
    assert kind in content or f"{kind.partition('/')[0]}/*" in content, (path, kind)
    schema = content.get(kind, {}).get("schema")
    if kind == "application/json":
        whole = {**schema, "components": description()["components"]}
        jsonschema.Draft202012Validator(whole).validate(answer.json)


def test_the_description_is_valid_and_has_every_address(live: LiveView) -> None:
    OpenAPIV31SpecValidator(description()).validate()
    api = Api(live, Relay(live), History(live), token=False, stall_s=1.0)
    served = {
        (route.path, method)
        for route in api.routes()
        for method in (route.methods or set()) - {"HEAD"}
    }
    described = {
        (path, method.upper())
        for path, item in description()["paths"].items()
        for method in item
        if method != "parameters"
    }
    assert served == described
    ids = [
        operation["operationId"]
        for item in description()["paths"].values()
        for method, operation in item.items()
        if method != "parameters"
    ]
    assert len(ids) == len(set(ids))


def test_real_answers_are_as_described(site: Server, live: LiveView, recorder: Any) -> None:
    live.events.add("enter", "a person entered door", zone="door", track=7)
    recorder.start()
    recorder.stop()
    name = recorder.list()[0]["name"]
    for path, method, body in (
        ("/", "GET", None), ("/page.js", "GET", None), ("/api", "GET", None),
        ("/api/openapi.json", "GET", None), ("/api/figures", "GET", None),
        ("/api/history", "GET", None), ("/api/events", "GET", None),
        ("/api/controls", "GET", None), ("/api/controls", "POST", {"classes": ["cat"]}),
        ("/api/controls", "POST", {"classes": 1}), ("/api/models", "GET", None),
        ("/api/model", "POST", {"name": "second.onnx"}), ("/api/model", "POST", {"name": "none"}),
        ("/api/model", "POST", {"name": "blind.onnx"}), ("/api/recording", "GET", None),
        ("/api/recording", "POST", {"on": True}), ("/api/recording", "POST", {"on": 1}),
        ("/api/recordings", "GET", None), ("/metrics", "GET", None), ("/healthz", "GET", None),
        ("/snapshot.jpg", "GET", None), ("/api/figures", "GET", None),
    ):  # fmt: skip
        check(path, method, ask(site, method, path, body))
    for url, method, path in (
        (f"/api/recordings/{name}", "GET", "/api/recordings/{name}"),
        ("/api/recordings/none", "GET", "/api/recordings/{name}"),
        (f"/api/recordings/{name}", "DELETE", "/api/recordings/{name}"),
        ("/api/models/new.onnx", "PUT", "/api/models/{name}"),
    ):
        check(path, method, ask(site, method, url, b"x" if method == "PUT" else None), url)
    ranged = ask(site, "GET", f"/api/recordings/{name}", Range="bytes=0-1")
    assert ranged.status == 404, "it was removed"


def test_figures_tell_what_else_there_is(site: Server, live: LiveView) -> None:
    found = ask(site, "GET", "/api/figures").json
    assert found["parts"] == ["models", "recorder"]
    assert found["recording"]["on"] is False
    assert found["controls"] == {
        "boxes": True, "score_min": 0.35, "classes": None, "plain": False,
    }  # fmt: skip
    bare = start_server(live, "127.0.0.1", 0)
    try:
        found = ask(bare, "GET", "/api/figures").json
        assert found["parts"] == []
        assert "recording" not in found
        for path in ("/api/models", "/api/recording", "/api/recordings", "/api/recordings/a.mp4"):
            answer = ask(bare, "GET", path)
            assert answer.status == 404
            assert re.match("expected .*, found .*", answer.json["error"])
    finally:
        bare.stop()


def test_events_are_told_after_a_number(site: Server, live: LiveView) -> None:
    for i in range(3):
        live.events.add("enter", f"event {i}", odd=float("nan"), path=Path("x"))
    found = ask(site, "GET", "/api/events").json
    assert [e["text"] for e in found["events"]] == ["event 0", "event 1", "event 2"]
    assert found["events"][0]["data"] == {"odd": None, "path": "x"}
    assert found["latest"] == 3
    later = ask(site, "GET", "/api/events?after=2").json
    assert [e["number"] for e in later["events"]] == [3]
    assert later["run"] == ask(site, "GET", "/api/figures").json["run"]
    assert ask(site, "GET", "/api/events?after=3").json["events"] == []


@pytest.mark.parametrize("path", ["/api/events", "/api/history"])
@pytest.mark.parametrize("after", ["", "x", "-1", "1.5", "9" * 17, "0" * 5000, "%00", "1e3"])
def test_a_strange_number_is_refused(site: Server, path: str, after: str) -> None:
    answer = ask(site, "GET", f"{path}?after={after}")
    assert answer.status == 400
    assert "expected a whole number" in answer.json["error"]


def test_history_is_there_for_a_viewer_who_comes_later(site: Server, live: LiveView) -> None:
    def rows() -> Any:
        return ask(site, "GET", "/api/history").json

    until(lambda: rows()["latest"] >= 2)
    found = rows()
    n = len(found["age_s"])
    assert found["age_s"] == sorted(found["age_s"], reverse=True)
    assert all(len(found[name]) == n for name in COLUMNS)
    assert found["inference_fps"][0] == 15.5
    assert found["accuracy_low"][-1] == 70.0
    assert found["latency_ms"][-1] is None, "nobody looks: that figure is from long ago"
    assert set(found["seen_s"]) == {"cat", "person"}
    assert ask(site, "GET", f"/api/history?after={found['latest']}").json["latest"] >= n


def test_history_is_bounded() -> None:
    live = LiveView()
    history = History(live, kept=5)
    history.sample(0.0)
    assert history.after(0, 0.0)["latest"] == 0, "nothing is known before the first frame"
    for i in range(1000):
        live.set_figures(kit.figures(inference_fps=float(i), detections={f"class {i}": 1}))
        history.sample(float(i))
    found = history.after(0, 1000.0)
    assert found["inference_fps"] == [995.0, 996.0, 997.0, 998.0, 999.0]
    assert found["age_s"] == [5.0, 4.0, 3.0, 2.0, 1.0]
    assert len(found["seen_s"]) == 200
    assert history.after(998, 1000.0)["inference_fps"] == [998.0, 999.0]
    live.set_figures(kit.figures(accuracy={"kind": "labels", "text": "", "ap50": 33.0, "f1": 1.0}))
    history.sample(1001.0)
    assert history.after(1000, 1001.0)["accuracy"] == [33.0]


def test_classes_and_plain_are_changed(site: Server, live: LiveView) -> None:
    answer = ask(site, "POST", "/api/controls", {"classes": ["dog", "cat"], "plain": True})
    assert (answer.status, answer.json["classes"]) == (200, ["cat", "dog"])
    assert live.controls.classes == frozenset({"cat", "dog"})
    assert live.controls.plain
    assert ask(site, "POST", "/api/controls", {"classes": []}).json["classes"] == []
    assert ask(site, "POST", "/api/controls", {"classes": None}).json["classes"] is None
    assert live.controls.classes is None


@pytest.mark.parametrize(
    "body",
    [
        {"classes": "cat"}, {"classes": ["unicorn"]}, {"classes": [1]}, {"classes": {"cat": 1}},
        {"plain": 1}, {"plain": None}, {"boxes": None}, {"plain": True, "classes": ["unicorn"]},
        {"plain": True, "other": 1}, {"score_min": None}, {"classes": ["cat"] * 5001},
    ],
)  # fmt: skip
def test_wrong_classes_change_nothing(site: Server, live: LiveView, body: Any) -> None:
    answer = ask(site, "POST", "/api/controls", body)
    assert answer.status == 400
    assert re.search("expected .*, found .*; ", answer.json["error"])
    assert (live.controls.classes, live.controls.plain) == (None, False)


def test_a_body_that_is_too_large_or_never_ends_is_refused(
    site: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    from edgesight.device_app.web import bodies

    answer = ask(site, "POST", "/api/controls", b" " * 70_000)
    assert answer.status == 413
    assert "expected at most 65536 bytes" in answer.json["error"]
    monkeypatch.setattr(bodies, "BODY_S", 0.3)
    link = http.client.HTTPConnection("127.0.0.1", kit.port_of(site), timeout=kit.GUARD_S)
    link.putrequest("POST", "/api/controls")
    link.putheader("Content-Length", "100")
    link.endheaders(b'{"boxes": ')
    answer = link.getresponse()
    assert answer.status == 408
    assert "expected the body within" in json.loads(answer.read())["error"]
    link.close()


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/nowhere", 404), ("GET", "/api/", 404), ("POST", "/api/figures", 405),
        ("DELETE", "/api/controls", 405), ("GET", "/api/model", 405), ("PUT", "/", 405),
    ],
)  # fmt: skip
def test_strange_addresses_and_methods_are_told(
    site: Server, method: str, path: str, status: int
) -> None:
    answer = ask(site, method, path)
    assert answer.status == status
    assert re.match("expected .*, found .*; /api lists", answer.json["error"])
    if path == "/api/controls":
        assert set(answer.headers["allow"].split(", ")) == {"GET", "HEAD", "POST"}


def test_recordings_are_made_listed_ranged_and_removed(site: Server, recorder: Any) -> None:
    answer = ask(site, "POST", "/api/recording", {"on": True})
    assert (answer.status, answer.json["on"]) == (200, True)
    first = answer.json["name"]
    assert ask(site, "POST", "/api/recording", {"on": True}).json["name"] == first
    assert ask(site, "GET", "/api/recordings").json == {"recordings": []}
    assert ask(site, "POST", "/api/recording", {"on": False}).json["on"] is False
    assert ask(site, "POST", "/api/recording", {"on": False}).status == 200
    (one,) = ask(site, "GET", "/api/recordings").json["recordings"]
    whole = ask(site, "GET", f"/api/recordings/{first}")
    assert whole.headers["content-type"] == "video/mp4"
    assert f'filename="{first}"' in whole.headers["content-disposition"]
    assert len(whole.body) == one["bytes"]
    part = ask(site, "GET", f"/api/recordings/{first}", Range="bytes=2-5")
    assert (part.status, part.body) == (206, whole.body[2:6])
    assert ask(site, "GET", f"/api/recordings/{first}", Range="bytes=99999999-").status == 416
    many = "bytes=" + ",".join(f"{i}-{i}" for i in range(100))
    assert ask(site, "GET", f"/api/recordings/{first}", Range=many).status == 400
    assert ask(site, "DELETE", f"/api/recordings/{first}").status == 204
    assert ask(site, "DELETE", f"/api/recordings/{first}").status == 404
    assert ask(site, "GET", f"/api/recordings/{first}").status == 404
    recorder.full = True
    answer = ask(site, "POST", "/api/recording", {"on": True})
    assert (answer.status, answer.json["error"]) == (507, "cannot write: disk full; free space")


@pytest.mark.parametrize("body", [{}, {"on": 1}, {"on": "true"}, {"on": True, "name": "x"}, [], 1])
def test_a_wrong_switch_records_nothing(site: Server, recorder: Any, body: Any) -> None:
    assert ask(site, "POST", "/api/recording", body).status == 400
    assert not recorder.state()["on"]


@pytest.mark.parametrize(
    "name",
    ["..", ".hidden", "%2e%2e%2fpasswd", "..%2f..%2fetc%2fpasswd", "%00", "a%00.mp4", "a" * 121,
     "a%5cb", "%0d%0aSet-Cookie:x", "%e2%80%ae.mp4"],
)  # fmt: skip
def test_no_name_becomes_a_path(site: Server, recorder: Any, name: str) -> None:
    outside = recorder.folder.parent / "passwd"
    outside.write_text("secret")
    (recorder.folder / ".hidden").write_text("secret")
    recorder.open_file = recorder.folder.joinpath  # a careless one: the server is in front of it
    for method in ("GET", "DELETE"):
        answer = ask(site, method, f"/api/recordings/{name}")
        assert answer.status in (400, 404)
        assert b"secret" not in answer.body
    assert outside.exists()


def test_health_says_whether_pictures_come(site: Server, live: LiveView) -> None:
    assert ask(site, "GET", "/healthz").json == {"source_state": "running", "frames": 12}
    for state in ("retrying: no answer", "ended"):
        live.set_figures(kit.figures(source_state=state))
        answer = ask(site, "GET", "/healthz")
        assert answer.status == 503
        assert state in answer.json["error"]


def test_the_page_about_the_api_has_everything_and_brings_nothing(site: Server) -> None:
    text = ask(site, "GET", "/api").body.decode()
    for path, item in description()["paths"].items():
        for method in set(item) - {"parameters"}:
            assert f"{method.upper()}</b> <code>{path}</code>" in text
    for name in description()["components"]["schemas"]:
        assert f'id="{name}"' in text
    assert not re.search("https?://", text)
    assert "style=" not in text


def test_a_defect_of_ours_is_a_clear_500(site: Server, recorder: Any) -> None:
    recorder.list = lambda: [][1]
    answer = ask(site, "GET", "/api/recordings")
    assert answer.status == 500
    assert "defect of EdgeSight" in answer.json["error"]
    assert ask(site, "GET", "/api/figures").status == 200


def test_a_disk_that_hangs_holds_up_no_viewer(site: Server, recorder: Any) -> None:
    import threading

    hanging, go = threading.Event(), threading.Event()

    def hang() -> str:
        hanging.set()
        go.wait(kit.GUARD_S)
        return ""

    recorder.start = hang
    asking = threading.Thread(target=ask, args=(site, "POST", "/api/recording", {"on": True}))
    asking.start()
    assert hanging.wait(kit.GUARD_S)
    began = time.monotonic()
    assert ask(site, "GET", "/api/figures").status == 200
    assert time.monotonic() - began < kit.GUARD_S / 2
    go.set()
    asking.join()
