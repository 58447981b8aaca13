"""What travels through the loop: a frame, and the detector that looks at it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy.typing as npt

from ..models.detector import OnnxDetector
from ..models.errors import EdgeSightError
from ..models.preprocess import Placement
from .accuracy import Accuracy
from .frame import Frame


@dataclass(frozen=True, eq=False)
class Judged:
    """A detector, and how it is judged: both are changed together, between two frames.

    Attributes:
        detector: Takes the frames.
        accuracy: Judges it.
        required: Whether a reference that cannot be used ends the run, as the user named it.
    """

    detector: OnnxDetector
    accuracy: Accuracy
    required: bool = False

    @property
    def error(self) -> EdgeSightError | None:
        """What ends the run; a reference that was not named ends nothing."""
        return self.accuracy.error if self.required else None


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
