"""The losses: nothing for equal networks, something else else, and only where objects are."""

from __future__ import annotations

import runpy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from edgesight.compression.cut import cut
from edgesight.compression.distill import (
    Adapters,
    FeatureTap,
    bernoulli_divergence,
    feature_loss,
    output_loss,
    softmax_divergence,
)
from edgesight.compression.groups import find_groups
from edgesight.compression.levels import take_apart
from torch import Tensor

kit: Any = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("prune_kit.py"))))
NANODET: Any = SimpleNamespace(spec_head="nanodet_plus", num_classes=2)
YOLOX: Any = SimpleNamespace(spec_head="yolox", num_classes=2)
WIDTH = {"yolox": 7, "nanodet_plus": 2 + 32}


def maps(net: Any, seed: int, scale: float = 3.0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    width = WIDTH[net.spec_head]
    return [scale * torch.randn(2, width, s, s, generator=generator) for s in (8, 4)]


@pytest.mark.parametrize("temperature", [1.0, 4.0])
@pytest.mark.parametrize("net", [YOLOX, NANODET])
def test_nothing_for_equal_something_for_different(net: Any, temperature: float) -> None:
    same = output_loss(net, maps(net, 0), maps(net, 0), temperature)
    assert [float(term) for term in same] == [0.0, 0.0]
    other = output_loss(net, maps(net, 1), maps(net, 0), temperature)
    assert all(float(term) > 0 for term in other)


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_divergences_are_of_softened_probabilities(temperature: float) -> None:
    """Never of raw outputs: KL on log-softmax and log-sigmoid, times the temperature's square."""
    generator = torch.Generator().manual_seed(0)
    ours, goal = (3 * torch.randn(5, 4, generator=generator) for _ in range(2))
    kl = torch.distributions.kl_divergence
    choice = [torch.distributions.Categorical(logits=x / temperature) for x in (goal, ours)]
    wanted = kl(*choice) * temperature**2
    torch.testing.assert_close(softmax_divergence(ours, goal, 1, temperature), wanted)
    shifted = softmax_divergence(ours + 7, goal - 2, 1, temperature)
    torch.testing.assert_close(shifted, wanted, atol=1e-4, rtol=1e-4)
    question = [torch.distributions.Bernoulli(logits=x / temperature) for x in (goal, ours)]
    wanted = kl(*question) * temperature**2
    torch.testing.assert_close(bernoulli_divergence(ours, goal, temperature), wanted)


def test_a_temperature_keeps_the_size_of_gradients() -> None:
    """The square of the temperature makes up for the softening (arXiv 1503.02531, section 2.1)."""
    sizes = []
    for temperature in (20.0, 40.0):
        ours = torch.tensor([[0.3, -0.2, 0.1]], requires_grad=True)
        goal = torch.tensor([[0.5, 0.4, -0.9]])
        softmax_divergence(ours, goal, 1, temperature).sum().backward()  # type: ignore[no-untyped-call]
        assert ours.grad is not None
        sizes.append(float(ours.grad.norm()))
    assert sizes[1] == pytest.approx(sizes[0], rel=0.05)


@pytest.mark.parametrize("net", [YOLOX, NANODET])
@pytest.mark.parametrize("term", [0, 1])
def test_the_gradient_leads_to_the_teacher(net: Any, term: int) -> None:
    student = [m.requires_grad_() for m in maps(net, 1)]
    before = output_loss(net, student, maps(net, 0))[term]
    before.backward()  # type: ignore[no-untyped-call]
    steps = [m.detach() - 0.1 * m.grad for m in student if m.grad is not None]
    assert len(steps) == 2
    assert float(output_loss(net, steps, maps(net, 0))[term]) < float(before.detach())


def test_extreme_logits_stay_finite() -> None:
    logits = torch.tensor([-200.0, -30, 0, 30, 200])
    table = bernoulli_divergence(logits[:, None], logits[None])
    assert torch.isfinite(table).all()
    assert table.min() > -1e-9
    assert (table.diagonal() == 0).all()
    wanted = torch.distributions.kl_divergence(
        torch.distributions.Bernoulli(0.3), torch.distributions.Bernoulli(0.8)
    )
    found = bernoulli_divergence(torch.tensor(0.8).logit(), torch.tensor(0.3).logit())
    torch.testing.assert_close(found, wanted)


def at_one_cell(net: Any, sure: float) -> list[Tensor]:
    """A map of background with one cell whose first class has this logit."""
    level = torch.full((1, WIDTH[net.spec_head], 4, 4), -8.0)
    if net.spec_head == "yolox":
        level[:, :4] = 0
        level[:, 4, 1, 2] = 8
        level[:, 5, 1, 2] = sure
    else:
        level[:, 2:] = 0
        level[:, 0, 1, 2] = sure
    return [level]


@pytest.mark.parametrize("net", [YOLOX, NANODET])
def test_boxes_count_where_the_teacher_is_sure(net: Any) -> None:
    box = 0 if net.spec_head == "yolox" else 2
    teacher = at_one_cell(net, 4.0)
    errors = []
    for row, column in ((1, 2), (3, 3)):
        student = [teacher[0].clone()]
        student[0][:, box, row, column] += 1
        errors.append(float(output_loss(net, student, teacher)[1]))
    assert errors[0] > 1e3 * errors[1]


@pytest.mark.parametrize("net", [YOLOX, NANODET])
def test_scores_count_where_either_is_sure(net: Any) -> None:
    nothing, something = at_one_cell(net, -8.0), at_one_cell(net, 4.0)
    missed = float(output_loss(net, nothing, something)[0])
    invented = float(output_loss(net, something, nothing)[0])
    assert missed > 0.5
    assert invented > 0.5


def test_confidence_is_what_the_decoder_shows() -> None:
    level = maps(YOLOX, 0)[0]
    score = level.sigmoid()
    wanted = score[:, 4:5] * score[:, 5:].amax(1, keepdim=True)
    torch.testing.assert_close(take_apart(YOLOX, level).confidence, wanted)
    level = maps(NANODET, 0)[0]
    parts = take_apart(NANODET, level)
    assert parts.bins == 8
    torch.testing.assert_close(parts.confidence, level[:, :2].sigmoid().amax(1, keepdim=True))


def test_a_shift_of_all_bins_is_no_difference() -> None:
    """Box bins are compared after their softmax, never raw."""
    teacher = maps(NANODET, 0)
    student = [m.clone() for m in teacher]
    for level in student:
        level[:, 2:10] += 5
    assert float(output_loss(NANODET, student, teacher)[1]) == pytest.approx(0, abs=1e-6)


def test_an_unknown_head_is_refused() -> None:
    net: Any = SimpleNamespace(spec_head="ssdlite", num_classes=2)
    with pytest.raises(
        ValueError, match="expected a yolox, nanodet or classify head, found 'ssdlite'"
    ):
        take_apart(net, torch.zeros(1, 7, 2, 2))


def test_features_of_equal_networks_are_no_loss() -> None:
    net, twin = kit.folded(), kit.folded()
    mine, theirs = FeatureTap(net), FeatureTap(twin)
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        net(x), twin(x)
    assert float(feature_loss(mine.take(), theirs.take())) == 0
    with torch.no_grad():
        twin.stem.weight.mul_(1.1)
        net(x), twin(x)
    assert float(feature_loss(mine.take(), theirs.take())) > 0


def test_features_are_compared_in_the_rows_that_are_left() -> None:
    dense = kit.folded()
    channels = find_groups(dense, kit.EXAMPLE)
    gone = [n for n, g in enumerate(channels.groups) if g.makers[0][0] == "stem"][:4]
    small = cut(dense, channels, gone)
    lost = {channels.groups[n].makers[0][1] for n in gone}
    rows = {"stem": torch.tensor([i for i in range(16) if i not in lost])}
    x = torch.randn(2, 3, 64, 64)
    for given in (rows, None):
        mine, theirs = FeatureTap(small), FeatureTap(dense, given)
        with torch.no_grad():
            small(x), dense(x)
        ours, goal = mine.take(), theirs.take()
        if given:
            torch.testing.assert_close(ours["stem"], goal["stem"])
        else:  # of another shape: left out, not compared with the wrong rows
            assert ours["stem"].shape != goal["stem"].shape
            assert float(feature_loss({"stem": ours["stem"]}, {"stem": goal["stem"]})) == 0
        mine.close(), theirs.close()
    with torch.no_grad():
        small(x)
    assert mine.take() == {}


def test_features_of_another_width_are_learned_through_an_adapter() -> None:
    generator = torch.Generator().manual_seed(0)
    wide = torch.randn(64, 12, generator=generator)
    basis = torch.randn(12, 6, generator=generator)
    student = {"a": (wide @ basis)[..., None, None], "b": torch.zeros(1)}
    teacher = {"a": wide[..., None, None]}
    assert float(feature_loss(student, teacher)) == 0, "other shapes cannot be compared"
    adapters = Adapters({"a": (6, 12)}, seed=1)
    optimizer = torch.optim.Adam(adapters.parameters(), 0.03)
    losses = []
    for _ in range(200):
        loss = feature_loss(adapters(student), teacher)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.6 < losses[0]  # six of twelve directions can be had
    again = Adapters({"a": (6, 12)}, seed=1)
    first = [Adapters({"a": (6, 12)}, seed=1).convs[0].weight, again.convs[0].weight]
    assert torch.equal(*first), "the first weights depend on the seed alone"
    assert adapters(student)["b"] is student["b"]
