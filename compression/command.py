"""``edgesight compress``: a detector and photos in, a smaller detector and a report out."""

from __future__ import annotations

import argparse
import errno
import json
import platform
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..models.arguments import whole_from
from ..models.errors import DatasetError, InputError, MissingExtraError, OutputError, RecipeError
from ..models.heads import HEADS
from ..models.machine import int8_advice
from ..models.zoo import model_path, shipped_float
from .search_command import add_search_arguments, given, option, recipe_of

if TYPE_CHECKING:
    from .pipeline import RunResult
    from .recipe import Recipe

DESCRIPTION = (
    "Makes a detector small: a recipe of steps (prune, distil, quantize, verify) on photos, or a\n"
    "target, for which it finds the steps.\n"
    "Without a recipe and options it demonstrates itself on the shipped float detector and the\n"
    "sample photos, in ./runs/demo."
)
EXAMPLE = "edgesight compress recipe.toml"
DEMO_OUT = Path("runs/demo")
NO_PLACE = (errno.ENOSPC, errno.EFBIG, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM)
NEEDED = ("torch", "onnx", "pydantic", "safetensors", "jinja2", "matplotlib")
DEMO_STEPS: list[dict[str, Any]] = [
    {"kind": "prune", "macs_ratio": 0.85, "photos": 5, "iterations": 1},
    {"kind": "distill", "photos": 80, "batch": 4, "labels": "none"},
    {"kind": "quantize", "photos": 5, "refine": 40},
    {"kind": "verify", "resamples": 200, "latency_rounds": 30},
]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's arguments."""
    parser.add_argument(
        "recipe",
        nargs="?",
        type=Path,
        help="TOML file that names model and steps; with a target: MODEL.onnx",
    )
    parser.add_argument(
        "--out",
        type=Path,
        help="folder for results; --quantize-only: file (else MODEL_int8.onnx beside MODEL)",
    )
    parser.add_argument("--restart", action="store_true", help="do finished steps again")
    parser.add_argument("--json", action="store_true", help="print one JSON object at the end")
    parser.add_argument("--quiet", action="store_true", help="no progress bars")
    parser.add_argument(
        "--quantize-only",
        type=model_path,
        metavar="MODEL",
        help="turn an ONNX detector into INT8 (shipped-float: the package's own)",
    )
    parser.add_argument(
        "--photos",
        type=Path,
        metavar="DIR",
        help="photos for --quantize-only or a target (no boxes needed)",
    )
    parser.add_argument(
        "--eval",
        type=Path,
        metavar="DIR",
        help="labelled photos for --quantize-only or a target: AP, and nothing else",
    )
    parser.add_argument("--head", choices=sorted(HEADS), help="head of MODEL if it is not clear")
    parser.add_argument(
        "--target",
        choices=("cortex-a76", "cortex-a72", "x86-64"),
        help="core that --quantize-only or a target is for (default cortex-a76)",
    )
    parser.add_argument(
        "--refine",
        type=whole_from(0),
        metavar="N",
        help="photo passes of training after --quantize-only, say 1600 (default 0: none)",
    )
    add_search_arguments(parser)


def main(args: argparse.Namespace) -> int:
    """Runs the command.

    Returns:
        0 done, 1 the exported file does not see what the network sees or the target is not met,
        130 interrupted.
    """
    _check(args)
    require_extras()
    try:
        report = _quantize_only(args) if args.quantize_only is not None else _recipe(args)
    except KeyboardInterrupt:
        print(f"edgesight: interrupted; {_how_to_go_on(args)}", file=sys.stderr)
        return 130
    except OSError as error:  # a disk that is full shows in many places
        if error.errno not in NO_PLACE:
            raise
        place = f" {error.filename}" if error.filename else ""
        message = (
            f"cannot write{place}: {error.strerror}; free space or choose another place; "
            f"{_how_to_go_on(args)}"
        )
        raise OutputError(message) from error
    if not report:  # another process of several reports
        return 0
    if args.json:
        print(json.dumps(report))
    elif "search" in report:
        from .search_command import search_summary

        print(search_summary(report))
    else:
        print(summary(report))
    return 0 if report["passed"] else 1


def require_extras() -> None:
    """Raises ``MissingExtraError`` if a package that compression needs is not installed."""
    import importlib

    for name in NEEDED:
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise MissingExtraError.of(package=name) from error


def _advise(core: str) -> None:
    """Says before a long run that INT8 gains little speed on its core, where it is so."""
    advice = int8_advice(core)
    if advice is not None:
        print(f"note: {advice}", file=sys.stderr)


def _check(args: argparse.Namespace) -> None:
    only = {
        name: getattr(args, name)
        for name in ("photos", "eval", "head", "target", "refine")
        if getattr(args, name) is not None
    }
    searched = given(args)
    if args.quantize_only is not None:
        part = searched.pop("cost_max", None)  # which it knows, too
        if part is not None and not 0 < part <= 1:
            message = f"--cost-max: expected above 0, at most 1, found {part:g}"
            raise InputError(message)
    if searched:
        wrong = ["--quantize-only"] if args.quantize_only is not None else []
        wrong += ["--refine"] if args.refine is not None else []
        if wrong:
            message = f"expected {option(next(iter(searched)))} without {wrong[0]}; leave one out"
            raise InputError(message)
    elif args.quantize_only is None and only:
        names = ", ".join(f"--{name}" for name in only)
        message = f"expected {names} with --quantize-only MODEL; a recipe says them itself"
        raise InputError(message)
    if args.quantize_only is not None and args.recipe is not None:
        message = "expected a recipe or --quantize-only, found both; leave one out"
        raise InputError(message)
    if args.quantize_only is not None and args.photos is None:
        message = "expected --photos DIR (some hundred typical ones) with --quantize-only"
        raise DatasetError(message)


