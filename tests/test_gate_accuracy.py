"""The gate on accuracy passes what is as good, fails what is worse, and knows when it cannot."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from edgesight.deploy.gate_accuracy import accuracy_checks, photos_needed
from edgesight.deploy.verdict import Check, Verdict
from edgesight.models.dataset import GroundTruth
from edgesight.models.detections import Detections
from edgesight.models.errors import InputError
from edgesight.models.metrics import MatchTable, evaluate, match_photos, paired_bootstrap

CLASSES = ("a", "b", "rare")
PHOTOS = 120
RESAMPLES = 300


def truths(photos: int = PHOTOS, seed: int = 0) -> list[GroundTruth]:
    """Returns four boxes per photo; only every 40th photo has one of the class ``rare``."""
    random = np.random.default_rng(seed)
    found = []
    for i in range(photos):
        corner = np.array([[0, 0], [300, 0], [0, 300], [300, 300]]) + random.uniform(0, 50, (4, 2))
        side = np.exp(random.uniform(2.5, 5, (4, 2)))
        label = random.integers(0, 2, 4)
        if i % 40 == 0:
            label[0] = 2
        found.append(GroundTruth.of_boxes(np.hstack([corner, corner + side]), label))
    return found


def detect(
    data: list[GroundTruth],
    *,
    noise: float = 0.08,
    lost: float = 0.0,
    of: int = -1,
    seed: int = 0,
    classes: tuple[str, ...] = CLASSES,
) -> MatchTable:
    """Returns the matches of a detector with noisy corners that loses a share (of one class)."""
    random = np.random.default_rng(seed)
    found = []
    for truth in data:
        side = truth.xyxy[:, 2:] - truth.xyxy[:, :2]
        xyxy = truth.xyxy + np.tile(side, 2) * random.normal(0, noise, truth.xyxy.shape)
        score = random.uniform(0.2, 1, len(truth))
        away = (random.uniform(size=len(truth)) < lost) & ((of < 0) | (truth.label == of))
        kept = ~away & (xyxy[:, 2:] > xyxy[:, :2]).all(axis=1)
        found.append(
            Detections(
                xyxy[kept].astype(np.float32), score[kept].astype(np.float32), truth.label[kept]
            )
        )
    return match_photos(found, data, classes)


def checks(new: MatchTable, old: MatchTable, **options: float) -> dict[str, Check]:
    found = accuracy_checks(new, old, resamples=RESAMPLES, **options)  # type: ignore[arg-type]
    return {check.name: check for check in found}


def test_the_same_model_passes_and_says_what_cannot_be_judged() -> None:
    table = detect(truths())
    found = checks(table, table)
    assert [c.outcome for c in found.values() if c.required] == ["pass"] * (len(found) - 1)
    assert next(iter(found)) == "AP"
    assert {"AP of a", "AP of b", "AP of medium objects"} <= set(found)
    assert found["AP"].figures["difference"] == 0
    rare = found["AP of rare classes"]
    assert not rare.required
    assert "rare" in rare.figures["groups"]
    assert Verdict(tuple(found.values())).passed


def test_a_loss_beyond_the_margin_fails_and_below_it_passes() -> None:
    data = truths()
    old, new = detect(data), detect(data, lost=0.3)
    overall = checks(new, old)["AP"]
    assert overall.outcome == "fail"
    assert overall.figures["high"] < -1
    assert "expected a loss below 1 AP, found -" in overall.reason
    assert checks(new, old, margin_ap=50.0)["AP"].outcome == "pass"
    assert checks(old, new)["AP"].outcome == "pass"


def test_the_interval_is_the_paired_bootstraps() -> None:
    data = truths()
    new, old = detect(data, seed=1), detect(data, seed=2)
    ours = checks(new, old)["AP"].figures
    theirs = paired_bootstrap(new, old, RESAMPLES, 0, 0.9)  # 5 % beyond each end
    assert (ours["low"], ours["high"]) == pytest.approx((theirs.low, theirs.high), abs=1e-3)
    assert ours["difference"] == pytest.approx(theirs.value, abs=1e-3)


def test_without_evidence_it_says_how_many_photos_would_do() -> None:
    """As many photos of the same kind as it says do bring the lower end above the margin."""
    few = truths(40)
    old, new = detect(few, seed=2), detect(few, seed=3)
    value = checks(new, old)["AP"].figures["difference"]
    margin = 0.5 - min(value, 0) + 0.5
    found = checks(new, old, margin_ap=margin)["AP"]
    assert found.outcome == "not enough evidence"
    assert not Verdict((found,)).passed
    needed = found.figures["photos_needed"]
    assert f"about {needed} photos" in found.reason
    copies = -(-needed // 40)
    many = np.full(40, copies)  # the same photos again and again: the difference stays
    assert checks(new, old, margin_ap=margin, taken=many)["AP"].outcome == "pass"


def test_photos_needed_by_hand() -> None:
    # Half a width of 1 on 100 photos must come down to a half: four times the photos, rounded up.
    assert photos_needed(100, -0.5, -1.5, 1.0) == 410
    assert photos_needed(100, 0.0, -1.0, 1.0) == 110


def test_a_loss_at_the_margin_is_not_worth_more_photos() -> None:
    data = truths(40)
    old, new = detect(data, seed=2), detect(data, seed=3, lost=0.03)
    value = checks(new, old)["AP"].figures["difference"]
    assert value < 0
    found = checks(new, old, margin_ap=-value)["AP"]
    assert found.outcome == "not enough evidence"
    assert "more photos are unlikely to help" in found.reason
    assert "photos_needed" not in found.figures


def test_one_bad_class_fails_by_itself_within_a_wide_margin_of_the_whole() -> None:
    data = truths()
    old, new = detect(data), detect(data, lost=0.5, of=1)
    found = checks(new, old, margin_ap=60.0, group_margin_ap=5.0)
    assert found["AP"].outcome == "pass"
    assert found["AP of b"].outcome == "fail"
    assert "shown although" in found["AP of b"].reason
    assert found["AP of a"].outcome == "pass"
    assert Verdict(tuple(found.values())).outcome == "fail"


def test_groups_of_equal_models_fail_as_seldom_as_stated() -> None:
    """Two models of one kind, 15 groups, a margin of nothing: about 20 % of gates fail one at 0.8.

    Each group by itself at the same level would let nearly all gates fail.
    """
    names = tuple("abcdefghijkl")
    flagged = 0
    for trial in range(30):
        random = np.random.default_rng(trial)
        data = [
            GroundTruth(t.xyxy, random.integers(0, 12, len(t)), t.area, t.iscrowd)
            for t in truths(seed=trial)
        ]
        new, old = (detect(data, seed=100 * trial + who, classes=names) for who in (1, 2))
        found = accuracy_checks(
            new,
            old,
            resamples=100,
            seed=trial,
            boxes_min=20,
            group_margin_ap=0.0,
            group_level=0.8,
        )
        judged = [check for check in found[1:] if check.required]
        assert len(judged) >= 13
        flagged += any(check.outcome == "fail" for check in judged)
    assert 1 <= flagged <= 15


def test_photos_taken_twice_count_twice() -> None:
    data = truths(60)
    new, old = detect(data, seed=1), detect(data, seed=2)
    taken = np.random.default_rng(0).multinomial(60, np.full(60, 1 / 60))
    index = np.repeat(np.arange(60), taken)
    again = [data[i] for i in index]
    assert taken.max() > 1
    found = checks(new, old, taken=taken)["AP"].figures  # type: ignore[arg-type]
    assert (found["photos"], found["boxes"]) == (60, sum(map(len, again)))
    once = np.ones(60, np.int64)
    assert found["ap_new"] != checks(new, old, taken=once)["AP"].figures["ap_new"]  # type: ignore[arg-type]


def test_many_boxes_in_few_photos_are_not_judged() -> None:
    data = truths(60)
    side = np.arange(0, 400, 40.0)
    corner = np.stack(np.meshgrid(side, side), axis=-1).reshape(-1, 2)
    crowded = GroundTruth.of_boxes(np.hstack([corner, corner + 30]), np.full(100, 2))
    table = detect([crowded, crowded, *data])
    found = checks(table, table)
    assert int(table.truths[0, 2].sum()) > 200
    assert "AP of rare" not in found
    assert found["AP of rare classes"].figures["groups"][-1] == "rare"


def test_few_photos_and_no_boxes_never_pass() -> None:
    table = detect(truths(5))
    few = checks(table, table)["AP"]
    assert few.outcome == "not enough evidence"
    assert "expected at least 30 photos, found 5" in few.reason
    empty = GroundTruth.of_boxes(np.zeros((0, 4), np.float32), np.zeros(0, np.int64))
    none = match_photos([Detections.empty()] * 40, [empty] * 40, CLASSES)
    assert np.isnan(evaluate(none).ap)
    assert checks(none, none)["AP"].outcome == "not enough evidence"


def test_tables_of_other_boxes_are_refused() -> None:
    data = truths(40)
    table = detect(data)
    with pytest.raises(InputError, match="expected both models on the same photos"):
        accuracy_checks(table, detect(truths(40, seed=1)))
    with pytest.raises(InputError, match="expected both models on the same photos"):
        accuracy_checks(table, dataclasses.replace(table, classes=("a", "c", "rare")))
