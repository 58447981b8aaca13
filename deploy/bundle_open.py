"""Opens bundles. One is hostile until it was checked, and nothing is written before that.

The container has one possible form (``bundle_zip``), the manifest is checked field by field
(``manifest``), both must name the same files, and each file is compared with its SHA-256 while it
is read. Files of a bundle never choose where they go, nor are any of them run or unpickled here.
Wheels are code all the same: install only those of a bundle whose maker is trusted, best told by a
signature (``bundle_sign``).
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from ..models.errors import InputError, ModelFileError, OutputError
from ..models.external_data import has_external_data
from ..models.trial_run import trial_run
from . import bundle_sign
from .bundle_zip import BLOCK, Entry, read_entries
from .manifest import MANIFEST, MANIFEST_MAX, SIGNATURE, Manifest, refuse

FREE_MIN = 64 << 20
"""Bytes of disk that an extraction has to leave."""
ONNX_START = b"\x08"
"""The field that ONNX begins with, its version."""


@dataclass(frozen=True)
class Bundle:
    """A bundle whose form and manifest are right; its files are checked as they are read.

    Attributes:
        path: Of the bundle.
        manifest: What is in it.
        signature: As it came, checked only if ``trusted``; None without one.
        trusted: Whether the signature is of the key that ``open_bundle`` was given.
        sha256: Of ``manifest.json``, which names every file by its hash: names the content.
    """

    path: Path
    manifest: Manifest
    signature: bytes | None
    trusted: bool
    sha256: str
    _places: dict[str, Entry]

    def read(self, name: str) -> bytes:
        """Returns one file's content.

        Raises:
            InputError: There is no such file, or it is not what the manifest says.
        """
        parts: list[bytes] = []
        with _opened(self.path) as file:
            self._copy(file, name, parts.append)
        return b"".join(parts)

    def check(self) -> None:
        """Compares every file with its hash, and looks whether the models are ONNX.

        Raises:
            InputError: A file is not what the manifest says.
        """
        with _opened(self.path) as file:
            for entry in self.manifest.files:
                self._copy(file, entry.path, _nowhere)

    def extract(self, folder: Path | str) -> Path:
        """Writes all files, and the manifest, below a new folder: all of them or nothing.

        Args:
            folder: Must not exist; it gets its name when everything in it is right.

        Returns:
            The folder.

        Raises:
            InputError: A file is not what the manifest says.
            OutputError: The folder is there already, or cannot be written.
        """
        folder = Path(folder)
        if os.path.lexists(folder):
            message = f"{folder}: expected a new folder, found one that is there; choose another"
            raise OutputError(message)
        temporary: Path | None = None
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            self._check_room(folder.parent)
            temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name[:40]}-", dir=folder.parent))
            self._write_all(temporary)
            umask = os.umask(0)
            os.umask(umask)
            temporary.chmod(0o777 & ~umask)  # mkdtemp makes 0700; give what mkdir would have given
            temporary.rename(folder)
        except OSError as error:
            reason = error.strerror or str(error)
            message = f"cannot write {folder}: {reason}; free space or choose another place"
            raise OutputError(message) from error
        finally:
            if temporary is not None:
                shutil.rmtree(temporary, ignore_errors=True)
        return folder

    def try_models(self) -> None:
        """Runs the model, and the reference, once each in a process of its own.

        Raises:
            ModelFileError: One cannot be used.
            OutputError: There is no room to try it.
        """
        names = [self.manifest.model, self.manifest.reference]
        try:
            with tempfile.TemporaryDirectory(prefix="edgesight-") as folder:
                for name in filter(None, names):
                    place = Path(folder, "model.onnx")
                    place.write_bytes(self.read(name))
                    try:
                        trial_run(place)
                    except ModelFileError as error:
                        text = str(error).replace(str(place), f"{self.path}: {name}")
                        raise ModelFileError(text) from None
        except OSError as error:
            message = f"cannot try {self.path}: {error.strerror or error}; free space in /tmp"
            raise OutputError(message) from error

    def _check_room(self, parent: Path) -> None:
        free, wanted = shutil.disk_usage(parent).free, self.manifest.total_bytes + FREE_MIN
        if free < wanted:
            message = (
                f"{parent}: expected {wanted >> 20} MB of free space, found {free >> 20}; free some"
            )
            raise OutputError(message)

    def _write_all(self, folder: Path) -> None:
        (folder / MANIFEST).write_bytes(self.manifest.to_bytes())
        if self.signature is not None:
            (folder / SIGNATURE).write_bytes(self.signature)
        with _opened(self.path) as file:
            for entry in self.manifest.files:
                target = folder / entry.path
                target.parent.mkdir(parents=True, exist_ok=True)
                with target.open("xb") as out:
                    self._copy(file, entry.path, out.write)
                    out.flush()
                    os.fsync(out.fileno())  # a board may lose power at any time

    def _copy(self, file: BinaryIO, name: str, write: Callable[[bytes], object]) -> None:
        """Passes a file's bytes on, and raises at their end if they were not the right ones."""
        wanted, place = self.manifest.entry(name), self._places[name]
        keep: list[bytes] | None = [] if name.endswith(".onnx") else None
        digest, crc32, left = hashlib.sha256(), 0, place.size
        file.seek(place.start)
        while left:
            block = file.read(min(BLOCK, left))
            if not block:
                refuse(name, f"{place.size} bytes", f"an end after {place.size - left}")
            digest.update(block)
            crc32 = zlib.crc32(block, crc32)
            left -= len(block)
            write(block)
            if keep is not None:
                keep.append(block)
        if digest.hexdigest() != wanted.sha256:
            refuse(name, f"SHA-256 {wanted.sha256}", digest.hexdigest())
        if crc32 != place.crc32:
            refuse(name, "the checksum of its header", "another")
        if keep is not None:
            check_onnx(name, b"".join(keep))


