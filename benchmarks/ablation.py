"""Every technique alone and the shipped detector step by step: AP, cost and size, in one table.

    python benchmarks/ablation.py                       # the techniques
    python benchmarks/ablation.py --recipe models/zoo/edgesight_nano.toml   # a recipe, step by step

Each row is a recipe that ``edgesight compress`` runs; its result is measured on ``coco-val``, with
a 95 % interval and the paired loss against the original, its instructions are counted by
``edgesight cost`` where the emulator is at hand, and it is timed in turn with the original.
Finished recipes are not run again. ``--plot`` draws AP over instructions, of all tables in
``--out``.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import statistics
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from compare_int8 import CORES, instructions
from edgesight.compression.latency import latency, openvino_latency
from edgesight.compression.pipeline import run_recipe
from edgesight.compression.recipe import Recipe, make_recipe, read_recipe
from edgesight.models.dataset import Dataset, open_dataset
from edgesight.models.detector import OnnxDetector
from edgesight.models.evaluate import Evaluation, evaluate_detector
from edgesight.models.files import sha256, write_json
from edgesight.models.graph import load_model, node_macs
from edgesight.models.machine import machine

PRUNE: dict[str, Any] = {"kind": "prune", "macs_ratio": 0.8, "iterations": 1}
SPARSIFY: dict[str, Any] = {"kind": "sparsify", "sparsity": 0.5}
FACTORISE: dict[str, Any] = {"kind": "factorise", "macs_ratio": 0.9}
DISTILL: dict[str, Any] = {"kind": "distill", "photos": 2000}
QUANTIZE: dict[str, Any] = {"kind": "quantize"}
OTHER = "yolox_nano_416.onnx"
"""The teacher of another architecture, beside the data."""
TECHNIQUES: dict[str, list[dict[str, Any]]] = {
    "INT8": [QUANTIZE],
    "INT8, what it harms in 16 bits": [QUANTIZE | {"fallback": "int16"}],
    "FP16 weights": [{"kind": "half"}],
    "ReLU": [{"kind": "activations"}],
    "ReLU, INT8": [{"kind": "activations"}, QUANTIZE],
    "prune 80 %": [PRUNE],
    "prune 80 % by L1": [PRUNE | {"criterion": "l1"}],
    "prune 80 % by L2": [PRUNE | {"criterion": "l2"}],
    "prune 80 % by Taylor": [PRUNE | {"criterion": "taylor"}],
    "prune 80 % by LAMP": [PRUNE | {"criterion": "lamp"}],
    "prune 80 % by FPGM": [PRUNE | {"criterion": "fpgm"}],
    "prune 80 %, uniform": [PRUNE | {"allocation": "uniform"}],
    "prune 80 %, global": [PRUNE | {"allocation": "global"}],
    "prune 80 %, in 3 parts": [PRUNE | {"iterations": 3}],
    "prune 80 % on cortex-a76": [
        {"kind": "prune", "cost": "cortex-a76", "cost_ratio": 0.8, "iterations": 1}
    ],
    "factorise 90 %": [FACTORISE],
    "factorise 90 % by SVD": [FACTORISE | {"methods": ["svd"]}],
    "factorise 90 % on the weights alone": [FACTORISE | {"data_aware": False}],
    "factorise where it pays on cortex-a76": [{"kind": "factorise"}],
    "sparsify 50 % by magnitude": [SPARSIFY],
    "sparsify 50 % by magnitude, no refit": [SPARSIFY | {"refit": False}],
    "sparsify 50 % by gradient": [SPARSIFY | {"method": "gradient"}],
    "sparsify 50 % by Taylor": [SPARSIFY | {"method": "taylor"}],
    "sparsify 50 %, global": [SPARSIFY | {"scope": "global"}],
    "sparsify by threshold": [{"kind": "sparsify", "method": "threshold", "threshold": 0.5}],
    "sparsify 2:4": [{"kind": "sparsify", "pattern": "2:4"}],
    "prune 80 %, distil": [PRUNE, DISTILL],
    "prune 80 %, distil, no labels": [PRUNE, DISTILL | {"labels": "none"}],
    "prune 80 %, distil, YOLOX too": [PRUNE, DISTILL | {"teacher": ["self", OTHER]}],
    "prune 80 %, ReLU, distil, INT8": [PRUNE, {"kind": "activations"}, DISTILL, QUANTIZE],
    "INT8, refined": [QUANTIZE | {"refine": 1600}],
    "4-bit weights, refined": [QUANTIZE | {"weights": 4, "refine": 1600}],
    "2-bit weights, refined": [QUANTIZE | {"weights": 2, "refine": 1600}],
    "1-bit weights, refined": [QUANTIZE | {"weights": 1, "refine": 1600}],
}
"""Title of a row -> the steps of its recipe, on NanoDet-Plus-m."""
TABLE = "techniques"
ROUNDS = 30
"""Timed runs of each file."""


def technique(title: str, options: argparse.Namespace) -> Recipe:
    """Returns the recipe of one row."""
    shared = options.shared.resolve()
    steps = [dict(step) for step in TECHNIQUES[title]]
    for step in steps:
        if OTHER in step.get("teacher", ()):
            step["teacher"] = ["self", str(shared / "weights" / OTHER)]
    folder = re.sub(r"\W+", "_", title)  # not its number: rows come and go
    values = {
        "version": 1,
        "out": str(options.out.resolve() / folder),
        "model": {
            "name": "nanodet_plus_m",
            "weights": str(shared / "weights/nanodet_plus_m_416.onnx"),
        },
        "data": {
            "photos": [str(shared / "data/coco-train"), str(shared / "data/unlabelled")],
            "eval": str(shared / "data/coco-val"),
            "hold_out": 5,
            "step_photos": 0,
        },
        "steps": steps,
    }
    return make_recipe(values, Path.cwd())


def prefixes(recipe: Recipe) -> list[tuple[str, Recipe]]:
    """Returns a recipe cut off behind each of its steps that change the model."""
    found = []
    for count, step in enumerate(recipe.steps, 1):
        if step.kind == "verify":
            continue
        data = recipe.data.model_copy(update={"step_photos": 0})
        part = recipe.model_copy(update={"steps": recipe.steps[:count], "data": data})
        found.append((f"{count} {step.kind}", part))
    return found


def measure(path: Path, check: Dataset, before: Evaluation | None) -> tuple[dict[str, Any], Any]:
    """Returns one row's figures and its evaluation."""
    found = evaluate_detector(OnnxDetector(path), check, title=path.stem)
    own = found.interval()
    row: dict[str, Any] = {
        "ap": [own.value, own.low, own.high],
        "lost": None,
        "bytes": path.stat().st_size,
        "macs": sum(node_macs(load_model(path)).values()),
        "ms": found.ms_per_photo,
        "sha256": sha256(path),
    }
    if before is not None:
        lost = before.minus(found)
        row["lost"] = [lost.value, lost.low, lost.high]
    return row, found


