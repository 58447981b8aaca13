"""Another model while the run goes on: tried elsewhere, compared, swapped, taken back."""

from __future__ import annotations

import os
import runpy
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
from edgesight.device_app.accuracy import NoAccuracy
from edgesight.device_app.loop import Loop
from edgesight.device_app.model_choice import Busy, ModelChoice
from edgesight.device_app.model_store import BYTES_MAX, ModelStore
from edgesight.device_app.sinks import MemorySink
from edgesight.device_app.sources import ListSource
from edgesight.models.dataset import load_image
from edgesight.models.detector import OnnxDetector
from edgesight.models.errors import InputError, ModelFileError
from edgesight.models.zoo import model_path
from onnx import helper

kit: Any = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("app_kit.py"))))
models: Any = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("models_kit.py"))))
loops: Any = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("loop_kit.py"))))
endless = models.endless
until, GUARD_S = loops.until, loops.GUARD_S
pytestmark = pytest.mark.usefixtures("no_thread_left")
GREY = [np.full((64, 64, 3), 230, np.uint8)]


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


class Choosing:
    """A run with a folder of models."""

    def __init__(self, folder: Path, first: Path, images: Any = GREY, **options: Any) -> None:
        self.sink = MemorySink()
        self.source = ListSource(images, fps=50, live=True, paced=True, loop=True)
        self.loop = Loop(self.source, OnnxDetector(first), sinks=[self.sink], track=True)
        self.store = ModelStore(first, folder, uploads=True)
        self.opened: list[OnnxDetector] = []
        self.choice = ModelChoice(
            self.loop, self.store, self._open, lambda _: NoAccuracy("a test"), score=0.35, **options
        )
        self.loop.start()
        until(lambda: len(self.sink.items) > 2)

    def _open(self, path: Path) -> OnnxDetector:
        self.opened.append(OnnxDetector(path))
        return self.opened[-1]

    def changes_to(self, name: str) -> dict[str, Any]:
        self.choice.choose(name)
        assert self.choice.wait(GUARD_S)
        n = len(self.sink.items)
        until(lambda: len(self.sink.items) > n + 2)  # whatever came of it, the run goes on
        return self.choice.state()

    def end(self) -> None:
        self.choice.close()
        self.choice.wait(GUARD_S)
        self.loop.stop()
        self.source.close()
        self.loop.finish()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "models"
    path.mkdir()
    return path


@pytest.fixture
def run(tmp_path: Path, folder: Path) -> Iterator[Choosing]:
    choosing = Choosing(folder, kit.build_tiny(tmp_path / "first.onnx"), trial_s=3.0)
    yield choosing
    choosing.end()


def test_file_dropped_into_the_folder_can_be_chosen(run: Choosing, folder: Path) -> None:
    assert [m["name"] for m in run.choice.state()["models"]] == ["first.onnx"]
    kit.build_tiny(folder / "second.onnx", shift=4)
    (folder / "readme.txt").write_text("no model")
    (folder / ".hidden.onnx").write_text("no model")
    (folder / "link.onnx").symlink_to(run.loop.detector.path)
    listed = run.choice.state()["models"]
    assert [m["name"] for m in listed] == ["first.onnx", "second.onnx"]
    assert listed[1]["bytes"] == (folder / "second.onnx").stat().st_size
    state = run.changes_to("second.onnx")
    assert (state["current"], state["error"], state["busy"]) == ("second.onnx", None, None)
    assert run.loop.figures()["model"] == "second"
    event = run.loop.live.events.after()[-1]
    assert (event.kind, event.data) == ("model", {"name": "second.onnx", "before": "first.onnx"})
    assert run.changes_to("first.onnx")["current"] == "first.onnx"


