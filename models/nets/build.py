"""Make a network by name, and load weights into it from ONNX, safetensors or torch files."""

from __future__ import annotations

import copy
import itertools
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, nn

from ..errors import InputError, MissingExtraError, ModelFileError
from .common import DetectorNet, fold_batchnorm, has_batchnorm
from .nanodet import NanoDetPlus
from .onnx_weights import match_convs, read_onnx_convs
from .yolox import YOLOX


def _ssdlite(num_classes: int) -> DetectorNet:
    from .ssdlite import SSDLite  # torchvision: only who asks for this network needs it

    return SSDLite(num_classes)


NETS: Final[dict[str, Callable[[int], DetectorNet]]] = {
    "yolox_nano": lambda num_classes: YOLOX("nano", num_classes),
    "yolox_tiny": lambda num_classes: YOLOX("tiny", num_classes),
    "yolox_s": lambda num_classes: YOLOX("s", num_classes),
    "nanodet_plus_m": NanoDetPlus,
    "ssdlite320": _ssdlite,
}
"""Network name -> maker, called with the number of classes."""

TORCH_SUFFIXES: Final = (".pth", ".pt", ".ckpt")
SUFFIXES: Final = (".onnx", ".safetensors", *TORCH_SUFFIXES)

_AVERAGED = ("ema_model", "model_ema", "ema")
_NESTS = (*_AVERAGED, "state_dict", "model")
_AVERAGED_PREFIX = "avg_model."
_PREFIXES = ("module.", "model.")
_TRAINING_ONLY = (
    "aux_fpn.",
    "aux_head.",
    "head.distribution_project.",
    "head.project",
    "criterion.",
)
_OPTIONAL = ("pass_index", "branch_index", "out_index", "num_batches_tracked")


def build_net(name: str, num_classes: int = 80) -> DetectorNet:
    """Make a network with random weights, in training mode, normalisation not folded.

    Args:
        name: A key of :data:`NETS`.
        num_classes: Classes to tell apart.

    Returns:
        The network.

    Raises:
        InputError: For a name that is not in the table or fewer than one class.
    """
    if name not in NETS:
        message = f"expected a network out of {', '.join(NETS)}; found {name!r}"
        raise InputError(message)
    if num_classes < 1:
        message = f"expected at least 1 class, found {num_classes}"
        raise InputError(message)
    return NETS[name](num_classes)


def load_weights(net: DetectorNet, path: Path | str) -> None:
    """Load weights into a network; it is left untouched if anything is wrong with them.

    A file whose normalisation is folded (every ONNX file; a checkpoint of a folded network) folds
    the network first. A ``.pth``, ``.pt`` or ``.ckpt`` file is read without running code from it;
    averaged (EMA) weights in it are preferred.

    Args:
        net: What :func:`build_net` returned, with the file's number of classes.
        path: ``.onnx``, ``.safetensors``, ``.pth``, ``.pt`` or ``.ckpt``.

    Raises:
        ModelFileError: Missing, truncated, refused, of another network, or not finite.
    """
    path = Path(path)
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        message = (
            f"{path}: expected a file ending in {', '.join(SUFFIXES)}; found "
            f"{path.suffix or 'no ending'}; rename or convert it"
        )
        raise ModelFileError(message)
    if not path.is_file():
        message = f"{path}: expected a file with weights, found none; check the path"
        raise ModelFileError(message)
    if suffix == ".onnx":
        _load_onnx(net, path)
    else:
        read = _read_safetensors if suffix == ".safetensors" else _read_torch
        _load_state(net, read(path), path)


def _label(net: DetectorNet) -> str:
    """Name a network in messages."""
    return f"{net.net_name} with {net.num_classes} classes"


