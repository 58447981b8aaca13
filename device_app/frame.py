"""One picture on its way from the source to the screen."""

from __future__ import annotations

from dataclasses import dataclass

from ..models.dataset import GroundTruth
from ..models.preprocess import Image


@dataclass(frozen=True, eq=False)
class Frame:
    """A picture and when it was taken.

    Attributes:
        image: uint8 ``(height, width, 3)``, BGR. Nobody draws on it: it belongs to all stages.
        sequence: Number since the source was opened, from 0.
        captured_s: Monotonic time in seconds at which it came out of the source.
        truth: The boxes that a labelled source knows to be there; None elsewhere.
        small: The same view with fewer pixels, for the network; None where ``image`` serves.
    """

    image: Image
    sequence: int
    captured_s: float
    truth: GroundTruth | None = None
    small: Image | None = None

    def for_network(self, input_hw: tuple[int, int]) -> Image:
        """Returns the picture that a network of an input size should look at.

        That is the small one where it has the pixels that the network wants.
        """
        small = self.small
        if small is None or small.shape[0] < input_hw[0] or small.shape[1] < input_hw[1]:
            return self.image
        return small
