"""Equalisation, grids, folding and the whole INT8 road, on small graphs and noise photos."""

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
from edgesight.compression import int8_search
from edgesight.compression.calibrate import Grid, best_grid
from edgesight.compression.equalise import (
    label_channels,
    rescale,
    silu_gates,
)
from edgesight.compression.fidelity import disagreement
from edgesight.compression.onnx_io import fold_preprocess, save_model, tidy
from edgesight.compression.qdq import body_nodes, plan_layout
from edgesight.compression.qdq_weights import quantize_weight
from edgesight.compression.quantize import QuantizeConfig, quantize
from edgesight.models.detections import Detections
from edgesight.models.detector import OnnxDetector
from edgesight.models.errors import DatasetError, ModelFileError, RecipeError
from edgesight.models.graph import integer_share
from edgesight.models.preprocess import normalise

graphs: Any = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("tiny_graphs.py"))))
SIZE, SPEC, detector = graphs.SIZE, graphs.SPEC, graphs.detector
run, weights = graphs.run, graphs.weights


def quiet(items: Iterable[Any], **_: Any) -> Iterable[Any]:
    return items


def picture(seed: int = 0) -> Any:
    return np.random.default_rng(seed).normal(0, 1, (1, 3, SIZE, SIZE)).astype(np.float32)


@pytest.mark.parametrize("activation", ["silu", "leaky"])
def test_equalisation_leaves_the_float_function_as_it_was(activation: str) -> None:
    model = tidy(detector(activation))
    labels = label_channels(model, silu_gates(model))
    factor = np.exp(np.random.default_rng(2).normal(0, 2, labels.count)).astype(np.float32)
    factor[0] = 1
    scaled = rescale(model, labels, factor)
    assert labels.count > 50
    wanted, got = run(model, picture())[0], run(scaled, picture())[0]
    np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-5)
    first = next(n for n in model.graph.node if n.op_type == "Conv").output[0]
    before, after = (run(m, picture(), None) for m in (expose(model, first), expose(scaled, first)))
    assert not np.allclose(before[1], after[1], rtol=0.1)


def expose(model: Any, name: str) -> Any:
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    copy.graph.output.append(onnx.helper.make_empty_tensor_value_info(name))
    return copy


def test_labels_follow_channels_through_shuffle_split_and_residual() -> None:
    model = tidy(detector("leaky"))
    labels = label_channels(model)
    nodes = list(model.graph.node)
    add = next(n for n in nodes if n.op_type == "Add")
    split = next(n for n in nodes if n.op_type == "Split")
    concat = next(n for n in nodes if n.op_type == "Concat")
    np.testing.assert_array_equal(labels.of[add.input[0]], labels.of[add.input[1]])
    joined = labels.of[concat.output[0]]
    shuffled = joined.reshape(2, 16).T.reshape(-1)
    np.testing.assert_array_equal(
        np.concatenate([labels.of[split.output[0]], labels.of[split.output[1]]]), shuffled
    )
    assert (labels.of["images"] == 0).all()


def test_closed_silu_keeps_its_scale() -> None:
    model = tidy(detector("silu"))
    labels = label_channels(model)
    gated = next(n.input[0] for n in model.graph.node if n.op_type == "Sigmoid")
    assert (labels.of[gated] == 0).all()


def test_fold_preprocess_is_exact() -> None:
    model = tidy(detector())
    folded, spec = fold_preprocess(model, SPEC)
    image = np.random.default_rng(3).integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)
    assert spec.input_format == "uint8_nhwc"
    assert folded.graph.input[0].type.tensor_type.elem_type == onnx.TensorProto.UINT8
    np.testing.assert_array_equal(
        run(folded, image[None])[0], run(model, normalise(image, SPEC))[0]
    )
    assert fold_preprocess(folded, spec)[0] is folded


def test_dead_channels_survive() -> None:
    weight = np.zeros((4, 3, 3, 3), np.float32)
    weight[1] = 0.5
    weight[2] = 1e-9
    bias = np.array([0.7, 0.1, -3.0, 0.0], np.float32)
    found = quantize_weight(weight, bias, 0.02)
    assert (found.scales > 0).all()
    assert np.isfinite(found.scales).all()
    codes = np.rint(bias / (found.scales.astype(np.float64) * 0.02))
    assert np.abs(codes).max() < 2**31
    restored = codes * found.scales * 0.02
    np.testing.assert_allclose(restored, bias, atol=1e-3)


