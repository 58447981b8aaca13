"""Each criterion lets the right channels go first."""

from __future__ import annotations

import runpy
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from edgesight.compression import levels as levels_module
from edgesight.compression.criteria import (
    CRITERIA,
    FixedHarm,
    bn_scores,
    harm_of,
    layers,
    taylor_scores,
    weight_scores,
)
from edgesight.compression.cut import chosen_groups, cut
from edgesight.compression.enter import enter_module
from edgesight.compression.groups import ChannelMap, find_groups
from edgesight.compression.levels import LevelParts, probe_loss
from edgesight.compression.prune import PruneRules, conv_costs, plan_pruning
from edgesight.compression.recipe import ModelSource
from edgesight.compression.source import enter
from edgesight.models.errors import RecipeError
from edgesight.models.nets.build import build_net
from edgesight.models.nets.common import DetectorNet, fold_batchnorm
from torch import Tensor, nn

here = Path(__file__)
kit: Any = SimpleNamespace(**runpy.run_path(str(here.with_name("prune_kit.py"))))
pytestmark = pytest.mark.usefixtures("one_thread")
WEAK, STRONG = 5, 2
"""Channels of the stem that are planted."""


def photos(count: int = 3) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    coarse = torch.randn(count, 4, 3, 16, 16, generator=generator)
    return [nn.functional.interpolate(c, size=kit.SIDE, mode="bilinear") for c in coarse]


@torch.no_grad()
def planted(criterion: str) -> DetectorNet:
    """One channel that the criterion must let go first, and one that it must keep."""
    net: Any = kit.folded()
    net.stem.bias.zero_()
    if criterion in ("l1", "l2", "lamp"):
        net.stem.weight[WEAK] *= 0.1
        net.stem.weight[STRONG] *= 4
    elif criterion == "fpgm":  # near all others, though it is not the smallest
        net.stem.weight[WEAK] = net.stem.weight.mean(0)
        net.stem.weight[STRONG] *= 4
    elif criterion == "bn":
        net.stem.bn_scale = torch.ones(16)
        net.stem.bn_scale[WEAK], net.stem.bn_scale[STRONG] = 0.01, 9.0
    else:  # large, but hardly read; read more than any other
        net.stem.weight[[WEAK, STRONG]] *= 3
        net.down[0].weight[:, WEAK] *= 1e-3
        net.down[0].weight[:, STRONG] *= 5
    return net  # type: ignore[no-any-return]


def stem_groups(channels: ChannelMap) -> list[int]:
    groups = enumerate(channels.groups)
    found = {g.makers[0][1]: n for n, g in groups if g.makers[0][0] == "stem"}
    return [found[i] for i in range(16)]


@pytest.mark.parametrize("criterion", CRITERIA)
def test_the_planted_channel_goes_first_and_the_strong_one_last(criterion: str) -> None:
    net = planted(criterion)
    channels = find_groups(net, kit.EXAMPLE)
    stem = stem_groups(channels)
    harm = harm_of(criterion, net, channels, photos())
    order = [stem.index(number) for number, _ in harm.preview(stem, 16)]
    assert order[0] == WEAK
    assert order[-1] == STRONG


@pytest.mark.parametrize("allocation", ["cost", "global", "uniform"])
@pytest.mark.parametrize("criterion", CRITERIA)
def test_a_plan_follows_its_criterion(criterion: str, allocation: str) -> None:
    net = planted(criterion)
    channels = find_groups(net, kit.EXAMPLE)
    harm = harm_of(criterion, net, channels, photos())
    rules = PruneRules(allocation=allocation, align=1)
    plan = plan_pruning(channels, harm, conv_costs(net, kit.EXAMPLE), 0.6, rules)
    assert plan.macs_after <= 0.6 * plan.macs_before
    gone = plan.removed.get("stem", [])
    assert STRONG not in gone
    assert not gone or WEAK in gone
    assert gone or allocation != "uniform"


def one_layer(rows: list[list[float]]) -> tuple[nn.Module, ChannelMap]:
    net = nn.Sequential(nn.Conv2d(2, len(rows), 1), nn.Conv2d(len(rows), 1, 1)).eval()
    net[0].weight.data = torch.tensor(rows)[:, :, None, None]
    return net, find_groups(net, torch.zeros(1, 2, 4, 4))


