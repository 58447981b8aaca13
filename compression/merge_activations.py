"""Finds activations that a file draws as several operators, and makes one module of each.

ONNX has no operator for SiLU (``x * Sigmoid(x)``) and, in older versions, none for hard-swish, Mish
or GELU; exporters draw them in several ways. They are told by what they compute: a small closed
part of the graph, elementwise, with one input, is run over a row of numbers and compared with the
activations that are known. So they can be replaced by cheaper ones (``activations``).
"""

from __future__ import annotations

import itertools
import operator
from collections import Counter
from collections.abc import Callable
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from .plain import constant

KNOWN: Final[dict[str, Callable[[], nn.Module]]] = {
    "SiLU": nn.SiLU,
    "hard-swish": nn.Hardswish,
    "Mish": nn.Mish,
    "GELU": nn.GELU,
    "GELU by tanh": lambda: nn.GELU(approximate="tanh"),
}
"""Activations that are looked for, beside LeakyReLU of any slope."""
TOLERANCE: Final = 1e-5
"""Largest difference from a known activation, as a part of the number (of 1, if that is more)."""
FAR: Final = (-1e4, -100.0, -30.0, -15.0, 15.0, 30.0, 100.0, 1e4)
"""Compared, too: what is clipped far out is no plain activation."""
NODES_MAX: Final = 10
"""Operators that one activation is drawn with, at most."""
_CALLS: Final = (
    operator.add, operator.sub, operator.mul, operator.truediv, operator.neg, operator.pow,
    torch.add, torch.sub, torch.mul, torch.div, torch.neg, torch.pow, torch.exp, torch.log,
    torch.sigmoid, torch.tanh, torch.erf, torch.clamp, F.sigmoid, F.tanh, F.softplus, F.relu,
    F.relu6, F.hardsigmoid, F.hardtanh, F.silu, F.hardswish, F.mish, F.gelu, F.leaky_relu,
    "sigmoid", "tanh", "add", "sub", "mul", "div", "neg", "pow", "clamp",
)  # fmt: skip
_MODULES: Final = (
    nn.Sigmoid, nn.Hardsigmoid, nn.Tanh, nn.Softplus, nn.ReLU, nn.ReLU6, nn.Hardtanh,
)  # fmt: skip
_CONVERTED: Final = (
    "OnnxHardSigmoid", "OnnxErf", "OnnxClip", "OnnxPow", "OnnxNeg", "OnnxFunction",
)  # fmt: skip


def merge_activations(graph: fx.GraphModule) -> dict[str, int]:
    """Puts a module in the place of each activation that is drawn in operators or functions.

    Args:
        graph: Rewritten by ``plain``; changed in place. What it computes stays the same.

    Returns:
        Name of a known activation -> how many were found.
    """
    numbers = torch.cat([torch.linspace(-10, 10, 401), torch.tensor(FAR)])
    calls = Counter(n.target for n in graph.graph.nodes if n.op == "call_module")
    modules = dict(graph.named_modules())
    order = {node: place for place, node in enumerate(graph.graph.nodes)}
    found: dict[str, int] = {}
    for last in reversed(list(graph.graph.nodes)):
        if not last.users or not _elementwise(last, modules):
            continue
        for first, inside in _closed_parts(graph, last, modules, order):
            values = _computed(graph, first, inside, numbers)
            name, module = _recognised(numbers, values)
            if module is None:
                continue
            # The name of a module in the part, where it says which layer it is of.
            alone = (str(n.target) for n in inside if calls[n.target] == 1)
            fresh = (f"activation_{i}" for i in itertools.count())
            target = next(alone, None) or next(n for n in fresh if n not in modules)
            modules[target] = module
            graph.add_submodule(target, module)
            with graph.graph.inserting_before(last):
                new = graph.graph.call_module(target, (first,))
            new.meta = dict(last.meta)
            last.replace_all_uses_with(new)
            for node in reversed(inside):
                graph.graph.erase_node(node)
            found[name] = found.get(name, 0) + 1
            break
    graph.delete_all_unused_submodules()
    graph.recompile()
    return found


def _elementwise(node: fx.Node, modules: dict[str, nn.Module]) -> bool:
    if node.op == "call_module":
        module = modules.get(str(node.target))
        return isinstance(module, _MODULES) or type(module).__name__.startswith(_CONVERTED)
    return node.op in ("call_function", "call_method") and node.target in _CALLS


def _closed_parts(
    graph: fx.GraphModule,
    last: fx.Node,
    modules: dict[str, nn.Module],
    order: dict[fx.Node, int],
) -> list[tuple[fx.Node, list[fx.Node]]]:
    """Returns the parts of the graph that end in a node and hang on one other alone.

    Returns:
        Pairs of the node before a part and the part's nodes, in order; smallest first.
    """

    def read_by(node: fx.Node) -> set[fx.Node]:
        values = {read: constant(graph, read) for read in node.all_input_nodes}
        fixed = {
            read
            for read, value in values.items()
            if value is not None and value.numel() == 1 and not isinstance(value, nn.Parameter)
        }
        return set(values) - fixed

    inside, open_ends = {last}, read_by(last)
    found = []
    while open_ends and len(inside) <= NODES_MAX:
        # One module alone is what it is; its kind is known without running it.
        if len(open_ends) == 1 and (len(inside) > 1 or last.op != "call_module"):
            found.append((next(iter(open_ends)), sorted(inside, key=order.__getitem__)))
        newest = max(open_ends, key=order.__getitem__)
        others = [user for user in newest.users if user not in inside]
        if others or not _elementwise(newest, modules):
            break
        open_ends.remove(newest)
        inside.add(newest)
        open_ends |= read_by(newest)
    return found


def _computed(
    graph: fx.GraphModule, first: fx.Node, inside: list[fx.Node], numbers: Tensor
) -> Tensor | None:
    """Returns what a part makes of numbers; None if it cannot be run on them alone."""
    known: dict[Any, Any] = {first: numbers.clone()}  # an activation may work in place
    try:
        with torch.no_grad():
            for node in inside:
                for read in node.all_input_nodes:
                    if read not in known:
                        known[read] = constant(graph, read)
                args, keywords = fx.node.map_arg((node.args, node.kwargs), known.__getitem__)
                target: Any = node.target
                if node.op == "call_method":
                    known[node] = getattr(args[0], target)(*args[1:], **keywords)
                    continue
                run = graph.get_submodule(target) if node.op == "call_module" else target
                known[node] = run(*args, **keywords)
    except Exception:  # a constant of the network's shape, for one: then it is no activation
        return None
    result = known[inside[-1]]
    return result if isinstance(result, Tensor) else None


def _recognised(numbers: Tensor, values: Tensor | None) -> tuple[str, nn.Module | None]:
    """Returns the name of the activation that makes such values of these numbers, and a module."""
    if values is None or values.shape != numbers.shape:
        return "", None
    slope = float(values[0] / numbers[0])
    candidates = {name: make() for name, make in KNOWN.items()}
    if 0 < slope < 1:
        candidates["LeakyReLU"] = nn.LeakyReLU(round(slope, 6))
    for name, module in candidates.items():
        gap = (module(numbers) - values).abs() / numbers.abs().clamp_min(1)
        if gap.max() <= TOLERANCE:
            return name, module
    return "", None
