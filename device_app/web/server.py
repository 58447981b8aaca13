"""The web server of the live page: Starlette on uvicorn, in a thread of its own.

It answers a fixed list of addresses; nothing in a request ever becomes a path on disk.
"""

from __future__ import annotations

import asyncio
import errno
import json
import math
import socket
import sys
import threading
import time
from contextlib import suppress
from importlib import resources
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from ...models.errors import OutputError
from ..live import LiveView
from .guard import Guard, refusal

STATIC = {
    "/": ("page.html", "text/html"),
    "/page.css": ("page.css", "text/css"),
    "/page.js": ("page.js", "text/javascript"),
}
BODY_MAX = 4096
WAIT_S = 0.5
FRESH_S = 1.0
"""How long a snapshot waits for a picture newer than the last one."""
STALL_S = 10.0
"""A viewer that takes nothing for so long is let go, and no longer counted."""
UNSENT_MAX = 65536
"""Bytes that wait in the system for a slow viewer: what waits there is old when it arrives."""
TCP_NOTSENT_LOWAT = 25  # Linux; Python names it from 3.12 on


class Server:
    """A running server; ``stop`` ends it. Made by ``start_server``."""

    def __init__(
        self, server: uvicorn.Server, thread: threading.Thread, url: str, relay: _Relay
    ) -> None:
        self.url = url
        self._server, self._thread, self._relay = server, thread, relay

    def stop(self) -> None:
        """Ends the server and its streams; can be called again."""
        self._relay.stop()
        self._server.should_exit = True
        self._thread.join(timeout=3)
        if self._thread.is_alive():
            self._server.force_exit = True
            self._thread.join(timeout=2)


def start_server(
    live: LiveView, host: str, port: int, *, token: str | None = None, stall_s: float = STALL_S
) -> Server:
    """Starts the server.

    Args:
        live: Where pictures and figures come from.
        host: Address to listen on.
        port: Port; 0 takes a free one.
        token: What every request has to bring (``guard.Guard``); None: nothing.
        stall_s: Seconds after which a viewer that takes nothing is let go.

    Raises:
        OutputError: The address cannot be had, say because the port is in use.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        _prepare(listener, stall_s)
        listener.bind((host, port))
        listener.listen(64)
    except (OSError, OverflowError) as error:
        listener.close()
        strange = getattr(error, "errno", None) == errno.EADDRNOTAVAIL
        advice = (
            "name an address of this machine with --host"
            if strange or isinstance(error, socket.gaierror)
            else "choose another with --port, or end the program that has it"
        )
        message = f"cannot listen on {host} port {port}: {error}; {advice}"
        raise OutputError(message) from error
    real_port = int(listener.getsockname()[1])
    relay = _Relay(live)
    app = build_app(live, relay, host, real_port, stall_s, token)
    config = uvicorn.Config(
        app, log_level="critical", access_log=False, lifespan="off", ws="none",
        timeout_graceful_shutdown=1,
    )  # fmt: skip
    server = uvicorn.Server(config)

    async def serve() -> None:
        relay.start()
        await server.serve(sockets=[listener])
        relay.stop()

    # Signals belong to the loop that started us; uvicorn takes them only in the main thread.
    thread = threading.Thread(target=lambda: asyncio.run(serve()), name="web", daemon=True)
    thread.start()
    until = time.monotonic() + 10
    while not server.started and thread.is_alive() and time.monotonic() < until:
        time.sleep(0.005)
    shown = f"[{host}]" if ":" in host else host
    return Server(server, thread, f"http://{shown}:{real_port}/", relay)


def build_app(
    live: LiveView, relay: _Relay, host: str, port: int, stall_s: float, token: str | None = None
) -> ASGIApp:
    """Returns the ASGI application; ``host`` and ``port`` decide which names it answers to."""
    files = resources.files(__package__)
    pages = {path: ((files / name).read_bytes(), kind) for path, (name, kind) in STATIC.items()}

    async def static(request: Request) -> Response:
        body, kind = pages[request.url.path]
        return Response(body, media_type=kind)

    async def figures(request: Request) -> Response:
        return JSONResponse(_finite({**live.figures(), "viewers": live.viewers}))

    async def metrics(request: Request) -> Response:
        from .metrics import CONTENT_TYPE, exposition  # only where somebody collects them

        return Response(exposition(live.figures(), live.viewers), media_type=CONTENT_TYPE)

    async def snapshot(request: Request) -> Response:
        # Without a viewer nothing is encoded, so the last picture may be from long ago.
        live.viewer_came()
        try:
            found = await relay.newer(relay.sequence, FRESH_S) or relay.frame
        finally:
            live.viewer_left()
        if found is None:
            return refusal(503, "expected a picture, found none yet; try again in a moment")
        name = f"edgesight-{time.strftime('%Y%m%d-%H%M%S')}.jpg"
        headers = {"content-disposition": f'attachment; filename="{name}"'}
        return Response(found[0], media_type="image/jpeg", headers=headers)

    async def controls(request: Request) -> Response:
        if request.method == "POST":
            problem = await _change(live, request)
            if problem:
                return refusal(400, problem)
        now = live.controls
        return JSONResponse({"boxes": now.boxes, "score_min": now.score_min})

    routes = [Route(path, static) for path in STATIC]
    routes += [
        Route("/api/figures", figures),
        Route("/api/controls", controls, methods=["GET", "POST"]),
        Route("/metrics", metrics),
        Route("/snapshot.jpg", snapshot),
        Route("/stream", _Stream(live, relay, stall_s), methods=["GET"]),
    ]
    return Guard(Starlette(routes=routes), host, port, token)


class _Relay:
    """The newest picture, handed from the loop's thread to the coroutines of the viewers.

    One thread waits for all of them: viewers cost no threads, and a silent source blocks nobody.
    """

    def __init__(self, live: LiveView) -> None:
        self.frame: tuple[bytes, int] | None = None
        self.ended = False
        self._live = live
        self._stopping = False
        self._loop: asyncio.AbstractEventLoop | None = None
        self._news: asyncio.Event | None = None

    @property
    def sequence(self) -> int:
        """Number of the newest picture; -1 before the first."""
        return -1 if self.frame is None else self.frame[1]

    def start(self) -> None:
        """Begins to follow the loop; called in the server's event loop."""
        self._loop, self._news = asyncio.get_running_loop(), asyncio.Event()
        threading.Thread(target=self._follow, name="web-pictures", daemon=True).start()

    def stop(self) -> None:
        """Ends all waiting; can be called again, from any thread."""
        self._stopping = True
        self._tell(None, ended=True)

    async def newer(self, sequence: int, timeout_s: float) -> tuple[bytes, int] | None:
        """Waits for a picture newer than ``sequence``; None after the time or at the end."""
        if self.sequence <= sequence and not self.ended and self._news is not None:
            with suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._news.wait(), timeout_s)
        return self.frame if self.sequence > sequence else None

    def _follow(self) -> None:
        sequence = -1
        while not self._stopping:
            found = self._live.wait_newer(sequence, WAIT_S)
            if found is not None:
                sequence = found[1]
                self._tell(found)
            elif self._live.closed:
                return self._tell(None, ended=True)

    def _tell(self, frame: tuple[bytes, int] | None, ended: bool = False) -> None:
        def renew() -> None:
            if frame is not None:
                self.frame = frame
            self.ended = self.ended or ended
            if self._news is not None:
                self._news.set()
            self._news = asyncio.Event()

        if self._loop is not None:
            with suppress(RuntimeError):  # the event loop is closed: nobody waits any more
                self._loop.call_soon_threadsafe(renew)


