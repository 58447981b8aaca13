"""The doctor on power, heat, memory, disk, clock and Jetsons, each finding provoked."""

from __future__ import annotations

import os
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
from edgesight.deploy.doctor_board import examine_board
from edgesight.deploy.finding import Finding, Probe

WORD = "sys/devices/platform/soc/soc:firmware/get_throttled"
ZONE = "sys/class/thermal/thermal_zone0"
MODEL = "proc/device-tree/model"
GOOD = {
    MODEL: "Raspberry Pi 4 Model B Rev 1.4\0",
    WORD: "0\n",
    f"{ZONE}/type": "cpu-thermal\n",
    f"{ZONE}/temp": "50000\n",
    "proc/meminfo": "MemTotal: 4000000 kB\nMemAvailable: 2000000 kB\nSwapTotal: 100000 kB\n",
    "sys/fs/cgroup/cgroup.controllers": "cpuset cpu io memory pids\n",
    "proc/mounts": "/dev/root / ext4 rw,noatime 0 0\n",
}


def probe_of(root: Path, files: dict[str, str], **others: Any) -> Probe:
    for name, text in {**GOOD, **files}.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        if path.parent.name in ("bin", "sbin"):
            path.chmod(0o755)
    return Probe(root, **{"environ": {"PATH": "", "HOME": "/", "TMPDIR": "/"}, **others})


def named(probe: Probe, name: str, **options: Any) -> Finding:
    return next(found for found in examine_board(probe, **options) if found.name == name)


def test_a_good_board(tmp_path: Path) -> None:
    found = examine_board(probe_of(tmp_path, {}), disk_min_mb=1)
    assert {finding.severity for finding in found} == {"ok"}
    assert [f.name for f in found] == ["power", "temperature", "memory", "disk /"]


@pytest.mark.parametrize(
    ("word", "name", "severity", "found"),
    [
        ("0x1", "power", "error", "under-voltage now"),
        ("0x10000", "power", "warning", "under-voltage since the start"),
        ("0x4", "throttling", "warning", "throttled now"),
        ("0x80000", "throttling", "warning", "soft temperature limit since the start"),
    ],
)
def test_the_firmwares_word(
    tmp_path: Path, word: str, name: str, severity: str, found: str
) -> None:
    finding = named(probe_of(tmp_path, {WORD: word}), name)
    assert (finding.severity, finding.found) == (severity, found)
    assert ("supply" in finding.mend) == (name == "power")
    assert finding.why


def test_vcgencmd_where_the_kernel_is_silent(tmp_path: Path) -> None:
    probe = probe_of(tmp_path, {"usr/bin/vcgencmd": "#!/bin/sh\necho throttled=0x50005\n"})
    (tmp_path / WORD).unlink()
    found = [f.found for f in examine_board(probe) if f.name in ("power", "throttling")]
    assert found == ["under-voltage now", "throttled now"], "what is so now is not said twice"


def test_the_voltage_sensor(tmp_path: Path) -> None:
    sensor = "sys/class/hwmon/hwmon2"
    probe = probe_of(tmp_path, {f"{sensor}/name": "rpi_volt\n", f"{sensor}/in0_lcrit_alarm": "1\n"})
    assert named(probe, "power").found == "under-voltage now"
    (tmp_path / sensor / "in0_lcrit_alarm").write_text("0\n")
    assert named(probe, "power").severity == "ok"


@pytest.mark.parametrize(
    ("now", "trips", "severity"),
    [
        ("74900", {}, "ok"),
        ("75000", {}, "warning"),
        ("62000", {"trip_point_0_type": "passive", "trip_point_0_temp": "65000"}, "warning"),
        ("62000", {"trip_point_0_type": "active", "trip_point_0_temp": "65000"}, "ok"),
        ("62000", {"trip_point_0_type": "passive", "trip_point_0_temp": "rubbish"}, "ok"),
    ],
)
def test_heat(tmp_path: Path, now: str, trips: dict[str, str], severity: str) -> None:
    files = {f"{ZONE}/temp": now} | {f"{ZONE}/{name}": text for name, text in trips.items()}
    assert named(probe_of(tmp_path, files), "temperature").severity == severity


def test_little_memory_and_no_swap(tmp_path: Path) -> None:
    text = "MemTotal: 900000 kB\nMemAvailable: 100000 kB\nSwapTotal: 0 kB\n"
    probe = probe_of(tmp_path, {"proc/meminfo": text})
    assert named(probe, "memory").severity == "warning"
    assert named(probe, "memory").found == "102 of 922 MB free"
    swap = named(probe, "swap")
    assert (swap.severity, "swapon" in swap.mend) == ("warning", True)
    (tmp_path / "proc/meminfo").write_text(text.replace("SwapTotal: 0", "SwapTotal: 500000"))
    assert "swap" not in {finding.name for finding in examine_board(probe)}


