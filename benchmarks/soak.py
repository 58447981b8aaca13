"""Runs the real command with everything on for a long time, and sees whether it stays as it was.

    pip install -e '.[dev]' && apt-get install mosquitto
    python benchmarks/soak.py --minutes 2                 # what CI runs: some 2.5 minutes
    python benchmarks/soak.py --minutes 120 --swap-every 60 --out soak.json --plot soak.png

``edgesight run`` reads a looped 640x480 video as fast as the network can, with the page, a viewer
at 15 pictures a second, /metrics every second, MQTT (where mosquitto is), two zones, the log of
events, agreement with the reference, a recording of 10 s each minute, and, if asked to, another
model every so many seconds (20 or more). It is looked at from outside each second, until --minutes
or --frames are over or Ctrl-C ends it. Exit code 1 unless

- frames and the viewer's pictures never pause for more than 5 s;
- resident memory grows by less than 1 MB (10^6 bytes) an hour over the second half: least squares
  over blocks' medians, with a 95 % interval widened for what neighbouring blocks have in common.
  In less than an hour that interval is wider than the limit; then only a growth fails of which
  even the lower end is above it (below 10 minutes, of which all is warm-up: above 60 MB), and
  the table says so. Below 2 minutes the growth is only told;
- open files and threads: after a warm-up, the last quarter's median is the first's, each while
  the first model runs and nothing is recorded or changed;
- every part really worked, and SIGTERM ends the run with exit code 0 and a summary.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import astuple, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from latency import FPS, SIZE_WH, App, Check, Viewer, footage, shown

GAP_MAX_S, VIEWER_FPS = 5.0, 15
GROWTH_MAX_MB, WARMING_MAX_MB, WARMING_S = 1.0, 60.0, 600.0  # in an hour; in runs so short
YOUNG_S, LONG_S = 120.0, 3600.0
"""Below the first all is warm-up; below the second such a growth cannot be told from chance."""
WARM_UP_SHARE, WARM_UP_MAX_S = 0.2, 300.0
"""Of a run: buffers, pools of threads and plots fill up."""
BLOCK_S = 60.0
"""Samples are taken together so: a minute has exactly one recording in it."""
RECORD_FROM_S, RECORD_S = 20.0, 10.0  # of each minute
OTHER = "shipped-float"  # what the model changes to, and back
DROPPED, RATE = "dropped_frames_total", 'frames_per_second{stage="inference"}'
LATENCY = 'latency_seconds{quantile="0.99"}'
BAR = "{percentage:3.0f}%|{bar:30}| {elapsed}, {remaining} left{postfix}"
COMMON_MAX = 0.9
"""Correlation of neighbouring blocks at most: more cannot be told from a growth."""
BLOCKS_MIN = 12
"""A short run has at least so many blocks in its second half, however short they are."""


@dataclass(frozen=True)
class Sample:
    """What one look from outside saw; None where /metrics did not answer. MB are 10^6 bytes."""

    at_s: float  # since the first look
    rss_mb: float
    anonymous_mb: float  # the part of it that is no file
    files: int
    threads: int
    frames: int | None
    dropped: int | None
    fps: float | None
    latency_p99_ms: float | None
    resting: bool  # the first model runs, and nothing is recorded or changed
    pictures_gap_s: float  # longest time without a new picture since the look before


@dataclass(frozen=True)
class Slope:
    """Growth per hour, and its 95 % interval; infinite where there is too little to tell."""

    per_hour: float
    low: float
    high: float

    def __str__(self) -> str:
        """Returns it for people."""
        return f"{self.per_hour:+.2f} ({self.low:+.2f} to {self.high:+.2f})"


def slope(
    times_s: Sequence[float], values: Sequence[float], block_s: float, *, steps: bool = False
) -> Slope:
    """Returns the growth of a series per hour.

    Args:
        times_s: Rising.
        values: As many.
        block_s: Samples of so many seconds are one: their median.
        steps: Whether it may stay where chance has taken it, as memory does while a process warms
            up; then the interval is that of the mean step between blocks, if that is wider.
    """
    at, seen = np.asarray(times_s, float), np.asarray(values, float)
    number = ((at - at[:1]) // block_s).astype(int)
    blocks = [number == i for i in np.unique(number)]
    if len(blocks) > 4 and blocks[-1].sum() < blocks[0].sum() / 2:
        blocks.pop()  # cut off by the end
    n = len(blocks)
    if n < 4:
        return Slope(math.nan, -math.inf, math.inf)
    t = np.array([at[block].mean() for block in blocks]) / 3600
    v = np.array([np.median(seen[block]) for block in blocks])
    t, v = t - t.mean(), v - v.mean()
    middle = float(t @ v / (t @ t))
    rest = v - middle * t
    power = float(rest @ rest)
    # What neighbours have in common makes fewer of them; a short series shows less than there is.
    common = float(rest[1:] @ rest[:-1]) / power if power > 1e-12 else 0.0
    common = min(COMMON_MAX, max(0.0, common + (1 + 4 * common) / n))
    error = math.sqrt(power / (n - 2) / float(t @ t) * (1 + common) / (1 - common))
    free = n - 2
    student = 1.96 + 2.372 / free + 2.823 / free**2 + 2.556 / free**3  # 97.5 %, within 2 %
    if steps:
        step = float(np.diff(v).std(ddof=1)) / float(np.diff(t).mean())
        error = max(error, step / math.sqrt(n - 1))
    return Slope(middle, middle - student * error, middle + student * error)


def grows(found: Slope, limit: float, *, long: bool) -> bool:
    """Whether a growth is too much.

    Args:
        found: The growth.
        limit: What is allowed, per hour.
        long: Whether the run was long enough to hold the estimate itself against the limit;
            otherwise the lower end of the interval is.
    """
    return not (found.per_hour < limit) if long else found.low > limit


def frames_gap_s(samples: Sequence[Sample]) -> float:
    """Returns the longest time in which no new frame was seen, up to the end of the series."""
    longest, newest, last_s = 0.0, -1, 0.0
    for sample in samples:
        if sample.frames is not None and sample.frames > newest:
            longest = max(longest, sample.at_s - last_s)
            newest, last_s = sample.frames, sample.at_s
    return max(longest, samples[-1].at_s - last_s) if samples else math.inf


def _level(samples: Sequence[Sample], key: str) -> tuple[float, float]:
    """Returns the medians of the first and the last quarter after the warm-up, at rest.

    A recording has a file and a thread more, a model that is its own reference a thread less.
    """
    warm_s = min(WARM_UP_MAX_S, WARM_UP_SHARE * samples[-1].at_s)
    values = [getattr(s, key) for s in samples if s.at_s >= warm_s and s.resting]
    values = values or [math.nan]  # which equals nothing
    quarter = max(1, len(values) // 4)
    return float(np.median(values[:quarter])), float(np.median(values[-quarter:]))


def judge(samples: Sequence[Sample]) -> list[Check]:
    """Returns what a series of looks says, one line for each property."""
    if len(samples) < 16:
        return [Check("long enough", False, f"{len(samples)} looks", "16, one a second")]
    lasted_s = samples[-1].at_s
    pauses = {"frames": frames_gap_s(samples), "viewer": max(s.pictures_gap_s for s in samples)}
    checks = [
        Check(f"no hang: {what}", s <= GAP_MAX_S, f"longest pause {s:.2f} s", f"{GAP_MAX_S:g} s")
        for what, s in pauses.items()
    ]
    half = [s for s in samples if s.at_s >= lasted_s / 2]
    block_s, long = min(BLOCK_S, lasted_s / 2 / BLOCKS_MIN), lasted_s >= LONG_S
    growth = slope([s.at_s for s in half], [s.rss_mb for s in half], block_s, steps=not long)
    why = "" if long else f"; short: below {LONG_S / 60:g} min the lower end counts"
    why = "; only told" if lasted_s < YOUNG_S else why
    most = GROWTH_MAX_MB if lasted_s >= WARMING_S else WARMING_MAX_MB
    passed = lasted_s < YOUNG_S or not grows(growth, most, long=long)
    checks.append(Check("memory, MB/hour", passed, str(growth), f"under {most:g}{why}"))
    for key in ("files", "threads"):
        first, last = _level(samples, key)
        found = f"{first:g} at first, {last:g} at last"
        checks.append(Check(f"open {key}", first == last, found, "equal"))
    return checks


class Soaked(App):
    """The command with everything on.

    Args:
        folder: For all files.
        model: That runs first.
        url: Of the broker; None: there is none.
        swap_every_s: Seconds between two changes of the model; None: never.
    """

    def __init__(
        self, folder: Path, model: str, url: str | None, swap_every_s: float | None
    ) -> None:
        """Draws the video and starts."""
        import cv2
        from edgesight.models.zoo import model_path

        first, other = model_path(model), model_path(OTHER)
        self._names = (f"other-{other.name}", first.name)
        (folder / "models").mkdir()
        shutil.copy(other, folder / "models" / self._names[0])
        codec = cv2.VideoWriter.fourcc(*"mp4v")
        writer = cv2.VideoWriter(str(folder / "video.mp4"), codec, FPS, SIZE_WH)
        for picture in footage(300):
            writer.write(picture)
        writer.release()
        mqtt = () if url is None else ("--mqtt", url, "--name", "soak")
        words = (
            "--model", str(first), "--source", "video.mp4", "--loop", "--speed", "max",
            "--zone", "left: 0,0 0.5,0 0.5,1 0,1", "--zone", "door[person]: 0.3,0 0.9,0 0.9,1",
            "--events", "events.jsonl", "--recordings", "recordings",
            "--models", "models", "--model-gate", "0",
        )  # fmt: skip
        super().__init__(folder, (*words, *mqtt))
        self._events, self._mqtt = folder / "events.jsonl", url is not None
        self._every_s = self._due_s = swap_every_s or math.inf
        self._recording, self._recordings, self._swaps = False, 0, 0
        self._troubles: dict[str, int] = {}
        self._seen: dict[str, float] = {}
        self._judged = 0.0

    def begin(self) -> None:
        """Waits for its first frames, and lets it make all threads that answer requests."""
        self.ready()
        asking = [threading.Thread(target=self.ask, args=("/api/models",)) for _ in range(24)]
        for one in asking:
            one.start()
        for one in asking:
            one.join()
        self.viewer = Viewer(self.port, VIEWER_FPS)
        self.began_s = time.monotonic()

    def look(self) -> Sample | None:
        """Presses the buttons that are due, and looks; None if the process is gone."""
        self._press(time.monotonic() - self.began_s)
        state = (self.ask("/api/models") or {}) if self._swaps else {"current": self._names[1]}
        first = state.get("current") == self._names[1] and not state.get("busy")
        there = Path(f"/proc/{self.process.pid}")
        try:
            lines = (there / "smaps_rollup").read_text().splitlines()[1:]
            mb = {line.split(":")[0]: int(line.split()[1]) * 1.024e-3 for line in lines}
            files, threads = (len(list((there / what).iterdir())) for what in ("fd", "task"))
        except (OSError, IndexError):
            return None
        m = self.metrics()
        self._seen = m or self._seen
        judged = sum(n for key, n in m.items() if key.startswith("accuracy_frames"))
        self._judged = max(self._judged, judged)  # another model begins anew
        frames, dropped, late_s = map(m.get, ("frames_total", DROPPED, LATENCY))
        return Sample(
            time.monotonic() - self.began_s, mb["Rss"], mb["Anonymous"], files, threads,
            None if frames is None else int(frames), None if dropped is None else int(dropped),
            m.get(RATE), None if late_s is None else 1e3 * late_s,
            first and not self._recording, self.viewer.longest_s(),
        )  # fmt: skip

    def _press(self, at_s: float) -> None:
        record = RECORD_FROM_S <= at_s % 60 < RECORD_FROM_S + RECORD_S
        if record != self._recording:
            self._recording = record
            self._must("recordings", self.ask("/api/recording", "POST", {"on": record}))
            if not record:
                self._clear()
        if at_s >= self._due_s:
            self._due_s = at_s + self._every_s
            if self._swaps:  # the one before has had its time
                state = self.ask("/api/models") or {}
                right = state.get("current") == self._names[(self._swaps - 1) % 2]
                self._must("model changes", right and not state["busy"] and not state["error"])
            name = self._names[self._swaps % 2]
            self._must("model changes", self.ask("/api/model", "POST", {"name": name}))
            self._swaps += 1

    def _clear(self) -> None:
        """Counts the finished recordings and removes them: hours of them would fill the disk."""
        for one in (self.ask("/api/recordings") or {"recordings": ()})["recordings"]:
            self._recordings += one["bytes"] > 0
            self.ask(f"/api/recordings/{one['name']}", "DELETE")

    def _must(self, what: str, done: Any) -> None:
        self._troubles[what] = self._troubles.get(what, 0) + (not done)

    def parts(self) -> list[Check]:
        """Returns whether everything that was on really worked."""
        text = self._events.read_text() if self._events.exists() else ""
        rows = {"agreement": self._judged, "log of events": text.count("\n")}
        if self._mqtt:
            rows["MQTT"] = self._seen.get("mqtt_up", 0)
        if "recordings" in self._troubles and not self._recording:
            rows["recordings"] = self._recordings
        if self._every_s < math.inf:
            rows["model changes"] = self._swaps
        checks = [Check(name, n > 0, f"{n:g}", "1 or more") for name, n in rows.items()]
        bad = {f"{name} failed": n for name, n in self._troubles.items()}
        bad["warnings at the end"] = int(self._seen.get("warnings", 0))
        return [*checks, *(Check(name, n == 0, f"{n}", "none") for name, n in bad.items())]


def watch(args: argparse.Namespace) -> tuple[list[Sample], list[Check], bool]:
    """Runs the command and looks at it.

    Returns:
        What was seen, how its parts and its end were, and whether there was a broker.
    """
    from pipeline import broker
    from tqdm import tqdm

    samples: list[Sample] = []
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="edgesight-soak-")))
        url = stack.enter_context(broker())
        app = Soaked(folder, args.model, url, args.swap_every)
        stack.callback(app.close)
        bar = stack.enter_context(tqdm(total=100.0, bar_format=BAR))
        try:
            app.begin()
            while (sample := app.look()) is not None:
                samples.append(sample)
                frames = sample.frames or 0
                done = max(sample.at_s / 60 / args.minutes, frames / (args.frames or math.inf))
                bar.set_postfix_str(f"{frames} frames, {sample.rss_mb:.0f} MB", refresh=False)
                bar.update(min(100.0, 100 * done) - bar.n)
                if done >= 1:
                    break
                time.sleep(1 - (time.monotonic() - app.began_s) % 1)
        except KeyboardInterrupt:
            bar.write("Ctrl-C: this is about the time until then")
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)  # the end takes seconds, and is to be seen
        return samples, [*app.parts(), app.end()[0]], url is not None


def plot(samples: Sequence[Sample], file: Path) -> None:
    """Draws what was seen over time."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    rows = {
        "resident MB": ("rss_mb", "anonymous_mb"),
        "open": ("files", "threads"),
        "frames/s": ("fps",),
        "latency p99, ms": ("latency_p99_ms",),
    }
    figure, axes = pyplot.subplots(len(rows), sharex=True, figsize=(9, 9))
    for axis, (label, keys) in zip(axes, rows.items(), strict=True):
        for key in keys:
            values = [math.nan if (v := getattr(s, key)) is None else v for s in samples]
            axis.plot([s.at_s / 60 for s in samples], values, label=key, lw=1)
        axis.set(ylabel=label, xlabel="minutes")
        axis.legend(loc="upper left", fontsize=8)
    figure.savefig(file, dpi=110, bbox_inches="tight")


