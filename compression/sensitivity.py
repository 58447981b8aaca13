"""Finds by measurement which tensors may not be rounded to 8 bits."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ..models.detections import FloatArray
from ..models.graph import node_macs
from ..models.spec import ModelSpec
from .calibrate import Grid, read_photos, session, sigmoid
from .equalise import BACK
from .qdq import DEQUANTIZED, Layout, Links, body_nodes, insert, is_weighted


def head_tensors(model: Any) -> list[str]:
    """Returns the tensors that the head's tail reads: raw scores and boxes of every level."""
    body = {node.name for node in body_nodes(model)}
    links = Links(model.graph)
    return [
        name
        for node in model.graph.node
        if node.name in body
        for name in node.output
        if name in links.outputs or any(r.name not in body for r in links.readers[name])
    ]


class NoiseMeter:
    """Measures how much noise reaches the head of a variant of a model.

    Args:
        model: The float model.
        photos: A handful.
        spec: Of the model.
    """

    def __init__(self, model: Any, photos: Sequence[Path], spec: ModelSpec) -> None:
        """Runs the float model once over the photos."""
        links = Links(model.graph)
        self._names = head_tensors(model)
        self._scores = [
            {r.op_type for r in links.readers[name]} == {"Sigmoid"} for name in self._names
        ]
        self._feeds = list(read_photos(photos, spec))
        self._wanted = self._run(model)
        self._power = [max(float(w.var(axis=0).sum()), 1e-12) for w in self._wanted]

    def noise(self, model: Any) -> float:
        """Returns square error over variance at the head, averaged over its tensors.

        Where a sigmoid follows, it is measured behind it: nobody sees whether a score of 0.0001 is
        one of 0.00001.
        """
        pairs = zip(self._wanted, self._run(model), self._power, strict=True)
        losses = [float(((w - g) ** 2).mean(axis=0).sum()) / power for w, g, power in pairs]
        return float(np.mean(losses))

    def _run(self, model: Any) -> list[FloatArray]:
        """Returns ``(pixels of all photos, channels)`` of each tensor."""
        made = {out for node in model.graph.node for out in node.output}
        endings = (BACK, DEQUANTIZED, "")
        names = [next(n + e for e in endings if n + e in made) for n in self._names]
        runner = session(model, names)
        feed = runner.get_inputs()[0].name
        maps = [runner.run(names, {feed: tensor}) for tensor in self._feeds]
        values = [_pixels(of_one) for of_one in zip(*maps, strict=True)]
        pairs = zip(values, self._scores, strict=True)
        return [sigmoid(v) if is_score else v for v, is_score in pairs]


def _pixels(maps: Sequence[FloatArray]) -> FloatArray:
    """Returns ``(pixels, channels)`` of one tensor on all photos."""
    return np.concatenate([m.reshape(m.shape[1], -1).T for m in maps])


@dataclass(frozen=True)
class Sensitive:
    """A group of tensors on one grid, and what rounding it alone does.

    Attributes:
        group: Its first tensor.
        noise: At the head, see ``NoiseMeter``.
        nodes: Names of the nodes that must compute in float to spare it the grid.
    """

    group: str
    noise: float
    nodes: frozenset[str]


def scan(
    model: Any,
    layout: Layout,
    grids: Mapping[str, Grid],
    meter: NoiseMeter,
    *,
    progress: Callable[..., Any],
) -> list[Sensitive]:
    """Rounds one group of tensors at a time, all else in float; the noisiest come first."""
    links = Links(model.graph)
    groups: dict[str, list[str]] = {}
    for name in layout.tensors:
        groups.setdefault(layout.group[name], []).append(name)
    found: list[Sensitive] = []
    for first, names in progress(groups.items(), total=len(groups), desc="sensitivity"):
        alone = Layout(frozenset(), tuple(names), dict.fromkeys(names, first))
        noise = meter.noise(insert(model, alone, grids, signed=False))
        touching = [links.maker[n] for n in names if n in links.maker]
        touching += [r for n in names for r in links.readers[n]]
        nodes = frozenset(n.name for n in touching if n.name in layout.nodes)
        found.append(Sensitive(first, noise, nodes))
    return sorted(found, key=lambda s: -s.noise)


class Budget:
    """What may be in float: a part of the convolution MACs and a part of their parameters.

    Args:
        model: The float graph.
        macs_part: 0..1.
        parameters_part: 0..1; float weights are what makes the file larger.
    """

    def __init__(self, model: Any, macs_part: float, parameters_part: float) -> None:
        """Counts both once."""
        macs = node_macs(model)
        stored = Links(model.graph).stored
        self._cost = {
            n.name: np.array([macs[n.output[0]], np.prod(stored[n.input[1]].dims)], np.float64)
            for n in model.graph.node
            if n.op_type == "Conv" and n.input[1] in stored
        }
        self._total = sum(self._cost.values(), np.zeros(2))
        self._most = self._total * (macs_part, parameters_part)

    def allows(self, names: Collection[str]) -> bool:
        """Whether these nodes may be in float together."""
        return bool((self._spent(names) <= self._most).all())

    def macs_share(self, names: Collection[str]) -> float:
        """Returns the part of the convolution MACs in these nodes, 0..1."""
        return float(self._spent(names)[0] / max(self._total[0], 1.0))

    def _spent(self, names: Collection[str]) -> npt.NDArray[np.float64]:
        spent: npt.NDArray[np.float64] = sum(
            (self._cost[name] for name in names if name in self._cost), np.zeros(2)
        )
        return spent


def first_nodes(model: Any, count: int, budget: Budget) -> frozenset[str]:
    """Returns the nodes from the input up to the ``count``-th convolution and its activation.

    Noise at the input reaches everything. A convolution that the budget does not allow stays
    integer, and what follows it is in float.
    """
    chosen: frozenset[str] = frozenset()
    taken = 0
    stored = Links(model.graph).stored
    for node in body_nodes(model):
        wider = chosen | {node.name}
        if is_weighted(node, stored):
            if taken == count:
                break
            if not budget.allows(wider):
                continue
            taken += 1
        chosen = wider
    return chosen


def noisiest_nodes(
    sensitive: Sequence[Sensitive], count: int, budget: Budget, start: frozenset[str]
) -> frozenset[str]:
    """Returns ``start`` and the nodes of the ``count`` noisiest groups that the budget allows."""
    chosen, taken = start, 0
    for entry in sensitive:
        if taken == count:
            break
        wider = chosen | entry.nodes
        if wider > chosen and budget.allows(wider):
            chosen, taken = wider, taken + 1
    return chosen
