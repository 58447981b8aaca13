"""Engines: those that are there are offered, believed after a real run, measured and remembered."""

from __future__ import annotations

import json
import runpy
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from edgesight.__main__ import main
from edgesight.models import engines
from edgesight.models.dataset import open_dataset
from edgesight.models.detector import OnnxDetector
from edgesight.models.engine_choice import Candidate, choose, fastest, measure, thread_counts
from edgesight.models.errors import InputError, ModelFileError

build_tiny: Any = runpy.run_path(str(Path(__file__).with_name("app_kit.py")))["build_tiny"]
SAMPLES = Path(__file__).parents[1] / "device_app/samples"


@pytest.fixture
def images() -> list[Any]:
    return [photo.load() for photo in open_dataset(SAMPLES).limit(2).photos]


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    path: Path = build_tiny(tmp_path / "tiny.onnx")
    return path


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGESIGHT_CACHE", str(tmp_path / "cache"))


def with_engine(monkeypatch: pytest.MonkeyPatch, open_it: Any) -> None:
    """Puts an engine into the table under the name of one that is installed."""
    monkeypatch.setattr(engines, "ENGINES", {**engines.ENGINES, "openvino": open_it})


def test_what_is_not_installed_is_not_offered(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines.ort, "get_available_providers", lambda: ["CPUExecutionProvider"])
    assert engines.offered() == ["onnxruntime", "openvino"]
    with pytest.raises(InputError, match="installed here: onnxruntime, openvino"):
        OnnxDetector(tiny, engine="cuda")
    with pytest.raises(InputError, match="expected one of onnxruntime, cuda, tensorrt, openvino"):
        OnnxDetector(tiny, engine="tpu")
    monkeypatch.setattr(engines, "has_openvino", lambda: False)
    assert engines.offered() == ["onnxruntime"]
    with pytest.raises(InputError, match=r"pip install '\.\[openvino\]'"):
        OnnxDetector(tiny, engine="openvino")


def test_another_engine_finds_the_same_boxes(tiny: Path, images: list[Any]) -> None:
    plain, other = OnnxDetector(tiny), OnnxDetector(tiny, engine="openvino")
    assert (plain.engine, other.engine, other.engine_note) == ("onnxruntime", "openvino", None)
    for image in images:
        np.testing.assert_allclose(other(image).xyxy, plain(image).xyxy, atol=1e-2)


class Odd:
    """A network that gives other outputs than the file says."""

    def infer(self, tensor: npt.NDArray[Any]) -> list[Any]:
        return [np.zeros((1, 2), np.float32)]


