"""``edgesight compress`` with a target: from the words of the command line to a search's report."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from ..models.errors import DatasetError, InputError

if TYPE_CHECKING:
    from .recipe import Recipe

LIMITS: Final = ("cost_max", "bytes_max", "ap_loss_max")
OWN: Final = (*LIMITS, "budget", "trials", "labelled")
SHARED: Final = ("photos", "eval", "head", "target")
"""Options that --quantize-only has, too."""
BEST_RECIPE: Final = "best.toml"
LOCK_FILE: Final = ".result.lock"
SHIPPED: Final = ("shipped", "shipped-float")


def add_search_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of a search for a MODEL in place of a recipe."""
    group = parser.add_argument_group(
        "search", "with MODEL.onnx (or shipped) in place of a recipe: find the steps that meet this"
    )
    group.add_argument(
        "--cost-max",
        type=float,
        metavar="PART",
        help="part of the cost that may be left, as 0.5; also with --quantize-only",
    )
    group.add_argument("--bytes-max", metavar="SIZE", help="size of the file, as 1MB")
    group.add_argument(
        "--ap-loss-max",
        type=float,
        metavar="POINTS",
        help="AP that may be lost; the cheapest within is looked for (without it: the best)",
    )
    group.add_argument("--budget", metavar="TIME", help="as 30m, 2h or 90s")
    group.add_argument("--trials", type=int, metavar="N", help="combinations tried, at most")
    group.add_argument(
        "--labelled",
        type=Path,
        metavar="DIR",
        help="photos with boxes: every fifth one compares models, the others are learned from",
    )


def given(args: argparse.Namespace, names: tuple[str, ...] = OWN) -> dict[str, Any]:
    """Returns those of some options that were given."""
    return {name: getattr(args, name) for name in names if getattr(args, name) is not None}


def option(name: str) -> str:
    """Returns an option as people write it."""
    return f"--{name.replace('_', '-')}"


def recipe_of(args: argparse.Namespace) -> Recipe:
    """Returns the recipe that the words of the command line stand for.

    Raises:
        InputError: Something is missing or impossible.
    """
    from .recipe import make_recipe
    from .targets import parse_seconds

    limits = given(args, LIMITS)
    model = "" if args.recipe is None else str(args.recipe)
    if not model.endswith(".onnx") and model not in SHIPPED:
        message = (
            f"expected MODEL.onnx (or shipped) beside {option(next(iter(given(args))))}, found "
            f"{model or 'none'}; a recipe says its target itself, in [search]"
        )
        raise InputError(message)
    if not limits:
        message = f"expected a target ({', '.join(map(option, LIMITS))}) beside MODEL, found none"
        raise InputError(message)
    folders = [str(f) for f in (args.photos, args.labelled) if f is not None]
    if not folders:
        message = "expected --labelled DIR or --photos DIR to learn from, found neither"
        raise DatasetError(message)
    search = dict(limits)
    if args.trials is not None:
        search["trials"] = args.trials
    if args.budget is not None:
        try:
            search["budget_s"] = parse_seconds(args.budget)
        except ValueError as error:
            message = f"--budget: expected {error}"
            raise InputError(message) from None
    source: Any = "shipped"
    if model not in SHIPPED:
        source = {"file": model} | ({} if args.head is None else {"head": args.head})
    values: dict[str, Any] = {
        "version": 1,
        "out": str(args.out or Path("runs") / Path(model).stem),
        "model": source,
        "data": {"photos": folders} | ({} if args.eval is None else {"eval": str(args.eval)}),
        "search": search,
    }
    if args.target is not None:
        values["target"] = {"core": args.target}
    return make_recipe(values, Path.cwd(), "edgesight compress")


