"""What a plan leaves of each supported network computes what the masked network computes."""

from __future__ import annotations

import runpy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from edgesight.compression.criteria import FixedHarm
from edgesight.compression.cut import chosen_groups, cut, masked
from edgesight.compression.enter import enter_onnx
from edgesight.compression.foreign import convert_onnx
from edgesight.compression.groups import find_groups
from edgesight.compression.plain import plain, trace
from edgesight.compression.prune import PruneRules, conv_costs, count_macs, plan_pruning
from edgesight.compression.sever import sever
from edgesight.models.graph import load_model
from edgesight.models.nets.common import fold_batchnorm
from torch import Tensor, nn

here = Path(__file__)
kit: Any = SimpleNamespace(**runpy.run_path(str(here.with_name("prune_kit.py"))))
nets: Any = SimpleNamespace(**runpy.run_path(str(here.with_name("nets_kit.py"))))
pytestmark = pytest.mark.usefixtures("one_thread")


def planned_cut(net: nn.Module, example: Tensor, ratio: float, seed: int, align: int) -> nn.Module:
    """Plans with random costs, cuts, and compares with the masked network on noise."""
    channels = find_groups(net, example)
    harm = FixedHarm(np.random.default_rng(seed).random(len(channels.groups)))
    costs = conv_costs(net, example)
    plan = plan_pruning(channels, harm, costs, ratio, PruneRules(align=align, keep_min=0.1))
    chosen = chosen_groups(channels, plan.removed)
    small = cut(net, channels, chosen).eval()
    assert count_macs(small, example) == plan.macs_after <= ratio * plan.macs_before
    x = torch.randn(2, *example.shape[1:], generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        wanted, found = masked(net, channels, chosen)(x), small(x)
        if isinstance(wanted, Tensor):
            wanted, found = [wanted], [found]
        size = max(float(w.abs().max()) for w in wanted)
        gap = kit.difference(found, wanted)
    assert size > 1e-3, "else nothing is compared"
    assert gap < 1e-4 * max(1.0, size)
    return small


@pytest.mark.parametrize("name", ["yolox_nano", "nanodet_plus_m", "ssdlite320"])
def test_our_networks_in_two_parts(name: str) -> None:
    """The second cut meets choices by index that the first has changed."""
    net = nets.lively(name)
    if name != "ssdlite320":
        fold_batchnorm(net)
    example = torch.zeros(1, 3, 128, 128)
    half = planned_cut(net, example, 0.7, seed=0, align=8)
    planned_cut(half, example, 0.7, seed=1, align=4)


def test_every_kind_of_coupling() -> None:
    """Residual, concatenation, depthwise, split, excitation: each in one small network."""
    torch.manual_seed(0)
    net = trace(kit.Mixed().eval())
    plain(net, kit.EXAMPLE)
    planned_cut(planned_cut(net, kit.EXAMPLE, 0.9, 0, align=2), kit.EXAMPLE, 0.9, 1, align=1)


@pytest.mark.shared
@pytest.mark.parametrize("file", ["yolox_nano_416", "nanodet_plus_m_416", "nanodet_m_416"])
def test_foreign_networks(file: str, shared: Path) -> None:
    net, spec = enter_onnx(shared / "weights" / f"{file}.onnx")
    example = torch.zeros(1, 3, *spec.input_hw)
    planned_cut(planned_cut(net, example, 0.7, 0, align=8), example, 0.7, 1, align=8)


@pytest.mark.shared
def test_a_network_whose_head_nobody_knows(shared: Path) -> None:
    """FastestDet's own shuffle fixes the batch, so pictures come one by one."""
    model = load_model(shared / "weights/fastestdet_352.onnx")
    net = trace(convert_onnx(sever(model).body))
    example = torch.zeros(1, 3, 352, 352)
    plain(net, example)
    planned_cut(net.eval(), example, 0.7, 0, align=8)
