"""Average precision by COCO's protocol, with bootstrap intervals over photos.

Detections are matched with the true boxes once (``match_photos``); the table of matches then gives
AP of all photos, or of any resample of them, without matching again. All figures are in percent.

Protocol (as in pycocotools): per class and photo the best 100 detections, best first, each take
the free true box that they overlap most; ten IoU thresholds 0.50, 0.55 ... 0.95; precision made
monotonous and read at 101 recall points; mean over thresholds and over classes that have a true
box. Crowd regions, and true boxes outside the area range, neither count nor punish.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from .dataset import GroundTruth
from .detections import BoolArray, Detections, IntArray
from .resampling import class_ap

DoubleArray = npt.NDArray[np.float64]

IOUS: DoubleArray = np.linspace(0.5, 0.95, 10)
PER_PHOTO_MAX = 100
AREAS: dict[str, tuple[float, float]] = {
    "all": (0.0, 1e10),
    "small": (0.0, 32.0**2),
    "medium": (32.0**2, 96.0**2),
    "large": (96.0**2, 1e10),
}


@dataclass(frozen=True)
class ApResult:
    """Average precision in percent; NaN where no true box is of that kind.

    Attributes:
        ap: Mean over IoU thresholds 0.50 ... 0.95.
        ap50: At IoU 0.50.
        ap75: At IoU 0.75.
        ap_small: ``ap`` of objects up to 32x32 pixels.
        ap_medium: ``ap`` of objects between.
        ap_large: ``ap`` of objects from 96x96 pixels.
        per_class: ``ap`` of each class by name.
        photos: Number of photos.
        boxes: Number of true boxes, crowd regions not counted.
    """

    ap: float
    ap50: float
    ap75: float
    ap_small: float
    ap_medium: float
    ap_large: float
    per_class: dict[str, float]
    photos: int
    boxes: int


@dataclass(frozen=True)
class Interval:
    """A figure with its bootstrap percentile interval, centred on it, in percent.

    Attributes:
        value: Point estimate, from all photos.
        low: Lower limit.
        high: Upper limit.
        level: Share of the resamples between the limits.
        resamples: Number of resamples.
    """

    value: float
    low: float
    high: float
    level: float
    resamples: int


@dataclass(frozen=True, eq=False)
class MatchTable:
    """Which detection matched, at every threshold and area range: all that AP needs.

    Detections are grouped by class and sorted by falling score within it.

    Attributes:
        classes: Class names.
        starts: int64 ``(classes + 1,)``: class c has the detections ``starts[c]:starts[c + 1]``.
        photo: int64 ``(n,)``: position of the photo of each detection.
        score: float32 ``(n,)``.
        hit: bool ``(areas, thresholds, n)``: matched a true box that counts.
        counted: bool ``(areas, thresholds, n)``: counts, as a hit or as a false alarm.
        truths: int64 ``(areas, classes, photos)``: true boxes that count.
    """

    classes: tuple[str, ...]
    starts: IntArray
    photo: IntArray
    score: npt.NDArray[np.float32]
    hit: BoolArray
    counted: BoolArray
    truths: IntArray

    @property
    def photos(self) -> int:
        """Number of photos."""
        return int(self.truths.shape[2])


def match_photos(
    detections: Sequence[Detections], truths: Sequence[GroundTruth], classes: Sequence[str]
) -> MatchTable:
    """Matches detections with true boxes, photo by photo.

    Args:
        detections: Per photo; labels are indices into ``classes``.
        truths: Per photo, in the same order, labels numbered alike (``dataset.ClassMap``).
            Detections of equal score rank in this order: pycocotools' is that of the image ids.
        classes: Class names.
    """
    if len(detections) != len(truths):
        message = f"expected as many photos on both sides, got {len(detections)}, {len(truths)}"
        raise ValueError(message)
    count = len(classes)
    limits = np.array(list(AREAS.values()))
    truth_total = np.zeros((len(AREAS), count, len(truths)), np.int64)
    parts: list[tuple[Any, ...]] = []
    for position, (found, truth) in enumerate(zip(detections, truths, strict=True)):
        ignored = _outside(truth.area, limits) | truth.iscrowd
        for area in range(len(AREAS)):
            label = truth.label[~ignored[area]]
            truth_total[area, :, position] = np.bincount(label, minlength=count)[:count]
        for label_ in np.unique(found.label):
            mine = np.flatnonzero(found.label == label_)
            mine = mine[np.argsort(-found.score[mine], kind="stable")][:PER_PHOTO_MAX]
            true = truth.label == label_
            box = found.xyxy[mine].astype(np.float64)
            size = np.prod(box[:, 2:] - box[:, :2], axis=1)
            hit = np.zeros((len(AREAS), len(IOUS), len(mine)), np.bool_)
            counted = ~np.broadcast_to(_outside(size, limits)[:, None], hit.shape)
            if true.any():
                overlap = _overlap(box, truth.xyxy[true].astype(np.float64), truth.iscrowd[true])
                _match(overlap, ignored[:, true], truth.iscrowd[true], hit, counted)
            where = np.full(len(mine), position)
            parts.append((np.full(len(mine), label_), where, found.score[mine], hit, counted))
    if not parts:
        none = np.zeros((len(AREAS), len(IOUS), 0), np.bool_)
        empty = np.zeros(0, np.int64)
        parts.append((empty, empty, empty.astype(np.float32), none, none))
    label, photo, score, hits, counts = (
        np.concatenate(column, axis=-1) for column in zip(*parts, strict=True)
    )
    order = np.lexsort((-score, label))  # stable: equal scores stay in the order of the photos
    return MatchTable(
        tuple(classes),
        np.searchsorted(label[order], np.arange(count + 1)),
        photo[order],
        score[order],
        hits[:, :, order],
        counts[:, :, order],
        truth_total,
    )


def evaluate(table: MatchTable) -> ApResult:
    """Returns average precision over all photos of the table."""
    once = np.ones((1, table.photos), np.int64)
    by_area = {
        name: 100 * class_ap(table, once, area)[0] for area, name in enumerate(AREAS)
    }  # each (classes, thresholds)
    whole = by_area["all"]
    return ApResult(
        ap=_mean(whole),
        ap50=_mean(whole[:, 0]),
        ap75=_mean(whole[:, 5]),
        ap_small=_mean(by_area["small"]),
        ap_medium=_mean(by_area["medium"]),
        ap_large=_mean(by_area["large"]),
        per_class={name: _mean(row) for name, row in zip(table.classes, whole, strict=True)},
        photos=table.photos,
        boxes=int(table.truths[0].sum()),
    )


def bootstrap(
    table: MatchTable, resamples: int = 1000, seed: int = 0, level: float = 0.95
) -> Interval:
    """Returns AP with its interval over resamples of the photos (drawn with replacement).

    It says how AP would move with other photos of the same kind *and number*: AP grows as photos
    become fewer (700 photos drawn from many give about 1 AP more than all of them, 100 about 5
    more), and for the same reason AP of resamples lies above AP of the photos. That shift is taken
    out; of 95 % intervals 93 % then hold, without it 87 % (300 photos, YOLOX-nano).

    Args:
        table: Matches.
        resamples: Number of resamples.
        seed: Of the draw.
        level: Share of the resamples between the limits.
    """
    weights = draw(table.photos, resamples, seed)
    value = float(resampled_ap(table, np.ones((1, table.photos), np.int64))[0])
    return _interval(value, resampled_ap(table, weights), level, least=0.0)


def paired_bootstrap(
    a: MatchTable, b: MatchTable, resamples: int = 1000, seed: int = 0, level: float = 0.95
) -> Interval:
    """Returns AP of ``a`` minus AP of ``b`` with its interval, both on the same resamples.

    Much narrower than the two models' own intervals, because easy and hard photos cancel out.

    Args:
        a: Matches of one model.
        b: Matches of another on the same photos in the same order.
        resamples: Number of resamples.
        seed: Of the draw.
        level: Share of the resamples between the limits.
    """
    if a.photos != b.photos:
        message = f"expected tables of the same photos, got {a.photos} and {b.photos} photos"
        raise ValueError(message)
    once = np.ones((1, a.photos), np.int64)
    value = float(resampled_ap(a, once)[0] - resampled_ap(b, once)[0])
    weights = draw(a.photos, resamples, seed)
    return _interval(value, resampled_ap(a, weights) - resampled_ap(b, weights), level)


def draw(photos: int, resamples: int, seed: int) -> IntArray:
    """Returns how often each resample takes each photo, int64 ``(resamples, photos)``."""
    random = np.random.default_rng(seed)
    return random.multinomial(photos, np.full(photos, 1 / photos), size=resamples)


def resampled_ap(table: MatchTable, weights: IntArray) -> DoubleArray:
    """Returns AP (all areas) in percent of each multiset of photos.

    Args:
        table: Matches.
        weights: int64 ``(resamples, photos)``: how often each photo is taken.

    Returns:
        float64 ``(resamples,)``; NaN where a resample has no true box.
    """
    ap = 100 * class_ap(table, weights)
    return np.array([_mean(one) for one in ap], np.float64)


def _match(
    overlap: DoubleArray, ignored: BoolArray, crowd: BoolArray, hit: BoolArray, counted: BoolArray
) -> None:
    """Matches one photo's detections of one class, writing ``hit`` and ``counted``.

    Args:
        overlap: ``(detections, truths)``, detections best first.
        ignored: ``(areas, truths)``: true boxes that do not count.
        crowd: ``(truths,)``: these can be matched many times.
        hit: ``(areas, thresholds, detections)``.
        counted: The same.
    """
    areas, thresholds = hit.shape[:2]
    wanted = np.minimum(IOUS, 1 - 1e-10)[None, :, None]
    free = np.ones((areas, thresholds, overlap.shape[1]), np.bool_)
    ignored = np.broadcast_to(ignored[:, None], free.shape)
    column = np.arange(overlap.shape[1])
    for d in np.flatnonzero(overlap.max(axis=1) >= wanted.min()):
        able = free & (overlap[d] >= wanted)
        # A true box that counts goes before any that does not; of equal overlaps the last wins.
        rank = np.where(able, overlap[d] + 2 * ~ignored, -1.0)
        best = rank.shape[2] - 1 - rank[:, :, ::-1].argmax(axis=2)
        chosen = (column == best[:, :, None]) & able
        counts = (chosen & ~ignored).any(axis=2)
        hit[:, :, d] = counts
        counted[:, :, d] = np.where(chosen.any(axis=2), counts, counted[:, :, d])
        free &= ~chosen | crowd


def _overlap(box: DoubleArray, true: DoubleArray, crowd: BoolArray) -> DoubleArray:
    """Returns IoU ``(n, m)`` in double precision; over the box's own area for crowd regions."""
    low = np.maximum(box[:, None, :2], true[None, :, :2])
    high = np.minimum(box[:, None, 2:], true[None, :, 2:])
    inter = np.prod(np.clip(high - low, 0, None), axis=2)
    own = np.prod(box[:, 2:] - box[:, :2], axis=1)[:, None]
    union = np.where(crowd, own, own + np.prod(true[:, 2:] - true[:, :2], axis=1) - inter)
    result: DoubleArray = np.divide(inter, union, out=np.zeros_like(inter), where=union > 0)
    return result


def _outside(area: DoubleArray, limits: DoubleArray) -> BoolArray:
    result: BoolArray = (area < limits[:, :1]) | (area > limits[:, 1:])
    return result


def _mean(values: DoubleArray) -> float:
    known = values[np.isfinite(values)]
    return float(known.mean()) if len(known) else float("nan")


def _interval(
    value: float, samples: DoubleArray, level: float, *, least: float = -100.0
) -> Interval:
    known = samples[np.isfinite(samples)]
    if not len(known):
        return Interval(value, float("nan"), float("nan"), level, 0)
    low, high = np.quantile(known, [(1 - level) / 2, (1 + level) / 2])
    shift = value - float(known.mean())
    low, high = np.clip([low + shift, high + shift], least, 100.0)  # centring can go too far
    return Interval(value, float(low), float(high), level, len(known))
