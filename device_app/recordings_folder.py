"""Recordings as files: Matroska that grows with every picture, and the folder that holds them.

A picture goes in as it is, with the time at which it came. Each lies in a cluster of its own, and
all fields have fixed sizes, so that a file whose writer was killed can be read up to its last whole
picture, and its header can be written anew over the old one.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import shutil
import stat
import struct
import time
from calendar import timegm
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO, TypedDict

import cv2
import numpy as np

from ..models.errors import OutputError
from .sinks import fitted

FREE_MIN_BYTES = 200_000_000
"""A recording neither begins nor goes on with less space on the disk."""
NAME = re.compile(r"edgesight-([0-9]{8}-[0-9]{6})(?:-([0-9]{1,2}))?\.(?:mkv|webm)")
MJPEG, VP8 = "V_MJPEG", "V_VP8"
QUALITY = 80  # of what is encoded again
CUE_MS = 1000
"""A player can jump to a picture every so often."""

CLUSTER = struct.Struct(">4sI2sQ1sI4s")
"""Cluster, its size; time, 8 bytes; block, its size; track 1, at no distance, a whole picture."""
FIXED = (b"\x1f\x43\xb6\x75", b"\xe7\x88", b"\xa3", b"\x81\0\0\x80")  # what they begin with
SIZE_4 = 0x10000000  # marks a size of four bytes
SIZE_8 = 0x0100000000000000
DURATION = b"\x44\x89\x88"


def _element(identity: str, data: bytes) -> bytes:
    return bytes.fromhex(identity) + struct.pack(">I", SIZE_4 | len(data)) + data


def _number(identity: str, value: int) -> bytes:
    return _element(identity, struct.pack(">Q", value))


def _ebml(codec: str) -> bytes:
    kind = b"webm" if codec == VP8 else b"matroska"
    sizes = _number("42f2", 4) + _number("42f3", 8)
    versions = _number("4286", 1) + _number("42f7", 1) + sizes
    return _element(
        "1a45dfa3", versions + _element("4282", kind) + _number("4287", 4) + _number("4285", 2)
    )


def _header(
    codec: str, size_wh: tuple[int, int], duration_ms: float = 0.0, end: int = 0, cues_at: int = 0
) -> bytes:
    """Returns the beginning of a file, always as long for the same codec.

    ``end`` (bytes of the whole file) and ``cues_at`` (where its index is) are 0 while it grows.
    """
    ebml = _ebml(codec)
    inside = len(ebml) + 12  # positions count from here
    segment = struct.pack(">Q", SIZE_8 | (end - inside if end else SIZE_8 - 1))
    target = _element("53ab", b"\x1c\x53\xbb\x6b") + _number("53ac", max(0, cues_at - inside))
    seek = _element("114d9b74", _element("4dbb", target))
    if not cues_at:
        seek = _element("ec", bytes(len(seek) - 5))  # room for it
    info = _number("2ad7b1", 1_000_000) + DURATION + struct.pack(">d", duration_ms)  # in ms
    info += _element("4d80", b"EdgeSight") + _element("5741", b"EdgeSight")
    track = _number("d7", 1) + _number("73c5", 1)
    track += _number("83", 1) + _number("9c", 0)  # video, one picture in a block
    track += _element("86", codec.encode())
    track += _element("e0", _number("b0", size_wh[0]) + _number("ba", size_wh[1]))
    rest = seek + _element("1549a966", info) + _element("1654ae6b", _element("ae", track))
    return ebml + bytes.fromhex("18538067") + segment + rest


class VideoFile:
    """A video of ``length`` bytes that grows by pictures with their times, the newest ``last_ms``.

    Args:
        file: Open for writing and reading, empty or a killed writer's (then ``mend`` it).
        codec: ``MJPEG`` or ``VP8``.
        size_wh: Of every picture.
    """

    def __init__(self, file: BinaryIO, codec: str, size_wh: tuple[int, int]) -> None:
        """Writes the header of a file that grows, if there is none."""
        self.last_ms = -1
        self._file, self._codec, self._size_wh = file, codec, size_wh
        header = _header(codec, size_wh)
        self.length = len(header)
        self._cues: list[tuple[int, int]] = []
        if os.fstat(file.fileno()).st_size < self.length:
            self._write(header)

    def add(self, time_ms: int, picture: bytes) -> None:
        """Writes a picture; one that is not later than the one before is left out."""
        if time_ms <= self.last_ms:
            return
        outer, inner = CLUSTER.size - 8 + len(picture), 4 + len(picture)
        a, b, c, d = FIXED
        head = CLUSTER.pack(a, SIZE_4 | outer, b, time_ms, c, SIZE_4 | inner, d)
        self._write(head + picture)
        self._note(time_ms, len(picture))

    def mend(self) -> None:
        """Finds the whole pictures that a killed writer left; ``finish`` cuts off the rest."""
        for time_ms, offset, size in _clusters(self._file, self.length):
            self.length = offset
            self._note(time_ms, size)

    def finish(self, end_ms: int) -> None:
        """Cuts off what is no whole picture, writes index and header; the file stays open."""
        index, handle = self._index(), self._file.fileno()
        os.ftruncate(handle, self.length)
        os.lseek(handle, self.length, os.SEEK_SET)
        cues_at, end = self.length, self.length + len(index)
        try:
            self._write(index)
        except OSError:  # a full disk: it plays without an index, too
            cues_at, end = 0, self.length
            os.ftruncate(handle, self.length)
        os.pwrite(handle, _header(self._codec, self._size_wh, float(end_ms), end, cues_at), 0)
        os.fsync(handle)

    def _write(self, data: bytes) -> None:
        rest = memoryview(data)
        while rest:  # the last part of a disk takes a part only
            rest = rest[os.write(self._file.fileno(), rest) :]

    def _index(self) -> bytes:
        inside, cues = len(_ebml(self._codec)) + 12, []
        for time_ms, offset in self._cues:
            place = _number("f7", 1) + _number("f1", offset - inside)
            cues.append(_element("bb", _number("b3", time_ms) + _element("b7", place)))
        return _element("1c53bb6b", b"".join(cues))

    def _note(self, time_ms: int, size: int) -> None:
        if not self._cues or time_ms >= self._cues[-1][0] + CUE_MS:
            self._cues.append((time_ms, self.length))
        self.length += CLUSTER.size + size
        self.last_ms = time_ms


def _clusters(file: BinaryIO, begin: int) -> Iterator[tuple[int, int, int]]:
    """Yields time in ms, offset, and bytes of the picture, of all whole ones in their order."""
    whole = os.fstat(file.fileno()).st_size
    offset, before_ms = begin, -1
    while len(head := os.pread(file.fileno(), CLUSTER.size, offset)) == CLUSTER.size:
        a, outer, b, time_ms, c, inner, d = CLUSTER.unpack(head)
        size = (inner ^ SIZE_4) - 4
        after = offset + CLUSTER.size + size
        sound = (a, b, c, d) == FIXED and outer ^ SIZE_4 == CLUSTER.size - 8 + size
        if not sound or size <= 0 or time_ms <= before_ms or after > whole:
            return
        yield time_ms, offset, size
        offset, before_ms = after, time_ms


def pictures(path: Path) -> Iterator[tuple[int, bytes]]:
    """Yields the time in ms and the JPEG of every picture of a recording that is Matroska."""
    with path.open("rb") as file:
        for time_ms, offset, size in _clusters(file, len(_header(MJPEG, (1, 1)))):
            yield time_ms, os.pread(file.fileno(), size, offset + CLUSTER.size)


def mend(part: Path) -> str | None:
    """Makes what a killed writer left a recording, or removes it if nothing in it can be played.

    Returns what was done; None if another recorder is still writing it.
    """
    path = part.with_suffix("")
    with part.open("r+b", buffering=0) as file:
        if not locked(file):
            return None
        first = next(pictures(part), None) if path.suffix == ".mkv" else None
        size_wh = None if first is None else jpeg_size(first[1])
        if size_wh is None:
            part.unlink()
            return f"removed {part.name}: nothing in it can be played"
        if os.path.lexists(path):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), path)
        video = VideoFile(file, MJPEG, size_wh)
        video.mend()
        video.finish(video.last_ms)
        part.replace(path)
    return f"mended {path.name}: {video.last_ms / 1000:.1f} s"


def jpeg_size(jpeg: bytes) -> tuple[int, int] | None:
    """Returns width and height as a JPEG's header says; None if it is no JPEG."""
    at = 2
    while jpeg[:2] == b"\xff\xd8" and at + 9 <= len(jpeg) and jpeg[at] == 0xFF:
        kind, size, _, height, width = struct.unpack_from(">BHBHH", jpeg, at + 1)
        if 0xC0 <= kind <= 0xCF and kind not in (0xC4, 0xC8, 0xCC):
            return (width, height) if width and height else None
        at += 2 + size
    return None


