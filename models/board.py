"""How the machine is: load, memory, temperature, clock, throttling; read from Linux's own files.

What a board does not tell is None. Sources: the kernel's documentation of ``/proc/stat``, sysfs
thermal zones and cpufreq; the Raspberry Pi's ``get_throttled`` bits (documentation of
``vcgencmd``); the Jetson's over-current counters (L4T Developer Guide, "Power Management").
"""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypedDict

PI_FLAGS = {
    0: "under-voltage",
    1: "clock capped",
    2: "throttled",
    3: "soft temperature limit",
}
"""Bit of the firmware's word -> what it says of now; 16 bits higher: since the start."""
PI_WORDS = (
    "sys/devices/platform/soc/soc:firmware/get_throttled",
    "sys/devices/platform/axi/soc:firmware/get_throttled",
)
CPU_ZONES = ("cpu", "soc", "x86_pkg", "pkg", "core", "tj", "thermal")
"""Names of thermal zones near the processor, the likeliest first."""
CPUFREQ = "sys/devices/system/cpu/cpu[0-9]*/cpufreq"
FRESH_S = 1.0
VCGENCMD_S = 5.0
"""A process each time: not too often."""


class BoardFigures(TypedDict):
    """How the machine is; JSON-ready."""

    cpu_percent: float | None
    """Of all cores together, since the reading before."""
    own_cpu_percent: float | None
    """Of one core, this process; above 100 with several threads."""
    memory_mb: float | None
    """Resident memory of this process."""
    memory_free_mb: float | None
    temperature_c: float | None
    clock_mhz: float | None
    """Of the fastest core now."""
    clock_max_mhz: float | None
    throttled: list[str]
    """What holds the board back now."""
    throttled_before: list[str]
    """What has, since it was started."""


UNKNOWN: BoardFigures = {
    "cpu_percent": None,
    "own_cpu_percent": None,
    "memory_mb": None,
    "memory_free_mb": None,
    "temperature_c": None,
    "clock_mhz": None,
    "clock_max_mhz": None,
    "throttled": [],
    "throttled_before": [],
}


