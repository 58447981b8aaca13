"""The doctor on the processor: what INT8 brings on it, its clock, its system, waiting threads."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Final

from .finding import Finding, Probe

CORES: Final = {
    "0xd03": "Cortex-A53",
    "0xd04": "Cortex-A35",
    "0xd05": "Cortex-A55",
    "0xd07": "Cortex-A57",
    "0xd08": "Cortex-A72",
    "0xd09": "Cortex-A73",
    "0xd0a": "Cortex-A75",
    "0xd0b": "Cortex-A76",
    "0xd0c": "Neoverse-N1",
    "0xd0d": "Cortex-A77",
    "0xd40": "Neoverse-V1",
    "0xd41": "Cortex-A78",
    "0xd42": "Cortex-A78AE",
    "0xd44": "Cortex-X1",
    "0xd49": "Neoverse-N2",
    "0xd4f": "Neoverse-V2",
}
"""Arm's numbers of its cores, as Linux gives them under "CPU part"."""
ARM = ("aarch64", "arm64")
X86 = ("x86_64", "amd64")
DOT: Final = {
    "avx512_vnni": "AVX512-VNNI",
    "avx_vnni": "AVX-VNNI",
    "asimddp": "dot product",
    "i8mm": "8-bit matrices (i8mm)",
}
"""Linux's name of what multiplies and adds four or more 8-bit pairs at once -> people's name."""
OTHERS: Final = {"asimdhp": "fp16", "avx2": "AVX2"}
LITTLE_GAIN = (
    "INT8 gains little speed here: of the instructions of YOLOX-nano and the shipped detector it "
    "saves 15 and 24 % on a Cortex-A72 without dot product, 42 and 50 % on a Cortex-A76 with it "
    "(counted by edgesight cost with ONNX Runtime 1.31.1); pruning and activations that fuse "
    "(ReLU) gain on any core"
)
SLOW_GOVERNORS: Final = ("powersave", "conservative", "userspace")
SELF_TIMED: Final = ("intel_pstate", "amd-pstate", "amd-pstate-epp")
"""Drivers of the clock whose "powersave" follows the load all the same."""
PYTHON_MIN, PYTHON_MAX = (3, 10), (3, 14)
"""PyPI has wheels of ONNX Runtime for these on x86-64 and arm64, as of November 2026."""
NEW_SYSTEM = "rpi-imager   # on a workstation: choose the 64-bit system"


def _over(limit: float) -> Callable[[str], bool]:
    def test(text: str) -> bool:
        try:
            return float(text) > limit
        except ValueError:
            return text.startswith("inf")  # OpenMP's word for no end

    return test


SPINS: Final[dict[str, Callable[[str], bool]]] = {
    "GOMP_SPINCOUNT": _over(1e6),
    "KMP_BLOCKTIME": _over(200),  # milliseconds; what it is by default
    "OMP_WAIT_POLICY": lambda text: text == "active",
    "OPENBLAS_THREAD_TIMEOUT": _over(26),  # a power of two of cycles; what it is by default
    "OPENCV_THREAD_POOL_ACTIVE_WAIT_MAIN": _over(10000),
    "OPENCV_THREAD_POOL_ACTIVE_WAIT_WORKER": _over(10000),
}
"""Variables that tell NumPy's, OpenCV's or OpenVINO's threads how long to wait awake -> whether a
value is too long."""


def examine_cpu(probe: Probe) -> list[Finding]:
    """Returns what there is to say of processor, clock, system and environment."""
    found = [*_system(probe), _processor(probe)]
    found += [f for f in (_governor(probe), _cap(probe)) if f is not None]
    return [*found, _spinning(probe)]


def core_name(probe: Probe) -> str:
    """Returns what people call the processor; of two kinds of cores the last, the larger one."""
    fields = _fields(probe)
    parts = [CORES[part] for part in fields.get("CPU part", []) if part in CORES]
    if fields.get("CPU implementer", ["0x41"])[0] == "0x41" and parts:
        return parts[-1]
    return next((fields[k][0] for k in ("model name", "Model", "Hardware") if k in fields), "")


def cpu_flags(probe: Probe) -> frozenset[str]:
    """Returns what every core can do, as Linux names it; empty where it is not told."""
    fields = _fields(probe)
    lines = fields.get("flags") or fields.get("Features") or []
    sets = [frozenset(line.split()) for line in lines]
    return frozenset.intersection(*sets) if sets else frozenset()


def _fields(probe: Probe) -> dict[str, list[str]]:
    """Returns all values that each line of cpuinfo has, over the cores."""
    fields: dict[str, list[str]] = {}
    for line in probe.processor_text.splitlines():
        name, colon, value = line.partition(":")
        if colon and value.strip():
            fields.setdefault(name.strip(), []).append(value.strip())
    return fields


def _processor(probe: Probe) -> Finding:
    flags, name = cpu_flags(probe), core_name(probe) or "unknown processor"
    if not flags:
        return Finding("processor", "note", f"{name}, features unknown", "/proc/cpuinfo is silent")
    has = [text for flag, text in (DOT | OTHERS).items() if flag in flags]
    x86 = "sse2" in flags
    if flags & DOT.keys():
        gain = "can gain speed, of files made with --target x86-64" if x86 else "gains speed"
        return Finding("processor", "ok", f"{name}: {', '.join(has)}; INT8 {gain}")
    lacks = "VNNI" if x86 else "dot product"
    found = f"{name}: {', '.join([*has, f'no {lacks}'])}"
    target = "x86-64" if x86 else "cortex-a72"
    mend = f"edgesight compress MODEL --labelled PHOTOS --cost-max 0.5 --target {target}"
    return Finding("processor", "note", found, LITTLE_GAIN, mend)


