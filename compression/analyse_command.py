"""``edgesight analyse``: where the fat is in a detector, before anything is cut."""

from __future__ import annotations

import argparse
import functools
import importlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ..models.arguments import whole_from
from ..models.dataset import Dataset, open_dataset
from ..models.detector import OnnxDetector
from ..models.errors import InputError, MissingExtraError, ModelFileError, OutputError
from ..models.files import is_file, is_folder, sha256, write_json
from ..models.graph import load_model
from ..models.heads import HEADS
from ..models.machine import machine
from ..models.spec import ModelSpec
from ..models.zoo import MODEL_HELP, SHIPPED, model_path
from .analyse import count_costs
from .analyse_report import as_text, report_of
from .calibrate import read_photos
from .layer_sensitivity import ApLoss, Disagreement, Judge, Kept, Variants, measurement_key, scan
from .redundancy import OfActivations, of_activations, of_weights
from .traced import Traced

DESCRIPTION = """\
Says where the fat is in an ONNX detector before anything is cut: what every layer costs, with
photos how much of it repeats itself, and with --sensitivity how much the detections suffer when
the layer alone is pruned, factorised or quantized. Nothing of the model is changed."""
EXAMPLE = "edgesight analyse shipped-float --sensitivity --out analysis"
SAMPLES = Path(__file__).parent.parent / "device_app" / "samples"
JSON_FILE = "analysis.json"
HTML_FILE = "analysis.html"
PHOTOS = 32
TOP = 15


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's arguments."""
    parser.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    parser.add_argument(
        "--photos",
        type=Path,
        metavar="DIR",
        help="photos (no boxes needed) to measure redundancy on; the package's own model takes "
        "the sample photos by default, a few dozen of your own say more",
    )
    parser.add_argument(
        "--sensitivity",
        action="store_true",
        help="change one layer at a time; takes minutes, goes on where it was interrupted; "
        "needs --out",
    )
    parser.add_argument(
        "--eval",
        type=Path,
        metavar="DIR",
        help="labelled photos (COCO format): sensitivity is AP lost, not disagreement of boxes",
    )
    parser.add_argument(
        "--limit",
        type=whole_from(1),
        metavar="N",
        help=f"so many photos, spread evenly (default {PHOTOS} of --photos, all of --eval)",
    )
    parser.add_argument("--out", type=Path, metavar="DIR", help=f"{JSON_FILE}, {HTML_FILE} go here")
    parser.add_argument(
        "--top", type=whole_from(1), default=TOP, metavar="N", help="rows of the table"
    )
    parser.add_argument("--head", choices=sorted(HEADS), help="head of MODEL if it is not clear")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead")
    parser.add_argument("--quiet", action="store_true", help="no progress bars")


def main(args: argparse.Namespace) -> int:
    """Runs the command.

    Returns:
        0 done, 130 interrupted; what was measured is kept.
    """
    _check(args)
    report = _analyse(args)
    if report is None:
        return 130
    if args.out is not None:
        write_json(args.out / JSON_FILE, report)
        from .analyse_page import write_page  # it loads what draws

        write_page(args.out / HTML_FILE, report)
    print(json.dumps(report) if args.json else as_text(report, args.top))
    if args.out is not None:
        print(f"edgesight: the page is {args.out / HTML_FILE}", file=sys.stderr)
    return 0


def _check(args: argparse.Namespace) -> None:
    """Refuses what would fail after minutes of measuring."""
    if args.eval is not None and not args.sensitivity:
        message = "--eval: expected it with --sensitivity, which it measures; add --sensitivity"
        raise InputError(message)
    if args.sensitivity and args.out is None:
        message = (
            "--sensitivity: expected --out DIR, where measurements are kept so that an interrupted "
            "run can go on; name a folder"
        )
        raise InputError(message)
    if args.out is None:
        return
    if args.out.exists() and not is_folder(args.out):
        message = f"--out {args.out}: expected a folder, found a file; choose another name"
        raise OutputError(message)
    for name in ("jinja2", "matplotlib"):
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise MissingExtraError.of(package=name) from error


