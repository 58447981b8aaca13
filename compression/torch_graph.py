"""Runs an ONNX graph in torch, so that what is stored in it can be trained.

Quantizers are run as rounding that gradients pass through (straight-through, arXiv 1308.3432), so
a QDQ graph computes in training what it computes on the board.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..models.errors import ModelFileError
from ..models.graph import QUANTIZERS, attributes, require_onnx
from .qdq import WEIGHT_OPS, Links, widened_codes

Attributes = dict[str, Any]


class TorchGraph(nn.Module):
    """An ONNX graph in torch; its weights and biases are parameters.

    Weights and biases behind a DequantizeLinear are kept as real numbers and rounded on the way.

    Args:
        model: Float or QDQ ``onnx.ModelProto`` with fixed sizes and a batch of one; runs any batch.

    Attributes:
        values: The parameters.
        trained: Tensor of the graph -> place of its parameter in ``values``.

    Raises:
        ModelFileError: It has an operator that is not known here.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        onnx = require_onnx()
        links = Links(model.graph)
        widened = widened_codes(links)  # torch widens what is stored by itself
        nodes = [n for n in model.graph.node if n.output[0] not in widened]
        unknown = sorted({n.op_type for n in nodes} - set(OPS) - set(QUANTIZERS))
        if unknown:
            message = f"expected operators that training knows, found {', '.join(unknown)}"
            raise ModelFileError(message)
        self.input_name = str(model.graph.input[0].name)
        self.output_names = [str(o.name) for o in model.graph.output]
        self._nodes = [(n, attributes(n)) for n in nodes]
        self._stored: dict[str, Tensor] = {
            name: torch.from_numpy(np.array(onnx.numpy_helper.to_array(t)))
            for name, t in links.stored.items()
        }
        self._stored.update((new, self._stored[old]) for new, old in widened.items())
        self.trained: dict[str, int] = {}
        values = nn.ParameterList()
        for node, _ in self._nodes:
            if node.op_type not in WEIGHT_OPS:
                continue
            for name in node.input[1:]:
                maker = links.maker.get(name)
                value = self._real(maker) if maker is not None else self._stored.get(name)
                if value is not None and name not in self.trained:
                    self.trained[name] = len(values)
                    values.append(nn.Parameter(value.float()))
        self.values = values

    def _real(self, node: Any) -> Tensor | None:
        """Returns what a DequantizeLinear makes of stored codes; None of any other node."""
        if node.op_type != "DequantizeLinear" or node.input[0] not in self._stored:
            return None
        codes, scale, zero = (self._stored[name] for name in node.input)
        shape = _along(codes, attributes(node).get("axis", 1), scale)
        real: Tensor = (codes.double() - zero.reshape(shape)) * scale.double().reshape(shape)
        result: Tensor = real.float()
        return result

    def forward(self, x: Tensor) -> list[Tensor]:
        """Returns the graph's outputs for a batch of prepared pictures."""
        known: dict[str, Any] = {self.input_name: x}
        for name, index in self.trained.items():
            known[name] = self.values[index]
        for node, given in self._nodes:
            out = node.output[0]
            if node.op_type == "DequantizeLinear":
                known[out] = self._dequantized(node, given, known)
                continue
            inputs = [self._value(name, known) for name in node.input]
            if node.op_type == "QuantizeLinear":
                known[out] = rounded(inputs[0], inputs[1], inputs[2])
                continue
            result = OPS[node.op_type](given, inputs)
            if isinstance(result, (list, tuple)):
                known.update(zip(node.output, result, strict=True))
            else:
                known[out] = result
        return [known[name] for name in self.output_names]

    def _value(self, name: str, known: dict[str, Any]) -> Any:
        return known[name] if name in known else self._stored.get(name)

    def _dequantized(self, node: Any, attributes: Attributes, known: dict[str, Any]) -> Tensor:
        out, source = node.output[0], node.input[0]
        if out in self.trained:
            value: Tensor = self.values[self.trained[out]]
            codes, scale = self._stored[source], self._stored[node.input[1]]
            if codes.dtype == torch.int32:  # its steps are far too fine to matter
                return value
            return rounded_weight(value, scale, int(attributes.get("axis", 1)))
        if source in self._stored:
            real = self._real(node)
            assert real is not None
            return real
        made: Tensor = known[source]  # the quantizer before it has rounded already
        return made


WEIGHT_CODE_MAX: Final = 127
ENDS: Final = {torch.int8: (-128, 127), torch.uint8: (0, 255), torch.uint16: (0, 65535)}
"""Of the codes of each type of zero point."""


