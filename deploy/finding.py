"""What the doctor says, and how it looks at a machine: its files, its tools, its Python.

Nothing heavy is imported here: what may be broken is tried in a process of its own, so that an
import that crashes or hangs is a finding and not the doctor's end.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final, Literal, get_args

from ..models.errors import InputError

Severity = Literal["ok", "note", "warning", "error"]
SEVERITIES: Final[tuple[Severity, ...]] = get_args(Severity)
"""The mildest first."""
IMPORT_MAX_S = 60.0
"""One from a slow SD card takes less."""
TOOL_MAX_S = 15.0


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        name: Short, as ``processor`` or ``two OpenCVs``.
        severity: ``error``: edgesight will not run well, or not at all; ``warning``: slower or at
            risk; ``note``: good to know; ``ok``.
        found: What is there.
        why: What it means; empty where nothing is wrong.
        mend: The command that mends it; empty where nothing is to be mended.
    """

    name: str
    severity: Severity
    found: str
    why: str = ""
    mend: str = ""

    @classmethod
    def from_json(cls, value: Any) -> Finding:
        """Returns the finding that ``asdict`` made this of, perhaps on another machine.

        Raises:
            InputError: It is none.
        """
        keys = {"name", "severity", "found", "why", "mend"}
        if (
            not isinstance(value, dict)
            or value.keys() != keys
            or not all(isinstance(text, str) for text in value.values())
            or value["severity"] not in SEVERITIES
        ):
            message = (
                f"expected a finding of edgesight doctor, found {value!a:.80}; "
                "install the same edgesight on both machines"
            )
            raise InputError(message)
        return cls(**value)


def worst(findings: list[Finding]) -> Severity:
    """Returns the gravest severity; ``ok`` of none."""
    return max((f.severity for f in findings), key=SEVERITIES.index, default="ok")


def to_json(findings: list[Finding]) -> dict[str, Any]:
    """Returns findings as they are printed with ``--json``."""
    return {
        "kind": "edgesight.doctor",
        "version": 1,
        "worst": worst(findings),
        "findings": [asdict(finding) for finding in findings],
    }


def from_json(text: str) -> list[Finding]:
    """Returns the findings that ``edgesight doctor --json`` printed on another machine.

    Raises:
        InputError: The text is something else.
    """
    with contextlib.suppress(ValueError, RecursionError):
        value = json.loads(text)
        if (
            isinstance(value, dict)
            and value.get("kind") == "edgesight.doctor"
            and isinstance(value.get("findings"), list)
        ):
            return [Finding.from_json(finding) for finding in value["findings"]]
    message = (
        f"expected what edgesight doctor --json prints, found {text[:80]!a}; "
        "run edgesight doctor on the board to see what it says"
    )
    raise InputError(message)


@dataclass(frozen=True)
class Ran:
    """How a command ended.

    Attributes:
        code: Its exit code, negative for a signal; None: it hung, or could not be started.
        out: Of its standard output.
        err: Of its standard error.
    """

    code: int | None
    out: str = ""
    err: str = ""

    @property
    def signal(self) -> str | None:
        """Name of the signal that ended it, as ``SIGILL``."""
        if self.code is None or self.code >= 0:
            return None
        with contextlib.suppress(ValueError):
            return signal.Signals(-self.code).name
        return f"signal {-self.code}"

    @property
    def how(self) -> str:
        """How it ended, in words."""
        if self.code is None:
            return self.err or "gives no answer"
        if self.signal == "SIGILL":
            return "dies of an illegal instruction (SIGILL)"
        return f"dies of {self.signal}" if self.signal else f"ends with exit code {self.code}"

    @property
    def answer(self) -> dict[str, Any]:
        """The JSON object in the last line that it printed; empty if there is none."""
        with contextlib.suppress(ValueError, RecursionError, LookupError):
            value = json.loads(self.out.strip().splitlines()[-1])
            if isinstance(value, dict):
                return value
        return {}


FACTS = """
import importlib.machinery, json, os, platform, struct, sys
import importlib.metadata as metadata
def places(name):
    found = []
    for entry in sys.path:
        try:
            spec = importlib.machinery.PathFinder.find_spec(name, [entry])
        except Exception:
            continue
        if spec is not None and (spec.origin or "") and entry not in found:
            found.append(entry)
    return found
packages = []
for one in metadata.distributions():
    try:
        name, version = one.metadata["Name"], one.version
        item = [name.lower().replace("_", "-"), version, os.path.normpath(one.locate_file(""))]
    except Exception:
        continue
    if item not in packages:
        packages.append(item)
print(json.dumps({
    "version": list(sys.version_info[:3]), "bits": 8 * struct.calcsize("P"),
    "machine": platform.machine(), "libc": platform.libc_ver()[0],
    "prefix": sys.prefix, "base": sys.base_prefix, "free_threaded": "t" in sys.abiflags,
    "packages": packages, "places": {name: places(name) for name in sys.argv[1:]},
}))
"""
WATCHED = (
    *("numpy", "cv2", "onnxruntime", "simplejpeg", "picamera2", "libcamera", "pip"),
    *("prometheus_client", "segno", "starlette", "tqdm", "uvicorn", "tomli"),
)
"""Modules whose places are asked for."""


