"""The description of the page's API in OpenAPI 3.1: every address, what it takes and gives."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from ... import __version__
from .bodies import BODY_MAX, NUMBER_MAX
from .openapi_schemas import STRING, Schema, ref, schemas

ALWAYS = {
    "400": "The request has a strange form.",
    "401": "The page asks for a token, and the request brings none (or an old one).",
    "403": "The host is not this machine's, or another site's page asks.",
}
"""What every address may answer."""
NO_PART = "This run has no such part, or nothing of that name."
TOO_LARGE = f"The body has more than {BODY_MAX} bytes."
SLOW = "The body did not come in time."
ABOUT = (
    "What the live page of `edgesight run` uses, for programs. Every error is a JSON object "
    '`{"error": "expected ..., found ...; what to do"}`, and nothing was changed. Every address '
    "that answers GET answers HEAD, too."
)


def _content(kind: str, schema: Schema) -> dict[str, Any]:
    return {"content": {kind: {"schema": schema}}}


def _gives(
    what: str, schema: Schema, kind: str = "application/json", status: str = "200"
) -> dict[str, Any]:
    return {status: {"description": what, **_content(kind, schema)}}


def _binary(what: str, kind: str) -> dict[str, Any]:
    return {"200": {"description": what, "content": {kind: {}}}}


def _takes(name: str) -> dict[str, Any]:
    return {"required": True, **_content("application/json", ref(name))}


def _does(
    group: str,
    name: str,
    summary: str,
    answers: dict[str, Any],
    body: dict[str, Any] | None = None,
    **errors: str,
) -> dict[str, Any]:
    """Returns one operation.

    Args:
        group: Under which it is listed.
        name: Its id.
        summary: What it does.
        answers: Good ones.
        body: What it takes.
        **errors: ``_404="why"`` and so on; those that all have are added.
    """
    told = {**ALWAYS, **{status.strip("_"): why for status, why in errors.items()}}
    refused = {
        status: {"description": why, **_content("application/json", ref("Error"))}
        for status, why in sorted(told.items())
    }
    found = {
        "tags": [group],
        "operationId": name,
        "summary": summary,
        "responses": {**answers, **refused},
    }
    return found if body is None else {**found, "requestBody": body}


def _after(what: str) -> list[dict[str, Any]]:
    number = {"type": "integer", "minimum": 0, "maximum": NUMBER_MAX, "default": 0}
    text = f"number of the last {what} that you have; 0 gives all that are kept"
    return [{"name": "after", "in": "query", "schema": number, "description": text}]


def _name(what: str) -> list[dict[str, Any]]:
    text = {**STRING, "minLength": 1, "maxLength": 120}
    return [{"name": "name", "in": "path", "required": True, "schema": text, "description": what}]


def _page(name: str, kind: str) -> dict[str, Any]:
    return {"get": _does("page", name, "A file of the live page.", _binary("The file.", kind))}


@lru_cache(maxsize=1)
def description() -> dict[str, Any]:
    """Returns the description; the caller must not change it."""
    from .api import STATIC

    root = _page("page", "text/html")["get"]
    root["summary"] = "The live page; with ?token=... it remembers the token in a cookie."
    root["parameters"] = [{"name": "token", "in": "query", "schema": STRING,
                           "description": "the token of the printed link"}]  # fmt: skip
    root["responses"]["303"] = {"description": "The token was right: on to the page without it."}
    root["responses"]["401"] = {"description": ALWAYS["401"], **_content("text/html", STRING)}
    paths: dict[str, Any] = {}
    paths["/"] = {"get": root}
    paths |= _watching() | _recording() | _models()
    for path, (file, kind) in STATIC.items():
        if path != "/":
            paths[path] = _page(file.replace(".", "_"), kind)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "EdgeSight live",
            "version": __version__,
            "description": ABOUT,
            "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
        },
        "servers": [{"url": "/"}],
        "security": [{}, {"bearer": []}, {"cookie": []}],
        "tags": [
            {"name": "watch", "description": "What the detector sees, and how it does."},
            {"name": "controls", "description": "What is drawn; one picture for all viewers."},
            {"name": "recordings", "description": "Only in runs that have a recorder."},
            {"name": "models", "description": "Only in runs that have models to choose from."},
            {"name": "machines", "description": "For monitoring."},
            {"name": "page", "description": "The page itself."},
        ],
        "paths": paths,
        "components": {
            "schemas": schemas(),
            "securitySchemes": {
                "bearer": {"type": "http", "scheme": "bearer",
                           "description": "the token that edgesight run printed"},
                "cookie": {"type": "apiKey", "in": "cookie", "name": "edgesight-PORT",
                           "description": "set by the printed link; PORT is that of the page"},
            },
        },
    }  # fmt: skip


def _watching() -> dict[str, Any]:
    events = _does("watch", "events", "What happened.", _gives("Events.", ref("Events")))
    history = _does("watch", "history", "The last ten minutes.", _gives("Rows.", ref("History")))
    shown = _gives("The controls as they are now.", ref("Controls"))
    no_picture = "There is no picture yet."
    return {
        "/stream": {"get": _does(
            "watch", "stream", "An endless MJPEG picture with its boxes.",
            _binary("Parts of image/jpeg.", "multipart/x-mixed-replace"))},
        "/snapshot.jpg": {"get": _does(
            "watch", "snapshot", "One picture of now.", _binary("A JPEG.", "image/jpeg"),
            _503=no_picture)},
        "/api/figures": {"get": _does(
            "watch", "figures", "All figures of now.", _gives("Figures.", ref("Figures")))},
        "/api/history": {"get": {**history, "parameters": _after("row")}},
        "/api/events": {"get": {**events, "parameters": _after("event")}},
        "/api/controls": {
            "get": _does("controls", "controls", "The controls.", shown),
            "post": _does("controls", "change_controls", "Changes one or more of them.", shown,
                          _takes("ControlsChange"), _408=SLOW, _413=TOO_LARGE),
        },
        "/metrics": {"get": _does(
            "machines", "metrics", "The figures for Prometheus.",
            _gives("Its text format.", STRING, "text/plain"))},
        "/healthz": {"get": _does(
            "machines", "health", "Whether the source gives pictures.",
            _gives("It does.", ref("Health")), _503="It does not: lost, ended or not begun.")},
        "/api": {"get": _does(
            "machines", "api_page", "This description, for people.",
            _gives("A page.", STRING, "text/html"))},
        "/api/openapi.json": {"get": _does(
            "machines", "openapi", "This description.",
            _gives("OpenAPI 3.1.", {"type": "object"}))},
    }  # fmt: skip


def _recording() -> dict[str, Any]:
    state = _gives("How it is now.", ref("Recording"))
    one = _name("of a finished recording")
    download = _does(
        "recordings", "download", "A recording; takes Range, so that players can jump.",
        {**_binary("The file.", "video/*"),
         "206": {"description": "The range that was asked for.", "content": {"video/*": {}}}},
        _404=NO_PART, _416="The range lies outside the file.",
    )  # fmt: skip
    download["responses"]["416"] = {"description": "The range lies outside the file."}
    delete = _does("recordings", "delete", "Removes a recording.",
                   {"204": {"description": "It is gone."}},
                   _404=NO_PART, _409="It cannot be removed.")  # fmt: skip
    return {
        "/api/recording": {
            "get": _does("recordings", "recording", "How the recording is.", state, _404=NO_PART),
            "post": _does(
                "recordings", "record", "Begins or ends a recording; twice does nothing more.",
                state, _takes("RecordingSwitch"), _404=NO_PART, _408=SLOW, _413=TOO_LARGE,
                _409="It cannot begin now.", _507="It cannot be written: full, or no permission."),
        },
        "/api/recordings": {"get": _does(
            "recordings", "recordings", "The finished recordings.",
            _gives("Their list.", ref("Recordings")), _404=NO_PART)},
        "/api/recordings/{name}": {"parameters": one, "get": download, "delete": delete},
    }  # fmt: skip


def _models() -> dict[str, Any]:
    busy = "Another one is being checked or sent; wait for it."
    upload = {"required": True, "content": {"application/octet-stream": {}}}
    return {
        "/api/models": {"get": _does(
            "models", "models", "The models that can be chosen.",
            _gives("Their list.", ref("Models")), _404=NO_PART)},
        "/api/model": {"post": _does(
            "models", "choose_model", "Begins the change to another model; /api/models tells on.",
            _gives("It is being checked.", ref("Models"), status="202"), _takes("ModelChoice"),
            _404=NO_PART, _408=SLOW, _409=busy, _413=TOO_LARGE)},
        "/api/models/{name}": {"parameters": _name("that the new model is to have"), "put": _does(
            "models", "send_model",
            "Takes a new model file (ONNX), checks it, and lists it. Only on pages with a token.",
            _gives("It can be chosen.", ref("Models"), status="201"), upload,
            _400="The name or the file is no good.", _404=NO_PART, _408=SLOW, _409=busy,
            _403="The page has no token (--token-file), or no place for models.",
            _413="The file is larger than bytes_max of /api/models.",
            _507="There is no room for it.")},
    }  # fmt: skip
