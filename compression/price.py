"""What a model costs on the core it is for, in the best unit that can be had here."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from ..models.core_costs import CHANNELWISE, CORES, OPERATORS, conv_instructions
from ..models.errors import EdgeSightError, ModelFileError, RecipeError
from ..models.graph import MAC_OPS, attributes, initializers, load_model, node_macs, tensor_shapes
from .qdq import CLIPPING_OPS, Links, truncates

QUANTIZE: Final = "QuantizeLinear"
DEQUANTIZE: Final = "DequantizeLinear"
INT8: Final = 3
INT64: Final = 7
"""Types of numbers in ONNX files."""
COUNTED_BUDGET_S: Final = 1200.0
"""With less time a search does not count in the emulated computer: that takes up to a minute."""


@dataclass(frozen=True)
class Price:
    """A way to tell the cost of a model.

    Attributes:
        kind: Key of ``PRICES``.
        text: What is counted, for people.
        of: ONNX file -> cost per picture.
    """

    kind: str
    text: str
    of: Callable[[Path], float]


def _counted(core: str) -> Price | None:
    """Instructions counted in an emulated computer, if it has been made here."""
    if not can_count(core):
        return None
    known: dict[str, float] = {}

    def of(path: Path) -> float:
        # Instructions depend on the graph, not on the weights: training does not change them.
        key = graph_print(load_model(path))
        if key not in known:
            known[key] = float(count_instructions([path], core)[0])
        return known[key]

    return Price("counted", f"instructions, counted on an emulated {core}", of)


def _predicted(core: str) -> Price | None:
    if core not in CORES:
        return None
    text = f"instructions on {core}, from a table (edgesight cost counts them)"
    return Price("predicted", text, lambda path: predicted_instructions(load_model(path), core))


def _macs(core: str) -> Price:
    text = "multiply-accumulates: they are the same on every core, and INT8 does not lower them"
    return Price("macs", text, lambda path: float(sum(node_macs(load_model(path)).values())))


PRICES: Final[dict[str, Callable[[str], Price | None]]] = {
    "counted": _counted,
    "predicted": _predicted,
    "macs": _macs,
}
"""Ways to tell a cost, the best first; one that is not to be had for a core here gives None."""


def price_for(core: str, kind: str | None = None, budget_s: float | None = None) -> Price:
    """Returns the best way to tell what a model costs on a core.

    Args:
        core: A recipe's ``target.core``.
        kind: Take this one, because others count with it already.
        budget_s: Seconds there are for the whole search; None: as many as it takes.

    Raises:
        RecipeError: ``kind`` is not to be had here.
    """
    hurried = budget_s is not None and budget_s < COUNTED_BUDGET_S
    for name, make in PRICES.items():
        if kind is None and hurried and name == "counted":
            continue
        if kind in (None, name) and (price := make(core)) is not None:
            return price
    message = (
        f"expected costs to be {kind}, as the study began with, found that this machine cannot say "
        "them; work on it where it was begun, or begin one of another name (search.study)"
    )
    raise RecipeError(message)


def can_count(core: str) -> bool:
    """Says whether an emulated computer of this core is there and ready."""
    from ..models.emulator import find_guest, find_qemu

    if core not in CORES:
        return False
    try:
        find_qemu()
    except EdgeSightError:
        return False
    return find_guest() is not None


def count_instructions(paths: list[Path], core: str) -> list[int]:
    """Returns the instructions of one inference of each file, counted in an emulated computer.

    Raises:
        ModelFileError: One cannot be counted.
    """
    from ..models.cost import count

    found = []
    for path, cost in zip(paths, count(paths, core, progress=False), strict=True):
        if isinstance(cost, ModelFileError):
            message = f"{path.name}: {cost}"
            raise ModelFileError(message) from cost
        found.append(cost.instructions)
    return found


def graph_print(model: Any) -> str:
    """Returns what two files share whose graphs differ in nothing but numbers stored in them."""
    digest = hashlib.sha256()
    for node in model.graph.node:
        digest.update(node.SerializeToString(deterministic=True))
    for tensor in model.graph.initializer:
        digest.update(f"{tensor.name}{list(tensor.dims)}{tensor.data_type};".encode())
        if tensor.data_type == INT64:  # shapes and axes: they do decide what is computed
            digest.update(tensor.SerializeToString())
    return digest.hexdigest()


def predicted_instructions(model: Any, core: str) -> float:
    """Returns about how many instructions a model takes on a core, from ``core_costs``.

    Args:
        model: An ``onnx.ModelProto`` with fixed sizes, float or QDQ.
        core: One of ``core_costs.CORES``.

    Raises:
        ModelFileError: The sizes cannot be inferred.
    """
    return predicted_convs(model, core) + predicted_others(model)


def predicted_others(model: Any) -> float:
    """Returns about how many instructions all but convolutions and matrix products take.

    What ONNX Runtime fuses into a convolution costs nothing here: a ReLU, and a float LeakyReLU. An
    operator between quantizers counts as the integer one, and those quantizers then cost nothing.
    Operators that ``core_costs.OPERATORS`` does not know are left out.
    """
    links, shapes = Links(model.graph), tensor_shapes(model)

    def integer(node: Any) -> bool:
        if truncates(node):
            return False
        makers = [links.maker.get(name) for name in links.data_inputs(node)]
        ends = [r for out in node.output for r in links.readers[out]]
        if len(ends) == 1 and ends[0].op_type in CLIPPING_OPS:
            ends = links.readers[ends[0].output[0]]
        grids = bool(makers) and all(m is not None and m.op_type == DEQUANTIZE for m in makers)
        return grids and bool(ends) and all(e.op_type == QUANTIZE for e in ends)

    whole = {node.output[0]: integer(node) for node in model.graph.node}
    total = 0.0
    for node in model.graph.node:
        kind = node.op_type
        maker = links.maker.get(node.input[0]) if node.input else None
        if kind in (*MAC_OPS, *CLIPPING_OPS) or not links.data_inputs(node):
            continue
        if kind == QUANTIZE:
            free = maker is not None and (whole[maker.output[0]] or maker.op_type in CLIPPING_OPS)
        elif kind == DEQUANTIZE:
            readers = links.readers[node.output[0]]
            free = bool(readers) and all(whole[r.output[0]] for r in readers)
        else:
            fused = maker is not None and maker.op_type == "Conv" and not whole[node.output[0]]
            free = kind == "LeakyRelu" and fused
        if free:
            continue
        kind = f"QLinear{kind}" if whole[node.output[0]] and f"QLinear{kind}" in OPERATORS else kind
        shape = shapes.get(node.output[0], (0,))
        call, each = OPERATORS.get(kind, (0.0, 0.0))
        total += call + each * float(np.prod(shape))
        if kind == "QLinearMul" and any(_is_constant(name, links) for name in node.input):
            total += CHANNELWISE * float(np.prod(shape)) / shape[1]
    return total


def _is_constant(name: str, links: Links) -> bool:
    maker = links.maker.get(name)
    return maker is not None and all(source in links.stored for source in maker.input)


def predicted_convs(model: Any, core: str) -> float:
    """Returns about how many instructions the convolutions of a model take on a core.

    Convolutions between quantizers count as integer ones, signed or unsigned as their input.

    Args:
        model: An ``onnx.ModelProto`` with fixed sizes.
        core: One of ``core_costs.CORES``.

    Raises:
        ModelFileError: The sizes cannot be inferred.
    """
    shapes, stored = tensor_shapes(model), initializers(model)
    producer = {out: node for node in model.graph.node for out in node.output}
    macs = node_macs(model)
    total = 0.0
    for node in model.graph.node:
        if node.output[0] not in macs:
            continue
        kind = _numbers(node, producer, stored)
        if node.op_type != "Conv":  # a matrix product is a 1x1 convolution of one cell
            outputs = shapes[node.output[0]][-1]
            inputs = shapes[node.input[0]][-1]
            cells = max(1, macs[node.output[0]] // max(1, inputs * outputs))
            total += conv_instructions(core, kind, inputs, outputs, (1, 1), 1, cells)
            continue
        settings = attributes(node)
        groups, strides = settings.get("group", 1), settings.get("strides", (1,))
        outputs, per_group, height, width = shapes[node.input[1]]
        cells = int(np.prod(shapes[node.output[0]][2:]))
        total += conv_instructions(
            core, kind, per_group * groups, outputs, (height, width), groups, cells, max(strides)
        )
    return total


def _numbers(node: Any, producer: dict[str, Any], stored: dict[str, Any]) -> str:
    """Returns in which numbers a convolution computes: ``float``, ``s8`` or ``u8``."""
    sources = [producer.get(name) for name in node.input[:2]]
    readers = [s for s in sources if s is not None and s.op_type == "DequantizeLinear"]
    if len(readers) < 2:
        return "float"
    zero = stored.get(readers[0].input[2]) if len(readers[0].input) > 2 else None
    return "s8" if zero is not None and zero.data_type == INT8 else "u8"