@pytest.mark.parametrize("version", [1, 2])
def test_a_kernel_without_memory_limits_and_the_mend(tmp_path: Path, version: int) -> None:
    line = "boot/firmware/cmdline.txt"
    probe = probe_of(tmp_path, {line: "console=tty1 root=x rootwait\n"})
    controllers = tmp_path / "sys/fs/cgroup/cgroup.controllers"
    if version == 1:
        controllers.unlink()
        (tmp_path / "proc/cgroups").write_text("#subsys_name x y enabled\nmemory 0 90 0\n")
    else:
        controllers.write_text("cpuset cpu io pids\n")
    found = named(probe, "memory limits")
    assert found.severity == "note"
    command = found.mend.replace("sudo ", "").replace("&& reboot", "")
    subprocess.run(["sh", "-c", command], check=True)
    mended = (tmp_path / line).read_text()
    assert mended == "console=tty1 root=x rootwait cgroup_enable=memory cgroup_memory=1\n"


def test_a_disk_that_is_too_full(tmp_path: Path) -> None:
    probe = probe_of(tmp_path, {})
    found = named(probe, "disk /", disk_min_mb=1e12)
    assert found.severity == "warning"
    assert "MB free (installation)" in found.found
    assert "apt clean" in found.mend


def test_a_disk_that_is_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = type("Usage", (), {"free": 3_000_000})
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage)
    assert named(probe_of(tmp_path, {}), "disk /").severity == "error"


def test_disks_that_cannot_be_written(tmp_path: Path) -> None:
    mounts = "/dev/root / ext4 rw 0 0\n/dev/sda1 /home/two\\040words ext4 ro,noatime 0 0\n"
    environ = {"PATH": "", "HOME": "/home/two words/me", "TMPDIR": "/"}
    probe = probe_of(tmp_path, {"proc/mounts": mounts}, environ=environ)
    found = named(probe, "disk /home/two words")
    assert (found.severity, found.found) == ("error", "read-only")
    assert found.mend.endswith("mount -o remount,rw '/home/two words'")
    probe = probe_of(tmp_path, {"proc/mounts": "/dev/root / ext4 ro 0 0\n"})
    assert named(probe, "disk /").found == "read-only"


def test_an_overlay_forgets(tmp_path: Path) -> None:
    probe = probe_of(tmp_path, {"proc/mounts": "overlay / overlay rw 0 0\n"})
    found = named(probe, "disk /")
    assert (found.severity, found.found) == ("warning", "overlay")
    assert "do_overlayfs 1" in found.mend


def test_a_clock_that_is_older_than_the_system(tmp_path: Path) -> None:
    files = {"var/lib/dpkg/status": "x"}
    found = named(probe_of(tmp_path, files, now_s=time.time() - 400 * 86400), "clock")
    assert (found.severity, found.found) == ("error", "400 days older than this system's files")
    assert "set-ntp" in found.mend
    assert "clock" not in {f.name for f in examine_board(probe_of(tmp_path, files))}


@pytest.mark.parametrize(
    ("answer", "severity"), [("echo no", "warning"), ("echo yes", "ok"), ("exit 1", None)]
)
def test_a_clock_that_nobody_sets(tmp_path: Path, answer: str, severity: str | None) -> None:
    probe = probe_of(tmp_path, {"usr/bin/timedatectl": f"#!/bin/sh\n{answer}\n"})
    found = {f.name: f.severity for f in examine_board(probe)}
    assert found.get("clock") == severity


@pytest.mark.parametrize(
    ("answer", "minimum", "severity", "found"),
    [
        ("echo 'NV Power Mode: 15W'", "1", "warning", "15W"),
        ("echo 'NV Power Mode: MAXN'", "1", "note", "MAXN, clocks not fixed"),
        ("echo 'NV Power Mode: MAXN_SUPER'", "9", "ok", "MAXN_SUPER, clocks fixed"),
        ("exit 3", "9", "note", "nvpmodel ends with exit code 3"),
    ],
)
def test_a_jetsons_power_mode(
    tmp_path: Path, answer: str, minimum: str, severity: str, found: str
) -> None:
    frequency = "sys/devices/system/cpu/cpu0/cpufreq/scaling_{}_freq"
    files = {
        MODEL: "NVIDIA Jetson Orin Nano Developer Kit\0",
        "usr/sbin/nvpmodel": f"#!/bin/sh\n{answer}\n",
        frequency.format("min"): minimum,
        frequency.format("max"): "9",
    }
    finding = named(probe_of(tmp_path, files), "power mode")
    assert (finding.severity, finding.found) == (severity, found)
    assert bool(finding.mend) == (severity != "ok")


def test_a_board_that_tells_nothing(tmp_path: Path) -> None:
    found = examine_board(Probe(tmp_path, environ={"PATH": ""}))
    assert {f.name for f in found} <= {"power", "disk /"}


def test_this_machine() -> None:
    assert "memory" in {f.name for f in examine_board(Probe(environ=dict(os.environ)))}