def main() -> int:
    """Prints a table; returns 1 if something of it failed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=2.0)
    parser.add_argument("--frames", type=int, help="ends after so many, if that comes first")
    parser.add_argument("--model", default="shipped")
    parser.add_argument("--swap-every", type=float, metavar="S", help="seconds; default: never")
    parser.add_argument("--out", type=Path, help="JSON with every look")
    parser.add_argument("--plot", type=Path, help="picture of it; needs matplotlib")
    args = parser.parse_args()
    if not 0 < args.minutes < math.inf or (args.frames or 1) < 1 or (args.swap_every or 1) <= 0:
        parser.error("expected --minutes, --frames and --swap-every above 0; give other numbers")
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # CI that gives up: judged, too
    samples, others, mqtt = watch(args)
    checks = [*judge(samples), *others]
    print(shown(checks))
    from edgesight.models.machine import machine

    result = {
        "checks": [check._asdict() for check in checks],
        "mqtt": mqtt,
        "machine": machine(),
        "columns": [field.name for field in fields(Sample)],
        "samples": [astuple(sample) for sample in samples],
    }
    if args.out:
        args.out.write_text(json.dumps(result) + "\n")
    if args.plot:
        plot(samples, args.plot)
    return int(not all(check.passed for check in checks))


if __name__ == "__main__":
    sys.exit(main())
