"""Which way to quantize is best: variants of a network in 8 bits, and what they are judged by."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final

import numpy as np

from ..models.core_costs import CORES
from ..models.detections import FloatArray
from ..models.graph import attributes, require_onnx, tensor_shapes
from .calibrate import Grid, Seen, sigmoid
from .calibrators import CALIBRATORS, USUAL, Function
from .equalise import channel_factors, label_channels, rescale, rescaled_seen, silu_gates
from .fidelity import Fidelity
from .predict import predicted_instructions
from .qdq import Layout, Links, insert, plan_layout
from .rounding import round_weights

GAIN_MIN: Final = 0.015
"""A change that lowers disagreement times cost by a smaller part of itself is not worth it."""
STAND_IN: Final = "cortex-a76"
"""Its costs weigh variants against each other for a core that has no table of its own."""
LOSS_MIN: Final = 1e-3
"""Below this nobody sees a difference."""

KnownGrids = dict[tuple[str, ...], Grid]


@dataclass(frozen=True)
class Origin:
    """What all variants are made of.

    Attributes:
        model: The float graph.
        seen: What its tensors were on photos.
        exact: Tensor -> the grid that holds its values without error.
        group: Tensor -> the first of those that share its grid where all is integer.
    """

    model: Any
    seen: dict[str, Seen]
    exact: Mapping[str, Grid]
    group: Mapping[str, str]

    def variant(self, strength: float, gates: frozenset[str] = frozenset()) -> Variant:
        """Returns the equalised network, all in integers.

        Args:
            strength: Of the equalisation; 0: none.
            gates: Sigmoids of SiLUs that are equalised through.
        """
        if not strength:
            return Variant(self, self.model, self.seen)
        labels = label_channels(self.model, gates)
        factor = channel_factors(self.model, labels, self.seen, self.group, strength)
        scaled = rescale(self.model, labels, factor)
        ranges = rescaled_seen(self.seen, labels, factor, scaled)
        return Variant(self, scaled, ranges, strength=strength, gates=gates)


@dataclass(frozen=True)
class Variant:
    """One way to quantize a model, how far its boxes are from the original's, and what it costs.

    Attributes:
        origin: What it was made of.
        model: The equalised float graph.
        seen: What its tensors were on photos.
        float_nodes: Nodes that stay in float.
        strength: Of the equalisation.
        gates: Sigmoids of SiLUs that it goes through.
        calibrator: Key of ``CALIBRATORS``.
        loss: Disagreement with the float model, 0..1.
        cost: Instructions per picture, predicted.
        known: Grids found so far.
    """

    origin: Origin
    model: Any
    seen: dict[str, Seen]
    float_nodes: frozenset[str] = frozenset()
    strength: float = 0.0
    gates: frozenset[str] = frozenset()
    calibrator: str = USUAL
    loss: float = 1.0
    cost: float = 1.0
    known: KnownGrids = field(default_factory=dict)

    @property
    def key(self) -> tuple[Any, ...]:
        """What tells it from others."""
        return self.float_nodes, self.strength, self.gates, self.calibrator

    def with_calibrator(self, name: str) -> Variant:
        """Returns the same with other ranges."""
        return replace(self, calibrator=name, known={})

    def grids(self, layout: Layout) -> dict[str, Grid]:
        """Returns the grid of every group of tensors."""
        exact = self.origin.exact
        return find_grids(self.model, layout, self.seen, self.known, exact, self.calibrator)

    def inserted(self, *signed: bool) -> list[Any]:
        """Returns the QDQ graph with signed or unsigned activations, one for each that is asked."""
        layout = plan_layout(self.model, self.float_nodes)
        grids = self.grids(layout)
        fitted, weights = round_weights(self.model, layout, grids, self.seen)
        return [insert(fitted, layout, grids, signed=s, weights=weights) for s in signed]


@dataclass
class Search:
    """Tries variants, keeps the better one, and notes what each trial gave.

    Attributes:
        fidelity: Measures.
        core: Key of ``quantize.TARGETS``.
        signed: int8 activations there.
        cost_weight: How much a part of the cost counts against the same part of the loss.
        limit: Instructions per picture, predicted, at most; None: any.
        log: What was tried -> disagreement.
        costs: What was tried -> million instructions; empty for a core without a table.
        known: Variant's key -> its loss and cost.
    """

    fidelity: Fidelity
    core: str
    signed: bool
    cost_weight: float
    limit: float | None = None
    log: dict[str, Any] = field(default_factory=dict)
    costs: dict[str, float] = field(default_factory=dict)
    known: dict[tuple[Any, ...], tuple[float, float]] = field(default_factory=dict)

    def measured(self, what: str, variant: Variant) -> Variant:
        """Returns the variant with its loss, which signedness does not change, and its cost."""
        core = core_of(self.core)
        if variant.key not in self.known:
            here, *others = variant.inserted(*dict.fromkeys((False, self.signed)))
            there = others[0] if others else here
            loss = self.fidelity.loss(here)
            self.known[variant.key] = loss, predicted_instructions(there, core)
        loss, cost = self.known[variant.key]
        self.log[what] = rounded(loss)
        if core == self.core:
            self.costs[what] = round(cost / 1e6, 1)
        return replace(variant, loss=loss, cost=cost)

    def score(self, variant: Variant) -> float:
        """Returns what the search lowers: disagreement times cost."""
        return float(max(variant.loss, LOSS_MIN) * variant.cost**self.cost_weight)

    def excess(self, variant: Variant) -> float:
        """Returns the instructions above the limit."""
        return 0.0 if self.limit is None else max(0.0, variant.cost - self.limit)

    def better(
        self, what: str, best: Variant, other: Variant, gain_min: float = GAIN_MIN
    ) -> Variant:
        """Returns ``other`` if it is clearly better than ``best``, or nearer to the limit."""
        if other.key == best.key:
            return best
        other = self.measured(what, other)
        if self.excess(best) != self.excess(other):
            return min(best, other, key=self.excess)
        return other if self.score(other) < self.score(best) * (1 - gain_min) else best


def core_of(target: str) -> str:
    """Returns the core whose costs count for a target."""
    return target if target in CORES else STAND_IN


def rounded(value: float) -> float:
    """Returns a number as reports show it."""
    return round(value, 4)


def gates_by_worth(model: Any, noise: Mapping[str, float], layout: Layout) -> list[tuple[str, int]]:
    """Returns the Sigmoids of SiLUs and their sizes; those worth being equalised through first.

    To equalise through one takes a multiplication of every number that it gives (``equalise``), so
    what counts is the noise of its input and of the product, per number.

    Args:
        model: The float graph, not equalised through any.
        noise: Group of tensors on a grid -> noise at the head if it alone is rounded.
        layout: Of the groups.
    """
    links, shapes = Links(model.graph), tensor_shapes(model)
    found = []
    for name, source in silu_gates(model).items():
        gate = next(node for node in model.graph.node if node.name == name)
        product = links.readers[gate.output[0]][0].output[0]
        harm = sum(noise.get(layout.group.get(t, t), 0.0) for t in (source, product))
        size = int(np.prod(shapes[source]))
        found.append((-harm / max(size, 1), name, size))
    return [(name, size) for _, name, size in sorted(found)]


def first_gates(ordered: Sequence[tuple[str, int]], share: float) -> frozenset[str]:
    """Returns the gates nearest to the front that together make up at most a share of all numbers.

    One that is too large for what is left of the share is passed over.
    """
    left = share * sum(size for _, size in ordered) + 0.5
    chosen = set()
    for name, size in ordered:
        if size <= left:
            chosen.add(name)
            left -= size
    return frozenset(chosen)


def find_grids(
    model: Any,
    layout: Layout,
    seen: dict[str, Seen],
    known: KnownGrids | None = None,
    exact: Mapping[str, Grid] | None = None,
    calibrator: str = USUAL,
) -> dict[str, Grid]:
    """Returns the best grid of every group of tensors that share one.

    ``known`` keeps what was found, so that a layout that differs a little costs little. ``exact``
    are grids that need no search.
    """
    fit = CALIBRATORS[calibrator]
    known = {} if known is None else known
    links = Links(model.graph)
    members: dict[str, list[str]] = {}
    for name in layout.tensors:
        members.setdefault(layout.group[name], []).append(name)
    grids: dict[str, Grid] = {}
    for first, names in members.items():
        if exact and all(name in exact for name in names):
            grids[first] = exact[first]
            continue
        if tuple(names) in known:
            grids[first] = known[tuple(names)]
            continue
        ends = [name for name in names if not _only_pooled(name, links, names)]
        low = min(float(seen[n].low.min()) for n in ends)
        high = max(float(seen[n].high.max()) for n in ends)
        after: Function = None
        weight: Function = None
        if len(ends) == 1:
            values = seen[ends[0]].values
            after, weight = effect(links, ends[0])
        else:
            values = np.concatenate([seen[n].values.ravel() for n in ends])[:, None]
        grids[first] = known[tuple(names)] = fit(values, low, high, after, weight)
    return grids


def _only_pooled(name: str, links: Links, names: Sequence[str]) -> bool:
    """Whether all that becomes of a tensor are maxima in its own group.

    What a pooling drops needs no code of the grid.
    """
    readers = links.readers[name]
    return bool(readers) and all(r.op_type == "MaxPool" and r.output[0] in names for r in readers)


def effect(links: Links, name: str) -> tuple[Function, Function]:
    """Returns the activation that all readers of a tensor apply, and the weight of its errors."""
    readers = links.readers[name]
    kinds = sorted({r.op_type for r in readers})
    maker = links.maker.get(name)
    if kinds == ["LeakyRelu"]:
        slope = attributes(readers[0]).get("alpha", 0.01)
        return lambda x: np.where(x > 0, x, x * np.float32(slope)), None
    if kinds == ["Sigmoid"]:
        factor = gate_factor(links, maker)  # of an equalised SiLU: its product is what counts
        return sigmoid, (lambda x: x / factor) if factor is not None else None
    if kinds == ["Mul", "Sigmoid"]:
        return lambda x: x * sigmoid(x), None
    if kinds == ["Mul"]:
        factors = [f for r in readers if (f := gate_factor(links, r)) is not None]
        if factors:
            return lambda x: x * sigmoid(x * factors[0]), None
    return None, None


def gate_factor(links: Links, node: Any) -> FloatArray | None:
    """Returns the factors that an equalised SiLU multiplies its sigmoid's input by.

    That is ``Mul(x, Sigmoid(Mul(x, factor)))`` with one positive factor per channel.
    """
    if node is None or node.op_type != "Mul" or node.input[1] not in links.stored:
        return None
    inner = links.readers[node.output[0]]
    if [r.op_type for r in inner] != ["Sigmoid"]:
        return None
    outer = links.readers[inner[0].output[0]]
    if [r.op_type for r in outer] != ["Mul"] or node.input[0] not in outer[0].input:
        return None
    factor = require_onnx().numpy_helper.to_array(links.stored[node.input[1]])
    if factor.ndim < 2 or factor.shape[1] != factor.size or not np.all(factor > 0):
        return None
    return np.asarray(factor, np.float32).reshape(-1)
