"""Factorised networks beside cuts, teachers and stored plans; what is left alone is named."""

from __future__ import annotations

import runpy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from edgesight.compression.calibrate import session
from edgesight.compression.chain import full_ranks, stand_in, with_chains
from edgesight.compression.cut import chosen_groups, cut
from edgesight.compression.distill import FeatureTap, feature_loss
from edgesight.compression.export import export_onnx
from edgesight.compression.groups import find_groups
from edgesight.compression.lowrank import decompose, subject_of
from edgesight.compression.lowrank_step import candidates
from edgesight.compression.prune import COSTS
from edgesight.compression.state import rows_kept
from edgesight.models.errors import ModelFileError
from edgesight.models.nets.common import DetectorNet
from torch import Tensor, nn

HERE = Path(__file__).parent
kit: Any = SimpleNamespace(**runpy.run_path(str(HERE / "prune_kit.py")))
fat_kit: Any = SimpleNamespace(**runpy.run_path(str(HERE / "fat_net.py")))
fat, photo = fat_kit.fat, fat_kit.photo
pytestmark = pytest.mark.usefixtures("one_thread")


def with_all_methods(net: nn.Module) -> nn.Module:
    """Puts one chain of each kind into a network; their weights are what they should be."""
    plan = {"stem": "spatial", "down.0": "cp", "down.1": "tucker", "down.2": "svd", "mix": "svd"}
    for name, how in plan.items():
        layer = net.get_submodule(name)
        assert isinstance(layer, nn.Conv2d)
        ranks = tuple(min(9, r) for r in full_ranks(layer, how))
        chain = stand_in(layer, how, ranks, decompose(subject_of(layer), how, ranks))
        owner, _, attribute = name.rpartition(".")
        setattr(net.get_submodule(owner), attribute, chain)
    return net


@pytest.mark.parametrize("seed", [0, 1])
def test_a_cut_factorised_network_is_the_masked_one(seed: int) -> None:
    net = with_all_methods(fat())
    frozen = find_groups(net, torch.zeros(1, 3, 64, 64)).frozen
    print(frozen)
    gap, size = kit.proof(net, 0.3, seed)
    assert gap < 1e-4 * max(size, 1)
    assert size > 0.1
    inner = {m for g in find_groups(net, photo()).groups for m, _ in g.makers}
    assert {"stem.factor0", "down.0.factor0", "down.1.factor1", "down.2.factor0"} <= inner


def test_a_cut_network_is_factorised_and_cut_again() -> None:
    net: nn.Module = fat()
    channels = find_groups(net, photo())
    chosen = [n for n in range(len(channels.groups)) if n % 5 == 0]
    small = with_all_methods(cut(net, channels, chosen))
    gap, size = kit.proof(small, 0.3)
    assert gap < 1e-4 * max(size, 1)


def test_at_full_rank_nothing_is_lost_between_teacher_and_student() -> None:
    teacher = fat()
    student = fat()
    for name in ("down.0", "mix"):
        layer = student.get_submodule(name)
        assert isinstance(layer, nn.Conv2d)
        ranks = full_ranks(layer, "svd")
        chain = stand_in(layer, "svd", ranks, decompose(subject_of(layer), "svd", ranks))
        owner, _, attribute = name.rpartition(".")
        setattr(student.get_submodule(owner), attribute, chain)
    taps = FeatureTap(student), FeatureTap(teacher)
    with torch.no_grad():
        student(photo())
        teacher(photo())
    mine, theirs = taps[0].take(), taps[1].take()
    assert theirs.keys() <= mine.keys()
    assert float(feature_loss(mine, theirs)) < 1e-8


def test_rows_of_cuts_before_and_after_compose() -> None:
    edits = [
        {"kind": "cut", "removed": {"down.0": [0, 5]}},
        {"kind": "factorise", "layers": {"down.0": {"how": "svd", "ranks": [8]}}},
        {"kind": "cut", "removed": {"down.0.whole": [0], "down.0.factor0": [3]}},
    ]
    rows = rows_kept(fat(), edits)
    assert rows.keys() == {"down.0"}
    assert rows["down.0"].tolist() == [n for n in range(48) if n not in (0, 1, 5)]


