"""What a camera can be asked for, whatever kind it is."""

from __future__ import annotations

import argparse
import re
from dataclasses import dataclass

from ..models.arguments import number_type, whole_number

ROTATIONS = (0, 90, 180, 270)
SIDE_MAX_PX = 8192
FOCUS = ("auto", "fixed")


@dataclass(frozen=True)
class CameraOptions:
    """What a camera is asked for; None leaves it as the camera has it.

    A camera may give something else: what it gives is read back from its frames.

    Attributes:
        size_wh: Width and height of the picture in pixels, before it is turned.
        fps: Frames per second.
        rotate_deg: Clockwise turn of the picture: 0, 90, 180 or 270.
        focus: ``auto`` (keeps looking for the sharpest picture) or ``fixed``.
        focus_dioptres: Of ``fixed``: 1 / distance in metres; 0 is infinity.
        exposure_us: Exposure time in microseconds; the gain stays automatic.
    """

    size_wh: tuple[int, int] | None = None
    fps: float | None = None
    rotate_deg: int = 0
    focus: str | None = None
    focus_dioptres: float | None = None
    exposure_us: int | None = None

    @property
    def given(self) -> list[str]:
        """The command-line options that were used."""
        used = {
            "--size": self.size_wh,
            "--fps": self.fps,
            "--rotate": self.rotate_deg or None,
            "--focus": self.focus or self.focus_dioptres,
            "--exposure-us": self.exposure_us,
        }
        return [name for name, value in used.items() if value is not None]


def add_camera_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of cameras."""
    group = parser.add_argument_group("cameras only")
    add = group.add_argument
    add("--size", type=size_wh, metavar="WxH", help="picture in pixels, as 1280x720")
    add("--fps", type=number_type(float, 0.1, 1000), help="frames per second to ask for")
    add(
        "--rotate",
        type=int,
        choices=ROTATIONS,
        default=0,
        help="turn the picture clockwise (default: %(default)s)",
    )
    add(
        "--focus",
        type=_focus,
        metavar="auto|DIOPTRES",
        help="focus all the time, or stay at 1 / distance in metres (0: infinity)",
    )
    add("--exposure-us", type=whole_number(1, 10**8), help="exposure time in microseconds")


def camera_options(args: argparse.Namespace) -> CameraOptions:
    """Returns what the command line asks of the camera."""
    fixed = isinstance(args.focus, float)
    return CameraOptions(
        size_wh=args.size,
        fps=args.fps,
        rotate_deg=args.rotate,
        focus="fixed" if fixed else args.focus,
        focus_dioptres=args.focus if fixed else None,
        exposure_us=args.exposure_us,
    )


def size_wh(text: str) -> tuple[int, int]:
    """Returns a size that was written as ``1280x720``; an argparse type."""
    match = re.fullmatch(r"(\d{1,5})[xX](\d{1,5})", text)
    if match is not None:
        width, height = int(match[1]), int(match[2])
        if all(16 <= side <= SIDE_MAX_PX for side in (width, height)):
            return width, height
    message = f"expected width x height from 16 to {SIDE_MAX_PX} px, as 1280x720, found {text!r}"
    raise argparse.ArgumentTypeError(message)


def _focus(text: str) -> str | float:
    if text == "auto":
        return text
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 50:
        message = f"expected auto, or dioptres from 0 to 50, found {text!r}"
        raise argparse.ArgumentTypeError(message)
    return value