def _check_finite(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Refuse weights with NaN or infinity."""
    for name, value in tensors.items():
        if value.is_floating_point() and not bool(torch.isfinite(value).all()):
            message = (
                f"{path}: expected finite weights, found NaN or infinity in {name}; "
                "take an earlier checkpoint"
            )
            raise ModelFileError(message)


def _load_onnx(net: DetectorNet, path: Path) -> None:
    """Copy an ONNX file's folded convolutions into a network, which is folded for it."""
    convs = read_onnx_convs(path)
    targets = match_convs(net, convs, path, _label(net))
    weights = [torch.from_numpy(weight) for weight in convs.weights]
    biases = [torch.from_numpy(bias) for bias in convs.biases]
    named = {f"convolution #{i}": t for i, t in enumerate(weights)}
    named |= {f"bias of convolution #{i}": t for i, t in enumerate(biases)}
    _check_finite(named, path)
    fold_batchnorm(net)
    with torch.no_grad():
        for conv, weight, bias in zip(targets, weights, biases, strict=True):
            conv.weight.copy_(weight)
            if conv.bias is None:
                conv.bias = nn.Parameter(torch.zeros_like(conv.weight[:, 0, 0, 0]))
            conv.bias.copy_(bias)


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    """Read a safetensors file."""
    try:
        from safetensors import SafetensorError
        from safetensors.torch import load_file
    except ImportError as error:
        raise MissingExtraError.of(package="safetensors") from error
    try:
        return _clean_names(load_file(str(path)))
    except (SafetensorError, OSError, ValueError) as error:
        message = (
            f"{path}: expected a safetensors file, found one that cannot be read ({error}); "
            "it may be truncated: download or save it again"
        )
        raise ModelFileError(message) from error


def _read_torch(path: Path) -> dict[str, Tensor]:
    """Read a torch file without running code from it, and find the weights inside."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # on old or new pickle protocols: nothing to act on
            content: Any = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged pickle can end in nearly any exception
        if "Unsupported" in str(error) or "GLOBAL" in str(error):
            message = (
                f"{path}: expected tensors only, found other Python objects, which could run code "
                "when loaded, so the file is refused; save the weights as safetensors or with "
                "torch.save(net.state_dict(), ...)"
            )
        else:
            message = (
                f"{path}: expected a torch file with weights, found one that cannot be read "
                f"({type(error).__name__}); it may be truncated: download or save it again"
            )
        raise ModelFileError(message) from error
    while isinstance(content, Mapping):
        inner = next(
            (content[key] for key in _NESTS if isinstance(content.get(key), Mapping)), None
        )
        if inner is None:
            break
        content = inner
    tensors = (
        {str(key): value for key, value in content.items() if isinstance(value, Tensor)}
        if isinstance(content, Mapping)
        else {}
    )
    if not tensors:
        message = (
            f"{path}: expected a state dict (names and tensors), found {type(content).__name__} "
            "without tensors; save net.state_dict()"
        )
        raise ModelFileError(message)
    return _clean_names(tensors)


def _clean_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Take averaged weights where there are any, and strip wrappers' prefixes from names."""
    if any(key.startswith(_AVERAGED_PREFIX) for key in state):
        state = {
            key.removeprefix(_AVERAGED_PREFIX): value
            for key, value in state.items()
            if key.startswith(_AVERAGED_PREFIX)
        }
    clean: dict[str, Tensor] = {}
    for key, value in state.items():
        while prefix := next((p for p in _PREFIXES if key.startswith(p)), ""):
            key = key.removeprefix(prefix)
        clean[key] = value
    return clean


def _load_state(net: DetectorNet, state: dict[str, Tensor], path: Path) -> None:
    """Load a state dict after checking all of it."""
    state = {key: value for key, value in state.items() if not key.startswith(_TRAINING_ONLY)}
    file_folded = not any(key.endswith(".running_mean") for key in state)
    if not file_folded and not has_batchnorm(net):
        message = (
            f"{path}: expected weights of a folded {_label(net)}, found batch normalisation; "
            "load into a network fresh from build_net"
        )
        raise ModelFileError(message)
    fold = file_folded and has_batchnorm(net)
    likeness = copy.deepcopy(net) if fold else net
    if fold:
        fold_batchnorm(likeness)
    target = likeness.state_dict()

    missing = [k for k in target if k not in state and not k.endswith(_OPTIONAL)]
    unknown = [k for k in state if k not in target]
    reshaped = [
        f"{k} {list(target[k].shape)} (found {list(state[k].shape)})"
        for k in target
        if k in state and target[k].shape != state[k].shape
    ]
    faults = (("missing", missing), ("of another shape", reshaped), ("unknown", unknown))
    if parts := [
        f"{len(f)} {what}, e.g. {', '.join(itertools.islice(f, 2))}" for what, f in faults if f
    ]:
        message = (
            f"{path}: expected the {len(target)} entries of {_label(net)}, found "
            f"{'; '.join(parts)}; choose the network that the file belongs to"
        )
        raise ModelFileError(message)
    _check_finite(state, path)
    if fold:
        fold_batchnorm(net)
    net.load_state_dict(net.state_dict() | state)