class _Stream:
    """Answers with an endless MJPEG picture: to each viewer the newest, as fast as it takes them.

    An ASGI application of its own, because it must know of each viewer when it takes bytes, when
    it stops taking them, and when it goes.
    """

    def __init__(self, live: LiveView, relay: _Relay, stall_s: float) -> None:
        self._live, self._relay, self._stall_s = live, relay, stall_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        kind = b"multipart/x-mixed-replace; boundary=frame"
        start = {"type": "http.response.start", "status": 200, "headers": [(b"content-type", kind)]}
        if scope["method"] == "HEAD":
            await send(start)
            await send({"type": "http.response.body"})
            return
        self._live.viewer_came()
        tasks = [
            asyncio.ensure_future(_until_gone(receive)),
            asyncio.ensure_future(self._feed(start, send)),
        ]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            self._live.viewer_left()
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _feed(self, start: dict[str, Any], send: Send) -> None:
        async def give(part: bytes, more: bool = True) -> None:
            message = {"type": "http.response.body", "body": part, "more_body": more}
            await asyncio.wait_for(send(message), self._stall_s)

        await send(start)
        await give(b"--frame\r\n")
        sequence = -1
        while not self._relay.ended:
            found = await self._relay.newer(sequence, WAIT_S)
            if found is None:
                continue
            jpeg, sequence = found
            head = f"Content-Type: image/jpeg\r\nContent-Length: {len(jpeg)}\r\n\r\n"
            await give(head.encode() + jpeg)
            # Sent at once, or a browser shows the picture only when the next one comes; and apart,
            # because it waits until the picture has left: the next is chosen only then.
            await give(b"\r\n--frame\r\n")
        await give(b"", more=False)


async def _until_gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def _prepare(listener: socket.socket, stall_s: float) -> None:
    """Sets what every connection inherits: little waits for slow viewers, lost ones end."""
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, UNSENT_MAX)
    if sys.platform == "linux":
        listener.setsockopt(socket.IPPROTO_TCP, TCP_NOTSENT_LOWAT, UNSENT_MAX // 2)
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, round(2000 * stall_s))


def _finite(value: Any) -> Any:
    """Returns figures with null for what is not a number: JSON has no NaN."""
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


async def _change(live: LiveView, request: Request) -> str | None:
    """Applies wanted controls; returns what is wrong with them, and then changes nothing."""
    body = b""
    async for part in request.stream():
        body += part
        if len(body) > BODY_MAX:
            return f"expected at most {BODY_MAX} bytes, found more"
    try:
        wanted: Any = json.loads(body)
    except (ValueError, RecursionError):
        return "expected a JSON object, found something else"
    if not isinstance(wanted, dict) or not wanted or wanted.keys() - {"boxes", "score_min"}:
        return "expected an object with boxes and/or score_min, found other keys"
    boxes: Any = wanted.get("boxes", live.controls.boxes)
    score: Any = wanted.get("score_min", live.controls.score_min)
    if not isinstance(boxes, bool):
        return f"boxes: expected true or false, found {boxes!r}"
    number = isinstance(score, (int, float)) and not isinstance(score, bool)
    if not number or not 0 <= score <= 1:  # false for NaN, too
        return f"score_min: expected a number within 0..1, found {str(score)[:40]}"
    live.controls.score_min = float(score)
    live.controls.boxes = boxes
    return None
