"""What travels through the loop: a frame, and the detector that looks at it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy.typing as npt

from ..models.detector import OnnxDetector
from ..models.preprocess import Placement
from .accuracy import Accuracy
from .frame import Frame


@dataclass(frozen=True, eq=False)
class Judged:
    """A detector, and how it is judged: both are changed together, between two frames."""

    detector: OnnxDetector
    accuracy: Accuracy


@dataclass(frozen=True, eq=False)
class Work:
    """A frame on its way through the network: not prepared yet, prepared, or run.

    It keeps the detector that prepared it, so that a frame is never begun by one and ended by
    another.
    """

    frame: Frame
    judged: Judged | None = None
    tensor: npt.NDArray[Any] | None = None
    placement: Placement | None = None
    outputs: list[Any] | None = None
