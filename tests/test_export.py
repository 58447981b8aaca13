"""Torch networks as self-describing ONNX files, and back."""

from __future__ import annotations

import json
import runpy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from edgesight.compression import export as export_module
from edgesight.compression.cut import cut, removed_channels
from edgesight.compression.export import (
    TorchDetector,
    export_detector,
    export_onnx,
    get_metadata,
    largest_difference,
)
from edgesight.compression.groups import find_groups
from edgesight.compression.measure import parity
from edgesight.compression.onnx_io import fold_preprocess, tidy
from edgesight.compression.recipe import ModelSource
from edgesight.compression.source import enter
from edgesight.compression.state import NET_KEY, describe
from edgesight.models.detector import OnnxDetector
from edgesight.models.errors import ModelFileError
from edgesight.models.graph import load_model
from edgesight.models.nets.build import build_net
from edgesight.models.nets.common import DetectorNet, fold_batchnorm
from edgesight.models.spec import ModelSpec

make: Any = runpy.run_path(str(Path(__file__).with_name("tiny_net.py")))["make"]
SPEC = ModelSpec(
    "yolox", (64, 96), ("a", "b", "c"), "rgb", (10.0, 20.0, 30.0), (50.0, 60.0, 70.0), name="tiny"
)


@pytest.fixture
def net() -> DetectorNet:
    torch.manual_seed(1)
    tiny: DetectorNet = make()
    fold_batchnorm(tiny)
    return tiny.eval()


def pictures(count: int = 3) -> list[Any]:
    random = np.random.default_rng(0)
    return [random.integers(0, 256, (80, 100 + i, 3), dtype=np.uint8) for i in range(count)]


def test_the_file_sees_what_torch_sees(net: DetectorNet, tmp_path: Path) -> None:
    path = tmp_path / "tiny.onnx"
    spec = export_detector(net, SPEC, path, pictures(), describe("tiny", 3, []))
    detector = OnnxDetector(path)
    assert detector.spec == spec == SPEC.with_changes(input_format="uint8_nhwc")
    stored = json.loads(get_metadata(load_model(path), NET_KEY) or "")
    assert stored["net"] == "tiny"
    assert sorted(stored["convs"]) == [
        "down.0.conv", "down.1.conv", "down.2.conv", "predict.0", "predict.1", "predict.2",
        "stem.conv",
    ]  # fmt: skip
    torch_side = TorchDetector(net, SPEC)
    ours = [torch_side(picture) for picture in pictures()]
    theirs = [detector(picture, 0.001) for picture in pictures()]
    assert sum(map(len, ours)) > 10, "no boxes: the comparison would say little"
    assert parity(ours, theirs).same
    swapped = TorchDetector(net, SPEC.with_changes(color="bgr"))
    assert not parity([swapped(picture) for picture in pictures()], theirs).same


@pytest.mark.parametrize("traced", [True, False])
def test_both_exporters_of_torch(net: DetectorNet, traced: bool, tmp_path: Path) -> None:
    model, _ = fold_preprocess(tidy(export_onnx(net, SPEC, traced=traced)), SPEC)
    assert largest_difference(net, model, SPEC, pictures()) < 1e-4
    text = model.SerializeToString()
    assert str(Path.cwd()).encode() not in text
    assert b"site-packages" not in text
    assert len(text) < 2 * 4 * sum(p.numel() for p in net.parameters())


def test_a_file_that_computes_something_else_is_not_written(
    net: DetectorNet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(model: Any, spec: ModelSpec) -> Any:
        return fold_preprocess(model, spec.with_changes(color="bgr"))

    monkeypatch.setattr(export_module, "fold_preprocess", wrong)
    with pytest.raises(ModelFileError, match="found a difference"):
        export_detector(net, SPEC, tmp_path / "tiny.onnx", pictures())
    assert not list(tmp_path.iterdir())


def test_a_pruned_network_comes_in_again_from_its_own_file(tmp_path: Path) -> None:
    torch.manual_seed(0)
    dense = build_net("yolox_nano", 3).eval()
    fold_batchnorm(dense)
    spec = ModelSpec("yolox", (64, 64), ("a", "b", "c"), name="small")
    channels = find_groups(dense, torch.zeros(1, 3, 64, 64))
    chosen = list(range(0, len(channels.groups), 9))
    small = cut(dense, channels, chosen)
    assert isinstance(small, DetectorNet)
    edits = [{"kind": "cut", "removed": removed_channels(channels, chosen)}]
    path = tmp_path / "small.onnx"
    export_detector(small, spec, path, pictures(1), describe("yolox_nano", 3, edits))
    entered = enter(ModelSource(file=path))
    assert entered.spec == spec
    assert list(entered.edits) == edits
    x = torch.rand(1, 3, 64, 64) * 255
    with torch.no_grad():
        for ours, theirs in zip(small(x), entered.net(x), strict=True):
            torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
    newer = describe("yolox_nano", 3, [{"kind": "fold time"}])
    export_detector(small, spec, path, pictures(1), newer)
    with pytest.raises(ModelFileError, match="newer edgesight"):
        enter(ModelSource(file=path))


def test_a_quantized_file_does_not_come_in(tmp_path: Path, net: DetectorNet) -> None:
    path = tmp_path / "tiny.onnx"
    export_detector(net, SPEC, path, pictures(1))
    model = load_model(path)
    import onnx

    node = onnx.helper.make_node("DequantizeLinear", ["zero", "scale"], ["unused"])
    model.graph.node.append(node)
    for name, value in (("zero", np.int8(0)), ("scale", np.float32(1))):
        model.graph.initializer.append(onnx.numpy_helper.from_array(np.asarray(value), name))
    onnx.save(model, path)
    with pytest.raises(ModelFileError, match="expected a float model"):
        enter(ModelSource(file=path))
