"""The live page in a real Chromium, on a real run of the app."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator
from typing import Any

import cv2
import numpy as np
import pytest
from edgesight.device_app.live import LiveView
from edgesight.device_app.web.server import Server, start_server
from playwright.sync_api import Browser, Page, expect, sync_playwright

FLAGS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
]  # fmt: skip
BINARY = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), ""
)
pytestmark = pytest.mark.skipif(
    not BINARY and not os.environ.get("CI"), reason="no Chromium installed"
)
SHADE = "() => { const c = document.createElement('canvas'); c.width = c.height = 1;" \
    " const g = c.getContext('2d'); g.drawImage(document.getElementById('live'), 0, 0, 1, 1);" \
    " return g.getImageData(0, 0, 1, 1).data[0]; }"  # fmt: skip


class Feed:
    """A live view whose picture and figures the test sets."""

    def __init__(self) -> None:
        self.live = LiveView()
        self.sequence = 0

    def show(self, shade: int, **figures: Any) -> None:
        self.sequence += 1
        image = np.full((120, 160, 3), shade, np.uint8)
        self.live.publish(cv2.imencode(".jpg", image)[1].tobytes(), self.sequence)
        stages = {"inference": {"p50": 20.0, "p90": 22.0, "p99": 30.0}}
        accuracy = {
            "kind": "agreement", "text": "agreement with big", "f1": 80.0, "f1_low": 70.0,
            "f1_high": 90.0, "frames": 12,
        }  # fmt: skip
        self.live.set_figures({
            "model": "tiny", "source": "samples", "source_state": "running",
            "frames": self.sequence, "dropped": 4, "capture_fps": 30.0, "inference_fps": 15.5,
            "display_fps": 14.5, "stages_ms": stages, "accuracy": accuracy,
            "detections": {"cat": 2, "person": 1}, **figures,
        })  # type: ignore[typeddict-item]  # fmt: skip


@pytest.fixture
def feed() -> Feed:
    return Feed()


@pytest.fixture
def site(feed: Feed) -> Iterator[Server]:
    running = start_server(feed.live, "127.0.0.1", 0)
    yield running
    feed.live.close()
    running.stop()


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=BINARY, args=FLAGS)
        yield chromium
        chromium.close()


@pytest.fixture
def page(browser: Browser, site: Server, feed: Feed) -> Iterator[Page]:
    feed.show(60)
    tab = browser.new_page()
    problems: list[str] = []
    tab.on("console", lambda m: problems.append(m.text) if m.type == "error" else None)
    tab.on("pageerror", lambda e: problems.append(str(e)))
    tab.on(
        "request",
        lambda r: None if r.url.startswith((site.url, "data:")) else problems.append(r.url),
    )
    tab.goto(site.url)
    yield tab
    tab.close()
    assert problems == []


def until_shade(page: Page, feed: Feed, shade: int, **figures: Any) -> None:
    for _ in range(50):
        feed.show(shade, **figures)
        page.wait_for_timeout(100)
        if abs(page.evaluate(SHADE) - shade) < 8:
            return
    pytest.fail(f"the picture never showed shade {shade}")


def test_picture_moves_and_figures_are_shown(page: Page, feed: Feed) -> None:
    until_shade(page, feed, 60)
    until_shade(page, feed, 200)
    expect(page.locator("#inference-fps")).to_have_text("15.5")
    assert page.text_content("#capture-fps") == "30.0"
    assert page.text_content("#display-fps") == "14.5"
    assert page.text_content("#accuracy-value") == "80.0"
    assert "reference" in (page.text_content("#accuracy-kind") or "")
    assert page.text_content("#dropped") == "4"
    assert "2 \u00d7 cat" in (page.text_content("#counts") or "")
    assert "20.0 · 30.0" in (page.text_content("#stages") or "")
    expect(page.locator("#state")).to_have_text("live")


def test_the_board_is_shown_where_it_tells(page: Page, feed: Feed) -> None:
    until_shade(page, feed, 60)
    expect(page.locator("#board-card")).to_be_hidden()
    board = {"cpu_percent": 71.6, "temperature_c": 84.6, "clock_mhz": 1500.0, "memory_mb": 133.0}
    says = "1.4 times slower, the board throttles: throttled at 85 C"
    late = {"p50": 41.2, "p90": 60.0, "p99": 77.0}
    until_shade(page, feed, 120, board={**board, "says": says}, latency_ms=late)
    expect(page.locator("#board-says")).to_have_text(says)
    text = page.inner_text("#board")
    for part in ("72 %", "85 °C", "1500 MHz", "133 MB"):
        assert part in text
    assert page.text_content("#latency") == "41"
    assert page.text_content("#latency-p99") == "77"


def test_slider_and_switch_reach_the_loop(page: Page, feed: Feed) -> None:
    page.fill("#score", "0.7")
    page.click("label.switch")
    for _ in range(50):
        page.wait_for_timeout(100)
        if feed.live.controls.score_min == 0.7 and not feed.live.controls.boxes:
            return
    pytest.fail(f"the controls are still {feed.live.controls}")


def test_a_lost_source_is_told(page: Page, feed: Feed) -> None:
    until_shade(page, feed, 90, source_state="retrying: no answer")
    expect(page.locator("#state")).to_contain_text("no answer")


def test_snapshot_downloads_a_picture(page: Page, feed: Feed, tmp_path: Any) -> None:
    until_shade(page, feed, 120)
    with page.expect_download() as download:
        page.click("#snapshot")
    download.value.save_as(tmp_path / "snap.jpg")
    assert abs(int(cv2.imread(str(tmp_path / "snap.jpg"))[5, 5, 0]) - 120) < 8


def test_a_server_that_ended_is_told(browser: Browser, feed: Feed) -> None:
    server = start_server(feed.live, "127.0.0.1", 0)
    feed.show(50)
    tab = browser.new_page()
    tab.goto(server.url)
    feed.live.close()
    server.stop()
    expect(tab.locator("#state")).to_have_text("not connected")
    tab.close()


def test_a_picture_is_shown_at_once_and_not_when_the_next_one_comes(page: Page, feed: Feed) -> None:
    until_shade(page, feed, 60)
    feed.show(200)
    until = time.monotonic() + 3
    while abs(page.evaluate(SHADE) - 200) >= 8:
        assert time.monotonic() < until, "the newest picture is not shown"
        page.wait_for_timeout(50)


def test_pictures_that_stop_are_told_and_come_back(page: Page, feed: Feed) -> None:
    until_shade(page, feed, 60)
    expect(page.locator("#state")).to_have_text("live")
    for frames in range(1000, 1150):  # the detector goes on, only its pictures do not come
        feed.live.set_figures({**feed.live.figures(), "frames": frames})
        page.wait_for_timeout(100)
        if page.text_content("#state") == "no new pictures":
            break
    assert page.text_content("#state") == "no new pictures"
    with page.expect_request("**/stream", timeout=15_000):
        pass  # it asks for the pictures anew
    expect(page.locator("#veil")).to_contain_text("reconnecting")
    until_shade(page, feed, 180)
    expect(page.locator("#state")).to_have_text("live")


def test_a_server_that_comes_back_is_found(browser: Browser, feed: Feed) -> None:
    first = start_server(feed.live, "127.0.0.1", 0)
    feed.show(50)
    tab = browser.new_page()
    tab.goto(first.url)
    until_shade(tab, feed, 50)
    first.stop()
    expect(tab.locator("#state")).to_have_text("not connected")
    second = start_server(feed.live, "127.0.0.1", int(first.url.split(":")[2].strip("/")))
    until_shade(tab, feed, 220)
    expect(tab.locator("#state")).to_have_text("live")
    tab.close()
    second.stop()


@pytest.mark.parametrize("width_px", [360, 390, 820, 1280, 1920])
def test_no_size_of_screen_scrolls_sideways(page: Page, width_px: int) -> None:
    page.set_viewport_size({"width": width_px, "height": 800})
    assert page.evaluate("document.documentElement.scrollWidth") <= width_px
