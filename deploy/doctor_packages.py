"""The doctor on edgesight's Python: what is installed twice, torn, missing, or crashes."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Final

from ..models.errors import ModelFileError
from ..models.zoo import shipped
from .doctor_cpu import ARM, cpu_flags
from .finding import Finding, Probe, Ran

RUNTIMES: Final = (
    *("onnxruntime", "onnxruntime-gpu", "onnxruntime-openvino", "onnxruntime-directml"),
    *("onnxruntime-qnn", "onnxruntime-rocm", "onnxruntime-migraphx", "onnxruntime-training"),
    *("ort-nightly", "ort-nightly-gpu"),
)
"""Packages that all bring a module ``onnxruntime``."""
HEADLESS: Final = "opencv-python-headless"
OPENCVS: Final = (
    *("opencv-python", HEADLESS),
    *("opencv-contrib-python", "opencv-contrib-python-headless"),
)
"""Packages of PyPI that all bring a module ``cv2``."""
NEW_RUNTIME: Final = "onnxruntime>=1.17,!=1.21.0"
DEADLY: Final = ("1.21.0",)
"""Versions of ONNX Runtime that die on Arm cores without the dot product."""
DIST: Final = "dist-packages"
"""Where apt puts Python packages; pip puts them elsewhere."""
TORN: Final = re.compile(
    r"numpy\.(dtype|ndarray|ufunc) size changed|compiled using NumPy 1|_ARRAY_API not found"
    r"|numpy\.core\.multiarray failed to import|module compiled against (ABI|API) version",
)
"""What a module says that was built for another NumPy."""
NEEDED: Final = {
    "prometheus_client": "prometheus-client>=0.17",
    "segno": "segno>=1.5",
    "starlette": "starlette>=0.49.1",
    "tqdm": "tqdm>=4.60",
    "uvicorn": "uvicorn>=0.23",
}
"""Module -> what pip calls it; the small ones."""

IMPORT = """
import importlib, json, os, sys
try:
    module = importlib.import_module(sys.argv[1])
    said = {"version": str(getattr(module, "__version__", "")),
            "file": str(getattr(module, "__file__", ""))}
except BaseException as error:
    said = {"error": type(error).__name__ + ": " + str(error)}
print("\\n" + json.dumps(said), flush=True)
sys.stderr.flush()
os._exit(0)
"""
SESSION = """
import json, os, sys
def say(**words):
    print("\\n" + json.dumps(words), flush=True)
try:
    say(stage="on import")
    import numpy as np, onnxruntime as ort
    say(stage="on loading a model")
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    session = ort.InferenceSession(sys.argv[1], options, providers=["CPUExecutionProvider"])
    say(stage="on inference")
    kinds = {"tensor(float)": np.float32, "tensor(uint8)": np.uint8}
    session.run(None, {
        one.name: np.ones([d if isinstance(d, int) and d > 0 else 1 for d in one.shape],
                          kinds.get(one.type, np.float32))
        for one in session.get_inputs()
    })
    say(version=ort.__version__, providers=ort.get_available_providers())
except BaseException as error:
    say(error=type(error).__name__ + ": " + str(error))
sys.stderr.flush()
os._exit(0)
"""
"""Says what it is about to do, so that what it dies of is known."""


def examine_packages(probe: Probe) -> list[Finding]:
    """Returns what there is to say of the packages that edgesight's Python has."""
    if not probe.facts:
        return []  # said of the Python itself
    found = [_numpy(probe), _opencv(probe), _runtime(probe), _small_ones(probe)]
    found += [_two_opencvs(probe), _two_runtimes(probe), _two_numpys(probe)]
    found += [_simplejpeg(probe), _picamera2(probe)]
    return [f for f in found if f is not None]


def _numpy(probe: Probe) -> Finding:
    if not probe.places("numpy"):
        return _missing(probe, "numpy", "numpy>=1.24")
    ran = probe.run_python(IMPORT, "numpy")
    if version := ran.answer.get("version"):
        return Finding("numpy", "ok", version)
    mend = probe.pip("install", "--force-reinstall", "--no-deps", "numpy>=1.24")
    return Finding("numpy", "error", _said(ran), "nothing of edgesight runs without it", mend)


def _opencv(probe: Probe) -> Finding:
    name, needs = "opencv", f"{HEADLESS}>=4.6"
    if not probe.places("cv2"):
        return _missing(probe, name, needs)
    ran = probe.run_python(IMPORT, "cv2")
    if version := ran.answer.get("version"):
        return Finding(name, "ok", f"{version} in {_parent(ran.answer.get('file'))}")
    said = _said(ran)
    if TORN.search(said + ran.err):
        why = "this OpenCV was built for another NumPy than the one it finds"
        mend = probe.pip("install", "--upgrade", needs)
        if DIST in probe.places("cv2")[0]:
            mend = _old_numpy(probe)
    elif re.search(r"lib(GL|EGL|gthread|glib|Qt|xcb|SM|Xext)\S*\.so", said):
        why = "opencv-python wants the libraries of a desktop; the headless one does not"
        mend = _only(probe, [n for n, _, _ in probe.packages(*OPENCVS)], HEADLESS)
    else:
        why = "edgesight cannot read a picture without it"
        mend = _only(probe, [n for n, _, _ in probe.packages(*OPENCVS)], HEADLESS)
    return Finding(name, "error", said, why, mend)