@dataclass
class Probe:
    """A machine as the doctor sees it.

    Args:
        root: Where ``proc``, ``sys``, ``dev``, ``etc`` and ``usr`` are.
        python: The Python that edgesight runs in.
        environ: The environment; its ``PATH`` says where tools are.
        uid: Of the user who will run edgesight.
        groups: Numbers of that user's groups.
        now_s: Seconds since 1970.
        import_max_s: So long an import may take.
    """

    root: Path = Path("/")
    python: Path = field(default_factory=lambda: Path(sys.executable))
    environ: Mapping[str, str] = field(default_factory=lambda: dict(os.environ))
    uid: int = field(default_factory=os.getuid)
    groups: frozenset[int] = field(
        default_factory=lambda: frozenset({os.getgid(), *os.getgroups()})
    )
    now_s: float = field(default_factory=time.time)
    import_max_s: float = IMPORT_MAX_S

    def text(self, path: str | Path) -> str | None:
        """Returns what a file below the root holds, without its end; None if it cannot be read."""
        try:
            return (self.root / path).read_text(errors="replace").strip("\0\n ")
        except OSError:
            return None

    def glob(self, pattern: str) -> list[Path]:
        """Returns the files below the root that a pattern names, sorted."""
        try:
            return sorted(self.root.glob(pattern))
        except OSError:
            return []

    def tool(self, name: str) -> str | None:
        """Returns where a program is; also in ``sbin``, which a user's PATH may lack."""
        own = [str(self.root / folder) for folder in ("usr/bin", "usr/sbin")]
        return shutil.which(name, path=os.pathsep.join([self.environ.get("PATH", ""), *own]))

    def run(self, *command: str, time_max_s: float = TOOL_MAX_S) -> Ran:
        """Runs a command to its end, or ends it with all that it started."""
        pipe, nowhere = subprocess.PIPE, subprocess.DEVNULL
        try:
            child = subprocess.Popen(
                command, stdin=nowhere, stdout=pipe, stderr=pipe, text=True, errors="replace",
                env=dict(self.environ), cwd=os.sep, start_new_session=True,
            )  # fmt: skip
        except OSError as error:
            return Ran(None, err=f"cannot be started: {error.strerror}")
        with child:
            try:
                out, err = child.communicate(timeout=time_max_s)
            except subprocess.TimeoutExpired:
                return Ran(None, err=f"hangs ({time_max_s:.0f} s)")
            finally:
                with contextlib.suppress(OSError):
                    os.killpg(child.pid, signal.SIGKILL)
        return Ran(child.returncode, out, err)

    def run_python(self, script: str, *words: str) -> Ran:
        """Runs a script in edgesight's Python; it leaves no memory image if it crashes."""
        quiet = "import resource; resource.setrlimit(resource.RLIMIT_CORE, (0, 0))\n"
        return self.run(
            str(self.python), "-c", quiet + script, *words, time_max_s=self.import_max_s
        )

    @functools.cached_property
    def facts(self) -> dict[str, Any]:
        """What edgesight's Python is and has; empty if it does not even start."""
        return self.run_python(FACTS, *WATCHED).answer

    @functools.cached_property
    def processor_text(self) -> str:
        """What Linux says of the processor."""
        return self.text("proc/cpuinfo") or ""

    @functools.cached_property
    def board(self) -> str:
        """Name of the board, as ``Raspberry Pi 5 Model B Rev 1.0``; empty where it has none."""
        places = ("proc/device-tree/model", "sys/firmware/devicetree/base/model")
        return next((text for place in places if (text := self.text(place))), "")

    @property
    def is_pi(self) -> bool:
        """Whether this is a Raspberry Pi."""
        return "raspberry pi" in self.board.lower()

    @property
    def is_jetson(self) -> bool:
        """Whether this is one of NVIDIA's boards."""
        known = (self.root / "etc/nv_tegra_release").exists()
        return known or any(word in self.board.lower() for word in ("jetson", "nvidia"))

    def packages(self, *names: str) -> list[tuple[str, str, str]]:
        """Returns name, version and folder of the installed packages of these names."""
        return [(n, v, p) for n, v, p in self.facts.get("packages", []) if n in names]

    def places(self, module: str) -> list[str]:
        """Returns the folders that hold a module; the first is the one that is imported."""
        return list(self.facts.get("places", {}).get(module, []))

    @property
    def in_venv(self) -> bool:
        """Whether edgesight's Python is a virtual environment's."""
        return bool(self.facts) and self.facts["prefix"] != self.facts["base"]

    def pip(self, *words: str) -> str:
        """Returns the command that calls this Python's pip."""
        return shlex.join([str(self.python), "-m", "pip", *words])
