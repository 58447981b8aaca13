"""The page of an analysis: sentences, bars per layer, and the whole table; nothing from outside."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..models.files import write_text
from .analyse_report import Row, columns
from .layer_sensitivity import TREATMENTS
from .page import render_page
from .report import BLUE, FILTERS, ORANGE, as_svg, figure_of

TEMPLATE = "analyse.html.j2"
GREEN = "#3f9d5d"
COLORS = dict(zip(TREATMENTS, (BLUE, ORANGE, GREEN), strict=True))
INCHES_PER_LAYER = 0.16


def write_page(path: Path, report: Row) -> None:
    """Writes the HTML page.

    Args:
        path: Of the page.
        report: From ``report_of``.

    Raises:
        OutputError: The file cannot be written.
        MissingExtraError: jinja2 or matplotlib is missing.
    """
    write_text(path, render(report))


def render(report: Row) -> str:
    """Returns the HTML page."""
    head = columns(report)
    ranked = sorted(report["layers"], key=lambda row: -row["macs"])
    return render_page(
        TEMPLATE,
        FILTERS,
        report=report,
        plots=plots(report),
        titles=[title for title, _ in head],
        rows=[[cell(row) for _, cell in head] for row in ranked],
    )


def plots(report: Row) -> list[str]:
    """Returns one plot per measure, as SVG text: a bar per layer, from the input downwards."""
    rows = report["layers"]
    made = [
        _bars(rows, [r["macs"] / 1e6 for r in rows], "Multiply-accumulates", "million per picture"),
        _bars(rows, [r["parameters"] / 1e3 for r in rows], "Parameters", "thousand"),
        _bars(rows, [r["activation_bytes"] / 1e3 for r in rows], "Outputs", "kB"),
    ]
    if any("effective_rank" in row["redundancy"] for row in rows):
        unused = [_unused(row["redundancy"]) for row in rows]
        label = "% of the dimensions not used (pale: too few pixels to tell)"
        sure = [bool(row["redundancy"].get("rank_sure")) for row in rows]
        made.append(_bars(rows, unused, "Redundancy", label, sure))
    if any(row["sensitivity"] for row in rows):
        made.append(_losses(rows, report["unit"]))
    return made


def _unused(figures: Row) -> float:
    if "effective_rank" not in figures:
        return 0.0
    return float(100 * (1 - figures["effective_rank"] / max(1, figures["channels"])))


def _axes(rows: Sequence[Row]) -> tuple[Any, Any, Any]:
    figure = figure_of(1.0 + INCHES_PER_LAYER * len(rows))
    axes = figure.subplots()
    place = np.arange(len(rows))
    axes.set_yticks(place, [row["short"] for row in rows], fontsize=6)
    axes.invert_yaxis()
    axes.margins(y=0.01)
    return figure, axes, place


def _bars(
    rows: Sequence[Row],
    values: Sequence[float],
    title: str,
    label: str,
    sure: Sequence[bool] | None = None,
) -> str:
    figure, axes, place = _axes(rows)
    colors = BLUE if sure is None else [BLUE if known else f"{BLUE}50" for known in sure]
    axes.barh(place, values, 0.8, color=colors)
    axes.set_xlabel(label)
    return as_svg(figure, axes, title)


def _losses(rows: Sequence[Row], unit: str) -> str:
    figure, axes, place = _axes(rows)
    axes.set_ylim(len(rows) + 1.5, -3)  # room for the legend above the first layer
    for treatment, color in COLORS.items():
        known = [i for i, row in enumerate(rows) if treatment in row["sensitivity"]]
        if known:
            values = [rows[i]["sensitivity"][treatment] for i in known]
            axes.plot(values, place[known], "o", ms=3, color=color, label=treatment)
    axes.set_xlabel(f"{unit} when it is done to the layer alone")
    return as_svg(figure, axes, "Sensitivity")
