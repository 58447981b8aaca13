"""Weights of few bits: packed to the bit, rounded well, chosen by harm, trained, in plain ONNX."""

from __future__ import annotations

import runpy
from collections import Counter
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
from edgesight.compression import lowbit as module
from edgesight.compression import lowbit_train
from edgesight.compression.bits_graph import (
    PLANES,
    WIDTHS,
    levels,
    pack,
    packed_bytes,
    store_packed,
    store_sparingly,
)
from edgesight.compression.fidelity import Fidelity
from edgesight.compression.lowbit import LowBitConfig, lower
from edgesight.compression.lowbit_choice import in_float, least_harm_first
from edgesight.compression.lowbit_round import Fit, find_layers, rounded_model
from edgesight.compression.lowbit_train import LowBitGraph, stored_lowbit
from edgesight.compression.onnx_io import save_model, tidy
from edgesight.compression.quantize import QuantizeConfig, quantize
from edgesight.compression.recipe import make_recipe
from edgesight.compression.refine import distance
from edgesight.models.detector import OnnxDetector
from edgesight.models.errors import DatasetError, ModelFileError, RecipeError
from edgesight.models.graph import copied, integer_share, load_model, node_macs, parameters
from edgesight.models.preprocess import prepare
from edgesight.models.zoo import shipped_float

graphs: Any = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("tiny_graphs.py"))))
SPEC, detector, run = graphs.SPEC, graphs.detector, graphs.run
SAMPLES = Path(module.__file__).parents[1] / "device_app" / "samples"


def quiet(items: Iterable[Any], **_: Any) -> Iterable[Any]:
    return items


def picture(seed: int = 0) -> Any:
    return np.random.default_rng(seed).normal(0, 1, (1, 3, 64, 64)).astype(np.float32)


def quantized(photos: list[Path], model: Any) -> Any:
    config = QuantizeConfig(target="x86-64", photos_max=6, refine=0)
    return quantize(model, SPEC, photos, config, progress=quiet).model


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """As ``photos``, once for all tests."""
    rng = np.random.default_rng(1)
    paths = [tmp_path_factory.mktemp("photos") / f"{i}.png" for i in range(12)]
    for path in paths:
        small = rng.integers(0, 256, (6, 8, 3), dtype=np.uint8)
        cv2.imwrite(str(path), cv2.resize(small, (80, 60), interpolation=cv2.INTER_CUBIC))
    return paths


@pytest.fixture(scope="module")
def model() -> Any:
    return tidy(detector("relu", uneven=0.5))


@pytest.fixture(scope="module")
def whole(pictures: list[Path], model: Any) -> Any:
    """The INT8 form of ``model``."""
    return quantized(pictures, model)


def with_random_codes(model: Any, bits: int) -> tuple[Any, dict[str, int]]:
    """Puts random codes of a width into all convolutions of a QDQ model."""
    result = copied(model)
    rng = np.random.default_rng(bits)
    widths = {layer.codes: bits for layer in find_layers(result)}
    for tensor in result.graph.initializer:
        if tensor.name in widths:
            codes = rng.choice(levels(bits), tuple(tensor.dims))
            tensor.CopyFrom(onnx.numpy_helper.from_array(codes, tensor.name))
    return result, widths


def opened(model: Any, folder: Path, name: str) -> tuple[OnnxDetector, Counter[str], float]:
    """Opens a model; returns the operators and the integer share of the graph that really runs."""
    save_model(model, folder / f"{name}.onnx", SPEC)
    path = folder / f"{name}_optimised.onnx"
    found = OnnxDetector(folder / f"{name}.onnx", optimized_path=path)
    ops = Counter(node.op_type for node in load_model(path).graph.node)
    return found, ops, integer_share(model, path).share


