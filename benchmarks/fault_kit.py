"""What ``faults.py`` does its work with: the real command under watch, and things that can break.

The command runs as a user starts it, in a process of its own, and is looked at from outside only:
its page, its output, what the system says of its threads and open files. What cannot be made to
fail from outside is made to fail by ``fault_injection.py``, which Python loads first and which
waits for a file to appear; the package itself is not changed.
"""

from __future__ import annotations

import contextlib
import http.client
import itertools
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

BACK_S = 10.0
"""So soon after a fault frames must flow, and threads and open files be as before."""
GAP_MAX_S = 5.0
"""So long no frame may come while a fault lasts that frames are to survive: machines are shared."""
START_S, END_S = 60.0, 20.0
TOKEN = "fault-run-token-0123456789"
INJECTION = Path(__file__).with_name("fault_injection.py")
STRANGE = re.compile(r"Traceback|Exception ignored|terminate called|Segmentation|Fatal Python")


class Hurt(Exception):
    """A run did not survive in a way that makes going on with the case pointless."""


def until(condition: Callable[[], Any], limit_s: float) -> Any:
    """Waits for something true and returns it; what is false after the time."""
    limit = time.monotonic() + limit_s
    while not (found := condition()) and time.monotonic() < limit:
        time.sleep(0.05)
    return found


