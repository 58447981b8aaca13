"""Boxes to learn from: people's where there are any, else what the uncut network finds."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from tqdm import tqdm

from ..models.dataset import Dataset, load_image, map_classes
from ..models.detector import OnnxDetector
from .photos import PhotoLabels

PSEUDO_SCORE_MIN = 0.35


def photo_labels(
    datasets: Iterable[Dataset], detector: OnnxDetector, progress: bool = True
) -> list[PhotoLabels]:
    """Returns the boxes of every photo of the data sets, in their order.

    Labelled photos give people's boxes with weight 1 (crowd regions are left out). For the others
    the uncut detector is asked, at its own resolution; its scores are the weights, so that a
    student of another resolution still learns from what the teacher saw at its best.

    Args:
        datasets: Labelled or not.
        detector: The uncut network.
        progress: Show a bar on stderr.
    """
    result = []
    for dataset in datasets:
        to_model = None
        if dataset.classes is not None:
            shared = map_classes(detector.spec.classes, dataset.classes)
            first = {int(n): i for i, n in reversed(list(enumerate(shared.from_model))) if n >= 0}
            to_model = np.array([first.get(int(n), -1) for n in shared.from_data], np.int64)
        bar = tqdm(dataset.photos, desc="labels", unit="photo", disable=not progress)
        for index, photo in enumerate(bar):
            if to_model is not None and dataset.truths is not None:
                truth = dataset.truths[index]
                label = to_model[truth.label]
                kept = (label >= 0) & ~truth.iscrowd
                ones = np.ones(int(kept.sum()), np.float32)
                result.append(PhotoLabels(truth.xyxy[kept], label[kept], ones))
                continue
            seen = detector(load_image(photo.path), PSEUDO_SCORE_MIN)
            result.append(PhotoLabels(np.array(seen.xyxy), np.array(seen.label), seen.score.copy()))
    return result
