"""Models for the gate's trials of itself: some of equal AP, some with a loss that is known."""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from ..models.dataset import ClassMap, Dataset, GroundTruth
from ..models.detections import Detections
from ..models.detector import SCORE_MIN_EVAL, OnnxDetector
from ..models.errors import InputError
from ..models.evaluate import run_detector
from ..models.metrics import MatchTable, match_photos, resampled_ap
from .weight_noise import noisy_weights

Kind = Literal["scores", "boxes"]

EQUAL_MAX_AP = 0.1
"""Two models that differ by more on all photos are not called equal."""
EXACT_AP, NEAR_AP = 0.01, 0.1
"""A seeded loss is to be so exact; where few photos make AP jump, it may be so far off."""
HALVINGS = 20
STRENGTH_MAX: dict[Kind, float] = {"scores": 4.0, "boxes": 1.0}


def detect_variants(
    model: Path,
    data: Dataset,
    shared: ClassMap,
    noise: float,
    count: int,
    *,
    head: str | None = None,
    threads: int = 1,
    seed: int = 0,
    progress: bool = True,
) -> list[list[Detections]]:
    """Returns the detections of models whose weights have noise, each on all photos."""
    content = model.read_bytes()
    result = []
    with tempfile.TemporaryDirectory() as folder:
        for number in range(count):
            path = Path(folder) / f"variant {number + 1} of {count}.onnx"
            path.write_bytes(noisy_weights(content, noise, seed + number))
            detector = OnnxDetector(path, head=head, threads=threads)
            found, _ = run_detector(
                detector, data, score_min=SCORE_MIN_EVAL, progress=progress, title=path.stem
            )
            result.append([shared.detections(one) for one in found])
    return result


def closest(tables: Sequence[MatchTable], count: int) -> list[tuple[int, int]]:
    """Returns the pairs of models whose AP on all photos is most alike.

    Raises:
        InputError: There is none.
    """
    ap = [ap_of(table) for table in tables]
    ranked = sorted(
        itertools.combinations(range(len(tables)), 2),
        key=lambda pair: abs(ap[pair[0]] - ap[pair[1]]),
    )
    alike = [pair for pair in ranked[:count] if abs(ap[pair[0]] - ap[pair[1]]) <= EQUAL_MAX_AP]
    if not alike:
        message = (
            f"expected two models with noise within {EQUAL_MAX_AP} AP of one another, found AP "
            f"{', '.join(f'{one:.2f}' for one in ap)}; take more variants or less noise"
        )
        raise InputError(message)
    return alike


def blurred(
    found: Sequence[Detections],
    old: MatchTable,
    truths: Sequence[GroundTruth],
    loss_ap: float,
    *,
    kind: Kind = "scores",
    seed: int = 0,
) -> MatchTable:
    """Returns a model's matches after blurring until its AP is so much below the old one's.

    Args:
        found: Detections per photo.
        old: Matches of the other model.
        truths: Boxes per photo.
        loss_ap: AP of the old one minus AP of the result, on all photos.
        kind: What gets normal noise: the logits of the scores, or the corners.
        seed: Of the noise, which is the same at every strength.

    Raises:
        InputError: No strength gives this loss.
    """
    random = np.random.default_rng(seed)
    shape = (lambda n: n) if kind == "scores" else (lambda n: (n, 4))
    noise = [random.normal(size=shape(len(one))) for one in found]
    goal, low, high = ap_of(old) - loss_ap, 0.0, STRENGTH_MAX[kind]
    nearest = ap_of(old) - goal, old
    for _ in range(HALVINGS):
        strength = (low + high) / 2
        table = match_photos(
            [_blur(one, strength * n, kind) for one, n in zip(found, noise, strict=True)],
            truths,
            old.classes,
        )
        away = ap_of(table) - goal
        if abs(away) < abs(nearest[0]):
            nearest = away, table
        if abs(away) <= EXACT_AP:
            break
        low, high = (strength, high) if away > 0 else (low, strength)
    away, table = nearest
    if abs(away) <= NEAR_AP:
        return table
    message = (
        f"expected that blurring {kind} gives a loss of {loss_ap:g} AP, found "
        f"{loss_ap - away:.2f}; take more photos"
    )
    raise InputError(message)


def _blur(found: Detections, noise: Any, kind: Kind) -> Detections:
    if kind == "scores":
        score = np.clip(found.score.astype(np.float64), 1e-6, 1 - 1e-6)
        blurry = 1 / (1 + np.exp(-np.log(score / (1 - score)) - noise))
        return Detections(found.xyxy, blurry.astype(np.float32), found.label)
    side = found.xyxy[:, 2:] - found.xyxy[:, :2]
    moved = found.xyxy + noise * np.tile(side, 2)
    ordered = np.concatenate(
        [np.minimum(moved[:, :2], moved[:, 2:]), np.maximum(moved[:, :2], moved[:, 2:])], axis=1
    )
    return Detections(ordered.astype(np.float32), found.score, found.label)


def ap_of(table: MatchTable) -> float:
    """Returns AP over all photos, in percent."""
    return float(resampled_ap(table, np.ones((1, table.photos), np.int64))[0])
