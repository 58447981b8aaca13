"""The ``regress`` command: may a new model take the place of the last good one?"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import numpy as np

from ..models.arguments import number_type, whole_from
from ..models.coco import canonical_name
from ..models.dataset import ClassMap, Dataset, map_classes, open_dataset
from ..models.detections import Detections
from ..models.detector import SCORE_MIN_EVAL, OnnxDetector
from ..models.errors import InputError, OutputError
from ..models.evaluate import bar, evaluate_detections, run_detector
from ..models.files import check_replaceable, write_json, write_text
from ..models.machine import machine
from ..models.trial_run import trial_run
from ..models.zoo import MODEL_HELP, model_path
from .gate_baseline import (
    Baseline,
    check_data,
    load_baseline,
    model_beside,
    store_baseline,
)
from .gate_cost import cost_checks, measure_costs, size_check
from .gate_frames import AGREEMENT_MIN, agreement_of, color_check, frame_checks
from .gate_pictures import worst_photos
from .gate_report import to_html, to_json, to_junit, to_text
from .gate_structure import FileFacts, check_family, file_facts, structure_checks
from .verdict import Check, Kind, Verdict

DESCRIPTION = """\
Says whether a new model may take the place of the last good one: pass, fail, or not enough
evidence, which is not passed. Compares AP on the same photos (paired bootstrap against a margin),
time per picture in turns, memory, start time, file size, what runs as integers, classes,
pre-processing, and the boxes photo by photo."""
EXAMPLE = "edgesight regress new.onnx --baseline good.onnx --data my_photos --html report.html"
KINDS: tuple[str, ...] = get_args(Kind)
OPTIONS = (
    "margin_ap", "resamples", "seed", "agreement_min", "slowdown_max",
    "size_max", "memory_max", "start_max", "limit", "threads",
)  # fmt: skip
NAMES = (
    "agreement", "boxes at all", "calibration", "class map", "colour order", "doubled boxes",
    "file size", "head tail", "labels", "memory", "post-processing", "pre-processing",
    "runs as integers", "start time", "weight scales",
)  # fmt: skip
"""Of checks; those of AP and of latency are named after classes, sizes and percentiles."""
MEASURED = ("AP", "latency")
TIMED_PHOTOS, COLOR_PHOTOS = 8, 64
WORST = 6


@dataclass(frozen=True)
class Old:
    """The last good model, from its file or from a stored baseline.

    Attributes:
        facts: Of its file.
        path: The file; None where it is not at hand.
        found: Its boxes per photo, with its own labels.
    """

    facts: FileFacts
    path: Path | None
    found: Sequence[Detections]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's arguments."""
    parser.add_argument("model", metavar="NEW", help=MODEL_HELP)
    parser.add_argument(
        "--baseline",
        required=True,
        metavar="OLD",
        help="the last good model: an ONNX detector, or a file of --store-baseline",
    )
    parser.add_argument(
        "--data",
        required=True,
        type=Path,
        metavar="DIR",
        help="a folder with instances.json (COCO format) and images/, or a COCO JSON file",
    )
    percent = number_type(float, 0, 100)
    parser.add_argument(
        "--margin-ap", type=percent, default=1.0, metavar="AP", help="AP that may be lost: 1.0"
    )
    parser.add_argument(
        "--resamples",
        type=whole_from(100, ">="),
        default=2000,
        metavar="N",
        help="of the bootstrap, default 2000",
    )
    parser.add_argument(
        "--seed", type=whole_from(0, ">="), default=0, metavar="N", help="of the bootstrap"
    )
    parser.add_argument(
        "--agreement-min",
        type=percent,
        default=AGREEMENT_MIN,
        metavar="PERCENT",
        help=f"F1 of the new model's boxes with the old one's, default {AGREEMENT_MIN:g}",
    )
    parser.add_argument(
        "--slowdown-max",
        type=percent,
        default=5.0,
        metavar="PERCENT",
        help="more time per picture that is let pass, default 5",
    )
    more = number_type(float, 0, 1000)
    for name, value, what in (("size", 10, "bytes"), ("memory", 20, "memory"), ("start", 50, "s")):
        parser.add_argument(
            f"--{name}-max",
            type=more,
            default=float(value),
            metavar="PERCENT",
            help=f"more {what} that is let pass, default {value}",
        )
    parser.add_argument(
        "--skip",
        default="",
        metavar="LIST",
        help=f"leave out, by commas: {', '.join(KINDS)}, or a check's name, as in 'class map'",
    )
    parser.add_argument(
        "--limit", type=whole_from(1, ">="), metavar="N", help="N photos, spread evenly"
    )
    parser.add_argument(
        "--threads", type=whole_from(1, ">="), default=1, metavar="N", help="default 1"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="all figures")
    parser.add_argument("--junit", type=Path, metavar="FILE", help="JUnit XML, for CI systems")
    parser.add_argument("--html", type=Path, metavar="FILE", help="a page with the worst photos")
    parser.add_argument(
        "--store-baseline",
        type=Path,
        metavar="FILE",
        help="if it passes, keep NEW as the baseline of later runs",
    )


