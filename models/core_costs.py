"""What ONNX Runtime's convolutions cost on Cortex-A76 (Pi 5) and Cortex-A72 (Pi 4), by size.

A table to compare sizes of a layer with while pruning or factorising, thousands of times a
second; ``cost.count`` measures a finished file. How it came about: 810 networks of a single
convolution, in three kinds of numbers, were run by ONNX Runtime 1.31.1 in an emulated computer
(``emulator``: its clock counts instructions), and ONNX Runtime's profiler told those of the
convolution, less the 25,000 that profiling adds. Each family of convolutions that ONNX Runtime
computes in a way of its own was fitted by a sum of a few terms, none negative, by relative error.

Root mean square error of the fits: 1x1 0.9-2.2 %; k x k 0.5-2.9 % (unsigned on A72: 6.5 %); float
depthwise 2-5 % (small maps of 7x7 up to 17 % too low); integer depthwise 3x3 and 5x5 0.5-2.3 %,
with channels that are no multiple of 8 5 %, other kernels 4 %. Convolutions in a few groups
(1 < groups < channels) were left out of the fit; integer ones come out up to a third too low.
Sums over whole networks, predicted over measured on A76 and A72: the shipped INT8 detector
0.99 and 1.00, its float file 0.99 and 0.99, YOLOX-nano float 0.97 (a Sigmoid fused into its
class layers is not counted), NanoDet-Plus-m float 0.96 and 0.96, FastestDet float 0.98 and 0.98.

Float and depthwise convolutions need the same instructions on both cores, within 1 %: only the
integer matrix product knows the dot product, which Cortex-A72 lacks.

Instructions are not milliseconds: caches, bandwidth and issue width are left out.
"""

from __future__ import annotations

import math
from typing import Final

from .errors import InputError

CORES: Final = ("cortex-a76", "cortex-a72")
KINDS: Final = ("float", "s8", "u8")
"""Numbers that a convolution reads: float, or signed or unsigned 8-bit activations (the weights
are signed then)."""

Terms = dict[str, float]

# What each term counts, once per convolution, is in ``_terms``. ``pad_in`` and ``pad_out``: the
# summed length and the outputs are rounded up to these multiples.
FLOAT: Final[dict[str, Terms]] = {
    "pointwise": {"call": 16000, "output": 2.1, "mac": 0.3116, "patch": 0.094},
    "dense": {"call": 9000, "output": 1.8, "mac": 0.3142, "patch": 1.93, "edge": 44.6},
    "dense strided": {
        **{"call": 1000, "output": 1.77, "mac": 0.3122, "patch": 6.3, "tap": 1.6, "edge": 41.5},
        "pad_in": 4,
    },
    "depthwise 3x3": {"call": 13000, "output": 9.81, "edge": 24.7},
    "depthwise": {"call": 31000, "output": 0.44, "mac": 1.96, "edge": 45.8},
    "depthwise strided": {"call": 17000, "output": 1.8, "mac": 7.08, "edge": 27.3},
}
S8_DEPTHWISE: Final[dict[str, Terms]] = {
    "depthwise 3x3, 16": {"call": 28000, "output": 4.94, "tap": 11.3},
    "depthwise 3x3, 8": {"call": 23000, "output": 6.7, "tap": 12.25},
    "depthwise 5x5, 16": {"call": 27000, "output": 13.11, "tap": 12.67},
    "depthwise 5x5, 8": {"call": 164000, "output": 13.52},
    "depthwise other": {"call": 101000, "output": 1.1, "tap": 26.7, "mac": 0.133},
    "depthwise uneven": {"call": 32000, "output": 5.35, "tap": 38.3, "mac": 1.14},
}
U8_DEPTHWISE: Final[dict[str, Terms]] = {
    "depthwise 3x3, 16": {"call": 28000, "output": 5.51, "tap": 11.13},
    "depthwise 3x3, 8": {"call": 23000, "output": 7.36, "tap": 12.89},
    "depthwise 5x5, 16": {"call": 27000, "output": 14.62, "tap": 12.71},
    "depthwise 5x5, 8": {"call": 170000, "output": 15.18},
    "depthwise other": {"call": 110000, "output": 0.83, "tap": 29.1, "mac": 0.16},
    "depthwise uneven": {"call": 32000, "output": 5.32, "tap": 37.9, "mac": 1.145},
}
COSTS: Final[dict[str, dict[str, dict[str, Terms]]]] = {
    "cortex-a76": {
        "float": FLOAT,
        "s8": {
            **S8_DEPTHWISE,
            "pointwise": {
                **{"call": 22000, "cell": 14.0, "output": 3.08, "mac": 0.0914, "patch": 0.184},
                **{"pad_in": 16, "pad_out": 16},
            },
            "dense": {
                **{"call": 27000, "cell": 158, "output": 3.34, "mac": 0.0873, "patch": 0.244},
                **{"tap": 9.87, "pad_in": 16, "pad_out": 16},
            },
        },
        "u8": {
            **U8_DEPTHWISE,
            "pointwise": {
                **{"call": 23000, "cell": 23.9, "output": 3.36, "mac": 0.0893, "patch": 0.671},
                **{"pad_in": 8, "pad_out": 8},
            },
            "dense": {
                **{"call": 28000, "cell": 148, "output": 3.48, "mac": 0.0887, "patch": 0.579},
                **{"tap": 13.9, "pad_in": 16, "pad_out": 8},
            },
        },
    },
    "cortex-a72": {
        "float": FLOAT,
        "s8": {
            **S8_DEPTHWISE,
            "pointwise": {
                **{"call": 21000, "cell": 12.8, "output": 5.59, "mac": 0.2971, "patch": 0.203},
                **{"pad_in": 16, "pad_out": 4},
            },
            "dense": {
                **{"call": 26000, "cell": 148, "output": 6.47, "mac": 0.2866, "patch": 0.364},
                **{"tap": 10.3, "pad_in": 16, "pad_out": 4},
            },
        },
        "u8": {
            **U8_DEPTHWISE,
            "pointwise": {
                **{"call": 22000, "cell": 25.6, "output": 6.11, "mac": 0.2375, "patch": 0.574},
                **{"pad_in": 16, "pad_out": 4},
            },
            "dense": {
                **{"call": 25000, "cell": 203, "output": 3.3, "mac": 0.2764, "tap": 12.8},
                **{"pad_in": 16, "pad_out": 1},
            },
        },
    },
}


