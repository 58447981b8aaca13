"""The gate's look at the boxes, photo by photo: agreement, duplicates, shifted labels, nothing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ..models.agreement import Agreement, RunningAgreement
from ..models.boxes import iou_matrix
from ..models.detections import Detections
from .verdict import Check, Outcome

SHOWN = 0.35
"""Score from which boxes are shown to people."""
AGREEMENT_MIN = 50.0
"""Percent F1; compressed files of one network agree by 85 to 97, other networks by 60 to 75."""
DUPLICATE_SCORE = 0.1
OVERLAP_MORE = 0.1
"""Boxes cut at a picture's edge overlap more than they did when they were suppressed."""
DUPLICATES_MORE = 0.2
"""Per photo."""
SWAPPED_MORE = 5.0
"""Percent F1 that swapped colours may bring; they cost a sound model some."""
PAIRS_MIN = 10
"""With fewer boxes in the same place, their labels tell nothing."""


def agreement_of(new: Sequence[Detections], old: Sequence[Detections]) -> Agreement | None:
    """Returns how well shown boxes agree; None if neither model shows any.

    Args:
        new: Per photo, labels numbered as the old model's.
        old: The same of the old model.
    """
    running = RunningAgreement(window=max(1, len(old)))
    for ours, theirs in zip(new, old, strict=True):
        running.add(ours.above(SHOWN), theirs.above(SHOWN))
    return running.result()


def frame_checks(
    new: Sequence[Detections],
    old: Sequence[Detections],
    nms_iou: float,
    *,
    agreement_min: float = AGREEMENT_MIN,
) -> list[Check]:
    """Compares what two models see on the same photos.

    Args:
        new: Per photo, labels numbered as the old model's.
        old: The same of the old model.
        nms_iou: Overlap above which the old model drops a box.
        agreement_min: Percent F1 that the boxes must reach.
    """
    return [
        _nothing(new, old),
        _agreement(new, old, agreement_min),
        _duplicates(new, old, nms_iou),
        _labels(new, old),
    ]


def color_check(
    plain: Sequence[Detections], swapped: Sequence[Detections], old: Sequence[Detections]
) -> Check:
    """Sees whether a new model sees red as blue, wherever in the file that was swapped.

    Args:
        plain: The new model's boxes, labels numbered as the old model's.
        swapped: The same of the photos with red and blue swapped.
        old: The old model's boxes of the photos as they are.
    """
    as_is, other = agreement_of(plain, old), agreement_of(swapped, old)
    name = "colour order"
    if as_is is None or other is None:
        text = "no boxes to tell it by"
        return Check(name, "parity", "pass", text, required=False)
    before, after = as_is.f1.value, other.f1.value
    figures = {"agreement": round(before, 2), "swapped": round(after, 2), "photos": len(old)}
    told = f"{before:.0f} % of the boxes agree, {after:.0f} % with red and blue swapped"
    if after <= before + SWAPPED_MORE:
        return Check(name, "parity", "pass", told, figures)
    text = (
        f"expected that swapped colours do harm, found that they help: {told}; "
        "the file takes red for blue, export it with the right colour order"
    )
    return Check(name, "parity", "fail", text, figures)


def _shown(found: Sequence[Detections]) -> int:
    return sum(int((one.score >= SHOWN).sum()) for one in found)


def _nothing(new: Sequence[Detections], old: Sequence[Detections]) -> Check:
    ours, theirs = _shown(new), _shown(old)
    figures = {"new": ours, "old": theirs, "photos": len(old)}
    name = "boxes at all"
    if ours:
        text = f"{ours} boxes with a score of {SHOWN} or more, {theirs} of the old model"
        return Check(name, "structure", "pass", text, figures)
    outcome: Outcome = "fail" if theirs else "not enough evidence"
    text = (
        f"expected boxes with a score of at least {SHOWN}, found none on {len(old)} photos and "
        f"{theirs} of the old model; "
        + ("edgesight inspect shows what became of it" if theirs else "take other photos")
    )
    return Check(name, "structure", outcome, text, figures)


