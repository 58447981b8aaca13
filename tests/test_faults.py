"""The quick ones of ``benchmarks/faults.py``, and that it sees it when a run does not survive."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

FAULTS = Path(__file__).parent.parent / "benchmarks" / "faults.py"
QUICK = ("camera-lost", "model-bad")
GUARD_S = 240  # each case waits for several things, on a machine that others use


def rows(tmp_path: Path, *names: str) -> tuple[int, dict[str, Any]]:
    """Runs cases; returns the exit code, and the rows by name."""
    out = tmp_path / "faults.json"
    parents = [entry for entry in sys.path if entry and (Path(entry) / "edgesight").is_dir()]
    done = subprocess.run(
        [sys.executable, FAULTS, "--only", *names, "--out", out],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(parents)},
        capture_output=True, text=True, timeout=GUARD_S, cwd=tmp_path,
    )  # fmt: skip
    assert out.exists(), done.stderr
    found = json.loads(out.read_text())["cases"]
    return done.returncode, {row["name"]: row for row in found}


@pytest.mark.timeout(300)
def test_quick_faults_are_survived(tmp_path: Path) -> None:
    code, found = rows(tmp_path, *QUICK)
    assert list(found) == list(QUICK)
    assert not [row["problems"] for row in found.values() if row["problems"]]
    assert code == 0
    assert "retrying" in found["camera-lost"]["said"][0]
    assert found["camera-lost"]["back_s"] > 0
    assert found["camera-lost"]["exit_code"] == 0


@pytest.mark.timeout(300)
def test_a_run_that_dies_is_no_survivor(tmp_path: Path) -> None:
    code, found = rows(tmp_path, "killed")
    assert code == 1
    assert not found["killed"]["survived"]
    assert "exit code -9" in " ".join(found["killed"]["problems"])