def open_bundle(
    path: Path | str, *, trusted_key: Path | None = None, check_model: bool = False
) -> Bundle:
    """Opens a bundle and checks its form, its manifest and, with a key, its signature.

    Args:
        path: The file.
        trusted_key: A public key (PEM); a bundle that it has not signed is refused.
        check_model: Also runs its models once, each in a process of its own.

    Raises:
        InputError: The file is no bundle, a damaged or a hostile one, or not signed as it must be.
        MissingExtraError: A key is given and the package ``cryptography`` is not installed.
    """
    path = Path(path)
    try:
        with _opened(path) as file:
            bundle = _read(path, file, trusted_key)
    except InputError as error:
        text = str(error)
        if text.startswith("bundle: "):
            message = f"{path}: {text.removeprefix('bundle: ')}"
            raise type(error)(message) from error
        raise
    if check_model:
        bundle.try_models()
    return bundle


def _read(path: Path, file: BinaryIO, trusted_key: Path | None) -> Bundle:
    entries = read_entries(file)
    places = {entry.name: entry for entry in entries}
    first = entries[0]
    if first.name != MANIFEST or first.size > MANIFEST_MAX:
        refuse("the first file", f"{MANIFEST}, at most {MANIFEST_MAX} bytes", f"{first.name!a}")
    data = _content(file, first)
    signature = None
    if (signed := places.get(SIGNATURE)) is not None:
        if signed.size != bundle_sign.SIGNATURE_BYTES:
            refuse(SIGNATURE, f"{bundle_sign.SIGNATURE_BYTES} bytes", str(signed.size))
        signature = _content(file, signed)
    if trusted_key is not None:  # before anything in the manifest is looked at
        bundle_sign.verify(data, signature, trusted_key)
    manifest = Manifest.from_bytes(data)
    if manifest.to_bytes() != data:
        refuse(MANIFEST, "the text that edgesight writes", "another spelling of it")
    wanted = [MANIFEST, *([SIGNATURE] if signed else []), *(e.path for e in manifest.files)]
    found = [entry.name for entry in entries]
    if found != wanted:
        odd = sorted(set(found) ^ set(wanted))
        kind = "other files" if odd else "another order"
        refuse("the files", "those of the manifest, sorted", f"{kind}: {odd[:3]!a:.120}")
    for listed in manifest.files:
        if places[listed.path].size != listed.size:
            refuse(listed.path, f"{listed.size} bytes", str(places[listed.path].size))
    digest = hashlib.sha256(data).hexdigest()
    return Bundle(path, manifest, signature, trusted_key is not None, digest, places)


def check_onnx(name: str, data: bytes) -> None:
    """Refuses what is no ONNX model in one file, without loading it.

    Raises:
        ModelFileError: It is none, or keeps weights in other files.
    """
    try:
        elsewhere = has_external_data(data)
    except ValueError:
        elsewhere = None
    if elsewhere is None or not data.startswith(ONNX_START):
        message = (
            f"{name}: expected an ONNX model, found {len(data)} bytes that are none; "
            "export it again"
        )
        raise ModelFileError(message)
    if elsewhere:
        message = f"{name}: expected a model in one file, found weights in others; export it so"
        raise ModelFileError(message)


def _content(file: BinaryIO, entry: Entry) -> bytes:
    file.seek(entry.start)
    data = file.read(entry.size)
    if zlib.crc32(data) != entry.crc32:  # what no hash covers may still be damaged
        refuse(entry.name, "the checksum of its header", "another")
    return data


def _opened(path: Path) -> BinaryIO:
    """Opens a file for reading; devices, pipes and folders are refused."""
    try:
        if not path.exists() or path.is_file():
            return path.open("rb")
        reason = "a folder or a device"
    except OSError as error:
        reason = error.strerror or str(error)
    message = f"{path}: expected a bundle, found: {reason}; check the path"
    raise InputError(message)


def _nowhere(_: bytes) -> None:
    """Takes bytes that are only to be checked."""
