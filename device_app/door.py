"""The way to the live page: on which port it is, and how a person gets there."""

from __future__ import annotations

import errno
import getpass
import io
import os
import re
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from ..models.errors import InputError, OutputError

if TYPE_CHECKING:  # imported when the page is opened, so that --help is instant
    from .live import LiveView
    from .model_choice import ModelChoice
    from .recording import Recorder
    from .web.server import Server

PORT_DEFAULT = 8765
PORTS_TRIED = 20
TOKEN_VARIABLE = "EDGESIGHT_TOKEN"
TOKEN_MIN, TOKEN_MAX = 16, 200


def page_token(host: str, file: Path | None) -> str | None:
    """Returns what the live page asks its viewers for.

    Args:
        host: Address that it listens on.
        file: Holds the user's own token, as does the environment's ``EDGESIGHT_TOKEN``; without
            either there is a new one for each run, and none where only this machine can look.

    Raises:
        InputError: The user's own cannot be read, or is none.
    """
    from .web.guard import is_loopback, new_token

    own = os.environ.get(TOKEN_VARIABLE)
    what = TOKEN_VARIABLE
    if file is not None:
        what = str(file)
        try:
            own = file.read_text(encoding="utf-8")[: TOKEN_MAX + 2]
        except (OSError, ValueError) as error:
            message = f"{file}: expected a file that holds a token, found none ({error})"
            raise InputError(message) from error
    if own is not None:
        own = own.strip()
        if not re.fullmatch(rf"[A-Za-z0-9._~-]{{{TOKEN_MIN},{TOKEN_MAX}}}", own):
            message = (
                f"{what}: expected a token of {TOKEN_MIN} to {TOKEN_MAX} letters, digits and ._~-, "
                f"found {len(own)} characters or others; make one with openssl rand -hex 16"
            )
            raise InputError(message)
        return own
    return None if is_loopback(host) else new_token()


def open_server(
    live: LiveView,
    host: str,
    port: int | None,
    token: str | None = None,
    *,
    models: ModelChoice | None = None,
    recorder: Recorder | None = None,
) -> Server:
    """Starts the web page on the port that the user chose, else on the first free one.

    Args:
        live: Where pictures and figures come from.
        host: Address to listen on.
        port: The user's own; None: one that is free.
        token: What every request has to bring; None: nothing.
        models: Changes the model; None: nobody can.
        recorder: Records; None: nobody can.

    Raises:
        OutputError: The chosen port is in use, or all that were tried.
    """
    from .web.server import start_server

    def start(at: int) -> Server:
        return start_server(live, host, at, token=token, models=models, recorder=recorder)

    if port is not None:
        return start(port)
    for candidate in range(PORT_DEFAULT, PORT_DEFAULT + PORTS_TRIED):
        try:
            return start(candidate)
        except OutputError as error:
            if getattr(error.__cause__, "errno", None) not in (errno.EADDRINUSE, errno.EACCES):
                raise  # a host that is not ours will not become so with another port
    return start(0)


def announce(
    url: str, host: str, token: str | None, say: Callable[[str], None], out: TextIO | None = None
) -> str:
    """Prints where the page is, and how to reach it from elsewhere.

    Args:
        url: Of the page, on this machine.
        host: Address that it listens on.
        token: What it asks for.
        say: Prints.
        out: Where that goes; standard output by default.

    Returns:
        The address to open here.
    """
    from .web.guard import is_loopback

    tail = f"?token={token}" if token else ""
    port = url.rstrip("/").rpartition(":")[2]
    connection = os.environ.get("SSH_CONNECTION", "").split()
    over_ssh = len(connection) == 4
    if is_loopback(host):
        say(f"live page: {url}{tail}   (Ctrl-C ends)")
        if over_ssh:
            ssh_port = "" if connection[3] == "22" else f" -p {connection[3]}"
            say(
                "  you are here over SSH: on your own machine run\n"
                f"    ssh{ssh_port} -N -L {port}:127.0.0.1:{port} {_user()}@{connection[2]}\n"
                f"  and open http://127.0.0.1:{port}/{tail} there"
            )
        return f"{url}{tail}"
    everywhere = host in ("0.0.0.0", "::")
    address = host if not everywhere else connection[2] if over_ssh else own_address()
    shown = f"[{address}]" if ":" in address else address
    link = f"http://{shown}:{port}/{tail}"
    say(f"live page: {link}   (Ctrl-C ends)")
    if token:
        say("  whoever has this link can look and change settings; it is not encrypted on its way")
    if code := qr_code(link, out or sys.stdout):
        say(code)
    return f"http://127.0.0.1:{port}/{tail}" if everywhere else link


def own_address() -> str:
    """Returns this machine's address in its network; nothing is sent to find it."""
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect(("192.0.2.1", 9))  # an address that is nobody's (RFC 5737)
            return str(probe.getsockname()[0])
    except OSError:  # no network at all
        return socket.gethostname()


def qr_code(text: str, out: TextIO) -> str | None:
    """Returns a QR code to print in a terminal; None where it could not be seen there."""
    import segno

    if not out.isatty():
        return None
    drawn = io.StringIO()
    segno.make(text, error="l", micro=False).terminal(drawn, compact=True, border=2)
    code = drawn.getvalue().rstrip("\n")
    try:
        code.encode(out.encoding or "ascii")
    except UnicodeEncodeError:
        return None
    return code


def has_desktop() -> bool:
    """Returns whether a browser window would appear in front of the user."""
    if any(os.environ.get(key) for key in ("SSH_CONNECTION", "SSH_CLIENT", "SSH_TTY")):
        return False
    if sys.platform in ("darwin", "win32"):
        return True
    return bool(os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"))


def _user() -> str:
    try:
        return getpass.getuser()
    except (OSError, KeyError, ImportError):
        return "USER"
