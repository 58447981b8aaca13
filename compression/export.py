"""From a torch network to an ONNX file that knows everything about itself, and back to numbers."""

from __future__ import annotations

import contextlib
import copy
import hashlib
import io
import json
import logging
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..models.detections import Detections, FloatArray
from ..models.detector import decode
from ..models.errors import MissingExtraError, ModelFileError
from ..models.evaluate import SCORE_MIN_AP
from ..models.graph import load_model, require_onnx
from ..models.nets.common import DetectorNet, WithTail
from ..models.preprocess import Image, fit, normalise
from ..models.spec import ModelSpec
from .calibrate import session
from .foreign import ForeignNet, export_foreign
from .onnx_io import OPSET, fold_preprocess, save_model, tidy
from .state import NET_KEY

TOLERANCE = 2e-3
"""Largest difference between torch and ONNX Runtime, relative to the largest output."""
EXPORT_OPSET = 18


class TorchDetector:
    """A torch network as a detector: the same pre- and post-processing as ``OnnxDetector``.

    Args:
        net: In eval mode.
        spec: Of the network.
    """

    def __init__(self, net: DetectorNet, spec: ModelSpec) -> None:
        self.net = net
        self.spec = spec.with_changes(input_format="float_nchw")

    def infer(self, tensor: FloatArray) -> list[FloatArray]:
        """Runs the network on one prepared picture and returns its raw outputs."""
        with torch.no_grad():
            outputs = self.net.export_forward(torch.from_numpy(tensor))
        parts = outputs if isinstance(outputs, tuple) else (outputs,)
        return [part.float().numpy() for part in parts]

    def __call__(
        self, image: Image, score_min: float = SCORE_MIN_AP, limit: int = 100
    ) -> Detections:
        """Detects in one BGR picture, uint8 ``(height, width, 3)``."""
        fitted, placement = fit(image, self.spec)
        outputs = self.infer(normalise(fitted, self.spec))
        return decode(outputs, self.spec, placement, score_min, limit)


def export_onnx(net: DetectorNet, spec: ModelSpec, *, traced: bool = True) -> Any:
    """Returns a network as a plain float ``onnx.ModelProto`` that takes float ``(1, 3, h, w)``.

    Args:
        net: In eval mode.
        spec: Its spec.
        traced: Use torch's older exporter: ten times as fast, and the only one that works on all
            versions that we support. Where it is gone, and if False, the newer one is used.

    Raises:
        ModelFileError: Torch cannot export the network.
        MissingExtraError: The packages onnx or onnxscript are missing.
    """
    require_onnx()
    wrapped = WithTail(copy.deepcopy(net).eval().cpu().float())
    example = torch.zeros(1, 3, *spec.input_hw)
    with torch.no_grad():
        outputs = net.export_forward(example)
    count = len(outputs) if isinstance(outputs, tuple) else 1
    settings: dict[str, Any] = {
        "input_names": ["images"],
        "output_names": ["output"] if count == 1 else [f"output_{i}" for i in range(count)],
    }
    quiet = logging.getLogger("torch.onnx")
    level = quiet.level
    quiet.setLevel(logging.ERROR)
    try:
        # Both exporters talk of their versions on both streams; nothing there to act on.
        with warnings.catch_warnings(), _silence():
            warnings.simplefilter("ignore")
            if traced:
                with contextlib.suppress(TypeError, NotImplementedError, ImportError):
                    return _traced(wrapped, example, settings)
            return _exported(wrapped, example, settings)
    except (MissingExtraError, OSError):  # a full disk is not the network's fault
        raise
    except Exception as error:  # torch's exporters raise many kinds
        message = (
            "expected a network that torch can export to ONNX, found: "
            f"{' '.join(str(error).split())[:200]}"
        )
        raise ModelFileError(message) from error
    finally:
        quiet.setLevel(level)


def _traced(wrapped: WithTail, example: Tensor, settings: dict[str, Any]) -> Any:
    with tempfile.TemporaryDirectory(prefix="edgesight-") as folder:
        path = Path(folder) / "traced.onnx"
        torch.onnx.export(wrapped, (example,), path, opset_version=OPSET, dynamo=False, **settings)
        return load_model(path)


def _exported(wrapped: WithTail, example: Tensor, settings: dict[str, Any]) -> Any:
    try:
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise MissingExtraError.of(package="onnxscript") from error
    program = torch.onnx.export(
        wrapped, (example,), dynamo=True, opset_version=EXPORT_OPSET, **settings
    )
    assert program is not None, "torch's newer exporter returns what it made"
    model = program.model_proto
    for node in model.graph.node:  # notes for debugging: most of a small model's bytes
        del node.metadata_props[:]
        node.doc_string = ""
    for value in [*model.graph.value_info, *model.graph.input, *model.graph.output]:
        del value.metadata_props[:]
    del model.graph.metadata_props[:]
    del model.metadata_props[:]
    return model


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        yield


