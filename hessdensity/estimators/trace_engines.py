"""Engines of trace estimates: products with random vectors, and the small matrices they leave.

Each asks for blocks, takes their products, and gives an estimate of the trace at any moment after
the first product. A step saves the product itself, from which everything else is computed again.
"""

from __future__ import annotations

from typing import Protocol

import jax
import numpy as np

from hessdensity.errors import NOT_FINITE, NonFiniteProductError
from hessdensity.krylov.engine import Engine, Step
from hessdensity.krylov.lanczos import ASYMMETRY
from hessdensity.vectors import trees
from hessdensity.vectors.basis import Basis, coefficients
from hessdensity.vectors.orthogonalize import orthonormalize
from hessdensity.vectors.random import random_block
from hessdensity.vectors.trees import Block, Vector

from . import exchangeable

_SHIFT = 4  # rounding units by which a positive semi-definite operator is shifted
_REPLACEMENTS = 2**31  # the number of the first random vector that stands for a missing direction


class TraceEngine(Engine, Protocol):
    """An engine that estimates a trace from what it has."""

    def estimate(self) -> tuple[float, float, float]:
        """(value, standard error, degrees of freedom of the error)."""


class _Products:
    """What the engines share: blocks in order, and products that are finite."""

    def __init__(self, like: Vector, block_size: int) -> None:
        self._like, self._block_size = like, block_size
        self._dimension, self._epsilon = trees.size(like), trees.epsilon(like)
        self.num_done = 0

    def take(self, product: Block) -> Step:
        """Take the product of the block that was asked for."""
        if not trees.all_finite(product):
            raise NonFiniteProductError(self.num_done, NOT_FINITE)
        self._use(product)
        self.num_done += 1
        return Step(product, {})

    def replay(self, step: Step) -> None:
        """`take` of a saved product."""
        self.take(step.vectors)

    def _use(self, product: Block) -> None:
        raise NotImplementedError

    def _test_vectors(self, key: jax.Array, first: int, count: int) -> Block:
        """Test vectors from ``first`` on, of ``count`` in all."""
        return random_block(key, first, min(self._block_size, count - first), self._like)


class ExactEngine(_Products):
    """The whole matrix, from products with all unit vectors: cheaper, for few dimensions."""

    def __init__(self, like: Vector, block_size: int, semidefinite: bool) -> None:
        super().__init__(like, block_size)
        self._semidefinite = semidefinite
        self._rows = np.zeros((0, self._dimension))

    @property
    def complete(self) -> bool:
        """Whether the whole matrix is known."""
        return len(self._rows) == self._dimension

    def request(self) -> Block:
        """The next unit vectors."""
        count = min(self._block_size, self._dimension - len(self._rows))
        return trees.unravel(np.eye(count, self._dimension, len(self._rows)), self._like)

    def _use(self, product: Block) -> None:
        self._rows = np.concatenate([self._rows, trees.ravel(product).astype(float)])

    def estimate(self) -> tuple[float, float, float]:
        """The trace; before all rows are known, that of as many diagonal entries, scaled up."""
        if not self.complete:
            return _mean_of(self._dimension * np.diag(self._rows))
        gap = refuse_asymmetric(self._rows)
        rounding = self._epsilon * float(np.linalg.norm(self._rows))
        if self._semidefinite:
            lowest = float(np.linalg.eigvalsh((self._rows + self._rows.T) / 2)[0])
            if lowest < -max(_SHIFT * rounding, gap):
                raise ValueError(exchangeable.NEGATIVE.format(lowest))
        return float(np.trace(self._rows)), rounding, np.inf


class _Range:
    """A W = Q F, growing by blocks of products: an orthonormal basis of them, and the factors."""

    def __init__(self, like: Vector, key: jax.Array) -> None:
        self._like, self._key, self._num_drawn = like, key, 0
        self._dimension, self._epsilon = trees.size(like), trees.epsilon(like)
        self.basis = Basis()  # Q
        self.factors = np.zeros((0, 0))  # F
        self._largest = 0.0  # norm of a product

    def extend(self, product: Block) -> None:
        """Add a block of products: A W_b = Q along + Q_new remainder."""
        block, norms = trees.unit(product)
        lengths, size = np.asarray(norms, float), self.basis.size
        self._largest = max(self._largest, lengths.max())
        new, remainder, along = orthonormalize(
            block,
            self.basis,
            np.diag(lengths),
            negligible=8 * self._epsilon * self._largest,
            room=self._dimension - size,
            draw=self._draw,
        )
        self.basis = self.basis.extend(new)
        below = np.zeros((len(remainder), self.factors.shape[1]))
        self.factors = np.block([[self.factors, along], [below, remainder]])

    def coefficients(self, block: Block) -> np.ndarray:
        """Q^T b of each vector of a block, in columns."""
        return coefficients(self.basis.chunks, block).T[: self.basis.size]

    def _draw(self, count: int) -> Block:
        first = _REPLACEMENTS + self._num_drawn
        self._num_drawn += count
        return random_block(self._key, first, count, self._like)


