"""The window on a real desktop that nobody sees, with real keys and clicks.

Wants an X server and a window manager; on Debian: apt install xvfb jwm.
"""

from __future__ import annotations

import json
import runpy
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cv2
import numpy as np
import pytest
from edgesight.device_app.live import LiveView
from edgesight.device_app.window import Window, drivers_here, placed, written
from edgesight.models.errors import MissingExtraError, OutputError
from edgesight.models.preprocess import Image
from Xlib import X

HERE = Path(__file__).parent
app: Any = SimpleNamespace(**runpy.run_path(str(HERE / "app_kit.py")))
kit: Any = SimpleNamespace(**runpy.run_path(str(HERE / "loop_kit.py")))
checks: Any = SimpleNamespace(**runpy.run_path(str(HERE / "inside" / "window_checks.py")))
SCREEN_WH = checks.SCREEN_WH
BLUE, RED, BLACK = (255, 0, 0), (0, 0, 255), (0, 0, 0)
KEYS = ("SDL_VIDEODRIVER", "DISPLAY", "WAYLAND_DISPLAY")


@pytest.fixture
def screen(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: Any) -> Iterator[Any]:
    """A desktop of 800x480 that ends with the test."""
    for key in KEYS:
        monkeypatch.delenv(key, raising=False)
    with checks.desktop(tmp_path_factory.mktemp("desktop"), kit.until) as found:
        monkeypatch.setenv("DISPLAY", found.name)
        yield found


@pytest.fixture
def live() -> LiveView:
    return LiveView()


@pytest.fixture
def window(screen: Any, live: LiveView, tmp_path: Path) -> Iterator[Window]:
    """A window that is open and can hear."""
    made = Window(live, title="EdgeSight", folder=tmp_path)
    made.open()
    yield made
    made.close()


