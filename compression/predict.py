"""About how many instructions a model takes on a core, from the tables of ``models.core_costs``.

Good to compare variants of a network with, many times a minute; ``edgesight cost`` counts.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np

from ..models.core_costs import CHANNELWISE, OPERATORS, POOL_TAPS, conv_instructions
from ..models.graph import MAC_OPS, attributes, initializers, node_macs, tensor_shapes
from .qdq import CLIPPING_OPS, SAME_GRID_OPS, Links, truncates

QUANTIZE: Final = "QuantizeLinear"
DEQUANTIZE: Final = "DequantizeLinear"
INT8: Final = 3
"""Type of numbers in ONNX files."""


def predicted_instructions(model: Any, core: str) -> float:
    """Returns about how many instructions a model takes on a core.

    Args:
        model: An ``onnx.ModelProto`` with fixed sizes, float or QDQ.
        core: One of ``core_costs.CORES``.

    Raises:
        ModelFileError: The sizes cannot be inferred.
    """
    return predicted_convs(model, core) + predicted_others(model)


def predicted_others(model: Any) -> float:
    """Returns about how many instructions all but convolutions and matrix products take.

    What ONNX Runtime fuses into a convolution costs nothing here: a ReLU, and a float LeakyReLU. An
    operator between quantizers counts as the integer one, and those quantizers then cost nothing.
    What depends on stored tensors only is computed on loading. Operators that
    ``core_costs.OPERATORS`` does not know are left out.
    """
    reader = _Reader(model)
    return sum(reader.cost(node) for node in model.graph.node)


class _Reader:
    """Tells what ONNX Runtime makes of each operator of a graph.

    Args:
        model: An ``onnx.ModelProto``.
    """

    def __init__(self, model: Any) -> None:
        """Finds out which operators compute with integers."""
        self.links, self.shapes = Links(model.graph), tensor_shapes(model)
        self.constant: set[str] = set(self.links.stored)
        for node in model.graph.node:
            if all(name in self.constant for name in node.input if name):
                self.constant.update(node.output)
        self.whole = {node.output[0]: self._integer(node) for node in model.graph.node}

    def data(self, node: Any) -> list[str]:
        """Returns the tensors that a node computes on, other than constant and shape inputs."""
        names = node.input[:1] if node.op_type in SAME_GRID_OPS else node.input
        return [name for name in names if name and name not in self.constant]

    def _integer(self, node: Any) -> bool:
        if truncates(node):
            return False
        names = [*self.data(node), *(node.input[1:2] if node.op_type in MAC_OPS else ())]
        makers = [self.links.maker.get(name) for name in names]
        ends = [r for out in node.output for r in self.links.readers[out]]
        if len(ends) == 1 and ends[0].op_type in CLIPPING_OPS:
            ends = self.links.readers[ends[0].output[0]]
        grids = bool(makers) and all(
            m is not None and m.op_type == DEQUANTIZE and not m.domain for m in makers
        )
        return grids and bool(ends) and all(e.op_type == QUANTIZE for e in ends)

    def _maker(self, name: str) -> Any:
        """Returns what made a tensor's numbers: quantizers and clipping are looked through."""
        node = self.links.maker.get(name)
        while node is not None and node.op_type in (QUANTIZE, DEQUANTIZE, *CLIPPING_OPS):
            node = self.links.maker.get(node.input[0])
        return node

    def _from_float(self, name: str) -> bool:
        maker = self._maker(name)
        return maker is None or not self.whole[maker.output[0]]

    def cost(self, node: Any) -> float:
        """Returns the instructions of an operator; 0 for convolutions and what they swallow.

        ReLU and Clip count as swallowed everywhere: elsewhere than behind a convolution they are
        rare and cheap.
        """
        kind, out = node.op_type, node.output[0]
        if kind in (*MAC_OPS, *CLIPPING_OPS) or not self.data(node):
            return 0.0
        integer, shape = self.whole[out], self.shapes.get(out, (0,))
        readers, scale = self.links.readers[out], 1.0
        if kind == QUANTIZE and not self._from_float(node.input[0]):
            return 0.0
        if kind == DEQUANTIZE and readers and all(self.whole[r.output[0]] for r in readers):
            return 0.0
        if kind == "LeakyRelu" and not integer:
            maker = self.links.maker.get(node.input[0])
            if maker is not None and maker.op_type == "Conv":
                return 0.0
        if kind == "MaxPool":
            scale = float(np.prod(attributes(node)["kernel_shape"])) / POOL_TAPS
            # ONNX Runtime rounds in front of a pooling, not behind it, and between float and
            # integers channels come first there.
            rounded = integer or (bool(readers) and all(r.op_type == QUANTIZE for r in readers))
            if rounded and self._from_float(node.input[0]):
                kind = "QLinearMaxPool, channels first"
        if integer and f"QLinear{kind}" in OPERATORS:
            kind = f"QLinear{kind}"
        call, each = OPERATORS.get(kind, (0.0, 0.0))
        numbers = float(np.prod(shape))
        total = call + scale * each * numbers
        if kind == "QLinearMul":
            sizes = [float(np.prod(self.shapes.get(name, ()))) for name in node.input[:2]]
            if 1 < min(sizes) < max(sizes):
                total += CHANNELWISE * numbers / min(sizes)
        return total


