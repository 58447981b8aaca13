"""Files that are either written whole or not at all."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .errors import OutputError


def is_file(path: Path) -> bool:
    """Returns whether a file is there; False, too, where the system refuses to look.

    ``Path.is_file`` raises for names that are too long and for folders that are closed to us.
    """
    try:
        return path.is_file()
    except OSError:
        return False


def is_folder(path: Path) -> bool:
    """Returns whether a folder is there; False, too, where the system refuses to look."""
    try:
        return path.is_dir()
    except OSError:
        return False


def check_replaceable(target: Path) -> None:
    """Refuses what a finished file must not take the place of: a folder, or a device.

    Raises:
        OutputError: ``target`` is there and no file, as ``/dev/null`` is.
        OSError: The system refuses to look.
    """
    in_dev = target.absolute().parent == Path("/dev")  # /dev/stdout may lead to a plain file
    if in_dev or (target.exists() and not target.is_file()):
        found = "a folder" if target.is_dir() else "a device"
        message = f"{target}: expected the name of a file, found {found}; choose a file name"
        raise OutputError(message)


@contextlib.contextmanager
def atomic_path(target: Path | str) -> Iterator[Path]:
    """Yields a temporary path beside ``target``, renamed onto it when the block succeeds.

    If the block raises, the temporary file is removed and an earlier ``target`` stays as it was.

    Raises:
        OutputError: The folder or the file cannot be written (no permission, disk full), or
            ``target`` is a device.
    """
    target = Path(target)
    temporary: Path | None = None
    try:
        check_replaceable(target)
        target.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(
            dir=target.parent, prefix=f".{target.stem}-", suffix=target.suffix
        )
        os.close(handle)
        temporary = Path(name)
        yield temporary
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)  # mkstemp makes 0600; give what open() would have given
        temporary.replace(target)
    except OSError as error:
        reason = error.strerror or str(error)
        message = f"cannot write {target}: {reason}; free space or choose another place"
        raise OutputError(message) from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def write_bytes(target: Path | str, data: bytes) -> None:
    """Writes ``data`` to ``target`` in one step."""
    with atomic_path(target) as path:
        path.write_bytes(data)


def write_text(target: Path | str, text: str) -> None:
    """Writes UTF-8 ``text`` to ``target`` in one step."""
    write_bytes(target, text.encode())


def read_json(path: Path) -> Any:
    """Returns what a JSON file holds; None if it cannot be read."""
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError):
        return None


def write_json(target: Path | str, value: Any) -> None:
    """Writes ``value`` as indented JSON in one step."""
    write_text(target, json.dumps(value, indent=2) + "\n")


def sha256(path: Path | str) -> str:
    """Returns the SHA-256 of a file as 64 hex digits."""
    digest = hashlib.sha256()
    with Path(path).open("rb") as file:
        for block in iter(lambda: file.read(1 << 20), b""):
            digest.update(block)
    return digest.hexdigest()
