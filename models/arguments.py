"""Types of command-line arguments that several commands share."""

from __future__ import annotations

import argparse
from collections.abc import Callable


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
