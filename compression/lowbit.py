"""Weights of 7 to 1 bits in an INT8 model: which layers, rounded how, trained to live with it.

Activations stay at 8 bits, so that the convolutions stay the integer ones that every ONNX Runtime
has; the file gets smaller, not the time. Error feedback while rounding is optimal brain
quantization in the order-free form of Frantar et al., "GPTQ" (arXiv 2210.17323); 1 bit is a sign
times a scale per channel as in Rastegari et al., "XNOR-Net" (arXiv 1603.05279).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from ..models.detections import FloatArray
from ..models.errors import DatasetError, ModelFileError, RecipeError
from ..models.graph import require_onnx
from ..models.spec import ModelSpec
from .bits_graph import PLANES, WIDTHS, levels, packed_bytes, store_packed, store_sparingly
from .calibrate import Seen, chosen_photos, observe, read_photos, session
from .qdq import WEIGHT_OPS, Links
from .rounding import DAMPING, lost_mean
from .slim import shorten_names

DoubleArray = npt.NDArray[np.float64]
CODES_MIN: Final = 1024
"""Smaller weights keep 8 bits: the operators that unpack them would take what they save."""
SHRINKS: Final = np.geomspace(1.0, 0.25, 25)
PROBE_BITS: Final = 4
"""Width at which each layer's harm is measured; at others it goes with the layer's own error."""
PROBE_PHOTOS: Final = 8
FIT_PHOTOS: Final = 64
"""Photos that tell how a layer's inputs go together."""
UNPACK_BYTES: Final = {1: 150, 2: 300, 3: 450}
"""What the operators that unpack one weight take in a file, by planes."""
SIZE_TRIALS: Final = 6


@dataclass(frozen=True)
class LowBitConfig:
    """How few bits.

    Attributes:
        weights: Bits of every layer's weights.
        bytes_max: Largest file; layers then go to fewer bits one by one, where it harms least.
            One of the two.
        photos_max: Photos to round on, at most.
        seed: Of their choice, and of training.
        refine: Photo passes of training after rounding; 0: none.
    """

    weights: int = 8
    bytes_max: int | None = None
    photos_max: int = FIT_PHOTOS
    seed: int = 0
    refine: int = 0

    def __post_init__(self) -> None:
        """Checks every field.

        Raises:
            RecipeError: A value is impossible.
        """
        if self.weights not in WIDTHS:
            known = ", ".join(map(str, WIDTHS))
            message = f"quantize.weights: expected one of {known} bits, found {self.weights!r}"
            raise RecipeError(message)
        if self.bytes_max is not None and self.weights != 8:
            message = (
                "quantize: expected weights or bytes_max, found both; with bytes_max each layer's "
                "bits are chosen by what they harm"
            )
            raise RecipeError(message)
        for key, least in (("bytes_max", 1), ("photos_max", 1), ("refine", 0)):
            value = getattr(self, key)
            if value is not None and value < least:
                message = f"quantize.{key}: expected at least {least}, found {value!r}"
                raise RecipeError(message)