def _recipe(args: argparse.Namespace) -> dict[str, Any]:
    from . import parallel
    from .pipeline import run_recipe
    from .recipe import read_recipe

    if given(args):
        recipe = recipe_of(args)
    else:
        recipe = demo_recipe() if args.recipe is None else read_recipe(args.recipe)
    if args.out is not None:
        recipe = recipe.model_copy(update={"out": args.out.absolute()})
    if recipe.out.exists() and not recipe.out.is_dir():
        message = f"{recipe.out}: expected a folder for the results, found a file; name another"
        raise RecipeError(message)
    if recipe.search is not None or any(step.kind == "quantize" for step in recipe.steps):
        _advise(recipe.target.core)
    if recipe.search is not None:
        from .search_command import run_search

        return run_search(recipe, restart=args.restart, progress=not args.quiet)
    result = run_recipe(recipe, restart=args.restart, progress=not args.quiet)
    return report_run(result, recipe) if parallel.is_first() else {}


def report_run(result: RunResult, recipe: Recipe) -> dict[str, Any]:
    """Writes the report of a run, and returns it."""
    from .report import example_pictures, report_of, write_report

    report = report_of(result, _shown(recipe))
    check = result.state.job.photos.check
    pictures = example_pictures(result.state.original, result.final, check)
    page = write_report(recipe.out, report, pictures)
    return report | {"out": str(recipe.out), "page": str(page)}


def demo_recipe() -> Recipe:
    """Returns the recipe of the demonstration: everything once, in a minute or two."""
    from .recipe import make_recipe
    from .verify import ARM_MACHINES

    samples = Path(__file__).parent.parent / "device_app" / "samples"
    if not samples.is_dir():
        message = f"{samples}: expected the sample photos, found none; install edgesight again"
        raise DatasetError(message)
    values = {
        "version": 1,
        "out": str(DEMO_OUT),
        "model": "shipped",
        "data": {"photos": str(samples)},
        "target": {"core": "cortex-a76" if platform.machine() in ARM_MACHINES else "x86-64"},
        "steps": DEMO_STEPS,
    }
    return make_recipe(values, Path.cwd(), "demo")


def _shown(recipe: Recipe) -> dict[str, Any]:
    """Returns the recipe for the report: what matters, and no folders of this machine."""
    values: dict[str, Any] = recipe.model_dump(mode="json", exclude_none=True)
    values.pop("out")
    data = values["data"]
    data["photos"] = [Path(folder).name for folder in data["photos"]]
    if "eval" in data:
        data["eval"] = Path(data["eval"]).name
    for step in values["steps"]:
        if "teacher" in step:
            step["teacher"] = [Path(teacher).name for teacher in step["teacher"]]
    if isinstance(values["model"], dict):
        for key in ("file", "weights"):
            if key in values["model"]:
                values["model"][key] = Path(values["model"][key]).name
    return values


def _quantize_only(args: argparse.Namespace) -> dict[str, Any]:
    from .only import quantize_file

    start = time.monotonic()
    model: Path = args.quantize_only
    target = args.target or "cortex-a76"
    _advise(target)
    out = args.out or _beside(model)
    report = quantize_file(
        model,
        args.photos,
        out,
        target,
        head=args.head,
        labelled=args.eval,
        refine=args.refine or 0,
        cost_max=args.cost_max,
        progress=not args.quiet,
    )
    return report | {"out": str(out), "seconds": round(time.monotonic() - start, 1)}


def _beside(model: Path) -> Path:
    """Returns where an INT8 model goes that no place was named for; never into the package."""
    name = f"{model.stem}_int8.onnx"
    return Path(name) if model == shipped_float() else model.with_name(name)


def _how_to_go_on(args: argparse.Namespace) -> str:
    if args.quantize_only is not None:
        return "nothing was written; run the same command again"
    if given(args):
        return "finished trials are stored; the same command goes on"
    name = "" if args.recipe is None else f" {args.recipe}"
    out = "" if args.out is None else f" --out {args.out}"
    return f"finished steps are stored; go on with: edgesight compress{name}{out}"


def summary(report: dict[str, Any]) -> str:
    """Returns the result as lines for people."""
    from .report import headline, loss_text, score_text

    lines = [f"{'step':14}{'parameters':>12}{'MACs':>12}{'size':>12}  accuracy [95 %]"]
    for step in report["steps"]:
        if step["title"].endswith("verify"):
            continue
        lost = loss_text(step["score"])
        lines.append(
            f"{step['title']:14}{step['parameters'] / 1e6:>10.2f} M{step['macs'] / 1e6:>10.1f} M"
            f"{step['bytes'] / 1e6:>9.2f} MB  {score_text(step['score'])}"
            + (f", AP lost {lost}" if lost else "")
        )
    lines += [
        f"{name}: {value}" + (f" ({remark})" if remark else "")
        for name, value, remark in headline(report)
    ]
    lines += [f"note: {note}" for step in report["steps"] for note in step["notes"]]
    written = [report["out"]] if "page" not in report else [report["files"]["final"]["name"]]
    if "page" in report:
        written = [f"{report['out']}/{written[0]}", report["page"]]
    lines.append(f"written: {', '.join(written)}")
    if not report["passed"]:
        lines.append("FAILED: the exported file does not see what the network sees")
    return "\n".join(lines)
