r"""Breaks things around and inside a run of the real command, one at a time, and sees if it lives.

    pip install -e '.[dev]' && apt-get install mosquitto python3-gi gir1.2-gst-rtsp-server-1.0 \
        gstreamer1.0-plugins-good gstreamer1.0-plugins-ugly
    python benchmarks/faults.py [--only NAME...] [--out FILE.json]

Each case starts ``edgesight run`` with the shipped model, a camera on loopback and a viewer, brings
one fault about, and takes it away. Survived means: the process is there; frames went on meanwhile
where they can, and within 10 s after; the screen said what was wrong while it was; no traceback;
threads and open files as before; and SIGTERM ends it with a summary and the right exit code.
Exit code 1 if one was not survived. The cases are in fault_cases.py and
fault_cases_inside.py.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import fault_cases  # noqa: F401 - enters its cases
import fault_cases_inside  # noqa: F401 - so does this
from edgesight.models.machine import machine
from fault_kit import Hurt
from fault_trial import CASES, HIDDEN, Trial


def survived(name: str) -> dict[str, Any]:
    """Runs one case; returns its row."""
    began = time.monotonic()
    title, case = {**CASES, **HIDDEN}[name]
    with tempfile.TemporaryDirectory(prefix="edgesight-faults-") as folder:
        trial = Trial(Path(folder))
        problems: list[str] = []
        try:
            case(trial)
            trial.finish()
        except Hurt as error:
            problems.append(str(error))
        except Exception as error:  # of this benchmark, or of a run that answers nonsense
            problems.append(f"the case could not be run to its end: {error!r}")
        finally:
            trial.close()
    app = trial.app
    problems += app.problems if app else []
    return {
        "name": name,
        "fault": title,
        "survived": not problems,
        "frames_meanwhile": app.flowed if app else None,
        "back_s": app.back_s if app else None,
        "said": app.said if app else [],
        "exit_code": app.process.returncode if app else None,
        "problems": problems,
        "took_s": round(time.monotonic() - began, 1),
    }


def shown(row: dict[str, Any]) -> str:
    """Returns a row for people."""
    back = "-" if row["back_s"] is None else f"{row['back_s']:.1f}"
    says = " | ".join(row["said"]) or "nothing"
    lines = [
        f"{row['name']:20} {'yes' if row['survived'] else 'NO':4} {back:>5}  {row['fault']}",
        f"{'':32}said: {says[:240]}",
    ]
    lines += [f"{'':32}PROBLEM: {problem}" for problem in row["problems"]]
    return "\n".join(lines)


def main() -> int:
    """Prints a row for each case as it ends."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--only", nargs="+", choices=[*CASES, *HIDDEN], metavar="NAME")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--list", action="store_true", help="names the cases, and ends")
    args = parser.parse_args()
    if args.list:
        print("\n".join(f"{name:20} {title}" for name, (title, _) in CASES.items()))
        return 0
    names = args.only or list(CASES)
    print(f"{'case':20} {'lived':4} {'back':>5}  (seconds until frames flowed again)")
    rows = []
    for name in names:
        rows.append(survived(name))
        print(shown(rows[-1]), flush=True)
    lost = [row["name"] for row in rows if not row["survived"]]
    print(f"{len(rows) - len(lost)} of {len(rows)} survived" + (f"; not: {lost}" if lost else ""))
    if args.out:
        result = {"cases": rows, "machine": machine()}
        args.out.write_text(json.dumps(result, indent=2) + "\n")
    return int(bool(lost))


if __name__ == "__main__":
    sys.exit(main())
