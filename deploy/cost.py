"""The command ``cost``: instructions per frame on another processor core, without the board."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..models.arguments import whole_from
from ..models.core_costs import CORES
from ..models.cost import RUNS, SILENCE_S, Cost, count
from ..models.emulator import cache_folder, find_qemu, make_guest, qemu_version
from ..models.errors import InputError, ModelFileError
from ..models.machine import int8_advice
from ..models.zoo import MODEL_HELP, model_path

DESCRIPTION = """Count the instructions of one frame on a Raspberry Pi's core (Pi 5: cortex-a76,
Pi 4: cortex-a72) with ONNX Runtime in an emulator, one thread, to rank variants without the board.
The first time it fetches a small arm64 Debian (about 60 MB) with apt and pip, without being root.
Instructions are not milliseconds: caches and bandwidth are left out."""
EXAMPLE = "edgesight cost shipped-float shipped --core cortex-a76 --core cortex-a72"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the command's arguments."""
    parser.add_argument(
        "models", metavar="MODEL", nargs="*", help=f"{MODEL_HELP}; ratios are to the first one"
    )
    parser.add_argument(
        "--core",
        action="append",
        choices=CORES,
        help="core to emulate (default cortex-a76); may be given again",
    )
    parser.add_argument(
        "--layers",
        type=whole_from(1),
        nargs="?",
        const=10,
        metavar="N",
        help="also list the N most expensive operators (default 10)",
    )
    parser.add_argument(
        "--runs", type=whole_from(1), default=RUNS, metavar="N", help=f"inferences (default {RUNS})"
    )
    parser.add_argument(
        "--timeout",
        type=whole_from(1),
        default=int(SILENCE_S),
        metavar="S",
        help=f"longest that one model may take, in seconds (default {SILENCE_S:.0f})",
    )
    parser.add_argument("--setup", action="store_true", help="only fetch what is needed")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--quiet", action="store_true", help="no progress bars")


def main(args: argparse.Namespace) -> int:
    """Runs the command.

    Returns:
        0 done; 2 if a model could not be counted.
    """
    if not args.models and not args.setup:
        message = "expected a model to count, found none; name one, or --setup to only prepare"
        raise InputError(message)
    if args.setup:
        version = qemu_version(find_qemu())
        guest = make_guest(progress=not args.quiet)
        if not args.models:
            facts = {
                "qemu": version,
                "onnxruntime": guest.onnxruntime,
                "cache": str(cache_folder()),
            }
            ready = ", ".join(f"{name} {value}" for name, value in facts.items())
            print(json.dumps(facts) if args.json else f"ready: {ready}")
            return 0
    paths = [model_path(name) for name in args.models]
    tables = {
        core: count(
            paths,
            core,
            runs=args.runs,
            layers=args.layers is not None,
            timeout_s=args.timeout,
            progress=not args.quiet,
        )
        for core in dict.fromkeys(args.core or CORES[:1])
    }
    if args.json:
        print(json.dumps(as_json(paths, tables)))
    else:
        print("\n\n".join(as_text(paths, core, rows, args.layers) for core, rows in tables.items()))
    failed = any(isinstance(row, ModelFileError) for rows in tables.values() for row in rows)
    return 2 if failed else 0


def as_json(paths: list[Path], tables: dict[str, list[Cost | ModelFileError]]) -> dict[str, Any]:
    """Returns everything that was counted, JSON-ready."""
    cores = []
    for core, rows in tables.items():
        found: list[dict[str, Any]] = []
        for path, row, ratio in zip(paths, rows, ratios(rows), strict=True):
            if isinstance(row, Cost):
                found.append({"file": str(path), "ratio": ratio, "error": None, **asdict(row)})
            else:
                found.append({"file": str(path), "ratio": None, "error": str(row)})
        cores.append({"core": core, "int8": int8_advice(core), "models": found})
    return {"cores": cores}


def ratios(rows: list[Cost | ModelFileError]) -> list[float | None]:
    """Returns each row's instructions over the first row's; None where one of them is missing."""
    first = rows[0]
    return [
        row.instructions / first.instructions
        if isinstance(row, Cost) and isinstance(first, Cost)
        else None
        for row in rows
    ]


def as_text(
    paths: list[Path], core: str, rows: list[Cost | ModelFileError], layers: int | None
) -> str:
    """Returns what a person reads about one core."""
    counted = [row for row in rows if isinstance(row, Cost)]
    lines = []
    if counted:
        some = counted[0]
        lines.append(
            f"{core}, ONNX Runtime {some.onnxruntime}, one thread, QEMU {some.qemu}: million "
            "instructions per frame"
        )
    width = max(len(path.name) for path in paths)
    lines.append(f"{'model':{width}}{'M instr.':>10}{'ratio':>8}{'spread':>8}")
    for path, row, ratio in zip(paths, rows, ratios(rows), strict=True):
        if not isinstance(row, Cost):
            lines.append(f"{path.name:{width}}  {row}")
            continue
        shown = "" if ratio is None else f"{ratio:.3f}"
        odd = "" if row.finite else "  its outputs are not finite"
        lines.append(
            f"{path.name:{width}}{row.instructions / 1e6:>10.1f}{shown:>8}"
            f"{100 * row.spread:>6.1f} %{odd}"
        )
        if layers is not None:
            lines += layer_lines(row, layers)
    advice = int8_advice(core)
    if advice:
        lines.append(f"note: {advice}")
    return "\n".join(lines)


def layer_lines(cost: Cost, most: int) -> list[str]:
    """Returns instructions by operator, and the most expensive nodes, as lines."""
    by_op: dict[str, tuple[int, int]] = {}
    for node in cost.nodes:
        times, total = by_op.get(node.op, (0, 0))
        by_op[node.op] = times + 1, total + node.instructions
    ops = sorted(by_op.items(), key=lambda item: -item[1][1])
    lines = ["  by operator: " + ", ".join(f"{n} {op} {t / 1e6:.1f}" for op, (n, t) in ops[:12])]
    for node in sorted(cost.nodes, key=lambda node: -node.instructions)[:most]:
        shape = " ".join("x".join(map(str, shape)) for shape in node.shapes)
        lines.append(f"  {node.instructions / 1e6:>8.2f}  {node.op:20} {shape:16} {node.name}")
    return lines