def run_search(
    recipe: Recipe,
    *,
    restart: bool = False,
    progress: bool = True,
    say: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Carries out a search and writes model, frontier, and the best model's own report.

    Args:
        recipe: With a ``[search]`` table.
        restart: Forget what was found before.
        progress: Show bars.
        say: Told what is going on, a line at a time.

    Returns:
        The report, JSON-ready; ``passed`` says whether the target is met.

    Raises:
        EdgeSightError: Something is wrong; finished trials stay stored.
    """
    import torch

    from .candidates import Workshop, locked
    from .command import report_run
    from .frontier import choose, frontier_report, write_frontier
    from .pipeline import run_recipe
    from .search import forget, search
    from .settings import VerifyStep

    say = say or (lambda line: print(line, file=sys.stderr))
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        message = (
            "expected a search to be one process, found several of torchrun; start the command "
            "itself several times: all work on one study"
        )
        raise InputError(message)
    wanted = recipe.search
    assert wanted is not None
    torch.set_flush_denormal(True)  # as in a recipe's run: both must compute alike
    if restart:
        forget(recipe.out, wanted)
    workshop = Workshop(recipe, progress)
    photos = workshop.photos
    say(
        f"{len(photos.train_paths)} photos to learn from, {len(workshop.ruler.data or ())} to "
        f"compare models on ({photos.check_kind})"
    )
    found = search(workshop, wanted, say)
    with locked(recipe.out / LOCK_FILE):  # another process may have come to its end, too
        chosen = choose(workshop, wanted, found, say)
        report = frontier_report(workshop, wanted, found, chosen)
        verify = VerifyStep.model_validate({"kind": "verify"})
        best = workshop.settings(chosen.best.input_hw, chosen.best.steps, verify)
        data = best.data.model_copy(update={"eval": recipe.data.eval})
        best = best.model_copy(update={"data": data})
        result = run_recipe(best, progress=progress, say=lambda line: None)
        run = report_run(result, best)
        page = write_frontier(recipe.out, report)
        _write_recipe(recipe.out / BEST_RECIPE, best)
    return {
        "passed": bool(report["met"] and run["passed"]),
        "out": str(recipe.out),
        "page": str(page),
        "search": report,
        "run": run,
    }


def _write_recipe(path: Path, recipe: Recipe) -> None:
    """Writes a recipe as TOML, its paths counted from its own folder."""
    from ..models.files import write_text

    dumped = recipe.model_dump(mode="json", exclude_none=True, exclude_defaults=True)
    base = path.parent
    values: dict[str, Any] = {"version": 1, "out": "again"} | {
        k: v for k, v in dumped.items() if k != "out"
    }
    for key in ("photos", "eval"):
        if key in values["data"]:
            values["data"][key] = _relative(values["data"][key], base)
    if isinstance(values.get("model"), dict):
        for key in ("file", "weights"):
            if key in values["model"]:
                values["model"][key] = _relative(values["model"][key], base)
    steps = [
        {"kind": step.kind, **step.model_dump(mode="json", exclude_none=True)}
        for step in recipe.steps
    ]
    lines = [f"{k} = {_toml(v)}" for k, v in values.items() if not isinstance(v, list | dict)]
    for key, table in values.items():
        if isinstance(table, dict):
            lines += ["", f"[{key}]", *_lines(table)]
    for step in steps:
        lines += ["", "[[steps]]", *_lines(step)]
    write_text(path, "\n".join(lines) + "\n")


def _lines(table: Mapping[str, Any]) -> list[str]:
    return [f"{key} = {_toml(value)}" for key, value in table.items()]


def _toml(value: Any) -> str:
    """Returns a value as TOML: numbers, texts, truth values and lists look as in JSON."""
    if isinstance(value, dict):
        return f"{{{', '.join(_lines(value))}}}"
    return json.dumps(value, ensure_ascii=False)


def _relative(value: Any, base: Path) -> Any:
    if isinstance(value, list):
        return [_relative(one, base) for one in value]
    return os.path.relpath(value, base)


def search_summary(report: dict[str, Any]) -> str:
    """Returns the result of a search as lines for people."""
    from .report import score_text, size_text

    found = report["search"]
    lines = [
        f"{'model':10}{'cost':>8}{'size':>11}{'ms':>8}  {'tuning photos':22}{'eval photos':22}"
        "recipe"
    ]
    for row in found["rows"]:
        mark = "*" if row["best"] else " "
        lines.append(
            f"{mark}{row['name']:9}{100 * row['cost_ratio']:>6.1f} %{size_text(row['bytes']):>11}"
            f"{row['ms']:>8.2f}  {score_text(row['score']):22}{score_text(row['eval']):22}"
            f"{row['text']}"
        )
    lines.append(f"cost: {found['cost_unit']}")
    lines += [f"note: {note}" for note in found["notes"]]
    if found["failed"]:
        lines.append(f"{len(found['failed'])} combinations could not be made, see the page")
    out = report["out"]
    lines.append(f"written: {out}/model.onnx, {out}/{BEST_RECIPE}, {report['page']}")
    lines.append(found["says"])
    if not report["run"]["passed"]:
        lines.append("FAILED: the exported file does not see what the network sees")
    return "\n".join(lines)
