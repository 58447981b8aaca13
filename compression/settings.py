"""What each step of a recipe can be told: one class per kind of step."""

from __future__ import annotations

from typing import Annotated, Final, Literal

from pydantic import BaseModel, ConfigDict, Field


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
    PruneStep | DistillStep | QuantizeStep | VerifyStep,
    Field(discriminator="kind"),
]
STEP_KINDS: Final[dict[str, type[Strict]]] = {
    "prune": PruneStep,
    "distill": DistillStep,
    "quantize": QuantizeStep,
    "verify": VerifyStep,
}
