"""What a run ends with: a table for people, one JSON object for scripts."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

from ..models.machine import machine
from .loop import Loop


def summary(loop: Loop, *, threads: int, interrupted: bool) -> dict[str, Any]:
    """Returns the figures of a finished run, JSON-ready.

    ``fps`` is the inference rate over the whole run, ``stages`` milliseconds per frame,
    ``first_boxes_s`` seconds from the start of the process (from the start of the loop where the
    system does not tell).
    """
    stats = loop.stats
    accuracy = loop.accuracy.figures()
    figures = loop.figures()
    return {
        "model": figures["model"],
        "model_file": str(loop.detector.path),
        "source": loop.source.name,
        "frames": stats.inference.n,
        "dropped": loop.dropped,
        "fps": round(stats.inference.overall(), 2),
        "capture_fps": round(stats.capture.overall(), 2),
        "display_fps": round(stats.display.overall(), 2),
        "elapsed_s": round(stats.elapsed_s(), 2),
        "first_boxes_s": _first_boxes_s(loop),
        "stages": stats.summary_ms(),
        "latency": stats.latency.summary() if stats.latency.n else None,
        "board": figures["board"],
        "accuracy": accuracy,
        "interrupted": interrupted,
        "written": [str(path) for path in loop.written],
        "warnings": list(loop.source.warnings),
        "engine": loop.detector.engine,
        "threads": threads,
        "machine": machine(),
    }


def table(found: dict[str, Any]) -> str:
    """Returns the summary as lines for people."""
    first = found["first_boxes_s"]
    lines = [
        f"{found['model']} on {found['source']}: {found['frames']} frames in "
        f"{found['elapsed_s']:.1f} s, {found['dropped']} dropped"
        + (f", first boxes after {first:.2f} s" if first is not None else ""),
        f"  frames/s    capture {found['capture_fps']:.1f}, inference {found['fps']:.1f}, "
        f"display {found['display_fps']:.1f}",
        f"  {'stage, ms':12}{'p50':>9}{'p90':>9}{'p99':>9}",
    ]
    lines += [
        f"  {name:12}{stage['p50']:9.2f}{stage['p90']:9.2f}{stage['p99']:9.2f}"
        for name, stage in found["stages"].items()
    ]
    if late := found["latency"]:
        lines.append(f"  capture to display  {late['p50']:.0f} ms, p99 {late['p99']:.0f} ms")
    if held := found["board"]["throttled_before"]:
        lines.append(f"  board       held back since it was switched on: {', '.join(held)}")
    lines.append(f"  engine      {found['engine']}, {found['threads']} thread(s)")
    lines.append(f"  accuracy    {found['accuracy']['text']}")
    lines += [f"  written     {path}" for path in found["written"]]
    lines += [f"  note        {warning}" for warning in found["warnings"]]
    return "\n".join(lines)


def _first_boxes_s(loop: Loop) -> float | None:
    if loop.first_result_s is None:
        return None
    started = _process_started_s()
    return round(loop.first_result_s - (loop.stats.started_s if started is None else started), 2)


def _process_started_s() -> float | None:
    """Returns when this process began, on the monotonic clock; None where that is not told."""
    try:
        fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
        since_boot = int(fields[19]) / os.sysconf("SC_CLK_TCK")
        return since_boot - time.clock_gettime(time.CLOCK_BOOTTIME) + time.monotonic()
    except (OSError, ValueError, IndexError, AttributeError):
        return None