def predicted_convs(model: Any, core: str) -> float:
    """Returns about how many instructions the convolutions of a model take on a core.

    Convolutions between quantizers count as integer ones, signed or unsigned as their input.

    Args:
        model: An ``onnx.ModelProto`` with fixed sizes.
        core: One of ``core_costs.CORES``.

    Raises:
        ModelFileError: The sizes cannot be inferred.
    """
    shapes, stored = tensor_shapes(model), initializers(model)
    producer = {out: node for node in model.graph.node for out in node.output}
    macs = node_macs(model)
    total = 0.0
    for node in model.graph.node:
        if node.output[0] not in macs:
            continue
        kind = _numbers(node, producer, stored)
        if node.op_type == "ConvTranspose":  # in float, whatever is around it: one product
            inputs, per_group, *sizes = shapes[node.input[1]]
            groups, outputs = attributes(node).get("group", 1), per_group * int(np.prod(sizes))
            cells = int(np.prod(shapes[node.input[0]][2:]))
            each = conv_instructions(core, "float", inputs // groups, outputs, (1, 1), 1, cells)
            total += groups * each
            continue
        if node.op_type != "Conv":  # a matrix product is a 1x1 convolution of one cell
            outputs = shapes[node.output[0]][-1]
            inputs = shapes[node.input[0]][-1]
            cells = max(1, macs[node.output[0]] // max(1, inputs * outputs))
            total += conv_instructions(core, kind, inputs, outputs, (1, 1), 1, cells)
            continue
        settings = attributes(node)
        groups, strides = settings.get("group", 1), settings.get("strides", (1,))
        outputs, per_group, *sizes = shapes[node.input[1]]
        kernel = (int(np.prod(sizes[:-1])), sizes[-1])  # one of one or three axes: of so many taps
        cells = int(np.prod(shapes[node.output[0]][2:]))
        total += conv_instructions(
            core, kind, per_group * groups, outputs, kernel, groups, cells, max(strides)
        )
    return total


def _numbers(node: Any, producer: dict[str, Any], stored: dict[str, Any]) -> str:
    """Returns in which numbers a convolution computes: ``float``, ``s8`` or ``u8``."""
    sources = [producer.get(name) for name in node.input[:2]]
    readers = [s for s in sources if s is not None and s.op_type == "DequantizeLinear"]
    if len(readers) < 2:
        return "float"
    zero = stored.get(readers[0].input[2]) if len(readers[0].input) > 2 else None
    if readers[0].domain:  # 16 bits: ONNX Runtime multiplies floats
        return "float"
    return "s8" if zero is not None and zero.data_type == INT8 else "u8"
