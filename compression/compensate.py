"""Refitting what is left after a cut, layer by layer, without labels and without gradients.

Each convolution that lost inputs is fitted anew, in the least-squares sense, to give what the
uncut one gave, from the inputs that the cut network really has at that point (He, Zhang & Sun,
arXiv 1707.06168, section 3.1). Done in order of execution, later layers also mend what earlier
ones could not. Both networks are walked side by side, operator by operator, with all photos at
once, so that the whole costs one forward pass of each.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any, Final

import torch
from torch import Tensor, fx, nn
from tqdm import tqdm

from .chain import whole_name
from .importance import unfold
from .plain import trace
from .state import State, rows_kept

REFIT_PHOTOS_MAX: Final = 320
"""What two networks compute on so many photos is held in memory: some GB."""
REFIT_RIDGE: Final = 0.1


def refit_to_original(state: State, batches: Sequence[Tensor], ridge: float = REFIT_RIDGE) -> None:
    """Refits a state's network to the uncut one, in place; zeros of ``sparsify`` stay zero.

    Args:
        state: After the change that is to be mended.
        batches: Normalised float32 ``(b, 3, h, w)`` photos; see ``few_enough``.
        ridge: As in ``refit``.
    """
    rows = rows_kept(state.teacher, state.edits)
    sparse = any(edit["kind"] == "sparsify" for edit in (*state.base_edits, *state.edits))
    refit(
        state.net,
        state.teacher,
        rows,
        few_enough(batches),
        ridge=ridge,
        progress=state.job.progress,
        keep_zeros=sparse,
    )


def few_enough(batches: Sequence[Tensor]) -> Sequence[Tensor]:
    """Returns the first batches, as many as memory holds, at least one."""
    return batches[: max(1, REFIT_PHOTOS_MAX // len(batches[0]))]


@torch.no_grad()
def refit(
    net: nn.Module,
    dense: nn.Module,
    rows: dict[str, Tensor],
    batches: Sequence[Tensor],
    ridge: float = 1e-2,
    samples_max: int = 1500,
    progress: bool = True,
    keep_zeros: bool = False,
) -> None:
    """Refits all dense convolutions of a cut network to the uncut one's outputs, in place.

    Of a layer that was factorised, the last factor is refitted; the others have no counterpart.

    Args:
        net: The cut network, eval mode, normalisation folded.
        dense: The uncut one.
        rows: Conv name (``whole_name``) -> int64 indices of the output channels that are left.
        batches: Normalised float32 ``(b, 3, h, w)`` photos.
        ridge: Pull towards the weights as they are, relative to each input's energy.
        samples_max: Positions per batch and layer.
        progress: Show a bar on stderr.
        keep_zeros: Fit only the weights that are not zero, each output channel by itself.
    """
    ours = _Walk(trace(net), batches)
    theirs = _Walk(trace(dense), batches)
    modules = dict(net.named_modules())
    calls = Counter(str(n.target) for n in ours.nodes if n.op == "call_module")
    for node, other in tqdm(_pairs(ours, theirs), desc="refit", unit="op", disable=not progress):
        if other is None:
            ours.step(node)
            continue
        theirs.step(other)
        name = str(node.target)
        conv = modules.get(name) if node.op == "call_module" else None
        # A shared convolution cannot be fitted to two inputs one after the other.
        if isinstance(conv, nn.Conv2d) and conv.groups == 1 and calls[name] == 1:
            left = rows.get(whole_name(name))
            inputs, targets = ours.inputs(node), theirs.values[other]
            _fit_layer(conv, inputs, targets, left, ridge, samples_max, keep_zeros)
        ours.step(node)


def _pairs(ours: _Walk, theirs: _Walk) -> list[tuple[fx.Node, fx.Node | None]]:
    """Returns each of our operators with its counterpart; inner factors of a layer have none."""
    known = {whole_name(str(n.target)) for n in theirs.nodes if n.op == "call_module"}
    others = iter(theirs.nodes)
    pairs: list[tuple[fx.Node, fx.Node | None]] = []
    for node in ours.nodes:
        inner = node.op == "call_module" and whole_name(str(node.target)) not in known
        pairs.append((node, None if inner else next(others)))
    assert next(others, None) is None, "the networks differ in nothing but channels and factors"
    return pairs


class _Walk:
    """Runs a traced network one operator at a time on several batches."""

    def __init__(self, graph: fx.GraphModule, batches: Sequence[Tensor]) -> None:
        self.nodes = [n for n in graph.graph.nodes if n.op != "output"]
        self.values: dict[fx.Node, list[Any]] = {}
        self.batches = list(batches)
        self.interpreter = fx.Interpreter(graph)
        last: dict[fx.Node, fx.Node] = {}
        for node in graph.graph.nodes:
            for used in node.all_input_nodes:
                last[used] = node
        self.dead: dict[fx.Node, list[fx.Node]] = {}
        for used, user in last.items():
            self.dead.setdefault(user, []).append(used)

    def inputs(self, node: fx.Node) -> list[Tensor]:
        return self.values[node.all_input_nodes[0]]

    def step(self, node: fx.Node) -> None:
        results = []
        for k, batch in enumerate(self.batches):
            if node.op == "placeholder":
                results.append(batch)
                continue
            known = {used: self.values[used][k] for used in node.all_input_nodes}
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), known.__getitem__)
            results.append(getattr(self.interpreter, node.op)(node.target, args, kwargs))
        self.values[node] = results
        for used in self.dead.get(node, []):
            self.values.pop(used, None)


def _fit_layer(
    conv: nn.Conv2d,
    inputs: Sequence[Tensor],
    targets: Sequence[Tensor],
    rows: Tensor | None,
    ridge: float,
    samples_max: int,
    keep_zeros: bool,
) -> None:
    generator = torch.Generator().manual_seed(0)
    width = conv.weight[0].numel() + 1
    gram = torch.zeros(width, width, dtype=torch.double)
    cross = torch.zeros(width, conv.out_channels, dtype=torch.double)
    for x, y in zip(inputs, targets, strict=True):
        columns = unfold(x, conv)
        target = (y if rows is None else y[:, rows]).permute(0, 2, 3, 1).flatten(0, 2)
        pick = torch.randperm(len(columns), generator=generator)[:samples_max]
        columns = torch.cat([columns[pick], torch.ones(len(pick), 1)], 1)
        gram += (columns.T @ columns).double()
        cross += (columns.T @ target[pick]).double()
    bias = conv.bias if conv.bias is not None else torch.zeros(conv.out_channels)
    old = torch.cat([conv.weight.flatten(1), bias[:, None]], 1).T.double()
    # Each input is damped in its own units, so that loud channels do not hide quiet ones.
    energy = gram.diagonal()
    damping = torch.diag(ridge * energy + 1e-8 * energy.mean() + 1e-12)
    if keep_zeros:
        new = _solve_kept(gram + damping, cross + damping @ old, old != 0).T
    else:
        new = torch.linalg.solve(gram + damping, cross + damping @ old).T
    conv.weight.copy_(new[:, :-1].reshape(conv.weight.shape))
    if conv.bias is None:
        conv.bias = nn.Parameter(torch.zeros(conv.out_channels))
    conv.bias.copy_(new[:, -1])


def _solve_kept(gram: Tensor, cross: Tensor, kept: Tensor) -> Tensor:
    """Returns per column of ``cross`` the best solution that is zero where ``kept`` is False.

    The last row, the bias, is always fitted.
    """
    result = torch.zeros_like(cross)
    for column in range(cross.shape[1]):
        mask = kept[:, column].clone()
        mask[-1] = True
        rows = mask.nonzero()[:, 0]
        system = gram[rows[:, None], rows]
        result[rows, column] = torch.linalg.solve(system, cross[rows, column])
    return result
