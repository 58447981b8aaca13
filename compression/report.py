"""The report of a run: one JSON file for scripts, one self-contained HTML page for people."""

from __future__ import annotations

import base64
import io
import json
import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import cv2
import numpy as np

from ..models.dataset import Dataset
from ..models.detector import OnnxDetector
from ..models.draw import draw_detections
from ..models.errors import MissingExtraError
from ..models.files import sha256, write_json, write_text
from ..models.machine import machine
from .measure import SHOWN
from .page import render_page

if TYPE_CHECKING:  # torch; a page alone does not need it
    from .pipeline import RunResult, StepRow

JSON_FILE = "report.json"
HTML_FILE = "report.html"
TEMPLATE = "report.html.j2"
EXAMPLES = 3
EXAMPLE_SIDE = 480
INK = "#010203"
"""Stands for the page's own text colour in plots, so that they fit light and dark pages."""
BLUE, ORANGE = "#3b82c4", "#d9822b"


def report_of(result: RunResult, recipe: dict[str, Any]) -> dict[str, Any]:
    """Returns everything that a run has found out, JSON-ready.

    Args:
        result: Of the run.
        recipe: The recipe as a dict, to be shown.
    """
    state, verified = result.state, result.verified
    found: dict[str, Any] = {
        "model": state.spec.name,
        "core": state.job.core,
        "input_hw": list(state.spec.input_hw),
        "passed": bool(verified is None or verified["passed"]),
        "photos": {
            "learned_from": len(state.job.photos.train_paths),
            "measured_on": len(state.job.photos.check),
            "measured_on_from": state.job.photos.check_kind,
        },
        "steps": [_step(row) for row in result.rows],
        "verify": verified,
        "files": {
            kind: {"name": path.name, "bytes": path.stat().st_size, "sha256": sha256(path)}
            for kind, path in (("final", result.final), ("float", result.float_file))
        },
        "seconds": round(result.seconds, 1),
        "recipe": recipe,
        "machine": machine(),
    }
    cleaned: dict[str, Any] = finite(found)
    return cleaned


def _step(row: StepRow) -> dict[str, Any]:
    report = row.report
    return {
        "title": row.title,
        "parameters": row.parameters,
        "macs": row.macs,
        "bytes": row.bytes,
        "score": row.score,
        "seconds": None if report is None else round(report.seconds, 1),
        "resumed": row.resumed,
        "notes": [] if report is None else list(report.notes),
        "figures": {} if report is None or report.kind == "verify" else report.figures,
    }


def write_report(folder: Path, report: dict[str, Any], pictures: Sequence[dict[str, str]]) -> Path:
    """Writes both files and returns the page.

    Args:
        folder: Where to.
        report: From ``report_of``.
        pictures: From ``example_pictures``.

    Raises:
        OutputError: The folder cannot be written.
        MissingExtraError: jinja2 or matplotlib is missing.
    """
    write_json(folder / JSON_FILE, report)
    write_text(folder / HTML_FILE, render(report, pictures))
    return folder / HTML_FILE


def render(report: dict[str, Any], pictures: Sequence[dict[str, str]]) -> str:
    """Returns the HTML page: everything inside, nothing fetched from anywhere."""
    return render_page(
        TEMPLATE,
        FILTERS,
        report=report,
        headline=headline(report),
        plots=[plot for plot in (_cost_plot(report), _score_plot(report)) if plot],
        layers=_layer_plot(report),
        pictures=pictures,
        recipe=json.dumps(report["recipe"], indent=2),
    )


def mega_text(value: float) -> str:
    """Returns ``1.2 M``."""
    return f"{value / 1e6:,.1f} M" if value >= 1e5 else f"{value / 1e6:.3f} M"


def size_text(value: float) -> str:
    """Returns ``1.20 MB`` or ``12.0 kB``."""
    return f"{value / 1e6:.2f} MB" if value >= 1e5 else f"{value / 1e3:.1f} kB"


def percent_text(value: float | None) -> str:
    """Returns ``26.3``, or n/a."""
    return "n/a" if value is None else f"{value:.1f}"


def score_text(score: dict[str, Any] | None) -> str:
    """Returns ``26.3 [24.1, 28.0]``, or n/a."""
    if score is None or score["value"] is None:
        return "n/a"
    if score["low"] is None:
        return f"{score['value']:.1f}"
    return f"{score['value']:.1f} [{score['low']:.1f}, {score['high']:.1f}]"


