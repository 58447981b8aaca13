"""New model files on their way from a browser to the board."""

from __future__ import annotations

import asyncio

from starlette.requests import Request

from ...models.errors import InputError, OutputError
from .bodies import RefusedError, file_name, in_thread, parts, too_slow
from .parts import Models, Upload

UPLOAD_S = 900.0
"""So long one file may take."""
PIECE_BYTES = 1 << 20
"""Written at once: a thread for each network packet would cost more than the disk."""
NO_TOKEN = (
    "expected a page with a token, found one that everybody on this machine may use; to send "
    "models, start edgesight run with --models FOLDER and --token-file FILE (or EDGESIGHT_TOKEN)"
)
NO_FOLDER = (
    "expected a folder for new models, found none; to send models, start edgesight run with "
    "--models FOLDER"
)


class Uploads:
    """Takes one file at a time.

    Args:
        models: Where they go.
        token: Whether the page asks for a token; nothing is taken without.
        stall_s: A sender that sends nothing for so long is given up.
    """

    def __init__(self, models: Models, token: bool, stall_s: float) -> None:
        """Starts with none under way."""
        self._models, self._stall_s = models, stall_s
        self._busy, self._token = False, token

    def refusal(self, folder: bool) -> str | None:
        """Returns why nothing is taken here; None if files are.

        Args:
            folder: Whether there is a place for them.
        """
        return NO_TOKEN if not self._token else None if folder else NO_FOLDER

    async def take(self, request: Request, name: str) -> None:
        """Takes one file.

        Args:
            request: Whose body it is.
            name: It is to have.

        Raises:
            RefusedError: It is not taken, and nothing of it is left.
        """
        state = await in_thread(self._models.state)
        self._check(request, name, state["uploads"])
        self._busy = True
        try:
            await self._pour(request, name)
        finally:
            self._busy = False

    def _check(self, request: Request, name: str, folder: bool) -> None:
        refusal = self.refusal(folder)
        if refusal is not None:
            raise RefusedError(403, refusal)
        file_name(name, "a model file")
        length = request.headers.get("content-length", "0")
        if length.isdecimal() and int(length[:20]) > self._models.bytes_max:
            raise self._too_large()
        if self._busy:
            message = "expected one upload at a time, found another under way; wait for it"
            raise RefusedError(409, message)

    async def _pour(self, request: Request, name: str) -> None:
        try:
            with await in_thread(self._models.receive, name) as upload:
                await asyncio.wait_for(self._write_all(request, upload), UPLOAD_S)
                await in_thread(upload.finish)
        except asyncio.TimeoutError:
            raise RefusedError(408, too_slow(UPLOAD_S)) from None
        except InputError as error:
            busy = isinstance(error, self._models.Busy)
            full = isinstance(error, OutputError)
            raise RefusedError(409 if busy else 507 if full else 400, str(error)) from error

    async def _write_all(self, request: Request, upload: Upload) -> None:
        total, waiting = 0, bytearray()
        async for part in parts(request, self._stall_s):
            total += len(part)
            if total > self._models.bytes_max:
                raise self._too_large()
            waiting += part
            if len(waiting) >= PIECE_BYTES:
                await in_thread(upload.write, bytes(waiting))
                waiting.clear()
        if waiting:
            await in_thread(upload.write, bytes(waiting))
        if total == 0:
            message = "expected a model file, found an empty body; send the file's bytes"
            raise RefusedError(400, message)

    def _too_large(self) -> RefusedError:
        limit = self._models.bytes_max
        message = f"expected a model of at most {limit} bytes, found more; send a smaller one"
        return RefusedError(413, message)
