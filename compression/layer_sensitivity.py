"""How much a detector suffers when one layer alone is pruned, factorised or quantized."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from ..models.dataset import Dataset
from ..models.detections import Detections
from ..models.detector import decode
from ..models.errors import DatasetError
from ..models.evaluate import SCORE_MIN_AP, evaluate_detections
from ..models.files import is_file, sha256, write_json
from ..models.graph import copied, opset_of, require_onnx
from ..models.metrics import PER_PHOTO_MAX
from ..models.preprocess import prepare
from ..models.spec import ModelSpec
from .analyse import Layer
from .calibrate import best_grid, session
from .fidelity import Fidelity
from .redundancy import OfActivations, energy_rank, float_weight, matrices, stored_form
from .traced import LAYER_OPS, Traced

TREATMENTS = ("prune", "factorise", "quantize")
PRUNED_PART = 0.25
"""Part of the output channels that pruning sets to zero: those with the smallest weights."""
RANK_PART = 0.5
"""Part of the energy's rank that factorising leaves."""
QUANTIZER_OPSET = 10
FILE_VERSION = 1


class Judge(Protocol):
    """What says how much a variant suffers: ``Fidelity``, or AP."""

    def loss(self, model: Any) -> float:
        """Returns how much worse a variant is than the original."""


class ApLoss:
    """AP that a variant loses on labelled photos.

    Args:
        model: The original ``onnx.ModelProto``.
        data: With labels.
        spec: Of the model.

    Attributes:
        ap: Of the original, in percent.

    Raises:
        DatasetError: No labels, no class in common, a photo that cannot be read, or no true box.
    """

    def __init__(self, model: Any, data: Dataset, spec: ModelSpec) -> None:
        self.data, self.spec = data, spec
        data.labels()
        self.ap = self._measure(model)
        if not math.isfinite(self.ap):
            message = (
                f"{data.name}: expected true boxes of classes that the model knows, found none in "
                f"{len(data)} photos; give more photos, or leave --eval out"
            )
            raise DatasetError(message)

    def loss(self, model: Any) -> float:
        """Returns points of AP below the original; negative if the variant is better."""
        return self.ap - self._measure(model)

    def _measure(self, model: Any) -> float:
        runner = session(model)
        feed = runner.get_inputs()[0].name
        found: list[Detections] = []
        for photo in self.data.photos:
            tensor, placement = prepare(photo.load(), self.spec)
            raw = runner.run(None, {feed: tensor})
            found.append(decode(raw, self.spec, placement, SCORE_MIN_AP, PER_PHOTO_MAX))
        return evaluate_detections(found, self.spec.classes, self.data).result.ap


class Disagreement:
    """How far a variant's boxes are from the original's, in percent; needs no labels.

    Args:
        model: The original ``onnx.ModelProto``.
        photos: Some dozen.
        spec: Of the model.

    Raises:
        DatasetError: The original sees nothing in any photo, or a photo cannot be read.
    """

    def __init__(self, model: Any, photos: Sequence[Path], spec: ModelSpec) -> None:
        self._fidelity = Fidelity(model, photos, spec)
        if not any(len(found) for found in self._fidelity.reference):
            message = (
                f"expected photos in which the model sees something, found no box in "
                f"{len(photos)}; give photos of what it was trained on"
            )
            raise DatasetError(message)

    def loss(self, model: Any) -> float:
        """Returns 0 for the same boxes and scores, 100 for nothing in common."""
        return 100 * self._fidelity.loss(model)


