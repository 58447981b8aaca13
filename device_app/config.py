"""The options of ``run`` in one TOML file: the same names, checked as on the command line.

What the command line says goes before what the file says, and the file before the defaults.
"""

from __future__ import annotations

import argparse
import difflib
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..models.errors import InputError

BYTES_MAX = 1 << 20
NOT_IN_FILES = ("help", "config", "print_config")


class Repeated(argparse.Action):
    """An option that may be given several times; a list in a file, which the command line replaces.

    argparse's own ``append`` would add to the file's.
    """

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        """Adds one; the first one takes the place of the default."""
        before = getattr(namespace, self.dest)
        setattr(namespace, self.dest, [*(() if before is self.default else before), values])


def add_config_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds ``--config`` and ``--print-config``."""
    parser.add_argument(
        "--config",
        type=Path,
        metavar="FILE",
        help='TOML file with these options, as: source = "picamera"; the command line goes first',
    )
    parser.add_argument(
        "--print-config", action="store_true", help="print all options as such a file, and end"
    )


def use_config(parser: argparse.ArgumentParser, words: Sequence[str]) -> None:
    """Makes the options of the file that a command line names the defaults of its parser.

    Raises:
        InputError: The file cannot be read, or an option in it is unknown or wrong.
    """
    before = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    before.add_argument("--config", type=Path)
    path = before.parse_known_args(list(words))[0].config
    if path is None:
        return
    actions = options_of(parser)
    values: dict[str, Any] = {}
    for key, value in _read(path).items():
        name = key.replace("-", "_")
        if name not in actions:
            near = difflib.get_close_matches(name, actions, 1)
            hint = f"; did you mean {near[0]!r}?" if near else f"; known: {', '.join(actions)}"
            message = f"{path}: unknown option {key!r}{hint}"
            raise InputError(message)
        action = actions[name]
        if isinstance(action, Repeated):
            items = value if isinstance(value, list) else [value]
            values[name] = [_checked(path, key, item, action) for item in items]
        else:
            values[name] = _checked(path, key, value, action)
    parser.set_defaults(**values)


def options_of(parser: argparse.ArgumentParser) -> dict[str, argparse.Action]:
    """Returns the options that can stand in a file, by name."""
    return {
        action.dest: action
        for action in parser._actions
        if action.option_strings and action.dest not in NOT_IN_FILES
    }


def as_toml(parser: argparse.ArgumentParser, args: argparse.Namespace) -> str:
    """Returns the options that hold as a file; those that have no value are comments."""
    lines = []
    for name, action in options_of(parser).items():
        value = getattr(args, name)
        text = _help_line(parser, action)
        if text:
            lines.append(f"# {text}")
        lines.append(f"# {name} =" if value is None else f"{name} = {_toml(value)}")
        lines.append("")
    return "\n".join(lines).rstrip()


def _read(path: Path) -> dict[str, Any]:
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib

    try:
        with path.open("rb") as file:
            data = file.read(BYTES_MAX + 1)
    except OSError as error:
        message = f"{path}: expected a TOML file, found none ({error.strerror}); check the path"
        raise InputError(message) from error
    if len(data) > BYTES_MAX:
        message = f"{path}: expected at most {BYTES_MAX} bytes of TOML, found more"
        raise InputError(message)
    try:
        return tomllib.loads(data.decode("utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        message = f"{path}: expected TOML, found an error: {' '.join(str(error).split())}"
        raise InputError(message) from error


def _checked(path: Path, key: str, value: Any, action: argparse.Action) -> Any:
    """Returns the value as the command line would have read it."""
    if action.nargs == 0:  # a switch
        if isinstance(value, bool):
            return value
        message = f"{path}: {key}: expected true or false, found {value!r}"
        raise InputError(message)
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        message = f"{path}: {key}: expected a text or a number, found {value!r}"
        raise InputError(message)
    text = str(value)
    try:
        found = text if action.type is None else action.type(text)  # type: ignore[operator]
    except argparse.ArgumentTypeError as error:
        message = f"{path}: {key}: {error}"
        raise InputError(message) from None
    except ValueError:
        message = f"{path}: {key}: expected a number, found {value!r}"
        raise InputError(message) from None
    if action.choices is not None and found not in action.choices:
        known = ", ".join(map(str, action.choices))
        message = f"{path}: {key}: expected one of {known}, found {value!r}"
        raise InputError(message)
    return found


def _toml(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (int, float)):
        return repr(value)
    if isinstance(value, list):
        return f"[{', '.join(map(_toml, value))}]"
    if isinstance(value, tuple):  # of a size
        return json.dumps("x".join(map(str, value)))
    # TOML wants one more character escaped than JSON does.
    return json.dumps(str(value), ensure_ascii=False).replace("\x7f", "\\u007f")


def _help_line(parser: argparse.ArgumentParser, action: argparse.Action) -> str:
    text = (action.help or "") % {"default": "", "prog": parser.prog}
    return " ".join(text.replace("(default: )", "").split())