@dataclass(frozen=True)
class LowBitResult:
    """A model with weights of few bits.

    Attributes:
        model: ``onnx.ModelProto``, packed, ready to be saved.
        report: JSON-ready.
        notes: Sentences for the reader.
    """

    model: Any
    report: dict[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Layer:
    """One weighted node of a QDQ model.

    Attributes:
        name: The node's first output.
        real: Tensor that its DequantizeLinear makes of the codes.
        codes: Initializer, int8.
        scale: Initializer, float32 per output channel.
        axis: Of the output channels.
        bias: Initializers of the bias: codes int32 and scale; None if it has none.
        source: Its data input.
        input_scale: Of that, or None if it is in float.
    """

    name: str
    real: str
    codes: str
    scale: str
    axis: int
    bias: tuple[str, str] | None
    source: str
    input_scale: float | None


def lower(
    quantized: Any,
    original: Any,
    spec: ModelSpec,
    photos: Sequence[Path],
    config: LowBitConfig,
    *,
    progress: Callable[..., Any] = tqdm,
) -> LowBitResult:
    """Returns an INT8 model with weights of fewer bits.

    Args:
        quantized: QDQ ``onnx.ModelProto`` with 8-bit weights.
        original: The float model that it was made from: the teacher of ``refine``.
        spec: Of both.
        photos: Typical ones, no labels needed.
        config: How few.
        progress: Wraps iterables, as ``tqdm`` does.

    Raises:
        DatasetError: There are no photos, or one cannot be read.
        ModelFileError: The model has no 8-bit weights.
    """
    if not photos:
        message = "expected photos to round weights on, found none; name a folder with some hundred"
        raise DatasetError(message)
    layers = [layer for layer in find_layers(quantized) if _size(quantized, layer) >= CODES_MIN]
    if not layers:
        message = (
            f"expected convolutions with at least {CODES_MIN} weights in 8 bits, found none; "
            "quantize the model first"
        )
        raise ModelFileError(message)
    chosen = chosen_photos(photos, config.photos_max, config.seed)
    sources = list(dict.fromkeys(layer.source for layer in layers))
    seen = observe(quantized, sources, chosen, spec, seed=config.seed, progress=progress)
    fits = {layer.name: Fit.of(quantized, layer, seen[layer.source]) for layer in layers}
    notes: tuple[str, ...] = ()
    if config.bytes_max is None:
        widths = {layer.name: config.weights for layer in layers}
    else:
        few = chosen[:: max(1, len(chosen) // PROBE_PHOTOS)][:PROBE_PHOTOS]
        widths, notes = _within(quantized, layers, fits, few, spec, config.bytes_max, progress)
    model = rounded_model(quantized, layers, fits, widths)
    report: dict[str, Any] = {}
    if config.refine:
        from .lowbit_train import train_lowbit  # torch: not needed without

        model, report["refined"], more = train_lowbit(
            model, quantized, original, spec, photos, layers, widths, config, progress
        )
        notes += more
    packed = packed_model(model, layers, widths)
    size = file_bytes(packed)
    counts = {bits: list(widths.values()).count(bits) for bits in WIDTHS}
    report |= {
        "bytes 8 bits": file_bytes(quantized),
        "bytes": size,
        "layers": {bits: n for bits, n in counts.items() if n},
        "bits": dict(sorted(widths.items())),
    }
    return LowBitResult(packed, report, notes)


def find_layers(model: Any) -> list[Layer]:
    """Returns the weighted nodes of a QDQ model whose weights are stored as int8."""
    onnx = require_onnx()
    links = Links(model.graph)
    array = onnx.numpy_helper.to_array
    found: list[Layer] = []
    taken: set[str] = set()
    for node in model.graph.node:
        if node.op_type not in WEIGHT_OPS:
            continue
        data, weight, *rest = (links.maker.get(name) for name in node.input)
        if not _is_stored(weight, links, onnx.TensorProto.INT8) or weight.input[0] in taken:
            continue
        bias = None
        if rest and _is_stored(rest[0], links, onnx.TensorProto.INT32):
            bias = (rest[0].input[0], rest[0].input[1])
        elif len(node.input) > 2:
            continue  # a bias in float: not of our making
        on_grid = data is not None and data.op_type == "DequantizeLinear"
        step = float(array(links.stored[data.input[1]])) if on_grid else None
        axis = next((a.i for a in weight.attribute if a.name == "axis"), 1)
        taken.add(weight.input[0])
        found.append(
            Layer(
                node.output[0],
                node.input[1],
                weight.input[0],
                weight.input[1],
                axis % len(links.stored[weight.input[0]].dims),
                bias,
                node.input[0],
                step,
            )
        )
    return found


def _is_stored(maker: Any, links: Links, kind: int) -> bool:
    """Whether a node is a DequantizeLinear of stored codes, with a scale per channel."""
    if maker is None or maker.op_type != "DequantizeLinear":
        return False
    codes, scale = (links.stored.get(name) for name in maker.input[:2])
    fits = codes is not None and scale is not None
    return bool(fits and codes.data_type == kind and len(scale.dims) == 1)


def _size(model: Any, layer: Layer) -> int:
    dims = next(t.dims for t in model.graph.initializer if t.name == layer.codes)
    return int(np.prod(dims))


@dataclass(frozen=True)
class Fit:
    """A layer's weights and what is needed to round them well.

    Attributes:
        weight: As 8 bits have it, float64 ``(channels, inputs / groups, ...)``.
        mean: Mean of each input channel.
        moments: Second moments of the inputs, ``(inputs, inputs)``; None where the kernel sees
            more than one pixel or one group: those weights are rounded to nearest.
    """

    weight: DoubleArray
    mean: FloatArray
    moments: DoubleArray | None

    @classmethod
    def of(cls, model: Any, layer: Layer, seen: Seen) -> Fit:
        """Reads a layer's weights and the moments of its inputs."""
        stored = {t.name: t for t in model.graph.initializer}
        array = require_onnx().numpy_helper.to_array
        codes = np.moveaxis(array(stored[layer.codes]).astype(np.float64), layer.axis, 0)
        weight = codes * _column(array(stored[layer.scale]).astype(np.float64), codes.ndim)
        values, moments = seen.values, None
        if weight[0].size == values.shape[1] == weight.shape[1]:
            moments = (values.T.astype(np.float64) @ values) / len(values)
        return cls(weight, values.mean(axis=0), moments)

    def rounded(self, bits: int) -> tuple[npt.NDArray[np.int8], DoubleArray]:
        """Returns the weights as codes of a width, and the scale per channel."""
        flat = self.weight.reshape(len(self.weight), -1)
        power = None if self.moments is None else np.diag(self.moments)
        scales = fitted_scales(flat, bits, power)
        if self.moments is None:
            codes = nearest(flat / scales[:, None], bits)
        else:
            codes = fed_forward(flat, scales, bits, self.moments)
            scales = refitted(flat, codes, scales, self.moments)
        return codes.reshape(self.weight.shape).astype(np.int8), scales

    def error(self, bits: int) -> float:
        """Returns the square error of the output that rounding leaves, summed over channels."""
        codes, scales = self.rounded(bits)
        lost = (codes * _column(scales, codes.ndim) - self.weight).reshape(len(codes), -1)
        if self.moments is None:
            return float((lost**2).sum())
        centred = self.moments - np.outer(self.mean, self.mean)  # the mean goes into the bias
        return float(np.einsum("oi,ij,oj->", lost, centred, lost))


def _column(values: DoubleArray, ndim: int) -> DoubleArray:
    return values.reshape(-1, *[1] * (ndim - 1))


def nearest(value: DoubleArray, bits: int) -> DoubleArray:
    """Returns the nearest codes of a width, as floats."""
    if bits == 1:
        return np.where(value < 0, -1.0, 1.0)
    allowed = levels(bits)
    clipped: DoubleArray = np.clip(np.rint(value), allowed[0], allowed[-1])
    return clipped


def fitted_scales(flat: DoubleArray, bits: int, power: DoubleArray | None) -> DoubleArray:
    """Returns the scale per channel with the least square error.

    Args:
        flat: Weights, ``(channels, weights per channel)``; a channel may be all zero.
        bits: Width.
        power: What the square error of each weight is multiplied by.
    """
    by = np.ones(flat.shape[1]) if power is None else power + 1e-12
    if bits == 1:  # the least squares of a sign times a scale: the mean magnitude
        return np.maximum((np.abs(flat) * by).sum(axis=1) / by.sum(), 1e-8)
    allowed = levels(bits).astype(np.float64)
    top = np.maximum(flat.max(axis=1) / allowed[-1], flat.min(axis=1) / allowed[0])
    best, cost = np.maximum(top, 1e-8), np.full(len(flat), np.inf)
    for shrink in SHRINKS:
        scale = np.maximum(top * shrink, 1e-8)
        error = ((nearest(flat / scale[:, None], bits) * scale[:, None] - flat) ** 2 * by).sum(1)
        best, cost = np.where(error < cost, scale, best), np.minimum(error, cost)
    return best


def fed_forward(
    flat: DoubleArray, scales: DoubleArray, bits: int, moments: DoubleArray
) -> DoubleArray:
    """Returns codes, rounded input by input; later inputs make up for what earlier ones lost."""
    power = np.diag(moments)
    order = np.argsort(-power)
    damped = moments[np.ix_(order, order)] + DAMPING * max(power.mean(), 1e-12) * np.eye(len(power))
    upper = np.linalg.cholesky(np.linalg.inv(damped)).T
    left = flat[:, order].copy()
    codes = np.zeros_like(left)
    for j in range(len(order)):
        codes[:, j] = nearest(left[:, j] / scales, bits)
        error = (left[:, j] - codes[:, j] * scales) / upper[j, j]
        left[:, j + 1 :] -= error[:, None] * upper[j, j + 1 :]
    result = np.empty_like(codes)
    result[:, order] = codes
    return result


def refitted(
    flat: DoubleArray, codes: DoubleArray, scales: DoubleArray, moments: DoubleArray
) -> DoubleArray:
    """Returns the scales with the least square error of the output, now that codes are fixed."""
    past = codes @ moments
    best = (past * flat).sum(axis=1) / np.maximum((past * codes).sum(axis=1), 1e-30)
    return np.where((best > 0.5 * scales) & (best < 2 * scales), best, scales)


def rounded_model(
    quantized: Any, layers: Sequence[Layer], fits: Mapping[str, Fit], widths: Mapping[str, int]
) -> Any:
    """Returns the QDQ model with codes of the given widths, each still in a byte.

    What rounding moves the mean of an output by goes into the bias.
    """
    result = require_onnx().ModelProto()
    result.CopyFrom(quantized)
    for layer in layers:
        fit, bits = fits[layer.name], widths[layer.name]
        if bits == 8:
            continue
        codes, scales = fit.rounded(bits)
        lost = fit.weight - codes * _column(scales, codes.ndim)
        put_weight(result, layer, codes, scales, lost_mean(lost.astype(np.float32), fit.mean))
    return result


def put_weight(
    model: Any,
    layer: Layer,
    codes: npt.NDArray[np.int8],
    scales: DoubleArray,
    bias_change: DoubleArray | None = None,
    bias: DoubleArray | None = None,
) -> None:
    """Stores a layer's codes and scales in place; its bias moves onto the new scales.

    Args:
        model: QDQ.
        layer: Of it.
        codes: Output channels first.
        scales: One per output channel.
        bias_change: What is added to the bias as it is.
        bias: A new bias, in its place.
    """
    numpy_helper = require_onnx().numpy_helper
    stored = {t.name: t for t in model.graph.initializer}

    def put(name: str, value: npt.NDArray[Any]) -> None:
        stored[name].CopyFrom(numpy_helper.from_array(np.ascontiguousarray(value), name))

    if layer.bias is not None:
        old, step = (numpy_helper.to_array(stored[n]).astype(np.float64) for n in layer.bias)
        real = old * step if bias is None else bias
        real = real if bias_change is None else real + bias_change
        unit = layer.input_scale or 1.0
        limit = 2**31 - 1
        # A dead channel's scale would push its bias out of 32 bits.
        scales = np.maximum(scales, np.abs(real) / (2**29 * unit))
        scales = scales.astype(np.float32).astype(np.float64)
        fresh = scales * unit
        put(layer.bias[0], np.clip(np.rint(real / fresh), -limit, limit).astype(np.int32))
        put(layer.bias[1], fresh.astype(np.float32))
    put(layer.codes, np.moveaxis(codes, 0, layer.axis))
    put(layer.scale, scales.astype(np.float32))


def packed_model(model: Any, layers: Sequence[Layer], widths: Mapping[str, int]) -> Any:
    """Returns the file's form of a model whose codes fit their widths; it computes the same."""
    packed = store_packed(store_sparingly(model), {x.codes: widths[x.name] for x in layers})
    shorten_names(packed)
    return packed


def file_bytes(model: Any) -> int:
    """Returns how long a model's file is."""
    return len(model.SerializeToString())


def _within(
    model: Any,
    layers: Sequence[Layer],
    fits: Mapping[str, Fit],
    photos: Sequence[Path],
    spec: ModelSpec,
    bytes_max: int,
    progress: Callable[..., Any],
) -> tuple[dict[str, int], tuple[str, ...]]:
    """Returns the widths that keep a file within a size with the least harm, and notes."""
    most = {layer.name: 8 for layer in layers}
    whole = file_bytes(packed_model(model, layers, most))
    if whole <= bytes_max:
        return most, ("weights stay at 8 bits: the file is small enough",)
    options = {}
    for layer, harm in harms(model, layers, fits, photos, spec, progress):
        fit, count = fits[layer.name], _size(model, layer)
        own = fit.error(PROBE_BITS)
        options[layer.name] = [(8, count, 0.0)] + [
            (
                bits,
                packed_bytes(count, bits) + UNPACK_BYTES[len(PLANES[bits])],
                harm * fit.error(bits) / max(own, 1e-30),
            )
            for bits in sorted(PLANES, reverse=True)
        ]
    goal = bytes_max - whole
    widths = dict(most)
    for _ in range(SIZE_TRIALS):
        widths = cheapest(options, goal)
        size = file_bytes(_shape_only(model, layers, widths))
        if size <= bytes_max or set(widths.values()) == {1}:
            break
        goal -= size - bytes_max
    notes: tuple[str, ...] = ()
    if size > bytes_max:
        notes = (
            f"quantize.bytes_max: expected at most {bytes_max} bytes, found no way below {size}: "
            "this is the smallest file; cut channels (prune) to get further",
        )
    return widths, notes


def _shape_only(model: Any, layers: Sequence[Layer], widths: Mapping[str, int]) -> Any:
    """Returns a file as large as the one with these widths, with any codes."""
    numpy_helper = require_onnx().numpy_helper
    blank = require_onnx().ModelProto()
    blank.CopyFrom(model)
    names = {layer.codes for layer in layers}
    for tensor in blank.graph.initializer:
        if tensor.name in names:
            ones = np.ones(tuple(tensor.dims), np.int8)
            tensor.CopyFrom(numpy_helper.from_array(ones, tensor.name))
    ones_fit = {layer.name: max(1, widths[layer.name]) for layer in layers}
    return packed_model(blank, layers, ones_fit)


def harms(
    model: Any,
    layers: Sequence[Layer],
    fits: Mapping[str, Fit],
    photos: Sequence[Path],
    spec: ModelSpec,
    progress: Callable[..., Any],
) -> Iterator[tuple[Layer, float]]:
    """Yields how far the outputs move when one layer has ``PROBE_BITS`` bits.

    Activations are in float meanwhile: on their grids, any small change rolls the dice of all
    roundings behind it, and hides what the layer itself does.
    """
    import torch

    from .refine import output_distance

    plain = in_float(model)
    feeds = list(read_photos(photos, spec))

    def outputs(changed: Any) -> list[list[Any]]:
        runner = session(changed)
        name = runner.get_inputs()[0].name
        return [[torch.from_numpy(o) for o in runner.run(None, {name: f})] for f in feeds]

    wanted = outputs(plain)
    numpy_helper = require_onnx().numpy_helper
    stored = {t.name: t for t in plain.graph.initializer}
    for layer in progress(layers, desc="harm", unit="layer"):
        tensor = stored[layer.real]
        kept = tensor.SerializeToString()
        codes, scales = fits[layer.name].rounded(PROBE_BITS)
        value = np.moveaxis(codes * _column(scales, codes.ndim), 0, layer.axis)
        value = np.ascontiguousarray(value, np.float32)
        tensor.CopyFrom(numpy_helper.from_array(value, layer.real))
        pairs = zip(outputs(plain), wanted, strict=True)
        yield layer, float(np.mean([float(output_distance(spec, a, b)) for a, b in pairs]))
        tensor.ParseFromString(kept)


def in_float(model: Any) -> Any:
    """Returns a QDQ model without its grids: 8-bit weights as floats, activations not rounded."""
    onnx = require_onnx()
    result = onnx.ModelProto()
    result.CopyFrom(model)
    graph = result.graph
    links = Links(model.graph)
    array = onnx.numpy_helper.to_array
    same: dict[str, str] = {}
    nodes = []
    for node in graph.node:
        for index, name in enumerate(node.input):
            node.input[index] = same.get(name, name)
        if node.op_type == "QuantizeLinear":
            same[node.output[0]] = node.input[0]
        elif node.op_type == "DequantizeLinear" and node.input[0] not in links.stored:
            same[node.output[0]] = node.input[0]
        elif node.op_type == "DequantizeLinear":
            codes, scale, *zero = (array(links.stored[name]) for name in node.input)
            axis = next((a.i for a in node.attribute if a.name == "axis"), 1)
            ends = [scale, *zero]
            if scale.ndim:
                shape = [-1 if i == axis % codes.ndim else 1 for i in range(codes.ndim)]
                ends = [e.reshape(shape) for e in ends]
            shift = ends[1].astype(np.float64) if zero else 0.0
            real = (codes.astype(np.float64) - shift) * ends[0]
            graph.initializer.append(
                onnx.numpy_helper.from_array(real.astype(np.float32), node.output[0])
            )
        else:
            nodes.append(node)
    outputs = {o.name for o in graph.output}
    nodes += [onnx.helper.make_node("Identity", [same[n]], [n]) for n in same if n in outputs]
    del graph.node[:]
    graph.node.extend(nodes)
    return result


def cheapest(
    options: Mapping[str, Sequence[tuple[int, float, float]]], goal: float
) -> dict[str, int]:
    """Returns the width of each layer that saves enough bytes with the least harm in sum.

    Steps along each layer's lower convex hull are taken in the order of harm per byte saved.

    Args:
        options: Layer -> (bits, bytes, harm), the first the one to start from.
        goal: Bytes to change by: negative.
    """
    steps: list[tuple[float, str, int, float]] = []
    for name, rows in options.items():
        at = rows[0]
        while True:
            below = [r for r in rows if r[1] < at[1]]
            if not below:
                break
            nxt = min(below, key=lambda r: (r[2] - at[2]) / (at[1] - r[1]))
            steps.append(((nxt[2] - at[2]) / (at[1] - nxt[1]), name, nxt[0], nxt[1] - at[1]))
            at = nxt
    widths = {name: rows[0][0] for name, rows in options.items()}
    changed = 0.0
    for _, name, bits, size in sorted(steps, key=lambda s: s[0]):
        if changed <= goal:
            break
        widths[name] = bits
        changed += size
    return widths
