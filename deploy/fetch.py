"""``edgesight fetch``: downloads a known detector from its authors' own address.

What comes is checked against a pinned SHA-256 before it gets its name, so that nobody runs a file
that was cut, swapped or changed on the way. Upstream publishes no digests. The pins below are the
ones that several unrelated public projects have recorded for these release files, with the size in
bytes where they agree on it; they were not taken from a download of our own.
"""

from __future__ import annotations

import argparse
import difflib
import http.client
import json
import os
import ssl
import sys
import time
import urllib.error
import urllib.request
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any
from urllib.parse import urlsplit

from tqdm import tqdm

from .. import __version__
from ..models.errors import DownloadError, InputError, OutputError
from ..models.files import sha256

DESCRIPTION = "Download a known detector from its authors' address, checked by its SHA-256."
EXAMPLE = "edgesight fetch yolox_nano --out weights"

TRIES = 5
BACKOFF_S = 0.5
TIMEOUT_S = 20.0
SIZE_LIMIT = 64 * 1024 * 1024
BLOCK = 64 * 1024
LOOPBACK = frozenset({"localhost", "127.0.0.1", "::1"})


@dataclass(frozen=True)
class Remote:
    """A file that can be fetched.

    Attributes:
        url: Where its authors publish it.
        sha256: What it must be, 64 hex digits.
        size: Its length in bytes, or None where that is not known.
        licence: Its licence upstream.
        about: One line for ``--list``.
    """

    url: str
    sha256: str
    size: int | None
    licence: str
    about: str

    @property
    def file(self) -> str:
        """The name it gets here."""
        return self.url.rsplit("/", 1)[-1]


