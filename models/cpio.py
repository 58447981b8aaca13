"""Writes archives of the kind that Linux unpacks into memory when it starts (cpio, "newc").

The file system of an emulated computer is made with it straight out of packages: owners and modes
are numbers in the archive, so nobody has to be root and nothing is unpacked here.
"""

from __future__ import annotations

import posixpath
import stat
import tarfile
import zipfile
from collections.abc import Iterable
from typing import IO

MERGED = ("bin", "lib", "sbin")
"""Folders that are links into ``usr``, in Debian and here."""


class CpioWriter:
    """Adds files, folders and links to an archive; a context manager that ends it.

    Args:
        out: Open for writing bytes.
    """

    def __init__(self, out: IO[bytes]) -> None:
        self._out = out
        self._count = 0
        self._there: set[str] = set()

    def __enter__(self) -> CpioWriter:
        """Returns itself."""
        return self

    def __exit__(self, *error: object) -> None:
        """Writes the entry that ends an archive."""
        self._entry("TRAILER!!!", 0, b"")

    def file(self, path: str, data: bytes, *, executable: bool = False) -> None:
        """Adds a file; a path that is there already keeps what it has."""
        self._add(path, stat.S_IFREG | (0o755 if executable else 0o644), data)

    def folder(self, path: str) -> None:
        """Adds a folder."""
        self._add(path, stat.S_IFDIR | 0o755, b"")

    def link(self, path: str, target: str) -> None:
        """Adds a symbolic link to ``target``."""
        self._add(path, stat.S_IFLNK | 0o777, target.encode())

    def tar(self, source: IO[bytes], skip: Iterable[str] = ()) -> None:
        """Adds what a tar stream holds, but for folders that ``skip`` names."""
        skipped = tuple(skip)
        with tarfile.open(fileobj=source, mode="r|*") as archive:
            written: dict[str, bytes] = {}
            for member in archive:
                path = posixpath.normpath(member.name)
                if path.startswith(skipped):
                    continue
                if member.isdir():
                    self.folder(path)
                elif member.issym():
                    self.link(path, member.linkname)
                elif member.islnk():  # cpio has no second names across archives: a copy does
                    self.file(path, written.get(posixpath.normpath(member.linkname), b""))
                elif member.isfile():
                    content = archive.extractfile(member)
                    data = b"" if content is None else content.read()
                    written[path] = data
                    self.file(path, data, executable=bool(member.mode & 0o100))

    def zip(self, source: IO[bytes], under: str, skip: Iterable[str] = ()) -> None:
        """Adds what a zip file holds below a folder, but for tests and what ``skip`` names."""
        skipped = tuple(skip)
        with zipfile.ZipFile(source) as archive:
            for name in archive.namelist():
                if (
                    not name.endswith("/")
                    and not name.startswith(skipped)
                    and "/tests/" not in name
                ):
                    self.file(f"{under}/{name}", archive.read(name))

    def _add(self, path: str, mode: int, data: bytes) -> None:
        path = posixpath.normpath("/" + path).lstrip("/")
        top, _, rest = path.partition("/")
        if top in MERGED and rest:
            path = f"usr/{path}"
        if not path or path in self._there or (path in MERGED and not stat.S_ISLNK(mode)):
            return
        parent = posixpath.dirname(path)
        if parent and parent not in self._there:
            self.folder(parent)
        self._there.add(path)
        self._entry(path, mode, data)

    def _entry(self, path: str, mode: int, data: bytes) -> None:
        name = path.encode() + b"\0"
        self._count += 1
        links = 2 if stat.S_ISDIR(mode) else 1
        # inode, mode, uid, gid, links, time, size, device (2), special device (2), name, checksum
        numbers = (self._count, mode, 0, 0, links, 0, len(data), 0, 0, 0, 0, len(name), 0)
        header = b"070701" + b"".join(b"%08X" % number for number in numbers) + name
        self._out.write(header + bytes(-len(header) % 4) + data + bytes(-len(data) % 4))
