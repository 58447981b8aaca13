"""Chains that stand for layers: exact where they can be, nearest on what really comes in."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from edgesight.compression import lowrank
from edgesight.compression.chain import (
    HOWS,
    as_factor,
    chain_of,
    full_ranks,
    put,
    stand_in,
    whole_name,
    with_chains,
)
from edgesight.compression.lowrank import Matrix, Subject, decompose, recompose, root_of, subject_of
from edgesight.compression.lowrank_choice import price
from edgesight.compression.moments import collect_moments
from edgesight.compression.prune import conv_costs, macs_of
from torch import Tensor, nn

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel"),
]
RANKS = {"svd": (4,), "spatial": (4,), "tucker": (4, 5), "cp": (4,)}
SHAPES: list[tuple[tuple[Any, ...], dict[str, Any]]] = [
    ((6, 9, 3), {"stride": 2, "padding": 1}),
    ((6, 9, (3, 5)), {"stride": (1, 2), "padding": (2, 0), "dilation": (2, 1), "bias": False}),
    ((9, 6, 3), {"padding": "same", "dilation": 2}),
    ((5, 7, (2, 4)), {"padding": "same"}),  # torch pads even kernels more on one side
    ((5, 7, (1, 3)), {"padding": "valid"}),
]


def covariance(size: int, seed: int = 0, least: float = 1e-4) -> Matrix:
    """Inputs that vary much along some directions and hardly along others."""
    axes = np.linalg.qr(np.random.default_rng(seed).normal(size=(size, size)))[0]
    result: Matrix = axes @ np.diag(np.geomspace(1, least, size)) @ axes.T
    return result


def weights_of(how: str, seed: int = 0) -> list[Matrix]:
    """The factors of a 3x3 convolution from 12 to 10 channels."""
    random = np.random.default_rng(seed)
    (a, *b), r = RANKS[how], random.normal
    if how == "svd":
        return [r(size=(a, 12, 3, 3)), r(size=(10, a, 1, 1))]
    if how == "spatial":
        return [r(size=(a, 12, 3, 1)), r(size=(10, a, 1, 3))]
    if how == "tucker":
        return [r(size=(a, 12, 1, 1)), r(size=(b[0], a, 3, 3)), r(size=(10, b[0], 1, 1))]
    ends = r(size=(a, 12, 1, 1)), r(size=(10, a, 1, 1))
    return [ends[0], r(size=(a, 1, 3, 1)), r(size=(a, 1, 1, 3)), ends[1]]


def planted(how: str) -> nn.Conv2d:
    conv = nn.Conv2d(12, 10, 3, padding=1).double()
    conv.weight = nn.Parameter(torch.from_numpy(recompose(weights_of(how), how)))
    return conv


def gap(a: nn.Module, b: nn.Module, x: Tensor) -> float:
    with torch.no_grad():
        return float((a(x) - b(x)).abs().max())


@pytest.mark.parametrize("aware", [False, True])
@pytest.mark.parametrize("how", HOWS)
@pytest.mark.parametrize(("shape", "options"), SHAPES)
def test_exact_at_full_rank(
    shape: tuple[Any, ...], options: dict[str, Any], how: str, aware: bool
) -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(*shape, **options)
    counts = np.linspace(0.1, 3, conv.out_channels)
    known = (covariance(conv.weight[0].numel()), counts) if aware else ()
    weights = decompose(subject_of(conv, *known), how, ranks := full_ranks(conv, how))
    chain = stand_in(conv, how, ranks, weights)
    x = torch.randn(2, conv.in_channels, 17, 19)
    assert gap(conv, chain, x) < 1e-4
    assert conv(x).std() > 0.1, "the test would not notice"
    conv.zero_grad()


@pytest.mark.parametrize("aware", [False, True])
@pytest.mark.parametrize("layer", [nn.Conv2d(9, 6, 1, 2), nn.Conv2d(6, 9, 1), nn.Linear(7, 5)])
def test_points_and_linear_layers_are_exact_too(layer: nn.Conv2d | nn.Linear, aware: bool) -> None:
    inputs = layer.weight.shape[1]
    # Half of the inputs never vary on the photos: they must work all the same.
    varies = np.diag([1.0] * (inputs // 2) + [0.0] * (inputs - inputs // 2)) if aware else None
    ranks = full_ranks(layer, "svd")
    chain = stand_in(layer, "svd", ranks, decompose(subject_of(layer, varies), "svd", ranks))
    x = torch.randn(3, inputs) if isinstance(layer, nn.Linear) else torch.randn(3, inputs, 8, 8)
    assert gap(layer, chain, x) < 1e-4
    assert {type(part) for part in chain} == {type(layer)}


@pytest.mark.parametrize("how", HOWS)
def test_a_low_rank_that_is_there_is_found(how: str) -> None:
    conv = planted(how)
    ranks = RANKS[how]
    subject = subject_of(conv)
    chain = stand_in(conv, how, ranks, decompose(subject, how, ranks))
    x = torch.randn(1, 12, 9, 9, dtype=torch.double)
    assert gap(conv, chain, x) < 1e-3 * float(conv(x).detach().abs().max())
    fewer = tuple(r - 1 for r in ranks)
    assert subject.error(decompose(subject, how, fewer), how) > 1e-3 * subject.energy()


@pytest.mark.parametrize("how", HOWS)
def test_what_really_comes_in_decides(how: str) -> None:
    """On inputs that vary along few directions, against factors that do not know of them."""
    torch.manual_seed(1)
    conv = nn.Conv2d(12, 10, 3, padding=0)
    mixing = torch.linalg.qr(torch.randn(12, 12))[0] * torch.logspace(0, -2, 12)
    x = torch.einsum("cd,bdhw->bchw", mixing, torch.randn(4, 12, 40, 40))
    patches = nn.functional.unfold(x[:2], 3).transpose(1, 2).flatten(0, 1).double().numpy()
    known = subject_of(conv, np.cov(patches.T))
    ranks = RANKS[how]
    plain = stand_in(conv, how, ranks, decompose(subject_of(conv), how, ranks))
    aware = stand_in(conv, how, ranks, decompose(known, how, ranks))
    with torch.no_grad():
        wanted, unseen = conv(x[2:]), x[2:]
        blind_error = float((plain(unseen) - wanted).square().mean())
        error = float((aware(unseen) - wanted).square().mean())
    print(f"{how}: plain {blind_error:.2e}, data-aware {error:.2e}")
    assert error < 0.8 * blind_error


def test_svd_is_the_best_there_is() -> None:
    """No other chain of this rank has a smaller error: not even those next to it."""
    torch.manual_seed(0)
    subject = subject_of(nn.Conv2d(8, 6, 1), covariance(8), np.geomspace(1, 30, 6))
    weights = decompose(subject, "svd", (3,))
    least = subject.error(weights, "svd")
    assert least == pytest.approx(float(np.sort(_spectrum(subject))[:-3].sum()), rel=1e-6)
    random = np.random.default_rng(0)
    for _ in range(50):
        near = [w + 0.01 * random.normal(size=w.shape) for w in weights]
        assert subject.error(near, "svd") > least


def _spectrum(subject: Subject) -> Matrix:
    values: Matrix = np.linalg.svd(subject.seen(subject.scaled), compute_uv=False) ** 2
    return values


def test_tuckers_sides_are_found_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """Against each side by itself: the inputs have to know what the outputs have room for."""
    torch.manual_seed(0)
    subject = subject_of(nn.Conv2d(24, 20, 3))
    together = subject.error(decompose(subject, "tucker", (8, 4)), "tucker")
    monkeypatch.setattr(lowrank, "TUCKER_ROUNDS", 1)
    apart = subject.error(decompose(subject, "tucker", (8, 4)), "tucker")
    assert together < 0.98 * apart


def test_outputs_that_count_are_served_first() -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(8, 6, 1)
    counts = np.ones(6)
    counts[2] = 1e6
    made = recompose(decompose(subject_of(conv, None, counts), "svd", (1,)), "svd")
    errors = np.square(made - conv.weight.detach().numpy()).sum((1, 2, 3))
    assert errors[2] < 1e-6
    assert np.delete(errors, 2).min() > 1e-3


def test_the_bias_takes_what_it_is_given() -> None:
    for bias in (True, False):
        conv = nn.Conv2d(4, 6, 1, bias=bias)
        chain = stand_in(conv, "svd", (4,), decompose(subject_of(conv), "svd", (4,)), np.ones(6))
        x = torch.randn(1, 4, 3, 3)
        with torch.no_grad():
            torch.testing.assert_close(chain(x), conv(x) + 1)


@pytest.mark.parametrize("how", HOWS)
@pytest.mark.parametrize(("shape", "options"), SHAPES)
def test_a_chain_costs_what_its_layers_cost(
    shape: tuple[Any, ...], options: dict[str, Any], how: str
) -> None:
    conv = nn.Conv2d(*shape, **options)
    x = torch.zeros(1, conv.in_channels, 17, 20)
    ranks = tuple(min(3, r) for r in full_ranks(conv, how))
    counted = conv_costs(stand_in(conv, how, ranks), x)
    assert price(chain_of(conv, how, ranks), [(17, 20)], macs_of) == sum(
        c.macs for c in counted.values()
    )
    (alone,) = conv_costs(nn.Sequential(conv), x).values()
    assert price([as_factor(conv)], [(17, 20)], macs_of) == alone.macs


@pytest.mark.parametrize(
    ("layer", "how", "ranks"),
    [
        (nn.Conv2d(4, 6, 3), "svd", (0,)),
        (nn.Conv2d(4, 6, 3), "svd", (7,)),
        (nn.Conv2d(4, 6, 3), "svd", (2, 2)),
        (nn.Conv2d(4, 6, 3), "svd", (2.0,)),
        (nn.Conv2d(4, 6, 3), "tucker", (2,)),
        (nn.Conv2d(4, 6, 3), "cp", (10**9,)),
        (nn.Conv2d(4, 6, 3), "qr", (2,)),
        (nn.Conv2d(4, 6, 1), "spatial", (2,)),
        (nn.Linear(4, 6), "tucker", (2, 2)),
        (nn.Linear(4, 6), "svd", (5,)),
        (nn.Conv2d(4, 4, 3, groups=4), "svd", (1,)),
        (nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"), "svd", (2,)),
    ],
)
def test_what_cannot_be_is_refused(layer: Any, how: str, ranks: tuple[Any, ...]) -> None:
    with pytest.raises(ValueError, match="expected") as caught:
        stand_in(layer, how, ranks)
    assert "\n" not in str(caught.value)


def test_a_plan_is_carried_out_on_a_copy() -> None:
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3))
    small = with_chains(net, {"2": {"how": "cp", "ranks": [2]}})
    assert isinstance(net[2], nn.Conv2d)
    assert [n for n, m in small.named_modules() if isinstance(m, nn.Conv2d)] == [
        "0", "2.factor0", "2.factor1", "2.factor2", "2.whole",
    ]  # fmt: skip
    assert not small.get_submodule("2.whole").weight.any()
    for name in ("1", "3"):
        with pytest.raises(ValueError, match=f"called {name}"):
            with_chains(net, {name: {"how": "svd", "ranks": [2]}})


def test_the_last_factor_answers_for_the_layer() -> None:
    assert whole_name("a.conv.whole") == "a.conv"
    assert whole_name("a.conv.whole.whole") == "a.conv"
    assert whole_name("a.conv.factor0") == "a.conv.factor0"
    assert whole_name("a.wholesome") == "a.wholesome"
    net = nn.Sequential(nn.Conv2d(3, 8, 3))
    put(net, "0", stand_in(net[0], "svd", (2,)))  # type: ignore[arg-type]
    assert [whole_name(n) for n, _ in net.named_modules()][-1] == "0"


class Twice(nn.Module):
    """A strided convolution, a linear layer on its map, and one layer that is called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.again = nn.Conv2d(3, 4, 3, 2, 1), nn.Conv2d(4, 4, 1)
        self.line = nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.again(self.again(self.conv(x)))
        result: Tensor = self.line(x.permute(0, 2, 3, 1))
        return result


