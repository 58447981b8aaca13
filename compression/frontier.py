"""The frontier of a search: the models that no other one beats, measured once more, and shown."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from ..models.dataset import Dataset
from ..models.detector import OnnxDetector
from ..models.errors import EdgeSightError
from ..models.files import write_bytes, write_json, write_text
from ..models.machine import machine
from .candidates import ORIGINAL, Candidate, Workshop
from .data import open_photos
from .latency import latency, openvino_latency
from .page import render_page
from .pipeline import Ruler
from .price import can_count, count_instructions
from .report import BLUE, FILTERS, ORANGE, figure_of, finite
from .search import TRIALS_FOLDER, Found
from .targets import Search, asked_text, best_of, missed, non_dominated, shortfall_text
from .verify import generalisation

JSON_FILE: Final = "frontier.json"
PLOT_FILE: Final = "frontier.png"
HTML_FILE: Final = "frontier.html"
TEMPLATE: Final = "frontier.html.j2"
COUNT_ERROR: Final = 0.015
"""Counts repeat to so small a part."""
ROUNDS: Final = 40
"""Alternating runs that a model is timed by."""
TRAIN_PHOTOS_MAX: Final = 300
GREY: Final = "#9aa5b1"


@dataclass(frozen=True)
class Chosen:
    """What a search gives back.

    Attributes:
        best: The model that meets the target best, or is nearest to it.
        rows: Everything on the frontier with all its figures, JSON-ready, by falling cost.
        met: Whether the target is met.
        says: How far it is met, in one sentence.
    """

    best: Candidate
    rows: tuple[dict[str, Any], ...]
    met: bool
    says: str


def choose(workshop: Workshop, wanted: Search, found: Found, say: Callable[[str], None]) -> Chosen:
    """Picks the best model and measures the whole frontier on photos that the search never saw.

    Models that another machine has made are made again here.

    Args:
        workshop: Of the search.
        wanted: What was looked for.
        found: By the search.
        say: Told what is going on.

    Raises:
        DatasetError: A photo cannot be read.
        OutputError: A result cannot be written.
    """
    judges = _Judges(workshop)
    models = found.candidates
    best = models[best_of(wanted, [m.figures for m in models])]
    front = [models[i] for i in non_dominated([m.figures for m in models])]
    if best not in front:
        front.append(best)
    front.sort(key=lambda m: (-m.cost, -m.bytes))
    say(f"measuring the {len(front)} models of the frontier")
    rows = []
    for model in front:
        here = model
        if model.name != ORIGINAL:
            here = workshop.make(model.name, model.input_hw, model.steps, say)
        if model is best:
            best = here
        extra = {"best": here is best, "meets": missed(wanted, here.figures) == 0}
        rows.append(here.to_json() | {"text": here.text} | extra | judges.measure(here))
    _count(workshop, rows, say)
    row = next(row for row in rows if row["best"])
    met, says = _verdict(wanted, best, row)
    return Chosen(best, tuple(rows), met, says)


def _count(workshop: Workshop, rows: list[dict[str, Any]], say: Callable[[str], None]) -> None:
    """Adds counted instructions to the rows, where an emulated computer is there; else None."""
    core, folder = workshop.job.core, workshop.job.folder
    paths = [workshop.start.original, *(folder / row["file"] for row in rows)]
    counts: list[int | None] = [None] * len(paths)
    if can_count(core):
        say(f"counting the instructions of {len(paths)} models on an emulated {core}")
        try:
            counts = list(count_instructions(paths, core))
        except EdgeSightError as error:  # what was found is not lost by that
            say(f"not counted: {error}")
    whole, *rest = counts
    for row, count in zip(rows, rest, strict=True):
        row["instructions"] = count
        row["instructions_ratio"] = count / whole if count and whole else None


def _verdict(wanted: Search, best: Candidate, row: dict[str, Any]) -> tuple[bool, str]:
    """Returns whether the target is met, and says so.

    What was found with predicted costs is refuted by counted ones, and what was found on the tuning
    photos by the eval photos, if even the lower limit of the interval there is above the limit.
    """
    held = row["eval"]
    if short := shortfall_text(wanted, best.figures):
        return False, f"not found: {asked_text(wanted)}; the nearest has {short}"
    counted, most = row["instructions_ratio"], wanted.cost_max
    if counted is not None and most is not None and counted > most * (1 + COUNT_ERROR):
        seen = f"{100 * counted:.1f} % of the cost when counted"
        return False, f"not found: {asked_text(wanted)}; the nearest has {seen}"
    asked = wanted.ap_loss_max
    if asked is not None and held is not None and held["loss"] is not None:
        lost, low = held["loss"], held["loss_low"]
        seen = f"{lost:.2f} points [{low:.2f}, {held['loss_high']:.2f}] lost on the eval photos"
        if low > asked:
            return False, f"not found: {asked_text(wanted)}; the nearest has {seen}"
        if lost > asked:
            return True, f"found {asked_text(wanted)}; {seen}, which may be chance"
    return True, f"found {asked_text(wanted)}"


class _Judges:
    """Measures models on training photos and on the eval photos, and times them."""

    def __init__(self, workshop: Workshop) -> None:
        self.shop = workshop
        photos, recipe = workshop.photos, workshop.recipe
        tuned = len(workshop.ruler.data or ())
        apart = photos.check_kind != "same photos"
        self.photo: Dataset = photos.check.limit(1)
        self.train: Ruler | None = None
        self.eval: Ruler | None = None
        if apart:
            sample = photos.train_sample(min(tuned, TRAIN_PHOTOS_MAX))
            if (sample.truths is None) == (photos.check.truths is None):
                self.train = Ruler(workshop.start, sample, photos.train_print, len(sample))
        if workshop.eval_folder is not None:
            held = open_photos(recipe.data.photos, workshop.eval_folder, workshop.hold_out)
            self.eval = Ruler(workshop.start, held.check, held.check_print, len(held.check))
        self.original = OnnxDetector(workshop.start.original)
        self.before = {
            part: ruler.measure(workshop.start, None) if ruler else None
            for part, ruler in (("train", self.train), ("eval", self.eval))
        }
        self.tuned = workshop.ruler.measure(workshop.start, None)

    def measure(self, model: Candidate) -> dict[str, Any]:
        """Returns scores on training and eval photos, generalisation, and milliseconds here."""
        folder = self.shop.job.folder
        path = folder / model.file
        state = replace(self.shop.start, model=path)
        scores: dict[str, Any] = {}
        for part, ruler in (("train", self.train), ("eval", self.eval)):
            cache = folder / TRIALS_FOLDER / "measured" / f"{model.sha256[:16]}-{part}.json"
            scores[part] = ruler.measure(state, cache) if ruler else None
        others = [self.before["eval"], scores["eval"]]
        if self.eval is None:
            others = [self.tuned, model.score]
        pairs = [self.before["train"], scores["train"]]
        known = all(isinstance(one, dict) for one in [*pairs, *others])
        pair = (self.original, OnnxDetector(path))
        times = latency(*pair, self.photo, ROUNDS)
        assert times is not None
        other = openvino_latency(*pair, self.photo, ROUNDS)
        return scores | {
            "generalisation": generalisation(pairs, others) if known else None,
            "ms": times["after_ms"],
            "ms_ratio": times["ratio"],
            "openvino": other,
        }


def frontier_report(
    workshop: Workshop, wanted: Search, found: Found, chosen: Chosen
) -> dict[str, Any]:
    """Returns everything about a search and its frontier, JSON-ready."""
    on_front = {row["name"] for row in chosen.rows}
    rest = [m for m in found.candidates if m.name not in on_front]
    photos = workshop.photos
    values: dict[str, Any] = {
        "model": workshop.entered.spec.name,
        "core": workshop.job.core,
        "target": wanted.limits,
        "minimises": wanted.minimises,
        "met": chosen.met,
        "says": chosen.says,
        "cost_unit": found.price,
        "best": chosen.best.name,
        "trials": found.trials,
        "failed": list(found.failed),
        "seconds": round(found.seconds, 1),
        "photos": {
            "learned_from": len(photos.train_paths),
            "tuned_on": len(workshop.ruler.data or ()),
            "tuned_on_from": photos.check_kind,
        },
        "original": found.original.to_json(),
        "rows": list(chosen.rows),
        "beaten": [_point(m) for m in rest],
        "notes": list(found.notes),
        "machine": machine(),
    }
    cleaned: dict[str, Any] = finite(values)
    return cleaned


def _point(model: Candidate) -> dict[str, Any]:
    return {
        "name": model.name,
        "text": model.text,
        "value": model.score["value"],
        "cost_ratio": model.cost_ratio,
        "bytes": model.bytes,
    }


def write_frontier(folder: Path, report: dict[str, Any]) -> Path:
    """Writes JSON, plot and page, and returns the page.

    Raises:
        OutputError: The folder cannot be written.
        MissingExtraError: jinja2 or matplotlib is missing.
    """
    picture = plot(report)
    write_json(folder / JSON_FILE, report)
    write_bytes(folder / PLOT_FILE, picture)
    write_text(folder / HTML_FILE, render(report, picture))
    return folder / HTML_FILE


def plot(report: dict[str, Any]) -> bytes:
    """Returns accuracy over cost and over size as PNG: the frontier, the rest, and the limits."""
    figure = figure_of(4.2, width=10, dpi=110)
    rows = report["rows"]
    kind = "AP" if report["original"]["score"]["kind"] == "ap" else "agreement with the original"
    target = report["target"]
    scales = (
        ("cost_ratio", 100.0, "% of the original's cost", "cost_max"),
        ("bytes", 1e-6, "MB", "bytes_max"),
    )
    for axes, (key, scale, label, limit) in zip(figure.subplots(1, 2), scales, strict=True):
        _dots(axes, report["beaten"], key, scale, GREY, "beaten by another")
        points = [(row[key] * scale, row["score"]["value"]) for row in rows]
        points = [p for p in points if p[1] is not None]
        axes.plot(*zip(*_outer(points), strict=True), "-", color=BLUE)
        axes.plot(*zip(*points, strict=True), "o", color=BLUE, markersize=5, label="frontier")
        eval_points = [(row[key] * scale, row["eval"]["value"]) for row in rows if row["eval"]]
        if eval_points:
            axes.plot(
                *zip(*sorted(eval_points), strict=True), "o", mfc="none", color=BLUE, label="eval"
            )
        best = next(row for row in rows if row["best"])
        axes.plot(
            best[key] * scale,
            best["score"]["value"],
            "*",
            color=ORANGE,
            markersize=15,
            label="best",
        )
        if limit in target:
            axes.axvline(target[limit] * scale, color=ORANGE, linestyle=":", label="limit")
        if "ap_loss_max" in target:
            whole = report["original"]["score"]["value"]
            axes.axhline(whole - target["ap_loss_max"], color=ORANGE, linestyle=":")
        axes.set_xlabel(label)
        axes.set_ylabel(f"{kind} on the tuning photos")
        axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8, loc="lower right")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def _dots(
    axes: Any, points: Sequence[dict[str, Any]], key: str, scale: float, color: str, label: str
) -> None:
    known = [p for p in points if p["value"] is not None]
    xs, ys = [p[key] * scale for p in known], [p["value"] for p in known]
    axes.plot(xs, ys, "o", color=color, markersize=4, label=label)


def _outer(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Returns the points that are best in these two figures alone, from left to right."""
    found: list[tuple[float, float]] = []
    for x, y in sorted(points, key=lambda p: (p[0], -p[1])):
        if not found or y > found[-1][1]:
            found.append((x, y))
    return found


def render(report: dict[str, Any], picture: bytes) -> str:
    """Returns the page: everything inside, nothing fetched from anywhere."""
    address = "data:image/png;base64," + base64.b64encode(picture).decode()
    return render_page(TEMPLATE, FILTERS, report=report, picture=address)