@pytest.mark.parametrize("count", [1, 7, 8, 64, 333])
@pytest.mark.parametrize("bits", sorted(PLANES))
def test_bytes_hold_the_very_codes(bits: int, count: int) -> None:
    codes = np.random.default_rng(count).choice(levels(bits), count)
    planes = pack(codes, bits)
    assert sum(len(p) for p in planes) == packed_bytes(count, bits) == -(-count // 8) * bits
    model = onnx.parser.parse_model(
        f'<ir_version: 8, opset_import: ["": 13]> g (float x) => (int8[{count}] w) {{ }}'
    )
    model.graph.initializer.append(onnx.numpy_helper.from_array(codes, "w"))
    packed = store_packed(model, {"w": bits})
    assert "w" not in {t.name for t in packed.graph.initializer}
    onnx.checker.check_model(packed, full_check=True)
    np.testing.assert_array_equal(run(packed, np.zeros((), np.float32))[0], codes)


def test_codes_that_do_not_fit_are_refused() -> None:
    assert [len(levels(b)) for b in (1, 2, 4, 7, 8)] == [2, 4, 16, 128, 255]
    for bits, wrong in ((4, 8), (2, -3), (1, 0), (7, 64)):
        with pytest.raises(ModelFileError, match=f"expected codes of {bits} bits"):
            pack(np.array([levels(bits)[0], wrong], np.int8), bits)


@pytest.mark.parametrize("bits", sorted(PLANES))
def test_what_runs_is_the_same_integer_network(
    pictures: list[Path], whole: Any, tmp_path: Path, bits: int
) -> None:
    plain, widths = with_random_codes(whole, bits)
    packed = store_sparingly(store_packed(plain, widths))
    (a, ops_a, share_a), (b, ops_b, share_b) = (
        opened(m, tmp_path, n) for m, n in ((plain, "plain"), (packed, "packed"))
    )
    tensor = a.preprocess(cv2.imread(str(pictures[0])))[0]
    np.testing.assert_array_equal(a.infer(tensor)[0], b.infer(tensor)[0])
    assert ops_a == ops_b
    assert ops_b["QLinearConv"] >= 8
    assert share_a == share_b > 0.9
    assert parameters(packed) == parameters(plain)
    assert sum(node_macs(packed).values()) == sum(node_macs(plain).values())


def test_errors_are_fed_forward_and_the_mean_goes_into_the_bias() -> None:
    rng = np.random.default_rng(0)
    inputs = np.maximum(rng.normal(0, 1, (4000, 12)) @ rng.normal(0, 1, (12, 24)), 0)
    weight = rng.normal(0, 1, (16, 24)) * np.exp(rng.normal(0, 1, (16, 1)))
    moments = inputs.T @ inputs / len(inputs)
    fed = Fit(weight, inputs.mean(0).astype(np.float32), moments)
    single = Fit(weight, fed.mean, None)

    def lost(fit: Fit, bits: int) -> float:
        codes, scales = fit.rounded(bits)
        assert set(np.unique(codes)) <= set(levels(bits))
        return float((inputs @ (codes * scales[:, None] - weight).T).var(axis=0).sum())

    for bits in sorted(PLANES):
        assert lost(fed, bits) < 0.85 * lost(single, bits)
        assert fed.error(bits) == pytest.approx(lost(fed, bits), rel=0.01)
    errors = [fed.error(bits) for bits in WIDTHS]
    assert errors == sorted(errors)


def test_one_bit_is_a_sign_and_the_mean_magnitude() -> None:
    weight = np.random.default_rng(1).normal(0, 1, (4, 30))
    codes, scales = Fit(weight, np.zeros(30, np.float32), None).rounded(1)
    np.testing.assert_array_equal(codes, np.where(weight < 0, -1, 1))
    np.testing.assert_allclose(scales, np.abs(weight).mean(1))


def test_dead_channels_keep_their_bias(photos: list[Path]) -> None:
    model = detector("relu")
    last = [n for n in model.graph.node if n.op_type == "Conv"][3]
    for tensor in model.graph.initializer:
        if tensor.name == last.input[1]:
            weight = onnx.numpy_helper.to_array(tensor).copy()
            weight[:5] = 0
            tensor.CopyFrom(onnx.numpy_helper.from_array(weight, tensor.name))
    whole = quantized(photos, tidy(model))
    few = lower(whole, model, SPEC, photos, LowBitConfig(weights=6), progress=quiet).model
    a, b = run(whole, picture())[0], run(few, picture())[0]
    assert np.isfinite(b).all()
    assert float(((a - b) ** 2).mean() / a.var()) < 0.02


def test_steps_of_least_harm_per_byte_come_first() -> None:
    options = {
        "cheap": [(8, 100, 0.0), (6, 80, 0.01), (4, 50, 0.02), (2, 25, 9.0)],
        "dear": [(8, 100, 0.0), (6, 80, 5.0), (4, 50, 20.0), (2, 25, 90.0)],
    }
    assert least_harm_first(options) == [
        ("cheap", 4),  # per byte better than 6
        ("dear", 6),
        ("cheap", 2),
        ("dear", 4),
        ("dear", 2),
    ]


def test_without_grids_it_is_the_float_network(model: Any, whole: Any) -> None:
    plain = in_float(whole)
    kinds = {n.op_type for n in plain.graph.node}
    assert not kinds & {"QuantizeLinear", "DequantizeLinear"}
    a, b, c = (run(m, picture())[0] for m in (model, plain, whole))
    assert ((a - b) ** 2).mean() < 0.5 * ((a - c) ** 2).mean()


def test_the_file_keeps_within_a_size_and_says_if_it_cannot(
    pictures: list[Path], model: Any, whole: Any
) -> None:
    def lowered(bytes_max: int) -> Any:
        config = LowBitConfig(bytes_max=bytes_max, photos_max=4)
        return lower(whole, model, SPEC, pictures, config, progress=quiet)

    roomy = lowered(10**6)
    assert set(roomy.report["bits"].values()) == {8}
    np.testing.assert_allclose(run(roomy.model, picture())[0], run(whole, picture())[0], atol=5e-3)
    limit = roomy.report["bytes"] - 3000
    found = lowered(limit)
    assert found.report["bytes"] == len(found.model.SerializeToString()) <= limit
    assert found.report["bytes"] > limit - 600  # one step of a layer is no more
    assert found.notes == ()
    assert 2 < min(found.report["bits"].values()) < 8
    far = lowered(5000)
    assert "expected at most 5000 bytes, found no way below" in far.notes[0]
    assert set(far.report["bits"].values()) == {2}
    assert np.isfinite(run(far.model, picture())[0]).all()


@pytest.mark.parametrize("bits", [6, 2, 1])
def test_training_computes_what_the_file_will(pictures: list[Path], whole: Any, bits: int) -> None:
    layers = find_layers(whole)
    widths = {layer.name: bits if i % 3 else 8 for i, layer in enumerate(layers)}
    rng = np.random.default_rng(0)
    fits = {}
    for layer in layers:
        count = 3 if layer.source.startswith("images") else 16
        seen = SimpleNamespace(values=rng.uniform(0, 1, (64, count)).astype(np.float32))
        if onnx_size(whole, layer.codes)[1] not in (1, count):
            seen.values = rng.uniform(0, 1, (64, 32)).astype(np.float32)
        fits[layer.name] = Fit.of(whole, layer, seen)
    few = rounded_model(whole, layers, fits, widths)
    student = LowBitGraph(few, whole, layers, widths)
    tensors = [prepare(cv2.imread(str(p)), SPEC)[0] for p in pictures[:2]]
    wanted = np.concatenate([run(few, t)[0] for t in tensors])
    with torch.no_grad():
        got = student(torch.from_numpy(np.concatenate(tensors)))[0].numpy()
    assert np.abs(got - wanted).mean() < 2e-2 * wanted.std()
    again = stored_lowbit(student, few)
    for t, u in zip(few.graph.initializer, again.graph.initializer, strict=True):
        a, b = (onnx.numpy_helper.to_array(x).astype(np.float64) for x in (t, u))
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1 if t.data_type == 6 else 1e-9)


