"""What values a network's tensors take on real photos, and the 8-bit grids that fit them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime as ort
from tqdm import tqdm

from ..models.dataset import load_image
from ..models.detections import FloatArray
from ..models.engines import WEIGHT_ROUNDING
from ..models.graph import copied, require_onnx
from ..models.preprocess import prepare
from ..models.spec import ModelSpec

STEPS = 255
"""Steps between the ends of an 8-bit grid."""
VALUES_MAX = 1 << 18
SEARCH_MAX = 1 << 14
POWER = 3
"""Of the error in a range's cost. More than 2: what is clipped is mostly objects."""
COARSE = tuple(float(s) for s in np.geomspace(1.0, 0.02, 14))
FINE = (1.0, 0.82, 0.9, 1.1, 1.2)
WILD = 6.0


@dataclass(frozen=True)
class Grid:
    """An affine 8-bit grid: value = scale * (code - zero_point), code 0..255.

    Signed targets store code - 128, which is the same grid.
    """

    scale: float
    zero_point: int

    @classmethod
    def over(cls, low: float, high: float, steps: int = STEPS) -> Grid:
        """Returns the grid that spans a range; 0 is always one of its values."""
        low, high = min(float(low), 0.0), max(float(high), 0.0)
        scale = max((high - low) / steps, 1e-8)
        return cls(scale, int(np.clip(round(-low / scale), 0, steps)))

    def round(self, values: FloatArray) -> FloatArray:
        """Returns the nearest values on the grid."""
        codes = np.rint(values / np.float32(self.scale)) + np.float32(self.zero_point)
        rounded: FloatArray = (np.clip(codes, 0, STEPS) - self.zero_point) * np.float32(self.scale)
        return rounded

    @property
    def low(self) -> float:
        """Least value on the grid."""
        return -self.scale * self.zero_point

    @property
    def high(self) -> float:
        """Greatest value on the grid."""
        return self.scale * (STEPS - self.zero_point)


@dataclass
class Seen:
    """What one tensor was on the calibration photos.

    Attributes:
        low: Least value per channel, float32 ``(channels,)``.
        high: Greatest value per channel.
        values: A sample, float32 ``(n, channels)``: whole pixels, evenly from all photos.
    """

    low: FloatArray
    high: FloatArray
    values: FloatArray

    def divided(self, factor: FloatArray) -> Seen:
        """Returns the same of the tensor with each channel divided by its factor."""
        return Seen(self.low / factor, self.high / factor, self.values / factor)


def read_photos(paths: Sequence[Path], spec: ModelSpec) -> Iterator[npt.NDArray[Any]]:
    """Yields each photo as the network's input, prepared exactly as at run time.

    Raises:
        DatasetError: A photo cannot be read.
    """
    for path in paths:
        yield prepare(load_image(path), spec)[0]


def chosen_photos(paths: Sequence[Path], count: int, seed: int) -> list[Path]:
    """Returns at most ``count`` of the photos, the same ones for the same seed."""
    ordered = sorted(paths)
    if len(ordered) <= count:
        return ordered
    picked = np.random.default_rng(seed).choice(len(ordered), count, replace=False)
    return [ordered[i] for i in sorted(picked)]


def session(model: Any, outputs: Sequence[str] = (), *, optimise: bool = True) -> Any:
    """Opens a model in ONNX Runtime; further tensors of it become outputs."""
    onnx = require_onnx()
    if outputs:
        extended = copied(model)
        own = {o.name for o in extended.graph.output}
        extended.graph.output.extend(
            onnx.helper.make_empty_tensor_value_info(name) for name in outputs if name not in own
        )
        model = extended
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.inter_op_num_threads = 1
    options.log_severity_level = 4
    if not optimise:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    return ort.InferenceSession(
        model.SerializeToString(),
        options,
        providers=["CPUExecutionProvider"],
        disabled_optimizers=[WEIGHT_ROUNDING],
    )


