"""The live picture: from the loop's thread to every viewer, each as fast as it takes it."""

from __future__ import annotations

import asyncio
import threading
import time
from contextlib import suppress
from typing import Any

from starlette.types import Receive, Scope, Send

from ..live import LiveView

WAIT_S = 0.5


class Relay:
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
            try:
                found = self._live.wait_newer(sequence, WAIT_S)
            except Exception as error:  # no thread for it would mean no pictures any more
                self._live.events.add("page", f"pictures were late: {error}")
                time.sleep(WAIT_S)
                continue
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


class Stream:
    """Answers with an endless MJPEG picture: to each viewer the newest, as fast as it takes them.

    An ASGI application of its own, because it must know of each viewer when it takes bytes, when
    it stops taking them, and when it goes.
    """

    def __init__(self, live: LiveView, relay: Relay, stall_s: float) -> None:
        self._live, self._relay, self._stall_s = live, relay, stall_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers one viewer until it goes, stalls, or the run is over."""
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