def main(args: argparse.Namespace) -> int:
    """Runs the command; returns 0 if the new model passed, else 1."""
    begin = time.perf_counter()
    skipped = _skipped(args.skip)
    for target in (args.json, args.junit, args.html, args.store_baseline):
        _check_target(target)
    new_path = model_path(args.model)
    stored = _stored(args.baseline)
    data = open_dataset(args.data).limit(args.limit)
    if "accuracy" not in skipped:
        data.labels()
    if stored is not None:
        check_data(stored, data, Path(args.baseline))
    trial_run(new_path)
    new = file_facts(new_path)
    old_spec = None if stored is None else stored.model.spec
    if old_spec is not None:
        check_family(new.spec, old_spec.classes)
    old = _old(args, new, stored, data)
    detector = OnnxDetector(new_path, threads=args.threads)
    found, _ = run_detector(detector, data, score_min=SCORE_MIN_EVAL, title="new")
    verdict, pictures = _judge(args, skipped, detector, new, old, found, data)
    facts = {
        "new": new.to_json(),
        "old": old.facts.to_json(),
        "data": data.name,
        "photos": len(data),
        "skipped": sorted(skipped),
        "options": _options(args),
        "machine": machine(),
        "seconds": round(time.perf_counter() - begin, 1),
    }
    if args.json:
        write_json(args.json, to_json(verdict, facts))
    if args.junit:
        write_text(args.junit, to_junit(verdict, facts, time.perf_counter() - begin))
    if args.html:
        write_text(args.html, to_html(verdict, facts, pictures))
    if args.store_baseline and verdict.passed:
        store_baseline(args.store_baseline, new, data, found, SCORE_MIN_EVAL)
    print(f"{new.name} against {old.facts.name} on {len(data)} photos of {data.name}\n")
    print(to_text(verdict))
    if args.store_baseline and not verdict.passed:
        print(
            f"edgesight: note: {args.store_baseline}: not stored, it did not pass", file=sys.stderr
        )
    return 0 if verdict.passed else 1


