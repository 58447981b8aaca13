"""Which channels must go together: coupled channels as values that can be printed and stored.

A network is traced with ``torch.fx``. Every channel of every tensor gets a number; operators hand
numbers on (activation, pooling, depthwise convolution), join them (concatenation), pick them
(``index_select``) or unite them (addition). Channels with the same number live and die together.
Whatever an operator unknown to this module touches is frozen: it is never cut, and it is named.
The idea of coupled channels is DepGraph's (arXiv 2301.12900); the code is our own.
"""

from __future__ import annotations

import operator
from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from .plain import constant, shapes_of, trace

Ids = npt.NDArray[np.int64]

PASS_MODULES: tuple[type[nn.Module], ...] = (
    nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.SiLU, nn.Hardswish, nn.GELU, nn.Tanh, nn.Identity, nn.ELU,
    nn.CELU, nn.SELU, nn.Mish, nn.Softplus, nn.Softsign, nn.Hardtanh, nn.Sigmoid, nn.Hardsigmoid,
    nn.Dropout, nn.Dropout2d, nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d,
    nn.AdaptiveMaxPool2d, nn.Upsample, nn.ZeroPad2d, nn.ReflectionPad2d, nn.ReplicationPad2d,
)  # fmt: skip
PASS_CONVERTED = ("OnnxHardSigmoid", "OnnxErf", "OnnxSqrt", "OnnxNeg", "OnnxRound")
"""Classes of the ONNX converter that work on each number by itself."""
PASS_FUNCTIONS: set[Any] = {
    F.interpolate, F.relu, F.relu6, F.leaky_relu, F.silu, F.hardswish, F.hardsigmoid, F.hardtanh,
    F.gelu, F.mish, F.elu, F.softplus, F.sigmoid, F.tanh, F.max_pool2d, F.avg_pool2d,
    F.adaptive_avg_pool2d, F.dropout, torch.relu, torch.sigmoid, torch.tanh, torch.clamp,
    "relu", "relu_", "sigmoid", "tanh", "clamp", "contiguous", "clone", "detach", "float",
}  # fmt: skip
UNITE_FUNCTIONS: set[Any] = {
    operator.add, operator.iadd, operator.mul, operator.imul, operator.sub, operator.truediv,
    torch.add, torch.mul, torch.sub, torch.div, torch.maximum, torch.minimum,
    "add", "mul", "sub", "div", "add_", "mul_",
}  # fmt: skip
CAT_FUNCTIONS: set[Any] = {torch.cat, torch.concat}
PICK_FUNCTIONS: set[Any] = {torch.index_select, "index_select"}


