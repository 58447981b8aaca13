"""What each step of a recipe can be told: one class per kind of step."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

Side = Annotated[int, Field(ge=32, le=4096, multiple_of=32)]
"""Of a network's input, in pixels."""


class Strict(BaseModel):
    """Refuses unknown keys; cannot be changed."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class PruneStep(Strict):
    """Removes channels.

    Attributes:
        macs_ratio: Multiply-accumulates to be left, of the *original* model's at its own size;
            0.6 if neither this nor ``cost_ratio`` is given.
        cost_ratio: The same, counted in ``cost``.
        cost: What saving is counted in: multiply-accumulates, or instructions of the 8-bit
            convolutions on a core.
        criterion: Which channels of a layer go first (``criteria.CRITERIA``).
        allocation: How much of each layer goes: ``cost``: least harm per cost saved; ``global``:
            least harm per channel; ``uniform``: the same part of every layer.
        iterations: Parts in which it is done; what matters is measured anew before each. More
            than one costs time, and keeps more (docs/numbers.md).
        align: Channels per layer are a multiple of this.
        photos: Photos that tell which channels matter, and that what is left is refitted on.
        keep_min: Each layer keeps at least this part of its channels.
        plan: Carry this out in place of choosing: a JSON file, layer -> output channels that go,
            as ``removed`` in ``state.json`` of an earlier run.
    """

    kind: Literal["prune"]
    macs_ratio: float | None = Field(None, gt=0, le=1)
    cost_ratio: float | None = Field(None, gt=0, le=1)
    cost: Literal["macs", "cortex-a76", "cortex-a72"] = "macs"
    criterion: Literal["obs", "l1", "l2", "bn", "taylor", "lamp", "fpgm"] = "obs"
    allocation: Literal["cost", "global", "uniform"] = "cost"
    iterations: int = Field(4, ge=1, le=20)
    align: int = Field(8, ge=1, le=128)
    photos: int = Field(96, ge=1)
    keep_min: float = Field(0.25, gt=0, le=1)
    plan: Path | None = None

    @model_validator(mode="before")
    @classmethod
    def _one_budget(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        names = ("macs_ratio", "cost_ratio", "plan")
        given = [k for k in names if values.get(k) is not None]
        if len(given) > 1:
            message = f"one of macs_ratio, cost_ratio or plan, found {' and '.join(given)}"
            raise ValueError(message)
        return values if given else values | {"macs_ratio": 0.6}

    @property
    def budget(self) -> tuple[str, float]:
        """What the budget is counted in, and how much of the original's is to be left."""
        if self.cost_ratio is not None:
            return self.cost, self.cost_ratio
        return "macs", 1.0 if self.macs_ratio is None else self.macs_ratio

    def with_files(self, change: Callable[[Path], Path]) -> PruneStep:
        """Returns a copy with another path of its plan."""
        plan = None if self.plan is None else change(self.plan)
        return self.model_copy(update={"plan": plan})


class ActivationsStep(Strict):
    """Puts ReLU in the place of dearer activations, and refits what follows them.

    Attributes:
        to: What takes their place; integer convolutions run it inside themselves.
        keep: Activations whose module's name holds one of these stay.
        photos: Photos that the convolutions behind are refitted on.
    """

    kind: Literal["activations"]
    to: Literal["relu", "relu6"] = "relu"
    keep: tuple[str, ...] = ()
    photos: int = Field(96, ge=1)


class TermWeights(Strict):
    """Weight of each term of the distillation loss; 0 switches one off.

    Attributes:
        scores: What the teachers score in each cell.
        boxes: Where they see its box.
        features: What the uncut network computes on the way.
        labels: The photos' boxes.
        found: The boxes that teachers of another kind find in each augmented picture.
    """

    scores: float = Field(1.0, ge=0)
    boxes: float = Field(1.0, ge=0)
    features: float = Field(1.0, ge=0)
    labels: float = Field(0.5, ge=0)
    found: float = Field(0.5, ge=0)