def _analyse(args: argparse.Namespace) -> dict[str, Any] | None:
    """Returns the report, or None if the user interrupted the scan."""
    path = model_path(args.model)
    model = load_model(path)
    labelled = open_dataset(args.eval).limit(args.limit) if args.eval is not None else None
    data = _photos(args, labelled)
    notes: list[str] = []
    spec = _spec(path, args.head, needed=data is not None, notes=notes)
    traced = Traced(model, None if spec is None else spec.input_hw)
    costs = count_costs(traced, path.stat().st_size)
    if traced.problem:
        notes.append(f"sizes are from shape inference: ONNX Runtime said {traced.problem}")
    nodes = {node.output[0]: node for node in model.graph.node}
    weights = {la.output: w for la in costs.layers if (w := of_weights(traced, nodes[la.output]))}
    progress = _progress(args.quiet)
    seen: dict[str, OfActivations] = {}
    losses: dict[str, dict[str, float]] = {}
    paths = [] if data is None else [photo.path for photo in data.photos]
    if spec is not None and paths:
        inputs = read_photos(paths, spec)
        seen = of_activations(traced, costs.layers, inputs, total=len(paths), progress=progress)
    elif spec is not None:
        notes.append("redundancy of the layers' outputs is measured on photos: add --photos DIR")
    unit, judged = None, None
    if args.sensitivity and spec is not None:
        unit = "% of disagreement" if labelled is None else "points of AP"
        judge = _judge(model, spec, paths, labelled)
        kept = Kept(args.out, measurement_key(path, spec, paths, labelled))
        if kept.losses:
            print(f"edgesight: goes on from {kept.path}", file=sys.stderr)
        variants = Variants(traced, seen)
        try:
            losses = scan(variants, costs.layers, judge, kept, progress=progress)
        except KeyboardInterrupt:
            done = sum(map(len, kept.losses.values()))
            message = f"{done} measurements are in {kept.path}; the same command goes on from there"
            print(f"edgesight: interrupted; {message}", file=sys.stderr)
            return None
        judged = len(paths) if labelled is None else len(labelled)
    facts = {
        "file": str(path),
        "name": path.stem,
        "sha256": sha256(path),
        "input_hw": None if spec is None else list(spec.input_hw),
        "photos": None if data is None else {"folder": data.name, "count": len(paths)},
        "judged_on": judged,
        "notes": notes,
        "machine": machine(),
    }
    return report_of(costs, weights, seen, losses, unit=unit, facts=facts)


def _photos(args: argparse.Namespace, labelled: Dataset | None) -> Dataset | None:
    """Returns the photos that redundancy is measured on: named, labelled, or the samples."""
    if args.photos is not None:
        return open_dataset(args.photos).limit(args.limit or PHOTOS)
    if labelled is not None:
        return labelled.limit(PHOTOS)
    if args.model in SHIPPED:
        return open_dataset(SAMPLES)
    if args.sensitivity:
        message = "--sensitivity: expected photos to measure it on, found none; add --photos DIR"
        raise InputError(message)
    return None


def _spec(path: Path, head: str | None, *, needed: bool, notes: list[str]) -> ModelSpec | None:
    """Returns how photos become the model's input; costs can be counted without."""
    try:
        return OnnxDetector(path, head=head).spec
    except ModelFileError as error:
        if needed or head is not None or not is_file(path):
            raise
        notes.append(f"costs and weights only, no photos can be shown to it: {error}")
        return None


def _judge(
    model: Any, spec: ModelSpec, photos: list[Path], labelled: Dataset | None
) -> Callable[[], Judge]:
    if labelled is not None:
        return functools.partial(ApLoss, model, labelled, spec)
    return functools.partial(Disagreement, model, photos, spec)


def _progress(quiet: bool) -> Callable[..., Any]:
    wait = 0.5 if sys.stderr.isatty() else 10.0  # a log file needs fewer lines
    return functools.partial(tqdm, file=sys.stderr, disable=quiet, mininterval=wait)
