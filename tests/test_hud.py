from __future__ import annotations

import numpy as np
import pytest
from edgesight.device_app.hud import (
    GREY,
    LIGHT,
    WARN,
    accuracy_line,
    draw_hud,
    fit_lines,
    hud_lines,
    text_width,
)
from edgesight.device_app.live import Figures

FIGURES: Figures = {
    "frames": 100,
    "dropped": 7,
    "capture_fps": 30.04,
    "inference_fps": 12.5,
    "display_fps": 11.9,
    "stages_ms": {
        "inference": {"p50": 70.0, "p90": 80.0, "p99": 99.0},
        "capture": {"p50": 1.5, "p90": 2.0, "p99": 9.0},
    },
    "source_state": "running",
    "accuracy": {"kind": "none", "text": "no reference"},
}


def text_of(figures: Figures) -> str:
    return "\n".join(line for line, _ in hud_lines(figures))


def test_the_three_rates_are_told_apart() -> None:
    text = text_of(FIGURES)
    assert "capture 30.0" in text
    assert "inference 12.5" in text
    assert "display 11.9" in text


def test_stages_and_drops_are_shown() -> None:
    text = text_of(FIGURES)
    assert "infer 70.0" in text
    assert "dropped 7  of 107" in text


def test_accuracy_says_which_kind_it_is() -> None:
    agreement = accuracy_line(
        {"kind": "agreement", "text": "", "f1": 81.2, "f1_low": 74, "f1_high": 88, "frames": 31}
    )
    assert agreement == "F1 81 [74..88]  vs reference, n=31"
    labels = accuracy_line(
        {"kind": "labels", "text": "", "ap50": 42.1, "precision": 70, "recall": 55, "frames": 9}
    )
    assert labels == "AP50 42.1 P 70 R 55  vs labels, n=9"
    assert accuracy_line({"kind": "none", "text": "switched off"}) == "accuracy: switched off"
    waiting = accuracy_line({"kind": "agreement", "text": "waiting", "f1": None, "frames": 0})
    assert waiting == "accuracy: waiting"


def test_a_lost_source_is_told_and_a_running_one_is_not() -> None:
    assert "source" not in text_of(FIGURES)
    assert "source retrying: no answer" in text_of(
        {**FIGURES, "source_state": "retrying: no answer"}
    )


@pytest.mark.parametrize("size", [(480, 640), (1080, 1920), (240, 320), (90, 120), (8, 8)])
def test_panel_stays_in_the_corner_of_any_picture(size: tuple[int, int]) -> None:
    image = np.full((*size, 3), 200, np.uint8)
    draw_hud(image, FIGURES)
    assert (image[0, 0] < 200).all(), "the panel darkens its corner"
    if min(size) > 100:
        assert (image[-1] == 200).all(), "the rest of the picture stays as it was"


def test_long_lines_are_broken_between_their_parts() -> None:
    room = text_width("capture 30.0  infer 9.9")
    rows = [text for text, _ in fit_lines((("ms  capture 30.0  infer 9.9", GREY),), room, 9)]
    assert rows == ["ms  capture 30.0", "infer 9.9"]


def test_where_room_is_short_the_warning_and_the_rates_stay() -> None:
    lines = (("FPS 1", LIGHT), ("ms 1", GREY), ("dropped", GREY), ("F1 8", LIGHT), ("lost", WARN))
    shown = [[text for text, _ in fit_lines(lines, 10_000, rows)] for rows in (5, 3, 2, 1)]
    assert shown == [
        ["FPS 1", "ms 1", "dropped", "F1 8", "lost"],
        ["FPS 1", "F1 8", "lost"],
        ["FPS 1", "lost"],
        ["lost"],
    ]


def test_a_small_picture_keeps_letters_that_can_be_read() -> None:
    image = np.full((240, 320, 3), 200, np.uint8)
    draw_hud(image, FIGURES)
    dark = (image[:, :, 0] < 60).mean(axis=1) > 0.2
    assert dark.sum() <= 0.5 * 240, "the panel leaves the picture to be seen"
    letters = (image[:, :, 0] > 150).any(axis=1) & dark
    tallest = max(len(run) for run in "".join("x" if on else " " for on in letters).split())
    assert tallest >= 7, "a line of text is at least 7 pixels high"


def test_nothing_to_show_yet_is_no_error() -> None:
    image = np.full((100, 300, 3), 200, np.uint8)
    draw_hud(image, {})
    assert image.shape == (100, 300, 3)
