"""Weights of 7 to 1 bits in an INT8 model: which layers, rounded how, trained to live with it.

Activations stay at 8 bits, so that the convolutions stay the integer ones that every ONNX Runtime
has; the file gets smaller, not the time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from tqdm import tqdm

from ..models.errors import DatasetError, ModelFileError, RecipeError
from ..models.spec import ModelSpec
from .bits_graph import WIDTHS
from .calibrate import chosen_photos, observe
from .lowbit_choice import widths_within
from .lowbit_round import (
    Fit,
    file_bytes,
    find_layers,
    packed_model,
    rounded_model,
    weight_count,
)
from .rounding import zeros_of

CODES_MIN: Final = 1024
"""Smaller weights keep 8 bits: the operators that unpack them would take what they save."""
PROBE_PHOTOS: Final = 8
FIT_PHOTOS: Final = 64
"""Photos that tell how a layer's inputs go together."""


@dataclass(frozen=True)
class LowBitConfig:
    """How few bits.

    Attributes:
        weights: Bits of every layer's weights.
        bytes_max: Largest file; layers then go to fewer bits one by one, where it harms least.
            One of the two.
        photos_max: Photos to round on, at most.
        seed: Of their choice, and of training.
        refine: Photo passes of training after rounding; 0: none.
    """

    weights: int = 8
    bytes_max: int | None = None
    photos_max: int = FIT_PHOTOS
    seed: int = 0
    refine: int = 0

    def __post_init__(self) -> None:
        """Checks every field.

        Raises:
            RecipeError: A value is impossible.
        """
        if self.weights not in WIDTHS:
            known = ", ".join(map(str, WIDTHS))
            message = f"quantize.weights: expected one of {known} bits, found {self.weights!r}"
            raise RecipeError(message)
        if self.bytes_max is not None and self.weights != 8:
            message = (
                "quantize: expected weights or bytes_max, found both; with bytes_max each layer's "
                "bits are chosen by what they harm"
            )
            raise RecipeError(message)
        for key, least in (("bytes_max", 1), ("photos_max", 1), ("refine", 0)):
            value = getattr(self, key)
            if value is not None and value < least:
                message = f"quantize.{key}: expected at least {least}, found {value!r}"
                raise RecipeError(message)


@dataclass(frozen=True)
class LowBitResult:
    """A model with weights of few bits.

    Attributes:
        model: ``onnx.ModelProto``, packed, ready to be saved.
        report: JSON-ready.
        notes: Sentences for the reader.
    """

    model: Any
    report: dict[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def lower(
    quantized: Any,
    original: Any,
    spec: ModelSpec,
    photos: Sequence[Path],
    config: LowBitConfig,
    *,
    progress: Callable[..., Any] = tqdm,
) -> LowBitResult:
    """Returns an INT8 model with weights of fewer bits.

    Args:
        quantized: QDQ ``onnx.ModelProto`` with 8-bit weights.
        original: The float model that it was made from: the teacher of ``refine``.
        spec: Of both.
        photos: Typical ones, no labels needed.
        config: How few.
        progress: Wraps iterables, as ``tqdm`` does.

    Raises:
        DatasetError: There are no photos, or one cannot be read.
        ModelFileError: The model has no 8-bit weights.
    """
    if not photos:
        message = "expected photos to round weights on, found none; name a folder with some hundred"
        raise DatasetError(message)
    layers = [x for x in find_layers(quantized) if weight_count(quantized, x) >= CODES_MIN]
    if not layers:
        message = (
            f"expected convolutions with at least {CODES_MIN} weights in 8 bits, found none; "
            "quantize the model first"
        )
        raise ModelFileError(message)
    chosen = chosen_photos(photos, config.photos_max, config.seed)
    sources = list(dict.fromkeys(layer.source for layer in layers))
    seen = observe(quantized, sources, chosen, spec, seed=config.seed, progress=progress)
    zeros = zeros_of(original, quantized)
    fits = {x.name: Fit.of(quantized, x, seen[x.source], zeros.get(x.real)) for x in layers}
    notes: tuple[str, ...] = ()
    if config.bytes_max is None:
        widths = {layer.name: config.weights for layer in layers}
    else:
        few = chosen[:: max(1, len(chosen) // PROBE_PHOTOS)][:PROBE_PHOTOS]
        limit = config.bytes_max
        widths, notes = widths_within(quantized, layers, fits, few, spec, limit, progress)
    model = rounded_model(quantized, layers, fits, widths)
    report: dict[str, Any] = {}
    if config.refine:
        from .lowbit_train import train_lowbit  # torch: not needed without

        model, report["refined"], more = train_lowbit(
            model, quantized, original, spec, photos, layers, widths, config, progress
        )
        notes += more
    packed = packed_model(model, layers, widths)
    size = file_bytes(packed)
    counts = {bits: list(widths.values()).count(bits) for bits in WIDTHS}
    report |= {
        "bytes 8 bits": file_bytes(quantized),
        "bytes": size,
        "layers": {bits: n for bits, n in counts.items() if n},
        "bits": dict(sorted(widths.items())),
    }
    return LowBitResult(packed, report, notes)
