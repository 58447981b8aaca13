"""Seconds of the gate's paired bootstrap, against the same in plain NumPy, in turns.

    python benchmarks/gate_speed.py NEW.onnx OLD.onnx --data FOLDER [--resamples 2000]

Detections are cached beside the data's name in ``--cache``, so that a second run infers nothing.
Plain: resample by resample, class by class, all ten thresholds in one array; exact, and the same
figures. Both ways work on the same resamples, a fifth of them at a time, and are told apart by
wall and processor time. ``groups`` is the whole gate: sizes and classes, too. Exit code 1 if the
two differ, or if the whole gate takes 30 s or more (processor time).
"""

from __future__ import annotations

import argparse
import json
import pickle
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from edgesight.deploy.gate_accuracy import accuracy_checks
from edgesight.models.dataset import Dataset, open_dataset
from edgesight.models.detector import OnnxDetector
from edgesight.models.evaluate import evaluate_detections, run_detector
from edgesight.models.files import sha256
from edgesight.models.machine import machine
from edgesight.models.metrics import MatchTable, draw, resampled_ap
from edgesight.models.resampling import RECALLS

TURNS = 5
GOAL_S = 30.0
DIFFERENCE_MAX = 1e-9


def main() -> int:
    """Measures and prints a JSON object."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs=2, type=Path, metavar="MODEL")
    parser.add_argument("--data", required=True, type=Path)
    parser.add_argument("--score-min", type=float, default=0.05)
    parser.add_argument("--resamples", type=int, default=2000)
    parser.add_argument("--cache", type=Path, default=Path("runs/gate_speed"))
    args = parser.parse_args()
    data = open_dataset(args.data)
    tables = [matches(path, data, args.score_min, args.cache) for path in args.models]
    weights = draw(tables[0].photos, args.resamples, 0)
    ways = {"plain": plain_ap, "ours": resampled_ap}
    spent = {name: np.zeros(2) for name in ways}
    found: dict[str, list[Any]] = {name: [] for name in ways}
    for part in np.array_split(weights, TURNS):
        for name, way in ways.items():
            both, seconds = timed(lambda way=way, part=part: [way(t, part) for t in tables])  # type: ignore[misc]
            spent[name] += seconds
            found[name].append(both[0] - both[1])
    apart = float(np.abs(np.concatenate(found["plain"]) - np.concatenate(found["ours"])).max())
    checks, seconds = timed(lambda: accuracy_checks(tables[0], tables[1], resamples=args.resamples))
    row = {
        "photos": tables[0].photos,
        "score_min": args.score_min,
        "resamples": args.resamples,
        "detections": [len(table.score) for table in tables],
        **{f"{name}_s": rounded(value) for name, value in spent.items()},
        "groups_s": rounded(seconds),
        "checks": len(checks),
        "largest_difference_ap": apart,
        "seconds_are": ["wall", "processor"],
        "machine": machine(),
    }
    print(json.dumps(row))
    return int(apart > DIFFERENCE_MAX or seconds[1] >= GOAL_S)


def matches(path: Path, data: Dataset, score_min: float, cache: Path) -> MatchTable:
    """Returns a model's matches; its detections are kept in the cache folder."""
    kept = cache / f"{path.stem}-{sha256(path)[:12]}-{len(data.photos)}.pickle"
    if not kept.is_file():  # a file of our own: nothing else is ever read from there
        detector = OnnxDetector(path)
        found, _ = run_detector(detector, data, score_min=score_min, title=path.name)
        cache.mkdir(parents=True, exist_ok=True)
        kept.write_bytes(pickle.dumps((detector.spec.classes, found)))
    classes, found = pickle.loads(kept.read_bytes())
    return evaluate_detections([one.above(score_min) for one in found], classes, data).table


def timed(work: Callable[[], Any]) -> tuple[Any, npt.NDArray[np.float64]]:
    """Returns what the work gave, and its seconds of wall and processor time."""
    wall, cpu = time.perf_counter(), time.process_time()
    result = work()
    return result, np.array([time.perf_counter() - wall, time.process_time() - cpu])


def plain_ap(table: MatchTable, weights: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
    """Returns AP in percent of each resample, one after the other."""
    result = []
    for taken in weights:
        per_class = []
        for c in range(len(table.classes)):
            total = int(taken @ table.truths[0, c])
            if not total:
                continue
            mine = slice(int(table.starts[c]), int(table.starts[c + 1]))
            times = taken[table.photo[mine]]
            hits = np.cumsum(table.hit[0][:, mine] * times, axis=1)
            both = np.cumsum(table.counted[0][:, mine] * times, axis=1)
            precision = hits / np.maximum(both, 1)
            best = np.maximum.accumulate(precision[:, ::-1], axis=1)[:, ::-1]
            recall = hits / total
            ap = []
            for t in range(len(hits)):
                place = np.searchsorted(recall[t], RECALLS, side="left")
                there = place < recall.shape[1]
                ap.append(best[t][place[there]].sum() / len(RECALLS))
            per_class.append(np.mean(ap))
        result.append(100 * np.mean(per_class))
    return np.array(result)


def rounded(seconds: npt.NDArray[np.float64]) -> list[float]:
    """Returns seconds with two digits after the point."""
    return [round(float(one), 2) for one in seconds]


if __name__ == "__main__":
    sys.exit(main())