class Variants:
    """Makes copies of a graph in which one layer is changed.

    Args:
        traced: The graph.
        seen: What the layers' outputs are on photos, by ``Layer.output``; quantizing needs ranges.
    """

    def __init__(self, traced: Traced, seen: Mapping[str, OfActivations]) -> None:
        self.traced, self.seen = traced, seen
        self._nodes = {node.output[0]: node for node in traced.model.graph.node}

    def treatments(self, layer: Layer) -> list[str]:
        """Returns which of ``TREATMENTS`` mean something for a layer.

        Channels that are the detector's outputs cannot be pruned, a depthwise convolution has no
        rank to lower, and what is stored in 8 bits is quantized already.
        """
        node = self._nodes[layer.output]
        weight = float_weight(self.traced, node)
        if weight is None:
            return []
        rows = matrices(weight, node)
        seen = self.seen.get(layer.output)
        rounds = opset_of(self.traced.model) >= QUANTIZER_OPSET and not layer.quantized
        rounds = rounds and self.traced.itemsize.get(layer.behind) == 4
        can = {
            "prune": not layer.last and sum(map(len, rows)) > 1,
            "factorise": max(map(energy_rank, rows)) > 1,
            "quantize": rounds and seen is not None and seen.high > seen.low,
        }
        return [name for name in TREATMENTS if can[name]]

    def make(self, layer: Layer, treatment: str) -> Any:
        """Returns a changed copy of the model.

        Args:
            layer: Which.
            treatment: One of ``treatments(layer)``.
        """
        node = self._nodes[layer.output]
        weight = float_weight(self.traced, node)
        assert weight is not None  # else treatments() has none
        rows = matrices(weight, node)
        bias = self._bias(node)
        if treatment == "prune":
            norm = np.concatenate([np.linalg.norm(m, axis=1) for m in rows])
            kept = np.ones(len(norm))
            kept[np.argsort(norm, kind="stable")[: max(1, round(PRUNED_PART * len(norm)))]] = 0
            parts = np.split(kept, np.cumsum([len(m) for m in rows])[:-1])
            changed = [m * k[:, None] for m, k in zip(rows, parts, strict=True)]
            bias = None if bias is None else (bias * kept).astype(bias.dtype)
        elif treatment == "factorise":
            changed = [_of_rank(m, max(1, int(RANK_PART * energy_rank(m)))) for m in rows]
        else:
            changed = [_rounded(m) for m in rows]
        variant = self._with(node, stored_form(changed, weight, node), bias)
        if treatment == "quantize":
            self._round_output(variant, layer)
        return variant

    def _bias(self, node: Any) -> npt.NDArray[Any] | None:
        if len(node.input) < 3 or not node.input[2]:
            return None
        return self.traced.constants.get(node.input[2])

    def _with(self, node: Any, weight: npt.NDArray[Any], bias: npt.NDArray[Any] | None) -> Any:
        """Returns a copy in which one node reads other parameters; who shares them does not."""
        onnx = require_onnx()
        variant = copied(self.traced.model)
        copy = next(n for n in variant.graph.node if n.output[0] == node.output[0])
        places = LAYER_OPS[node.op_type][1]
        for place, value in ((places[0], weight), (2, bias)):
            if value is not None:
                name = f"{node.output[0]}/changed/{place}"
                variant.graph.initializer.append(onnx.numpy_helper.from_array(value, name))
                copy.input[place] = name
        return variant

    def _round_output(self, variant: Any, layer: Layer) -> None:
        """Puts what the next layers read on an 8-bit grid."""
        onnx = require_onnx()
        seen = self.seen[layer.output]
        grid = best_grid(seen.values, seen.low, seen.high)
        stem = f"{layer.behind}/grid"
        values = {
            f"{stem}/scale": np.array(grid.scale, np.float32),
            f"{stem}/zero": np.array(grid.zero_point, np.uint8),
        }
        for name, value in values.items():
            variant.graph.initializer.append(onnx.numpy_helper.from_array(value, name))
        nodes = variant.graph.node
        place = next(i for i, n in enumerate(nodes) if layer.behind in n.output)
        output = list(nodes[place].output).index(layer.behind)
        nodes[place].output[output] = f"{stem}/float"
        made = (
            ("QuantizeLinear", f"{stem}/float", f"{stem}/codes"),
            ("DequantizeLinear", f"{stem}/codes", layer.behind),
        )
        for offset, (op, source, result) in enumerate(made, 1):
            pair = onnx.helper.make_node(op, [source, *values], [result])
            nodes.insert(place + offset, pair)


