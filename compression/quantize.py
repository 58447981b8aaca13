"""Static INT8 after training: every convolution in integers, with nothing named by hand."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from ..models.detections import FloatArray
from ..models.errors import DatasetError, ModelFileError, RecipeError
from ..models.graph import require_onnx
from ..models.spec import ModelSpec
from .calibrate import Grid, Seen, best_grid, chosen_photos, observe, sigmoid
from .equalise import channel_factors, label_channels, rescale, rescaled_seen, silu_gates
from .fidelity import Fidelity
from .lean import lean
from .onnx_io import tidy, write_spec
from .qdq import CLIPPING_OPS, Layout, Links, insert, is_weighted, plan_layout
from .rounding import round_weights
from .sensitivity import Budget, NoiseMeter, first_nodes, noisiest_nodes, scan


@dataclass(frozen=True)
class Target:
    """What quantization has to know about a processor core.

    Attributes:
        signed: int8 activations are the faster ones; else uint8.
        why: Where that is from.
    """

    signed: bool
    why: str


TARGETS: dict[str, Target] = {
    "cortex-a76": Target(True, "signed dot product: fewest instructions with int8 activations"),
    "cortex-a72": Target(False, "no dot product: fewest instructions with uint8 activations"),
    "x86-64": Target(False, "VNNI multiplies uint8 by int8; int8 activations fall back to float"),
}


KnownGrids = dict[tuple[str, ...], Grid]
CHECK_PHOTOS = 64
NOISE_PHOTOS = 4
STRENGTHS = (0.75, 0.6, 0.9)
FIRST_COUNTS: tuple[int, ...] = (1, 2, 4, 6, 8)
NOISIEST_COUNTS: tuple[int, ...] = (1, 2, 4, 8, 16, 32)
GAIN_MIN = 0.015
"""A change that lowers the disagreement by a smaller part of itself is not worth it."""
SHOWN = 16


@dataclass(frozen=True)
class QuantizeConfig:
    """How to quantize.

    Attributes:
        target: Key of ``TARGETS``: the core that the file is for.
        photos_max: So many photos at most are used, picked with ``seed``.
        seed: Of everything random.
        integer_share_min: At least this part of the convolution MACs stays integer, 0..1.
        float_parameters_max: At most this part of the parameters stays in float, 0..1: it is what
            makes the file larger.
        refine: Photo passes of training after calibration; 0: none.
    """

    target: str = "cortex-a76"
    photos_max: int = 320
    seed: int = 0
    integer_share_min: float = 0.9
    float_parameters_max: float = 0.03
    refine: int = 0

    def __post_init__(self) -> None:
        """Checks every field.

        Raises:
            RecipeError: A value is unknown or impossible.
        """
        checks = (
            (self.target in TARGETS, "target", f"one of {', '.join(TARGETS)}"),
            (self.photos_max >= 1, "photos_max", "at least 1"),
            (0 <= self.integer_share_min <= 1, "integer_share_min", "0..1"),
            (0 <= self.float_parameters_max <= 1, "float_parameters_max", "0..1"),
            (self.refine >= 0, "refine", "at least 0"),
        )
        for fine, key, expected in checks:
            if not fine:
                message = f"quantize.{key}: expected {expected}, found {getattr(self, key)!r}"
                raise RecipeError(message)


@dataclass(frozen=True)
class QuantizeResult:
    """An INT8 model and how it came to be.

    Attributes:
        model: ``onnx.ModelProto`` in QDQ form, spec inside.
        report: JSON-ready.
        notes: Sentences for the reader.
    """

    model: Any
    report: dict[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def quantize(
    model: Any,
    spec: ModelSpec,
    photos: Sequence[Path],
    config: QuantizeConfig | None = None,
    *,
    progress: Callable[..., Any] = tqdm,
) -> QuantizeResult:
    """Returns the INT8 form of a float detector.

    Args:
        model: Float ONNX, with or without folded pre-processing.
        spec: What the model needs to know about itself.
        photos: Typical photos, no labels needed; never those that accuracy is measured on.
        config: How.
        progress: Wraps iterables, as ``tqdm`` does.

    Raises:
        DatasetError: There are no photos, or one cannot be read.
        ModelFileError: The graph cannot be read or run.
    """
    config = config or QuantizeConfig()
    if not photos:
        message = "expected photos to calibrate on, found none; name a folder with some hundred"
        raise DatasetError(message)
    signed = TARGETS[config.target].signed
    model, exact = lean(tidy(model))
    stored = Links(model.graph).stored
    if not any(n.op_type == "Conv" and is_weighted(n, stored) for n in model.graph.node):
        message = "expected convolutions with stored weights, found none; export a detector"
        raise ModelFileError(message)
    chosen = chosen_photos(photos, config.photos_max, config.seed)
    every = max(1, len(chosen) // CHECK_PHOTOS)
    check = chosen[::every][:CHECK_PHOTOS]
    fidelity = Fidelity(model, check, spec)
    layout = plan_layout(model)
    clipped = [n.input[0] for n in model.graph.node if n.op_type in CLIPPING_OPS]
    wanted = [*layout.tensors, *clipped]  # these get a grid where what clips them stays in float
    seen = observe(model, wanted, chosen, spec, seed=config.seed, progress=progress)
    plain = Variant(model, seen, frozenset(), 0.0, exact=exact)
    report: dict[str, Any] = {
        "target": config.target,
        "activations": "int8" if signed else "uint8",
        "photos": len(chosen),
        "ranges": "least cubic error behind the activation",
        "weights": "per channel, rounding errors fed forward, their mean in the bias",
        "disagreement": {
            "photos": len(check),
            "not equalised": _rounded(plain.measured(fidelity).loss),
        },
    }
    labels = label_channels(model, silu_gates(Links(model.graph)))
    budget = Budget(model, 1 - config.integer_share_min, config.float_parameters_max)
    search = Search(fidelity, report["disagreement"])

    def equalised(strength: float) -> Variant:
        factor = channel_factors(model, labels, seen, layout.group, strength)
        scaled = rescale(model, labels, factor)
        ranges = rescaled_seen(seen, labels, factor, scaled)
        return Variant(scaled, ranges, frozenset(), strength, exact=exact)

    best = search.measured("equalised", equalised(STRENGTHS[0]))
    for count in progress(FIRST_COUNTS, desc="first in float"):
        names = first_nodes(best.model, count, budget)
        best = search.better(f"first {count} in float", best, replace(best, float_nodes=names))
    for strength in progress(STRENGTHS[1:], desc="equalise"):
        other = replace(equalised(strength), float_nodes=best.float_nodes)
        best = search.better(f"equalised by {strength}", best, other)
    first = best.float_nodes
    if NOISIEST_COUNTS:
        meter = NoiseMeter(
            model, chosen[:: max(1, len(chosen) // NOISE_PHOTOS)][:NOISE_PHOTOS], spec
        )
        left = plan_layout(best.model, first)
        grids = find_grids(best.model, left, best.seen, best.known, exact)
        sensitive = scan(best.model, left, grids, meter, progress=progress)
        report["noisiest"] = {s.group: _rounded(s.noise) for s in sensitive[:SHOWN]}
        for count in progress(NOISIEST_COUNTS, desc="noisiest in float"):
            names = noisiest_nodes(sensitive, count, budget, first)
            trial = replace(best, float_nodes=names)
            best = search.better(f"and noisiest {count} in float", best, trial)
    report["equalisation"] = best.strength
    report["float"] = {
        "nodes": sorted(best.float_nodes),
        "conv_macs_share": _rounded(budget.macs_share(best.float_nodes)),
    }
    report["disagreement"]["final"] = _rounded(best.loss)
    result = best.inserted(signed)
    notes: tuple[str, ...] = ()
    if config.refine:
        held_out = set(check)
        others = [path for path in photos if path not in held_out]
        refiner = Refiner(model, spec, others or photos, check, config)
        result, report["refined"], notes = refiner.refined(result, progress)
        report["disagreement"]["final"] = _rounded(fidelity.loss(result))
    write_spec(result, spec)
    return QuantizeResult(result, report, notes)


@dataclass(frozen=True)
class Refiner:
    """Trains a quantized model, and keeps the result if it is nearer to the float one.

    Attributes:
        model: The float graph.
        spec: Of both.
        photos: To learn from.
        check: To compare on; others, where there are enough.
        config: How long.
    """

    model: Any
    spec: ModelSpec
    photos: Sequence[Path]
    check: Sequence[Path]
    config: QuantizeConfig

    def refined(
        self, quantized: Any, progress: Callable[..., Any]
    ) -> tuple[Any, dict[str, Any], tuple[str, ...]]:
        """Returns the better model, figures, and notes."""
        from .refine import RefineConfig, distance, refine  # torch: not needed without

        settings = RefineConfig(photos=self.config.refine, seed=self.config.seed)
        model, spec = self.model, self.spec
        try:
            trained = refine(quantized, model, spec, self.photos, settings, progress=progress)
        except ModelFileError as error:  # something that training does not know
            return quantized, {"photos": 0}, (f"not refined by training: {error}",)
        before, after = (distance(m, model, spec, self.check) for m in (quantized, trained))
        figures = {
            "photos": self.config.refine,
            "distance before": float(f"{before:.6g}"),
            "distance after": float(f"{after:.6g}"),
            "kept": after < before,
        }
        return (trained if after < before else quantized), figures, ()


@dataclass(frozen=True)
class Variant:
    """One way to quantize a model, and how far its boxes are from the original's.

    Attributes:
        model: The equalised float graph.
        seen: What its tensors were on photos.
        float_nodes: Nodes that stay in float.
        strength: Of the equalisation.
        loss: Disagreement with the float model, 0..1.
        known: Grids found so far.
        exact: Tensor -> the grid that holds its values without error.
    """

    model: Any
    seen: dict[str, Seen]
    float_nodes: frozenset[str]
    strength: float
    loss: float = 1.0
    known: KnownGrids = field(default_factory=dict)
    exact: Mapping[str, Grid] = field(default_factory=dict)

    def inserted(self, signed: bool) -> Any:
        """Returns the QDQ graph."""
        layout = plan_layout(self.model, self.float_nodes)
        grids = find_grids(self.model, layout, self.seen, self.known, self.exact)
        fitted, weights = round_weights(self.model, layout, grids, self.seen)
        return insert(fitted, layout, grids, signed=signed, weights=weights)

    def measured(self, fidelity: Fidelity) -> Variant:
        """Returns the variant with its loss, which signedness does not change."""
        return replace(self, loss=fidelity.loss(self.inserted(signed=False)))


@dataclass
class Search:
    """Tries variants, keeps the better one, and notes what each trial gave.

    Attributes:
        fidelity: Measures.
        log: What was tried -> disagreement.
    """

    fidelity: Fidelity
    log: dict[str, Any]

    def measured(self, what: str, variant: Variant) -> Variant:
        """Returns the variant with its loss, and notes it."""
        variant = variant.measured(self.fidelity)
        self.log[what] = _rounded(variant.loss)
        return variant

    def better(self, what: str, best: Variant, other: Variant) -> Variant:
        """Returns ``other`` if it is clearly better than ``best``."""
        if other.float_nodes == best.float_nodes and other.strength == best.strength:
            return best
        other = self.measured(what, other)
        return other if other.loss < best.loss * (1 - GAIN_MIN) else best


def _rounded(value: float) -> float:
    return round(value, 4)


def find_grids(
    model: Any,
    layout: Layout,
    seen: dict[str, Seen],
    known: KnownGrids | None = None,
    exact: Mapping[str, Grid] | None = None,
) -> dict[str, Grid]:
    """Returns the best grid of every group of tensors that share one.

    ``known`` keeps what was found, so that a layout that differs a little costs little. ``exact``
    are grids that need no search.
    """
    known = {} if known is None else known
    links = Links(model.graph)
    members: dict[str, list[str]] = {}
    for name in layout.tensors:
        members.setdefault(layout.group[name], []).append(name)
    grids: dict[str, Grid] = {}
    for first, names in members.items():
        if exact and all(name in exact for name in names):
            grids[first] = exact[first]
            continue
        if tuple(names) in known:
            grids[first] = known[tuple(names)]
            continue
        low = min(float(seen[n].low.min()) for n in names)
        high = max(float(seen[n].high.max()) for n in names)
        after = weight = None
        if len(names) == 1:
            values = seen[first].values
            after, weight = effect(links, first)
        else:
            values = np.concatenate([seen[n].values.ravel() for n in names])[:, None]
        grids[first] = known[tuple(names)] = best_grid(values, low, high, after, weight)
    return grids


Function = Callable[[Any], Any]


def effect(links: Links, name: str) -> tuple[Function | None, Function | None]:
    """Returns the activation that all readers of a tensor apply, and the weight of its errors."""
    readers = links.readers[name]
    kinds = sorted({r.op_type for r in readers})
    maker = links.maker.get(name)
    if kinds == ["LeakyRelu"]:
        slope = next((a.f for a in readers[0].attribute if a.name == "alpha"), 0.01)
        return lambda x: np.where(x > 0, x, x * np.float32(slope)), None
    if kinds == ["Sigmoid"]:
        factor = gate_factor(links, maker)  # of an equalised SiLU: its product is what counts
        return sigmoid, (lambda x: x / factor) if factor is not None else None
    if kinds == ["Mul", "Sigmoid"]:
        return lambda x: x * sigmoid(x), None
    if kinds == ["Mul"]:
        factors = [f for r in readers if (f := gate_factor(links, r)) is not None]
        if factors:
            return lambda x: x * sigmoid(x * factors[0]), None
    return None, None


def gate_factor(links: Links, node: Any) -> FloatArray | None:
    """Returns the factors that an equalised SiLU multiplies its sigmoid's input by."""
    if node is None or node.op_type != "Mul" or node.input[1] not in links.stored:
        return None
    if {r.op_type for r in links.readers[node.output[0]]} != {"Sigmoid"}:
        return None
    factor = require_onnx().numpy_helper.to_array(links.stored[node.input[1]])
    return np.asarray(factor, np.float32).reshape(-1)
