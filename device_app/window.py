"""A window of this machine, or its whole screen without a desktop, with SDL (extra ``window``).

The loop's encoding thread calls ``show``, which never waits; the main thread calls ``pump``, which
draws and hears the keys. ctypes lets Python's other threads go on while SDL works.
"""

from __future__ import annotations

import ctypes
import os
import sys
import textwrap
import time
import warnings
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from ..models.draw import FONT
from ..models.errors import MissingExtraError, OutputError
from ..models.preprocess import Image
from .hud import LIGHT, text_width
from .latest import Latest
from .live import LiveView

POLL_S, STATE_S, NOTE_S = 0.02, 0.25, 2.5
"""So often keys and the source's state are asked for, and so long a note stays."""
SCORE_STEP, SCORE_LOW, SCORE_HIGH = 0.05, 0.05, 0.95
SIZE_MAX_WH, SCREEN_SHARE = (1280, 720), 0.9
"""Of the window when it opens, and how much of the desktop it takes at most: it has a frame."""
X_HANDLERS: list[Any] = []  # what Xlib may call until the process ends
HELP = "q end, f full screen, b boxes, p figures, + - score, s snapshot, h help"

Rect = tuple[int, int, int, int]  # left, top, width and height in pixels of the window


class Window:
    """Shows the newest picture, its aspect kept; the keys change what all viewers see.

    Everything but ``show`` belongs to one thread, the main one.

    Args:
        live: Whose controls the keys change, and which counts the window as a viewer.
        title: Of the window.
        fullscreen: Whether it begins with the whole screen; without a desktop always.
        folder: Where snapshots go; the current folder by default.

    Attributes:
        error: Why the window has gone although nobody closed it; the run goes on without.
        watching: Whether somebody can see it: it is open and not minimized.
    """

    def __init__(
        self, live: LiveView, *, title: str, fullscreen: bool = False, folder: Path | None = None
    ) -> None:
        """Remembers what is wanted; ``open`` opens it."""
        self.error: str | None = None
        self.watching = False
        self._live, self._title, self._folder = live, title, folder or Path()
        self._newest: Latest[tuple[Image, int]] = Latest()
        self._picture: Image | None = None
        self._small: Image | None = None
        self._sequence = -1
        self._sdl: Any = None
        self._window: Any = None
        self._renderer: Any = None
        self._texture: Any = None  # the picture; and the texts:
        self._sign: Any = None
        self._texture_wh, self._sign_place = (0, 0), (0, 0, 0, 0)
        self._drawn: object = None
        self._note, self._note_until_s, self._state, self._state_due_s = "", 0.0, "", 0.0
        self._full, self._desktop = fullscreen, True
        self._helping = self._ended = self._stale = self._redraw = False

    def open(self) -> None:
        """Opens the window and counts it as a viewer.

        Raises:
            MissingExtraError: PySDL2 or SDL's library is not installed.
            OutputError: There is no screen, or it may not be used.
        """
        self._sdl = sdl = _load_sdl()
        hints = {
            "SDL_NO_SIGNAL_HANDLERS": "1",  # Ctrl-C and SIGTERM stay the command's
            "SDL_RENDER_SCALE_QUALITY": "linear",
            "SDL_VIDEO_MINIMIZE_ON_FOCUS_LOSS": "0",
            "SDL_VIDEO_X11_NET_WM_BYPASS_COMPOSITOR": "0",  # or some desktops flicker
        }
        if not os.environ.get("SDL_VIDEODRIVER") and drivers_here():
            # Left alone, SDL would go on with a window that nobody can see.
            hints["SDL_VIDEODRIVER"] = drivers_here()
        for name, value in hints.items():
            sdl.SDL_SetHint(name.encode(), value.encode())
        try:
            if sdl.SDL_Init(sdl.SDL_INIT_VIDEO):
                raise OutputError(no_screen(_sdl_error(sdl)))
            self._make_window()
        except OutputError:
            self.close()
            raise
        finally:
            sdl.SDL_ResetHint(b"SDL_VIDEODRIVER")  # the others are read later, too
        self._watch(True)
        self._tell("h: help")

    def show(self, picture: Image, sequence: int) -> None:
        """Makes this the newest picture; never waits, and safe from any thread.

        Args:
            picture: uint8 BGR ``(height, width, 3)``; must not be changed afterwards.
            sequence: Number of its frame.
        """
        self._newest.put((picture, sequence))

    def pump(self, timeout_s: float) -> bool:
        """Draws what comes and does what the user wants.

        Args:
            timeout_s: Seconds until it returns; less if the run ends.

        Returns:
            False once the user has ended the run.
        """
        until = time.monotonic() + timeout_s
        while not self._ended and not self._live.closed:
            left = max(0.0, min(POLL_S, until - time.monotonic()))
            if self._window is None:  # never opened, closed or lost: the run goes on
                time.sleep(left)
            else:
                self._step(left)
            if time.monotonic() >= until:
                break
        return not self._ended

    def close(self) -> None:
        """Closes the window; does nothing the second time."""
        self._watch(False)
        sdl, self._sdl, self._window = self._sdl, None, None
        self._renderer = self._texture = self._sign = None
        if sdl is not None and self.error is None:  # without its X server SDL can only crash
            sdl.SDL_QuitSubSystem(sdl.SDL_INIT_VIDEO)  # takes everything along

    def _make_window(self) -> None:
        sdl, room = self._sdl, self._sdl.SDL_Rect()
        self._desktop = sdl.SDL_GetCurrentVideoDriver() != b"KMSDRM"
        self._full = self._full or not self._desktop
        sdl.SDL_GetDisplayUsableBounds(0, ctypes.byref(room))
        width = max(1, min(SIZE_MAX_WH[0], round(room.w * SCREEN_SHARE)))
        height = max(1, min(SIZE_MAX_WH[1], round(room.h * SCREEN_SHARE)))
        place = (sdl.SDL_WINDOWPOS_CENTERED, sdl.SDL_WINDOWPOS_CENTERED, width, height)
        flags = sdl.SDL_WINDOW_RESIZABLE | self._full * sdl.SDL_WINDOW_FULLSCREEN_DESKTOP
        self._window = sdl.SDL_CreateWindow(self._title.encode(), *place, flags) or None
        if self._window is not None:
            # No waiting for the screen's beat: a hidden window would hold the thread up.
            self._renderer = sdl.SDL_CreateRenderer(self._window, -1, 0) or None
        if self._renderer is None:
            raise OutputError(no_screen(_sdl_error(sdl)))
        sdl.SDL_StopTextInput()  # or a touch screen's keyboard would come up
        sdl.SDL_ShowCursor(not self._full)
        if sdl.SDL_GetCurrentVideoDriver() == b"x11":
            self._outlive_x_server()
        self._redraw = True

    def _outlive_x_server(self) -> None:
        """Keeps Xlib from ending the process, its files half written, with the X server."""
        sdl, info = self._sdl, self._sdl.SDL_SysWMinfo()
        sdl.SDL_GetVersion(ctypes.byref(info.version))
        xlib = ctypes.CDLL("libX11.so.6")
        sdl.SDL_GetWindowWMInfo(self._window, ctypes.byref(info))
        if not hasattr(xlib, "XSetIOErrorExitHandler"):  # before libX11 1.7
            return
        quiet = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p)(lambda _: 0)
        kind = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p)
        lost = kind(lambda *_: self._lose("the desktop has ended"))
        xlib.XSetIOErrorHandler(quiet)
        xlib.XSetIOErrorExitHandler(ctypes.c_void_p(info.info.x11.display), lost, None)
        X_HANDLERS[:] = [quiet, lost]

    def _step(self, timeout_s: float) -> None:
        """Waits for a picture, hears the events and draws if anything has changed."""
        if (item := self._newest.get(timeout_s)) is not None:
            self._picture, self._sequence = item
            self._stale = True
        self._hear()
        now_s = time.monotonic()
        if now_s >= self._state_due_s:
            self._state_due_s = now_s + STATE_S
            state = self._live.figures().get("source_state", "running")
            waiting = "waiting for the first picture" if self._picture is None else ""
            self._state = waiting if state in ("running", "ended") else f"source {state}"
        note = self._note if now_s < self._note_until_s else self._state
        if self.error is None and not self._ended:
            self._draw((HELP,) * self._helping + (note,) * bool(note))
        if self.error is not None:
            self.close()

    def _draw(self, texts: tuple[str, ...]) -> None:
        sdl, renderer = self._sdl, self._renderer
        sdl.SDL_RenderGetViewport(renderer, ctypes.byref(area := sdl.SDL_Rect()))
        window_wh = max(1, area.w), max(1, area.h)
        if (texts, window_wh) != self._drawn:
            self._write(texts, window_wh)
            self._drawn, self._stale = (texts, window_wh), True  # a larger one shows more
        elif not (self._stale or self._redraw):
            return
        sdl.SDL_SetRenderDrawColor(renderer, 0, 0, 0, 255)
        sdl.SDL_RenderClear(renderer)
        if self._picture is not None:
            place = placed((self._picture.shape[1], self._picture.shape[0]), window_wh)
            if self._stale and not self._upload(self._picture, place):
                self._lose(_sdl_error(sdl))
                sdl.SDL_QuitSubSystem(sdl.SDL_INIT_VIDEO)
                return
            sdl.SDL_RenderCopy(renderer, self._texture, None, sdl.SDL_Rect(*place))
        if self._sign:
            sdl.SDL_RenderCopy(renderer, self._sign, None, sdl.SDL_Rect(*self._sign_place))
        sdl.SDL_RenderPresent(renderer)
        self._stale = self._redraw = False

    def _upload(self, picture: Image, place: Rect) -> bool:
        """Writes the picture into the texture's own memory; returns whether that went well.

        No renderer takes three bytes per pixel, and SDL converts slower than OpenCV. A picture
        larger than its place is made smaller first: less to carry, and Pi 3's GPU ends at 2048 px.
        """
        sdl = self._sdl
        width, height = min(place[2], picture.shape[1]), min(place[3], picture.shape[0])
        if (height, width) != picture.shape[:2]:
            if self._small is None or self._small.shape[:2] != (height, width):
                self._small = np.empty((height, width, 3), np.uint8)
            cv2.resize(picture, (width, height), dst=self._small)
            picture = self._small
        if self._texture is None or self._texture_wh != (width, height):
            self._texture = self._new_texture(self._texture, width, height)
            self._texture_wh = (width, height)
        start, pitch = ctypes.c_void_p(), ctypes.c_int()
        if sdl.SDL_LockTexture(self._texture, None, ctypes.byref(start), ctypes.byref(pitch)):
            return False
        memory = (ctypes.c_uint8 * (pitch.value * height)).from_address(start.value or 0)
        rows: Image = np.ndarray((height, width, 4), np.uint8, memory, 0, (pitch.value, 4, 1))
        cv2.cvtColor(picture, cv2.COLOR_BGR2BGRA, dst=rows)
        sdl.SDL_UnlockTexture(self._texture)
        return True

    def _write(self, texts: tuple[str, ...], window_wh: tuple[int, int]) -> None:
        """Writes texts into a texture of their own, at the window's lower edge."""
        sign = written(texts, window_wh) if texts else np.zeros((1, 1, 4), np.uint8)
        height, width = sign.shape[:2]
        self._sign = self._new_texture(self._sign, width, height)
        self._sdl.SDL_UpdateTexture(self._sign, None, sign.ctypes.data, 4 * width)
        self._sdl.SDL_SetTextureBlendMode(self._sign, self._sdl.SDL_BLENDMODE_BLEND)
        self._sign_place = ((window_wh[0] - width) // 2, window_wh[1] - height, width, height)

    def _new_texture(self, old: Any, width: int, height: int) -> Any:
        sdl = self._sdl
        if old:
            sdl.SDL_DestroyTexture(old)
        kind = (sdl.SDL_PIXELFORMAT_ARGB8888, sdl.SDL_TEXTUREACCESS_STREAMING)  # B, G, R, A
        return sdl.SDL_CreateTexture(self._renderer, *kind, width, height)

    def _hear(self) -> None:
        sdl, event = self._sdl, self._sdl.SDL_Event()
        while self.error is None and sdl.SDL_PollEvent(ctypes.byref(event)):
            if event.type == sdl.SDL_QUIT:
                self._ended = True
            elif event.type == sdl.SDL_KEYDOWN:
                self._press(event.key.keysym, bool(event.key.repeat))
            elif event.type == sdl.SDL_MOUSEBUTTONDOWN and event.button.clicks == 2:
                self._toggle_full()  # a finger's, too
            elif event.type == sdl.SDL_WINDOWEVENT:
                self._redraw = True
                hidden = sdl.SDL_WINDOW_MINIMIZED | sdl.SDL_WINDOW_HIDDEN
                self._watch(not sdl.SDL_GetWindowFlags(self._window) & hidden)

    def _press(self, key: Any, repeated: bool) -> None:
        sdl, controls = self._sdl, self._live.controls
        up = (ord("+"), ord("="), sdl.SDLK_KP_PLUS, sdl.SDLK_UP)
        if key.sym in (*up, ord("-"), sdl.SDLK_KP_MINUS, sdl.SDLK_DOWN):
            wanted = controls.score_min + (SCORE_STEP if key.sym in up else -SCORE_STEP)
            controls.score_min = min(SCORE_HIGH, max(SCORE_LOW, round(wanted, 2)))
            self._tell(f"score from {controls.score_min:.2f}")
        elif repeated:
            return
        elif key.sym == ord("c"):  # without a desktop SDL keeps Ctrl-C from the terminal
            self._ended |= bool(key.mod & sdl.KMOD_CTRL)
        elif key.sym in (ord("q"), sdl.SDLK_ESCAPE):
            self._ended = True
        elif key.sym == ord("f"):
            self._toggle_full()
        elif key.sym == ord("b"):
            controls.boxes = not controls.boxes
            self._tell("boxes on" if controls.boxes else "boxes off")
        elif key.sym == ord("p"):
            controls.plain = not controls.plain
            self._tell("figures off" if controls.plain else "figures on")
        elif key.sym == ord("s"):
            self._tell(self._snapshot())
        elif key.sym == ord("h"):
            self._helping = not self._helping

    def _toggle_full(self) -> None:
        if not self._desktop:
            self._tell("without a desktop it is always the full screen")
            return
        self._full = not self._full
        flags = self._full * self._sdl.SDL_WINDOW_FULLSCREEN_DESKTOP
        self._sdl.SDL_SetWindowFullscreen(self._window, flags)
        self._sdl.SDL_ShowCursor(not self._full)

    def _snapshot(self) -> str:
        """Writes the picture into a file; returns what to tell."""
        if self._picture is None:
            return "no picture yet"
        name = f"edgesight-{time.strftime('%Y%m%d-%H%M%S')}-{self._sequence}.jpg"
        part = self._folder / f"{name}.part"
        try:
            part.write_bytes(cv2.imencode(".jpg", self._picture)[1].tobytes())
            part.replace(self._folder / name)
        except OSError as error:
            return f"cannot write {name}: {error.strerror}"
        return f"saved {name}"

    def _tell(self, note: str) -> None:
        self._note, self._note_until_s = note, time.monotonic() + NOTE_S

    def _lose(self, why: str) -> None:
        """Goes on without the window: what is wrong with it must not end the run."""
        self.error = self.error or f"the window is gone ({why}); the run goes on without it"

    def _watch(self, watching: bool) -> None:
        """Counts as a viewer while somebody can see it."""
        if watching != self.watching:
            self.watching = watching
            (self._live.viewer_came if watching else self._live.viewer_left)()


def placed(picture_wh: tuple[int, int], window_wh: tuple[int, int]) -> Rect:
    """Returns where a picture stands in a window: as large as it can be, in the middle."""
    scale = min(window_wh[0] / picture_wh[0], window_wh[1] / picture_wh[1])
    width, height = (max(1, round(side * scale)) for side in picture_wh)
    return (window_wh[0] - width) // 2, (window_wh[1] - height) // 2, width, height


def written(texts: tuple[str, ...], window_wh: tuple[int, int]) -> Image:
    """Returns texts as uint8 BGRA on dark glass; letters can be read on a 7-inch screen."""
    scale, room = max(0.55, min(window_wh) / 700), max(24, window_wh[0] - 24)
    rows: list[str] = []
    for text in texts:
        columns = max(8, int(len(text) * room / scale / text_width(text)))
        rows += textwrap.wrap(text, columns)[:3]
    row_h, width = round(40 * scale), round(max(map(text_width, rows)) * scale) + 24
    sign = np.full((row_h * len(rows) + 8, width, 4), (0, 0, 0, 180), np.uint8)
    for i, row in enumerate(rows):
        origin = (12, 4 + round((i + 0.72) * row_h))
        cv2.putText(sign, row, origin, FONT, scale, (*LIGHT, 255), 1, cv2.LINE_AA)
    return sign


def drivers_here() -> str:
    """Returns the SDL drivers that can show something here; empty where SDL knows best."""
    if not sys.platform.startswith("linux"):
        return ""
    desktops = (("DISPLAY", "x11"), ("WAYLAND_DISPLAY", "wayland"))
    return ",".join(driver for key, driver in desktops if os.environ.get(key)) or "kmsdrm"


def no_screen(reason: str) -> str:
    """Returns one line that says why there is no screen, and what to do."""
    keys = ("SDL_VIDEODRIVER", "DISPLAY", "WAYLAND_DISPLAY")
    found = [f"{key}={os.environ[key]}" for key in keys if os.environ.get(key)]
    cards = sorted(Path("/dev/dri").glob("card*"))
    if found and os.environ.get("SDL_VIDEODRIVER", "").lower() != "kmsdrm":
        reason = f"none for {', '.join(found)} ({reason})"
        todo = "correct these, or unset them for the full screen without a desktop (kmsdrm)"
    elif not cards:
        reason = "neither a desktop (DISPLAY) nor a graphics device /dev/dri/card*"
        todo = "connect a screen, or set DISPLAY=:0 if a desktop runs"
    elif not os.access(cards[0], os.R_OK | os.W_OK):
        reason = f"no permission for {cards[0]} (SDL_VIDEODRIVER=kmsdrm)"
        todo = "run 'sudo usermod -aG video,render,input $USER' and log in again"
    else:
        reason = f"none that SDL_VIDEODRIVER=kmsdrm can use ({reason})"
        todo = "install libegl1 libgles2 libgbm1, or set DISPLAY=:0 if a desktop runs"
    return f"expected a screen, found {reason}; {todo}, or choose --display web"


def _load_sdl() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it tells which library it took
        try:
            import sdl2
        except ImportError as error:  # or its library
            raise MissingExtraError.of(package="pysdl2-dll", extra="window") from error
    return sdl2


def _sdl_error(sdl: Any) -> str:
    return (sdl.SDL_GetError() or b"").decode(errors="replace") or "SDL gives no reason"
