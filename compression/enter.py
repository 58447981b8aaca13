"""How networks that are not ours come in: any ONNX detector, or a torch module of the user's.

An ONNX file is cut at its last convolutions. The body becomes torch (onnx2torch), is checked
against ONNX Runtime, and can be pruned and trained like our own networks. The tail stays ONNX; it
is put back, unchanged, when the network is exported.
"""

from __future__ import annotations

import copy
import importlib
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from ..models.detector import OnnxDetector
from ..models.errors import InputError, ModelFileError, RecipeError
from ..models.graph import load_model
from ..models.heads import HEADS
from ..models.nets.common import DetectorNet, fold_batchnorm
from ..models.nets.nanodet import NanoDetPlus
from ..models.nets.yolox import YOLOX
from ..models.preprocess import normalise, prepare
from ..models.recognise import read_spec
from ..models.spec import ModelSpec
from .foreign import ForeignNet, convert_onnx
from .linear import linear_as_convs
from .merge_activations import merge_activations
from .plain import plain, trace
from .sever import prepare as prepare_model
from .sever import sever

TOLERANCE = 1e-3
"""Largest difference allowed between ONNX Runtime and torch, relative to the largest output."""
MODULE_TAILS: dict[str, Callable[..., Tensor]] = {
    "yolox": YOLOX.tail,
    "nanodet_plus": NanoDetPlus.tail,
}
"""Heads that a torch module of the user's can have, and how their raw maps become outputs."""


def enter_onnx(path: Path | str, head: str | None = None) -> tuple[ForeignNet, ModelSpec]:
    """Makes a torch network from any ONNX detector.

    Args:
        path: The ONNX file, float.
        head: Key of ``heads.HEADS``, where it cannot be recognised.

    Returns:
        The network in eval mode, and its spec (input ``float_nchw``).

    Raises:
        ModelFileError: The file is damaged, fits no head, is quantized, has operators that cannot
            be converted, or computes something else once converted.
        MissingExtraError: onnx or onnx2torch is missing.
    """
    path = Path(path)
    detector = OnnxDetector(path, head=head)
    try:
        model, spec = prepare_model(load_model(path), detector.spec)
        severed = sever(linear_as_convs(model))
        body = trace(convert_onnx(severed.body))
        plain(body, torch.zeros(1, 3, *spec.input_hw))
        merge_activations(body)
        net = ForeignNet(spec.name or path.stem, spec, severed, body)
        net.eval()
        _check_equal(net, detector, spec)
    except ModelFileError as error:
        message = f"{path}: {error}"
        raise ModelFileError(message) from error
    return net, spec.with_changes(name=spec.name or path.stem)


def _check_equal(net: ForeignNet, detector: OnnxDetector, spec: ModelSpec) -> None:
    """Compares torch with ONNX Runtime on noise, and a batch of two with two of one."""
    random = np.random.default_rng(0)
    pictures = [random.integers(0, 256, (*spec.input_hw, 3), dtype=np.uint8) for _ in range(2)]
    batch = torch.from_numpy(np.concatenate([normalise(p, spec) for p in pictures]))
    try:
        with torch.no_grad():
            levels = net(batch)
            found = net.tail(levels)
    except Exception as error:
        message = (
            "expected a network that takes more than one picture at a time, found one that fixes "
            f"its batch: {' '.join(str(error).split())[:160]}; export it with reshapes that keep "
            "the batch (-1), or only quantize it"
        )
        raise ModelFileError(message) from error
    parts = found if isinstance(found, tuple) else (found,)
    for i, picture in enumerate(pictures):
        wanted = detector.infer(prepare(picture, detector.spec)[0])
        for a, b in zip(wanted, parts, strict=True):
            gap = np.abs(a[0] - b[i].numpy()).max() / max(1.0, np.abs(a).max())
            if not gap <= TOLERANCE:
                message = (
                    f"expected the same outputs from onnx2torch as from ONNX Runtime (to "
                    f"{TOLERANCE} of the largest), found a difference of {gap:.2g}; name a "
                    "network of ours, or only quantize"
                )
                raise ModelFileError(message)


class ModuleNet(DetectorNet):
    """A torch module of the user's with a head of ours.

    Args:
        name: What to call it.
        head: Key of ``MODULE_TAILS``: what its raw maps mean.
        body: Maps a batch to a list of raw maps, finest first.
        strides: Of the raw maps.
        num_classes: How many classes are told apart.
    """

    def __init__(
        self, name: str, head: str, body: nn.Module, strides: tuple[int, ...], num_classes: int
    ) -> None:
        super().__init__()
        self.net_name, self.spec_head = name, head
        self.strides, self.num_classes = strides, num_classes
        self.body = body

    def forward(self, x: Tensor) -> list[Tensor]:
        """Map a normalised float32 batch [B, 3, H, W] to raw maps, finest first."""
        return list(self.body(x))

    def tail(self, levels: list[Tensor]) -> Tensor:
        """Return the outputs in the layout of the head."""
        return MODULE_TAILS[self.spec_head](self, levels)


