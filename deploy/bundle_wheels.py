"""The wheels that a board without a network needs: what edgesight imports there, and edgesight.

pip chooses and downloads them, with the user's own pip settings, for a machine that is not this
one. It evaluates conditions such as ``python_version < "3.11"`` for the Python that it runs in,
though, so what a board's Python needs besides is looked up in the wheels and asked for again.
edgesight's own wheel comes from its own files, never from an index: a package of that name there
need not be ours.
"""

from __future__ import annotations

import email
import importlib.util
import re
import subprocess
import sys
import zipfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..models.errors import InputError, MissingExtraError
from ..models.files import is_folder
from .manifest import Target
from .own_wheel import base_requirements, own_wheel

NAMED = {
    "pi-bookworm": Target("pi-bookworm", "aarch64", "3.11", 36),
    "pi-trixie": Target("pi-trixie", "aarch64", "3.13", 41),
    "jetson-jp6": Target("jetson-jp6", "aarch64", "3.10", 35),
    "jetson-jp7": Target("jetson-jp7", "aarch64", "3.12", 39),
}
"""Boards' systems: Raspberry Pi OS (Debian 12 and 13), JetPack (Ubuntu 22.04 and 24.04)."""
CONSTRAINTS = {
    # numpy 2 breaks the simplejpeg that its apt's picamera2 uses, and newer OpenCVs ask for it.
    "pi-bookworm": ("numpy<2", "opencv-python-headless<4.12"),
}
OTHER = re.compile(r"(aarch64|x86_64)(?:/py3(\d\d?))?")
OTHER_GLIBC = 31
"""Debian 11's and Ubuntu 20.04's."""
TARGET_HELP = f"{', '.join(NAMED)}, aarch64/py311 and the like, or x86_64 (with this Python)"
ROUNDS = 5
TIMEOUT_S = 1800
GLIBC_FIRST = 17
"""manylinux2014, the oldest that is still built for."""


@dataclass(frozen=True)
class WheelSet:
    """Wheels that install edgesight without a network.

    Attributes:
        target: What they are for.
        files: The wheels.
        requirements: What they are, as ``numpy==2.1.0``, sorted.
    """

    target: Target
    files: tuple[Path, ...]
    requirements: tuple[str, ...]


@dataclass(frozen=True)
class Wheel:
    """What a wheel says about itself.

    Attributes:
        file: Where it is.
        name: Of its project, normalised.
        version: Of its project.
        requires: Its requirements with their conditions.
    """

    file: Path
    name: str
    version: str
    requires: tuple[str, ...]


def parse_target(text: str) -> Target:
    """Returns the target that a name means.

    Raises:
        InputError: No target has that name.
    """
    if text in NAMED:
        return NAMED[text]
    found = OTHER.fullmatch(text)
    if found is None or (found[2] is not None and int(found[2]) < 10):
        message = f"--target: expected {TARGET_HELP}, found {text!r}; name the board's"
        raise InputError(message)
    minor = found[2] or str(sys.version_info.minor)
    return Target(f"{found[1]}/py3{minor}", found[1], f"3.{minor}", OTHER_GLIBC)


def gather(target: Target, folder: Path, source: Path | None = None) -> WheelSet:
    """Brings all wheels for a target.

    Args:
        target: The board's kind.
        folder: An empty folder to put them into.
        source: Folder with wheels to choose from; None: the index that pip is set up for.

    Raises:
        InputError: pip found no fitting wheel, or could not download one.
        MissingExtraError: There is no pip here.
    """
    if source is not None and not is_folder(source):
        message = f"--wheels: expected a folder with wheels, found none at {source}; check the path"
        raise InputError(message)
    environment = _environment(target)
    asked = _holding(base_requirements(), environment)
    for _ in range(ROUNDS):
        for old in folder.glob("*.whl"):
            old.unlink()
        _download(asked, target, folder, source)
        wheels = {wheel.name: wheel for wheel in map(read_wheel, sorted(folder.glob("*.whl")))}
        needed, missing = _closure(asked, wheels, environment)
        if not missing:
            break
        asked += missing
    else:
        message = (
            f"--offline: expected wheels for {target.name}, found none of {missing[0]}; put one "
            "into a folder and name it with --wheels"
        )
        raise InputError(message)
    for name in wheels.keys() - needed:  # what only this machine's Python needs
        wheels.pop(name).file.unlink()
    own = read_wheel(own_wheel(folder, source))
    chosen = sorted([*wheels.values(), own], key=lambda wheel: wheel.name)
    pins = tuple(f"{wheel.name}=={wheel.version}" for wheel in chosen)
    return WheelSet(target, tuple(wheel.file for wheel in chosen), pins)