def _runtime(probe: Probe) -> Finding:
    """Runs the shipped detector: an import alone does not use the instructions that matter."""
    name = "onnxruntime"
    if not probe.places(name):
        return _missing(probe, name, NEW_RUNTIME)
    try:
        model = shipped()
    except ModelFileError as error:
        return Finding(name, "error", str(error), "", probe.pip("install", "-U", "edgesight"))
    versions = [v for _, v, _ in probe.packages(*RUNTIMES)]
    said_version = versions[0] if versions else "version unknown"
    ran = probe.run_python(SESSION, str(model))
    answer = ran.answer
    mend = probe.pip("install", "--upgrade", NEW_RUNTIME)
    if "version" not in answer:
        said = f"{said_version}: {_said(ran)} {answer.get('stage', '')}".strip()
        why = "the shipped detector does not run"
        if ran.signal == "SIGILL":
            why = "this build uses an instruction that this processor lacks"
        if TORN.search(said + ran.err):
            why = "this ONNX Runtime was built for another NumPy than the one it finds"
        return Finding(name, "error", said, why, mend)
    machine, flags = probe.facts["machine"].lower(), cpu_flags(probe)
    if answer["version"] in DEADLY and machine in ARM and "asimddp" not in flags:
        why = "this version dies of illegal instructions on Cortex-A53 and A72, sooner or later"
        return Finding(name, "error", answer["version"], why, mend)
    if probe.is_jetson and "CUDAExecutionProvider" not in answer["providers"]:
        found = f"{answer['version']} runs, without CUDA"
        why = "the board's graphics unit lies idle; NVIDIA's index has builds for it, PyPI has not"
        mend = f"{probe.pip('uninstall', '-y', name)} && " + probe.pip(
            "install", "onnxruntime-gpu", "--index-url", "NVIDIAS_INDEX_FOR_THIS_JETPACK"
        )
        return Finding(name, "warning", found, why, mend)
    return Finding(name, "ok", f"{answer['version']} runs the shipped detector")


def _small_ones(probe: Probe) -> Finding | None:
    needed = dict(NEEDED)
    if tuple(probe.facts["version"]) < (3, 11):
        needed["tomli"] = "tomli>=2"
    lacking = [package for module, package in needed.items() if not probe.places(module)]
    if not lacking:
        return None
    names = ", ".join(re.split("[>=]", package)[0] for package in lacking)
    why = "edgesight run does not start without them"
    return Finding("packages", "error", f"missing: {names}", why, probe.pip("install", *lacking))


def _two_opencvs(probe: Probe) -> Finding | None:
    packages = sorted({name for name, _, _ in probe.packages(*OPENCVS)})
    places = probe.places("cv2")
    if len(packages) > 1:
        why = "they overwrite each other's files; which one is imported is chance"
        if any("headless" not in name for name in packages):
            why += ", and one brings a Qt that clashes with picamera2's"
        found = " and ".join(packages)
        return Finding("two OpenCVs", "warning", found, why, _only(probe, packages, HEADLESS))
    apts = [place for place in places if DIST in place]
    if packages and apts and DIST not in places[0]:
        found = f"{packages[0]} hides apt's python3-opencv"
        mend = probe.pip("uninstall", "-y", *packages)
        if probe.is_jetson:
            why = "apt's OpenCV has GStreamer, which --source jetson needs; pip's has not"
            return Finding("two OpenCVs", "warning", found, why, mend)
        why = "apt's has GStreamer (--source gst:...), pip's has not; both is a waste of 100 MB"
        return Finding("two OpenCVs", "note", found, why, mend)
    if packages and "headless" not in packages[0] and (probe.is_pi or probe.is_jetson):
        why = "it brings a Qt that clashes with picamera2's, and dies where there is no display"
        mend = _only(probe, packages, HEADLESS)
        return Finding("opencv with windows", "note", packages[0], why, mend)
    return None


def _two_runtimes(probe: Probe) -> Finding | None:
    packages = sorted({name for name, _, _ in probe.packages(*RUNTIMES)})
    if len(packages) < 2:
        return None
    why = "they overwrite each other's files; a provider vanishes or the import fails"
    keep = "onnxruntime-gpu" if probe.is_jetson else packages[0]
    keep = keep if keep in packages else packages[0]
    wants = NEW_RUNTIME if keep == "onnxruntime" else keep
    found = " and ".join(packages)
    mend = _only(probe, packages, wants)
    return Finding("two onnxruntimes", "warning", found, why, mend)