class RecordingEntry(TypedDict):
    """One finished recording: seconds if the file tells them, Unix time of the button."""

    name: str
    bytes: int
    seconds: float | None
    time: float


class RecordingsFolder:
    """The folder that holds the recordings; all other files in it stay as they are.

    They are named by the time in UTC, so that no hour comes twice and names sort by time.

    Args:
        folder: Made when it is needed.
        bytes_max: Of all recordings together; the oldest go first.
    """

    def __init__(self, folder: Path, bytes_max: int) -> None:
        """Touches nothing yet."""
        self.folder, self._bytes_max = folder, bytes_max

    def create(self) -> tuple[str, BinaryIO]:
        """Begins a file ``NAME.part``, locked while it is open; returns NAME and it."""
        stamp = time.strftime("%Y%m%d-%H%M%S", time.gmtime())
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self.check_space()
            for end in ("", *(f"-{number}" for number in range(2, 100))):
                path = self.folder / f"edgesight-{stamp}{end}.mkv"
                if os.path.lexists(path) or os.path.lexists(path.with_suffix(".webm")):
                    continue
                with contextlib.suppress(FileExistsError):
                    file = self.part(path.name).open("x+b", buffering=0)
                    if locked(file):
                        return path.name, file
                    file.close()
        except OSError as error:
            raise self.cannot_write(error) from error
        message = f"{self.folder}: expected a free name {stamp}, found none; try in a second"
        raise OutputError(message)

    def part(self, name: str) -> Path:
        """Returns where a recording grows."""
        return self.folder / f"{name}.part"

    def leftovers(self) -> list[Path]:
        """Returns what killed writers left, and what others are still writing."""
        return [path for _, path, _ in self._files(".part")]

    def check_space(self) -> None:
        """Raises OutputError if the disk is nearly full."""
        free = shutil.disk_usage(self.folder).free
        if free < FREE_MIN_BYTES:
            need, found = (f"{number // 10**6} MB" for number in (FREE_MIN_BYTES, free))
            message = f"{self.folder}: expected {need} free for a recording, found {found}"
            raise OutputError(message + "; free space or choose another place")

    def make_room(self, growing: int) -> list[str]:
        """Removes the oldest recordings until all fit with a growing one; returns their names."""
        if growing > self._bytes_max:
            most = f"{self.folder}: expected at most {self._bytes_max / 1e6:.0f} MB of recordings"
            raise OutputError(most + ", found that one alone is longer; record for a shorter time")
        found, removed = self._files(), []
        total = growing + sum(size for *_, size in found)
        for _, path, size in found:
            if total <= self._bytes_max:
                break
            path.unlink(missing_ok=True)
            removed.append(path.name)
            total -= size
        return removed

    def entries(self) -> list[RecordingEntry]:
        """Returns the finished recordings, the newest first."""
        return [
            {"name": path.name, "bytes": size, "seconds": seconds_of(path), "time": when[0]}
            for when, path, size in reversed(self._files())
        ]

    def open_file(self, name: str) -> Path | None:
        """Returns the file of a finished recording; None for every other name."""
        if _when(name) is None or _size(self.folder / name) is None:
            return None
        return self.folder / name

    def delete(self, name: str) -> bool:
        """Removes a finished recording; returns whether there was one."""
        path = self.open_file(name)
        try:
            if path is not None:
                path.unlink()
        except OSError as error:
            raise self.cannot_write(error) from error
        return path is not None

    def cannot_write(self, error: OSError) -> OutputError:
        """Returns the error to show for one of the system's."""
        message = f"cannot write {self.folder}: {error.strerror or error}"
        return OutputError(f"{message}; free space or choose another place")

    def _files(self, suffix: str = "") -> list[tuple[tuple[float, int], Path, int]]:
        """Returns when, path and bytes of our files, the oldest first."""
        found = []
        with contextlib.suppress(OSError):  # no such folder yet
            for path in self.folder.iterdir():
                when = _when(path.name.removesuffix(suffix)) if path.name.endswith(suffix) else None
                if when is not None and (size := _size(path)) is not None:
                    found.append((when, path, size))
        return sorted(found)


