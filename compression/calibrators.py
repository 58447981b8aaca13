"""Ways to choose the ends of a tensor's 8-bit grid from a sample of its values.

They differ in what they hold to be worth an end: every value ever seen, nearly all of them, the
distribution's shape, or the error. Which is best depends on the network: ``quantize`` tries them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from ..models.detections import FloatArray
from .calibrate import STEPS, Grid, best_grid

USUAL: Final = "least cubic error"
PERCENTILE: Final = 99.99
"""Of the values at each side of zero that the grid reaches."""
BINS: Final = 2048
SHRINKS: Final = tuple(float(s) for s in np.linspace(1.0, 0.2, 17))
EMPTY: Final = 1e-6
"""Probability of a bin into which nothing fell."""

Function = Callable[[Any], Any] | None


def min_max(values: FloatArray, low: float, high: float, after: Function, weight: Function) -> Grid:
    """Returns the grid over all values ever seen."""
    if not (np.isfinite(low) and np.isfinite(high)):
        return best_grid(values, low, high, after, weight)
    return Grid.over(low, high)


def percentile(
    values: FloatArray, low: float, high: float, after: Function, weight: Function
) -> Grid:
    """Returns the grid over all values but the outermost 0.01 % of each sign."""
    flat = values[np.isfinite(values)]
    sides = [side[side > 0] for side in (-flat, flat)]
    ends = [float(np.percentile(side, PERCENTILE)) if side.size else 0.0 for side in sides]
    return Grid.over(-ends[0], ends[1])


def entropy(values: FloatArray, low: float, high: float, after: Function, weight: Function) -> Grid:
    """Returns the grid on which the distribution of the values changes least.

    By the Kullback-Leibler divergence, both ends drawn in together, after Migacz ("8-bit Inference
    with TensorRT", 2017); there, what is clipped is added to the ends of the true distribution,
    here to those of the rounded one only.
    """
    flat = values[np.isfinite(values)].astype(np.float64)
    span = (float(flat.min()), float(flat.max())) if flat.size else (0.0, 0.0)
    if span[0] == span[1]:  # no distribution
        return best_grid(values, low, high)
    counts, edges = np.histogram(flat, BINS, span)
    middles = (edges[:-1] + edges[1:]) / 2
    grids = [Grid.over(span[0] * shrink, span[1] * shrink) for shrink in SHRINKS]
    return min(grids, key=lambda grid: _divergence(counts, middles, grid))


def _divergence(counts: Any, middles: npt.NDArray[np.float64], grid: Grid) -> float:
    """Returns how far a histogram is from itself after rounding to a grid, in nats."""
    steps = np.clip(np.rint(middles / grid.scale), -2 * STEPS, 2 * STEPS)
    codes = steps.astype(int) + grid.zero_point
    inside = (codes >= 0) & (codes <= STEPS)
    clipped = np.clip(codes, 0, STEPS)
    # What is clipped is seen at the ends, as it will be; its own bins stay in the true picture.
    per_code = np.bincount(clipped, counts, STEPS + 1)
    filled = np.bincount(clipped[inside], counts[inside] > 0, STEPS + 1)
    spread = per_code / np.maximum(filled, 1)
    seen = np.where(inside & (counts > 0), spread[clipped], 0.0)
    p = np.maximum(counts / counts.sum(), EMPTY)
    q = np.maximum(seen / max(seen.sum(), 1e-12), EMPTY)
    return float((p * np.log(p / q)).sum())


def square(values: FloatArray, low: float, high: float, after: Function, weight: Function) -> Grid:
    """Returns the grid with the least square error."""
    return best_grid(values, low, high, power=2)


def cubic(values: FloatArray, low: float, high: float, after: Function, weight: Function) -> Grid:
    """Returns the grid with the least cubic error behind the activation that follows."""
    return best_grid(values, low, high, after, weight)


Calibrator = Callable[[FloatArray, float, float, Function, Function], Grid]
CALIBRATORS: Final[dict[str, Calibrator]] = {
    USUAL: cubic,
    "least square error": square,
    "least entropy lost": entropy,
    "99.99 % of values": percentile,
    "least to greatest": min_max,
}
"""What reports call it -> a sample ``(n, channels)``, the least and the greatest value ever seen,
the activation that follows, and the weight of errors -> its grid."""
