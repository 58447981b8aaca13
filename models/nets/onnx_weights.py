"""Read the convolutions of an ONNX file and compare them, one by one, with a network's.

Names in an ONNX file mean nothing. What is compared is the order of execution and, for each
convolution, the shape of its weight, stride, groups and *which convolutions feed it*. Two networks
that happen to have equal shapes in another wiring are told apart.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from ..errors import MissingExtraError, ModelFileError

INPUT = -1
"""Stands for the image among the feeders of a convolution."""

_QUANTIZED = {"QuantizeLinear", "DequantizeLinear", "QLinearConv", "ConvInteger"}
_ACTIVATION_OPS: dict[type[nn.Module], str] = {
    nn.ReLU: "Relu",
    nn.LeakyReLU: "LeakyRelu",
    nn.ReLU6: "Clip",
    nn.Hardswish: "HardSwish",
}


@dataclass(frozen=True)
class Wiring:
    """What tells one convolution of a network from the others.

    Attributes:
        shape: Shape of the weight (out, in / groups, height, width).
        stride: Stride (vertical, horizontal).
        groups: Groups.
        feeders: Indices of the convolutions whose outputs reach this one with no other between;
            ``INPUT`` for the image.
    """

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    groups: int
    feeders: frozenset[int]

    def __str__(self) -> str:
        """Return it in one line."""
        fed = ", ".join("the image" if i == INPUT else f"#{i}" for i in sorted(self.feeders))
        return (
            f"weight {list(self.shape)}, stride {self.stride[0]}, groups {self.groups}, "
            f"fed by {fed or 'nothing'}"
        )


@dataclass(frozen=True)
class OnnxConvs:
    """The convolutions of an ONNX file in order of execution.

    Attributes:
        wiring: One entry for each.
        weights: float32 (out, in / groups, height, width) for each.
        biases: float32 (out,) for each; zeros where the file has none.
        ops: How often each operator occurs in the file.
    """

    wiring: list[Wiring]
    weights: list[npt.NDArray[np.float32]]
    biases: list[npt.NDArray[np.float32]]
    ops: Counter[str]


def net_wiring(net: nn.Module) -> tuple[list[str], list[Wiring]]:
    """Trace a network symbolically and list its convolutions in order of execution.

    Args:
        net: A network that ``torch.fx`` can trace.

    Returns:
        Dotted names of the ``Conv2d`` modules, and the wiring of each.
    """
    modules = dict(net.named_modules())
    names: list[str] = []
    wiring: list[Wiring] = []
    reach: dict[torch.fx.Node, frozenset[int]] = {}
    nothing: frozenset[int] = frozenset()
    for node in torch.fx.Tracer().trace(net).nodes:
        if node.op == "placeholder":
            reach[node] = frozenset([INPUT])
            continue
        feeders = nothing.union(*(reach[arg] for arg in node.all_input_nodes))
        module = modules.get(str(node.target)) if node.op == "call_module" else None
        if isinstance(module, nn.Conv2d):
            shape = tuple(module.weight.shape)
            stride = tuple(int(step) for step in module.stride)
            wiring.append(Wiring(shape, stride, module.groups, feeders))
            names.append(str(node.target))
            feeders = frozenset([len(names) - 1])
        reach[node] = feeders
    return names, wiring


def _constants(graph: Any, numpy_helper: Any) -> dict[str, npt.NDArray[Any]]:
    """Return the graph's constant tensors by name, also those behind Constant and Identity."""
    values = {item.name: numpy_helper.to_array(item) for item in graph.initializer}
    for node in graph.node:
        if node.op_type == "Identity" and node.input[0] in values:
            values[node.output[0]] = values[node.input[0]]
        elif node.op_type == "Constant":
            for attribute in node.attribute:
                if attribute.name == "value":
                    values[node.output[0]] = numpy_helper.to_array(attribute.t)
    return values


def _check_float(ops: Counter[str], path: Path) -> None:
    """Refuse files whose convolutions are not plain folded float ones."""
    if quantized := sorted(_QUANTIZED & set(ops)):
        message = (
            f"{path}: expected a float ONNX file, found a quantized one ({', '.join(quantized)}); "
            "load the file it was made from"
        )
        raise ModelFileError(message)
    if count := ops["BatchNormalization"]:
        message = (
            f"{path}: expected folded convolutions, found {count} BatchNormalization nodes; "
            "export the network in eval mode with folding on"
        )
        raise ModelFileError(message)


