"""The addresses of the live page: its files, figures, controls, recordings and models.

A fixed list; nothing in a request ever becomes a path on disk. ``openapi.py`` describes it.
"""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Awaitable, Callable
from importlib import resources
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import FileResponse, HTMLResponse, JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp

from ...models.errors import InputError, OutputError
from ..live import LiveView
from . import controls
from .bodies import RefusedError, file_name, finite, in_thread, json_object, whole_number
from .guard import Guard, refusal
from .history import History
from .parts import Models, Recorder
from .stream import Relay, Stream
from .uploads import Uploads

Handler = Callable[[Request], Awaitable[Response]]
STATIC = {
    "/": ("page.html", "text/html"),
    "/page.css": ("page.css", "text/css"),
    "/panels.css": ("panels.css", "text/css"),
    "/theme.js": ("theme.js", "text/javascript"),
    "/page.js": ("page.js", "text/javascript"),
    "/picture.js": ("picture.js", "text/javascript"),
    "/controls.js": ("controls.js", "text/javascript"),
    "/panels.js": ("panels.js", "text/javascript"),
    "/plots.js": ("plots.js", "text/javascript"),
    "/models.js": ("models.js", "text/javascript"),
    "/recording.js": ("recording.js", "text/javascript"),
    "/tools.js": ("tools.js", "text/javascript"),
}
FRESH_S = 1.0
"""How long a snapshot waits for a picture newer than the last one."""
RANGE_MAX = 100
"""Characters of a Range header: players ask for one range."""
VIDEO_TYPES = {
    ".mp4": "video/mp4",
    ".webm": "video/webm",
    ".mkv": "video/x-matroska",
    ".avi": "video/x-msvideo",
}


