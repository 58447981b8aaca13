"""Who may talk to the live page: its own names, its own pages, and beyond loopback a token."""

from __future__ import annotations

import hmac
import ipaddress
import secrets
import socket
from contextlib import suppress
from typing import Any
from urllib.parse import parse_qsl, urlsplit

from starlette.requests import cookie_parser
from starlette.responses import HTMLResponse, JSONResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Receive, Scope, Send

LOOPBACK = {"127.0.0.1", "localhost", "::1"}
TOKEN_BYTES = 18
KEEP_S = 90 * 86400
"""So long a browser remembers the token."""
SECURITY = {
    "content-security-policy": "default-src 'self'; img-src 'self' blob: data:; "
    "frame-ancestors 'none'; base-uri 'none'; form-action 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
    "cache-control": "no-store",
}
STRANGER = """<!doctype html><meta charset="utf-8"><title>EdgeSight</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<p>This page wants the link or the QR code that <code>edgesight run</code> printed at its start.
"""


def is_loopback(host: str) -> bool:
    """Returns whether only this machine can reach what listens on an address."""
    if host in LOOPBACK:
        return True
    with suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return False


def new_token() -> str:
    """Returns a token that nobody guesses, fit for an address."""
    return secrets.token_urlsafe(TOKEN_BYTES)


def refusal(status: int, message: str) -> Response:
    """Returns an answer that says why there is none."""
    return JSONResponse({"error": message}, status)


class Guard:
    """Adds security headers, asks for the token, and refuses strangers' Host and Origin.

    A page that a stranger made must not reach a camera through its viewer's browser: only the
    machine's own names and addresses are answered (against DNS rebinding, which needs a name of the
    stranger's), and a change must come from the page itself.

    The token comes once in the link, ``/?token=...``, and is moved into a cookie that scripts
    cannot read, so that it stays in no history and no log; programs send it as
    ``Authorization: Bearer ...``.

    Args:
        app: What is guarded.
        host: Address that it listens on.
        port: Its port.
        token: What every request has to bring; None: nothing.
    """

    def __init__(self, app: ASGIApp, host: str, port: int, token: str | None = None) -> None:
        """Lists the names that are answered."""
        self.app = app
        self.open = not is_loopback(host)
        self.hosts = {
            _authority(name, port) for name in {*LOOPBACK, *([] if self.open else [host])}
        }
        own = socket.gethostname().lower()
        first = own.partition(".")[0]
        self.names = {*LOOPBACK, host.lower(), own, first, f"{first}.local"}
        self._token = None if token is None else token.encode()
        self._cookie = f"edgesight-{port}"  # a browser gives cookies to all ports of a machine

    def _is_ours(self, host: str) -> bool:
        """Whether a Host header names this machine; beyond loopback any of its ports may be it."""
        if not self.open:
            return host in self.hosts
        try:
            name = urlsplit(f"//{host}").hostname or ""
        except ValueError:
            return False
        with suppress(ValueError):
            return bool(ipaddress.ip_address(name))
        return name in self.names

    def _is_right(self, given: str | None) -> bool:
        assert self._token is not None
        return given is not None and hmac.compare_digest(given.encode(), self._token)

    def _without_token(self, scope: Scope, headers: dict[str, str]) -> Response | None:
        """Returns what a request without the token gets; None if it has it."""
        if self._token is None:
            return None
        kind, _, given = headers.get("authorization", "").partition(" ")
        if kind.lower() == "bearer" and self._is_right(given.strip()):
            return None
        # Not http.cookies: that drops ours beside another program's odd one.
        if self._is_right(cookie_parser(headers.get("cookie", "")).get(self._cookie)):
            return None
        query = parse_qsl(scope.get("query_string", b"").decode("latin-1"), max_num_fields=20)
        link = scope["method"] in ("GET", "HEAD") and scope["path"] == "/"
        if link and any(key == "token" and self._is_right(value) for key, value in query):
            answer = RedirectResponse("/", 303)
            # Not "strict": that would keep it from the page behind a link in somebody's message.
            answer.set_cookie(
                self._cookie, self._token.decode(), KEEP_S, httponly=True, samesite="lax"
            )
            return answer
        if scope["path"] == "/":
            return HTMLResponse(STRANGER, 401)
        return refusal(
            401,
            "expected the token of the link that edgesight printed, found none or an old one; "
            "open the newest link",
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers one request."""
        if scope["type"] != "http":
            return
        headers = {k.decode("latin-1").lower(): v.decode("latin-1") for k, v in scope["headers"]}
        host, origin = headers.get("host", "").lower(), headers.get("origin")
        refused: Response | None = None
        if not (self._is_ours(host) or (self.open and self._token)):  # the token says more
            refused = refusal(
                403, "expected this machine's own name as host, found another; use it"
            )
        elif origin is not None and origin.lower() not in (f"http://{host}", f"https://{host}"):
            refused = refusal(
                403, "expected a request from the live page, found another origin; open the page"
            )
        else:
            try:
                refused = self._without_token(scope, headers)
            except ValueError:  # an address of thousands of fields
                refused = refusal(
                    400, "expected an address of this page, found a strange one; see /api"
                )

        async def secured(message: Any) -> None:
            if message["type"] == "http.response.start":
                extra = [(k.encode(), v.encode()) for k, v in SECURITY.items()]
                message["headers"] = [*message.get("headers", []), *extra]
            with suppress(OSError):
                await send(message)

        await (refused or self.app)(scope, receive, secured)


def _authority(name: str, port: int) -> str:
    shown = f"[{name}]" if ":" in name else name
    return shown if port == 80 else f"{shown}:{port}"
