"""An emulated Cortex computer that counts instructions: made once, booted for each count.

QEMU's system emulator with ``-icount shift=0`` lets the guest's clock go on by one nanosecond per
instruction, so a clock in the guest counts instructions, whatever the machine outside does. The
guest is a Debian kernel, Debian's Python and the aarch64 wheels of NumPy and ONNX Runtime, fetched
by this machine's own apt and pip, without being root, and kept in the cache folder.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import io
import json
import os
import re
import select
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from .cost_guest import MARK
from .cpio import MERGED, CpioWriter
from .errors import DownloadError, EdgeSightError, MissingExtraError, OutputError

QEMU = "qemu-system-aarch64"
CACHE_VARIABLE = "EDGESIGHT_CACHE"
FORMAT = 2
"""Of the guest's folder; another one is made when this changes."""
MEMORY_MB = 3072
KERNEL = "linux-image-cloud-arm64"
"""Debian's package that depends on the newest small kernel."""
PACKAGES = ("python3", "libstdc++6")
WHEELS = ("onnxruntime", "numpy")
TAGS = tuple(f"manylinux{name}_aarch64" for name in ("_2_28", "_2_27", "_2_17", "2014"))
UNUSED = tuple(f"usr/share/{name}" for name in ("doc", "man", "locale", "info", "lintian"))
UNUSED_WHEEL = tuple(
    f"onnxruntime/{name}"
    for name in ("transformers", "quantization", "tools", "capi/libonnxruntime.so")
)
"""What inference from Python does not load (the library is for programs in C)."""


class EmulatorError(EdgeSightError):
    """The emulated computer did not start, or ended early."""


@dataclass(frozen=True)
class Guest:
    """What is booted.

    Attributes:
        kernel: A Linux kernel for arm64.
        root: The file system, a cpio archive.
        onnxruntime: Version in it.
    """

    kernel: Path
    root: Path
    onnxruntime: str


def cache_folder() -> Path:
    """Returns where things are kept that can be made again: ``EDGESIGHT_CACHE``, else XDG's."""
    own = os.environ.get(CACHE_VARIABLE)
    if own:
        return Path(own).absolute()
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(base) / "edgesight"


def find_qemu() -> Path:
    """Returns the emulator.

    Raises:
        MissingExtraError: It is not installed.
    """
    found = shutil.which(QEMU)
    if found is None:
        message = (
            f"expected {QEMU} to count another core's instructions, found none on the PATH; "
            "apt-get install qemu-system-arm"
        )
        raise MissingExtraError(message)
    return Path(found)


@functools.lru_cache(maxsize=4)
def qemu_version(qemu: Path) -> str:
    """Returns the emulator's version, as ``7.2.22``.

    Raises:
        EmulatorError: It does not say.
    """
    done = subprocess.run([qemu, "--version"], capture_output=True, text=True, check=False)
    found = re.search(r"version (\d[\w.]*)", done.stdout)
    if found is None:
        message = f"{qemu}: expected a version, found {done.stdout[:80]!r}; install it again"
        raise EmulatorError(message)
    return found[1]


def find_guest() -> Guest | None:
    """Returns the guest for this ONNX Runtime version if it has been made."""
    folder = _guest_folder()
    try:
        facts = json.loads((folder / "guest.json").read_text())
        return Guest(folder / "kernel", folder / "root.cpio", str(facts["onnxruntime"]))
    except (OSError, ValueError, KeyError):
        return None


def _guest_folder() -> Path:
    return cache_folder() / f"arm64-{FORMAT}-ort{importlib.metadata.version('onnxruntime')}"


def make_guest(*, progress: bool = True) -> Guest:
    """Fetches and packs the guest, about 60 MB of downloads; one that is there is returned.

    Raises:
        MissingExtraError: apt, dpkg or pip is missing.
        DownloadError: A package cannot be had.
        OutputError: The cache folder cannot be written.
    """
    there = find_guest()
    if there is not None:
        return there
    for tool in ("apt-get", "apt-cache", "dpkg-deb"):
        if shutil.which(tool) is None:
            message = (
                f"expected {tool} to fetch an arm64 Debian, found none on the PATH; count on a "
                f"Debian machine, or copy its {CACHE_VARIABLE} folder ({cache_folder()}) here"
            )
            raise MissingExtraError(message)
    folder = _guest_folder()
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".arm64-", dir=folder.parent) as work:
            _make(Path(work), progress)
            if folder.exists():  # a broken one, or another process was faster
                shutil.rmtree(folder)
            (Path(work) / "guest").rename(folder)
    except OSError as error:
        message = (
            f"cannot write {folder}: {error.strerror or error}; free space, or set "
            f"{CACHE_VARIABLE} to another folder"
        )
        raise OutputError(message) from error
    made = find_guest()
    if made is None:
        message = f"{folder}: expected a guest, found none; run it again"
        raise OutputError(message)
    return made