def _agreement(new: Sequence[Detections], old: Sequence[Detections], least: float) -> Check:
    found = agreement_of(new, old)
    name = "agreement"
    if found is None:
        text = f"neither model shows a box on {len(old)} photos; take photos with objects"
        return Check(name, "parity", "not enough evidence", text)
    f1 = found.f1
    figures: dict[str, Any] = {
        "value": round(f1.value, 2), "low": round(f1.low, 2), "high": round(f1.high, 2),
        "floor": least, "photos": found.frames,
        "precision": round(found.precision.value, 2), "recall": round(found.recall.value, 2),
        "both": found.tp, "new_alone": found.fp, "old_alone": found.fn,
    }  # fmt: skip
    told = f"{f1.value:.1f} % F1 [{f1.low:.1f}, {f1.high:.1f}] with the old model's boxes"
    if f1.low >= least:
        return Check(name, "parity", "pass", f"{told}, floor {least:g}", figures)
    outcome: Outcome = "fail" if f1.high < least else "not enough evidence"
    more = "look at the worst pictures" if outcome == "fail" else "take more photos"
    text = f"expected at least {least:g} % of the boxes to agree, found {told}; {more}"
    return Check(name, "parity", outcome, text, figures)


def _duplicates(new: Sequence[Detections], old: Sequence[Detections], nms_iou: float) -> Check:
    limit = min(0.95, nms_iou + OVERLAP_MORE)
    photos = max(1, len(old))
    ours = sum(duplicates(one, limit) for one in new)
    theirs = sum(duplicates(one, limit) for one in old)
    figures = {"new": ours, "old": theirs, "photos": len(old), "overlap": round(limit, 3)}
    found = f"{ours / photos:.2f} doubled boxes per photo, {theirs / photos:.2f} of the old model"
    if ours - theirs <= DUPLICATES_MORE * photos:
        return Check("doubled boxes", "structure", "pass", found, figures)
    text = (
        f"expected one box for each object, found {found}: non-maximum suppression is off; "
        f"set the spec's nms_iou to {nms_iou:g}"
    )
    return Check("doubled boxes", "structure", "fail", text, figures)


def duplicates(found: Detections, overlap: float) -> int:
    """Returns how many boxes overlap a better one of their class by more than ``overlap``."""
    found = found.above(DUPLICATE_SCORE)
    if len(found) < 2:
        return 0
    ranked = found[np.argsort(-found.score, kind="stable")]
    same = ranked.label[:, None] == ranked.label[None, :]
    doubled = np.tril(same & (iou_matrix(ranked.xyxy, ranked.xyxy) > overlap), -1)
    return int(doubled.any(axis=1).sum())


def _labels(new: Sequence[Detections], old: Sequence[Detections]) -> Check:
    """Looks at boxes in the same place: a class map that is off by one names them all wrongly."""
    steps: list[int] = []
    for ours, theirs in zip(new, old, strict=True):
        ours, theirs = ours.above(SHOWN), theirs.above(SHOWN)
        if not len(ours) or not len(theirs):
            continue
        overlap = iou_matrix(ours.xyxy, theirs.xyxy)
        best = overlap.argmax(axis=1)
        near = overlap[np.arange(len(ours)), best] >= 0.5
        steps += (ours.label - theirs.label[best])[near].tolist()
    name, count = "labels", len(steps)
    if count < PAIRS_MIN:
        text = f"only {count} boxes of both models are in the same place: too few to compare labels"
        return Check(name, "parity", "pass", text, {"pairs": count}, required=False)
    values, counts = np.unique(steps, return_counts=True)
    common, share = int(values[counts.argmax()]), float(counts.max()) / count
    equal = steps.count(0) / count
    figures = {"pairs": count, "equal": round(equal, 4), "shift": common, "share": round(share, 4)}
    if equal >= 0.5:
        text = f"{100 * equal:.0f} % of {count} boxes in the same place have the same class"
        return Check(name, "parity", "pass", text, figures)
    kind = f"{100 * share:.0f} % are off by {common:+d}" if share > 0.5 else "they are mixed up"
    text = (
        f"expected the old model's class for boxes in the same place, found it for "
        f"{100 * equal:.0f} % of {count}, {kind}; look at the class map of the new file"
    )
    return Check(name, "parity", "fail", text, figures)
