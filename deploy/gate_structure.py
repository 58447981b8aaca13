"""The gate's look at the files themselves: classes, pre-processing, what runs as integers."""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..models.coco import canonical_name
from ..models.detector import OnnxDetector
from ..models.errors import InputError, ModelFileError
from ..models.files import sha256
from ..models.spec import ModelSpec
from .gate_graph import convolutions, quantized_tail, quantizers, read_graph, weight_scales
from .verdict import Check, Outcome

FACTS_KEY = "edgesight.calibration"
"""Metadata with JSON about calibration, as ``{"photos": 300}``, in files that carry it."""
CALIBRATION_MIN = 30
"""Photos; with fewer, ranges are a matter of luck."""
SHARE_MIN = 0.25
"""A file with a smaller part of its convolutions in integers does not run as INT8."""
SHARE_LOSS = 0.10
"""So much of that part may be lost against the old model: networks differ a little."""
AGREE_SAME = 97.0
"""Percent F1: a network that agrees like that was made for the other pre-processing."""
SHARED_MIN = 0.5
"""Models that share a smaller part of their classes are of different families."""
INT8_WORD = re.compile(r"int8|w8a8|qdq|quantiz", re.IGNORECASE)
PREPARING = ("color", "resize", "mean", "std", "pad_value")
DECODING = ("head", "strides", "reg_max", "nms_iou")