def _system(probe: Probe) -> list[Finding]:
    """Whether there are wheels for this Python on this system."""
    facts = probe.facts
    if not facts:
        why = "it does not start, so nothing that edgesight needs can be looked at"
        how = probe.run_python("").how
        mend = f"/usr/bin/python3 -m venv --system-site-packages --clear {_venv(probe)}"
        return [Finding("python", "error", f"{probe.python} {how}", why, mend)]
    version, kind = tuple(facts["version"]), str(facts["machine"]).lower()
    dotted = ".".join(map(str, version))
    there = bool(probe.places("onnxruntime"))  # whoever has built one has it
    none = f"ONNX Runtime has no wheel for {{}}{', but one is installed' * there}"
    if facts["bits"] != 64:
        kernel = "a 64-bit kernel" if kind in (*ARM, *X86) else "the kernel"
        said, lacking = f"{facts['bits']}-bit Python, {kernel} ({kind})", "32-bit systems"
        mend = NEW_SYSTEM
    elif kind not in (*ARM, *X86):
        said, lacking = f"Linux on {kind}", kind
        mend = "./build.sh --config Release --build_wheel   # in ONNX Runtime's sources"
    elif facts["libc"] != "glibc":
        said, lacking = f"Linux on {kind} without glibc", "musl"
        mend = "docker run -it debian:stable   # or another system than Alpine"
    else:
        said, lacking, mend = f"64-bit Linux on {kind}", "", ""
    if not lacking:
        found = [Finding("system", "ok", said)]
    elif there:
        found = [Finding("system", "note", said, none.format(lacking))]
    else:
        found = [Finding("system", "error", said, none.format(lacking), mend)]
    name = f"Python {dotted}{' free-threaded' * facts['free_threaded']}"
    if PYTHON_MIN <= version[:2] <= PYTHON_MAX and not facts["free_threaded"]:
        return [*found, Finding("python", "ok", f"{name} in {facts['prefix']}")]
    if there:
        return [*found, Finding("python", "note", name, none.format(name))]
    span = " to ".join(".".join(map(str, v)) for v in (PYTHON_MIN, PYTHON_MAX))
    why = f"{none.format(name)}; there are some for {span}"
    mend = f"python3.13 -m venv --system-site-packages --clear {_venv(probe)}"
    return [*found, Finding("python", "error", name, why, mend)]


def _venv(probe: Probe) -> Path:
    return probe.python.parent.parent if probe.python.parent.name == "bin" else Path(".venv")


def _governor(probe: Probe) -> Finding | None:
    kinds = _values(probe, "scaling_governor")
    drivers = _values(probe, "scaling_driver")
    if not kinds:
        return None
    found = ", ".join(sorted(kinds))
    if drivers & set(SELF_TIMED) or not kinds & set(SLOW_GOVERNORS):
        return Finding("governor", "ok", found)
    why = "the clock stays low, or rises late: fewer frames per second"
    folder = probe.root / "sys/devices/system/cpu"
    mend = f"echo performance | sudo tee {folder}/cpu*/cpufreq/scaling_governor"
    return Finding("governor", "warning", found, why, mend)


def _cap(probe: Probe) -> Finding | None:
    for path in _cpufreq(probe, "scaling_max_freq"):
        try:
            now = int(probe.text(path) or "")
            top = int(probe.text(path.with_name("cpuinfo_max_freq")) or "")
        except ValueError:
            continue
        if now < top:
            found = f"limited to {now // 1000} of {top // 1000} MHz"
            why = "somebody has set a limit below what the processor can do"
            mend = (
                f"cat {path.with_name('cpuinfo_max_freq')} | "
                f"sudo tee {path.parents[2]}/cpufreq/policy*/scaling_max_freq"
            )
            return Finding("clock limit", "warning", found, why, mend)
    return None


def _values(probe: Probe, name: str) -> set[str]:
    return {text for path in _cpufreq(probe, name) if (text := probe.text(path))}


def _cpufreq(probe: Probe, name: str) -> list[Path]:
    return probe.glob(f"sys/devices/system/cpu/cpu[0-9]*/cpufreq/{name}")


def _spinning(probe: Probe) -> Finding:
    """Whether the environment tells idle threads to burn their cores."""
    found = [
        f"{name}={value}"
        for name, value in sorted(probe.environ.items())
        if name in SPINS and SPINS[name](value.strip().lower())
    ]
    if not found:
        return Finding("waiting threads", "ok", "sleep: edgesight run sets allow_spinning=0")
    why = "idle threads burn their cores between two frames: heat, and less for all else"
    names = " ".join(text.partition("=")[0] for text in found)
    mend = (
        f"unset {names}   # and delete it where it is set: grep -r {names.split()[0]} ~/.*rc /etc"
    )
    return Finding("waiting threads", "warning", ", ".join(found), why, mend)
