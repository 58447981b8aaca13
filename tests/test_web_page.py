"""What viewers can do on the live page, in a real Chromium: filter, record, choose a model."""

from __future__ import annotations

import runpy
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from edgesight.device_app.loop import Loop
from edgesight.device_app.recording import Recorder
from edgesight.device_app.sources import ListSource
from edgesight.models.detector import OnnxDetector
from playwright.sync_api import expect

pages: Any = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("page_kit.py"))))
chromium, kit, until = pages.chromium, pages.kit, pages.until
browser, feed, open_page, serve = pages.browser, pages.feed, pages.open_page, pages.serve
TOKEN, LINK = pages.TOKEN, pages.LINK
pytestmark = chromium.pytestmark
app = pages.load("app_kit.py")
COLOURS = "([x, y, w, h]) => { const d = document.getElementById('live').getContext('2d')" \
    ".getImageData(x, y, w, h).data; let n = 0; for (let i = 0; i < d.length; i += 4)" \
    " n += Math.abs(d[i] - d[i + 1]) + Math.abs(d[i + 1] - d[i + 2]) > 60; return n; }"  # fmt: skip


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Loop]:
    """A real loop on grey pictures: ``bright`` at 0.6 above left, ``dark`` at 0.4 below right."""
    images = [np.full((192, 192, 3), 153, np.uint8)]
    source = ListSource(images, fps=20, live=True, paced=True, loop=True)
    loop = Loop(source, OnnxDetector(app.build_tiny(tmp_path / "tiny.onnx")), display=True)
    loop.live.controls.plain = True
    loop.start()
    yield loop
    loop.stop()
    source.close()
    loop.finish()


BRIGHT, DARK = [0, 0, 60, 60], [120, 120, 72, 72]


def test_slider_and_class_chips_change_what_is_drawn(run: Loop, serve: Any, open_page: Any) -> None:
    run.live.set_figures({**run.figures(), "classes": ["bright", "dark"]})
    page = open_page(serve(run.live))

    def boxes() -> tuple[bool, bool]:
        return page.evaluate(COLOURS, BRIGHT) > 20, page.evaluate(COLOURS, DARK) > 20

    def wait(wanted: tuple[bool, bool], what: str) -> None:
        def seen() -> bool:
            run.live.set_figures({**run.figures(), "classes": ["bright", "dark"]})
            return boxes() == wanted

        until(page, seen, f"{what}: {boxes()}")

    wait((True, True), "both boxes are drawn")
    page.fill("#score", "0.5")
    wait((True, False), "only bright is above 0.5")
    page.fill("#score", "0.35")
    wait((True, True), "both are back")
    chip = page.get_by_role("button", name="bright", exact=True)
    expect(chip).to_have_attribute("aria-pressed", "true")
    chip.click()
    wait((False, True), "bright is hidden")
    expect(chip).to_have_attribute("aria-pressed", "false")
    assert run.live.controls.classes == frozenset({"dark"})
    chip.press("Enter")  # by keyboard, too
    wait((True, True), "bright is back")
    assert run.live.controls.classes is None, "all is not a list of all: the model may change"
    page.click("#classes-none")
    wait((False, False), "no class")
    expect(page.locator("#classes-says")).to_contain_text("no boxes are drawn")
    page.click("#classes-all")
    wait((True, True), "all classes")


def test_many_classes_are_searched_and_those_seen_come_first(
    feed: Any, serve: Any, open_page: Any
) -> None:
    names = [f"kind {i:02}" for i in range(79)] + ["zebra"]
    feed.show(60, classes=names, detections={"kind 33": 1})
    page = open_page(serve())
    expect(page.locator("#classes button")).to_have_text(["kind 33"])
    page.fill("#classes-search", "zeb")
    expect(page.locator("#classes button")).to_have_text(["zebra"])
    page.click("#classes button")
    until(page, lambda: feed.live.controls.classes is not None, "nothing was filtered")
    assert feed.live.controls.classes == frozenset(names[:-1])
    page.fill("#classes-search", "")
    expect(page.locator("#classes button")).to_have_text(["kind 33", "zebra"])
    page.fill("#classes-search", "kind 7")
    expect(page.locator("#classes button")).to_have_count(9)


def test_two_viewers_see_the_same_controls(feed: Any, serve: Any, open_page: Any) -> None:
    feed.show(60, classes=["cat", "dog"])
    server = serve()
    first, second = open_page(server), open_page(server)
    first.get_by_text("Figures on picture").click()
    expect(second.locator("#figures")).not_to_be_checked()
    assert feed.live.controls.plain
    first.fill("#score", "0.8")
    expect(second.locator("#score-value")).to_have_text("0.80")


