"""Whether the board holds the detector back, and since when: what the screen says of it."""

from __future__ import annotations

from ..models.board import Board, BoardFigures

SLOWER = 1.15
"""So many times its usual time, and a frame counts as slowed."""
USUAL_SAMPLES = 20
"""Readings without throttling that say what is usual."""


class HealthFigures(BoardFigures):
    """How the machine is, and what that means for the run."""

    says: str | None
    """One line for people: what is wrong; None if nothing is."""


class Health:
    """Watches the board beside the time that the network takes.

    Args:
        board: Read by ``figures``; a new one by default.
    """

    def __init__(self, board: Board | None = None) -> None:
        """Starts with nothing known."""
        self._board = board or Board()
        self._usual: list[float] = []
        self._last: BoardFigures | None = None

    def figures(self, inference_ms: float | None, now_s: float | None = None) -> HealthFigures:
        """Returns how the machine is.

        Args:
            inference_ms: What the network takes now, median; None if it has not run.
            now_s: Monotonic time in seconds.
        """
        found = self._board.read(now_s)
        if found is not self._last:
            self._last = found
            if inference_ms is not None and not found["throttled"]:
                self._usual = [*self._usual, inference_ms][-USUAL_SAMPLES:]
        return {**found, "says": self._says(found, inference_ms)}

    def forget_usual(self) -> None:
        """Begins anew with what is usual: another model takes another time."""
        self._usual = []

    def _says(self, found: BoardFigures, inference_ms: float | None) -> str | None:
        if not found["throttled"]:
            return None
        why = ", ".join(found["throttled"])
        if found["temperature_c"] is not None:
            why += f" at {found['temperature_c']:.0f} C"
        if "under-voltage" in found["throttled"]:
            why += "; use a stronger power supply"
        usual = sorted(self._usual)[len(self._usual) // 2] if self._usual else None
        if usual is None or inference_ms is None or inference_ms < SLOWER * usual:
            return f"the board reports: {why}"
        return f"{inference_ms / usual:.1f} times slower, the board throttles: {why}"
