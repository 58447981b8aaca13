"""Percentiles and rates in bounded memory."""

from __future__ import annotations

import sys
import time

import numpy as np
import pytest
from edgesight.device_app.stats import RECENT, STAGES, Rate, Stats, Times


def test_whole_run_percentiles_are_exact_within_one_percent() -> None:
    values = np.random.default_rng(0).lognormal(mean=2.5, sigma=0.6, size=20_000)  # ms
    times = Times()
    for value in values:
        times.add(value / 1e3)
    found = times.summary()
    assert found["n"] == times.n == 20_000
    assert found["mean"] == pytest.approx(values.mean(), rel=1e-3)
    for key, percent in (("p50", 50), ("p90", 90), ("p99", 99)):
        assert found[key] == pytest.approx(np.percentile(values, percent), rel=0.011)  # type: ignore[literal-required]


def test_recent_percentiles_forget_the_past() -> None:
    times = Times()
    for _ in range(1000):
        times.add(1.0)
    for i in range(RECENT):
        times.add((i % 100 + 1) / 1e3)
    recent = times.recent()
    assert recent["p50"] == pytest.approx(50.5, abs=0.1)
    assert recent["p90"] == pytest.approx(90.1, abs=0.2)
    assert recent["p99"] == pytest.approx(99.01, abs=0.2)
    assert times.summary()["p50"] > 900, "the whole run remembers the slow beginning"


@pytest.mark.parametrize("seconds", [0.0, 1e-9, 1e4, -1e-6])
def test_extreme_durations_do_not_break_the_histogram(seconds: float) -> None:
    times = Times()
    times.add(seconds)
    assert times.summary()["n"] == 1


def test_memory_does_not_grow_with_the_run() -> None:
    times, rate = Times(), Rate()

    def size() -> int:
        return sys.getsizeof(times._recent) + times._counts.nbytes + sys.getsizeof(rate._recent)

    for i in range(10_000):
        times.add(0.01)
        rate.tick(i * 0.0001)
    before = size()
    for i in range(10_000, 30_000):
        times.add(0.02)
        rate.tick(i * 0.0001)
    assert size() <= before


def test_rate_of_the_whole_run_and_of_the_latest_seconds() -> None:
    rate = Rate()
    for i in range(100):
        rate.tick(i * 0.1)  # 10 per second for 10 s
    for i in range(1, 101):
        rate.tick(9.9 + i * 0.04)  # then 25 per second for 4 s
    assert rate.n == 200
    assert rate.overall() == pytest.approx(199 / 13.9)
    assert rate.recent(13.9) == pytest.approx(25, rel=0.01)


def test_rate_falls_when_events_stop() -> None:
    rate = Rate()
    for i in range(31):
        rate.tick(i / 10)
    assert rate.recent(3.05) == pytest.approx(10, rel=0.02)
    assert rate.recent(5.0) < 6
    assert rate.recent(10.0) == 0


def test_rate_without_events_is_zero() -> None:
    rate = Rate()
    assert rate.overall() == rate.recent() == 0
    rate.tick()
    assert rate.overall() == rate.recent() == 0


def test_only_stages_that_ran_are_told() -> None:
    stats = Stats()
    assert stats.stages_ms() == stats.summary_ms() == {}
    stats.times["inference"].add(0.02)
    assert list(stats.stages_ms()) == list(stats.summary_ms()) == ["inference"]
    assert set(stats.times) == set(STAGES)
    time.sleep(0.01)
    assert stats.elapsed_s() >= 0.01