def _make(work: Path, progress: bool) -> None:
    """Makes ``guest`` in a folder: kernel, root.cpio, guest.json."""
    out = work / "guest"
    out.mkdir()
    steps = tqdm(total=4, desc="emulated Cortex, once", unit="step", disable=not progress)
    with steps:
        packages, kernel = _fetch_packages(work, steps)
        python = _python_version(packages)
        wheels = _fetch_wheels(work / "wheels", python)
        steps.update()
        shutil.copyfile(_kernel_in(kernel, work / "kernel"), out / "kernel")
        with (out / "root.cpio").open("wb") as file, CpioWriter(file) as archive:
            for name in MERGED:
                archive.link(name, f"usr/{name}")
            guest = Path(__file__).with_name("cost_guest.py").read_text()
            text = f"#!/usr/bin/python{python}\n{guest}"
            archive.file("init", text.encode(), executable=True)
            for package in packages:
                command = ["dpkg-deb", "--fsys-tarfile", str(package)]
                done = subprocess.run(command, capture_output=True, check=False)
                if done.returncode:
                    message = f"{package.name}: cannot be unpacked; run it again"
                    raise DownloadError(message)
                archive.tar(io.BytesIO(done.stdout), UNUSED)
            for wheel in wheels:
                with wheel.open("rb") as source:
                    archive.zip(source, "opt/site", UNUSED_WHEEL)
        steps.update()
    versions = {wheel.name.split("-")[0]: wheel.name.split("-")[1] for wheel in wheels}
    (out / "guest.json").write_text(json.dumps({**versions, "python": python}))


def _fetch_packages(work: Path, steps: tqdm[None]) -> tuple[list[Path], Path]:
    """Returns Debian packages of Python with all that it needs, and of a kernel."""
    for name in ("lists/partial", "cache/archives/partial", "log", "kernel"):
        (work / name).mkdir(parents=True)
    (work / "status").touch()  # nothing is installed, so everything needed is fetched
    config = work / "apt.conf"
    config.write_text(
        f'APT::Architecture "arm64"; APT::Architectures {{ "arm64"; }};\n'
        f'Dir::State "{work}"; Dir::State::status "{work}/status"; Dir::Log "{work}/log";\n'
        f'Dir::State::lists "{work}/lists"; Dir::Cache "{work}/cache";\n'
        'APT::Sandbox::User ""; APT::Install-Recommends "false"; Acquire::Languages "none";\n'
    )
    env = os.environ | {"APT_CONFIG": str(config), "LC_ALL": "C"}
    what = "the packages of Debian for arm64 by this machine's apt sources"
    _run(["apt-get", "-q", "update"], work, env, what)
    steps.update()
    listed = _run(["apt-cache", "depends", KERNEL], work, env, what)
    names = re.findall(r"^\s*Depends: (\S+)", listed, re.MULTILINE)
    if not names:
        message = f"expected {what}, found no {KERNEL}; use Debian's sources (deb ... main)"
        raise DownloadError(message)
    _run(["apt-get", "-q", "-y", "--download-only", "install", *PACKAGES], work, env, what)
    _run(["apt-get", "-q", "download", names[0]], work / "kernel", env, what)
    steps.update()
    return sorted((work / "cache/archives").glob("*.deb")), next((work / "kernel").glob("*.deb"))


def _python_version(packages: Sequence[Path]) -> str:
    for package in packages:
        found = re.fullmatch(r"python(3\.\d+)-minimal_.*", package.name)
        if found is not None:
            return found[1]
    message = "expected Debian's python3 among its packages, found none; run it again"
    raise DownloadError(message)


def _kernel_in(package: Path, folder: Path) -> Path:
    """Unpacks a kernel's package and returns the kernel."""
    _run(["dpkg-deb", "-x", str(package), str(folder)], folder, os.environ, "a kernel")
    found = sorted((folder / "boot").glob("vmlinuz-*"))
    if not found:
        message = f"{package.name}: expected boot/vmlinuz-*, found none; run it again"
        raise DownloadError(message)
    return found[0]


