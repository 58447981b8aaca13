"""Types of command-line arguments that several commands share."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any


def whole_from(least: int, word: str = "from") -> Callable[[str], int]:
    """Returns an argparse type: a whole number of decimal digits alone, ``least`` or more.

    Args:
        least: The smallest that is taken.
        word: What the complaint puts in front of it.
    """

    def parse(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            message = f"expected a whole number {word} {least}, found {text!r}"
            raise argparse.ArgumentTypeError(message)
        return int(text)

    return parse


def whole_number(low: int, high: int) -> Callable[[str], Any]:
    """Returns an argparse type: a whole number from ``low`` to ``high``."""
    return number_type(int, low, high)


def number_type(kind: Callable[[str], Any], low: float, high: float) -> Callable[[str], Any]:
    """Returns an argparse type: a number of a kind from ``low`` to ``high``."""

    def parse(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            value = None
        if value is None or not low <= value <= high:
            message = f"expected a number from {low:g} to {high:g}, found {text!r}"
            raise argparse.ArgumentTypeError(message)
        return value

    return parse
