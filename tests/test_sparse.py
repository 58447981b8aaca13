"""Which weights become zero, and that they stay it."""

from __future__ import annotations

import copy
import runpy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from edgesight.compression.compensate import refit
from edgesight.compression.cut import cut
from edgesight.compression.groups import find_groups
from edgesight.compression.rounding import compensated
from edgesight.compression.sparse import (
    Kept,
    SparseMasks,
    cubic,
    deflated,
    gradient_scores,
    int8_weights,
    keep_above,
    keep_globally,
    keep_largest,
    keep_pattern,
    keep_per_channel,
    keep_per_layer,
    magnitude_scores,
    mark_sparse,
    masks_of,
    relative_limits,
    weights_of,
    zero_count,
)
from edgesight.compression.state import apply_edits
from edgesight.models.nets.common import DetectorNet
from torch import Tensor, nn

kit: Any = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("prune_kit.py"))))
pytestmark = pytest.mark.usefixtures("one_thread")


def photos(count: int = 3) -> list[Tensor]:
    """Smooth noise: neighbouring pixels agree, as in photos."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.randn(count, 4, 3, 16, 16, generator=generator)
    return [nn.functional.interpolate(c, size=kit.SIDE, mode="bilinear") for c in coarse]


def scores_of(net: DetectorNet, method: str, batches: list[Tensor]) -> dict[str, Tensor]:
    if method == "magnitude":
        return magnitude_scores(net)
    return gradient_scores(net, batches, method == "taylor")


def without(net: DetectorNet, kept: Kept) -> DetectorNet:
    """A copy that is zero where the masks say so."""
    result = copy.deepcopy(net)
    SparseMasks(kept).apply_(result)
    mark_sparse(result)
    return result


def harm(net: DetectorNet, other: DetectorNet, batches: list[Tensor]) -> float:
    with torch.no_grad():
        pairs = [zip(net(x), other(x), strict=True) for x in batches]
        return sum(float((a - b).square().mean()) for pair in pairs for a, b in pair)


# -- direction


def test_the_smallest_magnitudes_go() -> None:
    scores = {"a": torch.tensor([[3.0, 1.0], [4.0, 2.0]]), "b": torch.tensor([[10.0, 20.0]])}
    assert keep_per_layer(scores, 0.5)["a"].tolist() == [[True, False], [True, False]]
    assert keep_per_layer(scores, 0.5)["b"].tolist() == [[False, True]]
    everywhere = keep_globally(scores, 0.5)
    assert everywhere["a"].tolist() == [[False, False], [True, False]], "3, 1 and 2 are smallest"
    assert everywhere["b"].all()


@pytest.mark.parametrize("method", ["magnitude", "gradient", "taylor"])
def test_what_a_criterion_calls_small_harms_less_than_what_it_calls_large(method: str) -> None:
    net, batches = kit.folded(), photos()
    scores = scores_of(net, method, batches)
    small = without(net, keep_globally(scores, 0.2, keep_min=0.1))
    backwards = {name: score.max() - score for name, score in scores.items()}
    large = without(net, keep_globally(backwards, 0.2, keep_min=0.1))
    assert zero_count(small) == zero_count(large) > 0
    assert harm(net, small, batches) < 0.5 * harm(net, large, batches)


def test_weights_on_a_channel_that_is_always_dark_are_nothing_to_a_gradient() -> None:
    net = kit.folded()
    batches = [x * torch.tensor([1.0, 1.0, 0.0]).reshape(1, 3, 1, 1) for x in photos()]
    with torch.no_grad():
        net.stem.weight[:, 2] = 10.0
    for method, stays in (("magnitude", True), ("gradient", False), ("taylor", False)):
        kept = keep_per_layer(scores_of(net, method, batches), 1 / 3)["stem"]
        assert bool(kept[:, 2].all()) == stays, method
        assert bool(kept[:, 2].any()) == stays, method


def test_taylor_takes_the_smaller_of_two_weights_with_the_same_gradient() -> None:
    net = kit.folded()
    batches = [x[:, :1].expand(-1, 3, -1, -1).contiguous() for x in photos()]  # all channels alike
    with torch.no_grad():
        net.stem.weight[:, 0] = 0.01 * net.stem.weight[:, 1]
        net.stem.weight[:, 2] = 0.5 * net.stem.weight[:, 1]
    gradient = scores_of(net, "gradient", batches)["stem"]
    torch.testing.assert_close(gradient[:, 0], gradient[:, 1], rtol=1e-3, atol=0)
    kept = keep_pattern({"stem": scores_of(net, "taylor", batches)["stem"]}, 2, 3)["stem"]
    assert not kept[:, 0].any()
    assert kept[:, 1:].all()


# -- counts and patterns


@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.5, 0.9])
def test_counts_are_exact_also_among_equals(sparsity: float) -> None:
    net = kit.folded()
    with torch.no_grad():
        net.down[0].weight.fill_(0.5)  # nothing but equals
    scores = magnitude_scores(net)
    per_layer = keep_per_layer(scores, sparsity)
    for name, score in scores.items():
        assert int((~per_layer[name]).sum()) == round(sparsity * score.numel())
    total = sum(score.numel() for score in scores.values())
    everywhere = keep_globally(scores, sparsity)
    assert sum(int((~k).sum()) for k in everywhere.values()) == round(sparsity * total)


def test_of_every_output_channel_the_largest_stay_however_loud_it_is() -> None:
    net = kit.folded()
    with torch.no_grad():
        net.down[0].weight.mul_(10.0 ** torch.linspace(-3, 3, 16).reshape(-1, 1, 1, 1))
    scores = magnitude_scores(net)
    for sparsity in (0.0, 0.25, 0.5):
        for name, kept in keep_per_channel(scores, sparsity).items():
            rows, score = kept.flatten(1), scores[name].flatten(1)
            gone = round(sparsity * rows.shape[1])
            assert ((~rows).sum(1) == gone).all()
            largest = score.masked_fill(rows, -torch.inf).amax(1)
            assert (score.masked_fill(~rows, torch.inf).amin(1) > largest).all()
    by_layer = keep_per_layer(scores, 0.5)["down.0"].flatten(1)
    assert not by_layer[0].any(), "a choice over the layer takes faint channels whole"
    assert (keep_per_channel(scores, 0.999)["down.0"].flatten(1).sum(1) == 1).all()


def test_a_global_choice_differs_from_layer_to_layer_and_leaves_each_its_part() -> None:
    net = kit.folded()
    with torch.no_grad():
        net.down[1].weight.mul_(1e-3)
    scores = magnitude_scores(net)
    assert int(keep_globally(scores, 0.4)["down.1"].sum()) == 1, "the faint layer goes"
    kept = keep_globally(scores, 0.4, keep_min=0.25)
    size = scores["down.1"].numel()
    assert int(kept["down.1"].sum()) == size // 4
    largest = scores["down.1"].flatten().topk(size // 4).values.min()
    assert scores["down.1"][kept["down.1"]].min() >= largest
    with pytest.raises(ValueError, match=r"at most 0\.7\d* of the weights"):
        keep_globally(scores, 0.9, keep_min=0.25)
    assert all(int(k.sum()) >= 1 for k in keep_per_layer(scores, 0.9999).values())


@pytest.mark.parametrize(("count", "group"), [(2, 4), (1, 4), (1, 2), (4, 8)])
@pytest.mark.parametrize("shape", [(6, 16, 3, 3), (5, 8, 1, 1), (4, 16)])
def test_of_every_group_of_input_channels_the_largest_stay(
    count: int, group: int, shape: tuple[int, ...]
) -> None:
    score = torch.rand(shape, generator=torch.Generator().manual_seed(0))
    kept = keep_pattern({"a": score}, count, group)["a"]
    assert kept.shape == score.shape
    groups = score.movedim(1, -1).reshape(-1, group)
    mask = kept.movedim(1, -1).reshape(-1, group)
    assert (mask.sum(1) == count).all()
    lowest_kept = groups.masked_fill(~mask, torch.inf).amin(1)
    assert (lowest_kept > groups.masked_fill(mask, -torch.inf).amax(1)).all()


def test_a_last_group_that_is_not_full_counts_as_filled_up_with_zeros() -> None:
    score = torch.tensor([[1.0, 2, 3, 4, 5, 6, 7]])
    kept = keep_pattern({"a": score}, 2, 4)["a"]
    assert kept.tolist() == [[False, False, True, True, False, True, True]]
    assert keep_pattern({"a": score[:, :6]}, 2, 4)["a"][0, 4:].all(), "two of two"


def test_thresholds_absolute_and_in_units_of_the_layer() -> None:
    net = kit.folded()
    with torch.no_grad():
        net.down[1].weight.mul_(100)
    scores = magnitude_scores(net)
    absolute = without(net, keep_above(scores, dict.fromkeys(scores, 0.05)))
    for name, weight in weights_of(absolute).items():
        assert float(weight[weight != 0].detach().abs().min()) >= 0.05
        gone = (weight == 0) & (scores[name] >= 0.05)
        assert not gone.any()
    assert zero_count(absolute.down[1]) < 20 < zero_count(absolute.down[0])
    relative = keep_above(scores, relative_limits(net, 0.5))
    parts = [float(k.float().mean()) for k in (relative["down.0"], relative["down.1"])]
    assert parts[0] == pytest.approx(parts[1], abs=0.05), "how loud a layer is does not matter"
    most = keep_above(scores, dict.fromkeys(scores, 1e9), keep_min=0.1)
    assert all(float(k.float().mean()) == pytest.approx(0.1, abs=0.01) for k in most.values())


def test_the_schedule_nears_its_end_first_fast_then_slowly() -> None:
    values = cubic(0.1, 0.7, 5)
    assert len(values) == 5
    assert values[-1] == 0.7
    steps = np.diff([0.1, *values])
    assert (steps > 0).all()
    assert (np.diff(steps) < 0).all()
    assert values[0] == pytest.approx(0.7 - 0.6 * 0.8**3)
    assert cubic(0.0, 0.5, 1) == [0.5]


# -- zeros stay


def test_masks_hold_through_training() -> None:
    net, batches = kit.folded(), photos()
    assert masks_of(net) is None
    sparse = without(net, keep_globally(magnitude_scores(net), 0.6))
    before = copy.deepcopy(sparse)
    masks = masks_of(sparse)
    assert masks is not None
    optimizer = torch.optim.Adam(sparse.parameters(), 0.01)
    for step in range(3):
        optimizer.zero_grad()
        torch.stack([level.square().mean() for level in sparse(batches[step])]).sum().backward()
        optimizer.step()
        assert zero_count(sparse) < zero_count(before), "without masks zeros are lost"
        masks.apply_(sparse)
        assert zero_count(sparse) == zero_count(before)
    for name, weight in weights_of(sparse).items():
        old = weights_of(before)[name]
        assert ((weight == 0) == (old == 0)).all()
        assert (weight != old)[old != 0].any(), "the others do learn"


def test_zeros_of_a_network_that_was_not_made_sparse_are_not_held() -> None:
    net = kit.folded()
    with torch.no_grad():
        net.stem.weight[3] = 0  # a dead channel, as published networks have
    assert masks_of(net) is None
    mark_sparse(net)
    masks = masks_of(net)
    assert masks is not None
    assert list(masks.kept) == ["stem"]
    assert masks_of(copy.deepcopy(net)) is not None
    channels = find_groups(net, kit.EXAMPLE)
    smaller = masks_of(cut(net, channels, [0, 1]))
    assert smaller is not None
    assert smaller.kept["stem"].shape[0] < masks.kept["stem"].shape[0]
    assert masks_of(apply_edits(kit.folded(), [{"kind": "sparsify"}], kit.EXAMPLE)) is not None


def test_refitting_mends_and_keeps_every_zero() -> None:
    net, batches = kit.folded(), photos()
    sparse = without(net, keep_per_layer(magnitude_scores(net), 0.5))
    fitted = copy.deepcopy(sparse)
    refit(fitted, net, {}, batches, progress=False, keep_zeros=True)
    for name, weight in weights_of(fitted).items():
        assert ((weight == 0) == (weights_of(sparse)[name] == 0)).all()
    assert harm(net, fitted, batches) < 0.5 * harm(net, sparse, batches)


class One(DetectorNet):
    """A single pointwise convolution."""

    net_name, spec_head, strides, num_classes = "one", "yolox", (1,), 1

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(6, 4, 1)

    def forward(self, x: Tensor) -> list[Tensor]:
        return [self.conv(x)]


def test_the_refit_is_the_least_squares_solution_over_the_weights_that_are_left() -> None:
    torch.manual_seed(0)
    net = One().eval()
    mixed = torch.randn(6, 6)  # inputs that go together, so that one can stand in for another
    x = torch.einsum("ij,bjhw->bihw", mixed, torch.randn(2, 6, 8, 8))
    sparse = without(net, keep_per_layer(magnitude_scores(net), 0.5))
    refit(sparse, net, {}, [x], ridge=0.0, samples_max=10**6, progress=False, keep_zeros=True)
    columns = torch.cat([x.permute(0, 2, 3, 1).reshape(-1, 6), torch.ones(128, 1)], 1)
    targets = net(x)[0].permute(0, 2, 3, 1).reshape(-1, 4).detach()
    for row in range(4):
        kept = [*(sparse.conv.weight[row, :, 0, 0] != 0).nonzero()[:, 0].tolist(), 6]
        best = torch.linalg.lstsq(columns[:, kept], targets[:, row : row + 1]).solution[:, 0]
        assert sparse.conv.bias is not None
        ours = torch.cat(
            [sparse.conv.weight[row, kept[:-1], 0, 0], sparse.conv.bias[row : row + 1]]
        )
        torch.testing.assert_close(ours.detach(), best, rtol=1e-3, atol=1e-3)


def test_rounding_feeds_no_error_into_zeros() -> None:
    random = np.random.default_rng(0)
    weight = random.normal(size=(8, 32))
    weight[random.random(weight.shape) < 0.5] = 0
    x = random.normal(size=(400, 6)) @ random.normal(size=(6, 32))  # inputs that go together
    x += 0.1 * random.normal(size=x.shape)
    scales = (np.abs(weight).max(1) / 20).astype(np.float32)  # coarse: large errors to feed on
    codes = compensated(weight, scales, x.T @ x / len(x))
    assert not codes[weight == 0].any()
    nearest = np.rint(weight / scales[:, None])
    assert (codes != nearest).mean() > 0.1, "errors are fed forward to the others"
    errors = [np.square(x @ (weight - c * scales[:, None]).T).mean() for c in (codes, nearest)]
    assert errors[0] < 0.5 * errors[1]


def test_zeros_win_bytes_only_where_files_are_compressed() -> None:
    net = kit.folded(32)
    sparse = without(net, keep_per_layer(magnitude_scores(net), 0.7))
    plain, codes = int8_weights(net), int8_weights(sparse)
    assert len(plain) == len(codes) == sum(w.numel() for w in weights_of(net).values())
    assert np.frombuffer(codes, np.int8).astype(bool).mean() <= 0.31, "zero is code 0"
    assert deflated(codes) < 0.6 * deflated(plain)
    assert keep_largest(torch.arange(4), 0).sum() == 0
