"""INT8 of a real detector on real photos; the published figures come from ``edgesight eval``."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from edgesight.compression import quantize as module
from edgesight.compression.calibrate import chosen_photos
from edgesight.compression.equalise import label_channels, rescale, silu_gates
from edgesight.compression.fidelity import Fidelity
from edgesight.compression.onnx_io import fold_preprocess, save_model, tidy
from edgesight.compression.quantize import QuantizeConfig, quantize
from edgesight.models.dataset import load_image
from edgesight.models.detector import OnnxDetector
from edgesight.models.graph import integer_share, load_model, node_macs, parameters

pytestmark = pytest.mark.shared
FILES = ("yolox_nano_416.onnx", "nanodet_plus_m_416.onnx")


def quiet(items: Iterable[Any], **_: Any) -> Iterable[Any]:
    return items


def photos(shared: Path, count: int, seed: int) -> list[Path]:
    return chosen_photos(list((shared / "data" / "unlabelled" / "images").iterdir()), count, seed)


@pytest.mark.parametrize("name", FILES)
def test_equalising_a_real_net_changes_nothing(shared: Path, name: str) -> None:
    path = shared / "weights" / name
    model, spec = tidy(load_model(path)), OnnxDetector(path).spec
    labels = label_channels(model, silu_gates(model))
    factor = np.exp(np.random.default_rng(0).normal(0, 1, labels.count)).astype(np.float32)
    factor[0] = 1
    assert labels.count > 5000
    assert Fidelity(model, photos(shared, 2, 0), spec).loss(rescale(model, labels, factor)) < 1e-3


@pytest.mark.parametrize("name", FILES)
def test_folded_preprocessing_sees_the_same(shared: Path, name: str, tmp_path: Path) -> None:
    path = shared / "weights" / name
    before = OnnxDetector(path)
    model, spec = fold_preprocess(tidy(load_model(path)), before.spec)
    save_model(model, tmp_path / "folded.onnx", spec)
    after = OnnxDetector(tmp_path / "folded.onnx")
    image = load_image(photos(shared, 1, 1)[0])
    a, b = before(image), after(image)
    np.testing.assert_allclose(b.xyxy, a.xyxy, atol=0.01)
    np.testing.assert_allclose(b.score, a.score, atol=1e-4)


def test_known_sizes(shared: Path) -> None:
    model = load_model(shared / "weights" / "yolox_nano_416.onnx")
    assert parameters(model) == pytest.approx(0.9e6, rel=0.02)
    assert sum(node_macs(model).values()) == pytest.approx(0.53e9, rel=0.03)


def test_nanodet_plus_stays_itself_in_int8(
    shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "STRENGTHS", (0.75,))
    monkeypatch.setattr(module, "FIRST_COUNTS", (1,))
    monkeypatch.setattr(module, "NOISIEST_COUNTS", ())  # the whole search takes minutes
    path = shared / "weights" / "nanodet_plus_m_416.onnx"
    spec = OnnxDetector(path).spec
    config = QuantizeConfig(target="x86-64", photos_max=16)
    result = quantize(load_model(path), spec, photos(shared, 16, 2), config, progress=quiet)
    save_model(result.model, tmp_path / "int8.onnx", spec)
    OnnxDetector(tmp_path / "int8.onnx", optimized_path=tmp_path / "optimised.onnx")
    assert integer_share(result.model, tmp_path / "optimised.onnx").share >= 0.9
    assert (tmp_path / "int8.onnx").stat().st_size <= 0.35 * path.stat().st_size
    losses = result.report["disagreement"]
    assert losses["final"] < 0.45
    assert losses["final"] < losses["not equalised"]
