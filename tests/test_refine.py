"""Training an INT8 graph in torch: it computes what ONNX Runtime computes, and gets better."""

from __future__ import annotations

import runpy
from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cv2
import numpy as np
import onnx
import pytest
import torch
from edgesight.compression import refine as module
from edgesight.compression.calibrate import chosen_photos, session
from edgesight.compression.lowbit import LowBitConfig, lower
from edgesight.compression.onnx_io import fold_preprocess, tidy
from edgesight.compression.quantize import QuantizeConfig, quantize
from edgesight.compression.refine import (
    RefineConfig,
    distance,
    output_distance,
    refine,
    stored,
)
from edgesight.compression.torch_graph import TorchGraph
from edgesight.models.detector import OnnxDetector
from edgesight.models.errors import ModelFileError
from edgesight.models.graph import copied, load_model
from edgesight.models.preprocess import prepare
from edgesight.models.spec import ModelSpec

graphs: Any = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("tiny_graphs.py"))))
SPEC, detector = graphs.SPEC, graphs.detector


def quiet(items: Iterable[Any], **_: Any) -> Iterable[Any]:
    return items


def outputs(model: Any, tensors: list[Any]) -> list[Any]:
    runner = session(model, optimise=False)
    feed = runner.get_inputs()[0].name
    each = [runner.run(None, {feed: tensor}) for tensor in tensors]
    return [np.concatenate(parts) for parts in zip(*each, strict=True)]


@pytest.mark.parametrize("activation", ["silu", "leaky"])
@pytest.mark.parametrize("folded", [False, True])
def test_torch_computes_what_onnx_runtime_computes(
    photos: list[Path], activation: str, folded: bool
) -> None:
    model, spec = tidy(detector(activation)), SPEC
    if folded:
        model, spec = fold_preprocess(model, spec)
    tensors = [prepare(cv2.imread(str(p)), spec)[0] for p in photos[:3]]
    config = QuantizeConfig(photos_max=6)
    small = quantize(model, spec, photos, config, progress=quiet).model
    for graph, limit in ((model, 1e-4), (small, 2e-2)):
        with torch.no_grad():
            found = TorchGraph(graph)(torch.from_numpy(np.concatenate(tensors)))
        for a, b in zip(outputs(graph, tensors), found, strict=True):
            assert np.abs(a - b.numpy()).mean() < limit * a.std()


def test_what_is_not_trained_is_written_back_as_it_was(photos: list[Path]) -> None:
    small = quantize(detector(), SPEC, photos, QuantizeConfig(photos_max=6), progress=quiet).model
    again = stored(TorchGraph(small), small)
    before = {t.name: onnx.numpy_helper.to_array(t) for t in small.graph.initializer}
    for tensor in again.graph.initializer:
        np.testing.assert_array_equal(onnx.numpy_helper.to_array(tensor), before[tensor.name])


def test_refining_brings_the_int8_model_nearer(photos: list[Path]) -> None:
    model = tidy(detector("leaky", uneven=0.7))
    small = quantize(model, SPEC, photos, QuantizeConfig(photos_max=8), progress=quiet).model
    config = RefineConfig(photos=640, batch=4, rate=2e-3)
    better = refine(small, model, SPEC, photos, config, progress=quiet)
    assert distance(better, model, SPEC, photos) < 0.9 * distance(small, model, SPEC, photos)
    codes = {t.name for t in small.graph.initializer}
    assert {t.name for t in better.graph.initializer} == codes
    assert refine(small, model, SPEC, photos, config, progress=quiet) == better


def test_quantize_refines_when_asked_and_says_what_it_brought(photos: list[Path]) -> None:
    config = QuantizeConfig(photos_max=8, refine=24)
    report = quantize(detector(), SPEC, photos, config, progress=quiet).report["refined"]
    assert report["photos"] == 24
    assert set(report) == {"photos", "distance before", "distance after", "kept"}