class DistillStep(Strict):
    """Lets the small network learn from the uncut one, and from other detectors.

    Attributes:
        photos: Photo passes in all.
        batch: Photos per step; if several processes train together, of all of them.
        rate: Largest step, relative to each channel's weights.
        warmup: Part of the run in which the rate rises.
        ema: Decay per step of the averaged weights.
        mixed: Compute in bfloat16 where that is safe.
        labels: ``auto``: the photos' boxes, and the teachers' where a photo has none; ``none``: no
            boxes, only what the teachers compute.
        save_s: Seconds between checkpoints.
        teacher: ``self`` (the uncut network), an ONNX detector of any architecture, or several.
        teacher_hw: A larger input height and width at which the uncut network teaches besides:
            there it sees more.
        temperature: Softens scores and distributions of student and teachers.
        mosaic: Part of the pictures that are put together from four photos; none in the last
            sixth of the run.
        weights: Of the terms of the loss.
        device: ``auto``: a GPU if there is one.
    """

    kind: Literal["distill"]
    photos: int = Field(20_000, ge=1)
    batch: int = Field(8, ge=1, le=4096)
    rate: float = Field(7e-4, gt=0, lt=1)
    warmup: float = Field(0.05, ge=0, lt=1)
    ema: float = Field(0.998, ge=0, lt=1)
    mixed: bool = True
    labels: Literal["auto", "none"] = "auto"
    save_s: float = Field(120.0, ge=0)
    teacher: tuple[Literal["self"] | Path, ...] = Field(("self",), min_length=1, max_length=8)
    teacher_hw: tuple[Side, Side] | None = None
    temperature: float = Field(1.0, gt=0, le=20)
    mosaic: float = Field(0.0, ge=0, le=1)
    weights: TermWeights = TermWeights.model_validate({})
    device: Literal["auto", "cpu", "cuda"] = "auto"

    @field_validator("teacher", mode="before")
    @classmethod
    def _one_or_many(cls, value: Any) -> Any:
        return [value] if isinstance(value, str | Path) else value

    @model_validator(mode="after")
    def _fits(self) -> DistillStep:
        if len(set(self.teacher)) < len(self.teacher):
            message = "each teacher once, found one twice"
            raise ValueError(message)
        if self.teacher_hw is not None and "self" not in self.teacher:
            message = 'teacher_hw with teacher = "self" (a file has a size of its own), found none'
            raise ValueError(message)
        return self

    @property
    def teacher_files(self) -> tuple[Path, ...]:
        """The teachers that are files."""
        return tuple(t for t in self.teacher if isinstance(t, Path))

    def with_files(self, change: Callable[[Path], Path]) -> DistillStep:
        """Returns a copy with other paths of its teachers."""
        teachers = tuple(change(t) if isinstance(t, Path) else t for t in self.teacher)
        return self.model_copy(update={"teacher": teachers})


class SparsifyStep(Strict):
    """Makes single weights zero; no layer changes its shape.

    Attributes:
        method: Which go: the smallest by ``magnitude``, by ``gradient`` of what the network says,
            by ``taylor`` (weight times gradient); or all below a ``threshold``.
        sparsity: Part of the weights to be zero afterwards, those counted that are already.
        scope: ``channel``: that part of each output channel; ``layer``: of each layer; ``global``:
            the smallest of all layers together. Only ``global`` touches depthwise layers.
        pattern: ``N:M``, as ``2:4``: of every M input channels N stay, instead of ``sparsity``.
        threshold: Of ``method = "threshold"``: smaller weights go.
        relative: The threshold counts in root mean square weights of each layer.
        rounds: The goal is neared in so many, each with a refit, first fast, then slowly.
        refit: Fit the weights that are left to what the network computed before.
        keep_min: Each layer keeps at least this part of its weights.
        photos: Photos for gradients and refit.
    """

    kind: Literal["sparsify"]
    method: Literal["magnitude", "threshold", "gradient", "taylor"] = "magnitude"
    sparsity: float = Field(0.5, ge=0, lt=1)
    scope: Literal["channel", "layer", "global"] = "channel"
    pattern: str | None = Field(None, pattern=r"^[1-9]\d?:[1-9]\d?$")
    threshold: float | None = Field(None, gt=0)
    relative: bool = True
    rounds: int = Field(1, ge=1, le=100)
    refit: bool = True
    keep_min: float = Field(0.02, ge=0, le=1)
    photos: int = Field(96, ge=1)

    @model_validator(mode="after")
    def _fits(self) -> SparsifyStep:
        if self.pattern is not None and self.counts[0] >= self.counts[1]:
            message = f"a pattern N:M with N below M, as 2:4, found {self.pattern!r}"
            raise ValueError(message)
        if (self.method == "threshold") != (self.threshold is not None):
            message = "method = 'threshold' and a threshold together, found one alone"
            raise ValueError(message)
        if self.method == "threshold" and self.pattern is not None:
            message = "a threshold or a pattern, found both; leave one out"
            raise ValueError(message)
        return self

    @property
    def counts(self) -> tuple[int, int]:
        """N and M of the pattern.

        Raises:
            ValueError: There is none.
        """
        first, _, second = (self.pattern or "").partition(":")
        return int(first), int(second)