def read_wheel(file: Path) -> Wheel:
    """Returns what a wheel says about itself.

    Raises:
        InputError: The file is no wheel.
    """
    try:
        with zipfile.ZipFile(file) as archive:
            (name,) = (
                n for n in archive.namelist() if re.fullmatch(r"[^/]+\.dist-info/METADATA", n)
            )
            text = archive.read(name)
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        message = f"{file}: expected a wheel, found none ({error}); take it away or copy it again"
        raise InputError(message) from error
    fields = email.message_from_bytes(text)
    requires = tuple(str(value) for value in fields.get_all("Requires-Dist", []))
    return Wheel(file, normalised(str(fields["Name"])), str(fields["Version"]), requires)


def normalised(name: str) -> str:
    """Returns a project's name as indexes compare it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def _download(asked: Sequence[str], target: Target, folder: Path, source: Path | None) -> None:
    if importlib.util.find_spec("pip") is None:
        message = "expected pip in this Python, found none; python -m ensurepip"
        raise MissingExtraError(message)
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
    command += ["--no-input", "--only-binary=:all:", "--dest", str(folder)]
    command += ["--python-version", target.python, "--implementation", "cp"]
    command += ["--abi", "cp" + target.python.replace(".", "")]
    # pip takes each name as it is: newer systems' names do not stand for the older ones'.
    for minor in range(target.glibc, GLIBC_FIRST - 1, -1):
        command += ["--platform", f"manylinux_2_{minor}_{target.machine}"]
    command += ["--platform", f"manylinux2014_{target.machine}"]
    if source is not None:
        command += ["--no-index", "--find-links", str(source)]
    command += [*asked, *CONSTRAINTS.get(target.name, ())]
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=TIMEOUT_S,
            stdin=subprocess.DEVNULL,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        message = (
            f"--offline: expected pip to download wheels, found: {type(error).__name__}; try "
            "again, or name a folder with --wheels"
        )
        raise InputError(message) from error
    if done.returncode:
        said = [line for line in done.stderr.splitlines() if line.startswith("ERROR: ")]
        reason = (said or done.stderr.splitlines() or ["nothing said"])[0].removeprefix("ERROR: ")
        message = (
            f"--offline: expected wheels for {target.name} (Python {target.python}, "
            f"{target.machine}), pip found: {reason:.300}; check the network, or name a folder "
            "that has them with --wheels"
        )
        raise InputError(message)


def _closure(
    asked: Sequence[str], wheels: dict[str, Wheel], environment: dict[str, str]
) -> tuple[set[str], list[str]]:
    """Returns the projects that are needed in an environment, and what of it has no wheel yet."""
    requirement = _packaging().Requirement
    needed: set[tuple[str, str]] = set()
    missing: list[str] = []
    todo = list(asked)
    while todo:
        wanted = requirement(todo.pop())
        name = normalised(wanted.name)
        if name not in wheels:
            missing.append(str(wanted))
            continue
        for extra in ("", *sorted(wanted.extras)):
            if (name, extra) not in needed:
                needed.add((name, extra))
                todo += _holding(wheels[name].requires, environment | {"extra": extra})
    return {name for name, _ in needed}, sorted(set(missing))


def _holding(requirements: Iterable[str], environment: dict[str, str]) -> list[str]:
    """Returns the requirements whose conditions hold, without the conditions."""
    found = []
    for text in requirements:
        wanted = _packaging().Requirement(text)
        if wanted.marker is None or wanted.marker.evaluate(environment):
            wanted.marker = None
            found.append(str(wanted))
    return found


def _environment(target: Target) -> dict[str, str]:
    """Returns what conditions are evaluated with; see PEP 508."""
    return {
        "implementation_name": "cpython",
        "implementation_version": f"{target.python}.0",
        "os_name": "posix",
        "platform_machine": target.machine,
        "platform_python_implementation": "CPython",
        "platform_release": "",
        "platform_system": "Linux",
        "platform_version": "",
        "python_full_version": f"{target.python}.0",
        "python_version": target.python,
        "sys_platform": "linux",
        "extra": "",
    }


def _packaging() -> Any:
    try:
        import packaging.requirements
    except ImportError as error:  # onnxruntime brings it as a rule
        message = "expected the package packaging, found none; pip install packaging"
        raise MissingExtraError(message) from error
    return packaging.requirements
