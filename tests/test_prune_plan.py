"""How much of each layer goes: by cost, globally, uniformly, and at counts a core is fast with."""

from __future__ import annotations

import runpy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from edgesight.compression.criteria import FixedHarm, layers
from edgesight.compression.cut import chosen_groups, cut
from edgesight.compression.groups import ChannelMap, find_groups
from edgesight.compression.importance import RemovalState, collect_stats
from edgesight.compression.prune import (
    COSTS,
    PlanError,
    PrunePlan,
    PruneRules,
    conv_costs,
    plan_pruning,
    total_cost,
)
from edgesight.compression.settings import PruneStep
from pydantic import ValidationError
from torch import Tensor, nn

kit: Any = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("prune_kit.py"))))
pytestmark = pytest.mark.usefixtures("one_thread")
EXAMPLE = torch.zeros(1, 3, 64, 64)


class Separable(nn.Module):
    """A depthwise convolution between two dense ones, and a branch of few, cheap channels."""

    def __init__(self, width: int = 58) -> None:
        super().__init__()
        self.wide = nn.Conv2d(3, width, 3, 2, 1)
        self.depthwise = nn.Conv2d(width, width, 3, 1, 1, groups=width)
        self.point = nn.Conv2d(width, 32, 1)
        self.down = nn.Conv2d(32, 32, 3, 4, 1)
        self.last = nn.Conv2d(32, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.depthwise(torch.relu(self.wide(x))))
        out: Tensor = self.last(torch.relu(self.down(torch.relu(self.point(x)))))
        return out


def planned(
    net: nn.Module, ratio: float, rules: PruneRules, scores: Any = None
) -> tuple[PrunePlan, ChannelMap]:
    channels = find_groups(net, EXAMPLE)
    harm = FixedHarm(np.ones(len(channels.groups)) if scores is None else scores(channels))
    return plan_pruning(channels, harm, conv_costs(net, EXAMPLE), ratio, rules), channels


def left(plan: PrunePlan, net: nn.Module, name: str) -> int:
    conv = dict(net.named_modules())[name]
    assert isinstance(conv, nn.Conv2d)
    return plan.kept.get(name, (conv.out_channels, 0))[0]


def test_an_odd_layer_stops_where_a_depthwise_convolution_is_fast() -> None:
    """58 channels are no multiple of 16; nor is 56, but there an 8-bit depthwise is fast."""
    net = Separable().eval()
    rules = PruneRules(budget="cortex-a76", cost="cortex-a76", align=16)
    plan, channels = planned(net, 0.9, rules)
    assert left(plan, net, "wide") in (56, 48)
    assert plan.removed["wide"]
    assert left(plan, net, "point") == left(plan, net, "down") == 32, "nothing pays as much"
    small = cut(net, channels, chosen_groups(channels, plan.removed))
    cost = total_cost(conv_costs(small, EXAMPLE), COSTS["cortex-a76"])
    assert cost == pytest.approx(plan.cost_after)
    assert cost < 0.75 * plan.cost_before, "two channels of 58 were a quarter of the whole"
    assert plan.macs_after > 0.8 * plan.macs_before


def test_counts() -> None:
    key = ("a",)
    assert PruneRules(align=8, keep_min=0.25).counts(key, 32) == [24, 16, 8]
    assert PruneRules(align=8, keep_min=0.7).counts(key, 32) == [24]
    assert PruneRules(align=16).counts(key, 58) == [56, 48, 32, 16]
    assert PruneRules(align=16).counts(key, 64) == [48, 32, 16]
    assert PruneRules(align=16).counts(key, 24) == [16]
    assert PruneRules(align=8).counts(key, 6) == []
    assert PruneRules(align=4, keep_min=0.01).counts(key, 10) == [8, 4]
    assert PruneRules(align=1, keep_min=0.5).counts(key, 4) == [3, 2]
    assert PruneRules(align=8, sizes={key: 64}).counts(key, 32) == [24, 16], "of 64, not of 32"


@pytest.mark.parametrize("ratio", [0.7, 0.4])
def test_uniform_keeps_the_same_part_of_every_layer(ratio: float) -> None:
    net = kit.folded(32)
    plan, channels = planned(net, ratio, PruneRules(allocation="uniform", align=1))
    kept = {now for now, _ in plan.kept.values()}
    assert len(plan.kept) == len(layers(channels))
    assert max(kept) - min(kept) <= 1
    assert 0.9 * ratio < plan.macs_after / plan.macs_before <= ratio
    coarse, _ = planned(net, ratio, PruneRules(allocation="uniform", align=8))
    assert {now % 8 for now, _ in coarse.kept.values()} == {0}
    assert coarse.macs_after <= ratio * coarse.macs_before


