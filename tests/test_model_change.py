"""What goes with the old model when another one takes over, and what an upload may not do."""

from __future__ import annotations

import runpy
import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
from edgesight.device_app.accuracy import NoAccuracy
from edgesight.device_app.loop import Loop
from edgesight.device_app.model_choice import ModelChoice
from edgesight.device_app.model_store import FREE_MIN, ModelStore
from edgesight.device_app.sources import ListSource
from edgesight.models import memory
from edgesight.models.detector import OnnxDetector
from edgesight.models.errors import InputError, ModelFileError, OutputError
from edgesight.models.preprocess import Image
from edgesight.models.trial_run import trial_run
from onnx import helper

HERE = Path(__file__)
kit: Any = SimpleNamespace(**runpy.run_path(str(HERE.with_name("app_kit.py"))))
models: Any = SimpleNamespace(**runpy.run_path(str(HERE.with_name("models_kit.py"))))
loops: Any = SimpleNamespace(**runpy.run_path(str(HERE.with_name("loop_kit.py"))))
until, GUARD_S = loops.until, loops.GUARD_S
pytestmark = pytest.mark.usefixtures("no_thread_left")


class Judge(NoAccuracy):
    closed = 0

    def close(self, *args: Any, **options: Any) -> None:
        self.closed += 1
        super().close(*args, **options)


class Run:
    """A loop of grey pictures with a folder of models beside it."""

    def __init__(self, folder: Path, first: Path) -> None:
        self.judges: list[Judge] = []
        self.seen: list[Image] = []
        picture = np.full((64, 64, 3), 77, np.uint8)
        self.source = ListSource([picture], fps=50, live=True, paced=True, loop=True)
        self.loop = Loop(self.source, OnnxDetector(first), accuracy=self.judge(None), track=True)
        store = ModelStore(first, folder, uploads=True)
        self.choice = ModelChoice(self.loop, store, self._open, self.judge, score=0.35, trial_s=2.0)
        self.loop.start()

    def judge(self, _: Any) -> Judge:
        self.judges.append(Judge("a test"))
        return self.judges[-1]

    def _open(self, path: Path) -> OnnxDetector:
        run = self

        class Watched(OnnxDetector):
            def __call__(self, image: Image, *args: Any, **options: Any) -> Any:
                run.seen.append(image)
                return super().__call__(image, *args, **options)

        return Watched(path)

    def change_to(self, name: str) -> None:
        self.choice.choose(name)
        assert self.choice.wait(GUARD_S)
        assert self.choice.state()["error"] is None


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "models"
    path.mkdir()
    kit.build_tiny(path / "second.onnx", classes=("lamp", "night"))
    kit.build_tiny(path / "alike.onnx")
    return path


@pytest.fixture
def run(tmp_path: Path, folder: Path) -> Iterator[Run]:
    run = Run(folder, kit.build_tiny(tmp_path / "first.onnx"))
    yield run
    run.choice.close()
    run.loop.stop()
    run.source.close()
    run.loop.finish()


def test_the_old_models_accuracy_is_closed_and_the_new_ones_is_not(run: Run) -> None:
    run.change_to("alike.onnx")
    assert [judge.closed for judge in run.judges] == [1, 0]


def test_the_gate_looks_at_what_the_camera_shows_too(run: Run) -> None:
    until(lambda: run.loop.newest is not None)
    run.change_to("alike.onnx")
    assert any((image == 77).all() for image in run.seen), "the samples alone"


def test_a_filter_of_classes_that_are_gone_is_lifted(run: Run) -> None:
    run.loop.live.controls.classes = frozenset({"bright"})
    run.change_to("alike.onnx")
    assert run.loop.live.controls.classes == {"bright"}, "it knows the same classes"
    run.change_to("second.onnx")
    assert run.loop.live.controls.classes is None


