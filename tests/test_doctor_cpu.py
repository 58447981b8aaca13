"""The doctor on processors, systems, clocks and the environment, each finding provoked."""

from __future__ import annotations

import functools
import subprocess
from pathlib import Path
from typing import Any

import pytest
from edgesight.deploy.doctor_cpu import cpu_flags, examine_cpu
from edgesight.deploy.finding import Finding, Probe

A72 = """\
processor\t: {n}
BogoMIPS\t: 108.00
Features\t: fp asimd evtstrm crc32 cpuid
CPU implementer\t: 0x41
CPU part\t: 0xd08
"""
A76 = A72.replace("cpuid", "atomics fphp asimdhp cpuid asimdrdm lrcpc dcpop asimddp").replace(
    "0xd08", "0xd0b"
)
A53 = A72.replace("0xd08", "0xd03")
EPYC = "processor: 0\nmodel name: AMD EPYC\nflags: fpu sse2 avx2 avx512_vnni\n"
CPUFREQ = "sys/devices/system/cpu/cpu0/cpufreq"


def write(root: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


@functools.cache
def own_facts() -> dict[str, Any]:
    return Probe().facts


def probe_of(root: Path, files: dict[str, str], **facts: Any) -> Probe:
    """A machine of these files; its Python is this one, but for some facts."""
    write(root, files)
    probe = Probe(root, environ={"PATH": ""})
    probe.facts = {**own_facts(), **facts}
    return probe


def named(probe: Probe, name: str) -> Finding:
    return next(finding for finding in examine_cpu(probe) if finding.name == name)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (A76, "Cortex-A76: dot product, fp16; INT8 gains speed"),
        (A53 + A76.format(n=1).replace("asimddp", "asimddp i8mm"), None),
        (EPYC, "AMD EPYC: AVX512-VNNI, AVX2; INT8 can gain speed, of files made with --target"),
    ],
)
def test_what_int8_brings(tmp_path: Path, text: str, words: str | None) -> None:
    found = named(probe_of(tmp_path, {"proc/cpuinfo": text}), "processor")
    if words is None:  # a little core without it: no thread may count on it
        assert (found.severity, "no dot product" in found.found) == ("note", True)
        assert found.found.startswith("Cortex-A76"), "the larger core names the board"
    else:
        assert found.severity == "ok"
        assert found.found.startswith(words)


@pytest.mark.parametrize(
    ("text", "lacks", "target"),
    [
        (A72, "no dot product", "--target cortex-a72"),
        ("model name: Celeron\nflags: sse2\n", "no VNNI", "--target x86-64"),
    ],
)
def test_little_gain_is_told_with_its_figures(
    tmp_path: Path, text: str, lacks: str, target: str
) -> None:
    found = named(probe_of(tmp_path, {"proc/cpuinfo": text}), "processor")
    assert found.severity == "note"
    assert lacks in found.found
    assert "15 and 24 %" in found.why
    assert target in found.mend


@pytest.mark.parametrize("text", ["", "x", "flags\n:\nflags:", "\0\0"])
def test_a_processor_that_tells_nothing(tmp_path: Path, text: str) -> None:
    probe = probe_of(tmp_path, {"proc/cpuinfo": text})
    assert cpu_flags(probe) == frozenset()
    assert named(probe, "processor").severity == "note"


@pytest.mark.parametrize(
    ("facts", "found", "why", "mend"),
    [
        ({"bits": 32, "machine": "aarch64"}, "32-bit Python, a 64-bit kernel", "32-bit", "rpi-im"),
        ({"bits": 32, "machine": "armv7l"}, "32-bit Python, the kernel", "32-bit", "rpi-imager"),
        ({"machine": "riscv64"}, "riscv64", "no wheel for riscv64", "build.sh"),
        ({"libc": ""}, "without glibc", "no wheel for musl", "debian"),
    ],
)
def test_a_system_without_wheels(
    tmp_path: Path, facts: dict[str, Any], found: str, why: str, mend: str
) -> None:
    lacking = named(probe_of(tmp_path, {}, **facts, places={}), "system")
    assert lacking.severity == "error"
    assert found in lacking.found
    assert why in lacking.why
    assert mend in lacking.mend
    there = named(probe_of(tmp_path, {}, **facts, places={"onnxruntime": ["/x"]}), "system")
    assert there.severity == "note", "whoever has built one may use it"


