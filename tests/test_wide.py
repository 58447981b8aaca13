"""16-bit activations in place of float: the file holds no float weights, and computes the same."""

from __future__ import annotations

import runpy
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cv2
import numpy as np
import onnx
import pytest
import torch
from edgesight.compression import wide as wide_file
from edgesight.compression.calibrate import observe, session
from edgesight.compression.fidelity import Fidelity
from edgesight.compression.int8_search import Origin
from edgesight.compression.onnx_io import save_model, tidy
from edgesight.compression.predict import predicted_convs
from edgesight.compression.qdq import plan_layout
from edgesight.compression.quantize import QuantizeConfig
from edgesight.compression.recipe import make_recipe
from edgesight.compression.sensitivity import Budget, first_nodes
from edgesight.compression.torch_graph import TorchGraph
from edgesight.compression.wide import widen
from edgesight.models.detector import OnnxDetector
from edgesight.models.errors import RecipeError
from edgesight.models.graph import node_macs
from edgesight.models.preprocess import prepare
from onnx import TensorProto

graphs: Any = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("tiny_graphs.py"))))
SPEC = graphs.SPEC
kit: Any = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("qdq_kit.py"))))


def quiet(items: Iterable[Any], **_: Any) -> Iterable[Any]:
    return items


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    found: list[Path] = kit.noise_photos(tmp_path_factory.mktemp("photos"), 6)
    return found


def stored_bytes(model: Any, kind: int) -> int:
    return sum(len(t.raw_data) for t in model.graph.initializer if t.data_type == kind)


def outputs(model: Any, photos: list[Path]) -> Any:
    runner = session(model)
    name = runner.get_inputs()[0].name
    images = (prepare(cv2.imread(str(p)), SPEC)[0] for p in photos)
    return np.concatenate([runner.run(None, {name: image})[0] for image in images])


@pytest.mark.parametrize("activation", ["leaky", "silu"])
def test_wide_grids_lose_next_to_nothing(photos: list[Path], activation: str) -> None:
    model = tidy(graphs.detector(activation))
    layout = plan_layout(model)
    seen = observe(model, list(layout.tensors), photos, SPEC, progress=quiet)
    convs = [n.name for n in model.graph.node if n.op_type == "Conv"]
    chosen = frozenset(n.name for n in model.graph.node if n.name in layout.nodes) - {convs[-1]}
    variant = replace(Origin(model, seen, {}, layout.group).variant(0.0), float_nodes=chosen)
    (narrow,) = variant.inserted(True)
    wide, count = widen(narrow, variant)
    assert count > 5
    floats, small = (stored_bytes(m, TensorProto.FLOAT) for m in (narrow, wide))
    assert small < 0.5 * floats, "weights are in 8 bits"
    assert any(t.data_type == TensorProto.UINT16 for t in wide.graph.initializer)
    onnx.checker.check_model(wide)
    assert sum(node_macs(wide).values()) == sum(node_macs(narrow).values()) > 0
    core = "cortex-a76"
    assert predicted_convs(wide, core) >= predicted_convs(narrow, core), "computed in float"
    found = TorchGraph(wide)(torch.from_numpy(prepare(cv2.imread(str(photos[0])), SPEC)[0]))
    np.testing.assert_allclose(
        found[0].detach().numpy(), outputs(wide, photos[:1]), rtol=0.02, atol=0.02
    )
    wanted, found = outputs(narrow, photos), outputs(wide, photos)
    gap = np.abs(found - wanted).mean() / np.abs(wanted).std()
    assert 0 < gap < 0.02
    (all_8,) = Origin(model, seen, {}, layout.group).variant(0.0).inserted(True)
    rough = np.abs(outputs(all_8, photos) - wanted).mean() / np.abs(wanted).std()
    assert gap < rough


def test_its_weights_are_rounded_with_their_errors_made_up_for(
    photos: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tidy(graphs.detector("leaky"))
    layout = plan_layout(model)
    seen = observe(model, list(layout.tensors), photos, SPEC, progress=quiet)
    chosen = frozenset(n.name for n in model.graph.node if n.name in layout.nodes)
    variant = replace(Origin(model, seen, {}, layout.group).variant(0.0), float_nodes=chosen)
    (narrow,) = variant.inserted(True)
    wanted = outputs(narrow, photos)
    gap = np.abs(outputs(widen(narrow, variant)[0], photos) - wanted).mean()
    monkeypatch.setattr(wide_file, "round_weights", lambda fitted, *_: (fitted, {}))
    nearest = np.abs(outputs(widen(narrow, variant)[0], photos) - wanted).mean()
    assert gap < 0.9 * nearest


def test_nothing_in_float_nothing_to_widen(photos: list[Path]) -> None:
    model = tidy(graphs.detector("leaky"))
    layout = plan_layout(model)
    seen = observe(model, list(layout.tensors), photos, SPEC, progress=quiet)
    variant = Origin(model, seen, {}, layout.group).variant(0.0)
    (narrow,) = variant.inserted(True)
    wide, count = widen(narrow, variant)
    assert count == 0
    assert len(wide.graph.node) == len(narrow.graph.node)


def test_a_recipe_asks_for_it_and_an_unknown_fallback_is_refused(tmp_path: Path) -> None:
    step = {"kind": "quantize", "fallback": "int16"}
    values = {"version": 1, "data": {"photos": "p"}, "steps": [step]}
    assert make_recipe(values, tmp_path).steps[0].fallback == "int16"  # type: ignore[union-attr]
    with pytest.raises(RecipeError, match="fallback: expected one of float, int16"):
        QuantizeConfig(fallback="int4")


@pytest.mark.shared
def test_a_real_detector_with_its_first_layers_in_16_bits(shared: Path, tmp_path: Path) -> None:
    data = sorted((shared / "data/coco-train/images").glob("*.jpg"))[:4]
    source = shared / "weights/yolox_nano_416.onnx"
    model, spec = tidy(onnx.load(source)), OnnxDetector(source).spec
    layout = plan_layout(model)
    seen = observe(model, list(layout.tensors), data, spec, progress=quiet)
    origin = Origin(model, seen, {}, layout.group)
    first = first_nodes(model, 8, Budget(model, 0.1, 0.1))
    variant = replace(origin.variant(0.0), float_nodes=first)
    (narrow,) = variant.inserted(True)
    wide, count = widen(narrow, variant)
    assert count >= 8
    fidelity = Fidelity(model, data, spec)
    assert fidelity.loss(wide) < fidelity.loss(narrow) + 0.05
    sizes = []
    for name, made in (("narrow", narrow), ("wide", wide)):
        save_model(made, tmp_path / f"{name}.onnx", spec)
        OnnxDetector(tmp_path / f"{name}.onnx")
        sizes.append(stored_bytes(made, TensorProto.FLOAT))
    assert sizes[1] < sizes[0]
