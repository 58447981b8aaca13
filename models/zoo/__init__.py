"""The shipped detector: the INT8 file that ``edgesight run`` uses and its float version."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from ..errors import ModelFileError

INT8_FILE = "edgesight_nano.onnx"
FLOAT_FILE = "edgesight_nano_float.onnx"


def shipped() -> Path:
    """Returns the INT8 detector that ships with the package.

    Raises:
        ModelFileError: The installation lacks it.
    """
    return _file(INT8_FILE)


def shipped_float() -> Path:
    """Returns the float version of the shipped detector, the default reference.

    Raises:
        ModelFileError: The installation lacks it.
    """
    return _file(FLOAT_FILE)


SHIPPED: dict[str, Callable[[], Path]] = {"shipped": shipped, "shipped-float": shipped_float}
MODEL_HELP = f"an ONNX detector; or the word {' or '.join(SHIPPED)} for the package's own"


def model_path(name: str | Path) -> Path:
    """Returns the file that a command's argument names, a path or a word of ``SHIPPED``."""
    return SHIPPED[str(name)]() if str(name) in SHIPPED else Path(name)


def _file(name: str) -> Path:
    path = Path(__file__).parent / name
    if not path.is_file():
        message = (
            f"{path}: expected the shipped detector, found no such file; install edgesight again, "
            "or name a model with --model"
        )
        raise ModelFileError(message)
    return path
