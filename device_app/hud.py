"""The figures on the picture: rates, stages, drops and accuracy, readable at arm's length."""

from __future__ import annotations

from functools import lru_cache

import cv2
import numpy as np

from ..models.draw import FONT
from ..models.preprocess import Image
from .health import HealthFigures
from .live import AccuracyFigures, Figures
from .stats import STAGES

LIGHT = (245, 245, 245)
GREY = (190, 190, 190)
WARN = (80, 170, 255)
SHORT = {"preprocess": "pre", "inference": "infer", "postprocess": "post"}
SCALE_MIN = 0.42
"""Of the font; smaller letters cannot be read."""
SHARE_MAX = 0.45
"""Of the picture's height that the panel may hide; the less urgent lines go first."""

Line = tuple[str, tuple[int, int, int]]


def hud_lines(figures: Figures) -> list[Line]:
    """Returns the lines of the panel and their BGR colours."""
    rates = [
        f"{name} {figures[key]:.1f}"  # type: ignore[literal-required]
        for name, key in (
            ("capture", "capture_fps"),
            ("inference", "inference_fps"),
            ("display", "display_fps"),
        )
        if key in figures
    ]
    lines: list[Line] = [("FPS  " + "  ".join(rates), LIGHT)] if rates else []
    stages = figures.get("stages_ms", {})
    parts = [f"{SHORT.get(s, s)} {stages[s]['p50']:.1f}" for s in STAGES if s in stages]
    if parts:
        lines.append(("ms  " + "  ".join(parts), GREY))
    lines.append((f"dropped {figures.get('dropped', 0)}  of {_seen(figures)}", GREY))
    if board := figures.get("board"):
        lines += board_lines(board, figures)
    if accuracy := figures.get("accuracy"):
        lines.append((accuracy_line(accuracy), LIGHT))
    state = figures.get("source_state", "running")
    if state != "running":
        lines.append((f"source {state}", WARN))
    return lines


def board_lines(board: HealthFigures, figures: Figures) -> list[Line]:
    """Returns what the machine has to say: its state in grey, what is wrong in orange."""
    parts = []
    if latency := figures.get("latency_ms"):
        parts.append(f"latency {latency['p50']:.0f} p99 {latency['p99']:.0f} ms")
    for key, text in (
        ("cpu_percent", "CPU {:.0f} %"),
        ("temperature_c", "{:.0f} C"),
        ("clock_mhz", "{:.0f} MHz"),
        ("memory_mb", "{:.0f} MB"),
    ):
        value = board[key]  # type: ignore[literal-required]
        if value is not None:
            parts.append(text.format(value))
    lines: list[Line] = [("  ".join(parts), GREY)] if parts else []
    if board["says"]:
        lines.append((board["says"], WARN))
    return lines


def accuracy_line(accuracy: AccuracyFigures) -> str:
    """Returns one short line that says what is shown and against what."""
    kind, frames = accuracy.get("kind", "none"), accuracy.get("frames", 0)
    f1, ap50 = accuracy.get("f1"), accuracy.get("ap50")
    if kind == "labels" and frames and ap50 is not None:
        precision, recall = accuracy.get("precision"), accuracy.get("recall")
        rest = "" if precision is None or recall is None else f" P {precision:.0f} R {recall:.0f}"
        return f"AP50 {ap50:.1f}{rest}  vs labels, n={frames}"
    if kind == "agreement" and frames and f1 is not None:
        low, high = accuracy.get("f1_low"), accuracy.get("f1_high")
        span = "" if low is None or high is None else f" [{low:.0f}..{high:.0f}]"
        return f"F1 {f1:.0f}{span}  vs reference, n={frames}"
    return "accuracy: " + accuracy.get("text", "none")


def draw_hud(image: Image, figures: Figures) -> None:
    """Draws the panel into the top left corner.

    Args:
        image: uint8 BGR ``(height, width, 3)``; changed in place.
        figures: What to show; missing keys are left out.
    """
    height, width = image.shape[:2]
    wanted = max(SCALE_MIN, min(height, width) / 1000)
    line_h = round(34 * wanted) + 2
    rows_max = max(1, int((SHARE_MAX * height - 8) / line_h))
    lines = fit_lines(tuple(hud_lines(figures)), round((width - 16) / wanted), rows_max)
    if not lines:
        return
    widest = max(text_width(text) for text, _ in lines)
    scale = min(wanted, max(1, width - 16) / max(1, widest))  # a single long word still fits
    panel_w = min(width, round(widest * scale) + 14)
    panel_h = min(height, line_h * len(lines) + 8)
    panel = image[:panel_h, :panel_w]
    np.right_shift(panel, 2, out=panel)  # a dark glass: a quarter of the light stays
    for row, (text, color) in enumerate(lines):
        origin = (7, 4 + round((row + 0.75) * line_h))
        cv2.putText(image, text, origin, FONT, scale, color, 1, cv2.LINE_AA)


@lru_cache(maxsize=8)
def fit_lines(lines: tuple[Line, ...], width_max: int, rows_max: int) -> tuple[Line, ...]:
    """Returns the lines that fit, broken where they are too long, the least urgent left out.

    Grey lines (stages, drops) go first, the longest of them first; then from the end, but a
    warning and the rates stay longest.

    Args:
        lines: As ``hud_lines`` gives them.
        width_max: In pixels at font scale 1.
        rows_max: Rows there is room for, at least 1.
    """
    kept = list(lines)
    while kept:
        rows = [(row, color) for text, color in kept for row in _broken(text, width_max)]
        if len(rows) <= rows_max:
            return tuple(rows)
        if len(kept) == 1:
            return tuple(rows[:rows_max])
        grey = [line for line in kept if line[1] == GREY]
        light = [line for line in kept if line[1] == LIGHT]
        kept.remove(max(grey, key=lambda line: len(line[0])) if grey else light[-1])
    return ()


@lru_cache(maxsize=256)
def text_width(text: str) -> int:
    """Returns the width of a text in pixels at font scale 1."""
    return int(cv2.getTextSize(text, FONT, 1.0, 1)[0][0])


def _broken(text: str, width_max: int) -> list[str]:
    """Returns the text in rows, broken between its parts, which two spaces divide."""
    rows: list[str] = []
    for part in text.split("  "):
        if rows and text_width(f"{rows[-1]}  {part}") <= width_max:
            rows[-1] += f"  {part}"
        else:
            rows.append(part)
    return rows


def _seen(figures: Figures) -> int:
    return figures.get("frames", 0) + figures.get("dropped", 0)
