"""What each step of a recipe can be told: one class per kind of step."""

from __future__ import annotations

from typing import Annotated, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator


class Strict(BaseModel):
    """Refuses unknown keys; cannot be changed."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class PruneStep(Strict):
    """Removes channels.

    Attributes:
        macs_ratio: Multiply-accumulates to be left, of the *original* model's at its own size.
        align: Channels per layer are a multiple of this.
        photos: Photos that tell which channels matter, and that what is left is refitted on.
        keep_min: Each layer keeps at least this part of its channels.
    """

    kind: Literal["prune"]
    macs_ratio: float = Field(0.6, gt=0, le=1)
    align: int = Field(8, ge=1, le=128)
    photos: int = Field(96, ge=1)
    keep_min: float = Field(0.25, gt=0, le=1)


class DistillStep(Strict):
    """Lets the small network learn from the uncut one.

    Attributes:
        photos: Photo passes in all.
        batch: Photos per step.
        rate: Largest step, relative to each channel's weights.
        warmup: Part of the run in which the rate rises.
        ema: Decay per step of the averaged weights.
        mixed: Compute in bfloat16 where that is safe.
        labels: ``auto``: the photos' boxes, and the uncut network's where a photo has none;
            ``none``: no boxes, only what the uncut network computes.
        save_s: Seconds between checkpoints.
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


class SparsifyStep(Strict):
    """Makes single weights zero; no layer changes its shape.

    Attributes:
        method: Which go: the smallest by ``magnitude``, by ``gradient`` of what the network says,
            by ``taylor`` (weight times gradient); or all below a ``threshold``.
        sparsity: Part of the weights to be zero afterwards, those counted that are already.
        scope: ``layer``: the same part of each; ``global``: the smallest of all layers together.
        pattern: ``N:M``, as ``2:4``: of every M input channels N stay, instead of ``sparsity``.
        threshold: Of ``method = "threshold"``: smaller weights go.
        relative: The threshold counts in root mean square weights of each layer.
        rounds: The goal is neared in so many, each with a refit, first fast, then slowly.
        refit: Fit the weights that are left to what the network computed before.
        keep_min: Each layer keeps at least this part of its weights.
        photos: Photos for gradients and refit.
    """

    kind: Literal["sparsify"]
    method: Literal["magnitude", "threshold", "gradient", "taylor"] = "taylor"
    sparsity: float = Field(0.5, ge=0, lt=1)
    scope: Literal["layer", "global"] = "global"
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
    """

    kind: Literal["quantize"]
    photos: int = Field(320, ge=1)
    integer_share_min: float = Field(0.9, ge=0, le=1)
    refine: int = Field(0, ge=0)


class VerifyStep(Strict):
    """Compares before and after.

    Attributes:
        photos_max: Photos to compare on, at most.
        resamples: Of the bootstrap.
        latency_rounds: Alternating runs of both files; 0: not timed.
    """

    kind: Literal["verify"]
    photos_max: int = Field(1000, ge=1)
    resamples: int = Field(1000, ge=20)
    latency_rounds: int = Field(60, ge=0)


Step = Annotated[
    PruneStep | SparsifyStep | DistillStep | QuantizeStep | VerifyStep,
    Field(discriminator="kind"),
]
STEP_KINDS: Final[dict[str, type[Strict]]] = {
    "prune": PruneStep,
    "sparsify": SparsifyStep,
    "distill": DistillStep,
    "quantize": QuantizeStep,
    "verify": VerifyStep,
}
