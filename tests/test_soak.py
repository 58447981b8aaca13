"""The judgement of the soak and latency benchmarks: series that must pass, and must fail."""

from __future__ import annotations

import importlib
import math
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture(scope="module")
def soak() -> Iterator[Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        yield importlib.import_module("soak")


@pytest.fixture(scope="module")
def latency(soak: Any) -> Any:
    return importlib.import_module("latency")


def looks(soak: Any, minutes: float, **changes: Callable[[int], Any]) -> list[Any]:
    """Returns what a good run gives, one look a second, but for what is changed (of the second)."""
    rng = np.random.default_rng(3)
    noise = rng.normal(0, 0.05, round(60 * minutes) + 1)
    found = []
    for i in range(round(60 * minutes) + 1):
        recording = 20 <= i % 60 < 30
        values: dict[str, Any] = {
            "at_s": float(i),
            "rss_mb": 180 + noise[i] + 0.3 * recording,
            "anonymous_mb": 100.0,
            "files": 16 + recording,
            "threads": 19 + recording,
            "frames": 5 + 30 * i,
            "dropped": 0,
            "fps": 30.0,
            "latency_p99_ms": 90.0,
            "resting": not recording,
            "pictures_gap_s": 0.1,
        }
        for key, change in changes.items():
            old = values[key]
            values[key] = (
                change(i) if key not in ("rss_mb", "files", "threads") else old + change(i)
            )
        found.append(soak.Sample(**values))
    return found


def failed(checks: list[Any]) -> list[str]:
    return [check.name for check in checks if not check.passed]


@pytest.mark.parametrize("minutes", [2, 120])
def test_a_good_run_passes(soak: Any, minutes: int) -> None:
    checks = soak.judge(looks(soak, minutes))
    assert failed(checks) == []
    assert ("short" in str(checks)) == (minutes == 2)  # it says that it cannot tell


@pytest.mark.parametrize(
    ("minutes", "changes", "wrong"),
    [
        (2, {"frames": lambda i: 5 + 30 * min(i, 60) + 30 * max(0, i - 66)}, "no hang: frames"),
        (2, {"frames": lambda i: 5 + 30 * min(i, 114)}, "no hang: frames"),
        (2, {"frames": lambda i: None if 30 <= i < 40 else 5 + 30 * i}, "no hang: frames"),
        (2, {"pictures_gap_s": lambda i: 6.0 if i == 50 else 0.1}, "no hang: viewer"),
        (2, {"rss_mb": lambda i: 200 * i / 3600}, "memory, MB/hour"),
        (120, {"rss_mb": lambda i: 1.2 * i / 3600}, "memory, MB/hour"),
        (120, {"files": lambda i: i // 3600}, "open files"),
        (120, {"threads": lambda i: -(i // 3600)}, "open threads"),
        (2, {"threads": lambda i: i > 50, "resting": lambda i: i % 2 == 0}, "open threads"),
    ],
)
def test_what_is_wrong_is_found(
    soak: Any, minutes: float, changes: dict[str, Any], wrong: str
) -> None:
    assert failed(soak.judge(looks(soak, minutes, **changes))) == [wrong]


@pytest.mark.parametrize(
    ("minutes", "changes"),
    [
        (2, {"frames": lambda i: 5 + 30 * min(i, 60) + 30 * max(0, i - 64)}),  # under 5 s
        (2, {"frames": lambda i: None if i % 20 == 7 else 5 + 30 * i}),  # no answer now and then
        (2, {"rss_mb": lambda i: 1.0 * (i >= 80)}),  # a buffer made while it warms up
        (2, {"rss_mb": lambda i: 20 * (1 - math.exp(-i / 15))}),  # a warm-up
        (1.5, {"rss_mb": lambda i: 200 * i / 3600}),  # only told
        (120, {"rss_mb": lambda i: 0.5 * i / 3600}),
        (120, {"rss_mb": lambda i: 20 * (1 - math.exp(-i / 300))}),
        (120, {"files": lambda i: 3 * (i < 60)}),  # while it warms up
        # Another model, which has a thread less, runs at the end: seen with --swap-every.
        (
            2,
            {
                "threads": lambda i: -(i > 95),
                "resting": lambda i: i <= 95 and not 20 <= i % 60 < 30,
            },
        ),
    ],
)
def test_what_is_right_is_let_pass(soak: Any, minutes: float, changes: dict[str, Any]) -> None:
    assert failed(soak.judge(looks(soak, minutes, **changes))) == []


def test_a_run_that_is_too_short_does_not_pass(soak: Any) -> None:
    assert failed(soak.judge(looks(soak, 0.2))) == ["long enough"]
    assert failed(soak.judge([])) == ["long enough"]


def drifting(rng: Any, count: int, kept: float) -> Any:
    """Returns noise of which each value keeps a share of the one before."""
    found, value = np.zeros(count), 0.0
    for i in range(count):
        value = kept * value + rng.normal()
        found[i] = value
    return found


@pytest.mark.parametrize("kept", [0.0, 0.8, 0.99])
def test_the_interval_holds_the_truth(soak: Any, kept: float) -> None:
    rng, times = np.random.default_rng(1), np.arange(3600.0)
    inside = 0
    for _ in range(200):
        found = soak.slope(times, 5 * times / 3600 + drifting(rng, 3600, kept), 60)
        inside += found.low <= 5 <= found.high
    assert inside >= 180


@pytest.mark.parametrize("kept", [0.95, 1.0])
def test_in_a_short_run_chance_is_no_growth(soak: Any, kept: float) -> None:
    rng, times = np.random.default_rng(2), np.arange(60.0)
    series = [drifting(rng, 60, kept) for _ in range(200)]
    lows = [soak.slope(times, values, 5, steps=True).low for values in series]
    assert sum(low > 0 for low in lows) <= 16
    plain = [soak.slope(times, values, 5).low for values in series]
    assert sum(low > 0 for low in plain) > sum(low > 0 for low in lows)


def test_the_slope_of_a_line_is_exact(soak: Any) -> None:
    found = soak.slope([0, 10, 20, 30, 40], [1, 2, 3, 4, 5], 10)
    assert found.per_hour == pytest.approx(360)
    assert found.low == pytest.approx(found.high)
    few = soak.slope([0, 1], [1, 2], 10)
    assert (few.low, few.high) == (-math.inf, math.inf)
    assert soak.grows(few, 1.0, long=True)  # nothing is shown by nothing
    assert not soak.grows(few, 1.0, long=False)


def test_the_last_block_counts_only_if_it_is_whole(soak: Any) -> None:
    times = np.arange(0.0, 50.1, 1)
    values = np.where(times < 50, times, 1000)  # one look at the end
    assert soak.slope(times, values, 10).per_hour == pytest.approx(3600)


def clocked(latency: Any, time_s: float) -> Any:
    picture = latency.footage(1)[0].copy()
    picture[-latency.ROWS :] = np.frombuffer(latency.bars(time_s), np.uint8)[None, :, None]
    return picture


def jpeg(picture: Any) -> bytes:
    return cv2.imencode(".jpg", picture, [cv2.IMWRITE_JPEG_QUALITY, 80])[1].tobytes()


@pytest.mark.parametrize("time_s", [0.0, 123.456, 1048.5, 98765.432])
def test_the_bars_tell_the_time_through_a_jpeg(latency: Any, time_s: float) -> None:
    picture = clocked(latency, time_s)
    cv2.rectangle(picture, (100, 100), (300, 478), (0, 200, 0), 2)  # a box over them
    assert latency.age_ms(jpeg(picture), time_s + 0.25) == pytest.approx(250, abs=1.5)


def test_bars_that_are_not_whole_are_not_read(latency: Any) -> None:
    picture = clocked(latency, 123.456)
    right = 22 * latency.CELL  # the last bar of the time
    picture[-latency.ROWS :, right - latency.CELL : right] = 235 - picture[-1, right - 5, 0]
    assert latency.age_ms(jpeg(picture), 124) is None
    picture[-latency.ROWS :] = 128
    assert latency.age_ms(jpeg(picture), 124) is None


def seen_run(latency: Any, kind: str = "camera", minutes: float = 1.0, **more: Any) -> Any:
    """Returns a run: 20 pictures a second, 60 ms old; limit 1.5 * 40 + 30 + 5 = 95 ms."""
    rng = np.random.default_rng(5)
    growth, spread = more.get("growth_ms_s", 0.0), more.get("spread_ms", 3.0)
    times = np.arange(0, 60 * minutes, 0.05)
    ages = 60 + growth * times + rng.normal(0, spread, len(times))
    stage = {"inference": {"p50": 20.0, "p99": 30.0}, "encode": {"p50": 3.0, "p99": 5.0}}
    told = {"fps": 25.0, "stages": stage, "latency": {"p50": 58.0, "p99": more.get("own", 90.0)}}
    unread = round(more.get("unread", 0.0) * 100)
    seen = [
        (t, None if i % 100 < unread else a)
        for i, (t, a) in enumerate(zip(times, ages, strict=True))
    ]
    ended = latency.Check("SIGTERM", True, "", "")
    return {"kind": kind, "source_fps": 30, "told": told, "seen": seen, "ended": ended}


@pytest.mark.parametrize(
    ("more", "wrong"),
    [
        ({}, []),
        ({"own": 96.0}, ["app's own"]),
        ({"spread_ms": 20.0}, ["glass to viewer"]),
        ({"spread_ms": 20.0, "kind": "rtsp"}, []),  # has a server's encoder in it
        ({"growth_ms_s": 0.2, "kind": "rtsp"}, ["latency grows, ms/hour"]),
        ({"growth_ms_s": 0.02, "kind": "rtsp", "minutes": 30}, ["latency grows, ms/hour"]),
        ({"growth_ms_s": 0.01, "kind": "rtsp", "minutes": 30}, []),
        ({"unread": 0.08}, ["pictures read"]),
        ({"unread": 1.0}, ["pictures"]),
    ],
)
def test_latency_is_judged(latency: Any, more: dict[str, Any], wrong: list[str]) -> None:
    checks, figures = latency.judge(seen_run(latency, **more))
    assert failed(checks) == wrong
    assert not figures or figures["limit"] == pytest.approx(95)


def test_no_picture_at_all_fails(latency: Any) -> None:
    run = seen_run(latency)
    assert failed(latency.judge({**run, "seen": []})[0]) == ["pictures"]
    assert failed(latency.judge({**run, "told": {}})[0]) == ["pictures"]


@pytest.mark.parametrize(
    ("code", "passed"),
    [
        ("print(json.dumps({'frames': 7})); sys.exit(0)", True),
        ("print(json.dumps({'frames': 7})); sys.exit(3)", False),
        ("sys.exit(0)", False),  # no summary
        (
            "print(json.dumps({'frames': 7})); print('Traceback', file=sys.stderr); sys.exit(0)",
            False,
        ),
    ],
)
def test_the_end_is_judged(latency: Any, tmp_path: Path, code: str, passed: bool) -> None:
    lines = ("import json, signal, sys, time", "def end(*_):", f"    {code}")
    wait = ("signal.signal(signal.SIGTERM, end)", "print('up', flush=True)", "time.sleep(60)")
    app = latency.App(tmp_path, (), ("-c", "\n".join([*lines, *wait])))
    try:
        until_s = time.monotonic() + 60
        while not (tmp_path / "out.txt").read_text() and time.monotonic() < until_s:
            time.sleep(0.01)
        check, told = app.end()
    finally:
        app.close()
    assert check.passed is passed
    assert bool(told) == ("frames" in code)


def test_a_run_that_is_gone_before_its_end_fails(latency: Any, tmp_path: Path) -> None:
    app = latency.App(tmp_path, (), ("-c", "print('{\"frames\": 7}')"))
    app.process.wait(60)
    check, _ = app.end()
    assert not check.passed
    assert "gone before" in check.found
    with pytest.raises(RuntimeError, match="expected frames"):
        app.ready()


@pytest.mark.parametrize(
    "words", [["soak.py", "--minutes", "0"], ["latency.py", "--minutes", "nan"]]
)
def test_strange_numbers_are_refused(words: list[str]) -> None:
    command = [sys.executable, str(BENCHMARKS / words[0]), *words[1:]]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert "expected --minutes" in done.stderr
