"""The one command line: a table of sub-commands, each imported only when it is called."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence

from . import __version__

COMMANDS: dict[str, tuple[str, str]] = {
    "run": (".device_app.command", "run a detector live: camera, video, photos or the samples"),
    "eval": (".deploy.evaluate", "measure a model's AP on a labelled folder, with intervals"),
    "compress": (".compression.command", "make a detector small: prune, distil, quantize, verify"),
    "analyse": (".compression.analyse_command", "where the fat is: cost, redundancy, sensitivity"),
    "inspect": (".deploy.inspect", "parameters, MACs, size, and what really runs as integers"),
    "cost": (".deploy.cost", "count instructions per frame on a Raspberry Pi's core, emulated"),
    "bench": (".device_app.bench", "time every stage, and the pipeline against the bare network"),
    "doctor": (".deploy.doctor", "what is wrong with this board, and the command that mends it"),
    "regress": (".deploy.regress", "pass or fail for a new model against the last good one"),
    "bundle": (
        ".deploy.bundle_command",
        "pack a model, photos and wheels for a board into one checked file",
    ),
    "fetch": (".deploy.fetch", "download a known detector, checked by its SHA-256"),
}
EXIT_CODES = (
    "exit codes: 0 done, 1 a check failed, 2 wrong input (one line says what), 130 interrupted"
)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one sub-command.

    A command's module has ``DESCRIPTION`` and ``EXAMPLE`` texts, ``add_arguments(parser)`` and
    ``main(args) -> int``; with ``prepare(parser, words)`` it may look at its command line first.

    Returns:
        The exit code: 0 done, 1 a check failed, 2 wrong input, 130 interrupted.
    """
    args = list(sys.argv[1:] if argv is None else argv)
    if not args or args[0] not in COMMANDS:
        return _top_level(args)
    module = importlib.import_module(COMMANDS[args[0]][0], __package__)
    parser = argparse.ArgumentParser(
        prog=f"edgesight {args[0]}",
        description=module.DESCRIPTION,
        epilog=f"example: {module.EXAMPLE}\n\n{EXIT_CODES}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,  # a file's options are looked for by their whole names
    )
    module.add_arguments(parser)
    from .models.errors import EdgeSightError

    try:
        if hasattr(module, "prepare"):
            module.prepare(parser, args[1:])
        return int(module.main(parser.parse_args(args[1:])))
    except EdgeSightError as error:
        print(f"edgesight: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("edgesight: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of our output went away, as in `edgesight ... | head`
        sys.stderr.close()
        return 0


def _top_level(args: list[str]) -> int:
    width = max(map(len, COMMANDS))
    table = "\n".join(f"  {name:{width}}  {text}" for name, (_, text) in COMMANDS.items())
    parser = argparse.ArgumentParser(
        prog="edgesight",
        description="Make object detectors small, and watch them run with FPS and accuracy.",
        epilog=f"commands (each has --help with an example):\n{table}\n\n{EXIT_CODES}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="edgesight [-h] [--version] COMMAND ...",
    )
    parser.add_argument("--version", action="version", version=f"edgesight {__version__}")
    parser.add_argument("command", metavar="COMMAND", nargs="?", help=argparse.SUPPRESS)
    found = parser.parse_args(args[:1])
    if found.command is None:
        parser.print_help()
        return 0
    import difflib

    near = difflib.get_close_matches(found.command, COMMANDS, 1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    parser.error(f"expected one of {', '.join(COMMANDS)}, found {found.command!r}{hint}")


if __name__ == "__main__":
    sys.exit(main())
