"""Activations that a file draws as several operators, or a module calls as functions."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from edgesight.compression.activations import activations_of
from edgesight.compression.enter import enter_onnx
from edgesight.compression.foreign import convert_onnx
from edgesight.compression.merge_activations import merge_activations
from edgesight.compression.plain import plain, trace
from onnx import TensorProto, helper
from torch import Tensor, nn

Function = Callable[[Tensor], Tensor]
DRAWN: dict[str, tuple[Function, str]] = {
    "silu": (lambda x: x * torch.sigmoid(x), "silu"),
    "silu, gate first": (lambda x: x.sigmoid() * x, "silu"),
    "a function": (F.silu, "silu"),
    "hard-swish": (lambda x: x * F.relu6(x + 3) / 6, "hard_swish"),
    "hard-swish, divided before": (lambda x: x * (F.relu6(x + 3) / 6), "hard_swish"),
    "hard-swish by hard-sigmoid": (lambda x: x * F.hardsigmoid(x), "hard_swish"),
    "mish": (lambda x: x * torch.tanh(F.softplus(x)), "silu"),
    "leaky": (lambda x: F.leaky_relu(x, 0.1), "leaky_relu"),
}


class Net(nn.Module):
    """Two convolutions with one function between them, and a sum around it."""

    def __init__(self, function: Function) -> None:
        super().__init__()
        self.one, self.two, self.function = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1), function

    def forward(self, x: Tensor) -> Tensor:
        """Map a batch [B, 3, H, W] to [B, 4, H, W]."""
        y: Tensor = self.one(x)
        return self.two(self.function(y)) + y


@pytest.mark.parametrize("name", DRAWN)
def test_functions_become_modules_that_can_be_replaced(name: str) -> None:
    function, kind = DRAWN[name]
    torch.manual_seed(0)
    net = Net(function).eval()
    x = torch.randn(2, 3, 8, 8) * 5
    graph = trace(net)
    plain(graph, x[:1])
    assert sum(merge_activations(graph).values()) == 1
    assert list(activations_of(graph).values()) == [kind]
    with torch.no_grad():
        torch.testing.assert_close(graph(x), net(x), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x * torch.sigmoid(2 * x),  # a swish of another slope
        lambda x: x * torch.tanh(x),
        lambda x: F.relu6(x + 3) / 6,
        lambda x: x * torch.sigmoid(x.mean()),
    ],
)
def test_what_only_looks_like_one_stays(function: Function) -> None:
    torch.manual_seed(0)
    net = Net(function).eval()
    x = torch.randn(1, 3, 8, 8) * 5
    graph = trace(net)
    assert merge_activations(graph) == {}
    with torch.no_grad():
        torch.testing.assert_close(graph(x), net(x))


def test_a_gate_that_others_read_stays() -> None:
    def function(x: Tensor) -> Tensor:
        gate = torch.sigmoid(x)
        return x * gate + gate

    graph = trace(Net(function).eval())
    assert merge_activations(graph) == {}


def test_gelu_by_erf_in_an_onnx_graph() -> None:
    """What exporters draw where the opset has no GELU."""
    scalars = {"root": 2.0**0.5, "one": 1.0, "half": 0.5}
    nodes = [
        helper.make_node("Div", ["x", "root"], ["a"], "div"),
        helper.make_node("Erf", ["a"], ["b"], "erf"),
        helper.make_node("Add", ["b", "one"], ["c"], "add"),
        helper.make_node("Mul", ["x", "c"], ["d"], "mul"),
        helper.make_node("Mul", ["d", "half"], ["y"], "mul_half"),
    ]
    stored = [helper.make_tensor(n, TensorProto.FLOAT, [], [v]) for n, v in scalars.items()]
    ends = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [1, 3, 8, 8]) for n in "xy"]
    graph = helper.make_graph(nodes, "gelu", ends[:1], ends[1:], stored)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    body = trace(convert_onnx(model))
    x = torch.randn(1, 3, 8, 8)
    plain(body, x)
    assert merge_activations(body) == {"GELU": 1}
    torch.testing.assert_close(body(x), F.gelu(x))


@pytest.mark.shared
def test_every_silu_of_yolox_is_found_in_its_file(shared: Path) -> None:
    net, _ = enter_onnx(shared / "weights" / "yolox_nano_416.onnx")
    kinds = list(activations_of(net).values())
    assert kinds == ["silu"] * len(kinds)
    assert len(kinds) > 60
