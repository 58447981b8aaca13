"""The machine's own figures, read from trees such as boards have; and what they mean for a run."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from edgesight.device_app.health import Health
from edgesight.device_app.hud import WARN, hud_lines
from edgesight.models.board import Board


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


PI = {
    "proc/stat": "cpu 100 0 100 700 100 0 0 0 0 0\ncpu0 1 1 1 1\n",
    "proc/self/statm": "50000 25000 1000 1 0 1 0\n",
    "proc/meminfo": "MemTotal:  4000000 kB\nMemAvailable:  2000000 kB\n",
    "sys/class/thermal/thermal_zone0/type": "cpu-thermal\n",
    "sys/class/thermal/thermal_zone0/temp": "61234\n",
    "sys/devices/system/cpu/cpu0/cpufreq/scaling_cur_freq": "1500000\n",
    "sys/devices/system/cpu/cpu3/cpufreq/scaling_cur_freq": "2400000\n",
    "sys/devices/system/cpu/cpu0/cpufreq/cpuinfo_max_freq": "2400000\n",
    "sys/devices/platform/soc/soc:firmware/get_throttled": "0\n",
}
WORD = "sys/devices/platform/soc/soc:firmware/get_throttled"


def test_a_raspberry_pi(tmp_path: Path) -> None:
    board = Board(write(tmp_path, PI))
    first = board.read(0.0)
    assert first["cpu_percent"] is None, "the first reading has nothing to compare with"
    assert first["temperature_c"] == 61.2
    assert (first["clock_mhz"], first["clock_max_mhz"]) == (2400, 2400)
    assert first["memory_mb"] == pytest.approx(25000 * os.sysconf("SC_PAGE_SIZE") / 1e6, abs=0.1)
    assert first["memory_free_mb"] == 2048
    assert first["throttled"] == first["throttled_before"] == []
    write(tmp_path, {"proc/stat": "cpu 250 0 150 800 100 0 0 0 0 0\n"})
    assert board.read(0.5) is first, "not more often than once a second"
    second = board.read(1.5)
    assert second["cpu_percent"] == pytest.approx(66.7)
    assert second["own_cpu_percent"] is not None


def test_the_firmwares_word(tmp_path: Path) -> None:
    write(tmp_path, {**PI, WORD: "0x50005\n"})
    found = Board(tmp_path).read(0.0)
    assert found["throttled"] == ["under-voltage", "throttled"]
    assert found["throttled_before"] == ["under-voltage", "throttled"]
    write(tmp_path, {WORD: "80000\n"})
    found = Board(tmp_path).read(0.0)
    assert found["throttled"] == []
    assert found["throttled_before"] == ["soft temperature limit"]


def test_vcgencmd_where_the_kernel_does_not_tell(tmp_path: Path) -> None:
    tool = tmp_path / "usr/bin/vcgencmd"
    write(
        tmp_path, {"usr/bin/vcgencmd": "#!/bin/sh\n[ $1 = get_throttled ] && echo throttled=0x2\n"}
    )
    tool.chmod(0o755)
    assert Board(tmp_path).read(0.0)["throttled"] == ["clock capped"]
    tool.write_text("#!/bin/sh\nexit 1\n")
    assert Board(tmp_path).read(0.0)["throttled"] == []


def test_a_jetson_counts_over_current(tmp_path: Path) -> None:
    zones = {
        "sys/class/thermal/thermal_zone0/type": "gpu-thermal\n",
        "sys/class/thermal/thermal_zone0/temp": "50000\n",
        "sys/class/thermal/thermal_zone1/type": "cpu-thermal\n",
        "sys/class/thermal/thermal_zone1/temp": "70500\n",
    }
    count = "sys/class/hwmon/hwmon1/oc3_event_cnt"
    board = Board(write(tmp_path, {**zones, count: "4\n"}))
    found = board.read(0.0)
    assert found["temperature_c"] == 70.5, "of the processor, not of the first zone"
    assert (found["throttled"], found["throttled_before"]) == ([], ["over-current"])
    write(tmp_path, {count: "5\n"})
    assert board.read(2.0)["throttled"] == ["over-current"]
    assert board.read(4.0)["throttled"] == []


def test_a_machine_that_tells_nothing(tmp_path: Path) -> None:
    found = Board(tmp_path).read(0.0)
    assert {key for key, value in found.items() if value is not None} <= {
        "throttled",
        "throttled_before",
    }


@pytest.mark.parametrize("rubbish", ["", "x\n", "-\n\n\n", "cpu\n"])
def test_rubbish_is_nothing(tmp_path: Path, rubbish: str) -> None:
    write(tmp_path, dict.fromkeys([*PI, "sys/class/hwmon/hwmon1/oc1_event_cnt"], rubbish))
    found = Board(tmp_path).read(0.0)
    assert found["temperature_c"] is None
    assert found["throttled"] == []


def test_this_machine() -> None:
    found = Board().read()
    assert found["memory_mb"] is not None
    assert found["memory_mb"] > 5


def test_a_run_that_a_throttled_board_slows_says_so(tmp_path: Path) -> None:
    board = Board(write(tmp_path, PI))
    health = Health(board)
    for second in range(5):
        assert health.figures(20.0, 2.0 * second)["says"] is None
    write(tmp_path, {WORD: "0x4\n", "sys/class/thermal/thermal_zone0/temp": "85000\n"})
    says = health.figures(20.5, 20.0)["says"]
    assert says == "the board reports: throttled at 85 C"
    found = health.figures(31.0, 22.0)
    assert found["says"] == "1.6 times slower, the board throttles: throttled at 85 C"
    assert (found["says"], WARN) in hud_lines({"board": found})
    write(tmp_path, {WORD: "0x40000\n"})
    assert health.figures(30.0, 24.0)["says"] is None, "slower, but not the board's fault"


def test_under_voltage_says_what_to_do(tmp_path: Path) -> None:
    health = Health(Board(write(tmp_path, {**PI, WORD: "1\n"})))
    assert "stronger power supply" in str(health.figures(None, 0.0)["says"])