def observe(
    model: Any,
    tensors: Sequence[str],
    photos: Sequence[Path],
    spec: ModelSpec,
    *,
    seed: int = 0,
    progress: Callable[..., Any] = tqdm,
) -> dict[str, Seen]:
    """Runs the float model on photos and returns what the tensors were."""
    names = list(dict.fromkeys(tensors))
    runner = session(model, names)
    feed = runner.get_inputs()[0].name
    rng = np.random.default_rng(seed)
    seen: dict[str, Seen] = {}
    samples: dict[str, list[FloatArray]] = {name: [] for name in names}
    for tensor in progress(read_photos(photos, spec), total=len(photos), desc="ranges"):
        for name, value in zip(names, runner.run(names, {feed: tensor}), strict=True):
            pixels = _by_channel(value)
            low, high = pixels.min(axis=1), pixels.max(axis=1)
            if name in seen:
                np.minimum(seen[name].low, low, out=seen[name].low)
                np.maximum(seen[name].high, high, out=seen[name].high)
            else:
                seen[name] = Seen(low.copy(), high.copy(), np.zeros((0, 0), np.float32))
            count = max(1, min(pixels.shape[1], VALUES_MAX // (len(photos) * len(low))))
            samples[name].append(pixels[:, rng.integers(0, pixels.shape[1], count)].T)
    for name in names:
        seen[name].values = np.concatenate(samples[name])
    return seen


def _by_channel(value: npt.NDArray[Any]) -> FloatArray:
    """Returns ``(channels, pixels)`` of a ``(1, channels, ...)`` tensor."""
    flat = np.asarray(value, np.float32)
    return flat.reshape(flat.shape[1] if flat.ndim > 1 else 1, -1)


def best_grid(
    values: FloatArray,
    low: float,
    high: float,
    after: Callable[[FloatArray], FloatArray] | None = None,
    weight: Callable[[FloatArray], FloatArray] | None = None,
    power: int = POWER,
) -> Grid:
    """Returns the grid with the least error on a sample.

    Both ends are searched in turn, from the full range inwards (as in Nagel et al., "A White Paper
    on Neural Network Quantization", arXiv 2106.08295, section 3.1, there with squares). A wild
    value far outside costs its own clipping and no more.

    Args:
        values: The sample, ``(n, channels)``.
        low: Least value ever seen.
        high: Greatest value ever seen.
        after: The activation that follows; the error is measured behind it, so that a range that
            it flattens gets few codes.
        weight: What the error of each value is multiplied by.
        power: Of the error in what is lowered.
    """
    sample = values[:: max(1, values.size // SEARCH_MAX)]
    sample = sample[np.isfinite(sample).all(axis=1)]
    apply = after or (lambda x: x)
    wanted = apply(sample)
    by = weight(sample) if weight is not None else np.float32(1)
    low = -_tamed(-low, -sample)
    high = _tamed(high, sample)

    def cost(a: float, b: float) -> float:
        error = ((apply(Grid.over(a, b).round(sample)) - wanted) * by).ravel()
        return float((np.abs(error) ** power).sum())

    best_a, best_b = low, high
    for shrinks in (COARSE, FINE, FINE):
        best_b = min((best_b * s for s in shrinks), key=lambda b: cost(best_a, b))
        best_a = min((best_a * s for s in shrinks), key=lambda a: cost(a, best_b))
    return Grid.over(best_a, best_b)


def _tamed(end: float, sample: FloatArray) -> float:
    """Returns a range's upper end, or ``WILD`` times what all but 1 in 1000 positive values reach.

    Square error alone would give half of the codes to one broken pixel.
    """
    positive = sample[sample > 0]
    if not np.isfinite(end) or len(positive) >= 100:
        usual = WILD * float(np.quantile(positive, 0.999)) if len(positive) else 0.0
        return min(float(end), usual) if np.isfinite(end) else usual
    return max(float(end), 0.0)


def sigmoid(x: FloatArray) -> FloatArray:
    """Returns 1 / (1 + exp(-x))."""
    result: FloatArray = np.float32(1) / (np.float32(1) + np.exp(-np.clip(x, -60, 60)))
    return result