def loss_text(score: dict[str, Any] | None) -> str:
    """Returns the points lost against the original with their interval; empty for agreement."""
    if score is None or score["loss"] is None:
        return ""
    if score["loss_low"] is None:
        return f"{score['loss']:.2f}"
    return f"{score['loss']:.2f} [{score['loss_low']:.2f}, {score['loss_high']:.2f}]"


FILTERS: Final[dict[str, Callable[..., str]]] = {
    "mega": mega_text,
    "size": size_text,
    "percent": percent_text,
    "score": score_text,
    "loss": loss_text,
}
"""What templates call the functions above."""


def headline(report: dict[str, Any]) -> list[tuple[str, str, str]]:
    """Returns the figures that matter: name, before -> after, remark."""
    first, last = report["steps"][0], report["steps"][-1]
    rows = [
        (title, f"{text(first[key])} -> {text(last[key])}", _part(first, last, key))
        for title, key, text in (
            ("size", "bytes", size_text),
            ("multiply-accumulates", "macs", mega_text),
        )
    ]
    verified = report["verify"]
    if verified is None:
        return rows
    before, after = verified["before"], verified["after"]
    if after["kind"] == "ap":
        text = f"{score_text(before)} -> {score_text(after)}"
        rows.insert(0, ("AP", text, f"lost {loss_text(after)}"))
    agreement = verified["agreement"]
    rows.insert(1, ("agreement with the original (F1)", score_text(agreement) + " %", ""))
    if verified.get("generalisation"):
        rows.append(generalisation_row(verified["generalisation"]))
    if verified["latency"]:
        times = verified["latency"]
        text = f"{times['before_ms']:.2f} -> {times['after_ms']:.2f} ms"
        rows.append(("one picture on this machine", text, f"ratio {times['ratio']:.2f}"))
    other = verified.get("openvino")
    if other and not other["failed"]:
        text = f"{other['before_ms']:.2f} -> {other['after_ms']:.2f} ms"
        rows.append(("the same in OpenVINO", text, f"ratio {other['ratio']:.2f}"))
    for core in verified["cores"]:
        if core["instructions"] is not None:
            text = f"{mega_text(core['before'])} -> {mega_text(core['instructions'])}"
            title = f"instructions on {core['core']}"
            rows.append((title, text, f"ratio {core['ratio']:.2f}"))
    if verified["integer"]["quantized"]:
        share = f"{100 * verified['integer']['share']:.1f} %"
        rows.append(("convolutions in integers", share, verified["integer"]["note"] or ""))
    return rows


def generalisation_row(found: dict[str, Any]) -> tuple[str, str, str]:
    """Returns how much better a model does on photos it has learned from, before and after."""
    kind = "AP" if found["kind"] == "ap" else "agreement"
    train, others, gap = found["train"], found["others"], found["gap"]
    values = [
        f"{percent_text(train[k]['value'])} / {percent_text(others[k]['value'])}"
        for k in ("before", "after")
    ]
    known = None not in gap.values()
    remark = f"of {train['after']['photos']} / {others['after']['photos']} photos"
    if known:
        remark += f"; gap {gap['before']:+.1f} -> {gap['after']:+.1f} points"
    return (f"{kind} on training / other photos", f"{values[0]} -> {values[1]}", remark)


def _part(first: dict[str, Any], last: dict[str, Any], key: str) -> str:
    return f"{100 * last[key] / first[key]:.0f} % of the original" if first[key] else ""


def example_pictures(before: Path, after: Path, data: Dataset) -> list[dict[str, str]]:
    """Returns a few photos with the boxes of both files, as JPEG data addresses."""
    found = []
    detectors = [OnnxDetector(before), OnnxDetector(after)]
    for photo in data.limit(EXAMPLES).photos:
        image = photo.load()
        scale = min(1.0, EXAMPLE_SIDE / max(image.shape[:2]))
        wh = (max(1, round(image.shape[1] * scale)), max(1, round(image.shape[0] * scale)))
        small = np.asarray(cv2.resize(image, wh, interpolation=cv2.INTER_AREA), np.uint8)
        entry = {"name": photo.path.name}
        for key, detector in zip(("before", "after"), detectors, strict=True):
            drawn = small.copy()
            draw_detections(drawn, detector(small, SHOWN), detector.spec.classes)
            _, data_bytes = cv2.imencode(".jpg", drawn, [cv2.IMWRITE_JPEG_QUALITY, 80])
            text = base64.b64encode(data_bytes.tobytes()).decode()
            entry[key] = f"data:image/jpeg;base64,{text}"
        found.append(entry)
    return found


