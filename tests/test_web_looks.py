"""How the live page looks, from a phone to a television, in a real Chromium."""

from __future__ import annotations

import runpy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from edgesight.device_app.web.server import start_server
from playwright.sync_api import expect

pages: Any = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("page_kit.py"))))
chromium, kit, until = pages.chromium, pages.kit, pages.until
browser, feed, open_page, serve = pages.browser, pages.feed, pages.open_page, pages.serve
TOKEN, LINK = pages.TOKEN, pages.LINK
pytestmark = chromium.pytestmark


def test_what_a_run_has_not_is_not_shown(feed: Any, serve: Any, open_page: Any) -> None:
    feed.show(60)
    page = open_page(serve())
    expect(page.locator("#inference-fps")).to_have_text("15.5")
    for part in ("#record", "#rec", "#model-card", "#recordings-card", "#zones-card"):
        expect(page.locator(part)).to_be_hidden()


def test_zones_events_and_warnings_are_shown_as_text(feed: Any, serve: Any, open_page: Any) -> None:
    evil = "<img src=x onerror=alert(1)>"
    feed.show(
        60, zones={evil: {"cat": 2, "dog": 0}, "desk": {}}, warnings=[evil], mqtt="retrying: no"
    )
    feed.live.events.add("enter", f"cat 4 entered {evil}")
    page = open_page(serve())
    expect(page.locator("#zones li")).to_have_text([f"{evil}2 \u00d7 cat", "deskempty"])
    expect(page.locator("#warnings li")).to_have_text([evil, "MQTT: retrying: no"])
    expect(page.locator("#events li span")).to_have_text([f"cat 4 entered {evil}"])
    feed.live.events.add("leave", "cat 4 left")
    expect(page.locator("#events li span")).to_have_text(["cat 4 left", f"cat 4 entered {evil}"])
    assert page.locator("img").count() == 0


def test_plots_show_the_time_before_the_viewer_came(feed: Any, serve: Any, open_page: Any) -> None:
    feed.show(60, board={"temperature_c": 61.0})
    server = serve()
    kit.until(lambda: kit.ask(server, "GET", "/api/history").json["latest"] >= 3)
    page = open_page(server)
    plot = page.locator("#plot-fps svg")
    expect(plot).to_have_attribute(
        "aria-label", "speed in FPS: now 15.5, lowest 15.5, highest 15.5"
    )
    drawn = page.locator("#plot-fps .line").get_attribute("d") or ""
    assert drawn.count("L") >= 2
    expect(page.locator("#plot-temperature svg")).to_have_attribute("aria-label", "temperature in °C: now 61.0, lowest 61.0, highest 61.0")  # fmt: skip  # noqa: E501
    page.locator("#plot-fps").hover()
    expect(page.locator("#plot-fps .value")).to_contain_text("15.5 FPS")


def test_light_and_dark_follow_the_system_until_one_is_chosen(
    feed: Any, serve: Any, open_page: Any
) -> None:
    feed.show(60)
    ground = "getComputedStyle(document.body).backgroundColor"
    page = open_page(serve(), color_scheme="dark")
    button = page.locator("#theme")
    expect(button).to_have_attribute("aria-pressed", "true")
    dark = page.evaluate(ground)
    button.click()
    expect(button).to_have_attribute("aria-pressed", "false")
    light = page.evaluate(ground)
    assert light != dark
    page.reload()
    assert page.evaluate(ground) == light, "what was chosen is remembered"
    page.locator("#theme").click()
    assert page.evaluate(ground) == dark
    page.emulate_media(color_scheme="light")
    assert page.evaluate(ground) == light, "and then it follows the system again"


def test_television_fills_the_screen_with_big_figures(
    feed: Any, serve: Any, open_page: Any
) -> None:
    feed.show(60)
    page = open_page(serve(), viewport={"width": 1920, "height": 1080})
    page.get_by_role("button", name="Full screen with big figures").click()
    box = page.locator("#picture").bounding_box()
    assert box is not None
    assert (box["width"], box["height"]) == (1920, 1080)
    expect(page.locator("#big")).to_contain_text("15.5FPS")
    size = page.evaluate("parseFloat(getComputedStyle(document.querySelector('#big b')).fontSize)")
    assert size > 60
    page.get_by_role("button", name="Full screen with big figures").click()
    expect(page.locator("#big")).to_be_hidden()
    assert not page.evaluate("document.fullscreenElement")


@pytest.mark.parametrize("size", [(360, 740), (800, 480), (1920, 1080), (3840, 2160)])
def test_a_full_page_scrolls_sideways_nowhere(
    feed: Any, serve: Any, open_page: Any, tmp_path: Path, size: tuple[int, int]
) -> None:
    long = "a_name_that_has_no_place_to_break_" * 4
    feed.show(
        60, model=long, source=long, zones={long: {long: 1}}, warnings=[long], classes=[long],
        detections={long: 3}, **{k: v for k, v in kit.figures().items() if k == "board"},
    )  # fmt: skip
    feed.live.events.add("enter", long)
    (tmp_path / "m").mkdir()
    (tmp_path / "r").mkdir()
    recorder = kit.FakeRecorder(tmp_path / "r", feed.live)
    recorder.start()
    recorder.stop()
    server = serve(recorder=recorder, models=kit.FakeModels(tmp_path / "m"))
    page = open_page(server, viewport={"width": size[0], "height": size[1]})
    expect(page.locator("#recordings li")).to_have_count(1)
    expect(page.locator("#models li")).to_have_count(3)
    assert page.evaluate("document.documentElement.scrollWidth") <= size[0]
    for path in ("api",):
        page.goto(server.url + path)
        assert page.evaluate("document.documentElement.scrollWidth") <= size[0]


def test_a_new_token_is_told_and_the_new_link_helps(feed: Any, serve: Any, open_page: Any) -> None:
    feed.show(60)
    open_page.expected = ("401", "ERR_", "Failed to load")
    first = serve(token=TOKEN)
    page = open_page(first, LINK)
    chromium.until_shade(page, feed, 60)
    first.stop()
    second = start_server(feed.live, "127.0.0.1", kit.port_of(first), token=TOKEN[::-1])
    try:
        expect(page.locator("#state")).to_have_text("new link needed", timeout=20_000)
        expect(page.locator("#veil")).to_contain_text("new link")
        other = page.context.new_page()
        other.goto(f"{second.url}?token={TOKEN[::-1]}")
        page.bring_to_front()
        chromium.until_shade(page, feed, 190)
        expect(page.locator("#state")).to_have_text("live", timeout=20_000)
    finally:
        second.stop()


def test_everything_has_a_name_and_is_reached_by_keyboard(
    feed: Any, serve: Any, open_page: Any, tmp_path: Path
) -> None:
    feed.show(60, classes=["cat", "dog"])
    page = open_page(serve(models=kit.FakeModels(tmp_path), token=TOKEN), LINK)
    expect(page.locator("#models li")).to_have_count(3)
    nameless = page.evaluate(
        "[...document.querySelectorAll('button, a, input')].filter(e => !e.hidden && !("
        "e.getAttribute('aria-label') || e.textContent.trim() || (e.labels && e.labels.length)"
        ")).map(e => e.outerHTML)"
    )
    assert nameless == []
    reached = set()
    for _ in range(40):
        page.keyboard.press("Tab")
        reached.add(page.evaluate("document.activeElement.id || document.activeElement.tagName"))
    assert {
        "theme",
        "tv",
        "boxes",
        "figures",
        "score",
        "snapshot",
        "classes-all",
        "upload",
    } <= reached
