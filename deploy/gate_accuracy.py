"""Is the new model's accuracy as good as the old one's? Tests on the same photos, in pairs.

Overall it is a test of non-inferiority (CONSORT's term; ICH E9 states the rule for medicines): the
new model must be *shown* to lose less than the margin. ``level`` holds for each end of the interval
by itself: at 0.95 a model that loses exactly the margin passes in 5 of 100 gates, and the interval
between both ends is the 90 % one. A 95 % interval (2.5 % per end) would ask for 40 % more photos to
pass as many good models, and buys nothing here: a loss of 1.5 margins is far below either end.

Resamples of photos contain photos twice, which lifts AP (``metrics.bootstrap``) of both models
alike; what is left of it in the difference is taken out by centring the interval on the estimate.

Classes and sizes are many, so that some look worse by chance. They fail only where the loss is
*shown* to be beyond a wider margin, by limits that hold for all of them at once: the largest
deviation over all groups, in standard errors, is taken from the very same resamples (max-t,
single-step: Westfall and Young 1993, Romano and Wolf 2005). Unlike Holm's correction it needs no
p-values of 1 in 1,000, which 2,000 resamples cannot give, and it knows that groups go together. A
group of few boxes shows nothing and so holds nothing up; the overall check does.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ..models.detections import IntArray
from ..models.errors import InputError
from ..models.metrics import AREAS, MatchTable
from ..models.resampling import class_ap
from .verdict import Check, Outcome

DoubleArray = npt.NDArray[np.float64]

MARGIN_AP = 1.0
RESAMPLES = 2000
LEVEL = 0.95
GROUP_MARGINS = 5.0
"""The margin of a class or size group is so many times the margin of the whole."""
GROUP_LEVEL = 0.99
"""Higher than for the whole: bootstrap limits hold a little seldomer than they say. Of 200 gates
with 15 groups on 300 photos, a margin of nothing and no worse model, 7 failed (of 100 at 0.95: 12).
"""
BOXES_MIN = 50
GROUP_PHOTOS_MIN = 20
"""A class whose boxes stand in fewer photos cannot be judged by drawing photos."""
PHOTOS_MIN = 30
"""With fewer photos the interval is not to be believed, however narrow it is."""
FAR = 100
"""Nobody gathers so many times the photos: the estimate is as good as at the margin."""


@dataclass(frozen=True, eq=False)
class _Group:
    """A class or a size with its difference and that of the resamples, in AP.

    Attributes:
        name: As ``person`` or ``small objects``.
        new: AP of the new model.
        old: AP of the old model.
        samples: float64 ``(resamples,)``: differences; NaN where a resample has no box of it.
        boxes: True boxes.
        photos: Photos with at least one of them.
    """

    name: str
    new: float
    old: float
    samples: DoubleArray
    boxes: int
    photos: int


def accuracy_checks(
    new: MatchTable,
    old: MatchTable,
    *,
    margin_ap: float = MARGIN_AP,
    resamples: int = RESAMPLES,
    seed: int = 0,
    level: float = LEVEL,
    boxes_min: int = BOXES_MIN,
    group_margin_ap: float | None = None,
    group_level: float = GROUP_LEVEL,
    taken: IntArray | None = None,
) -> list[Check]:
    """Compares the new model's AP with the old one's: overall, per size and per class.

    Args:
        new: Matches of the new model.
        old: Matches of the old one with the same boxes of the same photos.
        margin_ap: The loss of AP, in percent points, that is not accepted any more.
        resamples: Of the photos, the same for both models and for all groups.
        seed: Of the draw.
        level: Of each end of the intervals by itself.
        boxes_min: Groups of fewer true boxes are not judged.
        group_margin_ap: Loss of a class or size that fails if shown; five margins by default.
        group_level: Of the limits of all groups together.
        taken: How often each photo is there, int64 ``(photos,)``; once by default. For trials of
            the gate itself, which draw their photos.

    Returns:
        ``AP``, then a check per size and class that can be judged, then one that only informs
        about the others, if any.

    Raises:
        InputError: The tables are not of the same boxes.
    """
    if new.classes != old.classes or not np.array_equal(new.truths, old.truths):
        message = (
            "expected both models on the same photos, boxes and classes, found "
            f"{new.photos} photos with {int(new.truths[0].sum())} boxes and {old.photos} with "
            f"{int(old.truths[0].sum())}; run both on the same --data"
        )
        raise InputError(message)
    once = np.ones(new.photos, np.int64) if taken is None else taken
    count = int(once.sum())
    drawn = np.random.default_rng(seed).multinomial(count, once / count, size=resamples)
    weights = np.concatenate([once[None], drawn])  # the first row is the photos themselves
    groups = list(_groups(new, old, weights))
    whole, parts = groups[0], [one for one in groups[1:] if one.boxes > 0]
    checks = [_overall(whole, margin_ap, level, count)]
    wide = GROUP_MARGINS * margin_ap if group_margin_ap is None else group_margin_ap
    judged = [g for g in parts if g.boxes >= boxes_min and g.photos >= GROUP_PHOTOS_MIN]
    checks += _judge(judged, wide, group_level)
    if few := [g.name for g in parts if g not in judged]:
        checks.append(_too_few(few, boxes_min))
    return checks


def _groups(new: MatchTable, old: MatchTable, weights: IntArray) -> Iterator[_Group]:
    """Yields the whole, the sizes, then the classes."""
    per_class: list[DoubleArray] = []
    for area, size in enumerate(AREAS):
        both = [100 * class_ap(table, weights, area) for table in (new, old)]
        truths = new.truths[area]
        if size == "all":
            per_class = [ap.mean(axis=2) for ap in both]
        whole = [_mean(ap.reshape(len(ap), -1)) for ap in both]
        name = "all" if size == "all" else f"{size} objects"
        yield _group(name, whole[0], whole[1], truths.sum(axis=0), weights[0])
    for c, name in enumerate(new.classes):
        first, second = (ap[:, c] for ap in per_class)
        yield _group(name, first, second, new.truths[0, c], weights[0])


def _group(
    name: str, new: DoubleArray, old: DoubleArray, boxes: IntArray, once: IntArray
) -> _Group:
    return _Group(
        name,
        float(new[0]),
        float(old[0]),
        new[1:] - old[1:],
        int(boxes @ once),
        int(((boxes > 0) * once).sum()),
    )


def _mean(values: DoubleArray) -> DoubleArray:
    """Returns the mean of each row without NaN; NaN where nothing is left."""
    known = np.isfinite(values)
    count = known.sum(axis=1)
    total = np.where(known, values, 0.0).sum(axis=1)
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)


def _overall(group: _Group, margin: float, level: float, photos: int) -> Check:
    value = group.new - group.old
    figures: dict[str, Any] = {
        "ap_new": _round(group.new),
        "ap_old": _round(group.old),
        "difference": _round(value),
        "margin_ap": margin,
        "level_per_end": level,
        "resamples": len(group.samples),
        "photos": photos,
        "boxes": group.boxes,
    }
    known = group.samples[np.isfinite(group.samples)]
    if not math.isfinite(value) or not len(known):
        text = "expected photos with boxes of classes that both models know, found none; add some"
        return Check("AP", "accuracy", "not enough evidence", text, figures)
    shift = value - float(known.mean())
    low, high = (float(np.quantile(known, q)) + shift for q in (1 - level, level))
    figures |= {"low": _round(low), "high": _round(high), "resamples_bias": _round(-shift)}
    interval = f"{value:+.2f} AP [{low:+.2f}, {high:+.2f}] ({group.old:.2f} -> {group.new:.2f})"
    outcome: Outcome = "not enough evidence"
    if high < -margin:
        outcome = "fail"
        text = f"expected a loss below {margin:g} AP, found {interval}; do not deploy this model"
    elif photos < PHOTOS_MIN:
        figures["photos_needed"] = PHOTOS_MIN
        text = f"expected at least {PHOTOS_MIN} photos, found {photos}: {interval}; add photos"
    elif low > -margin:
        outcome = "pass"
        text = f"expected a loss below {margin:g} AP, found {interval}"
    elif value <= -margin or (needed := photos_needed(photos, value, low, margin)) > photos * FAR:
        text = (
            f"expected a loss shown to be below {margin:g} AP, found {interval}: the estimate is "
            "itself at or beyond the margin, more photos are unlikely to help; mend the model"
        )
    else:
        figures["photos_needed"] = needed
        text = (
            f"expected a loss shown to be below {margin:g} AP, found {interval} on {photos} "
            f"photos; with about {needed} photos of the same kind it would be shown, if the "
            "difference stays what it is"
        )
    return Check("AP", "accuracy", outcome, text, figures)


def photos_needed(photos: int, value: float, low: float, margin: float) -> int:
    """Returns about how many photos bring the lower end above the margin, two digits of it.

    The interval's width falls with the root of the number of photos.

    Args:
        photos: That there are.
        value: Difference of AP, above ``-margin``.
        low: Lower end of its interval, at or below ``-margin``.
        margin: Loss that is not accepted.
    """
    exact = photos * ((value - low) / (value + margin)) ** 2
    step: float = 10 ** max(0, math.floor(math.log10(max(exact, 1))) - 1)
    return int(math.floor(exact / step + 1) * step)


def _judge(groups: list[_Group], margin: float, level: float) -> list[Check]:
    """Returns a check per group, with upper limits that hold for all groups at once."""
    if not groups:
        return []
    samples = np.array([group.samples for group in groups])
    known = np.isfinite(samples)
    count = np.maximum(known.sum(axis=1, keepdims=True), 1)
    mean = np.where(known, samples, 0.0).sum(axis=1, keepdims=True) / count
    away = np.where(known, samples - mean, 0.0)
    error = np.sqrt((away**2).sum(axis=1, keepdims=True) / count)
    scaled = np.divide(away, error, out=np.zeros_like(away), where=error > 0)
    # How far below its middle some group falls by chance: so far a limit must lie above a value.
    far = float(np.quantile((-scaled).max(axis=0), level))
    return [
        _group_check(group, far * float(one), margin, len(groups))
        for group, one in zip(groups, error[:, 0], strict=True)
    ]


def _group_check(group: _Group, half: float, margin: float, groups: int) -> Check:
    value = group.new - group.old
    low, high = value - half, value + half
    figures = {
        "ap_new": _round(group.new),
        "ap_old": _round(group.old),
        "difference": _round(value),
        "low": _round(low),
        "high": _round(high),
        "margin_ap": margin,
        "boxes": group.boxes,
        "photos": group.photos,
        "groups": groups,
    }
    found = f"{value:+.1f} AP [{low:+.1f}, {high:+.1f}] on {group.boxes} boxes"
    name = f"AP of {group.name}"
    if high < -margin:
        text = (
            f"expected no loss beyond {margin:g} AP, found {found}, shown although {groups} groups "
            "were looked at; look at these pictures and calibrate or train with more of them"
        )
        return Check(name, "accuracy", "fail", text, figures)
    text = f"no loss beyond {margin:g} AP is shown: {found}"
    return Check(name, "accuracy", "pass", text, figures)


def _too_few(names: list[str], boxes_min: int) -> Check:
    shown = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
    text = (
        f"expected {boxes_min} boxes in {GROUP_PHOTOS_MIN} photos to judge a group by itself, "
        f"found fewer of {shown}; they count within the whole, add photos of those that matter"
    )
    figures = {"groups": names, "boxes_min": boxes_min, "photos_min": GROUP_PHOTOS_MIN}
    return Check("AP of rare classes", "accuracy", "not enough evidence", text, figures, False)


def _round(value: float) -> float | None:
    return round(value, 3) if math.isfinite(value) else None