def _judge(
    args: argparse.Namespace,
    skipped: frozenset[str],
    detector: OnnxDetector,
    new: FileFacts,
    old: Old,
    found: Sequence[Detections],
    data: Dataset,
) -> tuple[Verdict, list[Any]]:
    """Returns the answer and the pictures of the worst photos."""
    classes = old.facts.spec.classes
    known = _names_of_old(new.spec.classes, classes)
    ours = [known(one) for one in found]
    agreed = agreement_of(ours, old.found)
    checks = structure_checks(new, old.facts, None if agreed is None else agreed.f1.value)
    checks += frame_checks(
        ours, old.found, old.facts.spec.nms_iou, agreement_min=args.agreement_min
    )
    if "parity" not in skipped:
        places = [i * len(data) // COLOR_PHOTOS for i in range(COLOR_PHOTOS)]
        places = places if len(data) > COLOR_PHOTOS else list(range(len(data)))
        swapped = [
            known(detector(np.ascontiguousarray(data.photos[i].load()[:, :, ::-1])))
            for i in bar(places, "colours")
        ]
        some = [[one[i] for i in places] for one in (ours, old.found)]
        checks.append(color_check(some[0], swapped, some[1]))
    checks.append(size_check(new.bytes, old.facts.bytes, args.size_max / 100))
    if "cost" not in skipped:
        checks += _costs(args, detector.path, old.path)
    if "accuracy" not in skipped:
        checks += _accuracy(args, ours, old.found, classes, data)
    if "latency" not in skipped:
        checks += _latency(args, detector.path, old.path, data)
    kept = tuple(c for c in checks if c.kind not in skipped and c.name not in skipped)
    if not any(check.required for check in kept):
        message = "--skip: expected that some check is left, found none; skip less"
        raise InputError(message)
    if not args.html:
        return Verdict(kept), []
    truths, names_shared = None, classes
    shown_new, shown_old = ours, list(old.found)
    if data.truths is not None and data.classes is not None:
        shared = map_classes(classes, data.classes)
        truths, names_shared = [shared.truth(one) for one in data.truths], shared.names
        shown_new = [shared.detections(one) for one in ours]
        shown_old = [shared.detections(one) for one in old.found]
    worst = worst_photos(shown_new, shown_old, data, truths, names_shared, WORST)
    return Verdict(kept), worst


def _accuracy(
    args: argparse.Namespace,
    new: Sequence[Detections],
    old: Sequence[Detections],
    classes: Sequence[str],
    data: Dataset,
) -> list[Check]:
    from .gate_accuracy import accuracy_checks

    tables = [evaluate_detections(one, classes, data).table for one in (new, old)]
    checks: list[Check] = accuracy_checks(
        *tables, margin_ap=args.margin_ap, resamples=args.resamples, seed=args.seed
    )
    return checks


def _costs(args: argparse.Namespace, new: Path, old: Path | None) -> list[Check]:
    if old is None:
        return [_absent(name, "cost") for name in ("memory", "start time")]
    costs = measure_costs(new, old, threads=args.threads)
    return cost_checks(*costs, memory_more=args.memory_max / 100, start_more=args.start_max / 100)


def _latency(args: argparse.Namespace, new: Path, old: Path | None, data: Dataset) -> list[Check]:
    if old is None:
        return [_absent("latency", "latency")]
    from .gate_latency import latency_checks, measure_pairs

    pictures = [photo.load() for photo in data.limit(TIMED_PHOTOS).photos]
    first, second = (OnnxDetector(path, threads=args.threads) for path in (new, old))
    pairs = measure_pairs(first, second, pictures)
    checks: list[Check] = latency_checks(pairs, slowdown_max=args.slowdown_max / 100)
    return checks


def _absent(name: str, kind: Kind) -> Check:
    text = (
        "expected the old model's file to measure it in turns, found only its stored boxes; put "
        f"the file beside the baseline, or --skip {name!r}"
    )
    return Check(name, kind, "not enough evidence", text)


def _stored(name: str) -> Baseline | None:
    """Returns the stored baseline that ``--baseline`` names; None if it names a model."""
    path = Path(name)
    return load_baseline(path) if path.suffix.lower() == ".json" else None


def _old(args: argparse.Namespace, new: FileFacts, stored: Baseline | None, data: Dataset) -> Old:
    if stored is not None:
        beside = model_beside(Path(args.baseline), stored)
        if beside is not None:
            trial_run(beside)
        return Old(stored.model, beside, stored.detections)
    path = model_path(args.baseline)
    trial_run(path)
    facts = file_facts(path)
    check_family(new.spec, facts.spec.classes)
    detector = OnnxDetector(path, threads=args.threads)
    found, _ = run_detector(detector, data, score_min=SCORE_MIN_EVAL, title="old")
    return Old(facts, path, found)


def _names_of_old(new: Sequence[str], old: Sequence[str]) -> Callable[[Detections], Detections]:
    """Returns what renumbers a new model's labels as the old model's, by name."""
    index = {canonical_name(name): place for place, name in enumerate(old)}
    table = np.array([index.get(canonical_name(name), -1) for name in new], np.int64)
    names = tuple(map(canonical_name, old))
    return ClassMap(names, table, np.arange(len(old))).detections


def _skipped(text: str) -> frozenset[str]:
    found = frozenset(word.strip() for word in text.split(",") if word.strip())
    for word in sorted(found - {*KINDS, *NAMES}):
        if not word.startswith(MEASURED):
            message = (
                f"--skip: expected {', '.join(KINDS)}, or a check ({', '.join(NAMES)}, AP ..., "
                f"latency ...), found {word!r}"
            )
            raise InputError(message)
    return found


def _check_target(target: Path | None) -> None:
    """Refuses a place for a report before the work, not after it."""
    if target is None:
        return
    try:
        check_replaceable(target)
    except OSError as error:
        message = f"cannot write {target}: {error.strerror or error}; choose another place"
        raise OutputError(message) from error


def _options(args: argparse.Namespace) -> dict[str, Any]:
    return {name: getattr(args, name) for name in OPTIONS}
