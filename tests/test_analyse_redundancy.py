"""Entropy, effective rank and dead channels of layers in which they were planted."""

from __future__ import annotations

import runpy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
from edgesight.compression.analyse import count_costs
from edgesight.compression.redundancy import (
    effective_rank,
    energy_rank,
    entropy_bits,
    matrices,
    of_activations,
    of_weights,
    stored_form,
)
from edgesight.compression.traced import Traced
from onnx import helper

kit: Any = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("tiny_graphs.py"))))
analyse_kit: Any = SimpleNamespace(
    **runpy.run_path(str(Path(__file__).with_name("analyse_kit.py")))
)
graph, normal = analyse_kit.graph, analyse_kit.normal


def test_effective_rank_and_entropy_by_definition() -> None:
    assert effective_rank([1.0] * 7) == pytest.approx(7)
    assert effective_rank([1.0] * 3 + [0.0] * 20) == pytest.approx(3)
    assert effective_rank([0.75, 0.25]) == pytest.approx(0.75**-0.75 * 0.25**-0.25)
    assert effective_rank([0.0, 0.0]) == 0
    assert entropy_bits([5] * 256) == pytest.approx(8)
    assert entropy_bits([3, 1]) == pytest.approx(0.75 * np.log2(4 / 3) + 0.25 * 2)
    assert entropy_bits([9]) == entropy_bits([0]) == 0


def planted(rank: int, channels: int = 16) -> Any:
    """A 1x1 convolution whose outputs fill ``rank`` dimensions evenly, however many there are."""
    rng = np.random.default_rng(3)
    left = np.linalg.qr(rng.normal(size=(channels, channels)))[0][:, :rank]
    right = np.linalg.qr(rng.normal(size=(channels, channels)))[0][:rank]
    weight = (left @ right).astype(np.float32)[:, :, None, None]
    nodes = [helper.make_node("Conv", ["in", "w", "b"], ["out"], "one")]
    bias = np.full(channels, 100, np.float32)  # a mean is no dimension
    return graph(nodes, {"w": weight, "b": bias}, [1, channels, 40, 40])


@pytest.mark.parametrize("rank", [1, 3, 16])
def test_the_rank_of_a_planted_layer_is_found(rank: int) -> None:
    traced = Traced(planted(rank))
    costs = count_costs(traced, 0)
    inputs = [normal(1, 16, 40, 40, seed=s) for s in range(4)]
    seen = of_activations(traced, costs.layers, inputs, progress=lambda x, **_: x)["out"]
    assert seen.effective_rank == pytest.approx(rank, rel=0.01)
    assert seen.pixels == 4 * 1600
    assert seen.sure
    weights = of_weights(traced, traced.model.graph.node[0])
    assert weights is not None
    assert (weights.rank, weights.rank_max) == (rank, 16)


def test_the_covariance_is_of_all_photos_together() -> None:
    """Also where one photo is much brighter than the other."""
    traced = Traced(planted(16))
    inputs = [normal(1, 16, 40, 40), normal(1, 16, 40, 40, seed=1) + 2]
    layers = count_costs(traced, 0).layers
    seen = of_activations(traced, layers, inputs, progress=lambda x, **_: x)["out"]
    pixels = np.concatenate([kit.run(traced.model, x)[0].reshape(16, -1) for x in inputs], axis=1)
    assert seen.effective_rank == pytest.approx(
        effective_rank(np.linalg.eigvalsh(np.cov(pixels))), rel=1e-3
    )


def test_few_pixels_are_not_trusted() -> None:
    traced = Traced(planted(16))
    costs = count_costs(traced, 0)
    one = [normal(1, 16, 40, 40)[:, :, :1]]
    traced.model.graph.input[0].type.tensor_type.shape.dim[2].dim_param = "height"
    seen = of_activations(traced, costs.layers, one, progress=lambda x, **_: x)["out"]
    assert not seen.sure
    assert seen.effective_rank < 15


