"""Targets: what is asked for, who meets it, who is nearest, and what is refused in one line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from edgesight.compression.recipe import make_recipe
from edgesight.compression.targets import (
    Figures,
    Search,
    asked_text,
    best_of,
    merit,
    missed,
    non_dominated,
    parse_bytes,
    parse_seconds,
    shortfall_text,
)
from edgesight.models.errors import RecipeError

GOOD: dict[str, Any] = {"version": 1, "data": {"photos": "photos"}}


def wanted(**limits: Any) -> Search:
    return Search.model_validate({"trials": 1, **limits})


@pytest.mark.parametrize(
    ("text", "value"),
    [("1 MB", 10**6), ("1.5mb", 1_500_000), ("900kB", 900_000), ("1 MiB", 2**20), ("77", 77)],
)
def test_sizes(text: str, value: int) -> None:
    assert parse_bytes(text) == value
    assert wanted(bytes_max=text).bytes_max == value


@pytest.mark.parametrize(
    ("text", "value"), [("30m", 1800), ("90", 90), ("1h30m", 5400), ("45 s", 45), ("0.5h", 1800)]
)
def test_times(text: str, value: float) -> None:
    assert parse_seconds(text) == value


@pytest.mark.parametrize("text", ["", "0", "soon", "-5m", "3 weeks", "m"])
def test_no_times(text: str) -> None:
    with pytest.raises(ValueError, match="a time such as '30m'"):
        parse_seconds(text)


CHEAP, SMALL, GOOD_ONE, WHOLE = (
    Figures(4.0, 0.3, 900_000),
    Figures(3.0, 0.6, 400_000),
    Figures(0.8, 0.7, 1_500_000),
    Figures(0.0, 1.0, 4_000_000),
)
ALL = [WHOLE, CHEAP, SMALL, GOOD_ONE]


@pytest.mark.parametrize(
    ("limits", "best"),
    [
        ({"cost_max": 0.75}, GOOD_ONE),  # the most accurate one that is cheap enough
        ({"cost_max": 0.75, "bytes_max": 10**6}, SMALL),
        ({"ap_loss_max": 1.0}, GOOD_ONE),  # the cheapest one that is accurate enough
        ({"ap_loss_max": 5.0}, CHEAP),
        ({"ap_loss_max": 5.0, "bytes_max": 500_000}, SMALL),
        ({"ap_loss_max": 0.5, "bytes_max": 10**7}, WHOLE),
        ({"cost_max": 0.2}, CHEAP),  # nobody does: the nearest
        ({"bytes_max": 300_000}, SMALL),
        ({"ap_loss_max": 1.0, "cost_max": 0.65}, GOOD_ONE),
    ],
)
def test_the_best_or_the_nearest(limits: dict[str, Any], best: Figures) -> None:
    assert ALL[best_of(wanted(**limits), ALL)] == best


def test_how_near_is_said_in_the_units_of_the_question() -> None:
    asked = wanted(cost_max=0.2, bytes_max="1 MB", ap_loss_max=1)
    assert asked_text(asked) == (
        "the cheapest model with at most 20 % of the cost, at most 1 MB, at most 1 points lost"
    )
    text = shortfall_text(asked, CHEAP)
    assert "30.0 % of the cost, asked: at most 20 %" in text
    assert "4.00 points lost, asked: at most 1" in text
    assert "MB" not in text, "what is kept is not named"
    assert shortfall_text(asked, Figures(1.0, 0.2, 10**6)) == "", "a limit itself is allowed"


def test_a_missed_limit_outweighs_what_is_won_by_it() -> None:
    asked = wanted(cost_max=0.5)
    over, within = Figures(0.0, 0.55, 1), Figures(3.0, 0.5, 1)
    assert missed(asked, over) > 0 == missed(asked, within)
    assert merit(asked, within) < merit(asked, over)
    loss = wanted(ap_loss_max=1.0)
    assert merit(loss, Figures(1.0, 0.9, 1)) < merit(loss, Figures(2.0, 0.5, 1))


def test_the_frontier_is_what_nobody_beats() -> None:
    beaten = [Figures(4.0, 0.3, 900_001), Figures(5.0, 0.7, 1_500_000)]
    assert non_dominated([*ALL, *beaten]) == [0, 1, 2, 3]
    assert non_dominated([CHEAP, CHEAP, CHEAP]) == [0], "of equal ones the first"
    assert non_dominated([]) == []


@pytest.mark.parametrize(
    ("search", "words"),
    [
        ({"cost_max": 0.5}, "search: expected budget_s (seconds) or trials"),
        ({"trials": 3}, "search: expected one of cost_max, bytes_max, ap_loss_max"),
        ({"trials": 3, "cost_max": 1.5}, "search.cost_max: expected less than or equal to 1"),
        ({"trials": 3, "cost_max": 0}, "search.cost_max: expected greater than 0"),
        ({"trials": 0, "cost_max": 0.5}, "search.trials: expected greater"),
        ({"trials": 3, "bytes_max": "1 potato"}, "search.bytes_max: expected a size such as"),
        ({"trials": 3, "bytes_max": 0}, "search.bytes_max: expected greater"),
        ({"trials": 3, "ap_loss_max": -1}, "search.ap_loss_max: expected greater"),
        ({"budget_s": float("inf"), "cost_max": 0.5}, "search.budget_s: expected a finite"),
        ({"trials": 3, "cost_maximum": 0.5}, "did you mean 'cost_max'?"),
        ({"trials": 3, "cost_max": 0.5, "kinds": ["prun"]}, "search: expected kinds out of "),
        ({"trials": 3, "cost_max": 0.5, "kinds": ["verify"]}, "found 'verify'"),
        ({"trials": 3, "cost_max": 0.5, "input_hw": [[100, 64]]}, "expected a multiple of 32"),
    ],
)
def test_refused_in_one_line(search: dict[str, Any], words: str) -> None:
    with pytest.raises(RecipeError) as caught:
        make_recipe(GOOD | {"search": search}, Path("/r"), "r.toml")
    message = str(caught.value)
    assert words in message
    assert message.startswith("r.toml: ")
    assert "\n" not in message


def test_steps_or_a_target() -> None:
    steps, search = [{"kind": "quantize"}], {"trials": 1, "cost_max": 0.5}
    with pytest.raises(RecipeError, match=r"a table \[search\], found both; leave one out"):
        make_recipe(GOOD | {"steps": steps, "search": search}, Path("/r"))
    with pytest.raises(RecipeError, match=r"a table \[search\], found neither"):
        make_recipe(GOOD, Path("/r"))
    assert make_recipe(GOOD | {"search": search}, Path("/r")).steps == ()