def test_by_cost_the_expensive_layer_goes_first_and_globally_the_one_of_least_harm() -> None:
    """Channels of the last layer do half the harm of others and save next to nothing."""
    net = kit.folded(32)

    def scores(channels: ChannelMap) -> Any:
        cheap = ["down.2" in {n for n, _ in g.makers} for g in channels.groups]
        return np.where(cheap, 0.5, 1.0)

    by_cost, _ = planned(net, 0.85, PruneRules(), scores)
    everywhere, _ = planned(net, 0.85, PruneRules(allocation="global"), scores)
    assert "down.2" not in by_cost.removed
    assert left(everywhere, net, "down.2") == 8
    gone = [sum(map(len, plan.removed.values())) for plan in (by_cost, everywhere)]
    assert gone[0] < gone[1]


def test_one_layer_cannot_be_emptied_for_the_others() -> None:
    net = kit.folded(32)
    plan, _ = planned(net, 0.4, PruneRules(keep_min=0.5))
    assert min(now for now, _ in plan.kept.values()) == 16


@pytest.mark.parametrize("allocation", ["cost", "global", "uniform"])
def test_out_of_reach_says_what_can_be_had(allocation: str) -> None:
    net = kit.folded(32)
    rules = PruneRules(allocation=allocation, keep_min=0.5)
    with pytest.raises(PlanError, match=r"found 0\.1 of .* the least is 0\.\d+") as caught:
        planned(net, 0.1, rules)
    least = caught.value.least
    assert 0.1 < least < 0.5
    plan, _ = planned(net, least + 1e-4, rules)
    assert plan.macs_after == pytest.approx(least * plan.macs_before, rel=1e-3)


def test_saving_more_than_is_needed_does_not_count() -> None:
    """The dear layer saves a third for a little harm; the cheap one is enough, for less."""
    net = kit.folded(32)
    dear, cheap = 3.0, 1.0

    def scores(channels: ChannelMap) -> Any:
        return np.array([cheap if g.makers[0][0] == "down.1" else dear for g in channels.groups])

    plan, _ = planned(net, 0.97, PruneRules(), scores)
    assert list(plan.removed) == ["down.1"]
    assert len(plan.removed["down.1"]) == 8


def photos() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    coarse = torch.randn(2, 4, 3, 16, 16, generator=generator)
    return [nn.functional.interpolate(c, size=kit.SIDE, mode="bilinear") for c in coarse]


def test_a_preview_is_what_removal_then_costs() -> None:
    net = kit.folded(16)
    channels = find_groups(net, kit.EXAMPLE)
    state = RemovalState(channels, collect_stats(net, photos()))
    (members,) = [m for key, m in layers(channels).items() if key == ("down.0",)]
    before = state.costs()
    seen = state.preview(members, 6)
    np.testing.assert_array_equal(state.costs(), before)
    assert not state.gone
    for number, cost in seen:
        costs = state.costs()
        rest = [n for n in members if n not in state.gone]
        assert number == min(rest, key=lambda n: costs[n])
        assert cost == pytest.approx(costs[number], rel=1e-9)
        state.remove(number)
    assert len({number for number, _ in seen}) == 6


def test_cost_of_every_removal_is_small_where_a_twin_stays() -> None:
    """Taps of k x k kernels are solved together, for all inputs at once."""
    net = kit.folded(16)
    with torch.no_grad():
        net.stem.weight[9], net.stem.bias[9] = net.stem.weight[4], net.stem.bias[4]
    channels = find_groups(net, kit.EXAMPLE)
    state = RemovalState(channels, collect_stats(net, photos()))
    stem = [n for n, g in enumerate(channels.groups) if g.makers[0][0] == "stem"]
    (first, one), _, *rest = state.preview(stem, 16)
    assert channels.groups[first].makers[0][1] in (4, 9)
    assert one < 0.1 * np.median([cost for _, cost in rest])


def test_settings_take_one_budget() -> None:
    assert PruneStep(kind="prune").budget == ("macs", 0.6)
    step = PruneStep(kind="prune", cost_ratio=0.5, cost="cortex-a72")
    assert step.budget == ("cortex-a72", 0.5)
    assert PruneStep(kind="prune", macs_ratio=0.7, cost="cortex-a76").budget == ("macs", 0.7)
    with pytest.raises(
        ValidationError, match="one of macs_ratio, cost_ratio or plan, found macs_ratio and"
    ):
        PruneStep(kind="prune", cost_ratio=0.5, macs_ratio=0.5)
    again = PruneStep.model_validate(step.model_dump(mode="json"))
    assert again == step


@pytest.mark.parametrize("core", ["cortex-a76", "cortex-a72"])
def test_what_a_core_counts_is_met(core: str) -> None:
    net = kit.folded(32)
    plan, channels = planned(net, 0.85, PruneRules(budget=core, cost=core))
    small = cut(net, channels, chosen_groups(channels, plan.removed))
    before, after = (total_cost(conv_costs(n, EXAMPLE), COSTS[core]) for n in (net, small))
    assert after <= 0.85 * before * (1 + 1e-6)
    assert (plan.cost_before, plan.cost_after) == pytest.approx((before, after))
