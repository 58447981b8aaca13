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
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.fx.passes.shape_prop import ShapeProp

Ids = npt.NDArray[np.int64]

PASS_MODULES: tuple[type[nn.Module], ...] = (
    nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.SiLU, nn.Hardswish, nn.GELU, nn.Tanh, nn.Identity,
    nn.Dropout, nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.Upsample, nn.Sigmoid,
    nn.Hardsigmoid,
)  # fmt: skip
PASS_FUNCTIONS: set[Any] = {
    F.interpolate, F.relu, F.relu6, F.leaky_relu, F.silu, F.hardswish, F.hardsigmoid, F.max_pool2d,
    F.avg_pool2d, F.adaptive_avg_pool2d, F.dropout, torch.relu, torch.sigmoid, torch.tanh,
    "relu", "sigmoid", "tanh", "contiguous", "clone", "detach",
}  # fmt: skip
UNITE_FUNCTIONS: set[Any] = {
    operator.add, operator.iadd, operator.mul, operator.imul, operator.sub, torch.add, torch.mul,
    "add", "mul", "add_", "mul_",
}  # fmt: skip
CAT_FUNCTIONS: set[Any] = {torch.cat, torch.concat}


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
        frozen: Operator that stopped the analysis -> how many channels it froze.
        out_ids: Per conv: its output channels' numbers; per index buffer: numbers read and made.
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
        elif isinstance(value, (list, tuple)):
            for item in value:
                self.freeze(item, why)

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
        args = fx.node.map_arg(node.args, lambda n: self.values[n])
        if node.op == "placeholder":
            ids = self.new(3)
            self.freeze(ids, "the picture")
            return ids
        if node.op == "output":
            self.freeze(args, "the network's output")
            return None
        if node.op == "get_attr":
            return node.target
        if node.op == "call_module":
            self.uses[str(node.target)] += 1
            return self._module(node, str(node.target), args)
        return self._function(node, args)

    def _module(self, node: fx.Node, name: str, args: Any) -> Any:
        module, x = self.modules[name], args[0]
        if isinstance(module, nn.Conv2d) and isinstance(x, np.ndarray):
            if module.groups == 1:
                self.users += [(name, i, int(n)) for i, n in enumerate(x)]
                out = self.new(module.out_channels)
                self.makers += [(name, i, int(n)) for i, n in enumerate(out)]
                self.ids[name] = out
                return out
            if module.groups == module.in_channels == module.out_channels:
                self.through += [(name, i, int(n)) for i, n in enumerate(x)]
                return x
        if isinstance(module, nn.BatchNorm2d) and isinstance(x, np.ndarray):
            self.through += [(name, i, int(n)) for i, n in enumerate(x)]
            return x
        if isinstance(module, PASS_MODULES):
            return x
        return self._unknown(node, args, f"{type(module).__name__} {name}")

    def _function(self, node: fx.Node, args: Any) -> Any:
        target = node.target
        if target in PASS_FUNCTIONS:
            return args[0]
        if target in UNITE_FUNCTIONS:
            tensors = [a for a in args if isinstance(a, np.ndarray)]
            if len(tensors) == 2 and len(tensors[0]) == len(tensors[1]):
                self.unite(*tensors)
                return tensors[0]
            if len(tensors) == 1 and all(isinstance(a, (int, float, np.ndarray)) for a in args):
                return tensors[0]
        if target in CAT_FUNCTIONS:
            dim = node.kwargs.get("dim", args[1] if len(args) > 1 else 0)
            if dim == 1 and all(isinstance(a, np.ndarray) for a in args[0]):
                return np.concatenate(args[0])
        if target == "index_select" and args[1] == 1 and isinstance(args[2], str):
            index = _attribute(self.graph, args[2]).cpu().numpy()
            self.picks[args[2]] = (args[0], args[0][index])
            return args[0][index]
        if target is operator.getitem:
            if isinstance(args[0], (list, tuple)):
                return args[0][args[1]]
            if isinstance(args[0], np.ndarray) and _keeps_channels(args[1]):
                return args[0]
        return self._unknown(node, args, str(getattr(target, "__name__", target)))

    def _unknown(self, node: fx.Node, args: Any, why: str) -> Any:
        self.freeze(args, why)
        meta = node.meta.get("tensor_meta")
        shape = getattr(meta, "shape", None)
        if shape is None or len(shape) != 4:
            return None
        ids = self.new(shape[1])
        self.freeze(ids, why)
        return ids


def find_groups(net: nn.Module, example: Tensor) -> ChannelMap:
    """Finds the coupled channels of a network.

    Args:
        net: A module that ``torch.fx`` can trace, or a ``GraphModule``.
        example: float32 ``(1, 3, h, w)``; only its shape matters.

    Returns:
        The groups, and what had to be frozen, by operator.
    """
    graph = net if isinstance(net, fx.GraphModule) else fx.symbolic_trace(net)
    with torch.no_grad():
        ShapeProp(graph).propagate(example)
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


def _attribute(module: nn.Module, path: str) -> Tensor:
    value: Any = module
    for part in path.split("."):
        value = getattr(value, part)
    return torch.as_tensor(value)


def _keeps_channels(index: Any) -> bool:
    """Whether ``x[index]`` keeps batch and channels: ``[..., ::2, ::2]`` or ``[:, :, a:b]``."""
    parts: tuple[Any, ...] = index if isinstance(index, tuple) else (index,)
    if Ellipsis in parts:
        tail = parts[parts.index(Ellipsis) + 1 :]
        return parts[0] is Ellipsis and len(tail) <= 2 and all(isinstance(p, slice) for p in tail)
    everything: Callable[[Any], bool] = lambda p: p == slice(None)  # noqa: E731
    return (
        len(parts) <= 4
        and all(map(everything, parts[:2]))
        and all(isinstance(p, slice) for p in parts[2:])
    )
