"""Static INT8 after training: every convolution in integers, with nothing named by hand."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ..models.errors import DatasetError, ModelFileError, RecipeError
from ..models.spec import ModelSpec
from .calibrate import chosen_photos, observe
from .calibrators import CALIBRATORS
from .equalise import silu_gates
from .fidelity import Fidelity
from .int8_search import (
    Origin,
    Search,
    Variant,
    core_of,
    first_gates,
    gates_by_worth,
    rounded,
)
from .lean import lean
from .onnx_io import tidy, write_spec
from .predict import predicted_instructions
from .qdq import CLIPPING_OPS, Links, is_weighted, plan_layout
from .sensitivity import Budget, NoiseMeter, Sensitive, first_nodes, noisiest_nodes, scan
from .wide import widen


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


FALLBACKS: tuple[str, ...] = ("float", "int16")
"""What stays out of 8 bits: as it is, or with 16-bit activations and 8-bit weights (``wide``)."""
CHECK_PHOTOS = 64
NOISE_PHOTOS = 4
STRENGTHS = (0.75, 0.6, 0.9)
FIRST_COUNTS: tuple[int, ...] = (1, 2, 4, 6, 8)
NOISIEST_COUNTS: tuple[int, ...] = (1, 2, 4, 8, 16, 32)
GATE_SHARES = (0.1, 0.35, 1.0)
"""Parts of all that SiLUs compute, through which equalisation is tried."""
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
        cost_weight: How much a part of the cost counts against the same part of the disagreement
            with the float model, where variants are compared; 0: not at all. None: 1, or 0 within
            ``cost_max``.
        cost_max: At most this part of the float model's predicted instructions, 0..1; None: any.
        fallback: One of ``FALLBACKS``: what 8 bits harm too much stays in it.
    """

    target: str = "cortex-a76"
    photos_max: int = 320
    seed: int = 0
    integer_share_min: float = 0.9
    float_parameters_max: float = 0.03
    refine: int = 0
    cost_weight: float | None = None
    cost_max: float | None = None
    fallback: str = "float"

    @property
    def weight(self) -> float:
        """How much a part of the cost counts."""
        if self.cost_weight is not None:
            return self.cost_weight
        return 1.0 if self.cost_max is None else 0.0

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
            (0 <= self.weight <= 10, "cost_weight", "0..10"),
            (self.fallback in FALLBACKS, "fallback", f"one of {', '.join(FALLBACKS)}"),
            (self.cost_max is None or 0 < self.cost_max <= 1, "cost_max", "above 0, at most 1"),
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
    model = tidy(model)
    whole = predicted_instructions(model, core_of(config.target))
    model, exact = lean(model)
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
    origin = Origin(model, seen, exact, layout.group)
    limit = None if config.cost_max is None else config.cost_max * whole
    search = Search(fidelity, config.target, signed, config.weight, limit)
    report: dict[str, Any] = {
        "target": config.target,
        "activations": "int8" if signed else "uint8",
        "photos": len(chosen),
        "weights": "per channel, rounding errors fed forward, their mean in the bias",
        "disagreement": search.log,
        "million instructions": search.costs,
    }
    plain = search.measured("not equalised", origin.variant(0))
    budget = Budget(model, 1 - config.integer_share_min, config.float_parameters_max)
    meter = NoiseMeter(model, chosen[:: max(1, len(chosen) // NOISE_PHOTOS)][:NOISE_PHOTOS], spec)

    def noise_of(variant: Variant) -> list[Sensitive]:
        left = plan_layout(variant.model, variant.float_nodes)
        return scan(variant.model, left, variant.grids(left), meter, progress=progress)

    best = search.measured("equalised", origin.variant(STRENGTHS[0]))
    if gates := silu_gates(model):
        ordered = gates_by_worth(best.model, {s.group: s.noise for s in noise_of(best)}, layout)
        for share in progress(GATE_SHARES, desc="through SiLU"):
            chosen_gates = first_gates(ordered, share)
            what = f"through {len(chosen_gates)} of {len(gates)} SiLUs ({share:.0%})"
            best = search.better(what, best, origin.variant(STRENGTHS[0], chosen_gates))
    best = search.better("not equalised", best, plain, gain_min=0)
    for name in progress(CALIBRATORS, desc="calibrators"):
        best = search.better(f"ranges: {name}", best, best.with_calibrator(name))
    for count in progress(FIRST_COUNTS, desc="first in float"):
        names = first_nodes(best.model, count, budget)
        best = search.better(f"first {count} in float", best, replace(best, float_nodes=names))
    for strength in progress(STRENGTHS[1:], desc="equalise"):
        other = origin.variant(strength, best.gates).with_calibrator(best.calibrator)
        other = replace(other, float_nodes=best.float_nodes)
        best = search.better(f"equalised by {strength}", best, other)
    first = best.float_nodes
    if NOISIEST_COUNTS:
        sensitive = noise_of(best)
        report["noisiest"] = {s.group: rounded(s.noise) for s in sensitive[:SHOWN]}
        for count in progress(NOISIEST_COUNTS, desc="noisiest in float"):
            names = noisiest_nodes(sensitive, count, budget, first)
            trial = replace(best, float_nodes=names)
            best = search.better(f"and noisiest {count} in float", best, trial)
    report["ranges"] = best.calibrator
    report["through SiLUs"] = len(best.gates)
    report["equalisation"] = best.strength
    report["float"] = {
        "nodes": sorted(best.float_nodes),
        "conv_macs_share": rounded(budget.macs_share(best.float_nodes)),
    }
    report["disagreement"]["final"] = rounded(best.loss)
    (result,) = best.inserted(signed)
    report["part of the float model's instructions"] = rounded(best.cost / whole)
    notes: tuple[str, ...] = ()
    if limit is not None and best.cost > limit:
        core = core_of(config.target)
        where = "" if core == config.target else f" on {core}, which stands in for {config.target}"
        why = f"cost_max = {config.cost_max:g} is not met: the cheapest way found takes"
        notes = (f"{why} {best.cost / whole:.2f} of the float model's instructions{where}",)
    if config.refine:
        from .refine import (  # torch: not needed without
            RefineConfig,
            kept_if_nearer,
            passes,
            refine,
        )

        held_out = set(check)
        others = [path for path in photos if path not in held_out] or photos
        settings, before = RefineConfig(photos=config.refine, seed=config.seed), result
        result, report["refined"], more = kept_if_nearer(
            before,
            model,
            spec,
            check,
            photos=passes(config.refine, others),
            train=lambda: refine(before, model, spec, others, settings, progress=progress),
        )
        notes += more
        report["disagreement"]["final"] = rounded(fidelity.loss(result))
    if config.fallback == "int16" and best.float_nodes:
        result, report["tensors in 16 bits"] = widen(result, best)
        report["disagreement"]["final"] = rounded(fidelity.loss(result))
    write_spec(result, spec)
    return QuantizeResult(result, report, notes)