@dataclass
class Board:
    """Reads the machine's state, at most once a second.

    Args:
        root: Where ``proc`` and ``sys`` are.
    """

    root: Path = Path("/")
    _read_s: float = field(default=-1e9, init=False)
    _last: BoardFigures | None = field(default=None, init=False)
    _cpu: tuple[int, int] | None = field(default=None, init=False)
    _own: tuple[float, float] | None = field(default=None, init=False)
    _zone: Path | None = field(default=None, init=False)
    _word: tuple[float, int | None] = field(default=(-1e9, None), init=False)
    _counts: dict[str, int] = field(default_factory=dict, init=False)

    def read(self, now_s: float | None = None) -> BoardFigures:
        """Returns the newest figures.

        Args:
            now_s: Monotonic time in seconds.
        """
        now = time.monotonic() if now_s is None else now_s
        if self._last is None or now - self._read_s >= FRESH_S:
            try:
                self._last = self._fresh(now)
            except OSError:  # no further file can be opened: what a folder lists is not known then
                self._last = self._last or UNKNOWN.copy()
            self._read_s = now
        return self._last

    def _fresh(self, now: float) -> BoardFigures:
        throttled, before = self._throttled(now)
        clocks = self._numbers(f"{CPUFREQ}/scaling_cur_freq")
        tops = self._numbers(f"{CPUFREQ}/cpuinfo_max_freq")
        return {
            "cpu_percent": self._cpu_percent(),
            "own_cpu_percent": self._own_percent(now),
            "memory_mb": self._memory_mb(),
            "memory_free_mb": self._memory_free_mb(),
            "temperature_c": self._temperature_c(),
            "clock_mhz": max(clocks) / 1e3 if clocks else None,
            "clock_max_mhz": max(tops) / 1e3 if tops else None,
            "throttled": throttled,
            "throttled_before": before,
        }

    def _text(self, path: str | Path) -> str | None:
        try:
            return (self.root / path).read_text(errors="replace").strip("\0\n ")
        except OSError:
            return None

    def _numbers(self, pattern: str) -> list[float]:
        found = []
        for path in sorted(self.root.glob(pattern)):
            try:
                found.append(float(self._text(path) or ""))
            except ValueError:
                continue
        return found

    def _cpu_percent(self) -> float | None:
        line = (self._text("proc/stat") or "").partition("\n")[0].split()
        try:
            values = [int(v) for v in line[1:9]]
            idle, total = values[3] + values[4], sum(values)
        except (ValueError, IndexError):
            return None
        before, self._cpu = self._cpu, (idle, total)
        if before is None or total <= before[1]:
            return None
        return round(100 * (1 - (idle - before[0]) / (total - before[1])), 1)

    def _own_percent(self, now: float) -> float | None:
        times = os.times()
        used = times.user + times.system
        before, self._own = self._own, (now, used)
        if before is None or now <= before[0]:
            return None
        return round(100 * (used - before[1]) / (now - before[0]), 1)

    def _memory_mb(self) -> float | None:
        try:
            pages = int((self._text("proc/self/statm") or "").split()[1])
        except (ValueError, IndexError):
            return None
        return round(pages * os.sysconf("SC_PAGE_SIZE") / 1e6, 1)

    def _memory_free_mb(self) -> float | None:
        for line in (self._text("proc/meminfo") or "").splitlines():
            name, _, value = line.partition(":")
            if name == "MemAvailable" and (words := value.split()) and words[0].isdecimal():
                return round(int(words[0]) * 1024 / 1e6)
        return None

    def _temperature_c(self) -> float | None:
        if self._zone is None:
            zones = []
            for path in self.root.glob("sys/class/thermal/thermal_zone*"):
                name = (self._text(path / "type") or "").lower()
                rank = next((i for i, word in enumerate(CPU_ZONES) if word in name), 99)
                zones.append((rank, str(path), path))
            if not zones:
                return None
            self._zone = min(zones)[2]
        try:
            return round(float(self._text(self._zone / "temp") or "") / 1000, 1)
        except ValueError:
            return None

    def _throttled(self, now: float) -> tuple[list[str], list[str]]:
        held, before = list[str](), list[str]()
        word = self._pi_word(now)
        if word is not None:
            held = [text for bit, text in PI_FLAGS.items() if word >> bit & 1]
            before = [text for bit, text in PI_FLAGS.items() if word >> (bit + 16) & 1]
        for pattern, text in (
            ("sys/class/hwmon/hwmon*/oc*_event_cnt", "over-current"),
            ("sys/devices/system/cpu/cpu0/thermal_throttle/package_throttle_count", "throttled"),
        ):
            for path in self.root.glob(pattern):
                count = self._numbers(str(path.relative_to(self.root)))
                if not count:
                    continue
                last = self._counts.get(str(path), int(count[0]))
                self._counts[str(path)] = int(count[0])
                if count[0] > last and text not in held:
                    held.append(text)
                if count[0] and text not in before:
                    before.append(text)
        return held, before

    def _pi_word(self, now: float) -> int | None:
        for place in PI_WORDS:
            if (text := self._text(place)) is not None:
                return _hexadecimal(text)
        if now - self._word[0] >= VCGENCMD_S:
            self._word = now, self._vcgencmd()
        return self._word[1]

    def _vcgencmd(self) -> int | None:
        tool = shutil.which("vcgencmd") if self.root == Path("/") else None
        own = self.root / "usr/bin/vcgencmd"
        tool = tool or (str(own) if self.root != Path("/") and own.exists() else None)
        if tool is None:
            return None
        try:
            done = subprocess.run(
                [tool, "get_throttled"], capture_output=True, text=True, timeout=2, check=False
            )
        except (OSError, subprocess.TimeoutExpired):
            return None
        return _hexadecimal(done.stdout.partition("=")[2])


def _hexadecimal(text: str) -> int | None:
    try:
        return int(text.strip(), 16)
    except ValueError:
        return None
