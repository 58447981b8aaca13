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
    "in place": (lambda x: F.leaky_relu(x * 1.0, 0.1, inplace=True), "leaky_relu"),
    "hard-swish by clamp": (lambda x: torch.mul(x, torch.clamp(x + 3, 0, 6)) / 6, "hard_swish"),
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


@pytest.mark.parametrize(
    "function",
    [
        lambda x: torch.clamp(x * torch.sigmoid(x), -20, 20),
        lambda x: F.hardtanh(F.leaky_relu(x, 0.1), -12, 12),
    ],
)
def test_a_clip_behind_an_activation_stays(function: Function) -> None:
    torch.manual_seed(0)
    net = Net(function).eval()
    x = torch.randn(1, 3, 8, 8) * 100
    graph = trace(net)
    assert sum(merge_activations(graph).values()) == 1
    with torch.no_grad():
        torch.testing.assert_close(graph(x), net(x))


class Shared(nn.Module):
    """One sigmoid for a SiLU and for something else; a convolution with the name of a node."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.mul = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1)
        self.sigmoid = nn.Sigmoid()

    def forward(self, x: Tensor) -> Tensor:
        """Map a batch [B, 3, H, W] to [B, 4, H, W]."""
        y: Tensor = self.one(x)
        y = self.mul(y * self.sigmoid(y))
        y = y * self.sigmoid(y)
        return self.sigmoid(y)


def test_a_module_that_is_called_in_several_places_stays_what_it_is() -> None:
    torch.manual_seed(0)
    net = Shared().eval()
    x = torch.randn(1, 3, 8, 8) * 5
    graph = trace(net)
    assert merge_activations(graph) == {"SiLU": 2}
    assert len(activations_of(graph)) == 2
    with torch.no_grad():
        torch.testing.assert_close(graph(x), net(x))


def test_a_learned_slope_stays_learned() -> None:
    class Swish(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.beta = nn.Parameter(torch.ones(()))

        def forward(self, x: Tensor) -> Tensor:
            return x * torch.sigmoid(self.beta * x)

    assert merge_activations(trace(Swish())) == {}


def test_a_gate_that_others_read_stays() -> None:
    def function(x: Tensor) -> Tensor:
        gate = torch.sigmoid(x)
        return x * gate + gate

    graph = trace(Net(function).eval())
    assert merge_activations(graph) == {}


GELU = [
    ("Div", ["x", "root"], "a"), ("Erf", ["a"], "b"), ("Add", ["b", "one"], "c"),
    ("Mul", ["x", "c"], "d"), ("Mul", ["d", "half"], "y"),
]  # fmt: skip
MISH = [("Softplus", ["x"], "a"), ("Tanh", ["a"], "b"), ("Mul", ["x", "b"], "y")]


@pytest.mark.parametrize(
    ("drawn", "name", "function"), [(GELU, "GELU", F.gelu), (MISH, "Mish", F.mish)]
)
def test_gelu_and_mish_in_an_onnx_graph(
    drawn: list[tuple[str, list[str], str]], name: str, function: Function
) -> None:
    """As exporters draw them where the opset does not have them."""
    scalars = {"root": 2.0**0.5, "one": 1.0, "half": 0.5}
    nodes = [helper.make_node(op, given, [out], f"n_{out}") for op, given, out in drawn]
    used = {name for node in nodes for name in node.input}
    stored = [
        helper.make_tensor(n, TensorProto.FLOAT, [], [v]) for n, v in scalars.items() if n in used
    ]
    ends = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [1, 3, 8, 8]) for n in "xy"]
    graph = helper.make_graph(nodes, "drawn", ends[:1], ends[1:], stored)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    body = trace(convert_onnx(model))
    x = torch.randn(1, 3, 8, 8)
    plain(body, x)
    assert merge_activations(body) == {name: 1}
    torch.testing.assert_close(body(x), function(x))


@pytest.mark.shared
def test_every_silu_of_yolox_is_found_in_its_file(shared: Path) -> None:
    net, _ = enter_onnx(shared / "weights" / "yolox_nano_416.onnx")
    kinds = list(activations_of(net).values())
    assert kinds == ["silu"] * len(kinds)
    assert len(kinds) > 60