def to_webm(path: Path, folder: RecordingsFolder, over: Callable[[], bool]) -> Path | None:
    """Makes a recording WebM, which takes its place; None if the run is over before.

    A WebP picture is a key frame of VP8, which needs no encoder that OpenCV does not have.
    """
    target = path.with_suffix(".webm")
    part = folder.part(target.name)
    with part.open("x+b", buffering=0) as file:
        locked(file)
        try:
            video = None
            for number, (time_ms, jpeg) in enumerate(pictures(path)):
                if over():
                    return None
                if number % 100 == 0:
                    folder.check_space()
                size_wh = jpeg_size(jpeg) or (0, 0)
                webp = encoded(jpeg, size_wh, ".webp")
                video = video or VideoFile(file, VP8, size_wh)
                video.add(time_ms, webp[20 : 20 + int.from_bytes(webp[16:20], "little")])
            if video is None:
                return None
            video.finish(max(video.last_ms, round((seconds_of(path) or 0.0) * 1000)))
            part.replace(target)
        finally:
            part.unlink(missing_ok=True)
    path.unlink(missing_ok=True)
    return target


def encoded(jpeg: bytes, size_wh: tuple[int, int], suffix: str) -> bytes:
    """Returns a picture in another size (its aspect kept, the rest black) or another format."""
    picture = np.asarray(cv2.imdecode(np.frombuffer(jpeg, np.uint8), cv2.IMREAD_COLOR), np.uint8)
    quality = {".jpg": cv2.IMWRITE_JPEG_QUALITY, ".webp": cv2.IMWRITE_WEBP_QUALITY}[suffix]
    return cv2.imencode(suffix, fitted(picture, size_wh), [quality, QUALITY])[1].tobytes()


