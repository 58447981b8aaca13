"""The way to the live page: on which port it is, and how a person gets there."""

from __future__ import annotations

import errno
import getpass
import os
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ..models.errors import OutputError

if TYPE_CHECKING:  # imported when the page is opened, so that --help is instant
    from .web.server import Server

PORT_DEFAULT = 8765
PORTS_TRIED = 20


def open_server(live: Any, host: str, port: int | None) -> Server:
    """Starts the web page on the port that the user chose, else on the first free one.

    Raises:
        OutputError: The chosen port is in use, or all that were tried.
    """
    from .web.server import start_server

    if port is not None:
        return start_server(live, host, port)
    for candidate in range(PORT_DEFAULT, PORT_DEFAULT + PORTS_TRIED):
        try:
            return start_server(live, host, candidate)
        except OutputError as error:
            if getattr(error.__cause__, "errno", None) not in (errno.EADDRINUSE, errno.EACCES):
                raise  # a host that is not ours will not become so with another port
    return start_server(live, host, 0)


def announce(url: str, host: str, say: Callable[[str], None]) -> None:
    """Prints where the page is, and over SSH how to reach it."""
    say(f"live page: {url}   (Ctrl-C ends)")
    connection = os.environ.get("SSH_CONNECTION", "").split()
    port = url.rstrip("/").rpartition(":")[2]
    loopback = host in ("localhost", "::1") or host.startswith("127.")
    if not loopback:
        address = connection[2] if len(connection) == 4 else "THIS-MACHINE"
        say(f"  from other machines: http://{address}:{port}/ (anybody who reaches it can look)")
    elif len(connection) == 4:
        ssh_port = "" if connection[3] == "22" else f" -p {connection[3]}"
        say(
            "  you are here over SSH: on your own machine run\n"
            f"    ssh{ssh_port} -N -L {port}:127.0.0.1:{port} {_user()}@{connection[2]}\n"
            f"  and open http://127.0.0.1:{port}/ there"
        )


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
