"""The doctor on Python packages: in real virtual environments, with packages that really break."""

from __future__ import annotations

import subprocess
import sys
import venv
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from edgesight.deploy.doctor_packages import examine_packages
from edgesight.deploy.finding import Finding, Probe

REAL = Path(np.__file__).parents[1]
"""Where this Python's packages are."""
CHANGED = (
    "raise ValueError('numpy.dtype size changed, may indicate binary incompatibility. "
    "Expected 96 from C header, got 88 from PyObject')"
)
DIE = "import os, signal; os.kill(os.getpid(), signal.{})"
RUNTIME = """
__version__ = "1.21.0"
def get_available_providers(): return ["CPUExecutionProvider"]
class SessionOptions: pass
class InferenceSession:
    def __init__(self, *words, **more):
        import os, signal, sys
        if {dies!r}: os.kill(os.getpid(), signal.SIGILL)
    def get_inputs(self): return []
    def run(self, names, feeds): return []
"""
A72 = "Features : fp asimd crc32 cpuid\nCPU implementer : 0x41\nCPU part : 0xd08\n"


class Board:
    """A root with a virtual environment, in which packages can be put by pip or by apt."""

    def __init__(self, folder: Path, *, whole: bool) -> None:
        self.root = folder / "root"
        self.root.mkdir()
        self.prefix = folder / "venv"
        venv.create(self.prefix, symlinks=True)
        (self.pips,) = self.prefix.glob("lib/python*/site-packages")
        self.apts = self.root / "usr/lib/python3/dist-packages"
        self.apts.mkdir(parents=True)
        lines = [str(self.apts), *([str(REAL)] if whole else [])]
        (self.pips / "more.pth").write_text("\n".join(lines) + "\n")

    def put(self, name: str, code: str | None = None, version: str = "", *, apt: bool = False,
            package: str = "") -> None:  # fmt: skip
        """Adds a module and, with a version, what pip knows of its package."""
        folder = self.apts if apt else self.pips
        if code is not None:
            (folder / name).mkdir()
            (folder / name / "__init__.py").write_text(code)
        if version:
            package = package or name
            info = folder / f"{package.replace('-', '_')}-{version}.dist-info"
            info.mkdir()
            text = f"Metadata-Version: 2.1\nName: {package}\nVersion: {version}\n"
            (info / "METADATA").write_text(text)

    def file(self, name: str, text: str) -> None:
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)

    def probe(self, **others: Any) -> Probe:
        python = self.prefix / "bin/python"
        return Probe(self.root, python=python, environ={"PATH": "/usr/bin:/bin"}, **others)

    def findings(self, **others: Any) -> dict[str, Finding]:
        return {finding.name: finding for finding in examine_packages(self.probe(**others))}


@pytest.fixture
def board(tmp_path: Path) -> Board:
    """What edgesight needs is there, and works."""
    return Board(tmp_path, whole=True)


@pytest.fixture
def bare(tmp_path: Path) -> Board:
    """Nothing is installed."""
    return Board(tmp_path, whole=False)


def test_whole_packages(board: Board) -> None:
    found = board.findings()
    assert [f for f in found.values() if f.severity != "ok"] == []
    assert {"numpy", "opencv", "onnxruntime"} <= found.keys()
    assert found["numpy"].found == np.__version__
    assert found["onnxruntime"].found.endswith("runs the shipped detector")


def test_nothing_is_installed(bare: Board) -> None:
    found = bare.findings()
    assert {f.severity for f in found.values()} == {"error"}
    assert found.keys() == {"numpy", "opencv", "onnxruntime", "packages"}
    python = str(bare.prefix / "bin/python")
    assert found["onnxruntime"].mend == (
        f"{python} -m pip install 'onnxruntime>=1.17,!=1.21.0'"
    )  # fmt: skip
    assert "uvicorn" in found["packages"].found
    assert "'uvicorn>=0.23'" in found["packages"].mend


def test_a_python_that_does_not_start_is_told_elsewhere(tmp_path: Path) -> None:
    assert examine_packages(Probe(tmp_path, python=tmp_path / "nowhere")) == []


@pytest.mark.parametrize(
    ("name", "signal", "words"),
    [
        ("onnxruntime", "SIGILL", "illegal instruction"),
        ("numpy", "SIGILL", "illegal instruction"),
        ("cv2", "SIGABRT", "SIGABRT"),
    ],
)
def test_a_package_that_crashes(bare: Board, name: str, signal: str, words: str) -> None:
    if name == "onnxruntime":
        bare.put("numpy", "")
    bare.put(name, DIE.format(signal))
    found = bare.findings()["opencv" if name == "cv2" else name]
    assert found.severity == "error"
    assert words in found.found
    assert "-m pip install" in found.mend