@pytest.mark.parametrize(
    "facts", [{"version": [3, 15, 0]}, {"version": [3, 9, 2]}, {"free_threaded": True}]
)
def test_a_python_without_wheels(tmp_path: Path, facts: dict[str, Any]) -> None:
    found = named(probe_of(tmp_path, {}, **facts, places={}), "python")
    assert found.severity == "error"
    assert "3.10 to 3.14" in found.why
    assert "-m venv" in found.mend
    there = named(probe_of(tmp_path, {}, **facts, places={"onnxruntime": ["/x"]}), "python")
    assert there.severity == "note"


def test_a_python_that_does_not_start(tmp_path: Path) -> None:
    broken = tmp_path / "venv/bin/python"
    write(tmp_path, {"venv/bin/python": "#!/bin/sh\nkill -SEGV $$\n"})
    broken.chmod(0o755)
    found = examine_cpu(Probe(tmp_path, python=broken, environ={"PATH": "/usr/bin:/bin"}))
    python = next(f for f in found if f.name == "python")
    assert (python.severity, "SIGSEGV" in python.found) == ("error", True)
    assert str(tmp_path / "venv") in python.mend
    gone = Probe(tmp_path, python=tmp_path / "nowhere")
    assert "cannot be started: No such file" in named(gone, "python").found


def test_this_system_is_fine() -> None:
    found = {f.name: f.severity for f in examine_cpu(Probe())}
    assert (found["system"], found["python"]) == ("ok", "ok")


def test_a_slow_governor_and_its_mend(tmp_path: Path) -> None:
    files = {f"{CPUFREQ}/scaling_governor": "powersave\n", f"{CPUFREQ}/scaling_driver": "cpufreq\n"}
    probe = probe_of(tmp_path, files)
    found = named(probe, "governor")
    assert (found.severity, found.found) == ("warning", "powersave")
    subprocess.run(["sh", "-c", found.mend.replace("sudo ", "")], check=True, capture_output=True)
    assert named(probe, "governor") == Finding("governor", "ok", "performance")


@pytest.mark.parametrize(
    ("governor", "driver", "severity"),
    [
        ("ondemand", "cpufreq-dt", "ok"),
        ("schedutil", "cpufreq-dt", "ok"),
        ("powersave", "intel_pstate", "ok"),  # follows the load, whatever its name
        ("userspace", "cpufreq-dt", "warning"),
    ],
)
def test_governors(tmp_path: Path, governor: str, driver: str, severity: str) -> None:
    files = {f"{CPUFREQ}/scaling_governor": governor, f"{CPUFREQ}/scaling_driver": driver}
    assert named(probe_of(tmp_path, files), "governor").severity == severity


def test_a_machine_without_governor_says_nothing_of_it(tmp_path: Path) -> None:
    names = {finding.name for finding in examine_cpu(probe_of(tmp_path, {}))}
    assert not names & {"governor", "clock limit"}


def test_a_limited_clock_and_its_mend(tmp_path: Path) -> None:
    write(tmp_path, {f"{CPUFREQ.replace('cpu0/cpufreq', 'cpufreq/policy0')}/scaling_max_freq": "0"})
    files = {f"{CPUFREQ}/scaling_max_freq": "600000\n", f"{CPUFREQ}/cpuinfo_max_freq": "2400000\n"}
    probe = probe_of(tmp_path, files)
    found = named(probe, "clock limit")
    assert (found.severity, found.found) == ("warning", "limited to 600 of 2400 MHz")
    subprocess.run(["sh", "-c", found.mend.replace("sudo ", "")], check=True, capture_output=True)
    policy = tmp_path / "sys/devices/system/cpu/cpufreq/policy0/scaling_max_freq"
    assert policy.read_text() == "2400000\n"


@pytest.mark.parametrize(
    ("name", "value", "severity"),
    [
        ("OMP_WAIT_POLICY", "ACTIVE", "warning"),
        ("OMP_WAIT_POLICY", "passive", "ok"),
        ("KMP_BLOCKTIME", "infinite", "warning"),
        ("KMP_BLOCKTIME", "0", "ok"),
        ("GOMP_SPINCOUNT", "1e9", "warning"),
        ("OPENBLAS_THREAD_TIMEOUT", "30", "warning"),
        ("OPENBLAS_THREAD_TIMEOUT", "rubbish", "ok"),
        ("OPENCV_THREAD_POOL_ACTIVE_WAIT_WORKER", "1000000", "warning"),
        ("OMP_NUM_THREADS", "4", "ok"),
    ],
)
def test_threads_that_are_told_to_wait_awake(name: str, value: str, severity: str) -> None:
    found = named(Probe(environ={"PATH": "", name: value}), "waiting threads")
    assert found.severity == severity
    if severity == "warning":
        assert found.found == f"{name}={value}"
        assert found.mend.startswith(f"unset {name} ")