def test_what_made_it_worse_is_not_kept(
    photos: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def spoilt(quantized: Any, *_: Any, **__: Any) -> Any:
        worse = copied(quantized)
        for tensor in worse.graph.initializer:
            codes = onnx.numpy_helper.to_array(tensor)
            if codes.dtype == np.int8 and codes.ndim == 4:
                tensor.CopyFrom(onnx.numpy_helper.from_array(codes[::-1].copy(), tensor.name))
        return worse

    monkeypatch.setattr(module, "refine", spoilt)
    plain = quantize(detector(), SPEC, photos, QuantizeConfig(photos_max=8), progress=quiet)
    config = QuantizeConfig(photos_max=8, refine=8)
    tried = quantize(detector(), SPEC, photos, config, progress=quiet)
    assert not tried.report["refined"]["kept"]
    assert tried.model == plain.model
    assert tried.report["disagreement"]["final"] == plain.report["disagreement"]["final"]


def test_a_form_of_an_operator_that_training_does_not_know_is_a_note(photos: list[Path]) -> None:
    model = detector()
    conv = next(n for n in model.graph.node if n.op_type == "Conv")
    pads = next(a for a in conv.attribute if a.name == "pads")
    conv.attribute.remove(pads)
    conv.attribute.append(onnx.helper.make_attribute("auto_pad", "SAME_UPPER"))
    config = QuantizeConfig(photos_max=8, refine=8)
    found = quantize(model, SPEC, photos, config, progress=quiet)
    assert found.report["refined"]["photos"] == 0
    assert "not refined by training: expected the same outputs in torch" in found.notes[0]


@pytest.mark.parametrize("head", ["yolox", "nanodet_plus", "nanodet", "yolov8", "ssdlite"])
def test_distance_is_zero_for_equal_outputs_and_positive_else(head: str) -> None:
    rng = np.random.default_rng(0)
    width = {"yolox": 7, "nanodet_plus": 2 + 32}.get(head)
    shapes = {
        "nanodet": [(1, 16, 2), (1, 4, 32), (1, 16, 32), (1, 4, 2)],
        "yolov8": [(1, 6, 20)],
        "ssdlite": [(1, 20, 4), (1, 20, 4)],
    }.get(head, [(1, 20, width)])
    classes = ("a", "b", "c") if head == "ssdlite" else ("a", "b")
    spec = ModelSpec(head=head, input_hw=(32, 32), classes=classes)
    wanted = [torch.from_numpy(rng.uniform(0.1, 0.9, s).astype(np.float32)) for s in shapes]
    assert float(output_distance(spec, wanted, wanted)) == pytest.approx(0, abs=1e-6)
    for i in range(len(wanted)):
        other = [w + 0.2 * (k == i) * torch.rand(w.shape) for k, w in enumerate(wanted)]
        assert float(output_distance(spec, other, wanted)) > 1e-4


@pytest.mark.parametrize("softmax", [False, True])
def test_distance_of_classifiers_is_that_of_their_choices(softmax: bool) -> None:
    spec = ModelSpec(head="classify", input_hw=(32, 32), classes=("a", "b", "c"), strides=(32,))
    one, other = torch.tensor([[2.0, 0.0, -1.0]]), torch.tensor([[2.0, 1.0, -1.0]])
    if softmax:
        one, other = one.softmax(1), other.softmax(1)
    else:
        shifted = output_distance(spec, [one + 5], [one])
        assert float(shifted) == pytest.approx(0, abs=1e-6), "the same choice"
    assert float(output_distance(spec, [one], [one])) == 0
    assert float(output_distance(spec, [other], [one])) > 0.01


@pytest.mark.parametrize("how", [{"refine": 8}, {"bytes_max": 3000}])
def test_a_classifier_is_refined_and_made_smaller(photos: list[Path], how: dict[str, int]) -> None:
    build = graphs.GraphBuilder()
    x = build.add("Relu", [build.conv("images", (3, 8), 3, 2)])
    x = build.add("Relu", [build.conv(x, (8, 16), 3, 2)])
    x = build.conv(x, (16, 3), 1)
    x = build.add("GlobalAveragePool", [x])
    x = build.add("Reshape", [x, build.store("flat", np.array([-1, 3], np.int64))])
    model = build.model(x, [1, 3])
    spec = graphs.SPEC.with_changes(head="classify", classes=("a", "b", "c"))
    config = QuantizeConfig(photos_max=4, refine=how.get("refine", 0))
    result = quantize(model, spec, photos, config, progress=quiet)
    if "refine" in how:
        assert result.report["refined"]["photos"] == 8
        assert not result.notes
        return
    low = LowBitConfig(8, how["bytes_max"], 4)
    lowered = lower(result.model, model, spec, photos, low, progress=quiet)
    assert lowered.report


def test_an_unknown_operator_is_named() -> None:
    model = detector()
    model.graph.node[-1].op_type = "Erf"
    with pytest.raises(ModelFileError, match="found Erf"):
        TorchGraph(model)


@pytest.mark.shared
@pytest.mark.parametrize(
    "name", ["yolox_nano_416.onnx", "nanodet_plus_m_416.onnx", "nanodet_m_416.onnx"]
)
def test_real_detectors_compute_the_same_in_torch(shared: Path, name: str) -> None:
    path = shared / "weights" / name
    spec, model = OnnxDetector(path).spec, tidy(load_model(path))
    files = chosen_photos(list((shared / "data" / "unlabelled" / "images").iterdir()), 2, 0)
    tensors = [prepare(cv2.imread(str(file)), spec)[0] for file in files]
    with torch.no_grad():
        found = TorchGraph(model)(torch.from_numpy(np.concatenate(tensors)))
    for a, b in zip(outputs(model, tensors), found, strict=True):
        np.testing.assert_allclose(b.numpy(), a, atol=1e-3 * max(1.0, np.abs(a).max()))
