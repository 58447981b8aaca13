"""What requests bring, read with limits on size and time, and the answer when it is wrong."""

from __future__ import annotations

import asyncio
import json
import math
import re
from collections.abc import AsyncIterator, Callable
from typing import Any, TypeVar

from starlette.requests import Request

T = TypeVar("T")
BODY_MAX = 65536
"""Bytes of a JSON body: the names of a thousand classes fit in."""
BODY_S = 10.0
NUMBER_MAX = 2**53 - 1
"""The largest whole number that JavaScript counts to."""
NAME = re.compile(r"[^\x00-\x1f\x7f/\\.][^\x00-\x1f\x7f/\\]{0,119}")
"""Names of files: no path, nothing hidden, nothing that does not print."""


class RefusedError(Exception):
    """A request that gets no other answer than why.

    Args:
        status: 4xx or 5xx.
        message: ``expected ..., found ...; what to do``.
    """

    def __init__(self, status: int, message: str) -> None:
        """Keeps both."""
        super().__init__(message)
        self.status, self.message = status, message


async def parts(request: Request, stall_s: float) -> AsyncIterator[bytes]:
    """Yields a body piece by piece.

    Args:
        request: Whose body it is.
        stall_s: Seconds without a piece after which the sender is given up.

    Raises:
        RefusedError: The sender stopped or went before the end.
    """
    more = True
    while more:
        try:
            message = await asyncio.wait_for(request.receive(), stall_s)
        except asyncio.TimeoutError:
            raise RefusedError(408, too_slow(stall_s)) from None
        if message["type"] == "http.disconnect":
            raise RefusedError(400, "expected a whole body, found that the sender went; try again")
        more = message.get("more_body", False)
        yield message.get("body", b"")


async def json_object(request: Request, what: str) -> dict[str, Any]:
    """Returns a JSON object that a request brings.

    Args:
        request: Whose body it is.
        what: What it should be, for people.

    Raises:
        RefusedError: It is something else, too large or too slow.
    """
    body = bytearray()

    async def read() -> None:
        async for part in parts(request, BODY_S):
            if len(body) + len(part) > BODY_MAX:
                message = f"expected at most {BODY_MAX} bytes, found more; send {what}"
                raise RefusedError(413, message)
            body.extend(part)

    try:
        await asyncio.wait_for(read(), BODY_S)
    except asyncio.TimeoutError:
        raise RefusedError(408, too_slow(BODY_S)) from None
    try:
        found: Any = json.loads(bytes(body))
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        message = f"expected a JSON object, found something else; send {what}"
        raise RefusedError(400, message)
    return found


def whole_number(request: Request, key: str) -> int:
    """Returns a number of an address, ``?after=7``; 0 if it is not there.

    Raises:
        RefusedError: It is no whole number.
    """
    text = request.query_params.get(key, "0")
    if not re.fullmatch(r"[0-9]{1,16}", text) or int(text) > NUMBER_MAX:
        message = (
            f"{key}: expected a whole number from 0 to {NUMBER_MAX}, found {text[:40]!r}; "
            f"give the one that the answer before told as latest"
        )
        raise RefusedError(400, message)
    return int(text)


def file_name(text: Any, what: str) -> str:
    """Returns a name that can be no path.

    Raises:
        RefusedError: It is something else.
    """
    if isinstance(text, str) and NAME.fullmatch(text) and text.isprintable():
        return text
    message = (
        f"expected the name of {what}, 1 to 120 characters without / and \\ and no dot in front, "
        f"found {str(text)[:60]!r}; give another name"
    )
    raise RefusedError(400, message)


async def in_thread(function: Callable[..., T], *args: Any) -> T:
    """Calls what may wait for a disk, and is done with it when it returns, cancelled or not."""
    task = asyncio.ensure_future(asyncio.to_thread(function, *args))
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        await asyncio.wait([task])
        raise


def too_slow(limit_s: float) -> str:
    """Returns what a sender hears that took too long."""
    return f"expected the body within {limit_s:g} s, found it unfinished; try again"


def finite(value: Any) -> Any:
    """Returns it with null for what is not a number: JSON has no NaN."""
    if isinstance(value, dict):
        return {key: finite(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
