"""Two detectors timed in turn on this machine: in ONNX Runtime, and in OpenVINO if it is there."""

from __future__ import annotations

import statistics
import time
from typing import Any

import numpy.typing as npt

from ..models.dataset import Dataset
from ..models.detector import OnnxDetector
from ..models.engines import Net
from ..models.errors import EdgeSightError
from ..models.openvino_net import OpenVinoNet, has_openvino
from ..models.preprocess import prepare

WARM_UP = 3
"""Turns that fill the caches and are not counted."""


def latency(a: OnnxDetector, b: OnnxDetector, data: Dataset, rounds: int) -> dict[str, Any] | None:
    """Times the bare networks of two detectors in turn, one thread, on one photo.

    Taking turns lets both meet the same disturbances of a busy machine.

    Returns:
        Median milliseconds of both, the median of the rounds' ratios, and its quartiles; None if
        ``rounds`` is 0.
    """
    return _in_turn((a, b), _inputs(a, b, data), rounds) if rounds else None


def openvino_latency(
    a: OnnxDetector, b: OnnxDetector, data: Dataset, rounds: int
) -> dict[str, Any] | None:
    """Times the files of two detectors in OpenVINO, in the same way.

    Returns:
        As ``latency``, and ``failed``: why there are no figures, or None. None in place of all if
        OpenVINO is not installed or ``rounds`` is 0.
    """
    if not rounds or not has_openvino():
        return None
    try:
        nets = OpenVinoNet(a.path), OpenVinoNet(b.path)
        return {**_in_turn(nets, _inputs(a, b, data), rounds), "failed": None}
    except EdgeSightError as error:  # an engine that cannot run a file is no reason to stop
        return {"failed": str(error)}


def _inputs(a: OnnxDetector, b: OnnxDetector, data: Dataset) -> list[npt.NDArray[Any]]:
    image = data.photos[0].load()
    return [prepare(image, detector.spec)[0] for detector in (a, b)]


def _in_turn(nets: tuple[Net, Net], inputs: list[npt.NDArray[Any]], rounds: int) -> dict[str, Any]:
    times: tuple[list[float], list[float]] = ([], [])
    for turn in range(rounds + WARM_UP):
        for net, tensor, own in zip(nets, inputs, times, strict=True):
            start = time.perf_counter()
            net.infer(tensor)
            if turn >= WARM_UP:
                own.append(1000 * (time.perf_counter() - start))
    ratios = [y / x for x, y in zip(*times, strict=True)]
    quarters = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else [ratios[0]] * 3
    return {
        "before_ms": statistics.median(times[0]),
        "after_ms": statistics.median(times[1]),
        "ratio": statistics.median(ratios),
        "ratio_quartiles": [quarters[0], quarters[2]],
        "rounds": rounds,
        "threads": 1,
    }
