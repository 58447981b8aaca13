"""The doctor on the board: power, heat, memory, disk, clock, and a Jetson's power mode."""

from __future__ import annotations

import os
import re
import shlex
import shutil
from pathlib import Path
from typing import Final

from ..models.board import CPU_ZONES, Board
from .finding import Finding, Probe, Severity

HOT_C: Final = 80.0
"""Where a Raspberry Pi slows down, and what is taken where a board names no limit of its own."""
NEAR_C: Final = 5.0
MEMORY_MIN_MB: Final = 200
"""A run with its page takes 135 MB, with a reference model 154 (README)."""
SWAPLESS_MB: Final = 1100
"""A board with less memory than this can do with swap."""
DISK_MIN_MB: Final = 500
"""An installation takes 350 MB, and a second version lies beside it while it is tried."""
DISK_ERROR_MB: Final = 50
DAY_S: Final = 86400.0
POWER: Final = "sudo poweroff   # then take the board's own supply: 5.1 V, 3 A (Pi 4) or 5 A (Pi 5)"
CMDLINES: Final = ("boot/firmware/cmdline.txt", "boot/cmdline.txt")


def examine_board(probe: Probe, *, disk_min_mb: float = DISK_MIN_MB) -> list[Finding]:
    """Returns what there is to say of the machine around the processor.

    Args:
        probe: The machine.
        disk_min_mb: Megabytes that must be free.
    """
    figures = Board(probe.root).read()
    held, before = set(figures["throttled"]), set(figures["throttled_before"])
    held |= _low_voltage(probe)
    found = [
        *_power(held, before),
        _temperature(probe, figures["temperature_c"]),
        *_memory(probe, figures["memory_free_mb"]),
        _cgroup(probe),
        *_disks(probe, disk_min_mb),
        _clock(probe),
        _power_mode(probe),
    ]
    return [finding for finding in found if finding is not None]


def _low_voltage(probe: Probe) -> set[str]:
    """Returns what the Raspberry Pi's voltage sensor says, where the firmware is not asked."""
    for name in probe.glob("sys/class/hwmon/hwmon*/name"):
        if probe.text(name) == "rpi_volt" and probe.text(name.with_name("in0_lcrit_alarm")) == "1":
            return {"under-voltage"}
    return set()


def _power(held: set[str], before: set[str]) -> list[Finding]:
    found = list[Finding]()
    slower = "the clock is lowered: fewer frames per second, and no figure measured now is a result"
    weak = {"under-voltage", "over-current"}
    for words, now in ((held, True), (before - held, False)):
        when = "now" if now else "since the start"
        if low := sorted(words & weak):
            why = "the supply or its cable is too weak: slower clock, and files get damaged"
            severity: Severity = "error" if now else "warning"
            found.append(Finding("power", severity, f"{', '.join(low)} {when}", why, POWER))
        if hot := sorted(words - weak):
            mend = "watch -n 2 vcgencmd measure_temp   # with a heat sink and a fan"
            why = slower if now else "it got too hot or had too little power under load"
            found.append(Finding("throttling", "warning", f"{', '.join(hot)} {when}", why, mend))
    return found or [Finding("power", "ok", "no throttling or under-voltage reported")]


def _temperature(probe: Probe, now_c: float | None) -> Finding | None:
    if now_c is None:
        return None
    limit = _limit_c(probe)
    found = f"{now_c:.0f} C, limit {limit:.0f} C"
    if now_c < limit - NEAR_C:
        return Finding("temperature", "ok", found)
    why = "at its limit the board lowers its clock"
    mend = "watch -n 2 'cat /sys/class/thermal/thermal_zone*/temp'   # with a heat sink and a fan"
    return Finding("temperature", "warning", found, why, mend)