class RangeEngine(_Products):
    """XTrace: half of the products go to test vectors, the other half to a basis of the first."""

    def __init__(self, like: Vector, key: jax.Array, count: int, block_size: int) -> None:
        super().__init__(like, block_size)
        self._key, self._count = key, count
        self._range = _Range(like, key)
        self._forms = np.zeros(0)  # w_i.A w_i
        self._compression = np.zeros((count, 0))  # Q^T A Q, as many columns as are known

    @property
    def complete(self) -> bool:
        """Whether the whole basis has been multiplied."""
        return self._compression.shape[1] == self._count

    def request(self) -> Block:
        """Test vectors, and after the last of them the vectors of their products' basis."""
        if self._forms.size < self._count:
            return self._test_vectors(self._key, self._forms.size, self._count)
        known = self._compression.shape[1]
        chosen = np.arange(known, min(known + self._block_size, self._count))
        return self._range.basis.combine(np.eye(self._count)[chosen], self._like)

    def _use(self, product: Block) -> None:
        if self._forms.size < self._count:
            tests = self._test_vectors(self._key, self._forms.size, self._count)
            forms = np.asarray(trees.inner(tests, product), float)
            self._forms = np.concatenate([self._forms, forms])
            self._range.extend(product)
            return
        columns = self._range.coefficients(product)
        self._compression = np.concatenate([self._compression, columns], axis=1)
        if self.complete:
            refuse_asymmetric(self._compression)

    def estimate(self) -> tuple[float, float, float]:
        """XTrace of the test vectors whose basis is known; a mean of forms before there are two."""
        # The first k basis vectors span the products of the first k test vectors.
        k = self._compression.shape[1]
        if k < 2:
            return _mean_of(self._dimension * self._forms)
        # Drawn again, so that the test vectors need not be kept.
        blocks = [
            self._test_vectors(self._key, first, self._count)
            for first in range(0, self._count, self._block_size)
        ]
        tests = np.concatenate([self._range.coefficients(block) for block in blocks], axis=1)
        found = exchangeable.from_range(
            self._forms[:k],
            self._range.factors[:k, :k],
            self._compression[:k, :k],
            tests[:k, :k],
            self._dimension,
            self._epsilon,
        )
        return _with_rounding(found, self._epsilon, k)


class NystromEngine(_Products):
    """XNysTrace, for a positive semi-definite operator: all products go to test vectors."""

    def __init__(self, like: Vector, key: jax.Array, count: int, block_size: int) -> None:
        super().__init__(like, block_size)
        self._key, self._count = key, count
        self._range, self._tests = _Range(like, key), Basis()
        for first in range(0, count, block_size):
            self._tests = self._tests.extend(self._test_vectors(key, first, count))
        self._core = np.zeros((count, 0))  # W^T A W
        self._gram = np.zeros((count, 0))  # W^T W

    @property
    def complete(self) -> bool:
        """Whether all test vectors have been multiplied."""
        return self._core.shape[1] == self._count

    def request(self) -> Block:
        """The next test vectors."""
        return self._test_vectors(self._key, self._core.shape[1], self._count)

    def _use(self, product: Block) -> None:
        tests = self.request()
        core, gram = (
            coefficients(self._tests.chunks, block).T[: self._count] for block in (product, tests)
        )
        self._core = np.concatenate([self._core, core], axis=1)
        self._gram = np.concatenate([self._gram, gram], axis=1)
        self._range.extend(product)

    def estimate(self) -> tuple[float, float, float]:
        """XNysTrace of the test vectors multiplied so far."""
        k = self._core.shape[1]
        core = self._core[:k]
        asymmetry, size = refuse_asymmetric(core), float(np.linalg.norm(self._range.factors))
        if not size:
            return 0.0, 0.0, k - 1
        # The rounding of inner products, or what the operator's own precision shows of itself.
        shift = max(_SHIFT * self._epsilon * size, asymmetry)
        found = exchangeable.from_core(
            (core + core.T) / 2, self._gram[:k], self._range.factors, self._dimension, shift
        )
        return _with_rounding(found, self._epsilon, k)


def refuse_asymmetric(square: np.ndarray) -> float:
    """How far u.Hv and v.Hu are apart, in the spectral norm.

    Raises:
      ValueError: too far for a symmetric operator.
    """
    gap, size = np.linalg.norm(square - square.T, 2), np.linalg.norm(square, 2)
    if gap > ASYMMETRY * size:
        raise ValueError(
            "the operator is not symmetric, or not the same in every product: u.Hv and v.Hu differ "
            f"by {gap / size:.2g} of its norm. hd.verify_operator(operator, key) tells more."
        )
    return float(gap)


def _with_rounding(
    found: exchangeable.Exchangeable, epsilon: float, count: int
) -> tuple[float, float, float]:
    rounding = 8 * epsilon * found.size
    return found.value, float(np.hypot(found.standard_error, rounding)), count - 1


def _mean_of(samples: np.ndarray) -> tuple[float, float, float]:
    """The mean of independent samples; with an infinite error where there is only one."""
    error = float(samples.std(ddof=1) / np.sqrt(samples.size)) if samples.size > 1 else np.inf
    return float(samples.mean()), error, max(samples.size - 1, 1)