def test_edits_of_another_network_are_refused() -> None:
    from edgesight.compression.state import apply_edits

    for layers in (
        {"nowhere": {"how": "svd", "ranks": [8]}},
        {"mix": {"how": "svd", "ranks": [480]}},
        {"mix": {"how": "svd"}},
        {"mix": 3},
        {"act": {"how": "svd", "ranks": [8]}},
        [],
    ):
        with pytest.raises(ModelFileError, match="changes that fit the network"):
            apply_edits(fat(), [{"kind": "factorise", "layers": layers}], photo())


class Odd(nn.Module):
    """What is left alone: padding by reflection, two names for one layer, a layer without use."""

    def __init__(self) -> None:
        super().__init__()
        self.mirror = nn.Conv2d(3, 32, 3, padding=1, padding_mode="reflect")
        self.one = self.other = nn.Conv2d(32, 32, 1)
        self.idle = nn.Conv2d(32, 32, 1)
        self.twice = nn.Conv2d(32, 32, 3, padding=1)

    def forward(self, x: Tensor) -> list[Tensor]:
        x = self.other(self.one(self.mirror(x)))
        return [self.twice(self.twice(x))]


def test_what_is_left_alone_is_named() -> None:
    net = Odd().eval()
    found, alone = candidates(net, torch.zeros(1, 3, 16, 16), None, COSTS["macs"])
    assert [one.name for one in found] == ["twice"]
    assert found[0].macs == 2 * 32 * 32 * 9 * 256, "both calls count"
    assert alone == {
        "pads with reflect": 1,
        "has several names in the network": 1,
        "no output depends on it": 1,
    }


def test_zero_weights_are_no_layer() -> None:
    net = nn.Sequential(nn.Conv2d(3, 32, 3))
    nn.init.zeros_(net[0].weight)  # type: ignore[arg-type]
    assert candidates(net, torch.zeros(1, 3, 16, 16), None, COSTS["macs"])[1] == {
        "gives the same on all photos": 1
    }
    nn.init.constant_(net[0].weight, float("nan"))  # type: ignore[arg-type]
    assert candidates(net, torch.zeros(1, 3, 16, 16), None, COSTS["macs"])[1] == {
        "gives values that are not finite": 1
    }


def test_a_stored_plan_gives_the_shape_and_export_the_numbers() -> None:
    net = with_all_methods(fat())
    plan = {
        "stem": {"how": "spatial", "ranks": [9]},
        "down.0": {"how": "cp", "ranks": [9]},
        "down.1": {"how": "tucker", "ranks": [9, 9]},
        "down.2": {"how": "svd", "ranks": [9]},
        "mix": {"how": "svd", "ranks": [9]},
    }
    again = with_chains(fat(), plan)
    again.load_state_dict(net.state_dict())
    with torch.no_grad():
        assert all(map(torch.equal, again(photo()), net(photo())))
    assert isinstance(again, DetectorNet)
    from edgesight.models.spec import ModelSpec

    runner = session(export_onnx(again, ModelSpec("yolox", (64, 64), ("a", "b", "c"))))
    (found,) = runner.run(None, {runner.get_inputs()[0].name: photo().numpy()})
    with torch.no_grad():
        wanted = again.export_forward(photo())
    assert isinstance(wanted, Tensor)
    np.testing.assert_allclose(found, wanted.numpy(), atol=1e-3 * float(wanted.abs().max()))


def test_cuts_of_half_a_chain_are_refused() -> None:
    net = with_all_methods(fat())
    channels = find_groups(net, photo())
    with pytest.raises(ValueError, match="whole groups"):
        chosen_groups(channels, {"down.0.whole": [0], "nowhere": [1]})