def by_channel(scores: Any, channels: ChannelMap) -> list[float]:
    return [
        float(scores[n])
        for n in sorted(range(len(scores)), key=lambda n: channels.groups[n].makers)
    ]


def test_norms_are_those_of_the_papers() -> None:
    rows = [[3.0, 4.0], [0.0, -6.0], [1.0, 1.0]]
    net, channels = one_layer(rows)
    one, two = (
        np.array(by_channel(weight_scores(c, net, channels), channels)) for c in ("l1", "l2")
    )
    np.testing.assert_allclose(one / one[2], [3.5, 3.0, 1.0], rtol=1e-6)
    np.testing.assert_allclose(two / two[2], [5 / 2**0.5, 6 / 2**0.5, 1.0], rtol=1e-6)
    assert one.mean() == pytest.approx(1)  # so that layers can be compared
    lamp = by_channel(weight_scores("lamp", net, channels), channels)
    np.testing.assert_allclose(lamp, [25 / 61, 1.0, 2 / 63], rtol=1e-6)
    fpgm = np.array(by_channel(weight_scores("fpgm", net, channels), channels))
    apart = [109**0.5, 13**0.5, 50**0.5]  # 0-1, 0-2, 1-2
    sums = np.array([apart[0] + apart[1], apart[0] + apart[2], apart[1] + apart[2]])
    np.testing.assert_allclose(fpgm, sums / sums.mean(), rtol=1e-6)


def test_all_makers_of_a_group_count() -> None:
    """A residual: a channel is weak only if both convolutions that make it are."""

    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.last = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            x = self.a(x)
            out: Tensor = self.last(x + self.b(x))
            return out

    net = Residual().eval()
    with torch.no_grad():
        net.a.weight.fill_(1.0)
        net.b.weight.fill_(1.0)
        net.a.weight[1] = 0.1
        net.a.weight[2] = net.b.weight[2] = 0.5
    channels = find_groups(net, torch.zeros(1, 3, 4, 4))
    ((key, members),) = layers(channels).items()
    assert key == ("a", "b")
    scores = by_channel(weight_scores("l1", net, channels), channels)
    assert len(members) == 4
    assert min(scores) == scores[2]


def test_taylor_is_the_change_of_the_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    """Against the loss itself, with one filter after the other made a little smaller."""
    apart = levels_module.take_apart

    def all_cells_alike(net: DetectorNet, level: Tensor) -> LevelParts:  # as a gradient sees it
        parts = apart(net, level)
        return replace(parts, confidence=torch.ones_like(parts.confidence))

    monkeypatch.setattr(levels_module, "take_apart", all_cells_alike)
    net = planted("taylor")
    channels = find_groups(net, kit.EXAMPLE)
    batches = photos(1)
    scores = taylor_scores(net, channels, batches, seed=3)
    assert all(p.grad is None for p in net.parameters())

    def loss(changed: nn.Module) -> float:
        assert isinstance(changed, DetectorNet)
        with torch.no_grad():
            levels = [level.double() for level in changed(batches[0].double())]
            return float(probe_loss(changed, levels, torch.Generator().manual_seed(3)))

    stem = stem_groups(channels)
    slopes = []
    for channel in range(16):
        values = []
        for step in (-1e-4, 1e-4):
            changed: Any = planted("taylor").double()
            changed.stem.weight.data[channel] *= 1 + step
            changed.stem.bias.data[channel] *= 1 + step
            values.append(loss(changed))
        slopes.append(abs(values[1] - values[0]) / 2e-4)
    np.testing.assert_allclose(scores[stem], slopes, atol=0.03 * max(slopes))  # bfloat16
    assert int(np.argmin(slopes)) == WEAK


def test_frozen_weights_stay_frozen() -> None:
    net = kit.folded().requires_grad_(False)
    taylor_scores(net, find_groups(net, kit.EXAMPLE), photos(1))
    assert not any(p.requires_grad for p in net.parameters())