def export_detector(
    net: DetectorNet,
    spec: ModelSpec,
    path: Path,
    photos: Sequence[Image] = (),
    description: str | None = None,
) -> ModelSpec:
    """Writes a network as a self-describing ONNX file that takes OpenCV's bytes as they are.

    Args:
        net: In eval mode, normalisation folded.
        spec: Its spec.
        path: Where to.
        photos: Real pictures on which torch and ONNX Runtime are compared; a grey one if empty.
        description: From ``state.describe``; stored under ``NET_KEY`` with the names of the
            convolutions in the file's order, so that the file can come in again.

    Returns:
        The spec in the file (input ``uint8_nhwc``).

    Raises:
        ModelFileError: Torch cannot export it, or ONNX Runtime computes something else.
        OutputError: The file cannot be written.
    """
    spec = spec.with_changes(input_format="float_nchw")
    plain = export_foreign(net, spec) if isinstance(net, ForeignNet) else export_onnx(net, spec)
    model, folded = fold_preprocess(tidy(plain), spec)
    order = conv_order(net, model) if description is not None else None
    if description is not None and order is not None:
        named = json.loads(description) | {"convs": order}
        set_metadata(model, NET_KEY, json.dumps(named, separators=(",", ":")))
    pictures = photos or [np.full((*spec.input_hw, 3), 114, np.uint8)]
    difference = largest_difference(net, model, spec, pictures)
    if not difference <= TOLERANCE:
        message = (
            f"{path}: expected ONNX Runtime to compute what torch computes (to {TOLERANCE} of the "
            f"largest output), found a difference of {difference:.2g}; please report this"
        )
        raise ModelFileError(message)
    save_model(model, path, folded)
    return folded


def largest_difference(
    net: DetectorNet, model: Any, spec: ModelSpec, pictures: Sequence[Image]
) -> float:
    """Returns the largest difference between torch and the exported graph, both on pictures.

    The graph gets the resized bytes, torch what ``normalise`` makes of them. Relative to the
    largest output of each tensor.
    """
    runner = session(model)
    feed = runner.get_inputs()[0].name
    torch_side = TorchDetector(net, spec)
    worst = 0.0
    for picture in pictures:
        fitted, _ = fit(picture, spec)
        wanted = torch_side.infer(normalise(fitted, spec))
        found = runner.run(None, {feed: fitted[None]})
        for a, b in zip(wanted, found, strict=True):
            gap = float(np.abs(a - b).max() / max(1.0, float(np.abs(a).max())))
            worst = max(worst, gap if np.isfinite(gap) else float("inf"))
    return worst


def conv_order(net: DetectorNet, model: Any) -> list[str] | None:
    """Returns which module each ``Conv`` of an exported graph is, in the graph's order.

    Optimisation renames and reorders nodes, so they are told by their weights. None if a
    convolution was changed on the way: the file can then not come in by name.
    """
    numpy_helper = require_onnx().numpy_helper
    names: dict[bytes, list[str]] = {}
    for name, module in net.named_modules():
        if isinstance(module, nn.Conv2d):
            names.setdefault(_mark(module.weight, module.bias), []).append(name)
    stored = {t.name: t for t in model.graph.initializer}
    order = []
    for node in model.graph.node:
        if node.op_type != "Conv":
            continue
        if not all(name in stored for name in node.input[1:]):
            return None
        parts = [torch.from_numpy(numpy_helper.to_array(stored[n]).copy()) for n in node.input[1:]]
        alike = names.get(_mark(parts[0], parts[1] if len(parts) > 1 else None))
        if not alike:
            return None
        order.append(alike.pop(0))
    return order if not any(names.values()) else None


def _mark(weight: Tensor, bias: Tensor | None) -> bytes:
    bias = torch.zeros(len(weight)) if bias is None else bias
    values = [t.detach().float().contiguous().numpy().tobytes() for t in (weight, bias)]
    return hashlib.sha256(repr(tuple(weight.shape)).encode() + b"".join(values)).digest()


def set_metadata(model: Any, key: str, value: str | None) -> None:
    """Sets one entry of a model's metadata; None removes it."""
    kept = [p for p in model.metadata_props if p.key != key]
    if value is not None:
        kept.append(require_onnx().StringStringEntryProto(key=key, value=value))
    del model.metadata_props[:]
    model.metadata_props.extend(kept)


def get_metadata(model: Any, key: str) -> str | None:
    """Returns one entry of a model's metadata, or None."""
    return next((str(p.value) for p in model.metadata_props if p.key == key), None)