def _fetch_wheels(folder: Path, python: str) -> list[Path]:
    """Returns aarch64 wheels; ONNX Runtime's version is this machine's if there is one."""
    folder.mkdir()
    pip = [sys.executable, "-m", "pip"]
    if subprocess.run([*pip, "--version"], capture_output=True, check=False).returncode:
        message = f"expected pip for {sys.executable}, found none; python -m ensurepip"
        raise MissingExtraError(message)
    command = [*pip, "download", "-q", "--no-deps", "--only-binary=:all:", "--dest", str(folder)]
    command += ["--python-version", python, "--implementation", "cp"]
    for tag in TAGS:
        command += ["--platform", tag]
    own = f"onnxruntime=={importlib.metadata.version('onnxruntime')}"
    env = os.environ | {"PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    what = "the aarch64 wheels of onnxruntime and numpy by pip"
    try:
        _run([*command, own, "numpy"], folder, env, what)
    except DownloadError:  # this machine's version has no wheel for the guest's Python
        _run([*command, *WHEELS], folder, env, what)
    return sorted(folder.glob("*.whl"))


def _run(command: list[str], folder: Path, env: Mapping[str, str], what: str) -> str:
    """Runs a command and returns what it says.

    Raises:
        DownloadError: It failed.
    """
    done = subprocess.run(
        command, cwd=folder, env=env, capture_output=True, text=True, check=False, errors="replace"
    )
    output = done.stdout + done.stderr
    trouble = [
        line for line in output.splitlines() if line.startswith(("E:", "W: Failed", "ERROR"))
    ]
    if done.returncode or (trouble and "update" in command):
        tail = (trouble or output.splitlines() or ["nothing"])[-1]
        message = (
            f"expected {what}, found: {tail[:200]}; check the network and {command[0]}'s sources"
        )
        raise DownloadError(message)
    return done.stdout


def boot(guest: Guest, core: str, files: Mapping[str, bytes], silence_s: float) -> Iterator[str]:
    """Boots the guest with files laid over its own and yields the lines of its console.

    It ends with the guest. Its network is off, and nothing of this machine is shared with it.

    Args:
        guest: What to boot.
        core: QEMU's name of a core, as cortex-a76.
        files: Path in the guest to content.
        silence_s: Longest time without a line that starts with ``MARK``, in seconds.

    Raises:
        MissingExtraError: QEMU is not installed.
        EmulatorError: It was silent for too long.
        OutputError: There is no place for what it starts from.
    """
    qemu = find_qemu()
    with tempfile.TemporaryDirectory(prefix="edgesight-") as folder:
        initrd = Path(folder) / "initrd"
        try:
            with initrd.open("wb") as out:
                with guest.root.open("rb") as root:
                    shutil.copyfileobj(root, out, 1 << 20)
                with CpioWriter(out) as archive:  # the kernel unpacks one archive over the other
                    for name, content in files.items():
                        archive.file(name, content)
        except OSError as error:
            reason = error.strerror or str(error)
            message = f"cannot write {initrd}: {reason}; free space, or set TMPDIR to another place"
            raise OutputError(message) from error
        command = [str(qemu), "-M", "virt", "-cpu", core, "-smp", "1", "-m", str(MEMORY_MB)]
        command += ["-icount", "shift=0,sleep=off", "-net", "none", "-no-reboot"]
        command += ["-display", "none", "-monitor", "none", "-serial", "stdio"]
        command += ["-kernel", str(guest.kernel), "-initrd", str(initrd)]
        command += ["-append", "console=ttyAMA0 rdinit=/init quiet loglevel=3 panic=1"]
        setpriv = shutil.which("setpriv")
        if setpriv is not None:  # it must not outlive us if we are killed
            command = [setpriv, "--pdeathsig", "KILL", *command]
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        try:
            yield from _lines(process, silence_s)
        finally:
            with contextlib.suppress(OSError):
                process.kill()
            process.wait()
            if process.stdout is not None:
                process.stdout.close()


def _lines(process: subprocess.Popen[bytes], silence_s: float) -> Iterator[str]:
    assert process.stdout is not None
    pipe = process.stdout.fileno()
    held, heard = b"", time.monotonic()
    while True:
        ready, _, _ = select.select([pipe], [], [], max(0.0, heard + silence_s - time.monotonic()))
        if not ready:
            message = (
                f"expected an answer within {silence_s:.0f} s, found none; --timeout gives more"
            )
            raise EmulatorError(message)
        block = os.read(pipe, 1 << 16)
        if not block:
            break
        *lines, held = (held + block).split(b"\n")
        for line in lines:
            if line.startswith(MARK.encode()):
                heard = time.monotonic()
            yield line.decode(errors="replace").rstrip("\r")
    if held:
        yield held.decode(errors="replace")
