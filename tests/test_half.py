"""FP16: half the file that computes as before, and networks that compute in 16 bits."""

from __future__ import annotations

import runpy
import sys
from collections import Counter
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import cv2
import numpy as np
import onnx
import onnxruntime as ort
import pytest
from edgesight.compression import half as module
from edgesight.compression.fidelity import Fidelity
from edgesight.compression.half import half_compute, half_weights
from edgesight.compression.onnx_io import fold_preprocess, save_model, tidy
from edgesight.compression.pipeline import run_recipe
from edgesight.compression.recipe import make_recipe
from edgesight.models.detector import OnnxDetector
from edgesight.models.errors import ModelFileError, RecipeError
from edgesight.models.graph import load_model, node_macs, parameters
from edgesight.models.zoo import shipped_float
from onnx import TensorProto

HERE = Path(__file__).parent
graphs: Any = SimpleNamespace(**runpy.run_path(str(HERE / "tiny_graphs.py")))
recipes: Any = SimpleNamespace(**runpy.run_path(str(HERE / "tiny_recipe.py")))
SPEC, detector, run = graphs.SPEC, graphs.detector, graphs.run
SAMPLES = Path(module.__file__).parents[1] / "device_app" / "samples"


def picture() -> Any:
    return np.random.default_rng(0).normal(0, 1, (1, 3, 64, 64)).astype(np.float32)


def optimised_ops(model: Any, path: Path) -> Counter[str]:
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.optimized_model_filepath = str(path)
    ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return Counter(node.op_type for node in load_model(path).graph.node)


@pytest.mark.parametrize("activation", ["silu", "leaky", "relu6"])
def test_stored_in_half_the_bytes_the_same_network_runs(activation: str, tmp_path: Path) -> None:
    model = tidy(detector(activation))
    small = half_weights(model)
    save_model(small, tmp_path / "half.onnx")
    before = sum(len(t.raw_data) for t in model.graph.initializer)
    assert sum(len(t.raw_data) for t in small.graph.initializer) < 0.55 * before
    wanted, got = run(model, picture())[0], run(small, picture())[0]
    assert got.dtype == np.float32
    assert 0 < np.abs(got - wanted).max() < 5e-3 * np.abs(wanted).max()
    ops = [optimised_ops(m, tmp_path / "optimised.onnx") for m in (model, small)]
    assert ops[0] == ops[1]
    assert parameters(small) == parameters(model)


def test_what_does_not_fit_into_16_bits_stays(tmp_path: Path) -> None:
    model = tidy(detector())
    names = [n.input[1] for n in model.graph.node if n.op_type == "Conv"]
    for tensor in model.graph.initializer:
        if tensor.name == names[1]:
            big = onnx.numpy_helper.to_array(tensor) * np.float32(1e6)
            tensor.CopyFrom(onnx.numpy_helper.from_array(big, tensor.name))
    kinds = {t.name: t.data_type for t in half_weights(model).graph.initializer}
    assert kinds[names[1]] == TensorProto.FLOAT
    assert kinds[f"{names[0]}/half"] == TensorProto.FLOAT16
    with pytest.raises(ModelFileError, match=r"expected weights up to 65504, found more in"):
        half_compute(model)


@pytest.mark.parametrize("folded", [False, True])
@pytest.mark.parametrize("activation", ["silu", "leaky", "relu6"])
def test_a_body_in_float16_between_ends_in_float32(
    activation: str, folded: bool, photos: list[Path], tmp_path: Path
) -> None:
    model, spec = tidy(detector(activation)), SPEC
    if folded:
        model, spec = fold_preprocess(model, spec)
    small = half_compute(model)
    save_model(small, tmp_path / "half.onnx", spec)
    save_model(model, tmp_path / "float.onnx", spec)
    onnx.checker.check_model(small, full_check=True)
    assert [v.type.tensor_type.elem_type for v in small.graph.output] == [TensorProto.FLOAT]
    assert small.graph.input[0] == model.graph.input[0]
    inferred = onnx.shape_inference.infer_shapes(small).graph
    kinds = {v.name: v.type.tensor_type.elem_type for v in (*inferred.value_info, *inferred.output)}
    of = {op: {kinds[n.output[0]] for n in small.graph.node if n.op_type == op} for op in EVERY}
    assert of["Conv"] == {TensorProto.FLOAT16}
    assert of["Sub"] | of["Div"] == ({TensorProto.FLOAT} if folded else set())
    tail = [n for n in small.graph.node if n.op_type in ("Sigmoid", "Concat", "Transpose")][-3:]
    assert {kinds[n.output[0]] for n in tail} == {TensorProto.FLOAT}
    large, half = (OnnxDetector(tmp_path / f"{n}.onnx") for n in ("float", "half"))
    tensor = large.preprocess(cv2.imread(str(photos[0])))[0]
    a, b = large.infer(tensor)[0], half.infer(tensor)[0]
    assert b.dtype == np.float32
    assert 0 < np.abs(a - b).max() < 0.02 * np.abs(a).max()
    assert sum(node_macs(small).values()) == sum(node_macs(model).values())


