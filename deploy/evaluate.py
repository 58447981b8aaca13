"""The ``eval`` command: a model's AP on a labelled folder, with intervals."""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path
from typing import Any

from ..models.arguments import whole_from
from ..models.dataset import open_dataset
from ..models.detector import OnnxDetector
from ..models.errors import InputError
from ..models.evaluate import Evaluation, evaluate_detector
from ..models.files import sha256
from ..models.heads import HEADS
from ..models.machine import machine
from ..models.metrics import Interval
from ..models.zoo import MODEL_HELP, model_path

DESCRIPTION = """\
Measures a detector's average precision (AP, COCO protocol, in percent) on photos with boxes, with
a 95 % interval by bootstrap over the photos. The table goes to stdout, progress to stderr."""
EXAMPLE = "edgesight eval yolox_nano.onnx --data my_photos --baseline yolox_tiny.onnx"
ROWS = ("ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's arguments."""
    parser.add_argument(
        "model",
        metavar="MODEL",
        help=MODEL_HELP,
    )
    parser.add_argument(
        "--data",
        required=True,
        type=Path,
        metavar="DIR",
        help="a folder with instances.json (COCO format) and images/, or a COCO JSON file",
    )
    parser.add_argument("--head", help=f"of a foreign file: {', '.join(HEADS)}")
    parser.add_argument(
        "--baseline",
        metavar="OTHER",
        help="another ONNX detector: also give MODEL minus OTHER, paired on the same photos",
    )
    parser.add_argument(
        "--limit", type=whole_from(1, ">="), metavar="N", help="N photos, spread evenly"
    )
    parser.add_argument(
        "--threads", type=whole_from(1, ">="), default=1, metavar="N", help="default 1"
    )
    parser.add_argument(
        "--resamples",
        type=whole_from(0, ">="),
        default=1000,
        metavar="N",
        help="of the bootstrap, default 1000; 0: no intervals",
    )
    parser.add_argument("--per-class", action="store_true", help="also AP of every class")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead")


def main(args: argparse.Namespace) -> int:
    """Runs the command; returns the exit code."""
    path = model_path(args.model)
    detector = OnnxDetector(path, head=args.head, threads=args.threads)
    other = None
    if args.baseline is not None:
        other = OnnxDetector(model_path(args.baseline), threads=args.threads)
    dataset = open_dataset(args.data).limit(args.limit)
    found = evaluate_detector(detector, dataset, title=path.name)
    interval = found.interval(args.resamples) if args.resamples else None
    baseline = None
    if other is not None:
        base = evaluate_detector(other, dataset, title=other.path.name)
        baseline = _compare(other.path, found, base, args.resamples)
    for text in (found.note, *_doubts(found)):
        if text:
            print(f"edgesight: note: {text}", file=sys.stderr)
    report = _report(args, path, found, interval, baseline)
    if args.json:
        print(json.dumps(report))
    else:
        print(_table(report, args.per_class))
    return 0


def _compare(path: Path, found: Evaluation, base: Evaluation, resamples: int) -> dict[str, Any]:
    if found.table.classes != base.table.classes:
        theirs, ours = set(base.table.classes), set(found.table.classes)
        if theirs != ours:
            message = (
                f"--baseline {path}: expected a model with the same classes of the data, found "
                f"{len(theirs)} shared with it and {len(ours)} with the model; "
                "AP over different classes cannot be compared"
            )
            raise InputError(message)
    both = found.minus(base, max(resamples, 1))
    return {
        "model": str(path),
        "sha256": sha256(path),
        "ap": _round(base.result.ap),
        "ap50": _round(base.result.ap50),
        "difference": _round(both.value),
        "interval": _limits(both) if resamples else None,
        "ms_per_photo": _round(base.ms_per_photo),
    }


def _report(
    args: argparse.Namespace,
    path: Path,
    found: Evaluation,
    interval: Interval | None,
    baseline: dict[str, Any] | None,
) -> dict[str, Any]:
    result = found.result
    report: dict[str, Any] = {name: _round(getattr(result, name)) for name in ROWS}
    report |= {
        "interval": _limits(interval) if interval else None,
        "resamples": args.resamples,
        "n": result.photos,
        "boxes": result.boxes,
        "classes": len(found.table.classes),
        "ms_per_photo": _round(found.ms_per_photo),
        "threads": args.threads,
        "model": str(path),
        "bytes": path.stat().st_size,
        "sha256": sha256(path),
        "data": str(args.data),
        "machine": machine(),
        "note": found.note,
    }
    if baseline:
        report["baseline"] = baseline
    if args.per_class:
        report["per_class"] = {name: _round(ap) for name, ap in result.per_class.items()}
    return report


def _table(report: dict[str, Any], per_class: bool) -> str:
    def figure(value: float | None) -> str:
        return "    -" if value is None else f"{value:5.1f}"

    def limits(pair: list[float] | None) -> str:
        return f"  [{pair[0]:.1f}, {pair[1]:.1f}]" if pair else ""

    lines = [
        f"{report['model']} on {report['data']}: {report['n']} photos, {report['boxes']} boxes, "
        f"{report['classes']} classes",
        "",
    ]
    for name in ROWS:
        interval = limits(report["interval"]) + "  95 %" if name == "ap" else ""
        interval = interval if report["interval"] else ""
        lines.append(f"  {name.replace('_', ' ').upper():10} {figure(report[name])}{interval}")
    lines.append(
        f"  {'ms/photo':10} {figure(report['ms_per_photo'])}  median, "
        f"{report['threads']} thread(s), {report['machine']['cpu']}"
    )
    if other := report.get("baseline"):
        interval = limits(other["interval"]) + "  95 %, paired" if other["interval"] else ""
        lines += [
            "",
            f"  baseline {other['model']}: AP {figure(other['ap']).strip()}, "
            f"{figure(other['ms_per_photo']).strip()} ms/photo",
            f"  {'difference':10} {other['difference']:+5.1f}{interval}",
        ]
    if per_class:
        lines.append("")
        ranked = sorted(report["per_class"].items(), key=lambda item: -(item[1] or 0))
        lines += [f"  {name:16} {figure(ap)}" for name, ap in ranked]
    return "\n".join(lines)


def _doubts(found: Evaluation) -> list[str]:
    if math.isnan(found.result.ap):
        return ["no true box of a shared class in these photos: there is no AP"]
    if found.table.photos < 100:
        return [f"{found.table.photos} photos are few: the interval is itself uncertain"]
    return []


def _limits(interval: Interval) -> list[float] | None:
    if not math.isfinite(interval.low):
        return None
    return [round(interval.low, 3), round(interval.high, 3)]


def _round(value: float) -> float | None:
    return round(value, 3) if math.isfinite(value) else None
