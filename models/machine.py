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
