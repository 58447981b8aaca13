"""Low-rank factorisation: the weights of the chain that comes nearest to a dense layer.

What is kept is not what is large in the weights but what is large in the *outputs*: given the
covariance of a layer's inputs, the error is that of the outputs on photos (arXiv 1505.06798,
section 3.1). Factors on the input side are found in the space whitened by the covariance of the
input channels, those on the output side then are the least-squares best under the full covariance;
for ``svd`` the result is the optimum.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from .chain import Layer, Matrix

RIDGE: Final = 1e-6
"""Added to covariances, relative to their mean diagonal: what no photo showed still counts."""
TUCKER_ROUNDS: Final = 2
CP_ROUNDS_MAX: Final = 200
CP_ENOUGH: Final = 1e-6
"""A round that mends less than this part is the last."""
CP_STARTS: Final = 3


@dataclass(frozen=True)
class Subject:
    """A layer's weights and what its errors count.

    Attributes:
        weight: float64 ``(out, in, kh, kw)``.
        root: Lower triangle ``L`` with ``L @ L.T`` the covariance of the layer's inputs, float64
            ``(in * kh * kw, in * kh * kw)``; None if all inputs count alike.
        importance: What a square error in each output counts, float64 ``(out,)``.
    """

    weight: Matrix
    root: Matrix | None
    importance: Matrix

    @property
    def scaled(self) -> Matrix:
        """Weights by what they count, ``(out, in * kh * kw)``."""
        return self.weight.reshape(len(self.weight), -1) * self._scale

    @property
    def _scale(self) -> Matrix:
        root: Matrix = np.sqrt(self.importance)[:, None]
        return root

    def seen(self, rows: Matrix) -> Matrix:
        """Returns rows over the inputs in units of what the inputs really do."""
        return rows if self.root is None else rows @ self.root

    def unscaled(self, last: Matrix) -> Matrix:
        """Returns rows per output in the layer's own units."""
        return last / self._scale

    def energy(self) -> float:
        """Returns the variance of the outputs, by what they count."""
        return float(np.square(self.seen(self.scaled)).sum())

    def error(self, weights: Sequence[Matrix], how: str) -> float:
        """Returns what a chain does wrong, in the units of ``energy``."""
        made = recompose(weights, how).reshape(len(self.weight), -1) * self._scale
        return float(np.square(self.seen(self.scaled - made)).sum())

    def along(self, axes: int) -> Matrix | None:
        """Returns the root of the covariance along the first axes: channel, row, column.

        What varies along the others is averaged.
        """
        if self.root is None:
            return None
        kept = int(np.prod(self.weight.shape[1 : 1 + axes]))
        rows = self.root.reshape(kept, -1)
        return root_of(rows @ rows.T)


def subject_of(
    layer: Layer, covariance: Matrix | None = None, importance: Matrix | None = None
) -> Subject:
    """Returns a layer as the mathematics needs it.

    Args:
        layer: The layer.
        covariance: Of its inputs, float64 ``(in * kh * kw, in * kh * kw)``; None: alike.
        importance: What a square error in each output counts, float64 ``(out,)``; None: alike.
    """
    stored: Matrix = layer.weight.detach().cpu().double().numpy()
    weight: Matrix = stored.reshape(*stored.shape, *[1] * (4 - stored.ndim))
    if importance is None:
        importance = np.ones(len(weight))
    # An output that has no effect at all still has to be computed somehow.
    floor = 1e-9 * max(float(importance.max()), 1e-30)
    root = None if covariance is None else root_of(covariance)
    return Subject(weight, root, np.fmax(importance, floor))


def root_of(covariance: Matrix) -> Matrix:
    """Returns the lower triangle whose square a covariance is; slightly damped.

    Raises:
        ValueError: It holds values that are not finite.
    """
    if not np.isfinite(covariance).all():
        message = "expected inputs with finite covariance, found some that are not finite"
        raise ValueError(message)
    size = len(covariance)
    damping = RIDGE * max(float(np.trace(covariance)) / size, 1e-30)
    while True:  # sums in single precision may leave it a little negative
        try:
            root = np.linalg.cholesky(covariance + damping * np.eye(size))
        except np.linalg.LinAlgError:
            damping *= 10
        else:
            return np.asarray(root, np.float64)


def decompose(subject: Subject, how: str, ranks: Sequence[int]) -> list[Matrix]:
    """Returns the weights of the chain that comes nearest to a layer.

    Args:
        subject: The layer.
        how: Out of ``HOWS``.
        ranks: As for ``stand_in``.

    Returns:
        float64, one per layer of the chain: ``(out, in / groups, kh, kw)``.
    """
    if how == "svd":
        return _svd(subject, ranks[0])
    if how == "spatial":
        return _spatial(subject, ranks[0])
    if how == "tucker":
        return _tucker(subject, ranks[0], ranks[1])
    return _cp(subject, ranks[0])


