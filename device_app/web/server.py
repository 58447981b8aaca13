"""The web server of the live page: Starlette on uvicorn, in a thread of its own."""

from __future__ import annotations

import asyncio
import errno
import socket
import sys
import threading
import time
from typing import Any

import uvicorn

from ...models.errors import OutputError
from ..live import LiveView
from .api import Api, build_app
from .history import History
from .parts import Models, Recorder
from .stream import Relay

STALL_S = 10.0
"""A viewer that takes nothing for so long is let go, and no longer counted."""
BACKLOG = 64
"""Connections that wait; without a free file asyncio tries as many at once, each second."""
TELL_S = 60.0
UNSENT_MAX = 65536
"""Bytes that wait in the system for a slow viewer: what waits there is old when it arrives."""
TCP_NOTSENT_LOWAT = 25  # Linux; Python names it from 3.12 on


class Server:
    """A running server; ``stop`` ends it. Made by ``start_server``."""

    def __init__(
        self, server: uvicorn.Server, thread: threading.Thread, url: str, relay: Relay
    ) -> None:
        self.url = url
        self._server, self._thread, self._relay = server, thread, relay
        self._stopped = False

    @property
    def alive(self) -> bool:
        """False once the server has ended although nobody stopped it."""
        return self._stopped or self._thread.is_alive()

    def stop(self) -> None:
        """Ends the server and its streams; can be called again."""
        self._stopped = True
        self._relay.stop()
        self._server.should_exit = True
        self._thread.join(timeout=3)
        if self._thread.is_alive():
            self._server.force_exit = True
            self._thread.join(timeout=2)


def start_server(
    live: LiveView,
    host: str,
    port: int,
    *,
    token: str | None = None,
    stall_s: float = STALL_S,
    recorder: Recorder | None = None,
    models: Models | None = None,
) -> Server:
    """Starts the server.

    Args:
        live: Where pictures, figures and events come from.
        host: Address to listen on.
        port: Port; 0 takes a free one.
        token: What every request has to bring (``guard.Guard``); None: nothing.
        stall_s: Seconds after which a viewer that takes nothing is let go.
        recorder: What the record button drives; without, there is none.
        models: What the viewers may choose from; without, they may not.

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
    relay, history = Relay(live), History(live)
    api = Api(
        live, relay, history, token=token is not None, stall_s=stall_s, recorder=recorder,
        models=models,
    )  # fmt: skip
    config = uvicorn.Config(
        build_app(api, host, real_port, token), log_level="critical", access_log=False,
        lifespan="off", ws="none", timeout_graceful_shutdown=1, backlog=BACKLOG,
    )  # fmt: skip
    server = uvicorn.Server(config)

    told_s = -TELL_S

    def told(_: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        """Tells once in a while what asyncio would print with a traceback for each attempt."""
        nonlocal told_s
        if (now := time.monotonic()) >= told_s + TELL_S:
            told_s = now
            why = context.get("exception") or context["message"]
            live.events.add("page", f"the live page cannot do all that is asked: {why}")

    async def serve() -> None:
        asyncio.get_running_loop().set_exception_handler(told)
        relay.start()
        beside = [
            asyncio.ensure_future(history.follow()),
            asyncio.ensure_future(_let_go_of_the_silent(server, stall_s)),
        ]
        try:
            await server.serve(sockets=[listener])
        finally:
            for task in beside:
                task.cancel()
            relay.stop()

    # Signals belong to the loop that started us; uvicorn takes them only in the main thread.
    def run() -> None:
        try:
            asyncio.run(serve())
        except Exception as error:  # told on the screen's other ways: events, MQTT, the terminal
            live.events.add("page", f"the live page has ended: {error}")

    thread = threading.Thread(target=run, name="web", daemon=True)
    thread.start()
    until = time.monotonic() + 10
    while not server.started and thread.is_alive() and time.monotonic() < until:
        time.sleep(0.005)
    shown = f"[{host}]" if ":" in host else host
    return Server(server, thread, f"http://{shown}:{real_port}/", relay)


async def _let_go_of_the_silent(server: uvicorn.Server, patience_s: float) -> None:
    """Closes connections that have not brought a whole request in time: uvicorn waits for ever."""
    since: dict[Any, float] = {}
    while True:
        await asyncio.sleep(patience_s / 4)
        now = time.monotonic()
        silent = [c for c in server.server_state.connections if _is_silent(c)]
        since = {connection: since.get(connection, now) for connection in silent}
        for connection, first_s in since.items():
            transport = getattr(connection, "transport", None)
            if transport is not None and now - first_s > patience_s:
                transport.abort()


def _is_silent(connection: Any) -> bool:
    """Whether a connection owes us a request; uvicorn itself ends those that owe us nothing."""
    cycle = getattr(connection, "cycle", None)
    begun = getattr(connection, "timeout_keep_alive_task", None) is None
    return cycle is None or (bool(cycle.response_complete) and begun)


def _prepare(listener: socket.socket, stall_s: float) -> None:
    """Sets what every connection inherits: little waits for slow viewers, lost ones end."""
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, UNSENT_MAX)
    if sys.platform == "linux":
        listener.setsockopt(socket.IPPROTO_TCP, TCP_NOTSENT_LOWAT, UNSENT_MAX // 2)
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, round(2000 * stall_s))