def test_figures_begin_anew_with_another_model(run: Run) -> None:
    until(lambda: run.loop.stats.inference.n > 5)
    slow = run.loop.stats.times["inference"]
    for _ in range(500):
        slow.add(3.0)  # seconds: of a much larger model
    run.loop._health._usual = [3000.0]
    run.change_to("alike.onnx")
    until(lambda: "inference" in run.loop.stats.stages_ms())
    assert run.loop.stats.stages_ms()["inference"]["p50"] < 1000
    assert 3000.0 not in run.loop._health._usual


def test_a_file_put_in_the_place_of_the_running_one_is_not_the_running_one(
    run: Run, folder: Path
) -> None:
    def current() -> list[str]:
        return [m["name"] for m in run.choice.state()["models"] if m["current"]]

    assert current() == ["first.onnx"]
    run.change_to("alike.onnx")
    assert current() == ["alike.onnx"]
    kit.build_tiny(folder / "new.onnx", shift=1).replace(folder / "alike.onnx")
    assert current() == []
    run.change_to("alike.onnx")
    assert current() == ["alike.onnx"]


def test_an_upload_leaves_the_disk_some_room(
    run: Run, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(folder)
    with run.choice.receive("up.onnx") as upload:
        monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=FREE_MIN + 9))
        with pytest.raises(OutputError, match="a disk that is nearly full"):
            upload.write(b"x" * 10)
        upload.write(b"x" * 9)
    assert not (folder / "up.onnx").exists()


def test_an_upload_does_not_write_through_a_link(run: Run, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("keep")
    (folder / "up.onnx").symlink_to(tmp_path / "precious")
    (folder / "gone.onnx").symlink_to(tmp_path / "nothing")
    (folder / "dir.onnx").mkdir()
    for name in ("up.onnx", "gone.onnx", "dir.onnx"):
        with pytest.raises(InputError, match="expected a free name"):
            run.choice.receive(name)
    assert (tmp_path / "precious").read_text() == "keep"


def test_the_end_does_not_wait_for_an_upload_that_is_being_tried(run: Run, tmp_path: Path) -> None:
    data = models.endless(tmp_path / "endless.onnx").read_bytes()
    ended = threading.Event()

    def send() -> None:
        with run.choice.receive("up.onnx") as upload:
            upload.write(data)
            with pytest.raises(ModelFileError):
                upload.finish()
        ended.set()

    threading.Thread(target=send, name="edgesight-sender", daemon=True).start()
    time.sleep(0.5)
    run.choice.close()
    assert ended.wait(GUARD_S), "a trial may take two minutes"


def test_a_file_that_wants_too_much_memory_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # 7 GB, which most systems promise to anybody: the process's own limit is what refuses.
    model = onnx.load(kit.build_tiny(tmp_path / "huge.onnx"))
    size = np.array([1_800_000_000], np.int64)
    model.graph.initializer.append(onnx.numpy_helper.from_array(size, "size"))
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.float32(0), "nothing"))
    model.graph.node[0].output[0] = "mean_before"
    huge = [
        helper.make_node("ReduceMax", ["picture"], ["top"], keepdims=0),
        helper.make_node("Expand", ["top", "size"], ["large"]),
        helper.make_node("ReduceMean", ["large"], ["one"], keepdims=0),
        helper.make_node("Mul", ["one", "nothing"], ["none"]),
        helper.make_node("Add", ["mean_before", "none"], ["mean_0"]),
    ]
    nodes = [model.graph.node[0], *huge, *list(model.graph.node)[1:]]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    onnx.save(model, tmp_path / "huge.onnx")
    with pytest.raises(ModelFileError, match="Expand node"):
        trial_run(tmp_path / "huge.onnx", time_max_s=GUARD_S)


def test_networks_share_an_arena_where_the_runtime_can(monkeypatch: pytest.MonkeyPatch) -> None:
    import onnxruntime as ort

    assert memory.shared_arena()

    def none(*_: Any) -> None:
        message = "expected another runtime"
        raise AttributeError(message)

    monkeypatch.setattr(ort, "create_and_register_allocator", none)
    assert not memory.shared_arena.__wrapped__()