def test_record_button_begins_and_ends_a_real_recording(
    feed: Any, serve: Any, open_page: Any, tmp_path: Path
) -> None:
    feed.show(60)
    recorder = Recorder(feed.live, tmp_path / "recordings")
    try:
        page = open_page(serve(recorder=recorder))
        chromium.until_shade(page, feed, 60)
        button = page.locator("#record")
        expect(button).to_have_text("Record")
        button.click()
        expect(button).to_contain_text("Stop")
        expect(button).to_have_attribute("aria-pressed", "true")
        expect(page.locator("#rec")).to_be_visible()
        assert recorder.state()["on"]
        chromium.until_shade(page, feed, 150)
        button.click()
        expect(button).to_have_text("Record")
        link = page.locator("#recordings a")
        expect(link).to_have_count(1)
        with page.expect_download() as waiting:
            link.click()
        waiting.value.save_as(tmp_path / "got")
        assert (tmp_path / "got").stat().st_size == recorder.list()[0]["bytes"]
        delete = page.locator("#recordings button")
        delete.click()
        expect(delete).to_have_text("Sure?")
        assert len(recorder.list()) == 1
        delete.click()
        expect(page.locator("#recordings")).to_have_text("nothing yet")
        assert not recorder.list()
    finally:
        recorder.close()


def test_a_recording_that_cannot_begin_says_why(
    feed: Any, serve: Any, open_page: Any, tmp_path: Path
) -> None:
    feed.show(60)
    recorder = kit.FakeRecorder(tmp_path, feed.live)
    recorder.full = True
    open_page.expected = ("507",)
    page = open_page(serve(recorder=recorder))
    page.click("#record")
    expect(page.locator("#controls-says")).to_have_text("cannot write: disk full; free space")
    expect(page.locator("#record")).to_have_text("Record")


def test_a_model_is_sent_by_file_field_or_drop_and_chosen(
    feed: Any, serve: Any, open_page: Any, tmp_path: Path
) -> None:
    feed.show(60)
    models = kit.FakeModels(tmp_path)
    open_page.expected = ("status of 400",)
    page = open_page(serve(models=models, token=TOKEN), LINK)
    expect(page.locator("#models li")).to_have_count(3)
    page.set_input_files(
        "#upload", {"name": "bad.onnx", "mimeType": "", "buffer": b"no model at all"}
    )
    expect(page.locator("#upload-says")).to_contain_text("expected an ONNX model, found something")
    assert models.names() == ["blind.onnx", "first.onnx", "second.onnx"]
    page.set_input_files("#upload", {"name": "big.onnx", "mimeType": "", "buffer": b"x" * 100_001})
    expect(page.locator("#upload-says")).to_contain_text("expected a model of at most 100 kB")
    page.set_input_files("#upload", {"name": "good.onnx", "mimeType": "", "buffer": kit.GOOD * 99})
    expect(page.locator("#upload-says")).to_have_text("good.onnx is here; choose it above")
    expect(page.locator("#models li")).to_have_count(4)
    transfer = page.evaluate_handle(
        "text => { const t = new DataTransfer(); t.items.add(new File([text], 'dropped.onnx'));"
        " return t; }",
        kit.GOOD.decode(),
    )
    page.dispatch_event("#drop", "drop", {"dataTransfer": transfer})
    expect(page.locator("#upload-says")).to_have_text("dropped.onnx is here; choose it above")
    page.get_by_role("button", name="Use: good.onnx").click()
    expect(page.locator("#models-says")).to_have_text("good.onnx: comparing…")
    expect(page.get_by_role("button", name="Use: second.onnx")).to_be_disabled()
    models.go.set()
    expect(page.get_by_role("button", name="Running: good.onnx")).to_be_visible(timeout=20_000)
    page.get_by_role("button", name="Use: blind.onnx").click()
    says = page.locator("#models-says")
    expect(says).to_contain_text("expected to see what the running model sees", timeout=20_000)
    expect(page.get_by_role("button", name="Running: good.onnx")).to_be_visible()


def test_without_a_token_the_page_says_how_to_send_models(
    feed: Any, serve: Any, open_page: Any, tmp_path: Path
) -> None:
    feed.show(60)
    page = open_page(serve(models=kit.FakeModels(tmp_path)))
    expect(page.locator("#upload-says")).to_contain_text("--token-file")
    expect(page.locator("#drop")).to_be_hidden()