def test_dead_channels_by_weights_and_by_photos() -> None:
    """One filter is zero; another never gets over its ReLU."""
    weight, bias = normal(4, 3, 1, 1), np.zeros(4, np.float32)
    weight[1] = 0
    bias[1], bias[2] = 5, -1000
    nodes = [
        helper.make_node("Conv", ["in", "w", "b"], ["a"], "one"),
        helper.make_node("Relu", ["a"], ["out"], "act"),
    ]
    traced = Traced(graph(nodes, {"w": weight, "b": bias}, [1, 3, 8, 8]))
    costs = count_costs(traced, 0)
    seen = of_activations(traced, costs.layers, [normal(1, 3, 8, 8)], progress=lambda x, **_: x)
    assert seen["a"].dead_channels == 2
    weights = of_weights(traced, traced.model.graph.node[0])
    assert weights is not None
    assert weights.zero_channels == 1


def test_entropy_of_weights_and_outputs() -> None:
    """Weights of two sizes carry one bit; so do outputs of two values."""
    weight = np.where(np.arange(64).reshape(8, 8, 1, 1) % 2, 1, -1).astype(np.float32)
    weight *= np.geomspace(1, 100, 8, dtype=np.float32).reshape(8, 1, 1, 1)  # a scale per channel
    nodes = [
        helper.make_node("Conv", ["in", "w"], ["a"], "one"),
        helper.make_node("Clip", ["a", "low", "high"], ["out"], "act"),
    ]
    ends = {"low": np.array(-1e-9, np.float32), "high": np.array(1e-9, np.float32)}
    traced = Traced(graph(nodes, {"w": weight, **ends}, [1, 8, 32, 32]))
    costs = count_costs(traced, 0)
    weights = of_weights(traced, traced.model.graph.node[0])
    assert weights is not None
    assert weights.entropy_bits == pytest.approx(1)
    seen = of_activations(traced, costs.layers, [normal(1, 8, 32, 32)], progress=lambda x, **_: x)
    assert seen["a"].entropy_bits == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize(
    ("op", "shape", "attributes", "size"),
    [
        ("Conv", (8, 3, 3, 3), {}, [(8, 27)]),
        ("Conv", (8, 2, 3, 3), {"group": 4}, [(2, 18)] * 4),
        ("ConvTranspose", (6, 4, 2, 2), {}, [(4, 24)]),
        ("ConvTranspose", (6, 4, 2, 2), {"group": 3}, [(4, 8)] * 3),
        ("Gemm", (5, 7), {}, [(7, 5)]),
        ("Gemm", (5, 7), {"transB": 1}, [(5, 7)]),
        ("MatMul", (5, 7), {}, [(7, 5)]),
    ],
)
def test_weights_as_matrices_and_back(
    op: str, shape: tuple[int, ...], attributes: dict[str, int], size: list[tuple[int, int]]
) -> None:
    node = helper.make_node(op, ["x", "w"], ["y"], **attributes)
    weight = normal(*shape)
    rows = matrices(weight, node)
    assert [m.shape for m in rows] == size
    assert np.array_equal(stored_form(rows, weight, node), weight)
    # A row holds what one output channel weighs: without it, that channel alone is silent.
    rows[-1][-1] = 0
    changed = stored_form(rows, weight, node)
    source = (1, 6 if "Trans" in op else shape[1] * attributes.get("group", 1), 5, 5)
    if "Conv" not in op:
        source = (1, shape[1] if attributes.get("transB") else shape[0])
    model = graph(
        [helper.make_node(op, ["in", "w"], ["out"], **attributes)], {"w": changed}, [*source]
    )
    made = kit.run(model, normal(*source))[0]
    silent = [not made.take(i, axis=1 if "Conv" in op else -1).any() for i in range(made.shape[1])]
    assert silent == [False] * (made.shape[1] - 1) + [True]


def test_energy_rank() -> None:
    assert energy_rank(np.diag([3.0, 1.0, 0.0])) == 2
    assert energy_rank(np.diag([100.0, 1.0, 0.0])) == 1
    assert energy_rank(np.zeros((3, 4))) == 0


@pytest.mark.shared
def test_the_dead_channels_of_nanodet_plus_are_found(shared: Path) -> None:
    """84 hidden channels: a zero row of a 1x1 convolution each, and of the depthwise behind it."""
    traced = Traced(onnx.load(shared / "weights" / "nanodet_plus_m_416.onnx"))
    nodes = [n for n in traced.model.graph.node if n.op_type == "Conv"]
    found = [w.zero_channels for n in nodes if (w := of_weights(traced, n)) is not None]
    assert sum(found) == 2 * 84