def onnx_size(model: Any, name: str) -> list[int]:
    return [int(d) for t in model.graph.initializer if t.name == name for d in t.dims]


@pytest.mark.parametrize("bits", [4, 1])
def test_training_brings_few_bits_nearer(
    pictures: list[Path], model: Any, whole: Any, monkeypatch: pytest.MonkeyPatch, bits: int
) -> None:
    monkeypatch.setattr(lowbit_train, "RATE", 2e-3)  # a test has no time for the usual ones
    monkeypatch.setattr(lowbit_train, "RATE_FEW_BITS", 2e-2)
    config = LowBitConfig(weights=bits, refine=120)
    plain, trained, same = (
        lower(whole, model, SPEC, pictures, c, progress=quiet)
        for c in (replace(config, refine=0), config, config)
    )
    assert trained.report["refined"]["kept"]
    before, after = (distance(r.model, model, SPEC, pictures) for r in (plain, trained))
    assert after < 0.9 * before
    assert same.model == trained.model


def test_training_that_makes_it_worse_is_not_kept(
    pictures: list[Path], model: Any, whole: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lowbit_train, "RATE", 0.9)
    config = LowBitConfig(weights=3, refine=16)
    found, plain = (
        lower(whole, model, SPEC, pictures, c, progress=quiet)
        for c in (config, replace(config, refine=0))
    )
    assert not found.report["refined"]["kept"]
    assert found.model == plain.model


