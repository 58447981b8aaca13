"""Detectors made from ONNX files: a torch body to prune and train, and the file's own tail."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

from ..models.errors import MissingExtraError, ModelFileError
from ..models.graph import copied, opset_of, require_onnx
from ..models.nets.common import DetectorNet
from ..models.spec import ModelSpec
from .arrange import Arrangement, arrange
from .sever import Severed


class ForeignNet(DetectorNet):
    """A detector made from an ONNX file.

    ``forward`` gives levels in our channel order where the roles of the channels could be told
    (``layout`` says what they mean), else the raw maps.

    Args:
        name: What to call it.
        spec: Of the detector, input ``float_nchw``.
        severed: Its two parts.
        body: The first part in torch.
    """

    def __init__(self, name: str, spec: ModelSpec, severed: Severed, body: fx.GraphModule) -> None:
        super().__init__()
        self.net_name, self.spec_head = name, spec.head
        self.strides, self.num_classes = spec.strides, len(spec.classes)
        self.body = body
        self.map_names, self.map_shapes = severed.maps, severed.shapes
        self.tail_onnx: bytes = severed.tail.SerializeToString()
        self._tail = [convert_onnx(severed.tail)]  # in a list: it is no part of what is trained
        softmax = any(n.op_type == "Softmax" for n in severed.tail.graph.node)
        self.arrangement: Arrangement = arrange(self._run_tail, self.map_shapes, spec, softmax)
        self.layout = self.arrangement.layout

    def maps(self, x: Tensor) -> list[Tensor]:
        """Returns the raw maps, as ``map_names`` names them, for a batch ``(b, 3, h, w)``."""
        result = self.body(x)
        return [result] if len(self.map_names) == 1 else list(result)

    def forward(self, x: Tensor) -> list[Tensor]:
        """Map a normalised float32 batch [B, 3, H, W] to levels, finest first."""
        return self.arrangement.join(self.maps(x))

    def tail(self, levels: list[Tensor]) -> Any:
        """Return the outputs of the original file: a tensor, or a tuple if there are several."""
        maps = self.arrangement.split(levels, [shape[1] for shape in self.map_shapes])
        maps = [m.cpu().float() for m in maps]
        pictures = [self._run_tail([m[i : i + 1] for m in maps]) for i in range(len(maps[0]))]
        outputs = tuple(torch.cat(parts) for parts in zip(*pictures, strict=True))
        return outputs[0] if len(outputs) == 1 else outputs

    def _run_tail(self, maps: Sequence[Tensor]) -> Sequence[Tensor]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the converter's own indexing
            result = self._tail[0](*maps)
        return [result] if isinstance(result, Tensor) else list(result)


class RawMaps(DetectorNet):
    """A foreign network without its tail: what the exporter is given.

    Args:
        net: The network; not copied.
    """

    def __init__(self, net: ForeignNet) -> None:
        super().__init__()
        self.net = net
        self.training = net.training

    def export_forward(self, x: Tensor) -> Any:
        """Return the raw maps of x [B, 3, H, W] as a tuple."""
        return tuple(self.net.maps(x))


def convert_onnx(model: Any) -> fx.GraphModule:
    """Returns an ONNX model as a torch graph.

    Raises:
        ModelFileError: The converter does not know an operator.
        MissingExtraError: onnx2torch is missing.
    """
    try:
        from onnx2torch import convert
    except ImportError as error:
        raise MissingExtraError.of(package="onnx2torch") from error
    try:
        converted: fx.GraphModule = convert(model)
    except Exception as error:  # the converter raises many kinds for what it does not know
        message = (
            "expected operators that onnx2torch can convert, found: "
            f"{' '.join(str(error).split())[:200]}; name a network of ours, or only quantize"
        )
        raise ModelFileError(message) from error
    return converted


def export_foreign(net: ForeignNet, spec: ModelSpec) -> Any:
    """Returns a foreign network, pruned or not, as an ``onnx.ModelProto`` with its own tail."""
    from .export import export_onnx

    return reattach_tail(net, export_onnx(RawMaps(net), spec))


def reattach_tail(net: ForeignNet, body: Any) -> Any:
    """Puts the original tail behind an exported body.

    Args:
        net: The network that the body was exported from.
        body: ``onnx.ModelProto`` of ``RawMaps(net)``: one input, the raw maps as outputs.

    Returns:
        A model with the output names and layout of the original file.

    Raises:
        ModelFileError: The body has other outputs than the tail takes.
    """
    onnx = require_onnx()
    from onnx import version_converter

    tail = onnx.ModelProto.FromString(net.tail_onnx)
    if len(body.graph.output) != len(net.map_names):
        message = (
            f"expected a body with {len(net.map_names)} raw maps, found "
            f"{len(body.graph.output)} outputs; export RawMaps(net)"
        )
        raise ModelFileError(message)
    opset = max(opset_of(body), opset_of(tail))
    body, tail = (
        version_converter.convert_version(part, opset) if opset_of(part) < opset else part
        for part in (body, tail)
    )
    names = {o.name: m for o, m in zip(body.graph.output, net.map_names, strict=True)}
    used = {n for node in tail.graph.node for n in (*node.input, *node.output)} | {""}
    names.update({i.name: f"{i.name}_in" if i.name in used else i.name for i in body.graph.input})
    result = copied(body)
    graph = result.graph

    def renamed(name: str) -> str:
        return names.setdefault(name, f"body/{name}" if name in used - {""} else name)

    for value in [*graph.input, *graph.output, *graph.initializer]:
        value.name = renamed(value.name)
    for node in graph.node:
        node.input[:] = [renamed(name) if name else "" for name in node.input]
        node.output[:] = [renamed(name) if name else "" for name in node.output]
    taken = {node.name for node in graph.node}
    for node in tail.graph.node:
        node.name = f"tail/{node.name}" if node.name in taken else node.name
    del graph.value_info[:]
    del graph.output[:]
    graph.node.extend(tail.graph.node)
    graph.initializer.extend(tail.graph.initializer)
    graph.output.extend(tail.graph.output)
    onnx.checker.check_model(result)
    return result