def recompose(weights: Sequence[Matrix], how: str) -> Matrix:
    """Returns the weight ``(out, in, kh, kw)`` of the one convolution that a chain amounts to."""
    made: Matrix
    first, last = weights[0][:, :, 0, 0], weights[-1][:, :, 0, 0]
    if how == "svd":
        made = np.einsum("rcij,or->ocij", weights[0], last)
    elif how == "spatial":
        made = np.einsum("rci,orj->ocij", weights[0][..., 0], weights[1][:, :, 0])
    elif how == "tucker":
        made = np.einsum("sc,tsij,ot->ocij", first, weights[1], last, optimize=True)
    else:
        down, across = weights[1][:, 0, :, 0], weights[2][:, 0, 0]
        made = np.einsum("rc,ri,rj,or->ocij", first, down, across, last, optimize=True)
    return made


def spectrum(matrix: Matrix) -> Matrix:
    """Returns the energy of each singular direction, largest first."""
    values: Matrix = np.square(np.linalg.svd(matrix, compute_uv=False))
    return values


def input_spectrum(subject: Subject) -> Matrix:
    """Returns the energy of each direction of the input channels, largest first."""
    return spectrum(_seen_by(_by_channel(subject.scaled, subject), subject.along(1)))


def output_spectrum(subject: Subject) -> Matrix:
    """Returns the energy of each direction of the outputs, largest first."""
    return spectrum(subject.seen(subject.scaled))


def _svd(subject: Subject, rank: int) -> list[Matrix]:
    """The best there is: the outputs' principal directions."""
    inner, last = _split(subject.scaled, subject.seen(subject.scaled), rank)
    first = inner.reshape(rank, *subject.weight.shape[1:])
    return [first, subject.unscaled(last)[:, :, None, None]]


def _split(rows: Matrix, seen: Matrix, rank: int) -> tuple[Matrix, Matrix]:
    """Returns ``(rank, inputs)`` and ``(outputs, rank)`` whose product is nearest to ``rows``."""
    found = np.linalg.svd(seen, full_matrices=False)[0][:, :rank]
    directions = np.zeros((len(rows), rank))  # with fewer inputs than ranks some add nothing
    directions[:, : found.shape[1]] = found
    return directions.T @ rows, directions


def _best_last(subject: Subject, features: Matrix) -> Matrix:
    """Returns ``(out, features)``, in scaled units, that comes nearest to the layer's outputs.

    Args:
        subject: The layer.
        features: What is left to combine, as rows over the layer's inputs.
    """
    wanted = subject.seen(subject.scaled)
    solution = np.linalg.lstsq(subject.seen(features).T, wanted.T, rcond=1e-10)[0]
    return np.asarray(solution.T, np.float64)


def _spatial(subject: Subject, rank: int) -> list[Matrix]:
    outputs, inputs, kh, kw = subject.weight.shape
    taps = subject.scaled.reshape(outputs, inputs, kh, kw).transpose(0, 3, 1, 2)
    columns = taps.reshape(outputs * kw, inputs * kh)
    root = subject.along(2)
    first, _ = _split(columns, columns if root is None else columns @ root, rank)
    # Every vertical filter, at each of the columns that the horizontal one looks at.
    features = np.einsum("rci,jk->rjcik", first.reshape(rank, inputs, kh), np.eye(kw))
    last = subject.unscaled(_best_last(subject, features.reshape(rank * kw, -1)))
    return [first.reshape(rank, inputs, kh, 1), last.reshape(outputs, rank, 1, kw)]


def _by_channel(rows: Matrix, subject: Subject) -> Matrix:
    """Returns ``(rows * taps, in)`` of ``(rows, in * taps)``."""
    inputs = subject.weight.shape[1]
    return rows.reshape(len(rows), inputs, -1).transpose(0, 2, 1).reshape(-1, inputs)


def _seen_by(rows: Matrix, root: Matrix | None) -> Matrix:
    return rows if root is None else rows @ root


def _tucker(subject: Subject, rank_in: int, rank_out: int) -> list[Matrix]:
    """Higher-order orthogonal iteration, in the whitened space on the side of the inputs."""
    kh, kw = subject.weight.shape[2:]
    root = subject.along(1)
    rows = subject.scaled
    for _ in range(TUCKER_ROUNDS):
        slices = _by_channel(rows, subject)
        first, _ = _split(slices, _seen_by(slices, root), rank_in)
        features = np.einsum("sc,tu->stcu", first, np.eye(kh * kw)).reshape(rank_in * kh * kw, -1)
        whole = _best_last(subject, features)
        core, last = _split(whole, whole @ subject.seen(features), rank_out)
        rows = last.T @ subject.scaled  # what of the layer the outputs have room for
    return [
        first[:, :, None, None],
        core.reshape(rank_out, rank_in, kh, kw),
        subject.unscaled(last)[:, :, None, None],
    ]