def enter_module(
    target: str,
    head: str | None = None,
    classes: Sequence[str] | None = None,
    input_hw: tuple[int, int] | None = None,
) -> tuple[DetectorNet, ModelSpec]:
    """Builds a network with a function of the user's, named by its import path.

    The function is called without arguments, or with ``num_classes`` if ``classes`` are given. It
    returns a module that maps a batch to a list of raw maps as ``yolox`` (box 4, objectness 1,
    classes) or ``nanodet_plus`` (classes, 4 x 8 bins) has them, finest level first.

    Args:
        target: ``package.module:function``.
        head: ``yolox`` or ``nanodet_plus``; taken from the module's ``spec_head`` if None.
        classes: Names of the classes.
        input_hw: Height and width in pixels; 416 x 416 if None.

    Returns:
        The network in eval mode, normalisation folded, and its spec.

    Raises:
        RecipeError: The function cannot be imported or called, or its module does not yield what
            its head needs.
    """
    made = _call(target, classes)
    head = head or getattr(made, "spec_head", None)
    if isinstance(made, DetectorNet):
        head = made.spec_head
    elif head not in MODULE_TAILS:
        message = (
            f"model.head: expected one of {', '.join(MODULE_TAILS)} for {target}, found {head!r}; "
            "set it, or give the module a spec_head"
        )
        raise RecipeError(message)
    assert isinstance(head, str)
    height, width = input_hw or (416, 416)
    example = torch.zeros(2, 3, height, width)
    maps = _raw_maps(target, made.eval(), example)
    if isinstance(made, DetectorNet):
        net: DetectorNet = made
    else:
        strides = tuple(round(height / m.shape[2]) for m in maps)
        extra = 5 if head == "yolox" else 32
        count = maps[0].shape[1] - extra
        if count < 1 or any(m.shape[1] != maps[0].shape[1] for m in maps):
            found = ", ".join(str(list(m.shape)) for m in maps)
            message = (
                f"{target}: expected raw maps of {extra} + classes channels for a {head} head, "
                f"found {found}; change the module or model.head"
            )
            raise RecipeError(message)
        name = target.rpartition(":")[2]
        net = ModuleNet(name, head, _rewritten(made, example[:1]), strides, count)
    net = _folded(net.eval(), example)
    return net, _spec_of(target, net, example[:1], classes)


def _call(target: str, classes: Sequence[str] | None) -> nn.Module:
    place, _, function = target.partition(":")
    dotted = [*place.split("."), function]
    if not all(part.isidentifier() for part in dotted):
        message = f"model.module: expected package.module:function, found {target!r}"
        raise RecipeError(message)
    try:
        build = getattr(importlib.import_module(place), function)
    except (ImportError, AttributeError) as error:
        message = (
            f"model.module: expected a function that can be imported, found {target!r} ({error}); "
            "check the name, or set PYTHONPATH to its folder"
        )
        raise RecipeError(message) from error
    try:
        made = build(num_classes=len(classes)) if classes else build()
    except Exception as error:  # the user's own code
        message = f"model.module: {target} raised {type(error).__name__}: {error}"
        raise RecipeError(message) from error
    if not isinstance(made, nn.Module):
        message = f"{target}: expected a torch module, found {type(made).__name__}; return one"
        raise RecipeError(message)
    return made


def _raw_maps(target: str, module: nn.Module, example: Tensor) -> list[Tensor]:
    try:
        with torch.no_grad():
            maps = module(example)
    except Exception as error:  # the user's own code
        message = (
            f"{target}: expected a module that takes a batch {list(example.shape)}, found: "
            f"{' '.join(str(error).split())[:160]}; set model.input_hw"
        )
        raise RecipeError(message) from error
    good = isinstance(maps, (list, tuple)) and all(
        isinstance(m, Tensor) and m.ndim == 4 and len(m) == len(example) for m in maps
    )
    if not good or not maps:
        message = f"{target}: expected a list of raw maps (b, c, h, w), found {type(maps).__name__}"
        raise RecipeError(message)
    return list(maps)


def _rewritten(module: nn.Module, example: Tensor) -> nn.Module:
    """Returns the module with channel splits as choices by index, so that pruning can follow.

    Activations that are functions become modules, so that they can be replaced.
    """
    try:
        graph = trace(module)
        rewritten = plain(graph, example)
        if not (merge_activations(graph) or rewritten):
            return module
        return graph if _alike(module, graph, example) else module
    except InputError:  # it cannot be pruned, but still be distilled and quantized
        return module


@torch.no_grad()
def _alike(one: nn.Module, other: nn.Module, example: Tensor) -> bool:
    """Whether two networks make the same raw maps of noise."""
    noise = torch.rand(example.shape, generator=torch.Generator().manual_seed(0))
    pairs = zip(one(noise), other(noise), strict=True)
    return all(torch.allclose(a, b, atol=1e-3, rtol=1e-3) for a, b in pairs)


@torch.no_grad()
def _folded(net: DetectorNet, example: Tensor) -> DetectorNet:
    """Returns the network with normalisation folded, or as it is where folding changes it."""
    folded = copy.deepcopy(net)
    fold_batchnorm(folded, remember=True)
    return folded if _alike(net, folded, example) else net


def _spec_of(
    target: str, net: DetectorNet, example: Tensor, classes: Sequence[str] | None
) -> ModelSpec:
    with torch.no_grad():
        outputs = net.export_forward(example)
    parts = outputs if isinstance(outputs, tuple) else (outputs,)
    shapes = {f"output_{i}": tuple(part.shape) for i, part in enumerate(parts)}
    try:
        spec = read_spec({"images": tuple(example.shape)}, shapes, {}, net.spec_head)
    except InputError as error:
        message = f"{target}: {error}"
        raise RecipeError(message) from error
    if tuple(HEADS[net.spec_head].strides) != tuple(net.strides):
        message = (
            f"{target}: expected raw maps at strides {list(HEADS[net.spec_head].strides)} for a "
            f"{net.spec_head} head, found {list(net.strides)}"
        )
        raise RecipeError(message)
    if classes is not None and len(classes) != len(spec.classes):
        message = (
            f"model.classes: expected the {len(spec.classes)} names of the network's scores, "
            f"found {len(classes)}"
        )
        raise RecipeError(message)
    changes = {"classes": tuple(classes)} if classes else {}
    return spec.with_changes(name=net.net_name, **changes)