class App:
    """``edgesight run`` as a user starts it, watched from outside.

    Args:
        folder: For its output.
        words: Its options beside the page's.
        inject: What of ``fault_injection.py`` it has.
        token: Whether the page asks for ``TOKEN``.
        output: Where its standard output goes; a file in the folder by default.

    Attributes:
        said: What it said of its faults, as it said it.
        problems: Why it did not survive; empty if it did.
        back_s: Seconds from the end of the fault until frames flowed; None before.
        flowed: Whether frames went on all through the fault.
        levels: Threads and open files that there should be.
        ended: Whether it was ended, and checked.
    """

    def __init__(
        self, folder: Path, words: tuple[str, ...], inject: str, token: bool, output: Path | None
    ) -> None:
        """Starts it; ``ready`` waits for its first frames."""
        self.said: list[str] = []
        self.problems: list[str] = []
        self.back_s: float | None = None
        self.flowed: bool | None = None
        self.switches = folder / "inject"
        self.switches.mkdir(exist_ok=True)
        shutil.copy(INJECTION, self.switches / "sitecustomize.py")
        self._out, self._err = output or folder / "out.txt", folder / "err.txt"
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = int(free.getsockname()[1])
        paths = [os.fspath(self.switches), *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
        environment |= {"EDGESIGHT_INJECT": inject, "PYTHONFAULTHANDLER": "1"}
        self.headers = {"Authorization": f"Bearer {TOKEN}"} if token else {}
        if token:
            environment["EDGESIGHT_TOKEN"] = TOKEN
        page = ("--port", str(self.port), "--no-browser")
        with self._out.open("ab") as out, self._err.open("wb") as err:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "edgesight", "run", *page, *words],
                stdout=out, stderr=err, stdin=subprocess.DEVNULL, env=environment, cwd=folder,
            )  # fmt: skip
        self.pid = self.process.pid
        self.figures: dict[str, Any] = {}
        self.ticks: list[float] = []  # when a poll saw more frames than the one before
        self._over = threading.Event()
        self.levels, self.ended = (0, 0), False
        self._poller = threading.Thread(target=self._poll, daemon=True)
        self._poller.start()

    # What it says

    @property
    def alive(self) -> bool:
        """Whether the process is there."""
        return self.process.poll() is None

    @property
    def errors(self) -> str:
        """What it wrote to standard error."""
        return self._err.read_text(errors="replace")

    def link(self) -> http.client.HTTPConnection:
        """Returns a connection to its page."""
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)

    def ask(
        self,
        method: str,
        path: str,
        body: Any = None,
        kept: http.client.HTTPConnection | None = None,
    ) -> tuple[int, Any]:
        """Asks its page; returns status and JSON (or bytes), or 0 and why it does not answer."""
        data = body if isinstance(body, (bytes, type(None))) else json.dumps(body).encode()
        link = kept or self.link()
        closing = {} if kept else {"Connection": "close"}
        try:
            link.request(method, path, data, {**self.headers, **closing})
            answer = link.getresponse()
            raw = answer.read()
            is_json = "json" in (answer.getheader("content-type") or "")
            return answer.status, json.loads(raw) if is_json else raw
        except (OSError, http.client.HTTPException) as error:
            return 0, repr(error)
        finally:
            if kept is None:
                link.close()

    def events(self, kind: str) -> list[str]:
        """Returns the texts of its events of a kind."""
        found = self.ask("GET", "/api/events")[1]
        return [e["text"] for e in found["events"] if e["kind"] == kind]

    def shows(self, key: str, pattern: str, limit_s: float = 15.0, *, note: bool = True) -> bool:
        """Waits until a figure (or ``events.KIND``) matches; a problem if it does not."""
        seen: str = "nothing"

        def found() -> str | None:
            nonlocal seen
            value: Any = self.figures
            for part in key.split("."):
                if part == "events":
                    value = {name: self.events(name) for name in (key.split(".")[1],)}
                else:
                    value = value.get(part) if isinstance(value, dict) else None
            lines = value if isinstance(value, list) else [value]
            seen = "; ".join(str(line) for line in lines) or "nothing"
            return next((str(line) for line in lines if re.search(pattern, str(line))), None)

        text = until(lambda: found() if self.alive else "gone", limit_s)
        if not self.alive:
            raise Hurt(self.how_it_ended())
        if not text:
            self.problems.append(f"{key}: expected /{pattern}/ within {limit_s:g} s, found {seen}")
        elif note and f"{key}: {text}" not in self.said:
            self.said.append(f"{key}: {text}")
        return bool(text)

    def must(self, done: Any, problem: str) -> None:
        """Notes a problem unless something is true."""
        if not done:
            self.problems.append(problem)

    def how_it_ended(self) -> str:
        """Returns its exit code and last words."""
        words = self.errors.strip().splitlines() or ["nothing"]
        return f"the run ended by itself, exit code {self.process.poll()}: {words[-1][:200]}"

    # A fault

    def ready(self) -> App:
        """Waits for steady frames, and notes the level of threads and files."""
        until(lambda: len(self.ticks) >= 8 or not self.alive, START_S)
        if not self.alive or not self.ticks:
            raise Hurt(self.how_it_ended() if self.alive is False else "it never saw a frame")
        # Fills the pool of threads that answer requests: it grows when needed and then stays.
        asking = [threading.Thread(target=self.ask, args=("GET", "/api/models")) for _ in range(24)]
        for one in asking:
            one.start()
        for one in asking:
            one.join()
        self.ask("GET", "/snapshot.jpg")
        return self.mark()

    def mark(self) -> App:
        """Takes the threads and files of now as those that there should be."""
        same, before = 0, (0, 0)
        limit = time.monotonic() + BACK_S
        while same < 10 and time.monotonic() < limit:  # steady for a second
            time.sleep(0.1)
            now = self._level()
            same, before = (same + 1, now) if now == before else (0, now)
        self.levels = before
        return self

    @contextlib.contextmanager
    def fault(
        self, *, flows: bool, lasts_s: float = 4.0, undo: Callable[[], object] = int
    ) -> Iterator[None]:
        """A fault lasts as long as the block, at least ``lasts_s``; then the run has to be well.

        Args:
            flows: Whether frames have to go on meanwhile.
            lasts_s: Seconds.
            undo: Takes the fault away; unless the block has.
        """
        began = time.monotonic()
        yield
        while time.monotonic() < began + lasts_s and self.alive:
            time.sleep(0.05)
        undo()
        ended = time.monotonic()

        def came() -> list[float]:  # the first figures may be of a moment before
            return [t for t in self.ticks if t > ended][1:]

        until(lambda: came() or not self.alive, BACK_S)
        if not self.alive:
            raise Hurt(self.how_it_ended())
        if came():
            self.back_s = round(came()[0] - ended, 2)
        else:
            self.problems.append(f"no frame within {BACK_S:g} s after the fault")
        marks = [began, *[t for t in self.ticks if began <= t <= ended], ended]
        gap_s = max(b - a for a, b in itertools.pairwise(marks))
        self.flowed = gap_s <= GAP_MAX_S
        self.must(self.flowed or not flows, f"no frame for {gap_s:.1f} s while it lasted")
        self.settles()

    def settles(self) -> None:
        """Threads and open files go back to the level before."""

        def above() -> list[str]:
            names = ("threads", "files")
            rows = zip(names, self.levels, self._level(), strict=True)
            return [f"{name}: {a} before, {b} {BACK_S:g} s after" for name, a, b in rows if b > a]

        until(lambda: not above(), BACK_S)
        self.problems += above()

    def end(self, code: int = 0, last_words: str = "") -> None:
        """Ends it as systemd does, and checks how it goes.

        Args:
            code: Exit code that is right.
            last_words: Pattern that standard error has to hold.
        """
        if not self.alive:
            raise Hurt(self.how_it_ended())
        self.ended, children = True, self.children()
        self.process.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(END_S)
        found = self.process.poll()
        self.must(found == code, f"exit code: expected {code}, found {found}: {self.errors[-200:]}")
        out = self._out.read_text(errors="replace")
        self.must("frames/s" in out, "no summary")
        self.must(re.search(last_words, self.errors), f"no last words /{last_words}/")
        left = lambda: [pid for pid in children if Path(f"/proc/{pid}").exists()]  # noqa: E731
        until(lambda: not left(), BACK_S)
        self.must(not left(), "a process of it is left behind")
        for pid in left():
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGKILL)

    def close(self) -> None:
        """Ends it in any case, and looks at what it wrote."""
        self._over.set()
        with contextlib.suppress(OSError):
            self.process.send_signal(signal.SIGCONT)
        self.process.kill()
        self.process.wait()
        self._poller.join(5)
        if found := STRANGE.search(self.errors):
            line = self.errors.strip().splitlines()[-1][:160]
            self.problems.append(f"standard error has {found[0]!r}: {line}")

    def switch(self, name: str, text: str | None = "") -> None:
        """Throws a switch of ``fault_injection.py``; None: back."""
        file = self.switches / name
        if text is None:
            file.unlink(missing_ok=True)
        else:
            file.with_suffix(".new").write_text(text)
            file.with_suffix(".new").replace(file)

    def children(self) -> list[int]:
        """Returns the processes that it has started and that run."""
        found = []
        for task in Path(f"/proc/{self.pid}/task").iterdir():
            with contextlib.suppress(OSError):
                found += [int(pid) for pid in (task / "children").read_text().split()]
        return found

    def _level(self) -> tuple[int, int]:
        there = Path(f"/proc/{self.pid}")
        with contextlib.suppress(OSError):
            return len(list((there / "task").iterdir())), len(list((there / "fd").iterdir()))
        return 0, 0

    def _poll(self) -> None:
        """Reads the figures over one connection, which costs the run no file but this one."""
        link: http.client.HTTPConnection | None = None
        frames = -1
        while not self._over.wait(0.15):
            try:
                link = link or self.link()
                link.request("GET", "/api/figures", headers=self.headers)
                found = json.loads(link.getresponse().read())
            except (OSError, ValueError, http.client.HTTPException):
                if link is not None:
                    link.close()
                link = None
                continue
            if found.get("frames", 0) > frames >= 0:
                self.ticks.append(time.monotonic())
            frames, self.figures = found.get("frames", 0), found


class Viewer:
    """A browser that looks: it counts pictures, and asks again when they stop, as the page does."""

    def __init__(self, app: App) -> None:
        """Begins to look."""
        self.pictures = 0
        self._app, self._over = app, threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._thread.start()

    def _look(self) -> None:
        newest = b""
        while not self._over.is_set():
            link = http.client.HTTPConnection("127.0.0.1", self._app.port, timeout=2)
            with contextlib.suppress(OSError, http.client.HTTPException):
                link.request("GET", "/stream", headers=self._app.headers)
                answer = link.getresponse()
                while not self._over.is_set() and (line := answer.readline()):
                    if line.lower().startswith(b"content-length:"):
                        answer.readline()
                        jpeg = answer.read(int(line.split(b":")[1]))
                        self.pictures += jpeg != newest  # who asks again gets the old one first
                        newest = jpeg
            link.close()
            self._over.wait(0.5)

    def goes_on(self, limit_s: float = BACK_S) -> bool:
        """Whether some more pictures come."""
        enough = self.pictures + 5
        return bool(until(lambda: self.pictures > enough, limit_s))

    def close(self) -> None:
        """Goes."""
        self._over.set()
        self._thread.join(5)