def _of_rank(matrix: npt.NDArray[np.float64], rank: int) -> npt.NDArray[np.float64]:
    left, values, right = np.linalg.svd(matrix, full_matrices=False)
    product: npt.NDArray[np.float64] = (left[:, :rank] * values[:rank]) @ right[:rank]
    return product


def _rounded(matrix: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Returns the nearest values on a symmetric 8-bit grid per output channel."""
    scale = np.abs(matrix).max(axis=1, keepdims=True) / 127
    scale[scale == 0] = 1
    rounded: npt.NDArray[np.float64] = np.rint(matrix / scale) * scale
    return rounded


class Kept:
    """What was measured so far, in a file that every measurement is added to at once.

    Args:
        folder: Where to.
        key: Of what a measurement depends on; measurements of another model, of other photos or
            settings are in files of their own.

    Attributes:
        path: The file.
        losses: Layer name -> treatment -> loss.
    """

    def __init__(self, folder: Path, key: str) -> None:
        self.path = folder / f"sensitivity-{key[:12]}.json"
        self.losses: dict[str, dict[str, float]] = {}
        if is_file(self.path):
            self.losses = _read(self.path)

    def put(self, layer: str, treatment: str, loss: float) -> None:
        """Stores one measurement.

        Raises:
            OutputError: The file cannot be written.
        """
        self.losses.setdefault(layer, {})[treatment] = loss
        write_json(self.path, {"version": FILE_VERSION, "losses": self.losses})


def _read(path: Path) -> dict[str, dict[str, float]]:
    """Returns stored measurements; none if the file is damaged: they can be made again."""
    try:
        content = json.loads(path.read_text("utf-8"))
        if content["version"] != FILE_VERSION:
            return {}
        return {
            str(layer): {t: float(v) for t, v in losses.items() if t in TREATMENTS}
            for layer, losses in content["losses"].items()
        }
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return {}


def measurement_key(
    model: Path, spec: ModelSpec, photos: Sequence[Path], data: Dataset | None
) -> str:
    """Returns a digest of all that a measurement depends on."""
    digest = hashlib.sha256()
    parts = [str(FILE_VERSION), str((PRUNED_PART, RANK_PART)), spec.to_json(), sha256(model)]
    parts += [sha256(path) for path in photos]
    if data is not None:
        classes, truths = data.labels()
        parts += ["labelled", json.dumps(classes)]
        parts += [sha256(photo.path) for photo in data.photos]
        for truth in truths:
            digest.update(truth.xyxy.tobytes() + truth.label.tobytes() + truth.iscrowd.tobytes())
    digest.update("\n".join(parts).encode())
    return digest.hexdigest()


def scan(
    variants: Variants,
    layers: Sequence[Layer],
    judge: Callable[[], Judge],
    kept: Kept,
    *,
    progress: Callable[..., Any] = tqdm,
) -> dict[str, dict[str, float]]:
    """Measures every treatment of every layer, one at a time, all else untouched.

    Args:
        variants: Makes the changed models.
        layers: Which; the costliest come first, so that an interrupted scan knows most.
        judge: Makes what measures; called only if something is left to be measured.
        kept: What was measured before is not measured again.
        progress: Like ``tqdm``.

    Returns:
        Layer name -> treatment -> loss.
    """
    tasks = [
        (layer, treatment)
        for layer in sorted(layers, key=lambda one: -one.macs)
        for treatment in variants.treatments(layer)
    ]
    left = [(layer, t) for layer, t in tasks if t not in kept.losses.get(layer.name, {})]
    if left:
        meter = judge()
        done = len(tasks) - len(left)
        with progress(total=len(tasks), initial=done, desc="sensitivity", unit="change") as bar:
            for layer, treatment in left:
                kept.put(layer.name, treatment, meter.loss(variants.make(layer, treatment)))
                bar.update(1)
    return kept.losses