def figure_of(height: float, width: float = 6.4, dpi: float | None = None) -> Any:
    """Returns an empty matplotlib figure.

    Args:
        height: In inches.
        width: In inches; by default that of a page.
        dpi: Pixels per inch, for what is not drawn as SVG.

    Raises:
        MissingExtraError: There is no matplotlib.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingExtraError.of(package="matplotlib") from error
    return Figure(figsize=(width, height), layout="constrained", dpi=dpi)


def _cost_plot(report: dict[str, Any]) -> str:
    steps = [s for s in report["steps"] if not s["title"].endswith("verify")]
    first = steps[0]
    figure = figure_of(2.8)
    axes = figure.subplots()
    place = np.arange(len(steps))
    for offset, key, color in ((-0.2, "macs", BLUE), (0.2, "bytes", ORANGE)):
        part = [100 * s[key] / max(1, first[key]) for s in steps]
        bars = axes.bar(place + offset, part, 0.38, color=color, label=key.replace("macs", "MACs"))
        axes.bar_label(bars, fmt="%.0f", color=INK, fontsize=8)
    axes.set_xticks(place, [s["title"] for s in steps])
    axes.set_ylabel("% of the original")
    axes.set_ylim(0, 118)
    return as_svg(figure, axes, "Cost after each step")


def _score_plot(report: dict[str, Any]) -> str:
    steps = [s for s in report["steps"] if s["score"] and s["score"]["value"] is not None]
    if len(steps) < 2:
        return ""
    figure = figure_of(2.8)
    axes = figure.subplots()
    place = np.arange(len(steps))
    value = np.array([s["score"]["value"] for s in steps])
    ends = [(s["score"]["low"], s["score"]["high"]) for s in steps]
    low, high = (
        np.array([v if e is None else e for v, e in zip(value, side, strict=True)])
        for side in zip(*ends, strict=True)
    )
    error = np.maximum([value - low, high - value], 0)
    axes.errorbar(place, value, error, fmt="o", color=BLUE, ecolor=BLUE, capsize=4)
    axes.set_xticks(place, [s["title"] for s in steps])
    axes.set_xlim(-0.5, len(steps) - 0.5)
    kind = "AP" if steps[0]["score"]["kind"] == "ap" else "F1 with the original, %"
    axes.set_ylabel(kind)
    axes.set_ylim(0, max(1.0, 1.1 * float(high.max())))
    return as_svg(figure, axes, f"Accuracy on {steps[0]['score']['photos']} photos, 95 % intervals")


def _layer_plot(report: dict[str, Any]) -> str:
    """Returns channels before and after of every layer that was cut."""
    layers: dict[str, list[int]] = {}
    for step in report["steps"]:
        for name, (left, before) in step["figures"].get("layers", {}).items():
            layers[name] = [left, layers[name][1] if name in layers else before]
    if not layers:
        return ""
    names = list(layers)
    figure = figure_of(1.0 + 0.16 * len(names))
    axes = figure.subplots()
    place = np.arange(len(names))
    axes.barh(place, [layers[n][1] for n in names], 0.8, color=BLUE, alpha=0.3, label="before")
    axes.barh(place, [layers[n][0] for n in names], 0.8, color=BLUE, label="left")
    axes.set_yticks(place, names, fontsize=6)
    axes.invert_yaxis()
    axes.margins(y=0.01)
    axes.set_xlabel("channels")
    return as_svg(figure, axes, "What pruning left of each layer")


def as_svg(figure: Any, axes: Any, title: str) -> str:
    """Returns a plot as SVG text to be put into a page, in the page's own text colour."""
    from matplotlib import rc_context

    axes.set_title(title, color=INK, fontsize=10)
    axes.tick_params(colors=INK, labelsize=axes.yaxis.get_ticklabels()[0].get_fontsize())
    axes.tick_params(axis="x", labelsize=8)
    for side, spine in axes.spines.items():
        spine.set_color(INK)
        spine.set_visible(side in ("left", "bottom"))
    for label in (axes.xaxis.label, axes.yaxis.label):
        label.set_color(INK)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(labelcolor=INK, fontsize=8, frameon=False, ncols=2, loc="upper right")
    buffer = io.StringIO()
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "edgesight"}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :].replace(INK, "currentColor")
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r' xmlns(:xlink)?="[^"]*"', "", text)  # a page needs none
    return re.sub(r'<svg (.*?)width="[^"]*" height="[^"]*"', r"<svg \1", text, count=1)


def finite(value: Any) -> Any:
    """Returns a JSON-ready value with NaN and infinity as None."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return value