def _cp(subject: Subject, rank: int) -> list[Matrix]:
    """Alternating least squares in the whitened space, then the best last layer."""
    outputs, inputs, kh, kw = subject.weight.shape
    root = subject.along(1)
    tensor = _seen_by(_by_channel(subject.scaled, subject), root)
    tensor = tensor.reshape(outputs, kh, kw, inputs).transpose(0, 3, 1, 2)
    best: list[Matrix] = []
    least = np.inf
    for start in range(CP_STARTS):
        _, white, down, across = parallel_factors(tensor, rank, start)
        first = white if root is None else np.linalg.solve(root.T, white)
        features = np.einsum("cr,ir,jr->rcij", first, down, across).reshape(rank, -1)
        last = subject.unscaled(_best_last(subject, features))
        found = [
            np.ascontiguousarray(first.T)[:, :, None, None],
            np.ascontiguousarray(down.T)[:, None, :, None],
            np.ascontiguousarray(across.T)[:, None, None, :],
            last[:, :, None, None],
        ]
        error = subject.error(found, "cp")
        if error < least:
            best, least = found, error
    return best


def parallel_factors(tensor: Matrix, rank: int, start: int) -> list[Matrix]:
    """Returns the canonical polyadic decomposition of a tensor by alternating least squares.

    Args:
        tensor: float64 ``(out, in, kh, kw)``.
        rank: Terms.
        start: 0: from the singular vectors of each tap, exact where the rank is large enough;
            else the seed of a random start.

    Returns:
        One matrix ``(size, rank)`` per axis; the columns of all but the first have length one.
    """
    factors = _taps_start(tensor, rank) if start == 0 else _random_start(tensor, rank, start)
    outputs, inputs, kh, kw = tensor.shape
    flat = tensor.reshape(outputs, -1)
    total = float(np.square(tensor).sum())
    before = np.inf
    for _ in range(CP_ROUNDS_MAX):
        # What the other three axes see of the outputs is the same for all of them.
        seen = (flat.T @ factors[0]).reshape(inputs, kh, kw, rank)
        by_cell = np.einsum("cijr,cr->ijr", seen, factors[1])
        factors[3] = _unit(_solve(factors, 3, np.einsum("ijr,ir->jr", by_cell, factors[2])))
        factors[2] = _unit(_solve(factors, 2, np.einsum("ijr,jr->ir", by_cell, factors[3])))
        cells = factors[2][:, None] * factors[3][None]
        factors[1] = _unit(_solve(factors, 1, np.einsum("cijr,ijr->cr", seen, cells)))
        terms = (factors[1][:, None, None] * cells).reshape(-1, rank)
        right = flat @ terms
        factors[0] = _solve(factors, 0, right)
        made = float(np.prod([f.T @ f for f in factors], axis=0).sum())
        error = max(total + made - 2 * float((right * factors[0]).sum()), 0.0)
        if before - error <= CP_ENOUGH * total:
            break
        before = error
    return factors


def _solve(factors: Sequence[Matrix], axis: int, right: Matrix) -> Matrix:
    """Returns the best factor of one axis, given the others."""
    gram = np.prod([f.T @ f for a, f in enumerate(factors) if a != axis], axis=0)
    damping = 1e-10 * max(float(np.trace(gram)) / len(gram), 1e-30)
    solution = np.linalg.solve(gram + damping * np.eye(len(gram)), right.T)
    return np.asarray(solution.T, np.float64)


def _unit(factor: Matrix) -> Matrix:
    """Returns a factor whose columns have length one."""
    lengths: Matrix = np.sqrt(np.square(factor).sum(0))
    scaled: Matrix = factor / np.maximum(lengths, 1e-30)
    return scaled


def _taps_start(tensor: Matrix, rank: int) -> list[Matrix]:
    """The largest singular pairs of all taps, each a term of its own."""
    kh, kw = tensor.shape[2:]
    terms: list[tuple[float, Matrix, Matrix, int, int]] = []
    for i in range(kh):
        for j in range(kw):
            left, values, right = np.linalg.svd(tensor[:, :, i, j], full_matrices=False)
            terms += [(v, left[:, k] * v, right[k], i, j) for k, v in enumerate(values)]
    chosen = sorted(terms, key=lambda t: -t[0])[:rank]
    return [
        np.stack([t[1] for t in chosen], 1),
        np.stack([t[2] for t in chosen], 1),
        np.stack([np.eye(kh)[t[3]] for t in chosen], 1),
        np.stack([np.eye(kw)[t[4]] for t in chosen], 1),
    ]


def _random_start(tensor: Matrix, rank: int, seed: int) -> list[Matrix]:
    random = np.random.default_rng(seed)
    return [random.normal(size=(size, rank)) for size in tensor.shape]
