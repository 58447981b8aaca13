"""``edgesight bench``: its figures are of what it says."""

from __future__ import annotations

import json
import runpy
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cv2
import numpy as np
import pytest
from edgesight.__main__ import main
from edgesight.device_app.bench import benchmark
from edgesight.device_app.sources import ListSource, Picture
from edgesight.models.detector import OnnxDetector

kit: Any = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("app_kit.py"))))


@pytest.fixture
def tiny(tmp_path: Path) -> str:
    return str(kit.build_tiny(tmp_path / "tiny.onnx", work=2))


def test_json_object(tiny: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", tiny, "--frames", "120", "--json"]) == 0
    out = capsys.readouterr().out
    assert out.count("\n") == 1
    found = json.loads(out)
    assert found["frames"] == 120
    assert found["blocks"] == 2
    assert set(found["stages"]) == {"capture", "preprocess", "inference", "postprocess"}
    for stage in found["stages"].values():
        assert stage["n"] == 120
        assert stage["p50"] <= stage["p90"] <= stage["p99"]
    assert found["pipeline_fps"] > 0
    assert found["bare_fps"] > 0
    low, high = found["ratio_range"]
    assert low <= found["ratio"] <= high
    assert found["picture_wh"] == [640, 480]
    assert found["threads"] == 1
    assert found["machine"]


def test_table_and_a_short_source_is_repeated(
    tiny: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for i in range(3):
        cv2.imwrite(str(tmp_path / f"{i}.png"), np.full((48, 64, 3), 100, np.uint8))
    assert main(["bench", tiny, "--source", str(tmp_path), "--frames", "20"]) == 0
    out = capsys.readouterr().out
    assert "(64x48 px), 20 frames, 1 thread(s)" in out
    assert "ratio" in out


def test_ratio_is_of_pipeline_to_bare_network(tiny: str) -> None:
    class Slow(ListSource):
        def _next(self) -> Picture | None:
            time.sleep(0.02)
            return super()._next()

    detector = OnnxDetector(tiny)
    found = benchmark(detector, Slow([np.zeros((48, 64, 3), np.uint8)], loop=True), 20)
    assert found["pipeline_fps"] < 50, "the source gives no more than 50 per second"
    assert found["bare_fps"] > found["pipeline_fps"]
    assert found["ratio"] < 1
    assert found["stages"]["capture"]["p50"] >= 19


def test_wrong_input_is_exit_code_2(
    tiny: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", str(tmp_path / "no.onnx")]) == 2
    assert "expected an ONNX model" in capsys.readouterr().err
    assert main(["bench", tiny, "--source", str(tmp_path / "no.mp4")]) == 2
    assert "found no such file" in capsys.readouterr().err


def test_live_source_is_refused(
    tiny: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from edgesight.device_app import open_source as opener

    camera = ListSource([np.zeros((4, 4, 3), np.uint8)], live=True)
    monkeypatch.setattr(opener, "open_source", lambda *args, **options: camera)
    assert main(["bench", tiny, "--source", "0"]) == 2
    assert "expected a file or a folder, found a live source" in capsys.readouterr().err
    assert camera.read() is None, "the camera must be given back"
