"""The gate on speed finds a slower model on a noisy machine, and does not cry wolf."""

from __future__ import annotations

import time

import numpy as np
import numpy.typing as npt
import pytest
from edgesight.deploy.gate_latency import Pairs, latency_checks, measure_pairs, ratios
from edgesight.models.detections import Detections

Times = npt.NDArray[np.float64]


def times(slowdown: float, seed: int, blocks: int = 60) -> tuple[Times, Times]:
    """Returns new and old milliseconds on a machine whose clock drifts, with rare long ones."""
    random = np.random.default_rng(seed)
    drift = np.exp(np.cumsum(random.normal(0, 0.1, blocks)))[:, None]
    both = []
    for factor in (1 + slowdown, 1.0):
        one = 20 * factor * drift * np.exp(random.normal(0, 0.02, (blocks, 8)))
        both.append(one * np.where(random.uniform(size=one.shape) < 0.03, 3, 1))
    return both[0], both[1]


def outcomes(slowdown: float, trials: int = 60) -> list[str]:
    found = []
    for seed in range(trials):
        checks = latency_checks(Pairs(*times(slowdown, seed)), resamples=200)
        found.append(checks[1].outcome)
    return found


def test_a_slowdown_is_found_through_drift_and_equal_speed_is_not_flagged() -> None:
    slower, equal = outcomes(0.05), outcomes(0.0)
    assert slower.count("fail") >= 54
    assert slower.count("pass") <= 8  # 5 % at exactly the limit
    assert equal.count("pass") >= 57
    assert outcomes(0.15).count("fail") == 60
    assert outcomes(-0.1).count("pass") == 60


def test_the_ratio_is_that_of_each_rank() -> None:
    """A model that is slower on one picture of five only is slower at p90, not at p50."""
    new, old = times(0.0, 1)
    new[:, ::4] *= 1.5
    found = ratios(new, old)
    assert found["p50"][0] == pytest.approx(1.0, abs=0.02)
    assert found["p90"][0] == pytest.approx(1.45, abs=0.1)
    assert found["p90"][1] < found["p90"][0] < found["p90"][2]
    p50, p90 = latency_checks(Pairs(new, old))
    assert (p50.name, p50.outcome) == ("latency p50", "pass")
    assert (p90.name, p90.outcome, p90.kind) == ("latency p90", "fail", "latency")
    assert "expected a slowdown below 5 %, found +4" in p90.reason


def test_a_noisy_or_short_measurement_is_no_evidence() -> None:
    random = np.random.default_rng(0)
    noisy = 20 * np.exp(random.normal(0, 0.5, (2, 20, 8)))
    found = latency_checks(Pairs(noisy[0], noisy[1]))
    assert {check.outcome for check in found} == {"not enough evidence"}
    assert "time it again" in found[0].reason
    short = latency_checks(Pairs(*times(0.0, 0, blocks=4)))
    assert {check.outcome for check in short} == {"not enough evidence"}
    assert "expected at least 10 blocks, found 4" in short[0].reason


def test_processor_time_decides_where_it_tells_and_the_wall_clock_elsewhere() -> None:
    wall_new, wall_old = times(0.0, 3)
    quiet = np.random.default_rng(1).normal(1, 0.01, wall_new.shape)
    cpu_old = np.minimum(wall_old, 18.0) * quiet
    cpu_old = np.where(wall_old < 1.1 * cpu_old, wall_old, cpu_old)
    alone = Pairs(wall_old * 1.2, wall_old, wall_old * 1.2, wall_old)
    assert latency_checks(alone)[0].figures["clock"] == "cpu"
    threads = Pairs(wall_new, wall_old, wall_new * 1.8, wall_old * 1.8)
    assert latency_checks(threads)[0].figures["clock"] == "wall"
    device = Pairs(wall_new, wall_old, wall_new * 0.1, wall_old * 0.1)
    assert latency_checks(device)[0].figures["clock"] == "wall"


class Worker:
    """A detector that computes for so many milliseconds, or sleeps, and notes its turns."""

    def __init__(self, name: str, ms: float, turns: list[str], *, sleeps: bool = False) -> None:
        self.name, self.ms, self.turns, self.sleeps = name, ms, turns, sleeps

    def __call__(self, image: npt.NDArray[np.uint8]) -> Detections:
        self.turns.append(f"{self.name}{int(image[0, 0, 0])}")
        if self.sleeps:
            time.sleep(self.ms / 1000)
        until = time.process_time() + self.ms / 1000
        while not self.sleeps and time.process_time() < until:
            pass
        return Detections.empty()


def test_detectors_take_turns_on_the_same_pictures() -> None:
    turns: list[str] = []
    pictures = [np.full((2, 2, 3), i, np.uint8) for i in range(3)]
    new, old = Worker("new", 2.0, turns), Worker("old", 1.0, turns)
    pairs = measure_pairs(new, old, pictures, blocks=12, per_block=4, warm_up=2, progress=False)
    assert pairs.new_ms.shape == pairs.old_ms.shape == (12, 4)
    assert turns[:4] == ["new0", "old0", "new1", "old1"]
    firsts = []
    for block in range(12):
        turn = turns[4 + 8 * block : 12 + 8 * block]
        names = [one[:3] for one in turn]
        assert names in (["new"] * 4 + ["old"] * 4, ["old"] * 4 + ["new"] * 4)
        assert [one[3:] for one in turn[:4]] == [one[3:] for one in turn[4:]]
        firsts.append(names[0])
    assert set(firsts) == {"new", "old"}
    found = latency_checks(pairs)
    assert found[0].figures["clock"] == "cpu"
    assert found[0].outcome == "fail"
    assert found[0].figures["ratio"] == pytest.approx(2, rel=0.15)


def test_who_waits_is_timed_by_the_wall_clock() -> None:
    turns: list[str] = []
    pictures = [np.zeros((2, 2, 3), np.uint8)]
    new, old = Worker("new", 4.0, turns, sleeps=True), Worker("old", 2.0, turns, sleeps=True)
    pairs = measure_pairs(new, old, pictures, blocks=10, per_block=2, warm_up=1, progress=False)
    found = latency_checks(pairs)
    assert found[0].figures["clock"] == "wall"
    assert found[0].figures["ratio"] > 1.3