def rounded(x: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    """Returns ``x`` on its 8-bit grid; gradients pass where it was not clipped."""
    low, high = ENDS[zero.dtype]
    result: Tensor = torch.fake_quantize_per_tensor_affine(x, float(scale), int(zero), low, high)
    return result


def rounded_weight(value: Tensor, scale: Tensor, axis: int) -> Tensor:
    """Returns weights on their symmetric grids, one per channel along ``axis``."""
    zeros = torch.zeros(len(scale), dtype=torch.int32)
    top = WEIGHT_CODE_MAX
    result: Tensor = torch.fake_quantize_per_channel_affine(value, scale, zeros, axis, -top, top)
    return result


def _along(codes: Tensor, axis: int, scale: Tensor) -> list[int]:
    """Returns the shape in which scales meet the codes they belong to."""
    if scale.ndim == 0:
        return []
    return [len(scale) if i == axis % codes.ndim else 1 for i in range(codes.ndim)]


def _pads(x: Tensor, a: Attributes, value: float = 0.0) -> Tensor:
    pads = a.get("pads", [0, 0, 0, 0])
    if not any(pads):
        return x
    top, left, bottom, right = pads
    return F.pad(x, (left, right, top, bottom), value=value)


def _conv(a: Attributes, x: list[Tensor]) -> Tensor:
    bias = x[2] if len(x) > 2 else None
    pads = a.get("pads", [0, 0, 0, 0])
    data, padding = (x[0], tuple(pads[:2])) if pads[:2] == pads[2:] else (_pads(x[0], a), (0, 0))
    return F.conv2d(
        data,
        x[1],
        bias,
        stride=a.get("strides", 1),
        padding=padding,
        dilation=a.get("dilations", 1),
        groups=a.get("group", 1),
    )


def _max_pool(a: Attributes, x: list[Tensor]) -> Tensor:
    padded = _pads(x[0], a, float("-inf"))
    strides = a.get("strides", [1, 1])
    return F.max_pool2d(padded, a["kernel_shape"], strides, ceil_mode=bool(a.get("ceil_mode", 0)))


def _average_pool(a: Attributes, x: list[Tensor]) -> Tensor:
    pads = a.get("pads", [0, 0, 0, 0])
    return F.avg_pool2d(
        x[0],
        a["kernel_shape"],
        a.get("strides", [1, 1]),
        padding=tuple(pads[:2]),
        ceil_mode=bool(a.get("ceil_mode", 0)),
        count_include_pad=bool(a.get("count_include_pad", 0)),
    )


def _resize(a: Attributes, x: list[Any]) -> Tensor:
    height, width = x[0].shape[2:]
    if len(x) > 3 and x[3] is not None and x[3].numel():
        size = [int(v) for v in x[3][2:]]
    else:
        size = [int(height * float(x[2][2])), int(width * float(x[2][3]))]
    mode = a.get("mode", b"nearest").decode()
    if mode == "nearest":
        return F.interpolate(x[0], size, mode="nearest")
    aligned = a.get("coordinate_transformation_mode", b"") == b"align_corners"
    return F.interpolate(x[0], size, mode="bilinear", align_corners=aligned)


def _slice(a: Attributes, x: list[Any]) -> Tensor:
    data, starts, ends = x[0], x[1].tolist(), x[2].tolist()
    axes = x[3].tolist() if len(x) > 3 and x[3] is not None else list(range(len(starts)))
    steps = x[4].tolist() if len(x) > 4 and x[4] is not None else [1] * len(starts)
    index = [slice(None)] * data.ndim
    for axis, start, end, step in zip(axes, starts, ends, steps, strict=True):
        index[axis] = slice(start, end, step)
    result: Tensor = data[tuple(index)]
    return result


def _split(a: Attributes, x: list[Any]) -> Sequence[Tensor]:
    axis = a.get("axis", 0)
    sizes = x[1].tolist() if len(x) > 1 and x[1] is not None else None
    parts = sizes or -(-x[0].shape[axis] // a.get("num_outputs", 2))
    return torch.split(x[0], parts, axis)


def _reshape(a: Attributes, x: list[Any]) -> Tensor:
    shape = x[1].tolist()
    shape = [x[0].shape[i] if size == 0 else size for i, size in enumerate(shape)]
    result: Tensor = x[0].reshape(len(x[0]), *shape[1:])  # files are made for a batch of one
    return result


def _gather(a: Attributes, x: list[Any]) -> Tensor:
    axis = a.get("axis", 0)
    one: Tensor = x[0].select(axis, int(x[1])) if x[1].ndim == 0 else x[0].index_select(axis, x[1])
    return one


def _clip(a: Attributes, x: list[Any]) -> Tensor:
    low = x[1] if len(x) > 1 else a.get("min")
    high = x[2] if len(x) > 2 else a.get("max")
    ends = [None if end is None else float(end) for end in (low, high)]
    result: Tensor = x[0].clamp(*ends)
    return result


def _softmax(a: Attributes, x: list[Tensor]) -> Tensor:
    return x[0].softmax(a.get("axis", -1))


OPS: Final[dict[str, Callable[[Attributes, list[Any]], Any]]] = {
    "Add": lambda a, x: x[0] + x[1],
    "AveragePool": _average_pool,
    "Cast": lambda a, x: x[0].float() if a["to"] == 1 else x[0],
    "Clip": _clip,
    "Concat": lambda a, x: torch.cat(x, a["axis"]),
    "Conv": _conv,
    "Div": lambda a, x: x[0] / x[1],
    "Exp": lambda a, x: x[0].exp(),
    "Gather": _gather,
    "GlobalAveragePool": lambda a, x: x[0].mean((2, 3), keepdim=True),
    "Identity": lambda a, x: x[0],
    "LeakyRelu": lambda a, x: F.leaky_relu(x[0], a.get("alpha", 0.01)),
    "MaxPool": _max_pool,
    "Mul": lambda a, x: x[0] * x[1],
    "Relu": lambda a, x: F.relu(x[0]),
    "Reshape": _reshape,
    "Resize": _resize,
    "Sigmoid": lambda a, x: x[0].sigmoid(),
    "Slice": _slice,
    "Softmax": _softmax,
    "Split": _split,
    "Sub": lambda a, x: x[0] - x[1],
    "Transpose": lambda a, x: x[0].permute(a["perm"]),
}
"""Operator -> what it does with its attributes and inputs; anything else is refused."""
