"""``edgesight bench``: every stage's time, and the whole pipeline against the bare network."""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from ..models.arguments import whole_number
from ..models.zoo import MODEL_HELP, model_path
from .command import SWITCH_INTERVAL_S

if TYPE_CHECKING:
    from ..models.detector import OnnxDetector
    from .frame import Frame
    from .sources import Source

BLOCK_FRAMES = 60
"""Frames per block: long enough to time, short enough that both kinds see the same machine."""
WARM_UP = 10
COMPARED, EVERY = 8, 60
"""Engines are compared on so many frames, one of so many."""

DESCRIPTION = (
    "Times every stage of the pipeline (file source, no display), and compares its frames per\n"
    "second with the bare network's: blocks of both kinds alternate in one process, so that what\n"
    "else the machine does falls on both. The ratio is the median over pairs of blocks."
)
EXAMPLE = "edgesight bench model.onnx --source video.mp4"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of ``bench``."""
    add = parser.add_argument
    add("model", metavar="MODEL", help=MODEL_HELP)
    add(
        "--source",
        default="samples",
        metavar="WHAT",
        help="video, photo or folder of photos, repeated as needed (default: the samples)",
    )
    add(
        "--frames",
        type=whole_number(10, 10**9),
        default=300,
        metavar="N",
        help="frames through the pipeline, and as many through the bare network "
        "(default: %(default)s)",
    )
    add(
        "--threads",
        type=whole_number(1, 256),
        default=1,
        help="threads of the network (default: %(default)s)",
    )
    add(
        "--engines",
        action="store_true",
        help="in place of that: the bare network in every engine that is installed, with 1, 2, 4 "
        "threads and with all cores, and whether it sees what ONNX Runtime sees",
    )
    add("--head", metavar="KIND", help="head of a foreign model that its file does not tell")
    add("--json", action="store_true", help="print one JSON object and nothing else")


def main(args: argparse.Namespace) -> int:
    """Runs the benchmark and prints its table or its JSON object.

    Raises:
        EdgeSightError: The model or the source cannot be used.
    """
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    from ..models.detector import OnnxDetector
    from ..models.errors import SourceError
    from .open_source import open_source

    if args.engines:
        return _engines(args)
    detector = OnnxDetector(model_path(args.model), head=args.head, threads=args.threads)
    source = open_source(args.source, max_speed=True, loop=True)
    try:
        if source.live:
            message = (
                f"{source.name}: expected a file or a folder, found a live source, whose own speed "
                "would be measured; use --source FILE"
            )
            raise SourceError(message)
        found = benchmark(detector, source, args.frames, progress=not args.json)
    finally:
        source.close()
    found = {"model": str(args.model), "threads": args.threads, **found}
    print(json.dumps(found) if args.json else table(found))
    return 0


def _engines(args: argparse.Namespace) -> int:
    """Measures every engine that is installed."""
    from tqdm import tqdm

    from ..models.engine_choice import fastest, measure, thread_counts
    from ..models.machine import machine
    from .open_source import open_source

    source = open_source(args.source, max_speed=True, loop=True)
    try:
        images = [frame.image for frame in _some(source, COMPARED)]
    finally:
        source.close()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    found = measure(
        model_path(args.model),
        images,
        thread_counts(cores or 1),
        head=args.head,
        rounds=max(10, args.frames // 3),
        progress=lambda turns: tqdm(turns, desc="bench", disable=args.json or None),
    )
    best = fastest(found)
    rows = [{**asdict(one), "best": one is best} for one in found]
    for row in rows:
        row.update({key: None for key in ("p50_ms", "p90_ms") if row["note"]})
    result = {"model": str(args.model), "source": source.name, "machine": machine(), "rows": rows}
    print(json.dumps(result) if args.json else engines_table(result))
    return 0


def _some(source: Source, count: int) -> list[Frame]:
    """Returns frames from all over the beginning of a source."""
    found = []
    for number in range(count * EVERY):
        frame = source.read()
        if frame is None:
            break
        if number % EVERY == 0:
            found.append(frame)
    return found


def engines_table(found: dict[str, Any]) -> str:
    """Returns what was measured of the engines as lines for people."""
    lines = [
        f"{found['model']} on {found['source']}, {found['machine']['cpu']}: bare network, in turn",
        f"  {'engine':14}{'threads':>8}{'p50 ms':>9}{'p90 ms':>9}{'frames/s':>10}  sees the same",
    ]
    for row in found["rows"]:
        start = f"  {row['engine']:14}{row['threads']:8}"
        if row["note"]:
            lines.append(f"{start}  {row['note']}")
            continue
        same = "" if row["same"] is None else f"{row['same']:.1f} %"
        mark = "  <- auto" if row["best"] else ""
        speed = f"{row['p50_ms']:9.2f}{row['p90_ms']:9.2f}{1000 / row['p50_ms']:10.1f}"
        lines.append(f"{start}{speed}  {same:>7}{mark}")
    lines.append("  sees the same: agreement (F1) with ONNX Runtime's boxes; auto wants 95 %")
    return "\n".join(lines)


def benchmark(
    detector: OnnxDetector, source: Source, frames: int, *, progress: bool = False
) -> dict[str, Any]:
    """Times alternating blocks of the bare network and of the pipeline.

    Args:
        detector: The model.
        source: Not live; it must not end.
        frames: Through each of the two.
        progress: Whether to show a bar.

    Returns:
        ``stages`` in milliseconds (p50, p90, p99, mean, n), ``pipeline_fps`` and ``bare_fps``
        (medians over blocks), ``ratio`` (median over pairs) and ``ratio_range``, ``blocks``.
    """
    from tqdm import tqdm

    from ..models.machine import machine
    from .loop import Loop
    from .stats import Stats

    first = source.read()
    assert first is not None
    tensor, _ = detector.preprocess(first.image)
    for _ in range(WARM_UP):
        detector.infer(tensor)
    blocks = max(2, round(frames / BLOCK_FRAMES))
    per_block = max(5, frames // blocks)
    stats = Stats()
    bare: list[float] = []
    pipeline: list[float] = []
    for block in tqdm(
        range(2 * blocks), desc="bench", unit="block", disable=None if progress else True
    ):
        # bare, pipeline, pipeline, bare, ...: a slow drift of the clock falls on both, too
        if block % 4 in (0, 3):
            began = time.perf_counter()
            for _ in range(per_block):
                detector.infer(tensor)
            bare.append(per_block / (time.perf_counter() - began))
        else:
            stats = Stats(stats.times)
            Loop(source, detector, frames=per_block, lossless=True, stats=stats).run()
            # From the start of the threads to the last boxes, filling the pipeline included.
            pipeline.append(per_block / (stats.inference.last_s - stats.started_s))
    ratios = [p / b for p, b in zip(pipeline, bare, strict=True)]
    return {
        "source": source.name,
        "frames": per_block * blocks,
        "stages": stats.summary_ms(),
        "pipeline_fps": round(statistics.median(pipeline), 2),
        "bare_fps": round(statistics.median(bare), 2),
        "ratio": round(statistics.median(ratios), 4),
        "ratio_range": [round(min(ratios), 4), round(max(ratios), 4)],
        "blocks": blocks,
        "picture_wh": [first.image.shape[1], first.image.shape[0]],
        "machine": machine(),
    }


def table(found: dict[str, Any]) -> str:
    """Returns the result as lines for people."""
    width, height = found["picture_wh"]
    low, high = found["ratio_range"]
    lines = [
        f"{found['model']} on {found['source']} ({width}x{height} px), {found['frames']} frames, "
        f"{found['threads']} thread(s), {found['machine']['cpu']}",
        f"  {'stage, ms':12}{'p50':>9}{'p90':>9}{'p99':>9}",
    ]
    lines += [
        f"  {name:12}{stage['p50']:9.2f}{stage['p90']:9.2f}{stage['p99']:9.2f}"
        for name, stage in found["stages"].items()
    ]
    lines.append(
        f"  frames/s: pipeline {found['pipeline_fps']:.1f}, bare network {found['bare_fps']:.1f}; "
        f"ratio {100 * found['ratio']:.1f} % ({100 * low:.1f} to {100 * high:.1f} % over "
        f"{found['blocks']} pairs of blocks)"
    )
    return "\n".join(lines)