def test_moments_are_those_of_what_layers_read() -> None:
    torch.manual_seed(0)
    net = Twice().eval()
    # Far from zero, as pictures are that nobody normalised: single precision must not eat it.
    batches = [1000 + torch.randn(2, 3, 16, 16) for _ in range(3)]
    found = collect_moments(net, batches)
    with torch.no_grad():
        first = [net.conv(b) for b in batches]
        second = [net.again(x) for x in first]
        third = [net.again(x) for x in second]
    patches = [nn.functional.unfold(b, 3, padding=1, stride=2).transpose(1, 2) for b in batches]
    read = {
        "conv": torch.cat([p.flatten(0, 1) for p in patches]),
        "again": torch.cat([x.permute(0, 2, 3, 1).flatten(0, 2) for x in first + second]),
        "line": torch.cat([x.permute(0, 2, 3, 1).flatten(0, 2) for x in third]),
    }
    assert found.keys() == read.keys()
    for name, rows in read.items():
        values = rows.double().numpy()
        moments = found[name]
        np.testing.assert_allclose(moments.mean, values.mean(0), rtol=1e-4, atol=1e-3)
        wanted = np.cov(values.T, bias=True)
        np.testing.assert_allclose(moments.covariance, wanted, atol=1e-3 * wanted.max())
        weight = net.get_submodule(name).weight.detach().flatten(1).double().numpy()
        np.testing.assert_allclose(
            moments.variance, (values @ weight.T).var(0), rtol=1e-2, atol=1e-4
        )
    few = collect_moments(net, batches, samples_max=7)
    assert not np.allclose(few["line"].mean, found["line"].mean, rtol=1e-3)


def test_a_covariance_that_rounding_spoilt_still_has_a_root() -> None:
    spoilt = covariance(6, least=1e-9)
    spoilt -= 3e-5 * np.eye(6)
    assert np.linalg.eigvalsh(spoilt)[0] < 0
    root = root_of(spoilt)
    np.testing.assert_allclose(root @ root.T, spoilt, atol=1e-3)
    with pytest.raises(ValueError, match="not finite"):
        root_of(np.full((2, 2), np.nan))