class Api:
    """Answers requests.

    Args:
        live: Where pictures, figures and events come from.
        relay: Its pictures, in the server's event loop.
        history: Its past.
        token: Whether the page asks for one.
        stall_s: Seconds after which a viewer or sender that stopped is let go.
        recorder: Records; None if there is none.
        models: What can be chosen; None if nothing can.
    """

    def __init__(
        self,
        live: LiveView,
        relay: Relay,
        history: History,
        *,
        token: bool,
        stall_s: float,
        recorder: Recorder | None = None,
        models: Models | None = None,
    ) -> None:
        """Reads the page's files."""
        self._live, self._relay, self._history = live, relay, history
        self._recorder, self._models, self._stall_s = recorder, models, stall_s
        self._uploads = None if models is None else Uploads(models, token, stall_s)
        parts = {"models": models, "recorder": recorder}
        self._parts = [name for name, part in parts.items() if part is not None]
        self._run = secrets.token_hex(4)  # numbers of events and rows count within one run
        files = resources.files(__package__)
        self._pages = {
            path: ((files / name).read_bytes(), kind) for path, (name, kind) in STATIC.items()
        }

    def routes(self) -> list[Route]:
        """Returns every address that is answered."""
        found: dict[str, dict[str, Handler]] = {path: {"GET": self.static} for path in STATIC}
        found |= {
            "/api": {"GET": self.description_page},
            "/api/openapi.json": {"GET": self.description},
            "/api/figures": {"GET": self.figures},
            "/api/history": {"GET": self.history},
            "/api/events": {"GET": self.events},
            "/api/controls": {"GET": self.controls, "POST": self.change_controls},
            "/api/models": {"GET": self.models},
            "/api/models/{name}": {"PUT": self.receive_model},
            "/api/model": {"POST": self.choose_model},
            "/api/recording": {"GET": self.recording, "POST": self.change_recording},
            "/api/recordings": {"GET": self.recordings},
            "/api/recordings/{name}": {"GET": self.download, "DELETE": self.delete},
            "/metrics": {"GET": self.metrics},
            "/healthz": {"GET": self.health},
            "/snapshot.jpg": {"GET": self.snapshot},
        }
        routes = [
            Route(path, _by_method(handlers), methods=list(handlers))
            for path, handlers in found.items()
        ]
        stream = Stream(self._live, self._relay, self._stall_s)
        return [*routes, Route("/stream", stream, methods=["GET"])]

    async def static(self, request: Request) -> Response:
        """Answers with a file of the page."""
        body, kind = self._pages[request.url.path]
        return Response(body, media_type=kind)

    async def description(self, request: Request) -> Response:
        """Answers with the OpenAPI description."""
        from .openapi import description

        return JSONResponse(description())

    async def description_page(self, request: Request) -> Response:
        """Answers with the description for people."""
        from .openapi_page import page

        return HTMLResponse(page())

    async def figures(self, request: Request) -> Response:
        """Answers with the newest figures."""
        found: dict[str, Any] = {**self._live.figures()}
        if self._recorder is not None:
            found["recording"] = self._recorder.state()
        found |= {
            "viewers": self._live.viewers,
            "controls": controls.shown(self._live.controls),
            "run": self._run,
            "events": self._events_latest(),
            "parts": self._parts,
        }
        return JSONResponse(finite(found))

    async def history(self, request: Request) -> Response:
        """Answers with the last minutes."""
        found = self._history.after(whole_number(request, "after"), time.monotonic())
        return JSONResponse({"run": self._run, **found})

    async def events(self, request: Request) -> Response:
        """Answers with the latest events."""
        found = [
            event.to_dict() for event in self._live.events.after(whole_number(request, "after"))
        ]
        latest = self._events_latest()
        text = json.dumps(
            {"run": self._run, "latest": latest, "events": finite(found)}, default=str
        )
        return Response(text, media_type="application/json")

    def _events_latest(self) -> int:
        found = self._live.events.after()
        return found[-1].number if found else 0

    async def controls(self, request: Request) -> Response:
        """Answers with the controls."""
        return JSONResponse(controls.shown(self._live.controls))

    async def change_controls(self, request: Request) -> Response:
        """Changes the controls."""
        wanted = await json_object(request, "some of the controls")
        controls.change(self._live.controls, wanted, self._live.figures().get("classes", []))
        return JSONResponse(controls.shown(self._live.controls))

    async def models(self, request: Request) -> Response:
        """Answers with the models."""
        return JSONResponse(await self._models_state())

    async def choose_model(self, request: Request) -> Response:
        """Begins the change to another model."""
        models = self._need_models()
        wanted = await json_object(request, '{"name": "..."}')
        name = wanted.get("name")
        if wanted.keys() != {"name"} or not isinstance(name, str) or not 0 < len(name) <= 200:
            message = (
                'expected {"name": "..."} with 1 to 200 characters, found something else; '
                "/api/models lists the names"
            )
            raise RefusedError(400, message)
        try:
            await in_thread(models.choose, name)
        except InputError as error:
            raise RefusedError(
                409 if isinstance(error, models.Busy) else 404, str(error)
            ) from error
        return JSONResponse(await self._models_state(), 202)

    async def receive_model(self, request: Request) -> Response:
        """Takes a new model file."""
        self._need_models()
        assert self._uploads is not None
        await self._uploads.take(request, request.path_params["name"])
        return JSONResponse(await self._models_state(), 201)

    async def _models_state(self) -> dict[str, Any]:
        models = self._need_models()
        assert self._uploads is not None
        found: dict[str, Any] = {**await in_thread(models.state), "bytes_max": models.bytes_max}
        found["uploads_refused"] = self._uploads.refusal(found["uploads"])
        found["uploads"] = found["uploads_refused"] is None
        return found

    def _need_models(self) -> Models:
        if self._models is None:
            raise RefusedError(
                404, "expected models to choose from, found that there are none here"
            )
        return self._models

    async def recording(self, request: Request) -> Response:
        """Answers with how the recording is."""
        return JSONResponse(finite(dict(self._need_recorder().state())))

    async def change_recording(self, request: Request) -> Response:
        """Begins or ends a recording."""
        recorder = self._need_recorder()
        wanted = await json_object(request, '{"on": true} or {"on": false}')
        if wanted.keys() != {"on"} or not isinstance(wanted["on"], bool):
            message = 'expected {"on": true} or {"on": false}, found something else; send one'
            raise RefusedError(400, message)
        try:
            await in_thread(recorder.start if wanted["on"] else recorder.stop)
        except InputError as error:
            status = 507 if isinstance(error, OutputError) else 409
            raise RefusedError(status, str(error)) from error
        return await self.recording(request)

    async def recordings(self, request: Request) -> Response:
        """Answers with the finished recordings."""
        found = await in_thread(self._need_recorder().list)
        return JSONResponse({"recordings": [finite(dict(one)) for one in found]})

    async def download(self, request: Request) -> Response:
        """Answers with a recording, or a range of it."""
        if len(request.headers.get("range", "")) > RANGE_MAX:
            message = "expected one range of bytes, found many; ask for the whole file"
            raise RefusedError(400, message)
        name = request.path_params["name"]
        path = await self._recording_file(name)
        try:
            stat = await in_thread(path.stat)
        except OSError:
            raise _no_recording(name) from None
        kind = VIDEO_TYPES.get(path.suffix.lower(), "application/octet-stream")
        return FileResponse(path, media_type=kind, filename=path.name, stat_result=stat)

    async def delete(self, request: Request) -> Response:
        """Removes a recording."""
        recorder, name = self._need_recorder(), request.path_params["name"]
        await self._recording_file(name)
        try:
            gone = await in_thread(recorder.delete, name)
        except InputError as error:
            raise RefusedError(409, str(error)) from error
        if not gone:  # another viewer was faster
            raise _no_recording(name)
        return Response(status_code=204)

    async def _recording_file(self, name: str) -> Path:
        recorder = self._need_recorder()
        path = await in_thread(recorder.open_file, file_name(name, "a recording"))
        if path is None:
            raise _no_recording(name)
        return path

    def _need_recorder(self) -> Recorder:
        if self._recorder is None:
            message = "expected a recorder, found none; see edgesight run --help"
            raise RefusedError(404, message)
        return self._recorder

    async def metrics(self, request: Request) -> Response:
        """Answers Prometheus."""
        from .metrics import CONTENT_TYPE, exposition  # only where somebody collects them

        figures = self._live.figures()
        if self._recorder is not None:
            figures["recording"] = self._recorder.state()
        body = exposition(figures, self._live.viewers, self._events_latest())
        return Response(body, media_type=CONTENT_TYPE)

    async def health(self, request: Request) -> Response:
        """Answers 200 while pictures come from the source, else 503."""
        figures = self._live.figures()
        state = figures.get("source_state", "starting")
        if state != "running":
            message = f"expected a source that is running, found {state}; see the live page"
            raise RefusedError(503, message)
        return JSONResponse({"source_state": state, "frames": figures.get("frames", 0)})

    async def snapshot(self, request: Request) -> Response:
        """Answers with a picture of now."""
        # Without a viewer nothing is encoded, so the last picture may be from long ago.
        self._live.viewer_came()
        try:
            found = await self._relay.newer(self._relay.sequence, FRESH_S) or self._relay.frame
        finally:
            self._live.viewer_left()
        if found is None:
            return refusal(503, "expected a picture, found none yet; try again in a moment")
        name = f"edgesight-{time.strftime('%Y%m%d-%H%M%S')}.jpg"
        headers = {"content-disposition": f'attachment; filename="{name}"'}
        return Response(found[0], media_type="image/jpeg", headers=headers)