def add_instructions(rows: Sequence[dict[str, Any]], folder: Path) -> None:
    """Adds what each file costs on the cores; None where it cannot be counted."""
    for core, counts in instructions([folder / row["file"] for row in rows]).items():
        for row, number in zip(rows, counts, strict=True):
            row[core] = number


def add_times(rows: Sequence[dict[str, Any]], folder: Path, photo: Dataset) -> None:
    """Adds milliseconds here as a part of the first file's, in ONNX Runtime and in OpenVINO."""
    first = OnnxDetector(folder / rows[0]["file"])
    for row in rows:
        own = OnnxDetector(folder / row["file"])
        for key, timed in (("ort", latency), ("openvino", openvino_latency)):
            times = timed(first, own, photo, ROUNDS)
            row[f"{key}_ratio"] = None if times is None else times.get("ratio")


def as_table(rows: Sequence[dict[str, Any]]) -> str:
    """Returns the rows as Markdown."""
    lines = [
        "| | AP (95 %) | lost (95 %, paired) | MACs (M) | MB | A76 (M instr.) | A72 "
        "| ms, ONNX Runtime | ms, OpenVINO |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        lost = "" if r["lost"] is None else "{:.2f} ({:.2f} to {:.2f})".format(*r["lost"])
        costs = [f"{r[c] / 1e6:.1f}" if r.get(c) else "n/a" for c in CORES]
        costs += [f"{r[k]:.2f}" if r.get(k) else "n/a" for k in ("ort_ratio", "openvino_ratio")]
        lines.append(
            f"| {r['title']} | {r['ap'][0]:.2f} ({r['ap'][1]:.1f} to {r['ap'][2]:.1f}) | {lost} "
            f"| {r['macs'] / 1e6:.0f} | {r['bytes'] / 1e6:.2f} | {' | '.join(costs)} |"
        )
    return "\n".join(lines)


def plot(
    series: dict[str, Sequence[dict[str, Any]]], path: Path, others: Collection[str] = ()
) -> None:
    """Draws AP over instructions on Cortex-A76 (over MACs where they were not counted).

    Args:
        series: Name of each table -> its rows; steps of a recipe are joined by a line.
        path: PNG.
        others: Tables that are not one recipe's steps.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    every = [row for rows in series.values() for row in rows]
    counted = all(row.get(CORES[0]) for row in every)
    key, what = (CORES[0], "instructions on Cortex-A76") if counted else ("macs", "MACs")
    figure, axes = pyplot.subplots(figsize=(11, 7), layout="constrained")
    labels: list[tuple[float, float, float]] = []
    for number, (name, rows) in enumerate(series.items()):
        color, one_by_one = f"C{number}", name not in (TABLE, *others)
        x, ap = [row[key] / 1e6 for row in rows], [row["ap"][0] for row in rows]
        ends = [[row["ap"][0] - row["ap"][1] for row in rows]]
        ends.append([row["ap"][2] - row["ap"][0] for row in rows])
        style: dict[str, Any] = {"fmt": "o-" if one_by_one else "o", "color": color, "label": name}
        axes.errorbar(x, ap, ends, capsize=2, alpha=0.8, elinewidth=0.5, **style)
        for row, *place in zip(rows, x, ap, strict=True):
            where = _free(labels, place[0] + 4, place[1], len(row["title"]))
            axes.annotate(row["title"], place, where, fontsize=7, color=color)
    best = -1.0
    front = []
    for row in sorted(every, key=lambda row: (row[key], -row["ap"][0])):
        if row["ap"][0] > best:
            best = row["ap"][0]
            front.append((row[key] / 1e6, best))
    axes.step(*zip(*front, strict=True), where="post", color="gray", lw=1, ls=":", label="frontier")
    axes.set(xlabel=f"{what}, millions", ylabel=f"AP on coco-val ({every[0]['photos']} photos)")
    axes.set_xlim(left=0)
    axes.legend(loc="lower right")
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _free(taken: list[tuple[float, float, float]], x: float, y: float, letters: int) -> Any:
    """Returns where a label of so many letters covers no other, and remembers it."""
    letter, line = 4.2, 0.4  # their size in million instructions and points of AP
    while any(
        abs(y - other) < line and x < right and left < x + letter * letters
        for left, right, other in taken
    ):
        y -= line
    taken.append((x, x + letter * letters, y))
    return x, y


def beside(path: Path) -> list[dict[str, Any]]:
    """Returns the rows that ``compare_int8`` stored, the float file first."""
    table = json.loads(path.read_text())
    rows = [{**row, "title": row["method"]} for row in table["rows"] if row.get(CORES[0])]
    return [{**table["float"], "title": "float", "photos": rows[0]["photos"]}, *rows]


def main() -> None:
    """Runs the rows that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--recipe", type=Path, help="show this recipe step by step")
    parser.add_argument("--only", nargs="+", default=[], help="rows whose titles hold this text")
    parser.add_argument("--photos-max", type=int, help="photos that AP is measured on")
    parser.add_argument("--shared", type=Path, default=Path("../shared"), help="data and weights")
    parser.add_argument("--out", type=Path, default=Path("runs/ablation"))
    parser.add_argument("--plot", type=Path, help="PNG to draw")
    parser.add_argument(
        "--beside", type=Path, nargs="+", default=[], help="rows.json of compare_int8, to draw, too"
    )
    options = parser.parse_args()
    if options.recipe:
        recipe = read_recipe(options.recipe)
        recipe = recipe.model_copy(update={"out": (options.out / recipe.out.name).resolve()})
        recipes = prefixes(recipe)
    else:
        recipes = [(t, technique(t, options)) for t in TECHNIQUES]
    recipes = [(t, r) for t, r in recipes if not options.only or any(o in t for o in options.only)]
    options.out.mkdir(parents=True, exist_ok=True)
    name = options.recipe.stem if options.recipe else TABLE
    store = options.out / f"{name}.json"
    known = json.loads(store.read_text())["rows"] if store.is_file() else []
    check = open_dataset(options.shared / "data/coco-val").limit(options.photos_max)
    rows: list[dict[str, Any]] = []
    before: Evaluation | None = None
    for title, recipe in recipes:
        result = run_recipe(recipe)
        if before is None:
            original = options.out / f"{name}-original.onnx"
            shutil.copyfile(result.state.original, original)
            first, before = measure(original, check, None)
            rows.append({"title": "original", "file": original.name, **first})
        path = options.out / f"{name}-{len(rows)}.onnx"
        shutil.copyfile(result.final, path)
        digest = sha256(path)
        stored = [r for r in known if r["sha256"] == digest and r["photos"] == len(check)]
        row = stored[0] if stored else measure(path, check, before)[0]
        rows.append({**row, "title": title, "file": path.name})
        for r in rows:
            r["photos"] = len(check)
        write_json(store, {"machine": machine(), "rows": rows})
    add_instructions(rows, options.out)
    add_times(rows, options.out, check.limit(1))
    write_json(store, {"machine": machine(), "rows": rows})
    if options.plot:
        stores = sorted(options.out.glob("*.json"), key=lambda path: path.stem != TABLE)
        tables = {path.stem: json.loads(path.read_text()).get("rows", []) for path in stores}
        others = {f"INT8 alone, {path.parent.name}": beside(path) for path in options.beside}
        same = {
            stem: [r for r in rows if "ap" in r and r.get("photos") == len(check)]
            for stem, rows in (tables | others).items()
        }
        plot({stem: rows for stem, rows in same.items() if rows}, options.plot, others)
    milliseconds = statistics.median(r["ms"] for r in rows)
    print(f"\n{name}, coco-val, {len(check)} photos; median {milliseconds:.1f} ms per photo here;")
    print(
        "ms: bare network on this processor, one thread, in turn with the original, as its part\n"
    )
    print(as_table(rows))


if __name__ == "__main__":
    main()