def test_wild_value_does_not_take_the_grid() -> None:
    values = np.random.default_rng(4).normal(0, 1, (4000, 8)).astype(np.float32)
    values[17, 3] = 5000
    grid = best_grid(values, float(values.min()), 5000.0)
    rest = values[values < 10]
    assert float(np.abs(grid.round(rest) - rest).mean()) < 0.05
    values[17, 3] = np.nan
    assert best_grid(values, -4.0, 4.0).scale < 0.05


def test_range_is_fitted_behind_the_activation() -> None:
    values = np.random.default_rng(5).uniform(-60, 4, (4000, 1)).astype(np.float32)
    plain = best_grid(values, -60, 4)
    behind = best_grid(values, -60, 4, lambda x: np.maximum(x, 0))
    assert plain.low < -50
    assert behind.low > -10
    assert behind.high == pytest.approx(4, rel=0.1)


def test_grid_has_zero_and_both_ends() -> None:
    grid = Grid.over(-1, 3)
    assert grid.round(np.zeros(1, np.float32))[0] == 0
    np.testing.assert_allclose([grid.low, grid.high], [-1, 3], atol=grid.scale)
    assert Grid.over(0, 0).scale > 0


def test_tail_stays_out_of_the_body() -> None:
    model = tidy(detector())
    body = {n.name for n in body_nodes(model)}
    layout = plan_layout(model)
    tail = [n for n in model.graph.node if n.name not in body]
    assert {n.op_type for n in tail} >= {"Sigmoid", "Concat", "Reshape", "Transpose"}
    assert not layout.nodes & {n.name for n in tail}
    made = {out for n in tail for out in n.output}
    assert not made & set(layout.tensors)


@pytest.mark.parametrize("folded", [False, True])
@pytest.mark.parametrize("activation", ["silu", "leaky", "relu", "relu6"])
def test_int8_sees_what_float_sees(
    photos: list[Path], tmp_path: Path, activation: str, folded: bool
) -> None:
    model, spec = tidy(detector(activation, uneven=0.7)), SPEC
    if folded:
        model, spec = fold_preprocess(model, spec)
    result = quantize(
        model,
        spec,
        photos,
        QuantizeConfig(target="x86-64", photos_max=12, cost_weight=0),
        progress=quiet,
    )
    save_model(result.model, tmp_path / "int8.onnx", spec)
    save_model(model, tmp_path / "float.onnx", spec)
    small = OnnxDetector(tmp_path / "int8.onnx", optimized_path=tmp_path / "optimised.onnx")
    large = OnnxDetector(tmp_path / "float.onnx")
    image = cv2.imread(str(photos[0]))
    tensor = small.preprocess(image)[0]
    a, b = large.infer(tensor)[0], small.infer(tensor)[0]
    error = float(((a - b) ** 2).mean() / a.var())
    assert error < 0.02
    report = integer_share(result.model, tmp_path / "optimised.onnx")
    assert report.share >= 0.9
    assert small.spec == spec
    losses = result.report["disagreement"]
    assert losses["final"] <= losses["not equalised"] + 1e-6
    assert result.report["photos"] == 12


def test_whole_rows_of_float_nodes_can_be_had_in_a_relu_net(photos: list[Path]) -> None:
    """A Relu that stays in float alone needs a grid before it."""
    model = tidy(detector("relu"))
    relus = [n.name for n in model.graph.node if n.op_type == "Relu"]
    seen = quantize(model, SPEC, photos, QuantizeConfig(photos_max=6), progress=quiet)
    assert seen.report["photos"] == 6
    layout = plan_layout(model, frozenset(relus))
    clipped = {n.input[0] for n in model.graph.node if n.op_type == "Relu"}
    assert clipped <= set(layout.tensors)