def test_where_few_bits_change_little_nothing_is_trained(
    pictures: list[Path], model: Any, whole: Any
) -> None:
    config = LowBitConfig(bytes_max=10**6, refine=16)
    found = lower(whole, model, SPEC, pictures, config, progress=quiet)
    assert found.report["refined"]["photos"] == 0
    assert found.notes[-1] == "not trained again: few bits changed little"


def test_wrong_values_are_refused(pictures: list[Path], model: Any) -> None:
    with pytest.raises(RecipeError, match="expected one of 8, 7, 6, 5, 4, 3, 2, 1 bits, found 9"):
        LowBitConfig(weights=9)
    with pytest.raises(RecipeError, match="weights or bytes_max, found both"):
        LowBitConfig(weights=4, bytes_max=1)
    with pytest.raises(RecipeError, match=r"quantize.bytes_max: expected at least 1, found -3"):
        LowBitConfig(bytes_max=-3)
    with pytest.raises(DatasetError, match="found none"):
        lower(model, model, SPEC, [], LowBitConfig(weights=4), progress=quiet)
    with pytest.raises(ModelFileError, match="quantize the model first"):
        lower(model, model, SPEC, pictures, LowBitConfig(weights=4), progress=quiet)


@pytest.mark.parametrize(
    ("step", "expected"),
    [
        ({"weights": 9}, "steps[1].weights: expected 8, 7, 6, 5, 4, 3, 2 or 1, found 9"),
        ({"weights": 4, "bytes_max": 10}, "one of weights (bits of all layers) or bytes_max"),
        ({"bytes_max": 0}, "steps[1].bytes_max: expected greater than or equal to 1, found 0"),
    ],
)
def test_a_recipe_says_what_is_wrong(step: dict[str, Any], expected: str, tmp_path: Path) -> None:
    values = {"version": 1, "data": {"photos": "p"}, "steps": [{"kind": "quantize", **step}]}
    with pytest.raises(RecipeError) as error:
        make_recipe(values, tmp_path)
    assert expected in str(error.value)


def test_the_shipped_detector_in_six_bits_sees_the_same(tmp_path: Path) -> None:
    photos = sorted(SAMPLES.glob("*.jpg"))
    spec, original = OnnxDetector(shipped_float()).spec, load_model(shipped_float())
    whole = quantize(original, spec, photos, QuantizeConfig(), progress=quiet).model
    few = lower(whole, original, spec, photos, LowBitConfig(weights=6), progress=quiet)
    assert len(few.model.SerializeToString()) < 0.8 * len(whole.SerializeToString())
    loss = Fidelity(original, photos, spec)
    assert loss.loss(few.model) < 1.5 * loss.loss(whole)
    reports = []
    for name, model in (("whole", whole), ("few", few.model)):
        save_model(model, tmp_path / f"{name}.onnx", spec)
        path = tmp_path / f"{name}_optimised.onnx"
        OnnxDetector(tmp_path / f"{name}.onnx", optimized_path=path)
        reports.append(integer_share(model, path))
    assert reports[0].ops == reports[1].ops
    assert reports[0].share == reports[1].share
