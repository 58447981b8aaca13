"""A case of ``faults.py``: how it is entered, and what it may use."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fault_world as world
from fault_kit import App, Viewer

Case = Callable[["Trial"], None]
CASES: dict[str, tuple[str, Case]] = {}
HIDDEN: dict[str, tuple[str, Case]] = {}
RETRYING = "^retrying: "


def fault(name: str, where: dict[str, tuple[str, Case]] = CASES) -> Any:
    """Enters a function as the case of a name; its docstring says what happens."""

    def enter(case: Case) -> Case:
        where[name] = ((case.__doc__ or "").rstrip("."), case)
        return case

    return enter


class Trial:
    """One case: what it opened is closed after it, the run is ended and checked.

    Attributes:
        camera: What the run looks at, unless the case names another source.
        code: Exit code that is right.
        last_words: Pattern that standard error has to hold at the end.
        page: Whether the page is to be there until the end.
        later: Remembers what is to be called at the end of the case.
    """

    def __init__(self, folder: Path) -> None:
        """Starts nothing yet."""
        self.folder, self.app, self.viewer = folder, None, None  # type: Path, App | None, Any
        self.code, self.last_words, self.page = 0, "", True
        self._stack = contextlib.ExitStack()
        self.later = self._stack.callback

    def run(
        self, *words: Any, inject: str = "", token: bool = False, output: Path | None = None
    ) -> App:
        """Starts the command and a viewer, and waits until all is well."""
        if "--source" not in words:
            self.camera = world.Camera()
            self.later(self.camera.die)
            words = ("--source", self.camera.url, *words)
        self.app = App(self.folder, tuple(map(str, words)), inject, token, output)
        self.later(self.app.close)
        self.viewer = Viewer(self.app)
        self.later(self.viewer.close)
        return self.app.ready()

    def program(self, what: world.Program, *, start: bool = True) -> world.Program:
        """Starts a server; it ends with the case."""
        self.later(what.kill)
        if start:
            what.start()
        return what

    def disk(self, megabytes: int) -> world.Disk:
        """Mounts a disk until the end of the case."""
        disk = world.Disk(megabytes)
        self.later(disk.close)
        return disk

    def models(self) -> Path:
        """Makes a folder for models."""
        (self.folder / "models").mkdir()
        return self.folder / "models"

    def finish(self) -> None:
        """Checks that pictures come, and ends the run."""
        assert self.app is not None
        if self.app.ended:
            return
        if self.page and self.app.alive:
            self.app.must(self.viewer.goes_on(), "the viewer gets no pictures any more")
        self.app.end(self.code, self.last_words)

    def close(self) -> None:
        """Closes everything."""
        self._stack.close()