@pytest.mark.parametrize("shape", [(1, 16), (16,), (1,)])
def test_a_dense_layers_bias_may_be_a_row(
    photos: list[Path], tmp_path: Path, shape: tuple[int, ...]
) -> None:
    b = graphs.GraphBuilder()
    x = b.leaky(b.conv("images", (3, 16), 3, 8))
    pooled = b.add("Flatten", [b.add("GlobalAveragePool", [x])])
    matrix = b.store("m", b.rng.normal(0, 0.3, (16, 16)).astype(np.float32))
    bias = b.store("c", b.rng.normal(0, 1, shape).astype(np.float32))
    gate = b.add("Sigmoid", [b.add("Gemm", [pooled, matrix, bias])])
    gate = b.add("Reshape", [gate, b.store("g", np.array([1, 16, 1, 1], np.int64))])
    x = b.conv(b.add("Mul", [x, gate]), (16, 7))
    x = b.add("Reshape", [x, b.store("flat", np.array([1, 7, 64], np.int64))])
    model = tidy(b.model(b.add("Transpose", [x], perm=[0, 2, 1]), [1, 64, 7]))
    result = quantize(model, SPEC, photos, QuantizeConfig(photos_max=6), progress=quiet)
    save_model(result.model, tmp_path / "int8.onnx", SPEC)
    wanted = run(model, picture())[0]
    assert np.abs(run(result.model, picture())[0] - wanted).mean() < 0.2 * wanted.std()


def test_a_file_that_onnx_runtime_has_optimised_is_refused() -> None:
    model = detector()
    model.graph.node[0].domain = "com.microsoft"
    with pytest.raises(ModelFileError, match=r"found some of com\.microsoft; export the model"):
        tidy(model)


def test_signed_and_unsigned_targets_differ_in_type_only(photos: list[Path]) -> None:
    models = {}
    for target in ("cortex-a76", "x86-64"):
        config = QuantizeConfig(target=target, photos_max=6)
        models[target] = quantize(detector(), SPEC, photos, config, progress=quiet).model
    signed, unsigned = weights(models["cortex-a76"]), weights(models["x86-64"])
    zeros = [n for n in signed if n.endswith("/zero")]
    assert zeros
    for name in zeros:
        assert signed[name].dtype == np.int8
        assert unsigned[name].dtype == np.uint8
        assert int(signed[name]) + 128 == int(unsigned[name])


def test_same_seed_gives_the_same_file(photos: list[Path]) -> None:
    config = QuantizeConfig(photos_max=6)
    files = [
        quantize(detector(), SPEC, photos, config, progress=quiet).model.SerializeToString()
        for _ in range(2)
    ]
    assert files[0] == files[1]


def test_integer_share_bounds_what_may_stay_float(
    photos: list[Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(int8_search, "GAIN_MIN", -100.0)  # every trial counts as a gain
    config = QuantizeConfig(target="x86-64", photos_max=6, integer_share_min=0.8)
    result = quantize(detector(), SPEC, photos, config, progress=quiet)
    kept = result.report["float"]
    assert kept["nodes"]
    assert 0 < kept["conv_macs_share"] <= 0.2
    save_model(result.model, tmp_path / "int8.onnx", SPEC)
    OnnxDetector(tmp_path / "int8.onnx", optimized_path=tmp_path / "optimised.onnx")
    report = integer_share(result.model, tmp_path / "optimised.onnx")
    assert 0.8 <= report.share < 1.0


def test_disagreement_is_zero_for_the_same_and_one_for_nothing_in_common() -> None:
    boxes = Detections(np.array([[0, 0, 10, 10]]), np.array([0.8]), np.array([1]))
    shifted = Detections(np.array([[1, 0, 11, 10]]), np.array([0.7]), np.array([1]))
    other = Detections(np.array([[0, 0, 10, 10]]), np.array([0.8]), np.array([0]))
    none = Detections.empty()
    assert disagreement([boxes], [boxes]) == 0
    assert 0 < disagreement([boxes], [shifted]) < 0.5
    assert disagreement([boxes], [other]) == 1
    assert disagreement([boxes], [none]) == 1
    assert disagreement([none], [none]) == 0


def test_wrong_input_is_told_in_one_line(photos: list[Path], tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="photos to calibrate"):
        quantize(detector(), SPEC, [])
    with pytest.raises(RecipeError, match="target"):
        QuantizeConfig(target="pentium")
    with pytest.raises(RecipeError, match="integer_share_min"):
        QuantizeConfig(integer_share_min=1.5)
    broken = detector()
    broken.graph.node[0].input[0] = "nowhere"
    with pytest.raises(ModelFileError):
        quantize(broken, SPEC, photos, progress=quiet)
    with pytest.raises(ModelFileError):
        save_model(broken, tmp_path / "x.onnx")
    assert not (tmp_path / "x.onnx").exists()