@dataclass(frozen=True)
class Group:
    """Channels that can only be removed together.

    Attributes:
        makers: ``(conv, output channel)`` that produce it.
        through: ``(module, channel)`` of depthwise convolutions and normalisations on the way.
        users: ``(conv, input channel)`` that read it.
    """

    makers: tuple[tuple[str, int], ...]
    through: tuple[tuple[str, int], ...]
    users: tuple[tuple[str, int], ...]

    @property
    def signature(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Names of the producing and the reading modules: equal for interchangeable channels."""
        names = sorted({m for m, _ in self.makers + self.through})
        return tuple(names), tuple(sorted({m for m, _ in self.users}))

    def __str__(self) -> str:
        """One line: ``stage2.0.conv[3] -> stage2.0.dw[3] -> stage2.0.pw(in 3)``."""
        made = " + ".join(f"{m}[{i}]" for m, i in self.makers)
        way = "".join(f" -> {m}[{i}]" for m, i in self.through)
        used = ", ".join(f"{m}(in {i})" for m, i in self.users)
        return f"{made}{way} -> {used or 'nothing'}"


@dataclass
class ChannelMap:
    """All groups of a network, what is frozen and why.

    Attributes:
        groups: The removable groups.
        frozen: Operator that stopped the analysis -> how many groups it froze.
        ids: Conv name -> numbers of its output channels.
        picks: Index buffer -> numbers that it reads from and numbers that it picks.
        roots: Number -> index into ``groups``; numbers of frozen channels are missing.
    """

    groups: list[Group]
    frozen: dict[str, int]
    ids: dict[str, Ids] = field(default_factory=dict)
    picks: dict[str, tuple[Ids, Ids]] = field(default_factory=dict)
    roots: dict[int, int] = field(default_factory=dict)

    def spaces(self) -> dict[tuple[tuple[str, ...], tuple[str, ...]], list[int]]:
        """Returns signature -> group numbers: sets of interchangeable channels."""
        result: dict[tuple[tuple[str, ...], tuple[str, ...]], list[int]] = defaultdict(list)
        for number, group in enumerate(self.groups):
            result[group.signature].append(number)
        return dict(result)


@dataclass(frozen=True)
class _Shape:
    """The shape of a tensor with these channels; whoever reads its channel count freezes them."""

    ids: Ids


class _Tracer:
    """Walks a traced graph once and fills the tables that ``find_groups`` turns into groups."""

    def __init__(self, graph: fx.GraphModule) -> None:
        self.graph = graph
        self.modules = dict(graph.named_modules())
        self.parent: list[int] = []
        self.frozen_ids: dict[int, str] = {}
        self.makers: list[tuple[str, int, int]] = []
        self.through: list[tuple[str, int, int]] = []
        self.users: list[tuple[str, int, int]] = []
        self.values: dict[fx.Node, Any] = {}
        self.ids: dict[str, Ids] = {}
        self.picks: dict[str, tuple[Ids, Ids]] = {}
        self.uses: dict[str, int] = defaultdict(int)

    def new(self, count: int) -> Ids:
        start = len(self.parent)
        self.parent.extend(range(start, start + count))
        return np.arange(start, start + count)

    def root(self, number: int) -> int:
        while self.parent[number] != number:
            self.parent[number] = self.parent[self.parent[number]]
            number = self.parent[number]
        return number

    def unite(self, a: Ids, b: Ids) -> None:
        for x, y in zip(a, b, strict=True):
            self.parent[self.root(int(x))] = self.root(int(y))

    def freeze(self, value: Any, why: str) -> None:
        if isinstance(value, np.ndarray):
            for number in value:
                self.frozen_ids.setdefault(int(number), why)
        elif isinstance(value, _Shape):
            self.freeze(value.ids, why)
        elif isinstance(value, (list, tuple)):
            for item in value:
                self.freeze(item, why)
        elif isinstance(value, dict):
            self.freeze(list(value.values()), why)

    def run(self) -> None:
        for node in self.graph.graph.nodes:
            self.values[node] = self._visit(node)
        for name, count in self.uses.items():
            if count > 1:  # a shared module sees several inputs: cutting one would cut all
                for table in (self.makers, self.through, self.users):
                    for module, _, number in table:
                        if module == name:
                            self.frozen_ids.setdefault(number, f"{name} is used {count} times")

    def _visit(self, node: fx.Node) -> Any:
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: self.values[n])
        if node.op == "placeholder":
            return self._unknown(node, (), "the picture")
        if node.op == "output":
            self.freeze(args, "the network's output")
            return None
        if node.op == "get_attr":
            return node
        if node.op == "call_module":
            self.uses[str(node.target)] += 1
            result = self._module(str(node.target), args) if not kwargs else None
            kind = type(self.modules[str(node.target)]).__name__
            why = f"{kind} {node.target}"
        else:
            args, kwargs = _in_order(args, kwargs)
            result = self._function(node, args, kwargs)
            why = str(getattr(node.target, "__name__", node.target))
        return self._unknown(node, (args, kwargs), why) if result is None else result

    def _module(self, name: str, args: Any) -> Any:
        """Returns the channels after a module; None if it is not understood."""
        module, x = self.modules[name], args[0]
        if not isinstance(x, np.ndarray) or len(args) != 1:
            return None
        if isinstance(module, nn.Conv2d):
            if module.groups == 1:
                self.users += [(name, i, int(n)) for i, n in enumerate(x)]
                out = self.new(module.out_channels)
                self.makers += [(name, i, int(n)) for i, n in enumerate(out)]
                self.ids[name] = out
                return out
            if not module.groups == module.in_channels == module.out_channels:
                return None
        per_channel = isinstance(module, nn.PReLU) and module.num_parameters == len(x) > 1
        if isinstance(module, (nn.Conv2d, nn.BatchNorm2d)) or per_channel:
            self.through += [(name, i, int(n)) for i, n in enumerate(x)]
            return x
        known = (*PASS_MODULES, nn.PReLU)
        return x if isinstance(module, known) or type(module).__name__ in PASS_CONVERTED else None

    def _function(self, node: fx.Node, args: Any, kwargs: dict[str, Any]) -> Any:
        """Returns the channels after a function or method; None if it is not understood."""
        target = node.target
        if target is operator.getitem:
            return _item(args[0], args[1])
        if target is getattr and args[1] == "shape" and isinstance(args[0], np.ndarray):
            return _Shape(args[0])
        if target == "size" and isinstance(args[0], np.ndarray):
            return _Shape(args[0]) if len(args) == 1 else _item(_Shape(args[0]), args[1])
        first: Any = args[0] if args else None
        if target in CAT_FUNCTIONS and kwargs.get("dim", (*args, 0)[1]) in (1, -3):
            arrays = all(isinstance(a, np.ndarray) for a in first)
            return np.concatenate(first) if arrays else None
        if target in UNITE_FUNCTIONS:
            return self._unite(args, kwargs)
        if not isinstance(first, np.ndarray):
            return None
        rest = (args[1:], kwargs)
        if target in PASS_FUNCTIONS:
            return None if _has_arrays(rest) else first
        if target is F.pad:
            return first if len(kwargs.get("pad", (*args, ())[1])) <= 4 else None
        if target in (torch.mean, "mean", torch.amax, "amax"):
            dims = kwargs.get("dim", args[1] if len(args) > 1 else ())
            keep = kwargs.get("keepdim", len(args) > 2 and args[2])
            spatial = isinstance(dims, (tuple, list)) and {d % 4 for d in dims} == {2, 3}
            return first if keep and spatial else None
        if target in PICK_FUNCTIONS:
            return self._picked(first, *rest)
        return None

    def _unite(self, args: Any, kwargs: dict[str, Any]) -> Ids | None:
        numbers = all(isinstance(a, (int, float, np.ndarray)) for a in args)
        tensors = [a for a in args if isinstance(a, np.ndarray)]
        if not numbers or not tensors or _has_arrays(kwargs):
            return None
        if len(tensors) == 2:
            if len(tensors[0]) != len(tensors[1]):
                return None
            self.unite(*tensors)
        first: Ids = tensors[0]
        return first

    def _picked(self, x: Ids, args: Any, kwargs: dict[str, Any]) -> Ids | None:
        dim = kwargs.get("dim", args[0] if args else None)
        where: Any = kwargs.get("index", args[1] if len(args) > 1 else None)
        index = constant(self.graph, where)
        if dim not in (1, -3) or index is None:
            return None
        name = str(where.target)
        if name in self.picks:  # one list of channels for two tensors: neither can be cut
            self.freeze((self.picks[name][0], x), f"{name} is used twice")
        picked: Ids = x[index.cpu().numpy()]
        self.picks[name] = (x, picked)
        return picked

    def _unknown(self, node: fx.Node, args: Any, why: str) -> Any:
        self.freeze(args, why)
        shape = getattr(node.meta.get("tensor_meta"), "shape", None)
        if shape is None or len(shape) != 4:
            return None
        ids = self.new(shape[1])
        self.freeze(ids, why)
        return ids


def find_groups(net: nn.Module, example: Tensor) -> ChannelMap:
    """Finds the coupled channels of a network.

    Args:
        net: A module that ``torch.fx`` can trace.
        example: float32 ``(1, 3, h, w)``; only its shape matters.

    Returns:
        The groups, and what had to be frozen, by operator.

    Raises:
        InputError: The network cannot be traced, or does not take the example.
    """
    graph = trace(net)
    shapes_of(graph, example)
    tracer = _Tracer(graph)
    tracer.run()
    frozen_roots = {tracer.root(n): why for n, why in tracer.frozen_ids.items()}
    tables: dict[int, tuple[list[Any], list[Any], list[Any]]] = defaultdict(lambda: ([], [], []))
    for slot, rows in enumerate((tracer.makers, tracer.through, tracer.users)):
        for module, index, number in rows:
            tables[tracer.root(number)][slot].append((module, index))
    groups: list[Group] = []
    roots: dict[int, int] = {}
    frozen: dict[str, int] = defaultdict(int)
    for root, (makers, through, users) in tables.items():
        if root in frozen_roots:
            frozen[frozen_roots[root]] += 1
            continue
        roots[root] = len(groups)
        groups.append(Group(tuple(makers), tuple(through), tuple(users)))
    number_of = {
        n: roots[tracer.root(n)] for n in range(len(tracer.parent)) if tracer.root(n) in roots
    }
    return ChannelMap(groups, dict(frozen), tracer.ids, tracer.picks, number_of)


def _in_order(args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Returns arguments with the main tensor first, where it was given by name."""
    rest = dict(kwargs)
    for name in ("input", "tensors"):
        if not args and name in rest:
            args = (rest.pop(name),)
    if "other" in rest:
        args = (*args, rest.pop("other"))
    return args, rest


def _has_arrays(value: Any) -> bool:
    """Whether channels hide in further arguments."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, (list, tuple)):
        return any(map(_has_arrays, value))
    return isinstance(value, (np.ndarray, fx.Node))


def _item(x: Any, index: Any) -> Any:
    """Returns ``x[index]``; None if it is not understood."""
    if isinstance(x, (list, tuple)):
        return x[index]
    if isinstance(x, np.ndarray):
        return x if _keeps_channels(index) else None
    if isinstance(x, _Shape):
        if isinstance(index, slice):
            return _NUMBERS if 1 not in range(4)[index] else None
        return _NUMBERS if isinstance(index, int) and index % 4 != 1 else None
    return None


_NUMBERS = ()
"""Sizes other than a channel count: they freeze nothing."""


def _keeps_channels(index: Any) -> bool:
    """Whether ``x[index]`` keeps batch and channels: ``[..., ::2, ::2]`` or ``[:, :, a:b]``."""
    parts: tuple[Any, ...] = index if isinstance(index, tuple) else (index,)
    if Ellipsis in parts:
        tail = parts[parts.index(Ellipsis) + 1 :]
        return parts[0] is Ellipsis and len(tail) <= 2 and all(isinstance(p, slice) for p in tail)
    everything = all(p == slice(None) for p in parts[:2])
    return len(parts) <= 4 and everything and all(isinstance(p, slice) for p in parts[2:])
