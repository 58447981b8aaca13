"""Which channels go, within which budget, and what refitting mends."""

from __future__ import annotations

import runpy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from edgesight.compression.compensate import refit
from edgesight.compression.cut import chosen_groups, cut
from edgesight.compression.groups import ChannelMap, Group, find_groups
from edgesight.compression.importance import ConvStats, RemovalState, collect_stats
from edgesight.compression.prune import PruneRules, conv_costs, count_macs, plan_pruning
from edgesight.models.nets.common import DetectorNet
from torch import Tensor, nn

kit: Any = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("prune_kit.py"))))
pytestmark = pytest.mark.usefixtures("one_thread")


def photos(count: int = 3) -> list[Tensor]:
    """Smooth noise: neighbouring pixels agree, as in photos."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.randn(count, 4, 3, 16, 16, generator=generator)
    return [nn.functional.interpolate(c, size=kit.SIDE, mode="bilinear") for c in coarse]


def analysed(net: DetectorNet) -> tuple[ChannelMap, RemovalState]:
    channels = find_groups(net, kit.EXAMPLE)
    return channels, RemovalState(channels, collect_stats(net, photos()))


def group_of(channels: ChannelMap, conv: str, channel: int) -> int:
    return next(n for n, g in enumerate(channels.groups) if (conv, channel) in g.makers)


def rank(net: DetectorNet, conv: str) -> list[int]:
    """Channels of one convolution, least important first."""
    channels, harm = analysed(net)
    costs = harm.costs()
    count = sum(g.makers[0][0] == conv for g in channels.groups)
    return sorted(range(count), key=lambda i: costs[group_of(channels, conv, i)])


@pytest.mark.parametrize("ratio", [0.8, 0.5, 0.3])
def test_the_budget_is_met_in_multiples(ratio: float) -> None:
    net = kit.folded(32)
    channels, harm = analysed(net)
    costs = conv_costs(net, kit.EXAMPLE)
    plan = plan_pruning(channels, harm, costs, ratio, PruneRules(align=8))
    small = cut(net, channels, chosen_groups(channels, plan.removed))
    assert count_macs(small, kit.EXAMPLE) == plan.macs_after <= ratio * plan.macs_before
    assert plan.macs_before == count_macs(net, kit.EXAMPLE)
    assert plan.removed
    for left, before in plan.kept.values():
        assert left % 8 == 0
        assert left >= 0.25 * before


def test_every_layer_keeps_its_part() -> None:
    net = kit.folded(32)
    channels, harm = analysed(net)
    costs = conv_costs(net, kit.EXAMPLE)
    plan = plan_pruning(channels, harm, costs, 0.65, PruneRules(align=4, keep_min=0.7))
    assert min(left for left, _ in plan.kept.values()) >= 24  # 0.7 of 32 in fours


@pytest.mark.parametrize("ratio", [0.001, 0.0, -1.0, 1.5, float("nan")])
def test_impossible_ratios(ratio: float) -> None:
    net = kit.folded()
    channels, harm = analysed(net)
    with pytest.raises(ValueError, match=r"expected a (ratio|budget)"):
        plan_pruning(channels, harm, conv_costs(net, kit.EXAMPLE), ratio)


def test_nothing_to_save_removes_nothing() -> None:
    net = kit.folded()
    channels, harm = analysed(net)
    plan = plan_pruning(channels, harm, conv_costs(net, kit.EXAMPLE), 1.0)
    assert plan.removed == {}
    assert plan.macs_after == plan.macs_before


@torch.no_grad()
def silenced() -> DetectorNet:
    """Channel 5 of the stem is read by nobody; channel 2 is by far the loudest to its reader."""
    net: DetectorNet = kit.folded()
    first = net.down[0]  # type: ignore[index]
    first.weight[:, 5] = 0
    net.stem.bias[2] = 1.0  # type: ignore[union-attr,operator]
    net.stem.weight[2] *= 4  # type: ignore[union-attr,operator]
    first.weight[:, 2] *= 8
    return net


def test_what_nobody_reads_goes_first_and_the_loudest_stays() -> None:
    order = rank(silenced(), "stem")
    assert order[0] == 5
    assert order[-1] == 2


def test_one_of_two_equal_channels_is_free_but_not_both() -> None:
    net = kit.folded()
    with torch.no_grad():
        net.stem.weight[9], net.stem.bias[9] = net.stem.weight[4], net.stem.bias[4]
    order = rank(net, "stem")
    assert set(order[:2]) == {4, 9}
    channels, state = analysed(net)
    twin, other = group_of(channels, "stem", 9), group_of(channels, "stem", 4)
    before = state.costs()[other]
    state.remove(twin)
    assert state.costs()[other] > 20 * before
    assert state.costs()[twin] < 1e-9


def test_costs_are_what_the_best_compensation_leaves() -> None:
    """Against least squares solved anew for every set of inputs; two taps per input."""
    random = np.random.default_rng(0)
    inputs = random.normal(size=(400, 10)) @ random.normal(size=(10, 10))
    weight, sensitivity = random.normal(size=(3, 10)), np.array([1.0, 4.0, 0.5])
    stats = {"reader": ConvStats(weight, inputs.T @ inputs / 400, sensitivity, 1, 2)}
    groups = [Group((("maker", i),), (), (("reader", i),)) for i in range(5)]
    state = RemovalState(ChannelMap(groups, {}), stats, ridge=1e-12)

    def left(gone: set[int]) -> float:
        kept = [2 * i + tap for i in range(5) if i not in gone for tap in (0, 1)]
        wanted = inputs @ weight.T
        fitted = inputs[:, kept] @ np.linalg.lstsq(inputs[:, kept], wanted, rcond=None)[0]
        return float((sensitivity * ((wanted - fitted) ** 2).mean(0)).sum())

    gone: set[int] = set()
    for number in (3, 0, 4):
        for other in set(range(5)) - gone:
            extra = left(gone | {other}) - left(gone)
            assert state.costs()[other] == pytest.approx(extra, rel=1e-4)
        state.remove(number)
        gone.add(number)


def test_the_plan_takes_what_nobody_reads() -> None:
    net = silenced()
    channels, harm = analysed(net)
    plan = plan_pruning(channels, harm, conv_costs(net, kit.EXAMPLE), 0.9, PruneRules(align=1))
    assert 5 in plan.removed["stem"]
    assert 2 not in plan.removed["stem"]


class Repeats(DetectorNet):
    """A shared convolution, and one whose result nobody uses."""

    net_name, spec_head, strides, num_classes = "repeats", "yolox", (8,), 2

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.shared = nn.Conv2d(3, 8, 3, 8, 1), nn.Conv2d(8, 8, 1)
        self.idle, self.last = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 7, 1)

    def forward(self, x: Tensor) -> list[Tensor]:
        x = self.stem(x)
        self.idle(x)
        return [self.last(self.shared(torch.relu(self.shared(torch.relu(x)))))]


def test_shared_and_idle_convolutions_do_not_disturb() -> None:
    net = Repeats().eval()
    channels, state = analysed(net)
    assert "shared" in state.stats
    assert "idle" not in state.stats
    for number in range(len(channels.groups)):
        state.remove(number)
    before = [p.clone() for p in net.shared.parameters()]
    refit(net, Repeats().eval(), {}, photos(1), progress=False)
    assert all(map(torch.equal, before, net.shared.parameters()))


def output_error(net: nn.Module, dense: nn.Module, batch: Tensor) -> float:
    with torch.no_grad():
        pairs = zip(net(batch), dense(batch), strict=True)
        return float(np.mean([float((a - b).square().mean()) for a, b in pairs]))


def test_refit_mends() -> None:
    dense = kit.folded(32)
    channels, harm = analysed(dense)
    plan = plan_pruning(channels, harm, conv_costs(dense, kit.EXAMPLE), 0.6)
    small = cut(dense, channels, chosen_groups(channels, plan.removed))
    rows = {
        name: torch.tensor([i for i in range(plan.kept[name][1]) if i not in set(gone)])
        for name, gone in plan.removed.items()
    }
    *fit_on, unseen = photos(4)
    before = output_error(small, dense, unseen)
    refit(small, dense, rows, fit_on, progress=False)  # type: ignore[arg-type]
    assert output_error(small, dense, unseen) < 0.5 * before


def test_refit_leaves_an_uncut_network_alone() -> None:
    dense = kit.folded()
    same = kit.folded()
    refit(same, dense, {}, photos(), progress=False)
    error = output_error(same, dense, photos()[0])
    with torch.no_grad():
        assert error < 1e-8 * float(dense(photos()[0])[0].square().mean())
