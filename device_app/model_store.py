"""The model files that a viewer may choose from: a folder, what was uploaded to it, and our own.

A name is looked up in a list that is made here; nothing that a viewer sends becomes a path.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

from ..models.errors import InputError, OutputError
from ..models.files import is_file

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,79}\.onnx")
BYTES_MAX = 256 << 20
"""Of an upload; detectors for boards have 1 to 50 MB."""
FREE_MIN = 64 << 20
"""Bytes of disk that an upload has to leave."""
LISTED_MAX = 200
PREFIX, OLD_S = ".upload-", 3600.0
"""Of folders that hold what comes in; older ones are of a run that was killed."""


class ModelStore:
    """Files by name.

    Args:
        first: The run's own model; listed under its file's name.
        folder: Where further ones are, and where uploads go; None: nowhere.
        uploads: Whether uploads are taken.

    Raises:
        InputError: The folder is none.
    """

    def __init__(self, first: Path, folder: Path | None, uploads: bool) -> None:
        """Checks the folder."""
        if folder is not None and not folder.is_dir():
            message = f"--models: expected a folder with ONNX files, found none at {folder}"
            raise InputError(message)
        self.uploads = uploads and folder is not None
        if self.uploads and folder is not None:
            _clear(folder)
        self._first, self._folder = first, folder

    def files(self) -> dict[str, Path]:
        """Returns the files that are there now, by name; the run's own is the first."""
        found = {self._first.name: self._first}
        if self._folder is None:
            return found
        with contextlib.suppress(OSError):
            named = [p for p in sorted(self._folder.iterdir()) if NAME.fullmatch(p.name)]
            for path in named[:LISTED_MAX]:
                if is_file(path) and not path.is_symlink():
                    found.setdefault(path.name, path)
        return found

    def receive(self, name: str, check: Callable[[Path], None]) -> Upload:
        """Begins an upload.

        Args:
            name: That the file is to have.
            check: Raises an error if the finished file is no usable model.

        Raises:
            InputError: There are no uploads here, or the name is none.
        """
        if self._folder is None or not self.uploads:
            message = "expected no upload, found one; run with --models FOLDER and a token"
            raise InputError(message)
        if not NAME.fullmatch(name):
            message = (
                "expected a name of letters, digits and ._- that ends with .onnx, "
                f"found {name[:40]!r}; rename the file"
            )
            raise InputError(message)
        target = self._folder / name
        if target.is_symlink() or (target.exists() and not target.is_file()):
            message = f"expected a free name, found that {name} is taken; rename the file"
            raise InputError(message)
        if name == self._first.name:
            message = f"expected another name than the run's own model's, {name}; rename the file"
            raise InputError(message)
        return Upload(target, check)


class Upload:
    """A file on its way in; it gets its name only when it is whole and was tried.

    Args:
        target: Where it goes.
        check: Raises an error if it is no usable model.

    Raises:
        OutputError: The folder cannot be written.
    """

    def __init__(self, target: Path, check: Callable[[Path], None]) -> None:
        """Begins a file in a folder of its own, beside which no other file is within reach."""
        self._target, self._check, self._bytes = target, check, 0
        try:
            self._folder = Path(tempfile.mkdtemp(prefix=PREFIX, dir=target.parent))
            self._path = self._folder / target.name
            self._file: BinaryIO = self._path.open("wb")
        except OSError as error:
            raise _cannot_keep(target, error) from error

    def write(self, data: bytes) -> None:
        """Takes the next bytes.

        Raises:
            InputError: They are too many.
            OutputError: They cannot be kept.
        """
        self._bytes += len(data)
        if self._bytes > BYTES_MAX:
            message = f"expected a model of at most {BYTES_MAX >> 20} MB, found more"
            raise InputError(message)
        try:
            if shutil.disk_usage(self._folder).free < FREE_MIN + len(data):
                message = (
                    "expected room for the model, found a disk that is nearly full; free space"
                )
                raise OutputError(message)
            self._file.write(data)
        except OSError as error:
            raise _cannot_keep(self._target, error) from error

    def finish(self) -> None:
        """Tries the model and gives it its name; an earlier file of that name is replaced.

        Raises:
            ModelFileError: It is no usable model.
            OutputError: It cannot be kept.
        """
        try:
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
        except OSError as error:
            raise _cannot_keep(self._target, error) from error
        try:
            self._check(self._path)
        except InputError as error:  # not the name of a folder that is gone in a moment
            raise type(error)(str(error).replace(str(self._path), self._target.name)) from None
        try:
            self._path.replace(self._target)
        except OSError as error:
            raise _cannot_keep(self._target, error) from error

    def __enter__(self) -> Upload:
        """Goes on with it."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Removes what did not become a model."""
        with contextlib.suppress(OSError):
            self._file.close()
        shutil.rmtree(self._folder, ignore_errors=True)


def _clear(folder: Path) -> None:
    """Removes what a run that was killed left of an upload."""
    with contextlib.suppress(OSError):
        for left in folder.glob(f"{PREFIX}*"):
            if (
                left.is_dir()
                and not left.is_symlink()
                and time.time() - left.stat().st_mtime > OLD_S
            ):
                shutil.rmtree(left, ignore_errors=True)


def _cannot_keep(target: Path, error: OSError) -> OutputError:
    reason = error.strerror or str(error)
    return OutputError(f"cannot keep {target.name}: {reason}; free space or choose another folder")