def _two_numpys(probe: Probe) -> Finding | None:
    """NumPy 2 of pip over apt's NumPy 1: what apt has built for the latter breaks."""
    versions = [(v, place) for _, v, place in probe.packages("numpy")]
    first = (probe.places("numpy") or [DIST])[0]
    new = [v for v, place in versions if place == first and _major(v) >= 2]
    old = [v for v, place in versions if DIST in place and _major(v) == 1]
    if not new or not old or DIST in first:
        return None
    found = f"pip's {new[0]} hides apt's {old[0]}"
    why = (
        "what apt has built for NumPy 1 (picamera2's simplejpeg) dies with 'numpy.dtype size "
        "changed'; pip's OpenCV from 4.12 on brings NumPy 2"
    )
    return Finding("two NumPys", "warning", found, why, _old_numpy(probe))


def _simplejpeg(probe: Probe) -> Finding | None:
    if not probe.places("simplejpeg"):
        return None
    ran = probe.run_python(IMPORT, "simplejpeg")
    if "version" in ran.answer:
        return Finding("simplejpeg", "ok", f"{ran.answer['version']} fits NumPy".strip())
    said = _said(ran)
    if not TORN.search(said + ran.err):
        why, mend = "picamera2 needs it", "sudo apt install --reinstall python3-simplejpeg"
        return Finding("simplejpeg", "warning", said, why, mend)
    why = "it was built for another NumPy than the one it finds: picamera2 cannot be imported"
    if DIST in probe.places("simplejpeg")[0]:
        return Finding("simplejpeg", "error", said, why, _old_numpy(probe))
    mend = probe.pip("install", "--force-reinstall", "--no-deps", "--no-cache-dir", "simplejpeg")
    return Finding("simplejpeg", "error", said, why, mend)


def _picamera2(probe: Probe) -> Finding | None:
    """Whether the Raspberry Pi's camera can be opened from this Python."""
    aptly = [p for p in probe.glob(f"usr/lib/python3/{DIST}/picamera2/__init__.py") if p.exists()]
    places = probe.places("picamera2")
    if not probe.is_pi and not places and not aptly:
        return None
    name, usb = "picamera2", "--source picamera does not work (USB cameras do)"
    if not places:
        if not aptly:
            mend = "sudo apt install -y python3-picamera2 --no-install-recommends"
            return Finding(name, "warning", "not installed", usb, mend)
        found = "installed by apt, but this venv does not see apt's packages"
        return Finding(name, "warning", found, usb, _open_venv(probe))
    ran = probe.run_python(IMPORT, "picamera2")
    if "version" in ran.answer:
        return Finding(name, "ok", "can be imported")
    said = _said(ran)
    if TORN.search(said + ran.err):
        why = f"a NumPy that it was not built for: {usb}"
        return Finding(name, "warning", said, why, _old_numpy(probe))
    if "libcamera" in said and not re.search(r"\.so|symbol", said):
        if DIST not in places[0]:
            why = f"pip's picamera2 has no libcamera; apt's has: {usb}"
            mend = "sudo apt install -y python3-picamera2 --no-install-recommends && " + (
                probe.pip("uninstall", "-y", "picamera2")
            )
            return Finding(name, "warning", said, why, mend)
        why = f"apt's libcamera is made for the system's own Python: {usb}"
        mend = f"/usr/bin/python3 -m venv --system-site-packages --clear {_prefix(probe)}"
        return Finding(name, "warning", said, why, mend)
    mend = "sudo apt install --reinstall -y python3-picamera2 python3-libcamera"
    return Finding(name, "warning", said, usb, mend)


def _old_numpy(probe: Probe) -> str:
    """Returns the command that takes NumPy 1; from 4.12 on, PyPI's OpenCV wants NumPy 2."""
    opencvs = sorted({name for name, _, _ in probe.packages(*OPENCVS)})
    return probe.pip("install", "numpy<2", *(f"{name}<4.12" for name in opencvs))


def _open_venv(probe: Probe) -> str:
    """Returns the command that shows apt's packages to edgesight's Python."""
    settings = Path(probe.facts["prefix"]) / "pyvenv.cfg"
    if probe.in_venv and settings.exists():
        change = "s/^include-system-site-packages *=.*/include-system-site-packages = true/"
        return f"sed -i {shlex.quote(change)} {shlex.quote(str(settings))}"
    return f"/usr/bin/python3 -m venv --system-site-packages {_prefix(probe)}"


def _prefix(probe: Probe) -> str:
    return shlex.quote(str(probe.facts["prefix"])) if probe.in_venv else ".venv"


def _missing(probe: Probe, name: str, package: str) -> Finding:
    why = "nothing of edgesight runs without it"
    return Finding(name, "error", "not installed", why, probe.pip("install", package))


def _only(probe: Probe, packages: list[str], keep: str) -> str:
    """Returns the command that leaves one package of many that share their files."""
    remove = f"{probe.pip('uninstall', '-y', *packages)} && " if packages else ""
    return remove + probe.pip("install", "--force-reinstall", "--no-deps", keep)


def _said(ran: Ran) -> str:
    """Returns what an import died of, or complained about, in one line."""
    text = ran.answer.get("error")
    return " ".join(str(text).split())[:200] if text else ran.how


def _parent(file: object) -> str:
    return str(Path(str(file)).parent.parent) if file else "?"


def _major(version: str) -> int:
    head = version.partition(".")[0]
    return int(head) if head.isdecimal() else 0
