"""The whole road on a real detector, with a budget of seconds."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from edgesight.compression.pipeline import run_recipe
from edgesight.compression.recipe import make_recipe
from edgesight.models.detector import OnnxDetector

pytestmark = pytest.mark.shared


def test_nanodet_plus_from_weights_to_int8(shared: Path, tmp_path: Path) -> None:
    photos = tmp_path / "photos"
    photos.mkdir()
    for path in sorted((shared / "data/coco-train/images").glob("*.jpg"))[:800:100]:
        shutil.copy(path, photos)
    values = {
        "version": 1,
        "out": "out",
        "model": {
            "name": "nanodet_plus_m",
            "weights": str(shared / "weights/nanodet_plus_m_416.onnx"),
        },
        "data": {"photos": "photos", "input_hw": [320, 320]},
        "steps": [
            {"kind": "prune", "macs_ratio": 0.55, "photos": 8, "iterations": 1},
            {"kind": "distill", "photos": 16, "batch": 4, "labels": "none"},
            {"kind": "quantize", "photos": 8, "refine": 8},
            {"kind": "verify", "resamples": 30, "latency_rounds": 4},
        ],
    }
    recipe = make_recipe(values, tmp_path)
    result = run_recipe(recipe, progress=False, say=print)
    original, prune, distill, quantize, _ = result.rows
    assert original.macs == pytest.approx(762e6, rel=0.02)
    assert prune.macs <= 0.55 * original.macs
    assert quantize.bytes < 0.35 * original.bytes
    assert result.verified is not None
    assert result.verified["passed"], result.verified["parity"]
    assert result.verified["parity"]["torch and float file"]["boxes"] > 10
    for row in (prune, distill, quantize):
        assert row.score is not None
        print(row.title, row.score["value"])
        assert row.score["value"] > 20, f"{row.title}: hardly sees what the original sees"
    assert OnnxDetector(result.final).spec.resize == "stretch"