@pytest.mark.parametrize("name", ["numpy", "cv2", "onnxruntime"])
def test_a_package_that_hangs(bare: Board, name: str) -> None:
    if name == "onnxruntime":
        bare.put("numpy", "")
    bare.put(name, "import time; time.sleep(600)")
    found = bare.findings(import_max_s=1.0)["opencv" if name == "cv2" else name]
    assert found.severity == "error"
    assert "hangs (1 s)" in found.found


def test_the_deadly_onnxruntime_dies_in_a_session_only(board: Board) -> None:
    board.put("onnxruntime", RUNTIME.format(dies=True), "1.21.0")
    found = board.findings()["onnxruntime"]
    assert found.severity == "error"
    assert found.found == "1.21.0: dies of an illegal instruction (SIGILL) on loading a model"
    assert "lacks" in found.why
    assert "!=1.21.0" in found.mend


@pytest.mark.parametrize(
    ("machine", "features", "severity"),
    [
        ("aarch64", A72, "error"),
        ("aarch64", A72.replace("cpuid", "asimddp"), "ok"),
        ("x86_64", "flags: sse2\n", "ok"),
    ],
)
def test_a_deadly_version_that_has_not_died_yet(
    board: Board, machine: str, features: str, severity: str
) -> None:
    board.put("onnxruntime", RUNTIME.format(dies=False), "1.21.0")
    board.file("proc/cpuinfo", features)
    probe = board.probe()
    probe.facts = {**probe.facts, "machine": machine}
    found = next(f for f in examine_packages(probe) if f.name == "onnxruntime")
    assert found.severity == severity


def test_an_import_may_be_noisy_and_never_end(bare: Board) -> None:
    code = "import atexit, time; print('{}'); __version__ = '9'; atexit.register(time.sleep, 600)"
    bare.put("cv2", code, "9", package="opencv-python-headless")
    found = bare.findings(import_max_s=10.0)["opencv"]
    assert (found.severity, found.found.split()[0]) == ("ok", "9")


@pytest.mark.parametrize(
    ("error", "apt", "mend"),
    [
        (CHANGED, True, "'numpy<2' 'opencv-python-headless<4.12'"),
        (CHANGED, False, "--no-cache-dir simplejpeg"),
        ("raise ImportError('no libjpeg')", True, "sudo apt install --reinstall"),
    ],
)
def test_simplejpeg_for_another_numpy(bare: Board, error: str, apt: bool, mend: str) -> None:
    bare.put("simplejpeg", error, apt=apt)
    bare.put("cv2", "", "4.12.0", package="opencv-python-headless")
    found = bare.findings()["simplejpeg"]
    torn = "dtype" in error
    assert found.severity == ("error" if torn else "warning")
    assert ("another NumPy" in found.why) == torn
    assert mend in found.mend


@pytest.mark.parametrize(
    "error",
    [
        "raise ImportError('numpy.core.multiarray failed to import')",
        "import sys; sys.stderr.write('A module that was compiled using NumPy 1.x cannot be run')\n"
        "raise ImportError('initialization failed')",
    ],
)
def test_opencv_for_another_numpy(bare: Board, error: str) -> None:
    bare.put("cv2", error, "4.9.0", package="opencv-python-headless")
    found = bare.findings()["opencv"]
    assert "another NumPy" in found.why
    assert "--upgrade 'opencv-python-headless>=4.6'" in found.mend


def test_pips_numpy_over_apts(bare: Board) -> None:
    bare.put("numpy", "", "1.24.2", apt=True)
    bare.put("numpy", "__version__ = '2.2.6'", "2.2.6")
    found = bare.findings()["two NumPys"]
    assert (found.severity, found.found) == ("warning", "pip's 2.2.6 hides apt's 1.24.2")
    assert "'numpy<2'" in found.mend


def test_an_old_numpy_over_apts_is_fine(board: Board) -> None:
    board.put("numpy", "", "1.24.2", apt=True)
    board.put("numpy", "__version__ = '1.26.4'", "1.26.4")
    assert "two NumPys" not in board.findings()


def test_opencv_without_the_libraries_of_a_desktop(bare: Board) -> None:
    code = "raise ImportError('libGL.so.1: cannot open shared object file: No such file')"
    bare.put("cv2", code, "4.11.0", package="opencv-python")
    found = bare.findings()["opencv"]
    assert "headless" in found.why
    assert "uninstall -y opencv-python" in found.mend
    assert found.mend.endswith("--no-deps opencv-python-headless")


def test_two_opencvs(bare: Board) -> None:
    bare.put("cv2", None, "4.11.0", package="opencv-python")
    bare.put("cv2", None, "4.12.0", package="opencv-python-headless")
    found = bare.findings()["two OpenCVs"]
    assert (found.severity, found.found) == ("warning", "opencv-python and opencv-python-headless")
    assert "Qt" in found.why
    assert "uninstall -y opencv-python opencv-python-headless && " in found.mend


