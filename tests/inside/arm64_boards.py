"""The wheel on arm64 Debian 12 and 13 under Cortex-A72 (Raspberry Pi 4) and A76 (5), emulated.

Not part of the suite: ``.ci/arm64-roots DIR`` makes the roots, then
``EDGESIGHT_ARM64=DIR pytest tests/inside/arm64_boards.py``; some three minutes.
"""

from __future__ import annotations

import functools
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

ROOTS = os.environ.get("EDGESIGHT_ARM64")
CHECKS = Path(__file__).parent / "arm64_checks.py"
GUARD_S = 280
BOARDS = [
    (debian, python, core)
    for debian, python in (("bookworm", "3.11"), ("trixie", "3.13"))
    for core in ("cortex-a72", "cortex-a76")
]
pytestmark = pytest.mark.skipif(
    ROOTS is None, reason="EDGESIGHT_ARM64 names no roots (.ci/arm64-roots makes them)"
)


def told(command: list[str], env: dict[str, str]) -> dict[str, Any]:
    done = subprocess.run(
        command, env=env, capture_output=True, text=True, timeout=GUARD_S, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


@functools.cache
def here() -> dict[str, Any]:
    return told([sys.executable, str(CHECKS)], dict(os.environ))


@functools.cache
def board(debian: str, python: str, core: str) -> dict[str, Any]:
    assert ROOTS is not None
    root = Path(ROOTS) / debian
    shutil.copy(CHECKS, root / "opt")
    emulator = [str(Path(ROOTS) / "qemu-aarch64"), "-cpu", core, "-L", str(root)]
    words = [str(root / f"usr/bin/python{python}"), str(root / "opt" / CHECKS.name)]
    env = {**os.environ, "PYTHONPATH": str(root / "opt" / "site"), "PYTHONNOUSERSITE": "1"}
    return told([*emulator, *words], env)


@pytest.mark.parametrize("which", BOARDS, ids=lambda w: f"{w[0]}-{w[2]}")
def test_the_wheel_sees_on_arm64_what_it_sees_here(which: tuple[str, str, str]) -> None:
    found, mine = board(*which), here()
    assert ROOTS is not None
    assert found["machine"] == "aarch64"
    assert found["python"].startswith(which[1])
    assert found["package"].startswith(ROOTS), "the built wheel, not this checkout"
    assert found["run"]["code"] == 0
    assert found["run"]["frames"] == 2
    # OpenCV resizes by other routines there (KleidiCV, here IPP): one grey level off, no more.
    for photo, values in mine["inputs"].items():
        assert np.abs(np.subtract(values, found["inputs"][photo])).max() <= 1.0 + 1e-6
    # The float network gives the same numbers for the same numbers.
    float_raw = np.subtract(mine["shipped-float raw"], found["shipped-float raw"])
    assert np.abs(float_raw).max() < 1e-3
    # INT8 rounds elsewhere: x86 runs signed convolutions in part as float.
    int8_raw = np.subtract(mine["shipped raw"], found["shipped raw"])
    scale = np.std(mine["shipped raw"])
    assert np.sqrt((int8_raw**2).mean()) < 0.1 * scale
    for name in ("shipped", "shipped-float"):
        for photo, boxes in mine[name].items():
            certain = [b for b in boxes if b[4] >= 0.4]
            assert certain
            for one in certain:
                same = [b for b in found[name][photo] if b[5] == one[5]]
                best = max(same, key=lambda b: iou(b, one))
                assert iou(best, one) >= 0.9
                assert abs(best[4] - one[4]) <= 0.05


def test_all_boards_see_the_same() -> None:
    first = board(*BOARDS[1])
    for which in BOARDS:
        found = board(*which)
        for name in ("shipped", "shipped-float"):
            for photo, boxes in first[name].items():
                np.testing.assert_allclose(found[name][photo], boxes, atol=0.01)


def iou(a: list[float], b: list[float]) -> float:
    wide = min(a[2], b[2]) - max(a[0], b[0])
    high = min(a[3], b[3]) - max(a[1], b[1])
    if wide <= 0 or high <= 0:
        return 0.0
    both = wide * high
    return both / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - both)
