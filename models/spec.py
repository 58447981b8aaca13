"""What a model needs to know about itself; it travels inside the ONNX file's metadata."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from .errors import ModelFileError

METADATA_KEY = "edgesight.spec"
SPEC_VERSION = 1
COLORS = ("bgr", "rgb")
RESIZES = ("letterbox_topleft", "letterbox_center", "stretch")
INPUT_FORMATS = ("float_nchw", "uint8_nhwc")


CLASSES_MAX, NAME_MAX = 10_000, 200


def _is_name(text: object) -> bool:
    """Whether a text can be shown anywhere: names go to terminals, pages, brokers and files."""
    return isinstance(text, str) and 0 < len(text) <= NAME_MAX and text.isprintable()


@dataclass(frozen=True)
class ModelSpec:
    """Everything that pre- and post-processing need to know about one model.

    Attributes:
        head: Key of ``heads.HEADS``; how the raw outputs become boxes.
        input_hw: Height and width in pixels that the network takes.
        classes: Class names in the order of the network's scores.
        color: Channel order that the network was trained on.
        mean: Subtracted per channel, in the network's channel order, on the 0..255 scale.
        std: Divides per channel after the subtraction.
        resize: How a picture is fitted to ``input_hw``: ``letterbox_topleft``,
            ``letterbox_center`` (both keep the aspect and pad) or ``stretch``.
        pad_value: Grey level 0..255 of the padding.
        strides: Pixels per cell of each output level.
        reg_max: Bins less one of distribution heads.
        nms_iou: Overlap above which the lesser box of one class is dropped.
        input_format: ``float_nchw``: colour order and normalisation are done outside the network;
            ``uint8_nhwc``: they are folded into it and it takes OpenCV's BGR bytes as they are.
        name: What people call the model.
        version: Of this format.
    """

    head: str
    input_hw: tuple[int, int]
    classes: tuple[str, ...]
    color: str = "bgr"
    mean: tuple[float, float, float] = (0.0, 0.0, 0.0)
    std: tuple[float, float, float] = (1.0, 1.0, 1.0)
    resize: str = "letterbox_topleft"
    pad_value: int = 114
    strides: tuple[int, ...] = (8, 16, 32)
    reg_max: int = 7
    nms_iou: float = 0.6
    input_format: str = "float_nchw"
    name: str = ""
    version: int = SPEC_VERSION

    def __post_init__(self) -> None:
        """Checks every field.

        Raises:
            ModelFileError: A field has the wrong type or an impossible value.
        """
        try:
            self._check()
        except (TypeError, ValueError) as error:
            message = f"model spec: {error}; export the model again with edgesight"
            raise ModelFileError(message) from error

    def _check(self) -> None:
        for key in ("input_hw", "strides", "classes", "mean", "std"):
            object.__setattr__(self, key, tuple(getattr(self, key)))
        sizes = (*self.input_hw, *self.strides)
        sizes_ok = len(self.input_hw) == 2 and all(
            isinstance(v, int) and 1 <= v <= 8192 for v in sizes
        )
        names_ok = 0 < len(self.classes) <= CLASSES_MAX and all(map(_is_name, self.classes))
        checks: tuple[tuple[bool, str, object], ...] = (
            (isinstance(self.head, str), "head", "a name"),
            (self.version == SPEC_VERSION, "version", SPEC_VERSION),
            (self.color in COLORS, "color", COLORS),
            (self.resize in RESIZES, "resize", RESIZES),
            (self.input_format in INPUT_FORMATS, "input_format", INPUT_FORMATS),
            (sizes_ok, "input_hw", "height and width (and strides) of 1..8192 px"),
            (names_ok, "classes", f"1 to {CLASSES_MAX} names of printable characters"),
            (self.name == "" or _is_name(self.name), "name", "printable characters"),
            (len(self.mean) == 3, "mean", "3 numbers"),
            (len(self.std) == 3 and min(self.std) > 0, "std", "3 numbers > 0"),
            (0 <= self.pad_value <= 255, "pad_value", "0..255"),
            (1 <= self.reg_max <= 64, "reg_max", "1..64"),
            (0 < self.nms_iou <= 1, "nms_iou", "0..1"),
        )
        for ok, key, expected in checks:
            if not ok:
                message = f"{key}: expected {expected}, found {getattr(self, key)!a:.80}"
                raise ValueError(message)

    def with_changes(self, **changes: Any) -> ModelSpec:
        """Returns a copy with some fields changed."""
        return replace(self, **changes)

    def to_json(self) -> str:
        """Returns the spec as the JSON text that is stored in the ONNX file."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> ModelSpec:
        """Reads a spec from a model file's metadata.

        Raises:
            ModelFileError: The text is not a spec of this version.
        """
        try:
            values = json.loads(text)
        except (ValueError, RecursionError) as error:
            message = f"model spec: expected JSON, found {text[:40]!r}; export the model again"
            raise ModelFileError(message) from error
        known = {field.name for field in fields(cls)}
        if not isinstance(values, dict) or not {"head", "input_hw", "classes"} <= values.keys():
            message = "model spec: expected head, input_hw and classes; export the model again"
            raise ModelFileError(message)
        if unknown := sorted(values.keys() - known):
            message = (
                f"model spec: unknown key {unknown[0]!r}; the file is from a newer edgesight: "
                "pip install -U edgesight"
            )
            raise ModelFileError(message)
        return cls(**values)
