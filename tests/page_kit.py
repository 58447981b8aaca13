"""What the tests of the page in a browser share: fixtures too; loaded with runpy."""

from __future__ import annotations

import runpy
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from edgesight.device_app.web.server import Server, start_server
from playwright.sync_api import Browser, Page


def load(name: str) -> Any:
    return SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name(name))))


chromium, kit = load("test_web_browser.py"), load("web_kit.py")
browser = chromium.browser
TOKEN = "correct-horse-battery-staple"
LINK = f"?token={TOKEN}"


@pytest.fixture
def feed() -> Any:
    return chromium.Feed()


class Open:
    """Opens pages, and notes what no page may do: errors, and requests to other hosts."""

    def __init__(self, browser: Browser) -> None:
        self._browser = browser
        self.problems: list[str] = []
        self.expected: tuple[str, ...] = ()

    def __call__(self, server: Server, path: str = "", **options: Any) -> Page:
        tab = self._browser.new_context(**options).new_page()
        tab.on("console", lambda m: self.problems.append(m.text) if m.type == "error" else None)
        tab.on("pageerror", lambda e: self.problems.append(str(e)))
        tab.on(
            "request",
            lambda r: None if r.url.startswith((server.url, "data:")) else self._note(r.url),
        )
        tab.goto(server.url + path)
        return tab

    def _note(self, url: str) -> None:
        self.problems.append(f"a request to {url}")


@pytest.fixture
def open_page(browser: Browser) -> Iterator[Open]:
    opening = Open(browser)
    yield opening
    for context in browser.contexts:
        context.close()
    bad = [p for p in opening.problems if not any(part in p for part in opening.expected)]
    assert bad == []


@pytest.fixture
def serve(feed: Any) -> Iterator[Callable[..., Server]]:
    servers: list[Server] = []

    def start(live: Any = feed.live, **parts: Any) -> Server:
        servers.append(start_server(live, "127.0.0.1", 0, **parts))
        return servers[-1]

    yield start
    feed.live.close()
    for server in servers:
        server.stop()


def until(page: Page, condition: Callable[[], Any], what: str) -> None:
    for _ in range(kit.GUARD_S * 10):
        if condition():
            return
        page.wait_for_timeout(100)
    pytest.fail(what)