def read_onnx_convs(path: Path) -> OnnxConvs:
    """Read an ONNX file's convolutions.

    Args:
        path: The file; it is not run, only parsed.

    Returns:
        The convolutions with their weights in float32.

    Raises:
        ModelFileError: Not ONNX, truncated, quantized, not folded.
        MissingExtraError: The package ``onnx`` is not installed.
    """
    try:
        import onnx
        from onnx import numpy_helper
    except ImportError as error:
        raise MissingExtraError.of(package="onnx") from error
    try:
        graph = onnx.load(str(path)).graph
        constants = _constants(graph, numpy_helper)
    except Exception as error:  # the parser's own error types are not one tree
        message = (
            f"{path}: expected an ONNX file, found an unreadable one "
            f"({type(error).__name__}); it may be truncated: download or export it again"
        )
        raise ModelFileError(message) from error
    ops = Counter(node.op_type for node in graph.node)
    _check_float(ops, path)

    found = OnnxConvs([], [], [], ops)
    nothing: frozenset[int] = frozenset()
    reach = {item.name: frozenset([INPUT]) for item in graph.input if item.name not in constants}
    for node in graph.node:
        feeders = nothing.union(*(reach.get(name, nothing) for name in node.input))
        if node.op_type == "Conv":
            weight = constants.get(node.input[1])
            has_bias = len(node.input) > 2 and bool(node.input[2])
            bias = constants.get(node.input[2]) if has_bias else None
            if weight is None or weight.ndim != 4 or (has_bias and bias is None):
                message = (
                    f"{path}: expected stored 2-D convolution weights, found none for "
                    f"{node.name!r}; export the network with its weights as initialisers"
                )
                raise ModelFileError(message)
            given = {item.name: onnx.helper.get_attribute_value(item) for item in node.attribute}
            stride = tuple(int(step) for step in given.get("strides", (1, 1)))
            shape = tuple(int(side) for side in weight.shape)
            found.wiring.append(Wiring(shape, stride, int(given.get("group", 1)), feeders))
            found.weights.append(weight.astype(np.float32))
            zeros = np.zeros(shape[0], np.float32)
            found.biases.append(zeros if bias is None else bias.astype(np.float32))
            feeders = frozenset([len(found.wiring) - 1])
        for name in node.output:
            reach[name] = feeders
    return found


def match_convs(net: nn.Module, convs: OnnxConvs, path: Path, label: str) -> list[nn.Conv2d]:
    """Pair a file's convolutions with a network's, or say where they part.

    Args:
        net: The network.
        convs: What :func:`read_onnx_convs` returned.
        path: The file, for messages.
        label: What to call the network in messages.

    Returns:
        The network's convolutions, in the file's order.

    Raises:
        ModelFileError: Another network: count, shape, wiring or activations differ.
    """
    names, wiring = net_wiring(net)
    advice = "choose the network that the file was exported from"
    if len(names) != len(convs.wiring):
        message = (
            f"{path}: expected the {len(names)} convolutions of {label}, "
            f"found {len(convs.wiring)}; {advice}"
        )
        raise ModelFileError(message)
    for index, (expected, found) in enumerate(zip(wiring, convs.wiring, strict=True)):
        if expected != found:
            message = (
                f"{path}: expected for convolution #{index} ({names[index]} of {label}) "
                f"{expected}; found {found}; {advice}"
            )
            raise ModelFileError(message)
    kinds = Counter(type(module) for module in net.modules())
    for kind, op in _ACTIVATION_OPS.items():
        if kinds[kind] != convs.ops[op]:
            message = (
                f"{path}: expected {kinds[kind]} {op} nodes for {label}, found {convs.ops[op]}; "
                "build the network with the file's activation"
            )
            raise ModelFileError(message)
    modules = (net.get_submodule(name) for name in names)
    return [module for module in modules if isinstance(module, nn.Conv2d)]
