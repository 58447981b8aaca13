"""Where a detector comes in: a network by name, a function that builds one, or any ONNX file."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..models.detector import OnnxDetector
from ..models.errors import InputError, ModelFileError, RecipeError
from ..models.files import sha256
from ..models.graph import load_model
from ..models.heads import HEADS
from ..models.nets.build import NETS, build_net, load_weights
from ..models.nets.common import DetectorNet, fold_batchnorm
from ..models.nets.onnx_weights import read_onnx_convs
from ..models.recognise import read_spec
from ..models.spec import ModelSpec
from ..models.zoo import shipped_float
from .enter import enter_module, enter_onnx
from .export import get_metadata
from .recipe import ModelSource
from .state import NET_KEY, Edit, apply_edits, weights_digest

DEFAULT_HW = {"ssdlite": (320, 320)}


@dataclass(frozen=True)
class Entered:
    """A detector that has come in.

    Attributes:
        net: Normalisation folded, eval mode.
        spec: Input float, not folded.
        digest: SHA-256 of what it was made from.
        origin: How to build it again by name; empty for foreign ones.
        edits: What had been done to it before.
    """

    net: DetectorNet
    spec: ModelSpec
    digest: str
    origin: dict[str, Any] = field(default_factory=dict)
    edits: tuple[Edit, ...] = ()


def enter(source: ModelSource | Literal["shipped"], seed: int = 0) -> Entered:
    """Returns the detector that a recipe names, ready to be compressed.

    Args:
        source: The recipe's ``model``.
        seed: Of random weights, where a function makes some.

    Raises:
        ModelFileError: A file is missing, damaged, of another network, or fits no head.
        RecipeError: The source's settings do not fit it.
    """
    torch.manual_seed(seed)
    if source == "shipped":
        return _from_file(ModelSource(file=shipped_float()))
    if source.file is not None:
        return _from_file(source)
    if source.name is not None:
        return _from_name(source, source.name)
    return _from_module(source)


def _from_name(source: ModelSource, name: str) -> Entered:
    assert source.weights is not None
    spec: ModelSpec | None = None
    if source.weights.suffix.lower() == ".onnx":
        spec = _plain(OnnxDetector(source.weights, head=source.head).spec)
        if source.input_hw not in (None, spec.input_hw):
            message = (
                f"model.input_hw: expected {list(spec.input_hw)} as in {source.weights.name}, "
                f"found {list(source.input_hw or ())}; to change the size set data.input_hw"
            )
            raise RecipeError(message)
    count = len(source.classes) if source.classes else len(spec.classes) if spec else 80
    net = build_net(name, count)
    load_weights(net, source.weights)
    fold_batchnorm(net, remember=True)  # nothing to remember where the file came folded
    net.eval()
    spec = _adjusted(spec or _spec_of(net, source), source, name)
    digest = f"{name}:{sha256(source.weights)}"
    return Entered(net, spec, digest, {"net": name, "classes": count})


def _from_file(source: ModelSource) -> Entered:
    assert source.file is not None
    path = source.file
    spec = _plain(OnnxDetector(path, head=source.head).spec)
    digest = f"file:{sha256(path)}"
    model = load_model(path)
    if any(node.op_type in ("QuantizeLinear", "DequantizeLinear") for node in model.graph.node):
        message = (
            f"{path}: expected a float model, found a quantized one; compress the file that it was "
            "made from"
        )
        raise ModelFileError(message)
    spec = _adjusted(spec, source, spec.name or path.stem)
    description = get_metadata(model, NET_KEY)
    if description is not None:
        return _from_description(path, spec, digest, description)
    for name in NETS:  # a published file of a network that we have
        if name.startswith(spec.head.split("_")[0]):
            net = build_net(name, len(spec.classes))
            try:
                load_weights(net, path)
            except ModelFileError:
                continue
            fold_batchnorm(net)
            return Entered(net.eval(), spec, digest, {"net": name, "classes": len(spec.classes)})
    foreign, spec = enter_onnx(path, source.head)
    return Entered(foreign.eval(), _adjusted(_plain(spec), source, spec.name), digest)


def _from_description(path: Path, spec: ModelSpec, digest: str, text: str) -> Entered:
    """Builds one of our own exported networks again."""
    try:
        stored = json.loads(text)
        name, count = str(stored["net"]), int(stored["classes"])
        edits = tuple(dict(edit) for edit in stored["edits"])
        order = [str(conv) for conv in stored["convs"]]
        if count != len(spec.classes):
            message = f"{count} classes, its spec {len(spec.classes)}"
            raise ValueError(message)
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
        message = f"{path}: expected the description of a network, found: {error}; export it again"
        raise ModelFileError(message) from error
    net = build_net(name, count).eval()
    fold_batchnorm(net)
    net = apply_edits(net, edits, torch.zeros(1, 3, *spec.input_hw))
    convs = read_onnx_convs(path)
    modules = dict(net.named_modules())
    try:
        with torch.no_grad():
            for conv, weight, bias in zip(order, convs.weights, convs.biases, strict=True):
                fill_conv(modules[conv], torch.from_numpy(weight), torch.from_numpy(bias))
    except (KeyError, ValueError, AttributeError) as error:
        message = f"{path}: expected the weights of a {name}, found: {error}; export it again"
        raise ModelFileError(message) from error
    return Entered(net.eval(), spec, digest, {"net": name, "classes": count}, edits)


def fill_conv(conv: nn.Module, weight: Tensor, bias: Tensor) -> None:
    """Puts weights into a convolution.

    Raises:
        ValueError: It is none, or of another shape.
    """
    if not isinstance(conv, nn.Conv2d) or conv.weight.shape != weight.shape:
        message = f"weights of shape {list(weight.shape)} for {conv}"
        raise ValueError(message)
    conv.weight.copy_(weight)
    if conv.bias is None:
        conv.bias = nn.Parameter(torch.zeros_like(bias))
    conv.bias.copy_(bias)


def _from_module(source: ModelSource) -> Entered:
    assert source.module is not None
    net, spec = enter_module(source.module, source.head, source.classes, source.input_hw)
    if source.weights is not None:
        try:
            load_weights(net, source.weights)
            for child in net.modules():
                child.__dict__.pop("bn_scale", None)  # they were of other weights
        except ModelFileError as error:
            message = f"{error}; or load them in {source.module} itself"
            raise ModelFileError(message) from error
    spec = _adjusted(_plain(spec), source, spec.name or net.net_name)
    return Entered(net.eval(), spec, f"module:{source.module}:{weights_digest(net)}")


def _spec_of(net: DetectorNet, source: ModelSource) -> ModelSpec:
    """Returns the spec of a network whose file says nothing: what is usual for its head."""
    if net.spec_head not in HEADS:
        message = f"model: expected a head of {', '.join(HEADS)}, found {net.spec_head!r}"
        raise RecipeError(message)
    height, width = source.input_hw or DEFAULT_HW.get(net.spec_head, (416, 416))
    try:
        with torch.no_grad():
            outputs = net.export_forward(torch.zeros(1, 3, height, width))
    except RuntimeError as error:
        message = (
            f"model.input_hw: expected a size that {net.net_name} takes, found {height}x{width} "
            f"({' '.join(str(error).split())[:100]}); take multiples of {max(net.strides)}"
        )
        raise RecipeError(message) from error
    parts: Sequence[Tensor] = outputs if isinstance(outputs, tuple) else (outputs,)
    shapes = {f"output_{i}": tuple(part.shape) for i, part in enumerate(parts)}
    try:
        return read_spec({"images": (1, 3, height, width)}, shapes, {}, net.spec_head)
    except InputError as error:
        message = f"model: {error}"
        raise RecipeError(message) from error


def _adjusted(spec: ModelSpec, source: ModelSource, name: str) -> ModelSpec:
    changes: dict[str, Any] = {"name": name}
    for key in ("color", "resize"):
        if getattr(source, key) is not None:
            changes[key] = getattr(source, key)
    if source.classes is not None:
        if len(source.classes) != len(spec.classes):
            message = (
                f"model.classes: expected the {len(spec.classes)} names of the network's scores, "
                f"found {len(source.classes)}"
            )
            raise RecipeError(message)
        changes["classes"] = source.classes
    return spec.with_changes(**changes)


def _plain(spec: ModelSpec) -> ModelSpec:
    """Returns the spec of the network itself, without what an exported file folds into it."""
    return spec.with_changes(input_format="float_nchw")
