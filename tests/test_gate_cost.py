"""What the gate measures of a model besides its speed, with real processes."""

from __future__ import annotations

import runpy
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from edgesight.deploy.gate_cost import Cost, cost_checks, measure_costs, peak_memory, size_check
from edgesight.models.errors import ModelFileError

kit: Any = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("gate_kit.py"))))
app: Any = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("models_kit.py"))))
MB = 1_000_000


def cost(start: tuple[float, ...] = (0.5,), memory: int = 100 * MB) -> Cost:
    return Cost(start, (memory,) * len(start))


def test_a_memory_hog_is_caught_and_itself_is_not(tmp_path: Path) -> None:
    lean = kit.float_file(tmp_path / "lean.onnx")
    hog = kit.memory_hog(lean, tmp_path / "hog.onnx")
    new, old = measure_costs(hog, lean, rounds=2, progress=False)
    memory, _ = cost_checks(new, old)
    assert memory.outcome == "fail"
    assert memory.name == "memory"
    assert new.memory - old.memory > 100 * MB
    assert old.memory > 20 * MB
    assert min(old.start_s) > 0
    assert len(old.start_s) == 2
    assert cost_checks(old, old)[0].outcome == "pass"
    assert "expected at most" in memory.reason


def test_what_the_parent_takes_is_not_the_models(tmp_path: Path) -> None:
    lean = kit.float_file(tmp_path / "lean.onnx")
    ballast = bytearray(600 * MB)
    ballast[::4096] = b"x" * len(ballast[::4096])
    assert peak_memory() > 600 * MB
    same = kit.float_file(tmp_path / "same.onnx")
    new, _ = measure_costs(lean, same, rounds=1, progress=False)
    assert new.memory < 400 * MB
    del ballast


def test_files_that_hang_or_end_their_process_are_refused(tmp_path: Path) -> None:
    lean = kit.float_file(tmp_path / "lean.onnx")
    endless = app.endless(tmp_path / "endless.onnx")
    with pytest.raises(ModelFileError, match=r"endless\.onnx: .* found one that hangs \(3 s\)"):
        measure_costs(endless, lean, rounds=1, time_max_s=3, progress=False)
    broken = tmp_path / "broken.onnx"
    broken.write_bytes(lean.read_bytes()[:500])
    with pytest.raises(ModelFileError, match=r"broken\.onnx: .* ends its process"):
        measure_costs(broken, lean, rounds=1, progress=False)


def test_it_says_one_line_in_its_process(tmp_path: Path) -> None:
    lean = kit.float_file(tmp_path / "lean.onnx")
    command = [sys.executable, "-m", "edgesight.deploy.gate_cost", str(lean), "1"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.count("\n") == 1
    assert '"start_s"' in done.stdout


@pytest.mark.parametrize(
    ("new", "outcome"), [(1_000_000, "pass"), (1_100_000, "pass"), (1_100_001, "fail")]
)
def test_size(new: int, outcome: str) -> None:
    check = size_check(new, 1_000_000)
    assert check.outcome == outcome
    assert check.figures["new_bytes"] == new


@pytest.mark.parametrize(
    ("old_mb", "new_mb", "outcome"),
    [(50, 69, "pass"), (50, 71, "fail"), (200, 239, "pass"), (200, 241, "fail"), (80, 40, "pass")],
)
def test_memory_may_grow_by_a_fifth_or_twenty_megabytes(
    old_mb: int, new_mb: int, outcome: str
) -> None:
    check = cost_checks(cost(memory=new_mb * MB), cost(memory=old_mb * MB))[0]
    assert check.outcome == outcome


@pytest.mark.parametrize(
    ("new", "old", "outcome"),
    [
        ((0.6, 0.6, 0.6), (0.5, 0.5, 0.5), "pass"),
        ((0.9, 0.9, 0.8), (0.5, 0.5, 0.5), "fail"),
        ((0.9, 0.9, 0.5), (0.5, 0.5, 0.5), "not enough evidence"),
        ((0.10, 0.10, 0.10), (0.01, 0.01, 0.01), "pass"),  # nobody waits for that
        ((0.30, 0.30, 0.30), (0.01, 0.01, 0.01), "fail"),
    ],
)
def test_start_time(new: tuple[float, ...], old: tuple[float, ...], outcome: str) -> None:
    check = cost_checks(cost(new), cost(old))[1]
    assert check.outcome == outcome
    assert check.name == "start time"
