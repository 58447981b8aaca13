"""Rewrites traced networks into the few plain operators that the analysis of channels understands.

What a converter made of ONNX operators, and channel splits of user networks, become ordinary torch
functions and choices by index; whatever is not known stays as it is.
"""

from __future__ import annotations

import operator
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.fx.passes.shape_prop import ShapeProp

from ..models.errors import InputError

_ARITHMETIC: dict[Any, Any] = {
    torch.add: operator.add,
    torch.sub: operator.sub,
    torch.mul: operator.mul,
}
_SPLITS: set[Any] = {torch.chunk, torch.split, "chunk", "split"}
_SPLIT_SIZES = ("chunks", "split_size", "split_size_or_sections")
_END = 2**31 - 1


class _Tracer(fx.Tracer):
    """Does not look into the modules of the ONNX converter, which fx cannot follow."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        leaf = type(m).__module__.startswith("onnx2torch")
        return leaf or super().is_leaf_module(m, module_qualified_name)


def trace(net: nn.Module) -> fx.GraphModule:
    """Traces a network with ``torch.fx``.

    Raises:
        InputError: Its course depends on the values in its tensors, or it is not traceable else.
    """
    try:
        graph = _Tracer().trace(net)
        return fx.GraphModule(net, graph, type(net).__name__)
    except Exception as error:  # the network's own code runs here and may raise anything
        message = (
            f"expected a network that torch.fx can trace, found {type(net).__name__}: "
            f"{' '.join(str(error).split())[:200]}; take branches on tensor values out of forward"
        )
        raise InputError(message) from error


def shapes_of(graph: fx.GraphModule, example: Tensor) -> None:
    """Runs an example through the graph and notes every tensor's shape in ``node.meta``.

    Raises:
        InputError: The network does not take a picture of this shape.
    """
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the converter's own indexing
            ShapeProp(graph).propagate(example)
    except Exception as error:  # the network's own code runs here and may raise anything
        found = " ".join(str(error.__cause__ or error).split())[:200]
        message = (
            f"expected a network that takes a picture {list(example.shape)}, found: {found}; "
            "check its input size"
        )
        raise InputError(message) from error


def plain(graph: fx.GraphModule, example: Tensor) -> int:
    """Rewrites a traced network in place; what it computes stays the same.

    Args:
        graph: Of ``trace`` or of the ONNX converter.
        example: float32 ``(1, 3, h, w)``.

    Returns:
        How many operators were rewritten.
    """
    shapes_of(graph, example)
    modules = dict(graph.named_modules())
    count = 0
    for node in list(graph.graph.nodes):
        with graph.graph.inserting_before(node):
            if node.op == "call_module":
                rewrite = _REWRITES.get(type(modules[node.target]).__name__)
                new = rewrite(graph, node, modules[node.target]) if rewrite else None
            else:
                new = _slice_of_channels(graph, node)
        if new is not None:
            new.meta = dict(node.meta)
            node.replace_all_uses_with(new)
            graph.graph.erase_node(node)
            count += 1
        elif node.target in _SPLITS:
            count += _split(graph, node)
    graph.graph.eliminate_dead_code()
    graph.delete_all_unused_submodules()
    graph.recompile()
    return count


def shape_of(node: fx.Node) -> tuple[int, ...]:
    """Returns the shape that ``shapes_of`` noted, () if the node is no tensor."""
    shape = getattr(node.meta.get("tensor_meta"), "shape", None)
    return tuple(shape) if shape is not None else ()


def constant(graph: fx.GraphModule, node: Any) -> Tensor | None:
    """Returns the tensor of a ``get_attr`` node, None for anything else."""
    if not isinstance(node, fx.Node) or node.op != "get_attr":
        return None
    value: Any = graph
    for part in str(node.target).split("."):
        value = getattr(value, part)
    return value if isinstance(value, Tensor) else None


def _argument(graph: fx.GraphModule, node: fx.Node, place: int, name: str) -> list[Any] | None:
    """Returns a constant argument as numbers; None if it is missing or not constant."""
    value = node.args[place] if len(node.args) > place else node.kwargs.get(name)
    tensor = constant(graph, value)
    return None if tensor is None else tensor.flatten().tolist()


def _pick(graph: fx.GraphModule, x: Any, index: Tensor) -> fx.Node:
    """Adds a choice of channels by an index buffer of its own."""
    number = sum(1 for name, _ in graph.named_buffers(recurse=False) if name.startswith("pick_"))
    name = f"pick_{number}"
    graph.register_buffer(name, index.to(torch.int64).clone())
    where = graph.graph.get_attr(name)
    return graph.graph.call_method("index_select", (x, 1, where))


def _arithmetic(graph: fx.GraphModule, node: fx.Node, module: nn.Module) -> fx.Node | None:
    function: Any = module.math_op_function
    if getattr(module, "broadcast", None):
        return None
    args = []
    for arg in node.args:
        value = constant(graph, arg)
        scalar = value is not None and value.numel() == 1 and value.is_floating_point()
        args.append(float(value) if value is not None and scalar else arg)
    if function not in _ARITHMETIC:
        floats = all(not isinstance(a, fx.Node) or a.op != "get_attr" for a in args)
        return graph.graph.call_function(operator.truediv, tuple(args)) if floats else None
    return graph.graph.call_function(_ARITHMETIC[function], tuple(args))


def _concat(graph: fx.GraphModule, node: fx.Node, module: nn.Module) -> fx.Node:
    return graph.graph.call_function(torch.cat, (list(node.args), int(module.axis)))  # type: ignore[arg-type]


def _resize(graph: fx.GraphModule, node: fx.Node, module: nn.Module) -> fx.Node | None:
    source = node.args[0]
    assert isinstance(source, fx.Node)
    before, after = shape_of(source), shape_of(node)
    if len(before) != 4 or len(after) != 4 or module.onnx_mode not in ("nearest", "linear"):
        return None
    pairs = list(zip(before[2:], after[2:], strict=True))
    # As a factor where it is one, so that the network still takes pictures of other sizes.
    simple = all(b % a == 0 or a % b == 0 for a, b in pairs)
    size: dict[str, Any] = (
        {"scale_factor": tuple(b / a for a, b in pairs)} if simple else {"size": after[2:]}
    )
    linear = module.onnx_mode == "linear"
    mode: dict[str, Any] = {"mode": "bilinear" if linear else "nearest"}
    if linear:
        mode["align_corners"] = bool(module.align_corners)
    return graph.graph.call_function(F.interpolate, (source,), {**size, **mode})


def _slice(graph: fx.GraphModule, node: fx.Node, module: nn.Module) -> fx.Node | None:
    source = node.args[0]
    assert isinstance(source, fx.Node)
    shape = shape_of(source)
    starts, ends = (_argument(graph, node, i, n) for i, n in ((1, "starts"), (2, "ends")))
    if starts is None or ends is None or len(shape) != 4:
        return None
    axes = _argument(graph, node, 3, "axes") or list(range(len(starts)))
    steps = _argument(graph, node, 4, "steps") or [1] * len(starts)
    parts = [slice(None)] * 4
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        if step < 1 or axis % 4 < 2:
            return None
        whole = end >= shape[axis % 4] or end >= _END
        parts[axis % 4] = slice(start or None, None if whole else end, step if step > 1 else None)
    return graph.graph.call_function(operator.getitem, (source, tuple(parts)))


def _gather(graph: fx.GraphModule, node: fx.Node, module: nn.Module) -> fx.Node | None:
    index = constant(graph, node.args[1])
    if index is None or index.ndim != 1 or module._axis != 1:
        return None
    return _pick(graph, node.args[0], index)


def _pad(graph: fx.GraphModule, node: fx.Node, module: nn.Module) -> fx.Node | None:
    source = node.args[0]
    if isinstance(pads := getattr(module, "pads", None), (list, tuple)):
        onnx_order, value = list(pads), float(module.constant_value)  # type: ignore[arg-type]
    else:
        found = _argument(graph, node, 1, "pads")
        filling = _argument(graph, node, 2, "constant_value") or [0.0]
        if found is None:
            return None
        half = len(found) // 2
        onnx_order = [p for k in reversed(range(half)) for p in (found[k], found[half + k])]
        value = float(filling[0])
    if any(onnx_order[4:]) or min(onnx_order) < 0:
        return None
    mode = str(module.mode)
    keywords: dict[str, Any] = {"mode": mode, **({"value": value} if mode == "constant" else {})}
    return graph.graph.call_function(F.pad, (source, tuple(onnx_order[:4])), keywords)


def _mean(graph: fx.GraphModule, node: fx.Node, module: nn.Module) -> fx.Node | None:
    source = node.args[0]
    assert isinstance(source, fx.Node)
    before, after = shape_of(source), shape_of(node)
    kind = getattr(module, "operation_type", "ReduceMean")
    axes = sorted(a % 4 for a in getattr(module, "axes", None) or (2, 3))
    if kind != "ReduceMean" or axes != [2, 3] or after != (*before[:2], 1, 1):
        return None
    return graph.graph.call_function(F.adaptive_avg_pool2d, (source, 1))


_REWRITES: dict[str, Callable[[fx.GraphModule, fx.Node, nn.Module], fx.Node | None]] = {
    "OnnxBinaryMathOperation": _arithmetic,
    "OnnxConcat": _concat,
    "OnnxResize": _resize,
    "OnnxSlice": _slice,
    "OnnxGather": _gather,
    "OnnxPadStatic": _pad,
    "OnnxPadDynamic": _pad,
    "OnnxGlobalAveragePool": _mean,
    "OnnxGlobalAveragePoolWithKnownInputShape": _mean,
    "OnnxReduceStaticAxes": _mean,
}


def _slice_of_channels(graph: fx.GraphModule, node: fx.Node) -> fx.Node | None:
    """``x[:, a:b]`` as a choice by index."""
    if node.target is not operator.getitem or not isinstance(node.args[0], fx.Node):
        return None
    shape, index = shape_of(node.args[0]), node.args[1]
    if len(shape) != 4 or not isinstance(index, tuple) or len(index) < 2:
        return None
    parts = [*index, *[slice(None)] * (4 - len(index))]
    channels = parts.pop(1)
    if not isinstance(channels, slice) or channels == slice(None):
        return None
    if any(part != slice(None) for part in parts) or any(
        isinstance(v, fx.Node) for v in (channels.start, channels.stop, channels.step)
    ):
        return None
    return _pick(graph, node.args[0], torch.arange(shape[1])[channels])


def _split(graph: fx.GraphModule, node: fx.Node) -> int:
    """``torch.chunk`` and ``torch.split`` of channels as choices by index; how many were made."""
    source = node.args[0]
    named = [node.kwargs[key] for key in _SPLIT_SIZES if key in node.kwargs]
    size = node.args[1] if len(node.args) > 1 else next(iter(named), None)
    dim = node.args[2] if len(node.args) > 2 else node.kwargs.get("dim", 0)
    shape = shape_of(source) if isinstance(source, fx.Node) else ()
    numbers = isinstance(size, int) or (
        isinstance(size, (list, tuple)) and all(isinstance(s, int) for s in size)
    )
    users = list(node.users)
    indexed = all(u.target is operator.getitem and isinstance(u.args[1], int) for u in users)
    if len(shape) != 4 or dim not in (1, -3) or not numbers or not indexed:
        return 0
    channels = torch.arange(shape[1])
    chunk = node.target in (torch.chunk, "chunk")
    parts = channels.chunk(size) if chunk else channels.split(size)  # type: ignore[arg-type,no-untyped-call]
    for user in users:
        with graph.graph.inserting_before(user):
            new = _pick(graph, source, parts[user.args[1]])  # type: ignore[index]
        new.meta = dict(user.meta)
        user.replace_all_uses_with(new)
        graph.graph.erase_node(user)
    graph.graph.erase_node(node)
    return len(users)
