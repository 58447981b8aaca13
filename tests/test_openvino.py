"""The same file in OpenVINO: it sees the same, and its time stands beside ONNX Runtime's."""

from __future__ import annotations

import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from edgesight.compression import latency as latency_file
from edgesight.compression.latency import openvino_latency
from edgesight.compression.report import headline
from edgesight.compression.verify import Subject, verify
from edgesight.models.dataset import Dataset, open_dataset
from edgesight.models.detector import OnnxDetector
from edgesight.models.errors import MissingExtraError, ModelFileError
from edgesight.models.openvino_net import OpenVinoNet, has_openvino

build_tiny: Any = runpy.run_path(str(Path(__file__).with_name("app_kit.py")))["build_tiny"]
SAMPLES = Path(__file__).parents[1] / "device_app/samples"
SHIPPED = Path(__file__).parents[1] / "models/zoo/edgesight_nano.onnx"


@pytest.fixture
def photos() -> Dataset:
    return open_dataset(SAMPLES).limit(2)


def test_it_computes_what_onnx_runtime_computes(tmp_path: Path, photos: Dataset) -> None:
    path = build_tiny(tmp_path / "a.onnx")
    detector, net = OnnxDetector(path), OpenVinoNet(path)
    for photo in photos.photos:
        tensor, _ = detector.preprocess(photo.load())
        ours, theirs = detector.infer(tensor), net.infer(tensor)
        assert [o.shape for o in ours] == [t.shape for t in theirs]
        for a, b in zip(ours, theirs, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


def test_the_shipped_integers_find_the_same_boxes(photos: Dataset) -> None:
    detector, net = OnnxDetector(SHIPPED), OpenVinoNet(SHIPPED)
    for photo in photos.photos:
        tensor, place = detector.preprocess(photo.load())
        ours = detector.postprocess(detector.infer(tensor), place, 0.4)
        theirs = detector.postprocess(net.infer(tensor), place, 0.3)
        assert len(ours) > 0
        for box, label in zip(ours.xyxy, ours.label, strict=True):
            same = theirs.xyxy[theirs.label == label]
            assert np.abs(same - box).max(axis=1).min() < 0.05 * np.ptp(box)


def test_a_report_has_both_columns(tmp_path: Path, photos: Dataset) -> None:
    fast, slow = build_tiny(tmp_path / "a.onnx"), build_tiny(tmp_path / "b.onnx", work=40)
    found = verify(
        Subject(fast, slow), photos, "held out", resamples=20, latency_rounds=9, progress=False
    )
    assert found["openvino"]["failed"] is None
    assert found["openvino"]["ratio"] > 1.5
    step = {"bytes": 1, "macs": 1}
    titles = [row[0] for row in headline({"steps": [step, step], "verify": found})]
    assert titles.index("the same in OpenVINO") == titles.index("one picture on this machine") + 1


def test_a_file_that_it_cannot_run_is_told_and_stops_nothing(
    tmp_path: Path, photos: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = build_tiny(tmp_path / "a.onnx")
    broken = tmp_path / "broken.onnx"
    broken.write_bytes(path.read_bytes()[:200])
    with pytest.raises(ModelFileError, match=r"broken\.onnx: expected a model that OpenVINO"):
        OpenVinoNet(broken)
    with pytest.raises(ModelFileError, match="no such file"):
        OpenVinoNet(tmp_path / "none.onnx")
    detector = OnnxDetector(path)
    detector.path = broken
    found = openvino_latency(detector, detector, photos, 3)
    assert found is not None
    assert "\n" not in found["failed"]
    assert openvino_latency(detector, detector, photos, 0) is None
    monkeypatch.setattr(latency_file, "has_openvino", lambda: False)
    assert openvino_latency(detector, detector, photos, 3) is None


def test_without_it_the_way_to_get_it_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = build_tiny(tmp_path / "a.onnx")
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(MissingExtraError, match=r"pip install '\.\[openvino\]'"):
        OpenVinoNet(path)


def test_asking_for_it_does_not_load_it() -> None:
    code = (
        "import sys; from edgesight.models.openvino_net import has_openvino; "
        "assert has_openvino(); assert 'openvino' not in sys.modules"
    )
    assert has_openvino()
    subprocess.run([sys.executable, "-c", code], check=True)