_YOLOX = "https://github.com/Megvii-BaseDetection/YOLOX/releases/download/0.1.1rc0"
_NANODET = "https://github.com/RangiLyu/nanodet/releases/download/v1.0.0-alpha-1"
FETCHABLE: dict[str, Remote] = {
    "yolox_nano": Remote(
        f"{_YOLOX}/yolox_nano.onnx",
        "c789161ed43c8269fcd4e67c67eeeb4e80c622da2eb296a20bc6007bd18a0b7d",
        3_659_407,
        "Apache-2.0",
        "YOLOX-nano 416, 0.9 M parameters, COCO",
    ),
    "yolox_tiny": Remote(
        f"{_YOLOX}/yolox_tiny.onnx",
        "427cc366d34e27ff7a03e2899b5e3671425c262ea2291f88bb942bc1cc70b0f7",
        20_219_662,
        "Apache-2.0",
        "YOLOX-tiny 416, 5.1 M parameters, COCO",
    ),
    "nanodet_plus_m": Remote(
        f"{_NANODET}/nanodet-plus-m_416.onnx",
        "59d2f166088889c902f523bf08079391993491324f0d84847e3c4016a8f7cc3d",
        None,
        "Apache-2.0",
        "NanoDet-Plus-m 416, 1.2 M parameters, COCO",
    ),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of ``edgesight fetch``."""
    parser.add_argument("name", metavar="NAME", nargs="?", help="one of " + ", ".join(FETCHABLE))
    parser.add_argument(
        "--out", metavar="DIR", type=Path, default=Path(), help="where to put it (default: here)"
    )
    parser.add_argument(
        "--force", action="store_true", help="replace another file that has the same name"
    )
    parser.add_argument("--list", action="store_true", help="show what can be fetched, and stop")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def main(args: argparse.Namespace) -> int:
    """Lists or downloads; returns the exit code."""
    if args.list:
        _print_list(args.json)
        return 0
    if args.name is None:
        message = f"expected the name of a detector, found none; one of {', '.join(FETCHABLE)}"
        raise InputError(message)
    remote = FETCHABLE.get(args.name)
    if remote is None:
        near = difflib.get_close_matches(args.name, FETCHABLE, 1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        message = f"expected one of {', '.join(FETCHABLE)}, found {args.name!r}{hint}"
        raise InputError(message)
    path, downloaded = download(remote, args.out, force=args.force)
    size = path.stat().st_size
    if args.json:
        row = asdict(remote) | {"name": args.name, "path": str(path), "size": size}
        print(json.dumps(row | {"downloaded": downloaded}))
    else:
        what = "saved" if downloaded else "already there:"
        print(f"{what} {path} ({size / 1e6:.1f} MB, SHA-256 checked, {remote.licence})")
    return 0


def _print_list(as_json: bool) -> None:
    if as_json:
        print(json.dumps({name: asdict(remote) for name, remote in FETCHABLE.items()}))
        return
    width = max(map(len, FETCHABLE))
    for name, remote in FETCHABLE.items():
        print(f"{name:{width}}  {remote.about} ({remote.licence})\n{'':{width}}  {remote.url}")


class _TryAgain(Exception):
    """The network failed in a way that may pass."""


def download(remote: Remote, folder: Path, *, force: bool = False) -> tuple[Path, bool]:
    """Brings a file, or finds it already there.

    What has arrived is kept in ``<name>.part``, and a later call goes on from there. The file gets
    its name only when its SHA-256 is right, so an earlier one is never damaged.

    Args:
        remote: What to bring.
        folder: Where to put it; made if it is missing.
        force: Whether a different file of that name may be replaced.

    Returns:
        The path, and whether anything was downloaded.

    Raises:
        DownloadError: The network failed, or the content is not what it must be.
        OutputError: The file cannot be written, or another one is in its place.
    """
    target = folder / remote.file
    part = target.with_name(target.name + ".part")
    try:
        if target.exists():
            if sha256(target) == remote.sha256:
                return target, False
            if not force:
                message = (
                    f"expected no other file at {target}, found one with another SHA-256; "
                    "move it away, choose another --out, or give --force to replace it"
                )
                raise OutputError(message)
        folder.mkdir(parents=True, exist_ok=True)
        _fill(remote, part, target)
        part.replace(target)
    except OSError as error:
        reason = error.strerror or str(error)
        message = f"cannot write {target}: {reason}; free space or choose another --out"
        raise OutputError(message) from error
    return target, True


def _fill(remote: Remote, part: Path, target: Path) -> None:
    """Downloads into ``part`` until its SHA-256 is right, or gives up."""
    problem = ""
    for attempt in range(TRIES):
        if attempt:
            print(f"edgesight: {problem}; trying again", file=sys.stderr)
            time.sleep(BACKOFF_S * 2 ** (attempt - 1))
        try:
            start = _receive(remote, part)
        except _TryAgain as error:
            problem = str(error)
            continue
        found = sha256(part)
        if found == remote.sha256:
            return
        part.unlink()
        message = (
            f"{remote.url}: expected SHA-256 {remote.sha256}, found {found}; the download was "
            "thrown away; try again later, or tell us if the authors have changed the file"
        )
        if start == 0:
            raise DownloadError(message)
        problem = message  # what was there before may have been of another file: begin anew
    message = (
        f"cannot download {remote.url}: {problem} ({TRIES} tries); check the network and run the "
        f"command again (it goes on where it stopped), or put the file at {target} yourself"
    )
    raise DownloadError(message)


def _receive(remote: Remote, part: Path) -> int:
    """Appends what is missing to ``part``, and returns how many bytes were there before."""
    limit = SIZE_LIMIT if remote.size is None else remote.size
    start = part.stat().st_size if part.exists() else 0
    if start and start == remote.size:
        return start
    response = _open(remote.url, start)
    if response is None:
        return start
    with response:
        if response.status != 206:  # the server sends all of it
            start = 0
        length = response.headers.get("Content-Length", "")
        total = start + int(length) if length.isdigit() else remote.size
        bar = tqdm(
            total=total, initial=start, unit="B", unit_scale=True, desc=remote.file, disable=None
        )
        with part.open("ab" if start else "wb") as file, bar:
            got = _copy(response, file, start, limit, bar)
            file.flush()
            os.fsync(file.fileno())
    if got > limit:
        part.unlink()
        message = f"{remote.url}: expected at most {limit} bytes, found more; nothing was kept"
        raise DownloadError(message)
    if total is not None and got < total:
        message = f"the connection was cut after {got} of {total} bytes"
        raise _TryAgain(message)
    return start


def _copy(response: Any, file: IO[bytes], got: int, limit: int, bar: Any) -> int:
    """Copies blocks until the end or past the limit; returns how long the file is now."""
    while got <= limit:
        try:
            block = response.read(BLOCK)
        except (OSError, http.client.HTTPException) as error:
            message = f"the connection was cut after {got} bytes ({_reason(error)})"
            raise _TryAgain(message) from error
        if not block:
            break
        file.write(block)
        got += len(block)
        bar.update(len(block))
    return got


def _open(url: str, start: int) -> Any:
    """Asks for the file from byte ``start``; None means that the server has nothing past it."""
    _check_address(url, loopback=True)
    # Without "identity" a server may compress, and then offsets mean something else.
    headers = {"User-Agent": f"edgesight/{__version__}", "Accept-Encoding": "identity"}
    if start:
        headers["Range"] = f"bytes={start}-"
    opener = urllib.request.build_opener(_SafeRedirects)
    try:
        return opener.open(urllib.request.Request(url, headers=headers), timeout=TIMEOUT_S)
    except urllib.error.HTTPError as error:
        error.close()
        if error.code == 416 and start:
            return None
        if error.code in (408, 425, 429) or error.code >= 500:
            message = f"the server answered {error.code} {error.reason}"
            raise _TryAgain(message) from error
        message = (
            f"{url}: expected the file, the server answered {error.code} {error.reason}; "
            "the authors may have moved it"
        )
        raise DownloadError(message) from error
    except (OSError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", error)
        if isinstance(reason, ssl.SSLCertVerificationError):
            message = (
                f"{url}: expected a valid certificate, found none ({reason.verify_message}); "
                "check the machine's clock and its CA certificates"
            )
            raise DownloadError(message) from error
        message = f"cannot reach {urlsplit(url).hostname} ({_reason(reason)})"
        raise _TryAgain(message) from error


class _SafeRedirects(urllib.request.HTTPRedirectHandler):
    """Follows redirects to https only, or within this machine."""

    def redirect_request(
        self, req: urllib.request.Request, fp: Any, code: int, msg: str, headers: Any, newurl: str
    ) -> urllib.request.Request | None:
        """Checks where a redirect leads; the range that was asked for goes along."""
        _check_address(newurl, loopback=urlsplit(req.full_url).hostname in LOOPBACK)
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _check_address(url: str, *, loopback: bool) -> None:
    parts = urlsplit(url)
    if parts.scheme == "https":
        return
    if not (loopback and parts.scheme == "http" and parts.hostname in LOOPBACK):
        message = f"expected an https address, found {url}; nothing was downloaded"
        raise DownloadError(message)


def _reason(error: object) -> str:
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return " ".join(str(text).split())
