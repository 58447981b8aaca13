"""Which head a model file has: from its spec, or from its output shapes where that is safe."""

from __future__ import annotations

import ast
from collections.abc import Mapping, Sequence

import numpy as np

from .coco import COCO_CLASSES
from .detections import FloatArray
from .errors import ModelFileError
from .heads import HEADS, cells, grid_hw, ssdlite_anchors
from .spec import METADATA_KEY, ModelSpec

Shape = tuple[int, ...]
BINS = 4 * 8  # four sides of reg_max 7 + 1, which all published NanoDets have


def read_spec(
    inputs: Mapping[str, Shape],
    outputs: Mapping[str, Shape],
    metadata: Mapping[str, str],
    head: str | None = None,
) -> ModelSpec:
    """Returns the spec of a model: the stored one, else one recognised from its shapes.

    Args:
        inputs: Name to shape of the graph's inputs; unknown sizes are 0.
        outputs: The same of its outputs.
        metadata: The file's metadata.
        head: What the user says it is; needed where shapes do not tell.

    Raises:
        ModelFileError: The spec is damaged, or no head fits, or several do.
    """
    if head is not None and head not in HEADS:
        message = f"--head: expected one of {', '.join(HEADS)}, found {head!r}"
        raise ModelFileError(message)
    if METADATA_KEY in metadata and head is None:
        spec = ModelSpec.from_json(metadata[METADATA_KEY])
        if spec.head not in HEADS:
            message = f"model spec: expected a head of {', '.join(HEADS)}, found {spec.head!r}"
            raise ModelFileError(message)
        check_shapes(spec, outputs)
        return spec
    input_hw = _input_hw(inputs)
    fits = {
        name: classes
        for name in HEADS
        if (name != "classify" or head == name)  # nothing tells the colours that it was trained on
        and (classes := class_count(name, input_hw, list(outputs.values()))) is not None
    }
    if head is None and (other := _other_task(fits, metadata)):
        message = f"expected a detector, found {other}; export a detection model, or name its head"
        raise ModelFileError(message)
    chosen = head if head is not None else next(iter(fits), None)
    found = ", ".join(f"{n} {list(s)}" for n, s in outputs.items())
    if chosen is None or chosen not in fits or (head is None and len(fits) > 1):
        wanted = f"the outputs of a {head} head" if head else "the raw outputs of a known head"
        message = (
            f"expected {wanted} for a {input_hw[1]}x{input_hw[0]} input, found {found}; "
            f"export the model without its decoding and NMS, or name its head: "
            f"--head {'|'.join(HEADS)}"
        )
        raise ModelFileError(message)
    known = HEADS[chosen]
    return ModelSpec(
        head=chosen,
        input_hw=input_hw,
        classes=_class_names(fits[chosen], metadata, background=chosen == "ssdlite"),
        color=known.color,
        mean=known.mean,
        std=known.std,
        resize=known.resize,
        strides=known.strides,
        nms_iou=known.nms_iou,
    )


def check_shapes(spec: ModelSpec, outputs: Mapping[str, Shape]) -> None:
    """Raises ``ModelFileError`` if the outputs cannot be those of the spec's head."""
    found = class_count(
        spec.head, spec.input_hw, list(outputs.values()), spec.strides, spec.reg_max
    )
    if found != len(spec.classes):
        shapes = ", ".join(f"{n} {list(s)}" for n, s in outputs.items())
        message = (
            f"expected the outputs of a {spec.head} head with {len(spec.classes)} classes for a "
            f"{spec.input_hw[1]}x{spec.input_hw[0]} input, found {shapes}; the spec in the file "
            "does not belong to its network: export it again"
        )
        raise ModelFileError(message)


def check_raw(spec: ModelSpec, outputs: Sequence[FloatArray]) -> None:
    """Raises ``ModelFileError`` if a YOLOX's boxes are decoded already: both have one shape."""
    if spec.head != "yolox":
        return
    grid = cells(spec.input_hw, spec.strides)
    centre = outputs[0][0, :, :2]
    as_raw = float(np.median(np.abs(centre)))
    as_decoded = float(np.median(np.abs(centre / grid[:, 2:] - grid[:, :2])))
    if as_raw > 4 and as_decoded < as_raw:  # in cells: raw centres lie in or near their own
        message = (
            "expected the raw outputs of a yolox head, found boxes in pixels; export the model "
            "without its decoding (decode_in_inference=False)"
        )
        raise ModelFileError(message)