def _by_method(handlers: dict[str, Handler]) -> Handler:
    """Returns what answers an address; one route each, so that 405 names every method."""

    async def answer(request: Request) -> Response:
        return await handlers["GET" if request.method == "HEAD" else request.method](request)

    return answer


def _no_recording(name: str) -> RefusedError:
    message = f"expected a finished recording, found none named {name[:60]!r}; see /api/recordings"
    return RefusedError(404, message)


async def _refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, RefusedError)
    return refusal(error.status, error.message)


async def _strange(request: Request, error: Exception) -> Response:
    """Says in our words what Starlette refuses."""
    assert isinstance(error, HTTPException)
    path = request.url.path[:80]
    message = f"expected an address of the live page, found {path!r}; /api lists all of them"
    if error.status_code == 405:
        allowed = (error.headers or {}).get("Allow", "another one")
        message = f"expected the method {allowed}, found {request.method[:20]}; /api lists them"
    answer = refusal(error.status_code, message)
    answer.headers.update(error.headers or {})
    return answer


async def _failed(request: Request, error: Exception) -> Response:
    return refusal(500, "expected an answer, found a defect of EdgeSight; please report it")


def build_app(api: Api, host: str, port: int, token: str | None) -> ASGIApp:
    """Returns the ASGI application; ``host`` and ``port`` decide which names it answers to."""
    app = Starlette(
        routes=api.routes(),
        exception_handlers={
            RefusedError: _refused, HTTPException: _strange, Exception: _failed
        },
    )  # fmt: skip
    app.router.redirect_slashes = False
    return Guard(app, host, port, token)
