"""What a figure was measured with: processor, system, versions."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import onnxruntime

from .. import __version__

PLAIN_CORES = ("cortex-a72",)
X86 = ("x86-64",)
ARM = ("aarch64", "arm64")
VNNI = (frozenset({"avx512_vnni", "avx_vnni"}), "VNNI")
ARM_DOT = (frozenset({"asimddp", "i8mm"}), "the dot product")
DOT_PRODUCT_FLAGS = {"x86_64": VNNI, "amd64": VNNI, "aarch64": ARM_DOT, "arm64": ARM_DOT}
"""Machine -> what Linux calls the instructions that make INT8 fast, and what people call them."""
WORKSTATION_PACKAGES = ("onnx", "onnx2torch", "torch")


def machine() -> dict[str, Any]:
    """Returns processor, cores, system, Python, and the versions of what computes; JSON-ready."""
    versions = {
        "edgesight": __version__,
        "numpy": np.__version__,
        "onnxruntime": onnxruntime.__version__,
        "opencv": cv2.__version__,
    }
    for name in WORKSTATION_PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "versions": versions,
    }


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
    except OSError:
        lines = []
    for key in ("model name", "Model"):  # x86 names its cores, a Raspberry Pi its board
        for line in lines:
            name, _, value = line.partition(":")
            if name.strip() == key and value.strip():
                return value.strip()
    return platform.processor() or platform.machine()


def int8_advice(core: str | None = None) -> str | None:
    """Returns why INT8 gains little speed over float on a core; None where it can gain much.

    The figures it names were counted by ``cost`` and its forerunner, with ONNX Runtime 1.31.1.
    Integer matrix products gain where the core multiplies and adds four 8-bit pairs at once:
    VNNI on x86, asimddp (dot product) or i8mm on Arm.

    Args:
        core: ``cortex-a76``, ``cortex-a72``, or None or ``x86-64`` for this machine's processor.
    """
    if core in PLAIN_CORES:
        name, lacks = core, "the dot product"
    else:
        kind = platform.machine().lower()
        flags = _flags()
        if core not in (None, *X86) or kind not in DOT_PRODUCT_FLAGS or not flags:
            return None
        if core in X86 and kind in ARM:
            return None
        known, lacks = DOT_PRODUCT_FLAGS[kind]
        if flags & known:
            return None
        name = "this processor"
    return (
        f"INT8 gains little speed on {name}, which lacks {lacks}: of YOLOX-nano's and the shipped "
        "detector's instructions it saves 15 and 24 % on a Cortex-A72 without dot product, 42 and "
        "50 % on a Cortex-A76 with it; for speed prune, and use activations that fuse (ReLU)"
    )


def _flags() -> frozenset[str]:
    """Returns what the first core of this machine can do, as Linux names it; empty elsewhere."""
    try:
        lines = Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
    except OSError:
        return frozenset()
    for line in lines:
        name, _, value = line.partition(":")
        if name.strip() in ("flags", "Features"):
            return frozenset(value.split())
    return frozenset()