def class_count(
    head: str,
    input_hw: tuple[int, int],
    shapes: Sequence[Shape],
    strides: tuple[int, ...] | None = None,
    reg_max: int = 7,
) -> int | None:
    """Returns how many classes a head of this kind has with these outputs; None if none fits."""
    per_level = [r * c for r, c in (grid_hw(input_hw, s) for s in strides or HEADS[head].strides)]
    n, bins = sum(per_level), 4 * (reg_max + 1)
    classes = 0
    if head == "nanodet":
        widths = {s[2] for s in shapes if len(s) == 3} - {bins}
        if len(widths) == 1:
            classes = widths.pop()
            wanted = sorted([(1, c, w) for c in per_level for w in (classes, bins)])
            classes = classes if sorted(shapes) == wanted else 0
    elif head == "ssdlite":
        n = len(ssdlite_anchors(input_hw))
        by_width = sorted(shapes, key=lambda s: -s[-1] if s else 0)
        if len(shapes) == 2 and by_width[0][:2] == (1, n) and by_width[1] == (1, n, 4):
            classes = by_width[0][2] - 1
    elif head == "classify":
        classes = shapes[0][1] if len(shapes) == 1 and len(shapes[0]) == 2 else 0
    elif len(shapes) == 1 and len(shapes[0]) == 3 and shapes[0][0] == 1:
        rows, width = shapes[0][1:]
        if head == "yolov8":
            classes = rows - 4 if width == n else 0
        elif rows == n:
            classes = width - (5 if head == "yolox" else bins)
    return classes if classes > 0 else None


def _input_hw(inputs: Mapping[str, Shape]) -> tuple[int, int]:
    shapes = list(inputs.values())
    if len(shapes) == 1 and len(shapes[0]) == 4:
        batch, channels, height, width = shapes[0]
        if batch in (0, 1) and channels == 3 and height > 0 and width > 0:
            return height, width
    found = ", ".join(f"{n} {list(s)}" for n, s in inputs.items())
    message = (
        f"expected one input [1, 3, height, width] of fixed size, found {found}; "
        "export the model with a fixed input size"
    )
    raise ModelFileError(message)


def _other_task(fits: Mapping[str, int], metadata: Mapping[str, str]) -> str | None:
    """Returns what a file says it is, if its outputs only look like a detector's.

    A pose or oriented-box network of YOLOv8 has a detector's output with more rows.
    """
    task = metadata.get("task", "detect")
    if task != "detect":
        return f"a model for the task {task!r}"
    names = _stored_names(metadata)
    if fits and names is not None and len(names) not in fits.values():
        return f"{len(names)} class names for outputs of {', '.join(map(str, fits.values()))}"
    return None


def _stored_names(metadata: Mapping[str, str]) -> list[str] | None:
    """Returns the ``names`` that many exporters write; None where there are none."""
    try:
        names = ast.literal_eval(metadata.get("names", ""))
        if isinstance(names, dict):
            names = [names[i] for i in range(len(names))]
    except (ValueError, SyntaxError, KeyError, MemoryError, RecursionError):
        return None
    return [str(name) for name in names] if isinstance(names, list) else None


def _class_names(count: int, metadata: Mapping[str, str], background: bool) -> tuple[str, ...]:
    """Returns the names stored in the file, COCO's, or numbers."""
    names = _stored_names(metadata)
    if names is not None and len(names) == count:
        return tuple(names)
    if count == len(COCO_CLASSES):
        return COCO_CLASSES
    if background and count == 90:  # torchvision numbers COCO's classes with COCO's category ids
        from .coco import COCO_CATEGORY_IDS

        by_id = dict(zip(COCO_CATEGORY_IDS, COCO_CLASSES, strict=True))
        return tuple(by_id.get(i, f"unused {i}") for i in range(1, 91))
    return tuple(f"class {i}" for i in range(count))
