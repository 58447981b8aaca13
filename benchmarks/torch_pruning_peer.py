"""torch-pruning as its README uses it: ``MagnitudeImportance``, the same part of every layer."""

from __future__ import annotations

import copy

import torch
from edgesight.compression.prune import conv_costs, macs_of, total_cost
from edgesight.models.nets.common import DetectorNet
from edgesight.models.nets.nanodet import DownBlock, GhostModule, NanoDetPlus, UnitBlock
from torch import Tensor, nn

TRIES = 12


def prune_with_peer(
    dense: DetectorNet, example: Tensor, goal_macs: float
) -> tuple[DetectorNet, dict[str, Tensor]]:
    """Prunes with torch-pruning's own dependency graph, as little as meets the goal.

    The tail is not part of what it sees: it would not come to an end (1.6.1).

    Args:
        dense: Normalisation folded.
        example: float32 ``(1, 3, h, w)``.
        goal_macs: Multiply-accumulates that may be left.

    Returns:
        The network, and conv name -> the output channels that it still has.

    Raises:
        RuntimeError: What it returns does not run, or the goal is not met.
    """
    low, high = 0.0, 0.95  # the smallest part to remove that meets the goal lies in between
    best = None
    for _ in range(TRIES):
        part = (low + high) / 2
        made = _prune(dense, example, part)
        if total_cost(conv_costs(made[0], example), macs_of) <= goal_macs:
            best, high = made, part
        else:
            low = part
    if best is None:
        message = f"expected torch-pruning to reach {goal_macs / 1e6:.0f} M MACs, it did not"
        raise RuntimeError(message)
    return best


def left_alone(net: nn.Module) -> list[nn.Module]:
    """Returns what must not be cut: predictions, and what torch-pruning 1.6.1 gets wrong.

    It cannot follow a channel shuffle (as indices: an index error; as reshape and transpose: a
    division by zero), nor a ghost module (the result does not run).
    """
    result = [module for name, module in net.named_modules() if _is_prediction(net, name, module)]
    for module in net.modules():
        if isinstance(module, (DownBlock, UnitBlock)):
            for branch in ("branch1", "branch2"):
                convs = [m for m in getattr(module, branch, ()) if isinstance(m, nn.Conv2d)]
                result += convs[-1:]
        elif isinstance(module, GhostModule):
            result += [m for m in module.primary_conv if isinstance(m, nn.Conv2d)]
    return result


def _is_prediction(net: nn.Module, name: str, module: nn.Module) -> bool:
    part = "gfl_cls" if isinstance(net, NanoDetPlus) else "_preds"
    return isinstance(module, nn.Conv2d) and part in name


def _prune(
    dense: DetectorNet, example: Tensor, part: float
) -> tuple[DetectorNet, dict[str, Tensor]]:
    import torch_pruning as tp

    net = copy.deepcopy(dense)
    convs = {n: m for n, m in net.named_modules() if isinstance(m, nn.Conv2d)}
    biases = {name: conv.bias.detach().clone() for name, conv in convs.items()}
    with torch.no_grad():
        for conv in convs.values():  # labels: what is left says which channels it was
            conv.bias.copy_(torch.arange(len(conv.bias)))
    pruner = tp.pruner.BasePruner(
        net,
        example,
        importance=tp.importance.MagnitudeImportance(p=2),
        pruning_ratio=part,
        ignored_layers=left_alone(net),
    )
    pruner.step()
    rows = {name: conv.bias.detach().long() for name, conv in convs.items()}
    with torch.no_grad():
        for name, conv in convs.items():
            conv.bias.copy_(biases[name][rows[name]])
    kept = {name: rows[name] for name in rows if len(rows[name]) < len(biases[name])}
    return net.eval(), kept
