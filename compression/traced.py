"""A graph with the size of every tensor and the value of every parameter."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from ..models.graph import QUANTIZERS, require_onnx, tensor_shapes
from .calibrate import session
from .qdq import Links

LAYER_OPS: dict[str, tuple[str, tuple[int, ...]]] = {
    "Conv": ("Conv", (1, 2)),
    "ConvTranspose": ("ConvTranspose", (1, 2)),
    "Gemm": ("Gemm", (1, 2)),
    "MatMul": ("MatMul", (1, 0)),
    "FusedConv": ("Conv", (1, 2)),
    "ConvInteger": ("Conv", (1,)),
    "MatMulInteger": ("MatMul", (1,)),
    "QLinearConv": ("Conv", (3, 8)),
    "QLinearMatMul": ("MatMul", (3,)),
    "QGemm": ("Gemm", (3, 6)),
}
"""Operators whose multiply-accumulates are counted: the float operator that each of them is, and
which of its inputs are parameters, the weights first."""
ACTIVATIONS = ("Relu", "LeakyRelu", "Clip", "HardSwish", "PRelu", "Elu", "Mish", "Gelu")
GATES = ("Sigmoid", "HardSigmoid")
"""With a Mul behind them they are SiLU and hard-swish."""

Array = npt.NDArray[Any]


class Traced:
    """A graph with the size of every tensor and the value of every parameter.

    ONNX Runtime runs the graph once on a black picture, so that shapes are the true ones and
    weights are what they are to it, however they are stored (codes behind a DequantizeLinear,
    float16 behind a Cast, packed bits behind a chain of operators). Where it cannot run the graph,
    ONNX's shape inference has to do.

    Args:
        model: The ``onnx.ModelProto``.
        input_hw: Height and width in pixels, for a graph that leaves them open.

    Attributes:
        model: As it was given.
        links: Who makes and reads what.
        shapes: Of the tensors; missing where unknown.
        itemsize: Bytes per element of the tensors that are known.
        constants: Values of the layers' parameters, by the name that the layer reads.
        sources: Stored tensors behind each constant tensor.
        stored_bytes: Bytes of each stored tensor.
        problem: Why ONNX Runtime could not run it; None if it could.
    """

    def __init__(self, model: Any, input_hw: tuple[int, int] | None = None) -> None:
        self.model = model
        self.links = Links(model.graph)
        self.stored_bytes = {t.name: _bytes(t) for t in model.graph.initializer}
        self.sources: dict[str, tuple[str, ...]] = {n: (n,) for n in self.links.stored}
        for node in model.graph.node:
            inputs = [name for name in node.input if name]
            if node.op_type == "Constant":
                self.sources[node.output[0]] = (node.output[0],)
                self.stored_bytes[node.output[0]] = sum(_bytes(a.t) for a in node.attribute)
            elif inputs and all(name in self.sources for name in inputs):
                found = tuple(sorted({s for name in inputs for s in self.sources[name]}))
                self.sources.update((out, found) for out in node.output if out)
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.itemsize: dict[str, int] = {}
        self.constants: dict[str, Array] = {}
        self.problem = self._run(input_hw)
        if self.problem is not None:
            self._infer()

    def parameters_of(self, node: Any) -> list[str]:
        """Returns the constant tensors that a layer multiplies or adds, the weights first."""
        places = LAYER_OPS[node.op_type][1]
        names = [node.input[i] for i in places if i < len(node.input) and node.input[i]]
        return [name for name in names if name in self.sources]

    def weight_of(self, node: Any) -> Array | None:
        """Returns a layer's weights, or None if it has none or they could not be computed."""
        place = LAYER_OPS[node.op_type][1][0]
        name = node.input[place] if place < len(node.input) else ""
        return self.constants.get(name)

    def _run(self, input_hw: tuple[int, int] | None) -> str | None:
        nodes = self.model.graph.node
        names = [out for node in nodes for out in node.output if out]
        wanted = {
            n for node in nodes if node.op_type in LAYER_OPS for n in self.parameters_of(node)
        }
        try:
            runner = session(self.model, names, optimise=False)
            feeds = {
                i.name: np.zeros(_fixed(i.shape, input_hw), _numpy_type(i.type))
                for i in runner.get_inputs()
            }
            values = runner.run(names, feeds)
        except Exception as error:  # it raises many kinds; the caller says what could not be done
            return " ".join(str(error).split())[:160]
        known = {**feeds, **dict(zip(names, values, strict=True))}
        onnx = require_onnx()
        for name in wanted & self.links.stored.keys():
            known[name] = onnx.numpy_helper.to_array(self.links.stored[name])
        for name, value in known.items():
            if isinstance(value, np.ndarray):
                self.shapes[name] = tuple(int(n) for n in value.shape)
                self.itemsize[name] = value.dtype.itemsize
        self.constants = {name: known[name] for name in wanted if name in known}
        return None

    def _infer(self) -> None:
        onnx = require_onnx()
        shapes = tensor_shapes(self.model)
        self.shapes = {name: shape for name, shape in shapes.items() if shape and all(shape)}
        self.itemsize = dict.fromkeys(self.shapes, 4)
        for node in self.model.graph.node:
            if node.op_type in LAYER_OPS:
                for name in self.parameters_of(node):
                    if name in self.links.stored:
                        stored = self.links.stored[name]
                        self.constants[name] = onnx.numpy_helper.to_array(stored)


def behind_activation(links: Links, name: str) -> str:
    """Returns the tensor behind a layer's activation function: what the next layers read.

    Quantizers on the way are passed; without an activation it is the tensor itself.
    """
    value = _through_quantizers(links, name)
    readers = links.readers[value]
    if len(readers) == 1 and readers[0].op_type in ACTIVATIONS:
        return str(readers[0].output[0])
    gates = [r for r in readers if r.op_type in GATES]
    if len(readers) == 2 and len(gates) == 1:
        gated = _through_quantizers(links, gates[0].output[0])
        product = next(r for r in readers if r is not gates[0])
        if product.op_type == "Mul" and gated in product.input:
            return str(product.output[0])
    return name


def _through_quantizers(links: Links, name: str) -> str:
    while len(links.readers[name]) == 1 and links.readers[name][0].op_type in QUANTIZERS:
        name = links.readers[name][0].output[0]
    return name


def _fixed(shape: list[Any], input_hw: tuple[int, int] | None) -> tuple[int, ...]:
    """Returns an input's shape with what it leaves open filled in: one picture of ``input_hw``."""
    fixed = [n if isinstance(n, int) and n > 0 else 0 for n in shape]
    if fixed and fixed[0] == 0:
        fixed[0] = 1
    if len(fixed) == 4 and input_hw is not None:
        first = 1 if fixed[3] in (1, 3) and fixed[1] not in (1, 3) else 2
        for place, size in zip((first, first + 1), input_hw, strict=True):
            fixed[place] = fixed[place] or size
    if not all(fixed):
        message = f"the input's size is left open: {shape}"
        raise ValueError(message)
    return tuple(fixed)


def _numpy_type(kind: str) -> Any:
    names: Mapping[str, Any] = {"float": np.float32, "double": np.float64, "float16": np.float16}
    inner = kind.removeprefix("tensor(").removesuffix(")")
    return names.get(inner) or np.dtype(inner)


def _bytes(tensor: Any) -> int:
    if tensor.raw_data or not tensor.data_type:
        return len(tensor.raw_data)
    return int(require_onnx().numpy_helper.to_array(tensor).nbytes)