@dataclass(frozen=True)
class FileFacts:
    """What a model file is; all of it can be kept as JSON for later.

    Attributes:
        name: Of the file.
        sha256: Of its content.
        bytes: Its size.
        spec: The model's own.
        claim: What calls it INT8; None: nothing does.
        integer: Convolutions that this machine's ONNX Runtime computes with integers.
        floating: Its other convolutions.
        tail: Operators of the head's decoding whose results are rounded to 8 bits.
        per_channel: Quantized convolutions with a weight scale for each channel.
        per_tensor: Those with one scale for all.
        calibration_photos: How many it was calibrated with; None: the file does not say.
    """

    name: str
    sha256: str
    bytes: int
    spec: ModelSpec
    claim: str | None
    integer: int
    floating: int
    tail: tuple[str, ...]
    per_channel: int
    per_tensor: int
    calibration_photos: int | None

    @property
    def share(self) -> float:
        """Part of the convolutions that run as integers, 0..1."""
        total = self.integer + self.floating
        return self.integer / total if total else 0.0

    def to_json(self) -> dict[str, Any]:
        """Returns it JSON-ready."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: Any) -> FileFacts:
        """Reads what ``to_json`` gave; the values come from a file and are checked.

        Raises:
            InputError: They are none of this kind.
        """
        try:
            values = dict(values)
            values["spec"] = ModelSpec.from_json(json.dumps(values["spec"]))
            values["tail"] = tuple(str(name)[:200] for name in values["tail"])
            for key in ("bytes", "integer", "floating", "per_channel", "per_tensor"):
                if type(values[key]) is not int or values[key] < 0:
                    raise ValueError(key)  # told below
            photos = values["calibration_photos"]
            texts_ok = all(isinstance(values[key], str) for key in ("name", "sha256"))
            claim_ok = values["claim"] is None or isinstance(values["claim"], str)
            if not (texts_ok and claim_ok and (photos is None or type(photos) is int)):
                raise TypeError(photos)
            return cls(**values)
        except (TypeError, ValueError, KeyError, AttributeError, ModelFileError) as error:
            message = f"expected the facts of a model file, found others ({error}); store it again"
            raise InputError(message) from error


def file_facts(path: Path) -> FileFacts:
    """Looks at a model file; opens it once in this process (``trial_run`` goes before it).

    Raises:
        ModelFileError: The file is missing, damaged or no detector.
    """
    source = read_graph(path)
    with tempfile.TemporaryDirectory(prefix="edgesight-") as folder:
        optimised = Path(folder) / "optimised.onnx"
        spec = OnnxDetector(path, optimized_path=optimised).spec
        runs = read_graph(optimised)
    integer, floating = convolutions(runs)
    per_channel, per_tensor = weight_scales(source)
    if not per_channel + per_tensor:
        per_channel, per_tensor = weight_scales(runs)
    return FileFacts(
        name=path.name,
        sha256=sha256(path),
        bytes=path.stat().st_size,
        spec=spec,
        claim=_claim(path.name, spec.name, source.metadata, quantizers(source)),
        integer=integer,
        floating=floating,
        tail=quantized_tail(source),
        per_channel=per_channel,
        per_tensor=per_tensor,
        calibration_photos=_photos(source.metadata.get(FACTS_KEY)),
    )


def check_family(new: ModelSpec, old: Sequence[str], what: str = "--baseline") -> None:
    """Refuses to compare models of different families.

    Raises:
        InputError: They share less than half of their classes.
    """
    ours, theirs = set(map(canonical_name, new.classes)), set(map(canonical_name, old))
    if len(ours & theirs) < SHARED_MIN * max(len(ours), len(theirs)):
        message = (
            f"{what}: expected a model of the same classes, found {len(ours & theirs)} shared of "
            f"{len(ours)} new and {len(theirs)} old ones; compare with a model of the same family"
        )
        raise InputError(message)


def structure_checks(new: FileFacts, old: FileFacts, f1: float | None) -> list[Check]:
    """Compares two model files.

    Args:
        new: The model that wants to go to the board.
        old: The last good one.
        f1: How well their detections agree, in percent; None: not known.
    """
    return [
        class_map_check(new.spec.classes, old.spec.classes),
        _input_size(new.spec, old.spec),
        _parity("pre-processing", PREPARING, new.spec, old.spec, f1),
        _parity("post-processing", DECODING, new.spec, old.spec, f1),
        _integers(new, old),
        _tail(new, old),
        _scales(new, old),
        *_calibration(new),
    ]


def class_map_check(new: Sequence[str], old: Sequence[str]) -> Check:
    """Compares names and order of the classes."""
    ours, theirs = list(map(canonical_name, new)), list(map(canonical_name, old))
    figures = {"new": len(ours), "old": len(theirs)}
    if ours == theirs:
        return Check("class map", "parity", "pass", f"the same {len(ours)} classes", figures)
    first = next(
        (i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b),
        min(len(ours), len(theirs)),
    )
    where = f"class {first} is {_at(new, first)} where the old model has {_at(old, first)}"
    if shift := _shift(ours, theirs):
        kind = f"off by one ({shift:+d}): {where}; write the old model's class list into the file"
    elif sorted(ours) == sorted(theirs):
        moved = sum(a != b for a, b in zip(ours, theirs, strict=True))
        kind = f"permuted, {moved} names moved: {where}; write them in the network's order"
    elif ours[: len(theirs)] == theirs:
        kind = (
            f"{len(ours) - len(theirs)} classes more at the end; store a new baseline if they "
            "are meant to be there, and --skip 'class map' once"
        )
    else:
        lost, added = sorted(set(theirs) - set(ours)), sorted(set(ours) - set(theirs))
        kind = f"{len(lost)} names missing, {len(added)} new ones: {where}; export it again"
    figures["first_difference"] = first
    return Check("class map", "parity", "fail", f"expected the old model's, found {kind}", figures)


def _at(names: Sequence[str], place: int) -> str:
    return repr(names[place]) if place < len(names) else "nothing"


def _shift(new: list[str], old: list[str]) -> int:
    """Returns by how many places the names went on, 1 or -1; 0: no such shift."""
    if min(len(new), len(old)) < 3:
        return 0
    if new[1:] == old[: len(new) - 1] or new[1:] == old[:-1]:
        return 1
    if new[: len(old) - 1] == old[1:] or new[:-1] == old[1:]:
        return -1
    return 0


def _input_size(new: ModelSpec, old: ModelSpec) -> Check:
    (new_h, new_w), (old_h, old_w) = new.input_hw, old.input_hw
    same = new.input_hw == old.input_hw
    reason = f"{new_w}x{new_h} px" if same else f"{new_w}x{new_h} px, before {old_w}x{old_h}"
    return Check("input size", "parity", "pass", reason, required=False)


def _parity(
    name: str, keys: Sequence[str], new: ModelSpec, old: ModelSpec, f1: float | None
) -> Check:
    folded = new.input_format != old.input_format
    if folded and name == "pre-processing":  # one of them has colours and scale inside
        keys = ("resize", "pad_value")
    elif new.input_format == "uint8_nhwc":
        keys = [key for key in keys if key not in ("color", "mean", "std")]
    differs = {
        key: (getattr(new, key), getattr(old, key))
        for key in keys
        if getattr(new, key) != getattr(old, key)
    }
    figures = {key: {"new": ours, "old": theirs} for key, (ours, theirs) in differs.items()}
    if not differs:
        text = "the same"
        if folded and name == "pre-processing":
            text += "; colours and scale are folded into one of the networks: see the agreement"
        return Check(name, "parity", "pass", text)
    if new.head != old.head:
        text = f"another architecture with its own: head {new.head}, old {old.head}"
        return Check(name, "parity", "pass", text, figures)
    told = ", ".join(f"{k} {_short(a)} (old {_short(b)})" for k, (a, b) in differs.items())
    if f1 is not None and f1 >= AGREE_SAME:
        text = f"another one, {told}, and made for it: {f1:.0f} % of the boxes agree"
        return Check(name, "parity", "pass", text, figures)
    agree = "it is not known how far they agree" if f1 is None else f"only {f1:.0f} % agree"
    text = (
        f"expected the old model's, found {told}, and of the boxes {agree} (a network made for it: "
        f"{AGREE_SAME:.0f} %); export it with the old spec, or look at the AP and --skip {name!r}"
    )
    return Check(name, "parity", "fail", text, figures)


def _integers(new: FileFacts, old: FileFacts) -> Check:
    figures = {
        key: {
            "integer": f.integer,
            "float": f.floating,
            "share": round(f.share, 4),
            "claim": f.claim,
        }
        for key, f in (("new", new), ("old", old))
    }
    found = f"{new.integer} of {new.integer + new.floating} convolutions run as integers here"
    before = f"{old.integer} of {old.integer + old.floating} of the old model"
    claim = new.claim
    if claim is None and old.share >= SHARE_MIN:
        claim = "the old model runs as INT8"
    outcome: Outcome = "pass"
    if claim is None:
        reason = f"a float model, and nothing says otherwise; {found}"
    elif old.claim is not None and old.share < SHARE_MIN and new.share >= old.share - SHARE_LOSS:
        reason = f"{found}, {before}: neither is INT8 on this machine"
    elif new.share < SHARE_MIN or new.share < old.share - SHARE_LOSS:
        outcome = "fail"
        reason = (
            f"expected an INT8 model ({claim}), found that {found}, {before}; "
            "edgesight inspect shows which do not, quantize it again for this core"
        )
    else:
        reason = f"{found}, {before}"
    return Check("runs as integers", "structure", outcome, reason, figures)


def _tail(new: FileFacts, old: FileFacts) -> Check:
    figures = {"new": list(new.tail), "old": list(old.tail)}
    if len(new.tail) <= len(old.tail):
        text = f"{len(new.tail)} operators of its decoding in 8 bits"
        text = text if new.tail else "its decoding is in float"
        return Check("head tail", "structure", "pass", text, figures)
    text = (
        f"expected the head's decoding in float, found {len(new.tail)} operators of it in 8 bits "
        f"({', '.join(new.tail[:3])}), {len(old.tail)} in the old model: boxes and scores on one "
        "scale lose the scores; quantize up to the last convolutions only"
    )
    return Check("head tail", "structure", "fail", text, figures)


def _scales(new: FileFacts, old: FileFacts) -> Check:
    def share(facts: FileFacts) -> float | None:
        total = facts.per_channel + facts.per_tensor
        return facts.per_channel / total if total else None

    ours, theirs = share(new), share(old)
    figures = {
        key: {"per_channel": facts.per_channel, "per_tensor": facts.per_tensor}
        for key, facts in (("new", new), ("old", old))
    }
    outcome: Outcome = "pass"
    if ours is None:
        text = "no quantized weights"
    elif theirs is not None and theirs > 0.5 and ours < theirs - SHARE_LOSS:
        outcome = "fail"
        text = (
            f"expected a weight scale for each channel as in {old.per_channel} of the old model's "
            f"convolutions, found only one for the whole tensor in {new.per_tensor} of "
            f"{new.per_channel + new.per_tensor}; quantize with per-channel weights"
        )
    else:
        text = f"a scale per channel in {new.per_channel}, one for all in {new.per_tensor}"
    return Check("weight scales", "structure", outcome, text, figures)


def _calibration(new: FileFacts) -> list[Check]:
    if (count := new.calibration_photos) is None:
        return []
    enough = count >= CALIBRATION_MIN
    text = f"calibrated with {count} photos"
    if not enough:
        text = (
            f"expected at least {CALIBRATION_MIN} photos for calibration, found {count}; "
            "quantize it again with more"
        )
    figures = {"photos": count}
    return [Check("calibration", "structure", "pass" if enough else "fail", text, figures)]


def _claim(name: str, spec_name: str, metadata: dict[str, str], rounding: int) -> str | None:
    for what, text in (("file name", name), ("model name", spec_name)):
        if INT8_WORD.search(text):
            return f"its {what} is {text!r}"
    for key, text in metadata.items():
        if key.startswith("edgesight."):  # the spec, and which network it is
            continue
        if INT8_WORD.search(f"{key} {text[:200]}"):
            return f"its metadata has {key[:40]!r}"
    return f"it has {rounding} quantizers" if rounding else None


def _photos(text: str | None) -> int | None:
    try:
        count = json.loads(text or "")["photos"]
    except (ValueError, TypeError, KeyError, RecursionError):
        return None
    return count if type(count) is int else None


def _short(value: object) -> str:
    if isinstance(value, tuple):
        return "(" + ", ".join(f"{v:g}" for v in value) + ")"
    return f"{value:g}" if isinstance(value, float) else str(value)
