"""Coupled channels: what is cut computes what the masked network computes."""

from __future__ import annotations

import json
import runpy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from edgesight.compression.cut import chosen_groups, cut, removed_channels
from edgesight.compression.groups import find_groups
from edgesight.compression.plain import plain, trace
from edgesight.models.errors import InputError
from edgesight.models.nets.build import build_net
from edgesight.models.nets.common import fold_batchnorm
from torch import Tensor, nn

kit: Any = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("prune_kit.py"))))


def randomised(net: nn.Module) -> nn.Module:
    """Biases and statistics as a trained network has them: not zero, not one."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for module in net.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.bias.normal_(generator=generator)
                module.running_mean.normal_(generator=generator)  # type: ignore[union-attr]
                module.running_var.uniform_(0.5, 2, generator=generator)  # type: ignore[union-attr]
    return net.eval()


@pytest.mark.parametrize("name", ["yolox_nano", "yolox_tiny", "yolox_s", "nanodet_plus_m"])
def test_cut_equals_masked(name: str) -> None:
    net = randomised(build_net(name))
    fold_batchnorm(net)
    error, size = kit.proof(net, 0.4)
    assert error < 1e-4 * max(1.0, size)
    assert size > 0


@pytest.mark.parametrize("ratio", [0.1, 0.5, 0.8])
def test_cut_equals_masked_with_normalisation(ratio: float) -> None:
    error, size = kit.proof(randomised(build_net("nanodet_plus_m")), ratio, seed=1)
    assert error < 1e-4 * max(1.0, size)


def test_ssdlite_is_cut_where_it_is_understood() -> None:
    net = randomised(build_net("ssdlite320"))
    error, size = kit.proof(net, 0.3, side=128)
    assert error < 1e-4 * max(1.0, size)


@pytest.mark.parametrize("seed", range(4))
def test_every_kind_of_coupling(seed: int) -> None:
    torch.manual_seed(seed)
    net = trace(kit.Mixed().eval())
    assert plain(net, kit.EXAMPLE) == 2  # the chunk
    error, size = kit.proof(randomised(net), 0.2 + 0.1 * seed, seed)
    assert error < 1e-5
    assert size > 0


def test_what_is_frozen_is_named() -> None:
    net = trace(kit.Mixed().eval())
    plain(net, kit.EXAMPLE)
    channels = find_groups(net, kit.EXAMPLE)
    free = kit.conv_names(channels)
    assert {"stem", "b", "a", "point", "squeeze", "excite", "sigmoid"} <= free
    assert not {"last", "shared", "before", "grouped"} & free
    # The grouped convolution reads the left part of ``wide``; the right one may still go.
    assert {"wide"} <= free
    assert {
        name for g in channels.groups for name, i in g.makers if name == "wide" and i < 16
    } == set()
    reasons = " ".join(channels.frozen)
    for reason in ("Conv2d grouped", "shared is used 2 times", "the network's output", "picture"):
        assert reason in reasons


def test_residual_and_excitation_are_united() -> None:
    net = trace(kit.Mixed().eval())
    plain(net, kit.EXAMPLE)
    channels = find_groups(net, kit.EXAMPLE)
    by_maker = {maker: group for group in channels.groups for maker in group.makers}
    assert set(by_maker["stem", 3].makers) == {("stem", 3), ("b", 3)}
    assert {("bn", 3), ("prelu", 3), ("depthwise", 3)} <= set(by_maker["stem", 3].through)
    assert {("a", 3), ("point", 3)} == set(by_maker["stem", 3].users)
    assert set(by_maker["point", 5].makers) == {("point", 5), ("excite", 5)}
    assert "stem[3] + b[3]" in str(by_maker["stem", 3])


def test_a_tensor_given_by_name_is_not_overlooked() -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 4, 1)

        def forward(self, x: Tensor) -> list[Tensor]:
            y = self.a(x)
            return [self.b(y) + torch.lerp(torch.zeros(1), end=y, weight=0.5)[:, :4]]

    assert not kit.conv_names(find_groups(Named().eval(), kit.EXAMPLE))


def test_channel_count_read_from_the_shape_freezes() -> None:
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 4, 1)

        def forward(self, x: Tensor) -> list[Tensor]:
            y = self.a(x)
            return [self.b(y) / y.shape[1]]

    assert not kit.conv_names(find_groups(Counting().eval(), kit.EXAMPLE))


def test_one_index_for_two_tensors_freezes_both() -> None:
    class Twice(nn.Module):
        index: Tensor

        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 8, 1), nn.Conv2d(3, 8, 1)
            self.last = nn.Conv2d(8, 4, 1)
            self.register_buffer("index", torch.tensor([3, 1, 5, 7]))

        def forward(self, x: Tensor) -> list[Tensor]:
            left = self.a(x).index_select(1, self.index)
            right = torch.index_select(self.b(x), 1, self.index)
            return [self.last(torch.cat([left, right], 1))]

    channels = find_groups(Twice().eval(), kit.EXAMPLE)
    assert not kit.conv_names(channels)
    assert "index is used twice" in channels.frozen


def test_a_plan_is_data() -> None:
    net = kit.folded()
    channels = find_groups(net, kit.EXAMPLE)
    chosen = {0, 3, 17, 40}
    plan = json.loads(json.dumps(removed_channels(channels, chosen)))
    assert chosen_groups(channels, plan) == chosen
    again = cut(net, channels, chosen_groups(channels, plan))
    assert [p.shape for p in again.parameters()] == [
        p.shape for p in cut(net, channels, chosen).parameters()
    ]


def test_half_a_group_is_refused() -> None:
    net = trace(kit.Mixed().eval())
    plain(net, kit.EXAMPLE)
    channels = find_groups(net, kit.EXAMPLE)
    with pytest.raises(ValueError, match=r"whole groups.*\[3\] alone"):
        chosen_groups(channels, {"stem": [3]})
    with pytest.raises(ValueError, match=r"whole groups"):
        chosen_groups(channels, {"no such convolution": [0]})


def test_no_channel_left_is_refused() -> None:
    net = kit.folded()
    channels = find_groups(net, kit.EXAMPLE)
    stem = [n for n, g in enumerate(channels.groups) if g.makers[0][0] == "stem"]
    with pytest.raises(ValueError, match=r"at least one channel left in down\.0"):
        cut(net, channels, stem)


def test_untraceable_is_one_clear_line() -> None:
    with pytest.raises(InputError, match=r"expected a network that torch.fx can trace") as caught:
        find_groups(kit.Untraceable(), kit.EXAMPLE)
    assert "\n" not in str(caught.value)


def test_a_wrong_size_is_one_clear_line() -> None:
    with pytest.raises(InputError, match=r"takes a picture \[1, 4, 64, 64\]"):
        find_groups(kit.folded(), torch.zeros(1, 4, 64, 64))


def test_slices_and_splits_become_choices_by_index() -> None:
    class Splits(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 12, 1), nn.Conv2d(4, 4, 1)
            self.last = nn.Conv2d(12, 4, 1)

        def forward(self, x: Tensor) -> list[Tensor]:
            y = self.a(x)
            one, two = y.split([8, 4], dim=1)
            return [self.last(torch.cat([one, self.b(y[:, 2:6]), two[:, ::4][:, [0, 0, 0]]], 1))]

    net = Splits().eval()
    net.last = nn.Conv2d(15, 4, 1)
    with torch.no_grad():
        x = torch.randn(2, 3, 64, 64)
        wanted = net(x)
        graph = trace(net)
        assert plain(graph, kit.EXAMPLE) == 4
        assert kit.difference(graph(x), wanted) == 0
    assert "b" in kit.conv_names(find_groups(graph, kit.EXAMPLE))
    assert kit.proof(graph, 0.4)[0] < 1e-5