def test_scales_of_folded_normalisation_are_remembered_and_cut() -> None:
    net = build_net("nanodet_plus_m")
    with torch.no_grad():
        for module in net.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.weight.uniform_(-1.5, 1.5)
    wanted = net.backbone.conv1[1].weight.detach().abs().clone()  # type: ignore[union-attr,index]
    fold_batchnorm(net.eval(), remember=True)
    example = torch.zeros(1, 3, 64, 64)
    channels = find_groups(net, example)
    scores = bn_scores(net, channels)
    assert np.isfinite(scores).all()
    first = [n for n, g in enumerate(channels.groups) if g.makers[0][0] == "backbone.conv1.0"]
    means = [  # of the normalisations behind the convolution itself and behind the depthwise one
        np.mean(
            [
                float(m.bn_scale[i])
                for c, i in (*g.makers, *g.through)
                for m in [dict(net.named_modules())[c]]
            ]
        )
        for g in (channels.groups[n] for n in first)
    ]
    np.testing.assert_allclose(scores[first], means, rtol=1e-6)
    stem = net.backbone.conv1[0]  # type: ignore[union-attr,index]
    torch.testing.assert_close(stem.bn_scale, wanted)  # type: ignore[union-attr,arg-type]
    small: Any = cut(net, channels, chosen_groups(channels, {"backbone.conv1.0": [0, 7]}))
    rest = [i for i in range(24) if i not in (0, 7)]
    torch.testing.assert_close(small.backbone.conv1[0].bn_scale, wanted[rest])


def test_bn_without_normalisation_is_one_clear_line() -> None:
    net = kit.folded()
    channels = find_groups(net, kit.EXAMPLE)
    with pytest.raises(RecipeError, match=r"prune.criterion: .*folded in every ONNX") as caught:
        bn_scores(net, channels)
    assert "\n" not in str(caught.value)


def test_bn_leaves_layers_without_a_scale_alone() -> None:
    net = planted("bn")
    channels = find_groups(net, kit.EXAMPLE)
    harm = harm_of("bn", net, channels, [])
    plan = plan_pruning(
        channels, harm, conv_costs(net, kit.EXAMPLE), 0.95, PruneRules(align=1, keep_min=0.1)
    )
    assert set(plan.removed) == {"stem"}


def test_scales_come_in_with_a_checkpoint_and_not_with_onnx(tmp_path: Path) -> None:
    net = build_net("yolox_nano", 2)
    with torch.no_grad():
        net.backbone.backbone.stem.conv.bn.weight.fill_(0.25)  # type: ignore[union-attr]
    path = tmp_path / "net.pth"
    torch.save(net.state_dict(), path)
    entered = enter(ModelSource(name="yolox_nano", weights=path, classes=("a", "b")))
    stem = entered.net.backbone.backbone.stem.conv.conv  # type: ignore[union-attr]
    assert set(stem.bn_scale.tolist()) == {0.25}  # type: ignore[union-attr]
    fold_batchnorm(net.eval())
    torch.save(net.state_dict(), path)
    entered = enter(ModelSource(name="yolox_nano", weights=path, classes=("a", "b")))
    stem = entered.net.backbone.backbone.stem.conv.conv  # type: ignore[union-attr]
    assert not hasattr(stem, "bn_scale")


def test_an_own_module_keeps_its_scales(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys
    from types import ModuleType

    module = ModuleType("own_net")
    module.picky = kit.picky  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "own_net", module)
    net, _ = enter_module("own_net:picky", "yolox", None, (64, 64))
    scores = bn_scores(net, find_groups(net, torch.zeros(1, 3, 64, 64)))
    assert int(np.isfinite(scores).sum()) == 16


def test_an_unknown_criterion() -> None:
    net = kit.folded()
    with pytest.raises(ValueError, match="expected a criterion out of obs, l1"):
        harm_of("l3", net, find_groups(net, kit.EXAMPLE), [])


def test_fixed_costs_are_given_smallest_first() -> None:
    harm = FixedHarm(np.array([3.0, 1.0, 2.0, 0.0]))
    assert harm.preview([0, 1, 2], 2) == [(1, 1.0), (2, 2.0)]