def test_another_architecture_and_size_takes_over(tmp_path: Path, folder: Path) -> None:
    # The shipped detector (NanoDet-Plus, 384x288) beside one of 32x32 that shares no class.
    kit.build_tiny(folder / "tiny.onnx")
    photo = load_image(Path(__file__).parents[1] / "device_app" / "samples" / "astronaut.jpg")
    run = Choosing(folder, model_path("shipped"), [photo], trial_s=3.0)
    try:
        assert run.changes_to("tiny.onnx")["current"] == "tiny.onnx"
        assert "shares no class" in run.loop.live.events.after()[-1].text
        assert set(run.sink.items[-1].classes) == {"bright", "dark"}
        state = run.changes_to(model_path("shipped").name)
        assert state["error"] is None
        until(lambda: run.loop.figures()["detections"].get("person") == 1)
    finally:
        run.end()


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "expected an ONNX model"),
        (b"no model" * 1000, "expected an ONNX model"),
        ("half", "expected an ONNX model"),
    ],
)
def test_damaged_file_is_refused_and_the_run_goes_on(
    run: Choosing, folder: Path, content: Any, says: str
) -> None:
    whole = kit.build_tiny(folder / "bad.onnx").read_bytes()
    (folder / "bad.onnx").write_bytes(whole[: len(whole) // 2] if content == "half" else content)
    state = run.changes_to("bad.onnx")
    assert state["current"] == "first.onnx"
    assert state["error"].startswith("bad.onnx: ")
    assert says in state["error"]
    assert run.opened == [], "it was tried in a process of its own"
    assert run.loop.live.events.after()[-1].data == {"name": "first.onnx", "refused": "bad.onnx"}


def test_model_that_sees_something_else_is_refused(tmp_path: Path, folder: Path) -> None:
    # The same network, every box moved away by half a picture: as wrong pre-processing does.
    kit.build_tiny(folder / "moved.onnx", shift=12, always=True)
    kit.build_tiny(folder / "same.onnx", always=True)
    run = Choosing(folder, kit.build_tiny(tmp_path / "first.onnx", always=True), trial_s=3.0)
    try:
        state = run.changes_to("moved.onnx")
        assert state["current"] == "first.onnx"
        assert "expected to see what the running model sees" in state["error"]
        assert run.changes_to("same.onnx")["current"] == "same.onnx"
    finally:
        run.end()


def test_gate_of_zero_takes_every_model_that_runs(tmp_path: Path, folder: Path) -> None:
    kit.build_tiny(folder / "moved.onnx", shift=12, always=True)
    first = kit.build_tiny(tmp_path / "first.onnx", always=True)
    run = Choosing(folder, first, trial_s=3.0, gate_percent=0)
    try:
        assert run.changes_to("moved.onnx")["current"] == "moved.onnx"
    finally:
        run.end()


def test_model_that_fails_while_it_runs_is_taken_back(run: Choosing, folder: Path) -> None:
    kit.build_tiny(folder / "second.onnx")

    def opened(path: Path) -> OnnxDetector:
        detector = OnnxDetector(path)
        good = detector.infer
        calls: list[int] = []

        def infer(tensor: Any) -> Any:
            calls.append(1)
            if len(calls) > 12:  # what the gate looks at, and a few frames more
                message = "the engine lost its device"
                raise RuntimeError(message)
            return good(tensor)

        detector.infer = infer  # type: ignore[method-assign]
        return detector

    run.choice._open = opened
    state = run.changes_to("second.onnx")
    assert state["current"] == "first.onnx"
    assert "rolled back, it failed while it ran: the engine lost its device" in state["error"]
    assert run.loop.figures()["model"] == "first"


def test_one_model_at_a_time_and_only_those_of_the_list(run: Choosing, folder: Path) -> None:
    kit.build_tiny(folder / "second.onnx")
    for name in ("../first.onnx", "/etc/passwd", "", "third.onnx", "second.onnx\0"):
        with pytest.raises(InputError, match="expected a model of the list"):
            run.choice.choose(name)
    run.choice.choose("second.onnx")
    with pytest.raises(Busy, match=r"second\.onnx is on its way"):
        run.choice.choose("first.onnx")
    assert run.choice.wait(GUARD_S)


def test_upload_gets_its_name_when_it_is_whole_and_runs(run: Choosing, folder: Path) -> None:
    data = kit.build_tiny(folder.parent / "up.onnx").read_bytes()
    with run.choice.receive("up.onnx") as upload:
        upload.write(data[:100])
        upload.write(data[100:])
        assert "up.onnx" not in names(folder)
        upload.finish()
    assert names(folder) == ["up.onnx"]
    assert (folder / "up.onnx").read_bytes() == data
    with run.choice.receive("cut.onnx") as upload:
        upload.write(data[: len(data) // 2])
        with pytest.raises(ModelFileError, match=r"^cut\.onnx: expected an ONNX model"):
            upload.finish()
    with run.choice.receive("up.onnx") as upload:  # broken off: the one before stays
        upload.write(data[:100])
    assert names(folder) == ["up.onnx"]
    assert (folder / "up.onnx").read_bytes() == data
    assert run.changes_to("up.onnx")["current"] == "up.onnx"


@pytest.mark.parametrize(
    "name",
    [
        "../up.onnx",
        "/tmp/up.onnx",
        "up.txt",
        ".onnx",
        "a/b.onnx",
        "up.onnx\0",
        "",
        "x" * 90 + ".onnx",
    ],
)
def test_upload_of_another_name_is_refused(run: Choosing, folder: Path, name: str) -> None:
    with pytest.raises(InputError, match="expected a name of letters"):
        run.choice.receive(name)
    assert names(folder) == []


def test_upload_that_is_too_large_leaves_nothing(
    run: Choosing, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("edgesight.device_app.model_store.BYTES_MAX", 1000)
    with run.choice.receive("big.onnx") as upload:
        upload.write(b"x" * 1000)
        with pytest.raises(InputError, match="expected a model of at most"):
            upload.write(b"x")
    assert names(folder) == []
    assert BYTES_MAX >= 64 << 20


def test_uploads_are_refused_where_there_are_none(tmp_path: Path, folder: Path) -> None:
    first = kit.build_tiny(tmp_path / "first.onnx")
    for store in (ModelStore(first, None, True), ModelStore(first, folder, False)):
        assert not store.uploads
        with pytest.raises(InputError, match="--models FOLDER and a token"):
            store.receive("a.onnx", lambda _: None)
    with pytest.raises(InputError, match="--models: expected a folder"):
        ModelStore(first, tmp_path / "none", True)
    (folder / "first.onnx").hardlink_to(first)
    with pytest.raises(InputError, match="the run's own"):
        ModelStore(first, folder, True).receive("first.onnx", lambda _: None)


@pytest.mark.parametrize("gate_percent", [0.0, 30.0])
def test_model_that_hangs_on_what_the_camera_shows_is_ended_and_taken_back(
    tmp_path: Path, folder: Path, gate_percent: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Neither black, white nor noise shows it: it hangs on the grey of this camera.
    endless(folder / "hangs.onnx", on_grey_alone=True)
    monkeypatch.setattr("edgesight.device_app.model_choice.HANGS_S", 1.0)
    monkeypatch.setattr("edgesight.device_app.model_choice.GATE_S", 3.0)
    first = kit.build_tiny(tmp_path / "first.onnx")
    run = Choosing(folder, first, trial_s=3.0, gate_percent=gate_percent)
    try:
        state = run.changes_to("hangs.onnx")
        assert state["current"] == "first.onnx"
        assert "hangs.onnx: " in state["error"]
        assert run.loop.figures()["model"] == "first"
    finally:
        run.end()


def test_other_model_leaves_no_memory_behind(tmp_path: Path, folder: Path) -> None:
    # One that needs 300 MB while it runs, beside one that needs nothing.
    model = onnx.load(kit.build_tiny(folder / "large.onnx"))
    size = np.array([75_000_000], np.int64)
    model.graph.initializer.append(onnx.numpy_helper.from_array(size, "size"))
    large = [
        helper.make_node("ReduceMax", ["picture"], ["top"], keepdims=0),
        helper.make_node("Expand", ["top", "size"], ["large"]),
        helper.make_node("Add", ["large", "large"], ["larger"]),
        helper.make_node("ReduceMean", ["larger"], ["one"], keepdims=0),
        helper.make_node("Mul", ["one", "nothing"], ["none"]),
        helper.make_node("Add", ["mean_before", "none"], ["mean_0"]),
    ]
    model.graph.initializer.append(
        onnx.numpy_helper.from_array(np.zeros((), np.float32), "nothing")
    )
    model.graph.node[0].output[0] = "mean_before"
    nodes = [model.graph.node[0], *large, *list(model.graph.node)[1:]]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    onnx.save(model, folder / "large.onnx")
    run = Choosing(folder, kit.build_tiny(tmp_path / "first.onnx"), trial_s=3.0)
    try:
        before = resident_mb()
        assert run.changes_to("large.onnx")["error"] is None
        until(lambda: resident_mb() > before + 200)
        assert run.changes_to("first.onnx")["error"] is None
        until(lambda: resident_mb() < before + 60)
    finally:
        run.end()


def resident_mb() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6