def two_halves(height: int = 480, width: int = 640) -> Image:
    """Returns a picture that is blue on the left and red on the right."""
    picture = np.full((height, width, 3), BLUE, np.uint8)
    picture[:, width // 2 :] = RED
    return picture


def pumped(window: Window, condition: Callable[[], bool]) -> None:
    """Draws and hears until the condition holds."""

    def holds() -> bool:
        assert window.pump(0.03)
        return condition()

    kit.until(holds)


def in_full_screen(screen: Any, window: Window) -> None:
    window.pump(0.1)
    screen.key("f")
    pumped(window, lambda: screen.client().get_geometry().width == SCREEN_WH[0])


def stands_at(shot: Image) -> tuple[int, int, int, int]:
    """Returns left, top, width and height of what is blue or red on a row and a column."""
    colored = (shot == BLUE).all(2) | (shot == RED).all(2)
    columns, rows = np.flatnonzero(colored[40:200].any(0)), np.flatnonzero(colored.any(1))
    if not len(columns):
        return (0, 0, 0, 0)
    return (
        int(columns[0]),
        int(rows[0]),
        int(columns[-1] - columns[0]) + 1,
        int(rows[-1] - rows[0]) + 1,
    )


def shows(screen: Any, picture_wh: tuple[int, int] = (640, 480)) -> bool:
    """Returns whether the two halves stand in the window's middle, black beside them."""
    left, top, width, height = screen.place(picture_wh)
    shot = screen.shot()
    row = shot[top + height // 4]
    return (
        stands_at(shot)[:3] == (left, top, width)
        and tuple(row[left + width // 4]) == BLUE
        and tuple(row[left + 3 * width // 4]) == RED
        and tuple(row[left - 2]) == BLACK
    )


def test_blue_stays_blue_and_the_aspect_is_kept(screen: Any, window: Window) -> None:
    window.show(two_halves(), 0)
    pumped(window, lambda: shows(screen))
    _, _, width, height = stands_at(screen.shot())
    assert width / height == pytest.approx(640 / 480, abs=0.01)


@pytest.mark.parametrize("way", ["key", "double click"])
def test_the_full_screen_is_filled_and_left_again(screen: Any, window: Window, way: str) -> None:
    toggle = screen.double_click if way == "double click" else lambda: screen.key("f")
    window.show(two_halves(), 0)
    pumped(window, lambda: shows(screen))
    assert screen.pointer_seen()
    toggle()
    pumped(window, lambda: stands_at(screen.shot()) == (80, 0, 640, 480))
    pumped(window, lambda: not screen.pointer_seen())
    toggle()
    pumped(window, lambda: shows(screen))


def test_a_picture_of_the_screens_aspect_fills_it(screen: Any, live: LiveView) -> None:
    window = Window(live, title="EdgeSight", fullscreen=True)
    window.open()
    window.show(two_halves(960, 1600), 0)
    pumped(window, lambda: stands_at(screen.shot())[2:] == SCREEN_WH)
    window.close()


def test_the_picture_may_change_its_size(screen: Any, window: Window) -> None:
    in_full_screen(screen, window)
    sizes = ((480, 640), (1080, 1920), (800, 400), (2, 6), (2400, 4100), (480, 640))
    for number, (height, width) in enumerate(sizes):
        window.show(two_halves(height, width), number)
        place = placed((width, height), SCREEN_WH)
        pumped(window, lambda place=place: _near(stands_at(screen.shot())[:3], place[:3]))
    assert window.error is None


def test_a_still_picture_is_sharp_in_the_full_screen(screen: Any, window: Window) -> None:
    noise = np.random.default_rng(1).integers(0, 256, (480, 640, 3), dtype=np.uint8)
    window.show(noise, 0)  # and no other comes
    in_full_screen(screen, window)
    pumped(window, lambda: np.array_equal(screen.shot()[:400, 80:720], noise[:400]))


def test_a_small_picture_is_smooth(screen: Any, window: Window) -> None:
    in_full_screen(screen, window)
    window.show(two_halves(2, 2), 0)
    pumped(window, lambda: bool(screen.shot()[100, 320].any()))
    blue, _, red = screen.shot()[100, 400].astype(int)
    assert 60 < blue < 200
    assert 60 < red < 200


def test_a_window_that_cannot_draw_leaves_and_the_run_goes_on(
    screen: Any, window: Window, live: LiveView
) -> None:
    window.show(two_halves(), 0)
    pumped(window, lambda: shows(screen))
    window._sdl.SDL_DestroyRenderer(window._renderer)  # as a graphics driver that fails
    window.show(two_halves(), 1)
    kit.until(lambda: window.pump(0.02) and window.error is not None)
    assert window.error is not None
    assert "the run goes on" in window.error
    assert (live.viewers, screen.clients()) == (0, 0)
    assert window.pump(0.02)


def _near(found: tuple[int, ...], wanted: tuple[int, ...]) -> bool:
    """Small pictures are smooth between blue and red, and at their edges not."""
    return all(abs(a - b) <= 1 for a, b in zip(found, wanted, strict=True))


@pytest.mark.parametrize("how", ["q", "Escape", "Control c", "cross"])
def test_the_user_ends_it(screen: Any, window: Window, live: LiveView, how: str) -> None:
    assert window.pump(0.1)
    if how == "cross":
        screen.ask("_NET_CLOSE_WINDOW", X.CurrentTime)
    elif how == "Control c":
        screen.key("c", holding="Control_L")
    else:
        screen.key(how)
    kit.until(lambda: not window.pump(0.02))
    assert not window.pump(0.0)  # and so it stays
    assert window.error is None
    window.close()
    assert live.viewers == 0


def test_c_alone_ends_nothing(screen: Any, window: Window, live: LiveView) -> None:
    window.pump(0.1)
    screen.key("c")
    screen.key("b")
    pumped(window, lambda: not live.controls.boxes)


def test_keys_change_what_everybody_sees(screen: Any, window: Window, live: LiveView) -> None:
    controls = live.controls
    window.pump(0.1)
    for key, condition in (
        ("b", lambda: not controls.boxes),
        ("b", lambda: controls.boxes),
        ("p", lambda: controls.plain),
        ("p", lambda: not controls.plain),
        ("plus", lambda: controls.score_min == 0.4),
        ("Up", lambda: controls.score_min == 0.45),
        ("minus", lambda: controls.score_min == 0.4),
        ("KP_Subtract", lambda: controls.score_min == 0.35),
    ):
        screen.key(key)
        pumped(window, condition)


def test_the_score_stays_in_its_range(screen: Any, window: Window, live: LiveView) -> None:
    window.pump(0.1)
    for key, end in (("Up", 0.95), ("Down", 0.05)):
        for _ in range(25):
            screen.key(key)
        screen.key("b")
        boxes = live.controls.boxes
        pumped(window, lambda boxes=boxes: live.controls.boxes != boxes)
        assert live.controls.score_min == end


def test_h_shows_a_line_of_help(screen: Any, window: Window) -> None:
    in_full_screen(screen, window)
    window.show(np.full((480, 800, 3), 90, np.uint8), 0)
    pumped(window, lambda: bool((screen.shot() == 90).all()))  # the first note has gone
    screen.key("h")
    pumped(window, lambda: bool((screen.shot()[440:] > 200).any()))
    assert (screen.shot()[:380] == 90).all()
    screen.key("h")
    pumped(window, lambda: bool((screen.shot() == 90).all()))


def test_a_lost_source_is_told(screen: Any, window: Window, live: LiveView) -> None:
    in_full_screen(screen, window)
    window.show(np.full((480, 800, 3), 90, np.uint8), 0)
    pumped(window, lambda: bool((screen.shot() == 90).all()))
    live.set_figures({"source_state": "retrying: the cable"})
    pumped(window, lambda: bool((screen.shot()[440:] > 200).any()))
    live.set_figures({"source_state": "running"})
    pumped(window, lambda: bool((screen.shot() == 90).all()))


def test_text_fits_and_can_be_read() -> None:
    for size_wh in (SCREEN_WH, (320, 200), (60, 40)):
        sign = written(("saved " + "long-" * 60, "h: help"), size_wh)
        assert sign.shape[2] == 4
    small = written(("h",), SCREEN_WH)
    rows = np.flatnonzero((small[..., :3] > 128).any((1, 2)))
    assert rows[-1] - rows[0] >= 12  # pixels of 0.19 mm


def test_a_snapshot_is_the_picture(screen: Any, window: Window, tmp_path: Path) -> None:
    picture = two_halves()
    window.show(picture, 7)
    window.pump(0.1)
    screen.key("s")
    pumped(window, lambda: bool(list(tmp_path.glob("*.jpg"))))
    assert [path.suffix for path in tmp_path.iterdir()] == [".jpg"]
    saved = cv2.imread(str(next(tmp_path.iterdir()))).astype(int)
    assert np.abs(saved - picture).mean() < 3


def test_a_snapshot_that_cannot_be_written_ends_nothing(
    screen: Any, live: LiveView, tmp_path: Path
) -> None:
    window = Window(live, title="EdgeSight", folder=tmp_path / "nowhere")
    window.open()
    window.show(two_halves(), 0)
    window.pump(0.1)
    screen.key("s")
    pumped(window, lambda: "cannot write" in window._note)
    assert window.error is None
    window.close()


def test_only_a_window_that_can_be_seen_is_a_viewer(screen: Any, live: LiveView) -> None:
    window = Window(live, title="EdgeSight")
    assert (live.viewers, window.watching) == (0, False)
    window.open()
    window.pump(0.1)
    assert (live.viewers, window.watching) == (1, True)
    screen.ask("WM_CHANGE_STATE", 3)  # iconic: minimized
    pumped(window, lambda: (live.viewers, window.watching) == (0, False))
    screen.ask("_NET_ACTIVE_WINDOW", 1)
    pumped(window, lambda: (live.viewers, window.watching) == (1, True))
    window.close()
    window.close()
    assert (live.viewers, window.watching) == (0, False)


def test_showing_never_waits_and_the_newest_wins(screen: Any, window: Window) -> None:
    for i in range(1000):
        window.show(np.full((480, 640, 3), RED, np.uint8), i)
    window.show(two_halves(), 1000)
    pumped(window, lambda: shows(screen))
    assert window._sequence == 1000


def test_the_end_of_the_run_ends_the_waiting(window: Window, live: LiveView) -> None:
    live.close()
    assert window.pump(10_000)  # the test's own limit is far below


def test_a_second_window_after_the_first(screen: Any, live: LiveView) -> None:
    for _ in range(2):
        window = Window(live, title="EdgeSight")
        window.open()
        window.show(two_halves(), 0)
        pumped(window, lambda: shows(screen))
        window.close()


@pytest.mark.parametrize("driver", ["dummy", "offscreen"])
def test_a_driver_that_is_asked_for_is_taken(
    monkeypatch: pytest.MonkeyPatch, live: LiveView, driver: str
) -> None:
    monkeypatch.delenv("DISPLAY", raising=False)
    monkeypatch.setenv("SDL_VIDEODRIVER", driver)
    window = Window(live, title="EdgeSight")
    window.open()
    for i in range(3):
        window.show(two_halves(), i)
        assert window.pump(0.02)
    assert (window.error, live.viewers) == (None, 1)
    window.close()


@pytest.mark.parametrize(
    ("given", "says"),
    [
        # A card that no machine has: where there is a screen, it is left alone.
        (
            {"SDL_KMSDRM_DEVICE_INDEX": "99"},
            r"expected a screen, found .*/dev/dri.*DISPLAY=:0|.*kmsdrm.*",
        ),
        ({"DISPLAY": ":4711"}, r"expected a screen, found none for DISPLAY=:4711 .*kmsdrm"),
        ({"SDL_VIDEODRIVER": "nonsense"}, r"found none for SDL_VIDEODRIVER=nonsense"),
    ],
)
def test_without_a_screen_one_line_says_what_to_do(
    monkeypatch: pytest.MonkeyPatch, live: LiveView, given: dict[str, str], says: str
) -> None:
    for key in KEYS:
        monkeypatch.delenv(key, raising=False)
    for key, value in given.items():
        monkeypatch.setenv(key, value)
    window = Window(live, title="EdgeSight")
    with pytest.raises(OutputError, match=says) as caught:
        window.open()
    assert "\n" not in str(caught.value)
    assert str(caught.value).endswith("--display web")
    assert live.viewers == 0
    assert window.pump(0.0)
    window.close()


def test_without_a_desktop_the_screen_itself_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    for key in KEYS:
        monkeypatch.delenv(key, raising=False)
    assert drivers_here() == "kmsdrm"
    monkeypatch.setenv("WAYLAND_DISPLAY", "wayland-0")
    assert drivers_here() == "wayland"
    monkeypatch.setenv("DISPLAY", ":0")
    assert drivers_here() == "x11,wayland"


def test_without_sdl_the_extra_is_named(monkeypatch: pytest.MonkeyPatch, live: LiveView) -> None:
    monkeypatch.setitem(sys.modules, "sdl2", None)
    with pytest.raises(MissingExtraError, match=r"pysdl2.*\[window\]"):
        Window(live, title="EdgeSight").open()


def checked(*words: str) -> Any:
    with app.process(str(HERE / "inside" / "window_checks.py"), *words) as running:
        out, errors = running.communicate(timeout=kit.GUARD_S)
    assert running.returncode == 0, errors
    return json.loads(out)


def test_the_run_outlives_the_desktop(screen: Any) -> None:
    found = checked("desktop-ends", str(screen.server.pid))
    assert "desktop has ended" in found["error"]
    assert found["goes_on"]
    assert found["viewers"] == 0


def test_3000_pictures_take_no_memory(screen: Any) -> None:
    found = checked("memory")
    assert found["error"] is None
    assert found["grown_mb"] < 8