def _limit_c(probe: Probe) -> float:
    """Returns where the zone near the processor begins to slow it down."""
    limits = []
    for kind in probe.glob("sys/class/thermal/thermal_zone*/trip_point_*_type"):
        zone = (probe.text(kind.with_name("type")) or "").lower()
        if not any(word in zone for word in CPU_ZONES):
            continue
        if probe.text(kind) not in ("passive", "hot", "critical"):
            continue
        try:
            limit = int(probe.text(kind.with_name(kind.name[:-4] + "temp")) or "") / 1000
        except ValueError:
            continue
        if limit > 50:  # lower ones start fans
            limits.append(limit)
    return min([HOT_C, *limits]) if probe.is_pi else min(limits, default=HOT_C)


def _memory(probe: Probe, free_mb: float | None) -> list[Finding]:
    sizes = {}
    for line in (probe.text("proc/meminfo") or "").splitlines():
        name, _, value = line.partition(":")
        if (words := value.split()) and words[0].isdecimal():
            sizes[name] = int(words[0]) * 1024 / 1e6
    total, swap = sizes.get("MemTotal"), sizes.get("SwapTotal", 0.0)
    if free_mb is None or total is None:
        return []
    text = f"{free_mb:.0f} of {total:.0f} MB free"
    found = [Finding("memory", "ok", text)]
    if free_mb < MEMORY_MIN_MB:
        why = f"a run takes 135 to 154 MB; below {MEMORY_MIN_MB} MB the kernel may end it"
        mend = "ps -eo rss,pid,comm --sort=-rss | head   # and stop what is not needed"
        found = [Finding("memory", "warning", text, why, mend)]
    if swap < 1 and total < SWAPLESS_MB:
        why = "an installation needs more memory than a run; without swap the kernel ends it"
        mend = (
            "sudo fallocate -l 1G /swapfile && sudo chmod 600 /swapfile && sudo mkswap /swapfile "
            "&& sudo swapon /swapfile"
        )
        found.append(Finding("swap", "warning", f"none, with {total:.0f} MB of memory", why, mend))
    return found


def _cgroup(probe: Probe) -> Finding | None:
    """Whether a service's limit on memory would be kept."""
    controllers = probe.text("sys/fs/cgroup/cgroup.controllers")
    if controllers is not None:
        enabled = "memory" in controllers.split()
    else:
        lines = (probe.text("proc/cgroups") or "").splitlines()
        known = {words[0]: words[-1] for line in lines if (words := line.split())}
        if not known:
            return None
        enabled = known.get("memory") == "1"
    if enabled:
        return None
    line = next((p for p in CMDLINES if (probe.root / p).exists()), CMDLINES[0])
    why = "the kernel was started without: a service's MemoryMax does nothing"
    mend = (
        f"sudo sed -i '1s/$/ cgroup_enable=memory cgroup_memory=1/' {probe.root / line} "
        "&& sudo reboot"
    )
    return Finding("memory limits", "note", "not kept (cgroup memory is off)", why, mend)


def _disks(probe: Probe, least_mb: float) -> list[Finding]:
    """Looks at where edgesight is installed, at the home and at temporary files."""
    home = probe.environ.get("HOME", "/")
    installed = str(probe.facts.get("prefix", home))
    places = {"installation": installed, "home": home, "temporary": _temporary(probe)}
    found, seen = list[Finding](), dict[str, str]()
    for use, place in places.items():
        mount, kind, options = _mount(probe, place)
        if mount in seen:
            continue
        seen[mount] = use
        if "ro" in options:
            why = "nothing can be written there; Linux does this to a card that is wearing out"
            mend = f"sudo dmesg | grep -iE 'mmc|ext4|error'; sudo mount -o remount,rw {_q(mount)}"
            found.append(Finding(f"disk {mount}", "error", "read-only", why, mend))
            continue
        if kind == "overlay" and mount == "/" and probe.is_pi:
            why = "what is written is lost on the next start (raspi-config's overlay)"
            mend = "sudo raspi-config nonint do_overlayfs 1 && sudo reboot"
            found.append(Finding(f"disk {mount}", "warning", "overlay", why, mend))
        found.append(_space(place, mount, use, least_mb))
    return found


