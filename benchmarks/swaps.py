"""Hot-swaps one after another: how long no frame comes out, and what is left behind.

    python benchmarks/swaps.py --swaps 1000

Changes between two models (by default the shipped detector and the one that --other names) while a
camera of 30 pictures a second runs, the way the live page does it: the file is tried, loaded and
warmed up beside the running one. The gap is the longest time between two frames that came out,
around each swap. Exit code 1 if a swap failed, a gap is 1 s or longer, or memory or files grow.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
from edgesight.device_app.accuracy import NoAccuracy
from edgesight.device_app.command import SWITCH_INTERVAL_S
from edgesight.device_app.loop import Loop
from edgesight.device_app.model_choice import ModelChoice
from edgesight.device_app.model_store import ModelStore
from edgesight.device_app.sinks import MemorySink, Seen
from edgesight.device_app.sources import ListSource
from edgesight.device_app.sources_photos import SAMPLES
from edgesight.models.dataset import load_image
from edgesight.models.detector import OnnxDetector
from edgesight.models.machine import machine
from edgesight.models.memory import few_heaps, give_back
from edgesight.models.zoo import model_path

GAP_MAX_S = 1.0
GROWTH_MAX_MB = 5.0
"""Over the second half of the swaps; the first warms up."""


class Gaps(MemorySink):
    """Notes when frames came out, and nothing else."""

    def __init__(self) -> None:
        """Starts now."""
        super().__init__()
        self.last_s = time.monotonic()
        self.longest_s = 0.0

    def write(self, seen: Seen) -> None:
        """Looks at the clock."""
        now = time.monotonic()
        self.longest_s = max(self.longest_s, now - self.last_s)
        self.last_s = now


def resident_mb() -> float:
    """Returns the memory that this process has in RAM."""
    give_back()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def main() -> int:
    """Prints one JSON object."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--model", default="shipped")
    parser.add_argument("--other", default="shipped-float", help="of another architecture")
    parser.add_argument("--swaps", type=int, default=1000)
    args = parser.parse_args()
    from tqdm import tqdm

    sys.setswitchinterval(SWITCH_INTERVAL_S)
    few_heaps()
    with tempfile.TemporaryDirectory() as folder:
        first = model_path(args.model)
        other = Path(folder) / f"other-{model_path(args.other).name}"
        shutil.copy(model_path(args.other), other)
        images = [load_image(path) for path in sorted(SAMPLES.glob("*.jpg"))]
        source = ListSource(images, fps=30, live=True, paced=True, loop=True)
        gaps = Gaps()
        loop = Loop(source, OnnxDetector(first), sinks=[gaps], track=True)
        choice = ModelChoice(
            loop,
            ModelStore(first, Path(folder), uploads=False),
            OnnxDetector,
            lambda _: NoAccuracy("a benchmark"),
            score=0.35,
            gate_percent=0,
        )
        loop.start()
        found: dict[str, list[float]] = {"gap_s": [], "mb": [], "files": [], "threads": []}
        failed: list[str] = []
        for turn in tqdm(range(args.swaps), desc="swaps"):
            gaps.longest_s = 0.0
            choice.choose(other.name if turn % 2 == 0 else first.name)
            while not choice.wait(60):
                pass
            error = choice.state()["error"]
            if error:
                failed.append(error)
            found["gap_s"].append(gaps.longest_s)
            found["mb"].append(resident_mb())
            found["files"].append(len(list(Path("/proc/self/fd").iterdir())))
            found["threads"].append(threading.active_count())
        loop.stop()
        source.close()
        loop.finish()
    half = args.swaps // 2
    slope = float(np.polyfit(np.arange(args.swaps - half), found["mb"][half:], 1)[0])
    growth_mb = slope * (args.swaps - half)
    result: dict[str, Any] = {
        "models": [first.name, other.name],
        "swaps": args.swaps,
        "failed": failed,
        "gap_s": {"median": statistics.median(found["gap_s"]), "max": max(found["gap_s"])},
        "resident_mb": {"at_half": found["mb"][half], "end": found["mb"][-1]},
        "growth_mb_second_half": growth_mb,
        "files": {"at_half": found["files"][half], "end": found["files"][-1]},
        "threads": {"at_half": found["threads"][half], "end": found["threads"][-1]},
        "machine": machine(),
    }
    print(json.dumps(result, indent=2))
    leaks = growth_mb > GROWTH_MAX_MB or found["files"][-1] > found["files"][half]
    return int(bool(failed) or max(found["gap_s"]) >= GAP_MAX_S or leaks)


if __name__ == "__main__":
    sys.exit(main())