@pytest.mark.parametrize(("jetson", "severity"), [(False, "note"), (True, "warning")])
def test_apts_opencv_is_hidden(bare: Board, jetson: bool, severity: str) -> None:
    bare.put("cv2", "__version__ = '4.12'", "4.12.0", package="opencv-python-headless")
    bare.put("cv2", "__version__ = '4.6'", apt=True)
    if jetson:
        bare.file("etc/nv_tegra_release", "# R36")
    found = bare.findings()["two OpenCVs"]
    assert found.severity == severity
    assert "GStreamer" in found.why
    assert found.mend.endswith("uninstall -y opencv-python-headless")


def test_an_opencv_with_windows_on_a_pi(bare: Board) -> None:
    bare.file("proc/device-tree/model", "Raspberry Pi 5 Model B\0")
    bare.put("cv2", "__version__ = '4.11'", "4.11.0", package="opencv-python")
    assert "Qt" in bare.findings()["opencv with windows"].why


@pytest.mark.parametrize(
    ("other", "keeps"),
    [
        ("onnxruntime-gpu", "'onnxruntime>=1.17,!=1.21.0'"),
        ("onnxruntime-openvino", "'onnxruntime>=1.17,!=1.21.0'"),
    ],
)
def test_two_onnxruntimes(bare: Board, other: str, keeps: str) -> None:
    bare.put("onnxruntime", "", "1.23.2")
    bare.put("onnxruntime", None, "1.23.0", package=other)
    bare.put("x", None, "0.14", package="onnxruntime-extensions")  # another module
    found = bare.findings()["two onnxruntimes"]
    assert (found.severity, found.found) == ("warning", f"onnxruntime and {other}")
    assert found.mend.endswith(f"--no-deps {keeps}")


def test_a_jetson_without_cuda(board: Board) -> None:
    board.file("proc/device-tree/model", "NVIDIA Jetson Orin Nano\0")
    found = board.findings()["onnxruntime"]
    assert found.severity == "warning"
    assert "without CUDA" in found.found
    assert "onnxruntime-gpu" in found.mend


PI = "proc/device-tree/model", "Raspberry Pi 4 Model B Rev 1.4\0"


def test_a_pi_without_picamera2(bare: Board) -> None:
    assert "picamera2" not in bare.findings(), "no Raspberry Pi"
    bare.file(*PI)
    found = bare.findings()["picamera2"]
    assert (found.severity, found.found) == ("warning", "not installed")
    assert found.mend.startswith("sudo apt install -y python3-picamera2")


def test_a_venv_that_does_not_see_picamera2_and_the_mend(bare: Board) -> None:
    bare.file(*PI)
    bare.put("picamera2", "", apt=True)
    (bare.pips / "more.pth").unlink()
    found = bare.findings()["picamera2"]
    assert "does not see apt's" in found.found
    settings = bare.prefix / "pyvenv.cfg"
    assert "include-system-site-packages = false" in settings.read_text()
    subprocess.run(["sh", "-c", found.mend], check=True)
    asked = [str(bare.prefix / "bin/python"), "-c", "import sys; print(*sys.path, sep='\\n')"]
    paths = subprocess.run(asked, capture_output=True, text=True, check=True).stdout.split()
    assert any(path.startswith(sys.base_prefix) and "-packages" in path for path in paths)


@pytest.mark.parametrize(
    ("code", "apt", "words", "mend"),
    [
        ("import libcamera", True, "system's own Python", "/usr/bin/python3 -m venv"),
        ("import libcamera", False, "pip's picamera2", "uninstall -y picamera2"),
        (CHANGED, True, "NumPy", "'numpy<2'"),
        ("raise OSError('odd')", True, "--source picamera", "apt install --reinstall"),
        (DIE.format("SIGSEGV"), True, "--source picamera", "apt install --reinstall"),
    ],
)
def test_a_picamera2_that_cannot_be_imported(
    bare: Board, code: str, apt: bool, words: str, mend: str
) -> None:
    bare.file(*PI)
    bare.put("picamera2", code, apt=apt)
    found = bare.findings()["picamera2"]
    assert found.severity == "warning"
    assert words in found.why
    assert mend in found.mend


def test_a_picamera2_that_can(bare: Board) -> None:
    bare.file(*PI)
    bare.put("picamera2", "", apt=True)
    assert bare.findings()["picamera2"].severity == "ok"


def test_torn_metadata_is_passed_over(board: Board) -> None:
    (board.pips / "half-1.0.dist-info").mkdir()
    (board.pips / "binary-1.0.dist-info").mkdir()
    (board.pips / "binary-1.0.dist-info/METADATA").write_bytes(b"\xff\xfe\0Name")
    assert board.findings()["numpy"].severity == "ok"
