"""The ``doctor`` command: what is wrong with a board before anything fails.

It works where NumPy, OpenCV or ONNX Runtime are broken or missing: it imports none of them.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

from .. import __version__
from ..models.errors import InputError, ModelFileError
from ..models.files import is_file
from ..models.trial_run import trial_run
from ..models.zoo import MODEL_HELP, model_path
from .doctor_board import examine_board
from .doctor_camera import examine_camera
from .doctor_cpu import core_name, examine_cpu
from .doctor_packages import examine_packages
from .finding import Finding, Probe, to_json, worst

__all__ = ["Finding", "Probe", "examine", "table", "to_json", "worst"]

DESCRIPTION = """\
Says what is wrong with this board, and the command that mends it: processor and system, Python
packages, power, heat, memory, disk, clock, cameras. Nothing is changed. Exit code 1 if something
keeps edgesight from running."""
EXAMPLE = "edgesight doctor --camera 0"
COLORS = {"ok": "32", "note": "36", "warning": "33", "error": "31;1"}
"""Of a terminal."""
WIDTH_MIN, WIDTH_MAX = 60, 110
NAME_WIDTH = 20


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's arguments."""
    parser.add_argument(
        "--model", metavar="FILE", help=f"also run this model here: {MODEL_HELP}"
    )  # fmt: skip
    parser.add_argument(
        "--camera",
        metavar="DEV",
        help="this camera must be there and free: a number, a device file, or picamera",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead")


def main(args: argparse.Namespace) -> int:
    """Runs the command; returns the exit code."""
    model = None if args.model is None else model_path(args.model)
    if model is not None and not is_file(model):
        message = (
            f"--model {model}: expected a model file, found none; give the path of an ONNX file"
        )
        raise InputError(message)
    probe = Probe()
    findings = examine(probe, model=model, camera=args.camera)
    if args.json:
        print(json.dumps(to_json(findings)))
    else:
        print(table(findings, title(probe), colors=_wants_colors()))
    return int(worst(findings) == "error")


def examine(
    probe: Probe | None = None, *, model: Path | None = None, camera: str | None = None
) -> list[Finding]:
    """Looks at everything; changes nothing.

    Args:
        probe: The machine; default this one.
        model: Also loaded and run.
        camera: The camera that must be there and free.
    """
    probe = probe or Probe()
    parts: tuple[tuple[str, Callable[[], list[Finding]]], ...] = (
        ("processor", lambda: examine_cpu(probe)),
        ("packages", lambda: examine_packages(probe)),
        ("board", lambda: examine_board(probe)),
        ("cameras", lambda: examine_camera(probe, camera)),
    )
    findings = list[Finding]()
    for name, part in parts:
        try:
            findings += part()
        except OSError as error:  # a file system that does not answer must not hide the rest
            why = "this part could not be looked at to its end"
            findings.append(Finding(name, "warning", str(error), why, "sudo dmesg | tail -30"))
    if model is not None:
        findings.append(_model(model, findings))
    return findings


def _model(path: Path, findings: list[Finding]) -> Finding:
    """Runs a model in a process of its own, if the packages are whole."""
    broken = [
        f.name
        for f in findings
        if f.severity == "error" and f.name in ("python", "numpy", "opencv", "onnxruntime")
    ]
    if broken:
        why = f"without {' and '.join(broken)} no model runs"
        return Finding("model", "warning", f"{path.name} not tried", why, "edgesight doctor")
    try:
        trial_run(path)
    except ModelFileError as error:
        why = "a run would refuse it, or die of it"
        return Finding("model", "error", str(error), why, f"edgesight inspect {path}")
    return Finding("model", "ok", f"{path.name} runs")


def title(probe: Probe) -> str:
    """Returns one line that says which machine it is."""
    system = ""
    for line in (probe.text("etc/os-release") or "").splitlines():
        if line.startswith("PRETTY_NAME="):
            system = line.partition("=")[2].strip('"')
    parts = [probe.board, core_name(probe), f"{os.cpu_count()} cores", system]
    return f"edgesight {__version__} on {', '.join(part for part in parts if part)}"


def table(findings: list[Finding], heading: str, *, colors: bool = False) -> str:
    """Returns findings as a table for people: a line each, and what to do where there is something.

    Args:
        findings: In their order.
        heading: The first line.
        colors: Whether a terminal shows it.
    """
    width = min(max(_columns(), WIDTH_MIN), WIDTH_MAX)
    indent = " " * 10
    lines = [heading, ""]
    for finding in findings:
        word = finding.severity.ljust(8)
        if colors:
            word = f"\x1b[{COLORS[finding.severity]}m{word}\x1b[0m"
        text = _printable(finding.found)
        left = 10 + NAME_WIDTH + 1
        wrapped = textwrap.wrap(text, max(width - left, 30), break_on_hyphens=False) or [""]
        lines.append(f"{word}  {finding.name:{NAME_WIDTH}} {wrapped[0]}")
        lines += [" " * left + more for more in wrapped[1:]]
        if finding.why:
            why = _printable(finding.why)
            lines += textwrap.wrap(
                why, width, initial_indent=indent, subsequent_indent=indent, break_on_hyphens=False
            )
        if finding.mend:
            lines.append(f"{indent}mend: {_printable(finding.mend)}")  # whole: it is copied
    counts = [
        f"{number} {word}{'s' * (number != 1 and word != 'ok')}"
        for word in reversed(COLORS)
        if (number := sum(f.severity == word for f in findings)) or word == "error"
    ]
    return "\n".join([*lines, "", ", ".join(counts)])


def _printable(text: str) -> str:
    """Returns text from outside without what would command the terminal."""
    return "".join(c if c.isprintable() else " " for c in text)


def _columns() -> int:
    try:
        return os.get_terminal_size(sys.stdout.fileno()).columns
    except (OSError, ValueError):
        return WIDTH_MAX


def _wants_colors() -> bool:
    return sys.stdout.isatty() and "NO_COLOR" not in os.environ and os.environ.get("TERM") != "dumb"