def locked(file: BinaryIO) -> bool:
    """Locks a file against other recorders; returns whether it is ours now, and still there."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        pass  # a file system without locks: two recorders in one folder are rare
    return os.fstat(file.fileno()).st_nlink > 0


def seconds_of(path: Path) -> float | None:
    """Returns the duration that the header of a recording tells."""
    head = b""
    with contextlib.suppress(OSError), path.open("rb") as file:
        head = file.read(len(_header(MJPEG, (1, 1))))
    at = head.find(DURATION)
    if at < 0 or len(head) < at + 11 or head[:4] != b"\x1a\x45\xdf\xa3":
        return None
    return round(float(struct.unpack_from(">d", head, at + 3)[0]) / 1000, 3)


def _when(name: str) -> tuple[float, int] | None:
    """Returns Unix time and number within its second of a recording; None for other names."""
    found = NAME.fullmatch(name)
    try:
        when = timegm(time.strptime(found[1], "%Y%m%d-%H%M%S")) if found else None
    except ValueError:  # no such day
        when = None
    return None if when is None or found is None else (float(when), int(found[2] or 1))


def _size(path: Path) -> int | None:
    """Returns the bytes of a regular file; None for everything else, links too."""
    with contextlib.suppress(OSError):
        found = path.lstat()
        return found.st_size if stat.S_ISREG(found.st_mode) else None
    return None
