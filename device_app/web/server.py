"""The web server of the live page: Starlette on uvicorn, in a thread of its own."""

from __future__ import annotations

import asyncio
import errno
import socket
import sys
import threading
import time

import uvicorn

from ...models.errors import OutputError
from ..live import LiveView
from .api import Api, build_app
from .history import History
from .parts import Models, Recorder
from .stream import Relay

STALL_S = 10.0
"""A viewer that takes nothing for so long is let go, and no longer counted."""
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
        lifespan="off", ws="none", timeout_graceful_shutdown=1,
    )  # fmt: skip
    server = uvicorn.Server(config)

    async def serve() -> None:
        relay.start()
        past = asyncio.ensure_future(history.follow())
        try:
            await server.serve(sockets=[listener])
        finally:
            past.cancel()
            relay.stop()

    # Signals belong to the loop that started us; uvicorn takes them only in the main thread.
    thread = threading.Thread(target=lambda: asyncio.run(serve()), name="web", daemon=True)
    thread.start()
    until = time.monotonic() + 10
    while not server.started and thread.is_alive() and time.monotonic() < until:
        time.sleep(0.005)
    shown = f"[{host}]" if ":" in host else host
    return Server(server, thread, f"http://{shown}:{real_port}/", relay)


def _prepare(listener: socket.socket, stall_s: float) -> None:
    """Sets what every connection inherits: little waits for slow viewers, lost ones end."""
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, UNSENT_MAX)
    if sys.platform == "linux":
        listener.setsockopt(socket.IPPROTO_TCP, TCP_NOTSENT_LOWAT, UNSENT_MAX // 2)
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, round(2000 * stall_s))
