"""Cutting channels: a plan as data, carried out on a copy of the network."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from .groups import ChannelMap


def removed_channels(channels: ChannelMap, chosen: Iterable[int]) -> dict[str, list[int]]:
    """Returns a plan that can be stored: conv name -> output channels that go."""
    plan: dict[str, list[int]] = defaultdict(list)
    for number in chosen:
        for conv, index in channels.groups[number].makers:
            plan[conv].append(index)
    return {name: sorted(rows) for name, rows in sorted(plan.items())}


def chosen_groups(channels: ChannelMap, plan: dict[str, list[int]]) -> set[int]:
    """Returns the groups that a stored plan removes; the inverse of ``removed_channels``.

    Raises:
        ValueError: The plan is of another network, or would leave half a group.
    """
    wanted = {(name, i) for name, rows in plan.items() for i in rows}
    chosen = {n for n, g in enumerate(channels.groups) if wanted & set(g.makers)}
    covered = {maker for n in chosen for maker in channels.groups[n].makers}
    if covered != wanted:
        name, index = sorted(wanted ^ covered)[0]
        message = f"expected a plan of whole groups of this network, found {name}[{index}] alone"
        raise ValueError(message)
    return chosen


@torch.no_grad()
def masked(net: nn.Module, channels: ChannelMap, chosen: Iterable[int]) -> nn.Module:
    """Returns a copy of full size in which the chosen channels are zero everywhere.

    Their readers do not see them either, whatever an activation makes of zero. The cut network
    must compute exactly what this one computes.
    """
    result = copy.deepcopy(net)
    modules = dict(result.named_modules())
    rows, columns = _touched(channels, chosen)
    for name, indices in rows.items():
        module = modules[name]
        for key in ("weight", "bias", "running_mean"):
            value = getattr(module, key, None)
            if isinstance(value, Tensor):
                value[sorted(indices)] = 0
    for name, indices in columns.items():
        weight = modules[name].weight
        assert isinstance(weight, Tensor)
        weight[:, sorted(indices)] = 0
    return result


def _touched(
    channels: ChannelMap, chosen: Iterable[int]
) -> tuple[dict[str, set[int]], dict[str, set[int]]]:
    """Returns which output and which input channels of each module belong to these groups."""
    rows: dict[str, set[int]] = defaultdict(set)
    columns: dict[str, set[int]] = defaultdict(set)
    for number in chosen:
        group = channels.groups[number]
        for name, index in group.makers + group.through:
            rows[name].add(index)
        for name, index in group.users:
            columns[name].add(index)
    return rows, columns


@torch.no_grad()
def cut(net: nn.Module, channels: ChannelMap, chosen: Iterable[int]) -> nn.Module:
    """Returns a copy of the network without the chosen groups.

    Args:
        net: The network that ``channels`` was found in; it stays as it is.
        channels: What ``find_groups`` returned.
        chosen: Numbers of the groups to remove.

    Raises:
        ValueError: A convolution would be left without channels.
    """
    result = copy.deepcopy(net)
    modules = dict(result.named_modules())
    chosen = set(chosen)
    rows, columns = _touched(channels, chosen)
    for name in sorted(rows.keys() | columns.keys()):
        _cut_module(name, modules[name], rows[name], columns[name])
    for path, (read, made) in channels.picks.items():
        owner, _, attribute = path.rpartition(".")
        old: Tensor = getattr(modules[owner], attribute)
        kept = [channels.roots.get(int(n)) not in chosen for n in read]
        position = torch.cumsum(torch.tensor(kept), 0) - 1
        stays = [channels.roots.get(int(n)) not in chosen for n in made]
        places = old[torch.tensor(stays)]
        setattr(modules[owner], attribute, position[places].to(old.device))
    return result


def _cut_module(name: str, module: nn.Module, rows: set[int], columns: set[int]) -> None:
    weight = module.weight
    assert isinstance(weight, Tensor)
    keep_rows = torch.tensor([i for i in range(len(weight)) if i not in rows])
    keep_columns = torch.tensor(
        [i for i in range(weight.shape[1] if weight.ndim > 1 else 1) if i not in columns]
    )
    if not len(keep_rows) or not len(keep_columns):
        message = f"expected at least one channel left in {name}, found none; prune less"
        raise ValueError(message)
    for key in ("weight", "bias", "running_mean", "running_var", "bn_scale"):
        value = getattr(module, key, None)
        if not isinstance(value, Tensor):
            continue
        new = value.detach()[keep_rows]
        if key == "weight" and columns:
            new = new[:, keep_columns]
        if isinstance(value, nn.Parameter):
            setattr(module, key, nn.Parameter(new.clone(), requires_grad=value.requires_grad))
        else:
            setattr(module, key, new.clone())
    if isinstance(module, nn.BatchNorm2d):
        module.num_features = len(keep_rows)
    elif isinstance(module, nn.PReLU):
        module.num_parameters = len(keep_rows)
    elif isinstance(module, nn.Conv2d):
        module.out_channels = len(keep_rows)
        if module.groups > 1:
            module.groups = module.in_channels = len(keep_rows)
        else:
            module.in_channels = len(keep_columns)