def test_one_that_does_not_run_the_file_is_left_with_a_reason(
    tiny: Path, images: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuses(path: Path, threads: int) -> Any:
        message = f"{path}: expected a kernel for Conv, found none; export it again"
        raise ModelFileError(message)

    wanted = OnnxDetector(tiny)(images[0]).xyxy
    with_engine(monkeypatch, refuses)
    found = OnnxDetector(tiny, engine="openvino")
    assert found.engine == "onnxruntime"
    assert found.engine_note is not None
    assert "found none" in found.engine_note
    np.testing.assert_array_equal(found(images[0]).xyxy, wanted)
    with_engine(monkeypatch, lambda path, threads: Odd())
    note = OnnxDetector(tiny, engine="openvino").engine_note
    assert note is not None
    assert "other shapes" in note
    rows = measure(tiny, images, [1], rounds=2)
    assert [row.engine for row in rows if row.note] == ["openvino"]
    assert fastest(rows).engine == "onnxruntime"


class Dying:
    """A GPU without kernels: it loads, and fails when it is asked to compute."""

    def __init__(self, runs: int) -> None:
        self.runs = runs

    def infer(self, tensor: npt.NDArray[Any]) -> list[Any]:
        self.runs -= 1
        if self.runs < 0:
            message = "no kernel image is available"
            raise ModelFileError(message)
        return [np.zeros((1, 8, 6), np.float32)]


def test_one_that_fails_when_it_computes_ends_nothing(
    tiny: Path, images: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = OnnxDetector(tiny)
    raw = plain.infer(plain.preprocess(images[0])[0])
    with_engine(monkeypatch, lambda path, threads: Dying(0))
    assert OnnxDetector(tiny, engine="openvino").engine == "onnxruntime"
    for runs in (1, 2, 4):  # on the empty picture, on a real one, while it is timed
        dying = Dying(runs)
        monkeypatch.setattr(
            dying, "infer", lambda tensor, own=dying: (Dying.infer(own, tensor), raw)[1]
        )
        with_engine(monkeypatch, lambda path, threads, own=dying: own)
        rows = measure(tiny, images, [1], rounds=4)
        assert [row.engine for row in rows if row.note] == ["openvino"]
        assert fastest(rows).engine == "onnxruntime"


def test_onnx_runtimes_own_errors_are_ours(tiny: Path) -> None:
    net = engines.OrtNet(tiny)
    with pytest.raises(ModelFileError, match=r"tiny\.onnx: expected a model that runs"):
        net.infer(np.zeros((1, 1), np.float32))


def test_a_model_that_is_missing_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for path in (tmp_path / "none.onnx", tmp_path):
        assert main(["run", "--engine", "auto", "--model", str(path), "--display", "none"]) == 2
        assert "expected an ONNX model, found no such file" in capsys.readouterr().err


def test_all_that_are_there_are_measured(tiny: Path, images: list[Any]) -> None:
    rows = measure(tiny, images, [1, 2], rounds=3)
    assert {(r.engine, r.threads) for r in rows} == {
        (name, threads) for name in ("onnxruntime", "openvino") for threads in (1, 2)
    }
    assert [r.p50_ms for r in rows] == sorted(r.p50_ms for r in rows)
    assert all(r.p90_ms >= r.p50_ms > 0 for r in rows)
    assert all(r.same == 100 for r in rows if r.engine == "openvino")


def test_the_fastest_has_to_see_the_same() -> None:
    slow, blind = Candidate("onnxruntime", 1, 9.0, 9.9), Candidate("openvino", 1, 3.0, 3.3, 60.0)
    assert fastest([blind, slow]) is slow
    seeing = Candidate("openvino", 2, 4.0, 4.4, 99.0)
    assert fastest([blind, slow, seeing]) is seeing


@pytest.mark.parametrize(
    ("most", "counts"), [(1, [1]), (2, [1, 2]), (3, [1, 2, 3]), (6, [1, 2, 4, 6])]
)
def test_threads_worth_trying(most: int, counts: list[int]) -> None:
    assert thread_counts(most) == counts


def test_a_choice_is_remembered_for_each_model(
    tiny: Path, tmp_path: Path, images: list[Any]
) -> None:
    first, remembered = choose(tiny, images, 1)
    assert not remembered
    assert choose(tiny, images, 1) == (first, True)
    assert not choose(build_tiny(tmp_path / "other.onnx", work=3), images, 1)[1]
    assert len(list((tmp_path / "cache/engines").glob("*.json"))) == 2


@pytest.mark.parametrize(
    "text", ["", "[]", '{"version": 1}', '{"version": 9, "model": ""}', '{"version": 1, "x": 2}']
)
def test_a_broken_memory_is_none(tiny: Path, tmp_path: Path, images: list[Any], text: str) -> None:
    choose(tiny, images, 1)
    (stored,) = (tmp_path / "cache/engines").glob("*.json")
    stored.write_text(text)
    assert not choose(tiny, images, 1)[1]
    assert choose(tiny, images, 1)[1]


def test_an_engine_that_is_gone_is_not_remembered(
    tiny: Path, tmp_path: Path, images: list[Any]
) -> None:
    choose(tiny, images, 1)
    (stored,) = (tmp_path / "cache/engines").glob("*.json")
    stored.write_text(json.dumps({**json.loads(stored.read_text()), "engine": "cuda"}))
    best, remembered = choose(tiny, images, 1)
    assert not remembered
    assert best.engine != "cuda"


def test_a_memory_that_cannot_be_written_stops_nothing(
    tiny: Path, tmp_path: Path, images: list[Any]
) -> None:
    (tmp_path / "cache").write_text("a file where the folder should be")
    assert choose(tiny, images, 1)[0].threads == 1


def test_bench_says_what_is_installed_and_which_auto_takes(
    tiny: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", str(tiny), "--engines", "--frames", "30", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert {row["engine"] for row in found["rows"]} == {"onnxruntime", "openvino"}
    assert sum(row["best"] for row in found["rows"]) == 1
    assert found["machine"]["versions"]["onnxruntime"]
    assert main(["bench", str(tiny), "--engines", "--frames", "30"]) == 0
    out = capsys.readouterr().out
    assert out.count("<- auto") == 1


def test_run_takes_the_fastest_and_remembers_it(
    tiny: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = [
        "run",
        "--model",
        str(tiny),
        "--display",
        "none",
        "--frames",
        "3",
        "--reference",
        "none",
    ]
    assert main([*line, "--engine", "auto"]) == 0
    assert "(measured)" in capsys.readouterr().out
    assert main([*line, "--engine", "auto"]) == 0
    assert "(remembered)" in capsys.readouterr().out
    assert main([*line, "--engine", "openvino", "--json"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["engine"] == "openvino"
    assert main([*line, "--engine", "npu"]) == 2
    assert "expected one of onnxruntime" in capsys.readouterr().err