def _space(place: str, mount: str, use: str, least_mb: float) -> Finding:
    name = f"disk {mount}"
    there = next((p for p in (Path(place), *Path(place).parents) if p.exists()), Path("/"))
    try:
        free_mb = shutil.disk_usage(there).free / 1e6
        entries = os.statvfs(there)
    except OSError as error:
        why = "it cannot be looked at"
        return Finding(name, "warning", str(error.strerror), why, f"df -h {_q(str(there))}")
    mend = "sudo apt clean && sudo journalctl --vacuum-size=50M; sudo du -xh / | sort -h | tail -20"
    if entries.f_files and not entries.f_favail:
        why = "no further file can be made, whatever space there is"
        return Finding(name, "error", "no inode free", why, mend)
    found = f"{free_mb:.0f} MB free ({use})"
    if free_mb >= (least_mb if use == "installation" else min(least_mb, 2 * DISK_ERROR_MB)):
        return Finding(name, "ok", found)
    why = f"an installation takes 350 MB and its next version lies beside it: {least_mb:.0f} wanted"
    severity: Severity = "error" if free_mb < DISK_ERROR_MB else "warning"
    return Finding(name, severity, found, why, mend)


def _temporary(probe: Probe) -> str:
    return probe.environ.get("TMPDIR") or "/tmp"


def _mount(probe: Probe, place: str) -> tuple[str, str, list[str]]:
    """Returns where the file system of a place is mounted, its kind and its options."""
    best = ("/", "", list[str]())
    for line in (probe.text("proc/mounts") or "").splitlines():
        words = line.split()
        if len(words) < 4:
            continue
        mount = re.sub(r"\\(\d{3})", lambda m: chr(int(m[1], 8)), words[1])
        inside = place == mount or place.startswith(mount.rstrip("/") + "/")
        if inside and len(mount) >= len(best[0]):  # the last one mounted there hides the others
            best = (mount, words[2], words[3].split(","))
    return best


def _clock(probe: Probe) -> Finding | None:
    """Whether the time can be believed: certificates, logs and reports need it."""
    known = [
        path.stat().st_mtime
        for name in ("var/lib/dpkg/status", "var/lib/systemd/timesync/clock", "etc/machine-id")
        if (path := probe.root / name).exists()
    ]
    why = "downloads fail (certificates are not valid yet), times in logs and events are wrong"
    mend = "sudo timedatectl set-ntp true && timedatectl timesync-status   # wants network"
    if known and probe.now_s < max(known) - DAY_S:
        days = (max(known) - probe.now_s) / DAY_S
        return Finding(
            "clock", "error", f"{days:.0f} days older than this system's files", why, mend
        )
    tool = probe.tool("timedatectl")
    if tool is None:
        return None
    ran = probe.run(tool, "show", "--property=NTPSynchronized", "--value")
    if ran.code != 0:
        return None
    if ran.out.strip() == "no":
        return Finding("clock", "warning", "not synchronised", why, mend)
    return Finding("clock", "ok", "synchronised")


def _power_mode(probe: Probe) -> Finding | None:
    """What a Jetson may use: its mode, and whether its clocks follow the load."""
    tool = probe.tool("nvpmodel") if probe.is_jetson else None
    if tool is None:
        return None
    ran = probe.run(tool, "-q")
    mode = re.search(r"NV Power Mode:\s*(\S+)", ran.out)
    if mode is None:
        mend = "sudo nvpmodel -q"
        return Finding("power mode", "note", f"nvpmodel {ran.how}", "the mode is unknown", mend)
    if not mode[1].upper().startswith("MAXN"):
        why = "this mode switches cores off and lowers clocks; 0 is the fastest on most Jetsons"
        mend = "sudo nvpmodel -m 0 && sudo jetson_clocks"
        return Finding("power mode", "warning", mode[1], why, mend)
    folder = "sys/devices/system/cpu/cpu0/cpufreq"
    low, top = (probe.text(f"{folder}/scaling_{end}_freq") for end in ("min", "max"))
    if low != top:
        why = "the clocks follow the load, and times scatter while they do"
        return Finding(
            "power mode", "note", f"{mode[1]}, clocks not fixed", why, "sudo jetson_clocks"
        )
    return Finding("power mode", "ok", f"{mode[1]}, clocks fixed")


def _q(text: str) -> str:
    return shlex.quote(text)
