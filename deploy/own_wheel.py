"""edgesight's own wheel, from the files that run here: a checkout, or an installed package.

Its bytes depend on the content alone: nothing is compressed (zlib versions differ), names are
sorted, and time and mode are fixed.
"""

from __future__ import annotations

import base64
import hashlib
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .. import __version__
from ..models.errors import InputError, OutputError

PACKAGE = Path(__file__).parent.parent
NAME = "edgesight"
TIME = (1980, 1, 1, 0, 0, 0)
BUILD_TIMEOUT_S = 600
LEFT_OUT = ("INSTALLER", "RECORD", "REQUESTED", "direct_url.json")
"""What an installer adds to a wheel's own files."""


def base_requirements() -> tuple[str, ...]:
    """Returns what edgesight needs on a board, with its conditions, sorted.

    Raises:
        InputError: This edgesight is neither a checkout nor an installed package.
    """
    project = _checkout()
    if project is not None:
        return tuple(sorted(project["project"]["dependencies"]))
    requires = _installed().requires or []
    return tuple(sorted(r for r in requires if not re.search(r"\bextra\s*==", r)))


def own_wheel(folder: Path, source: Path | None = None) -> Path:
    """Puts a wheel of the edgesight that runs here into a folder.

    Args:
        folder: Where to.
        source: Folder of wheels; if one of this very version is there, it is taken as it is.

    Raises:
        InputError: It cannot be built, or installed files were changed.
        OutputError: The folder cannot be written.
    """
    target = folder / f"{NAME}-{__version__}-py3-none-any.whl"
    try:
        if source is not None and (source / target.name).is_file():
            shutil.copyfile(source / target.name, target)
        else:
            project = _checkout()
            files = _repacked() if project is None else _built(project)
            write_wheel(target, files)
    except OSError as error:
        message = f"cannot write {target}: {error.strerror or error}; free space"
        raise OutputError(message) from error
    return target


def write_wheel(target: Path, files: Mapping[str, bytes]) -> None:
    """Writes a wheel whose bytes follow from its files alone.

    Args:
        target: The wheel.
        files: Path in the wheel -> content, without the ``RECORD``, which is made anew.
    """
    (info,) = {name.split("/")[0] for name in files if re.match(r"[^/]+\.dist-info/", name)}
    names = sorted(files, key=lambda name: (name.startswith(info), name))  # as the format advises
    record = [f"{name},sha256={_digest(files[name])},{len(files[name])}" for name in names]
    record.append(f"{info}/RECORD,,")
    last = (f"{info}/RECORD", "\n".join([*record, ""]).encode())
    with zipfile.ZipFile(target, "w", zipfile.ZIP_STORED) as archive:
        for name, data in (*((name, files[name]) for name in names), last):
            entry = zipfile.ZipInfo(name, TIME)
            entry.external_attr = 0o100644 << 16
            entry.create_system = 3
            archive.writestr(entry, data)


def _checkout() -> dict[str, Any] | None:
    """Returns the project file beside the package; None if this is no checkout."""
    try:
        text = (PACKAGE / "pyproject.toml").read_text("utf-8")
    except OSError:
        return None
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib
    project = tomllib.loads(text)
    return project if project.get("project", {}).get("name") == NAME else None


def _built(project: Mapping[str, Any]) -> dict[str, bytes]:
    """Builds a checkout's wheel from a copy of its files, and returns what is in it."""
    with tempfile.TemporaryDirectory(prefix="edgesight-") as place:
        source, out = Path(place, "source"), Path(place, "out")
        _copy_sources(project, source)
        command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--disable-pip-version-check"]
        command += ["--no-input", "--no-deps", "--wheel-dir", str(out)]
        if _setuptools() >= 77:  # as [build-system] asks; then no network is needed
            command.append("--no-build-isolation")
        try:
            done = subprocess.run(
                [*command, str(source)], capture_output=True, text=True, errors="replace",
                timeout=BUILD_TIMEOUT_S, stdin=subprocess.DEVNULL, cwd=place,
                env={k: v for k, v in os.environ.items() if k != "PYTHONPATH"},
            )  # fmt: skip
        except subprocess.TimeoutExpired as error:
            message = (
                f"--offline: expected a wheel of {PACKAGE}, found a build without an end; "
                "build it and name its folder with --wheels"
            )
            raise InputError(message) from error
        found = list(out.glob("*.whl"))
        if done.returncode or len(found) != 1:
            reason = (done.stderr.strip().splitlines() or ["no wheel"])[-1]
            message = (
                f"--offline: expected a wheel of {PACKAGE}, found: {reason:.200}; pip install -U "
                "setuptools, or name a folder that has it with --wheels"
            )
            raise InputError(message)
        with zipfile.ZipFile(found[0]) as archive:
            names = (n for n in archive.namelist() if not n.endswith((".dist-info/RECORD", "/")))
            return {name: archive.read(name) for name in names}


def _copy_sources(project: Mapping[str, Any], target: Path) -> None:
    """Copies the packages' files and no more: a checkout also holds data, runs and builds."""
    texts = ["pyproject.toml", project["project"]["readme"], *project["project"]["license-files"]]
    for package in project["tool"]["setuptools"]["packages"]:
        folder = Path(*package.split(".")[1:])
        (target / folder).mkdir(parents=True, exist_ok=True)
        for path in sorted((PACKAGE / folder).iterdir()):
            wanted = folder != Path() or path.suffix == ".py" or path.name == "py.typed"
            if path.is_file() and wanted and not path.name.startswith("."):
                shutil.copyfile(path, target / folder / path.name)
    for name in texts:
        shutil.copyfile(PACKAGE / name, target / name)


def _setuptools() -> int:
    """Returns the major version of setuptools; 0 without it."""
    try:
        return int(importlib.metadata.version("setuptools").split(".")[0])
    except (importlib.metadata.PackageNotFoundError, ValueError):
        return 0


def _repacked() -> dict[str, bytes]:
    """Returns the files of the installed package, as they were in its wheel."""
    found: dict[str, bytes] = {}
    for file in _installed().files or ():
        path = file.as_posix()
        if path.startswith("..") or path.endswith(".pyc") or file.name in LEFT_OUT:
            continue  # scripts and what the installer made are made anew by the next one
        data = Path(str(file.locate())).read_bytes()
        if file.hash is not None and (file.hash.mode, file.hash.value) != ("sha256", _digest(data)):
            message = (
                f"--offline: expected {NAME} as it was installed, found that {path} was changed; "
                f"install {NAME} again, or name a folder that has its wheel with --wheels"
            )
            raise InputError(message)
        found[path] = data
    return found


def _installed() -> importlib.metadata.Distribution:
    for found in importlib.metadata.distributions(name=NAME):
        if found.version == __version__ and found.files:
            return found
    message = (
        f"expected {NAME} {__version__} as a checkout or installed by pip, found neither at "
        f"{PACKAGE}; pip install it"
    )
    raise InputError(message)


def _digest(data: bytes) -> str:
    return base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()
