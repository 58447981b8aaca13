"""The container of a bundle: a zip file that any tool opens and that has one possible form.

Every entry is stored as it is (no compression: what different zlib versions make of the same bytes
differs, and what is stored cannot swell), with one fixed time and mode; entries follow each other
without a gap, the directory follows them, and the file ends. So a writer on any machine makes the
same bytes, and a reader needs to trust nothing: it makes each header anew from the few values it
accepts, and any other byte is an error.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import BinaryIO

from .manifest import FILES_MAX, PATH_MAX, TOTAL_MAX, refuse

LOCAL, CENTRAL, END = (struct.Struct(form) for form in ("<4s5H3L2H", "<4s6H3L5H2L", "<4s4H2LH"))
VERSION_NEEDED, MADE_BY = 20, 3 << 8 | 20  # as Unix makes them: then there is a mode
TIME, DATE = 0, 1 << 5 | 1  # 1 January 1980, where zip's time begins
MODE = 0o100644 << 16
"""A plain file; a link or a device would have another."""
ENTRIES_MAX = FILES_MAX + 2
BYTES_MAX = TOTAL_MAX + (16 << 20)
"""Of the container: the files, the manifest and the headers."""
BLOCK = 1 << 20


@dataclass(frozen=True)
class Entry:
    """One stored file.

    Attributes:
        name: As the zip file spells it.
        size: Its length in bytes.
        crc32: Its checksum; zip wants one, we compare SHA-256.
        start: Where its first byte is in the container.
    """

    name: str
    size: int
    crc32: int
    start: int = 0

    @property
    def _name(self) -> bytes:
        return self.name.encode("ascii")

    def local(self) -> bytes:
        """Returns the header that stands in front of the file."""
        size, name = self.size, self._name
        return (
            LOCAL.pack(
                b"PK\3\4", VERSION_NEEDED, 0, 0, TIME, DATE, self.crc32, size, size, len(name), 0
            )
            + name
        )

    def central(self) -> bytes:
        """Returns its record in the directory."""
        size, name = self.size, self._name
        at = self.start - len(self.local())
        return (
            CENTRAL.pack(
                b"PK\1\2", MADE_BY, VERSION_NEEDED, 0, 0, TIME, DATE, self.crc32, size, size,
                len(name), 0, 0, 0, 0, MODE, at,
            )
            + name
        )  # fmt: skip


def tail(entries: Iterable[Entry], at: int) -> bytes:
    """Returns what follows the last file: the directory and the end record.

    Args:
        entries: In their order, with their places.
        at: Where the directory begins.
    """
    records = [entry.central() for entry in entries]
    size, count = sum(map(len, records)), len(records)
    return b"".join(records) + END.pack(b"PK\5\6", 0, 0, count, count, size, at, 0)


def read_entries(file: BinaryIO) -> list[Entry]:
    """Returns the files of a container in their order, after checking every byte between them.

    Args:
        file: Open for reading at any place.

    Raises:
        InputError: It is no container of ours, or a damaged or a hostile one.
    """
    length = file.seek(0, 2)
    if length > BYTES_MAX:
        refuse("the file", f"at most {BYTES_MAX} bytes", str(length))
    file.seek(0)
    if file.read(4) != b"PK\3\4":
        refuse("the file", "a zip file", f"{length} bytes that are none")
    end_at = length - END.size
    file.seek(max(end_at, 0))
    data = file.read(END.size)
    if len(data) != END.size or data[:4] != b"PK\5\6":
        refuse("the file", "an end record as its last bytes", "none: cut, or with more after it")
    _, disk, start_disk, here, count, size, at, comment = END.unpack(data)
    if disk or start_disk or here != count or comment or at + size != end_at:
        refuse("the end record", "one that fits the file", "one of another file")
    if not 0 < count <= ENTRIES_MAX or size > count * (CENTRAL.size + PATH_MAX):
        refuse("the directory", f"1 to {ENTRIES_MAX} files", f"{count} in {size} bytes")
    file.seek(at)
    directory = file.read(size)
    entries = list(_records(directory, count))
    place = 0
    for entry in entries:
        header = entry.local()
        file.seek(place)
        if entry.start != place + len(header) or file.read(len(header)) != header:
            refuse(f"{entry.name!a:.80}", "its header right after the file before it", "another")
        place = entry.start + entry.size
    if place != at or tail(entries, at) != directory + data:
        refuse("the directory", "right after the last file", "bytes that belong to no file")
    return entries


def _records(directory: bytes, count: int) -> Iterator[Entry]:
    """Yields the entries that a directory lists; only plain stored files can be."""
    at, seen = 0, set()
    for _ in range(count):
        if len(directory) - at < CENTRAL.size:
            refuse("the directory", f"{count} files", "fewer")
        values = CENTRAL.unpack_from(directory, at)
        flags, method, crc32, packed, size, name_size = *values[3:5], *values[7:11]
        raw = directory[at + CENTRAL.size : at + CENTRAL.size + name_size]
        name = raw.decode("ascii", "backslashreplace")
        if not raw.isascii() or not raw or name_size > PATH_MAX or len(raw) != name_size:
            refuse("a file's name", f"1 to {PATH_MAX} ASCII characters", f"{name!a:.80}")
        what = f"{name!a:.80}"
        if flags & 1:
            refuse(what, "a plain file", "an encrypted one")
        if method or packed != size:
            refuse(what, "a stored file", f"a compressed one ({packed} for {size} bytes)")
        if values[15] != MODE:
            refuse(what, "a plain file", "a link, folder or special file")
        if name.lower() in seen:
            refuse(what, "each name once (also on a disk that ignores case)", "it twice")
        seen.add(name.lower())
        entry = Entry(name, size, crc32, values[16] + LOCAL.size + name_size)
        record = entry.central()
        if directory[at : at + len(record)] != record:
            refuse(what, "a record as edgesight writes it", "another")
        at += len(record)
        yield entry
    if at != len(directory):
        refuse("the directory", f"{count} files", "more bytes")