EVERY = ("Conv", "Sub", "Div")


def test_without_convolutions_there_is_no_body() -> None:
    model = tidy(detector())
    body = [n for n in model.graph.node if n.op_type != "Conv"][-1:]
    del model.graph.node[:]
    body[0].input[0] = model.graph.input[0].name
    model.graph.node.extend(body)
    with pytest.raises(ModelFileError, match="expected convolutions"):
        half_compute(model)


@pytest.mark.parametrize("change", [half_weights, half_compute])
def test_the_shipped_detector_in_half_sees_the_same(change: Any, tmp_path: Path) -> None:
    path = shipped_float()
    model, spec = tidy(load_model(path)), OnnxDetector(path).spec
    save_model(change(model), tmp_path / "half.onnx", spec)
    assert (tmp_path / "half.onnx").stat().st_size < 0.53 * path.stat().st_size
    photos = sorted(SAMPLES.glob("*.jpg"))
    assert Fidelity(model, photos, spec).loss(load_model(tmp_path / "half.onnx")) < 0.05


@pytest.fixture
def tiny_net(monkeypatch: pytest.MonkeyPatch) -> None:
    made = ModuleType("tiny_net")
    made.__dict__.update(runpy.run_path(str(HERE / "tiny_net.py")))
    monkeypatch.setitem(sys.modules, "tiny_net", made)


@pytest.mark.usefixtures("tiny_net", "one_thread")
def test_a_recipe_ends_with_half_or_with_few_bits(tmp_path: Path) -> None:
    recipes.draw_photos(tmp_path / "photos")
    results = []
    for step in (
        {"kind": "half"},
        {"kind": "quantize", "photos": 6, "bytes_max": 24_000},
    ):
        values = recipes.tiny_recipe([step, recipes.VERIFY])
        recipe = make_recipe(values, tmp_path)
        results.append(run_recipe(recipe, progress=False, say=lambda _: None))
        assert results[-1].verified is not None
        assert results[-1].verified["passed"]
    size = [r.final.stat().st_size for r in results]
    whole = results[0].float_file.stat().st_size
    assert size[0] < 0.65 * whole
    assert size[1] <= 24_000
    report = results[1].rows[1].report
    assert report is not None
    assert report.figures["few bits"]["bytes"] <= 24_000
    f1 = [r.verified["after"]["value"] for r in results if r.verified is not None]
    assert f1[0] > 0.99


@pytest.mark.parametrize(
    ("steps", "expected"),
    [
        (["half", "quantize"], "only verify after half, found quantize; leave one out"),
        (["quantize", "half"], "only verify after quantize, found half; leave one out"),
        (["half", "distill"], "only verify after half, found distill; put it before"),
    ],
)
def test_nothing_is_changed_after_half(steps: list[str], expected: str, tmp_path: Path) -> None:
    values = recipes.tiny_recipe([{"kind": kind} for kind in steps])
    with pytest.raises(RecipeError, match=expected):
        make_recipe(values, tmp_path)
    with pytest.raises(RecipeError, match=r"expected 'float32' or 'float16', found 'bfloat16'"):
        make_recipe(recipes.tiny_recipe([{"kind": "half", "compute": "bfloat16"}]), tmp_path)