OPERATORS: Final[dict[str, tuple[float, float]]] = {
    "Add": (6000, 1.74),
    "Concat": (7000, 0.51),
    "DequantizeLinear": (6000, 1.37),
    "Gather": (10000, 0.49),
    "LeakyRelu": (5000, 2.53),
    "MaxPool": (5000, 22.4),
    "Mul": (6000, 1.65),
    "QLinearAdd": (16000, 2.84),
    "QLinearConcat": (7000, 0.45),
    "QLinearLeakyRelu": (9000, 4.0),
    "QLinearMaxPool": (5000, 8.65),
    "QLinearMaxPool, channels first": (5000, 146.0),
    "QLinearMul": (16000, 2.87),
    "QLinearResize": (5000, 18.4),
    "QLinearSigmoid": (9000, 4.02),
    "QuantizeLinear": (5000, 2.75),
    "QuickGelu": (3000, 10.0),
    "Reshape": (4000, 0.0),
    "Resize": (5000, 1.9),
    "Sigmoid": (3000, 8.0),
    "Split": (10000, 0.5),
    "Transpose": (5000, 0.71),
}
"""Other operators of the optimised graphs of detectors, the same on both cores: instructions per
call, and per number of the output. A float SiLU is a QuickGelu; an integer LeakyReLU is an operator
of its own, while a ReLU costs nothing there: it is in the convolution's rounding. Poolings are of
3x3 cells, and channels come last in the integer one (``NhwcMaxPool``); the integer Resize to the
nearest cell takes ten times what it takes in float."""

POOL_TAPS: Final = 9
"""Of the poolings in the table."""
CHANNELWISE: Final = 188
"""An integer Mul of two sizes begins anew wherever the smaller one ends: so many more each time."""


def conv_instructions(
    core: str,
    kind: str,
    inputs: int,
    outputs: int,
    kernel: tuple[int, int],
    groups: int,
    cells: int,
    stride: int = 1,
) -> float:
    """Returns about how many instructions one convolution takes ONNX Runtime for one photo.

    Args:
        core: One of ``CORES``.
        kind: One of ``KINDS``.
        inputs: Channels that come in.
        outputs: Channels that go out.
        kernel: Height and width.
        groups: 1, or ``inputs`` for a depthwise convolution.
        cells: Height x width of the output.
        stride: The larger of both.

    Raises:
        InputError: ``core`` or ``kind`` is not in the table.
    """
    if core not in COSTS or kind not in KINDS:
        message = (
            f"expected a core of {', '.join(CORES)} and numbers of {', '.join(KINDS)}, "
            f"found {core!r} and {kind!r}"
        )
        raise InputError(message)
    taps = kernel[0] * kernel[1]
    depthwise = groups == inputs == outputs > 1
    family = _depthwise(kind, inputs, kernel, stride) if depthwise else "dense"
    if not depthwise and taps == stride == groups == 1:
        family = "pointwise"
    elif not depthwise and kind == "float" and stride > 1:
        family = "dense strided"
    terms = COSTS[core][kind][family]
    counts = _terms(terms, inputs, outputs, taps, groups, cells)
    return sum(counts[name] * cost for name, cost in terms.items() if name in counts)


def _depthwise(kind: str, channels: int, kernel: tuple[int, int], stride: int) -> str:
    """Returns the family of a depthwise convolution: which loop ONNX Runtime picks."""
    if kind == "float":
        if stride > 1:
            return "depthwise strided"
        return "depthwise 3x3" if kernel == (3, 3) else "depthwise"
    if channels % 8:
        return "depthwise uneven"
    if kernel not in ((3, 3), (5, 5)):
        return "depthwise other"
    return f"depthwise {kernel[0]}x{kernel[1]}, {8 if channels % 16 else 16}"


def _terms(
    terms: Terms, inputs: int, outputs: int, taps: int, groups: int, cells: int
) -> dict[str, float]:
    """Returns how often each cost is paid.

    call: once. cell: per cell of the output map. output: per number of the output. tap: per cell
    and kernel element. mac: per multiply-accumulate. patch: per number copied or packed before the
    matrix product. edge: per kernel element and channel along the rim, for a square map.
    """
    depth = _up(taps * inputs // groups, int(terms.get("pad_in", 1)))
    wide = _up(outputs // groups, int(terms.get("pad_out", 1))) * groups
    return {
        "call": 1,
        "cell": cells,
        "output": cells * wide,
        "tap": cells * taps * (1 if groups == inputs else groups),
        "mac": cells * wide * depth,
        "patch": cells * depth * groups,
        "edge": math.sqrt(cells) * taps * inputs,
    }


def _up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple
