"""A desktop that nobody sees, and what a window does to its process.

Run as ``window_checks.py desktop-ends|memory`` it prints one JSON object: in a process of its own,
because Xlib would end it, and because the memory of a test session says nothing.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from Xlib import XK, X, display, error
from Xlib.ext import xtest
from Xlib.protocol import event

from edgesight.device_app.live import LiveView
from edgesight.device_app.window import Window, placed
from edgesight.models.preprocess import Image

SCREEN_WH = (800, 480)  # of a 7-inch screen

SHOWS = 3000
WARM = 500


class Screen:
    """An X server whose picture can be read, and a hand on its keyboard and mouse."""

    def __init__(self, server: subprocess.Popen[bytes], name: str) -> None:
        self.server, self.name = server, name
        self.x = display.Display(name)
        self.root = self.x.screen().root

    def shot(self) -> Image:
        """Returns what is on the screen, BGR."""
        width, height = SCREEN_WH
        data = self.root.get_image(0, 0, width, height, X.ZPixmap, 0xFFFFFFFF).data
        return np.frombuffer(data, np.uint8).reshape(height, width, 4)[..., :3]

    def key(self, name: str, holding: str | None = None) -> None:
        names = [name] if holding is None else [holding, name]
        codes = [self.x.keysym_to_keycode(XK.string_to_keysym(n)) for n in names]
        for code in codes:
            xtest.fake_input(self.x, X.KeyPress, code)
        for code in reversed(codes):
            xtest.fake_input(self.x, X.KeyRelease, code)
        self.x.sync()

    def double_click(self) -> None:
        xtest.fake_input(self.x, X.MotionNotify, x=SCREEN_WH[0] // 2, y=SCREEN_WH[1] // 2)
        for kind in (X.ButtonPress, X.ButtonRelease) * 2:
            xtest.fake_input(self.x, kind, 1)
        self.x.sync()

    def client(self) -> Any:
        """Returns the X window of ours."""
        listed = self.root.get_full_property(
            self.x.intern_atom("_NET_CLIENT_LIST"), X.AnyPropertyType
        )
        return self.x.create_resource_object("window", listed.value[0])

    def clients(self) -> int:
        """Returns how many windows there are."""
        kind = self.x.intern_atom("_NET_CLIENT_LIST")
        listed = self.root.get_full_property(kind, X.AnyPropertyType)
        return 0 if listed is None else len(listed.value)

    def place(self, picture_wh: tuple[int, int]) -> tuple[int, int, int, int]:
        """Returns where a picture should stand on the screen now."""
        client = self.client()
        size, corner = client.get_geometry(), client.translate_coords(self.root, 0, 0)
        left, top, width, height = placed(picture_wh, (size.width, size.height))
        return left - corner.x, top - corner.y, width, height

    def ask(self, kind: str, value: int) -> None:
        """Does what a click on the frame or the task bar does."""
        client = self.client()
        data = (32, [value, X.CurrentTime, 0, 0, 0])
        asked = event.ClientMessage(window=client, client_type=self.x.intern_atom(kind), data=data)
        mask = X.SubstructureRedirectMask | X.SubstructureNotifyMask
        self.root.send_event(asked, event_mask=mask)
        self.x.sync()

    def pointer_seen(self) -> bool:
        found = self.x.xfixes_get_cursor_image(self.root)
        return any(pixel >> 24 for pixel in found.cursor_image)


@contextlib.contextmanager
def desktop(folder: Path, until: Callable[[Callable[[], bool]], None]) -> Iterator[Screen]:
    """Starts an X server and a window manager on it."""
    read, write = os.pipe()
    size = "x".join(map(str, (*SCREEN_WH, 24)))
    command = ["Xvfb", "-displayfd", str(write), "-screen", "0", size, "-nolisten", "tcp"]
    style = folder / "style.xml"
    style.write_text("<JWM/>")
    with subprocess.Popen(command, pass_fds=[write], stderr=subprocess.DEVNULL) as server:
        os.close(write)
        try:
            found = Screen(server, f":{os.read(read, 16).decode().strip()}")
            found.x.xfixes_query_version()
            ready = found.x.intern_atom("_NET_SUPPORTING_WM_CHECK")
            with subprocess.Popen(["jwm", "-display", found.name, "-f", str(style)]) as manager:
                try:
                    until(
                        lambda: found.root.get_full_property(ready, X.AnyPropertyType) is not None
                    )
                    yield found
                finally:
                    manager.kill()
            with contextlib.suppress(error.ConnectionClosedError):  # where a test ended it
                found.x.close()
        finally:
            os.close(read)
            server.kill()


def resident_mb() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def opened() -> tuple[LiveView, Window]:
    live = LiveView()
    window = Window(live, title="EdgeSight")
    window.open()
    return live, window


def desktop_ends(x_server: int) -> dict[str, object]:
    live, window = opened()
    window.show(np.full((48, 64, 3), 200, np.uint8), 0)
    goes_on = [window.pump(0.1)]
    os.kill(x_server, signal.SIGKILL)
    while window.error is None:
        window.show(np.full((48, 64, 3), 100, np.uint8), 1)
        goes_on.append(window.pump(0.05))
    goes_on.append(window.pump(0.05))
    window.close()
    return {"goes_on": all(goes_on), "error": window.error, "viewers": live.viewers}


def memory() -> dict[str, object]:
    live, window = opened()
    before = 0.0
    for i in range(SHOWS):
        if i == WARM:
            before = resident_mb()
        # Another size now and then: textures come and go.
        window.show(np.full((240, 320 + 32 * (i // 50 % 2), 3), i % 256, np.uint8), i)
        live.set_figures({"source_state": f"retrying: {i // 10}"})
        window.pump(0.0)
    grown = resident_mb() - before
    window.close()
    return {"grown_mb": grown, "error": window.error}


if __name__ == "__main__":
    what, *rest = sys.argv[1:]
    print(json.dumps(memory() if what == "memory" else desktop_ends(int(rest[0]))))