class QuantizeStep(Strict):
    """Turns the network into 8-bit integers.

    Attributes:
        photos: Photos to calibrate on, at most.
        integer_share_min: At least this part of the convolution MACs stays integer.
        refine: Photo passes of training after calibration, with the float network as teacher;
            0: none.
        weights: Bits of the weights. Fewer than 8 make a smaller file, not a faster one.
        bytes_max: Size of the file, at most; each layer's bits are chosen by what they harm.
        cost_weight: How much predicted instructions count against disagreement with the float
            model where variants are compared (as its power); 0: not at all. Usually 1, or 0 within
            ``cost_max``. For a core without a table, those of Cortex-A76 stand in.
        cost_max: At most this part of the float model's instructions, predicted.
        fallback: What 8 bits harm too much: in float, or (no faster in ONNX Runtime; for
            accelerators) with 16-bit activations and 8-bit weights.
    """

    kind: Literal["quantize"]
    photos: int = Field(320, ge=1)
    integer_share_min: float = Field(0.9, ge=0, le=1)
    refine: int = Field(0, ge=0)
    weights: Literal[8, 7, 6, 5, 4, 3, 2, 1] = 8
    bytes_max: int | None = Field(None, ge=1)
    cost_weight: float | None = Field(None, ge=0, le=10)
    cost_max: float | None = Field(None, gt=0, le=1)
    fallback: Literal["float", "int16"] = "float"

    @model_validator(mode="after")
    def _one_size(self) -> QuantizeStep:
        if self.weights != 8 and self.bytes_max is not None:
            message = "one of weights (bits of all layers) or bytes_max (of the file), found both"
            raise ValueError(message)
        return self


class HalfStep(Strict):
    """Turns the weights into 16-bit floats: half the file.

    Attributes:
        compute: In ``float32`` (any processor, the same speed as before), or in ``float16`` from
            the first convolution to the last (GPUs).
    """

    kind: Literal["half"]
    compute: Literal["float32", "float16"] = "float32"


class VerifyStep(Strict):
    """Compares before and after.

    Attributes:
        photos_max: Photos to compare on, at most.
        resamples: Of the bootstrap.
        latency_rounds: Alternating runs of both files; 0: not timed.
        train_photos: Photos learned from that are compared on besides, at most: does the result
            do as well on photos that it has not seen?
    """

    kind: Literal["verify"]
    photos_max: int = Field(1000, ge=1)
    resamples: int = Field(1000, ge=20)
    latency_rounds: int = Field(60, ge=0)
    train_photos: int = Field(300, ge=0)


class FactoriseStep(Strict):
    """Replaces dense layers by chains of smaller ones where that costs less.

    How much stays is told by ``energy`` or by ``macs_ratio``; ``energy = 0.95`` if neither is
    given.

    Attributes:
        energy: Part of the variance of each layer's outputs that its chain keeps at least.
        macs_ratio: Multiply-accumulates to be left, of the *original* model's at its own size; by
            least harm per cost saved.
        methods: ``svd`` (any layer), ``spatial``, ``tucker``, ``cp`` (kernels larger than 1x1).
        align: Ranks are a multiple of this.
        cost: A layer is replaced only if its chain costs less: multiply-accumulates, or
            instructions of the 8-bit convolutions on a core.
        data_aware: Keep what matters on photos; else what is large in the weights.
        photos: Photos that tell what matters, and that what is left is refitted on.
        refit: Fit all dense convolutions to what the uncut network computes, afterwards.
    """

    kind: Literal["factorise"]
    energy: float | None = Field(None, gt=0, le=1)
    macs_ratio: float | None = Field(None, gt=0, le=1)
    methods: tuple[Literal["svd", "spatial", "tucker", "cp"], ...] = Field(
        ("svd", "spatial", "tucker", "cp"), min_length=1
    )
    align: int = Field(8, ge=1, le=128)
    cost: Literal["macs", "cortex-a76", "cortex-a72"] = "cortex-a76"
    data_aware: bool = True
    photos: int = Field(96, ge=1)
    refit: bool = True

    @model_validator(mode="before")
    @classmethod
    def _one_goal(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        given = [k for k in ("energy", "macs_ratio") if values.get(k) is not None]
        if len(given) == 2:
            message = "one of energy or macs_ratio, found both"
            raise ValueError(message)
        return values if given else values | {"energy": 0.95}


Step = Annotated[
    ActivationsStep
    | FactoriseStep
    | PruneStep
    | SparsifyStep
    | DistillStep
    | QuantizeStep
    | HalfStep
    | VerifyStep,
    Field(discriminator="kind"),
]
STEP_KINDS: Final[dict[str, type[Strict]]] = {
    "prune": PruneStep,
    "activations": ActivationsStep,
    "sparsify": SparsifyStep,
    "distill": DistillStep,
    "factorise": FactoriseStep,
    "quantize": QuantizeStep,
    "half": HalfStep,
    "verify": VerifyStep,
}
