"""Engines of trace estimates, which turn products with random vectors into small matrices.

An engine asks for blocks and takes their products. After the first product, it can give an estimate
of the trace at any time. A step saves the product itself, and a resumed run computes everything
else from it again.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Protocol

import jax
import numpy as np

from hessdensity.errors import NOT_FINITE, NonFiniteProductError
from hessdensity.krylov.engine import Engine, Step, refuse_asymmetric
from hessdensity.vectors import trees
from hessdensity.vectors.basis import Basis, coefficients
from hessdensity.vectors.orthogonalize import orthonormalize
from hessdensity.vectors.random import random_block
from hessdensity.vectors.trees import Block, Vector

from . import exchangeable

_ROUNDING = 32  # rounding units, relative to the norm, that an estimate may be off by
_SHIFT = 4  # rounding units by which a positive semi-definite operator is shifted
_REPLACEMENTS = 2**31  # the number of the first random vector that replaces a missing direction


class TraceEngine(Engine, Protocol):
    """An engine that can estimate a trace after any of its products."""

    def estimate(self) -> tuple[float, float, float]:
        """(value, standard error, degrees of freedom of the error)."""


class _Products(ABC):
    """The common part of the engines: blocks in order, and the check that products are finite."""

    def __init__(self, like: Vector, block_size: int) -> None:
        self._like = like
        self._block_size = block_size
        self._dimension = trees.size(like)
        self._epsilon = trees.epsilon(like)
        self.num_done = 0

    def take(self, product: Block) -> Step:
        """Take the product of the block that `request` returned."""
        if not trees.all_finite(product):
            raise NonFiniteProductError(self.num_done, NOT_FINITE)
        self._use(product)
        self.num_done += 1
        return Step(product, {})

    def replay(self, step: Step) -> None:
        """Like `take`, for a saved product."""
        self.take(step.vectors)

    @abstractmethod
    def _use(self, product: Block) -> None:
        """Take over a product that is finite."""

    def _test_vectors(self, key: jax.Array, first: int, count: int) -> Block:
        """The block of test vectors that starts with number ``first``, of ``count`` in all."""
        return random_block(key, first, min(self._block_size, count - first), self._like)


class ExactEngine(_Products):
    """The whole matrix, from products with all unit vectors. Cheaper if the dimension is small."""

    def __init__(self, like: Vector, block_size: int, semidefinite: bool) -> None:
        super().__init__(like, block_size)
        self._semidefinite = semidefinite
        self._matrix = np.zeros((self._dimension, self._dimension))
        self._known = 0  # rows

    @property
    def complete(self) -> bool:
        """Whether the whole matrix is known."""
        return self._known == self._dimension

    def request(self) -> Block:
        """The next unit vectors."""
        count = min(self._block_size, self._dimension - self._known)
        return trees.unravel(np.eye(count, self._dimension, self._known), self._like)

    def _use(self, product: Block) -> None:
        count = trees.count(product)
        self._matrix[self._known : self._known + count] = trees.ravel(product)
        self._known += count

    def estimate(self) -> tuple[float, float, float]:
        """The trace. Before all rows are known, the known diagonal entries are scaled up."""
        if not self.complete:
            # The first entries are not a random sample: nothing bounds the others.
            diagonal = np.diag(self._matrix)[: self._known]
            return float(self._dimension * diagonal.mean()), np.inf, 1
        gap = _asymmetry(self._matrix)
        rounding = self._epsilon * float(np.linalg.norm(self._matrix))
        if self._semidefinite:
            lowest = float(np.linalg.eigvalsh((self._matrix + self._matrix.T) / 2)[0])
            if lowest < -max(_SHIFT * rounding, gap):
                raise ValueError(exchangeable.NEGATIVE.format(lowest))
        return float(np.trace(self._matrix)), rounding, np.inf


class _Range:
    """A W = Q F: an orthonormal basis Q of products, and their factors F. It grows by blocks."""

    def __init__(self, like: Vector, key: jax.Array) -> None:
        self._like = like
        self._key = key
        self._num_drawn = 0
        self._dimension = trees.size(like)
        self._epsilon = trees.epsilon(like)
        self.basis = Basis()  # Q
        self.factors = np.zeros((0, 0))  # F
        self._largest = 0.0  # the largest norm of a product

    def extend(self, product: Block) -> None:
        """Add a block of products: A W_b = Q along + Q_new remainder."""
        block, norms = trees.unit(product)
        lengths = np.asarray(norms, float)
        self._largest = max(self._largest, lengths.max())
        new, remainder, along = orthonormalize(
            block,
            self.basis,
            np.diag(lengths),
            negligible=8 * self._epsilon * self._largest,
            room=self._dimension - self.basis.size,
            draw=self._draw,
        )
        self.basis = self.basis.extend(new)
        below = np.zeros((len(remainder), self.factors.shape[1]))
        self.factors = np.block([[self.factors, along], [below, remainder]])

    def coefficients(self, block: Block) -> np.ndarray:
        """Q^T b for each vector b of a block, in columns."""
        return coefficients(self.basis.chunks, block).T[: self.basis.size]

    def _draw(self, count: int) -> Block:
        first = _REPLACEMENTS + self._num_drawn
        self._num_drawn += count
        return random_block(self._key, first, count, self._like)


class RangeEngine(_Products):
    """XTrace: half of the products go to test vectors, and the others to a basis of the first."""

    def __init__(self, like: Vector, key: jax.Array, count: int, block_size: int) -> None:
        super().__init__(like, block_size)
        self._key = key
        self._count = count
        self._range = _Range(like, key)
        self._forms = np.zeros(0)  # w_i.A w_i
        self._compression = np.zeros((count, 0))  # Q^T A Q, as many columns as are known

    @property
    def complete(self) -> bool:
        """Whether the whole basis has been multiplied."""
        return self._compression.shape[1] == self._count

    def request(self) -> Block:
        """The next test vectors. After the last of them, a basis of their products follows."""
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
            _asymmetry(self._compression)

    def estimate(self) -> tuple[float, float, float]:
        """XTrace from the test vectors whose basis is known.

        Before there are two of them, a mean of forms w_i.A w_i replaces it.
        """
        # The first k basis vectors span the products of the first k test vectors.
        k = self._compression.shape[1]
        if k < 2:
            return _mean_of(self._dimension * self._forms)
        # The test vectors are drawn again, so that they need not be kept.
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
        self._key = key
        self._count = count
        self._range = _Range(like, key)
        self._tests = Basis()
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
        """XNysTrace from the test vectors multiplied so far."""
        k = self._core.shape[1]
        core = self._core[:k]
        if k < 2:
            return _mean_of(self._dimension * np.diag(core))
        asymmetry = _asymmetry(core)
        size = float(np.linalg.norm(self._range.factors))
        if not size:
            return 0.0, 0.0, k - 1
        # The rounding error of inner products, or the asymmetry that the operator's own precision
        # causes.
        shift = max(_SHIFT * self._epsilon * size, asymmetry)
        # |A w|^2 / w.A w is at most the norm of A, and close to it where few eigenvalues dominate.
        # The norm of a few products may then be much smaller.
        forms = np.diag(core)
        squares = (self._range.factors**2).sum(axis=0)[forms > 0]
        norm = max(size, *(squares / forms[forms > 0]))
        found = exchangeable.from_core(
            (core + core.T) / 2,
            self._gram[:k],
            self._range.factors,
            self._dimension,
            shift,
            _ROUNDING * self._epsilon * norm,
        )
        return _with_rounding(found, self._epsilon, k)


def _asymmetry(square: np.ndarray) -> float:
    """The distance between u.Hv and v.Hu, in the spectral norm.

    Raises:
      ValueError: the distance is too large for a symmetric operator.
    """
    gap = np.linalg.norm(square - square.T, 2)
    size = np.linalg.norm(square, 2)
    refuse_asymmetric(float(gap), float(size))
    return float(gap)


def _with_rounding(
    found: exchangeable.Exchangeable, epsilon: float, count: int
) -> tuple[float, float, float]:
    rounding = _ROUNDING * epsilon * found.size
    return found.value, float(np.hypot(found.standard_error, rounding)), count - 1


def _mean_of(samples: np.ndarray) -> tuple[float, float, float]:
    """The mean of independent samples. The error is infinite if there is only one."""
    error = float(samples.std(ddof=1) / np.sqrt(samples.size)) if samples.size > 1 else np.inf
    return float(samples.mean()), error, max(samples.size - 1, 1)
