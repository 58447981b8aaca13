"""What the page can do beyond watching: record, and choose the model. Both may be missing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

from ...models.errors import InputError
from ..live import RecordingFigures


class Recorder(Protocol):
    """Records what the viewers see; its methods may wait for the disk, so call them in a thread."""

    def start(self) -> str:
        """Begins a recording and returns its name; the running one's if there is one.

        Raises:
            InputError: It cannot be written.
        """
        ...

    def stop(self) -> object:
        """Ends the recording, if there is one."""
        ...

    def state(self) -> RecordingFigures:
        """Returns how it is; never waits."""
        ...

    def list(self) -> Sequence[Mapping[str, object]]:
        """Returns the finished recordings: ``name``, ``bytes``, ``seconds``, ``time`` (Unix)."""
        ...

    def open_file(self, name: str) -> Path | None:
        """Returns the file of a finished recording; None for every other name."""
        ...

    def delete(self, name: str) -> bool:
        """Removes a finished recording; returns whether there was one.

        Raises:
            InputError: It cannot be removed.
        """
        ...


class Upload(Protocol):
    """A model file on its way in; leaving the ``with`` without ``finish`` removes it."""

    def __enter__(self) -> Upload:
        """Begins."""
        ...

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
        /,
    ) -> bool | None:
        """Removes what was not finished."""
        ...

    def write(self, data: bytes, /) -> object:
        """Takes the next bytes.

        Raises:
            InputError: There is no room for them.
        """
        ...

    def finish(self) -> object:
        """Checks the whole file and makes it one that can be chosen.

        Raises:
            InputError: It is no model that can run.
        """
        ...


class Models(Protocol):
    """The models that can run, and the change from one to another while the run goes on."""

    bytes_max: int
    """Size of the largest file that is taken."""

    @property
    def Busy(self) -> type[InputError]:
        """What is raised when another model is being checked."""
        ...

    def state(self) -> Mapping[str, Any]:
        """Returns how it is, JSON-ready; never waits for a check.

        ``current``; ``busy``, the name of the one that is being checked, or None; ``phase``, what
        is being done with it; ``error``, why the last one was refused or rolled back, or None;
        ``uploads``, whether there is a place for new ones; ``models``, each with ``name``,
        ``bytes`` and ``current``.
        """
        ...

    def choose(self, name: str, /) -> object:
        """Begins the change to a model; ``state`` tells how it goes.

        Raises:
            InputError: There is none of this name; ``Busy``: another is being checked.
        """
        ...

    def receive(self, name: str, /) -> Upload:
        """Begins to take a new model file.

        Raises:
            InputError: The name is no good, or there is no room.
        """
        ...
