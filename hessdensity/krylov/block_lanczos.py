"""H V = Z T: what a block Lanczos run knows of an operator.

Z holds orthonormal vectors. Of some of them, V, the products are known ("done"); the others are
"pending": what the products have added, or fresh random vectors. T has all the coefficients of the
products on Z. No symmetry is assumed of it, so that the residual of a Ritz pair (theta, V s) is
known to rounding without storing a product and without a further one:

    H V s - theta V s = Z (T s - theta [s; 0]).

Z is kept on the device in chunks of fixed size, T on the host.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import numpy as np

from hessdensity.errors import NOT_FINITE
from hessdensity.vectors import trees
from hessdensity.vectors.basis import CHUNK, Basis, chunks_of
from hessdensity.vectors.orthogonalize import orthonormalize
from hessdensity.vectors.random import random_block
from hessdensity.vectors.trees import Block, Vector

from .lanczos import ASYMMETRY


class Ritz(NamedTuple):
    """Ritz pairs (theta_i, Z s_i), ascending."""

    values: np.ndarray
    """(m,) theta, m being the number of vectors done."""
    vectors: np.ndarray
    """(size of Z, m): column i is s_i, zero at pending vectors."""
    residuals: np.ndarray
    """(m,) norms of H Z s - theta Z s."""
    coupling: np.ndarray
    """(pending vectors, m): the residuals' parts along them."""


class Columns(NamedTuple):
    """What the products of chosen vectors add to H V = Z T: as many columns of T, and rows of Z."""

    vectors: Block | None
    """The new vectors of Z, or None where the products add none."""
    remainder: np.ndarray
    """(new vectors, products): the products' coefficients on them."""
    along: np.ndarray
    """(size of Z before, products): the products' coefficients on the others."""
    norm: float
    """The operator's norm, as far as it is known."""
    num_drawn: int
    """Random vectors used so far."""

    def scalars(self) -> dict[str, Any]:
        """All but the vectors, as JSON takes it."""
        arrays = {"remainder": self.remainder.tolist(), "along": self.along.tolist()}
        return {**arrays, "norm": self.norm, "num_drawn": self.num_drawn}

    @staticmethod
    def of(vectors: Block | None, scalars: dict[str, Any]) -> Columns:
        """The inverse of `scalars`."""
        along = np.asarray(scalars["along"], float)
        remainder = np.asarray(scalars["remainder"], float).reshape(-1, along.shape[1])
        return Columns(vectors, remainder, along, scalars["norm"], scalars["num_drawn"])


class BlockLanczos:
    """H V = Z T, growing by products.

    Args:
      like: shapes, dtypes and shardings of one vector.
      key: decides the fresh random vectors.
    """

    def __init__(self, like: Vector, key: jax.Array) -> None:
        self.like = like = trees.abstract(like)
        self.dimension = trees.size(like)
        self.done = np.zeros(0, bool)
        """(size of Z,) whether the product of a vector is known."""
        self.norm = 0.0
        """The largest norm of a product, or size of a Ritz value: a lower bound of ||H||."""
        self._basis = Basis()  # Z
        self._matrix = np.zeros((0, 0))  # T; the columns of pending vectors are zero
        self._dropped = np.zeros((0, 0))  # Gram matrix of what restarts have cut off T's columns
        self._ritz: Ritz | None = None
        self._key, self._num_drawn = key, 0
        self._epsilon = trees.epsilon(like)

    @property
    def size(self) -> int:
        """The number of vectors in Z."""
        return self.done.size

    @property
    def room(self) -> int:
        """The dimensions that Z leaves."""
        return self.dimension - self.size

    @property
    def pending(self) -> np.ndarray:
        """Positions in Z of the pending vectors, the latest last."""
        return np.flatnonzero(~self.done)

    def add(self, block: Block) -> None:
        """Extend Z by the span of a block, pending; directions that Z has become random ones."""
        block, norms = trees.unit(block)
        present = np.diag(np.sign(np.asarray(norms, float)))
        vectors, *_ = self._orthonormalize(block, present, 64 * self._epsilon)
        self._append(vectors)

    def add_random(self, count: int) -> None:
        """Extend Z by fresh random vectors, pending, as far as the space has room."""
        count = min(count, self.room)
        if count:
            self.add(self._draw(count))

    def vectors(self, chosen: np.ndarray) -> Block:
        """The vectors of Z at some positions."""
        return self.combine(np.eye(self.size)[:, chosen])

    def columns(self, chosen: np.ndarray, product: Block) -> Columns:
        """What the products of pending vectors add. Nothing changes yet: `join` does it.

        Raises:
          FloatingPointError: a product holds a NaN or an infinity.
          ValueError: the operator is not symmetric, or not the same in every product.

        Cost: reads Z some four times.
        """
        product, norms = trees.unit(product)
        lengths = np.asarray(norms, float)
        if not np.all(np.isfinite(lengths)):
            raise FloatingPointError(NOT_FINITE)
        norm = max(self.norm, lengths.max())
        # H Z_chosen = Z along + W remainder
        negligible = 8 * self._epsilon * norm
        new, remainder, along = self._orthonormalize(product, np.diag(lengths), negligible)
        matrix, done = self._with_columns(chosen, along)
        # T is symmetric where both products are known.
        gaps = matrix[np.ix_(done, chosen)] - matrix[np.ix_(chosen, done)].T
        gap = np.linalg.norm(gaps, axis=0).max()
        if gap > ASYMMETRY * norm:
            raise ValueError(
                "the operator is not symmetric, or not the same in every product: u.Hv and v.Hu "
                f"differ by {gap / norm:.2g} of its norm. "
                "hd.verify_operator(operator, key) tells more."
            )
        vectors = new if remainder.size else None
        return Columns(vectors, remainder, along, float(norm), self._num_drawn)

    def join(self, chosen: np.ndarray, columns: Columns) -> int:
        """Pending vectors become done, and what their products add becomes pending, last.

        Returns the number of new vectors.
        """
        matrix, done = self._with_columns(chosen, columns.along)
        first = len(matrix)
        self.norm, self._num_drawn = columns.norm, columns.num_drawn
        if columns.vectors is not None:
            self._append(columns.vectors)
        # Only now, so that a run that is interrupted before is what it was.
        self.done[:first], self._matrix[:first, :first] = done, matrix
        self._matrix[first:, chosen] = columns.remainder
        self._ritz = None
        return len(columns.remainder)

    def _with_columns(self, chosen: np.ndarray, along: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(T, done) with the products of pending vectors."""
        matrix, done = self._matrix.copy(), self.done.copy()
        matrix[:, chosen], done[chosen] = along, True
        return matrix, done

    def ritz(self) -> Ritz:
        """The Ritz pairs of V: eigenpairs of the symmetric part of V^T H V."""
        if self._ritz is not None:
            return self._ritz
        square = self._matrix[np.ix_(self.done, self.done)]
        values, inner = np.linalg.eigh((square + square.T) / 2)
        self.norm = max(self.norm, np.abs(values).max(initial=0))
        vectors = np.zeros((self.size, values.size))
        vectors[self.done] = inner
        # R = T S - [S; 0] Theta, and what restarts have dropped of T's columns.
        rest = self._matrix @ vectors - vectors * values
        squares = (rest**2).sum(0) + (vectors * (self._dropped @ vectors)).sum(0)
        residuals = np.sqrt(np.maximum(squares, 0))
        self._ritz = Ritz(values, vectors, residuals, rest[~self.done])
        return self._ritz

    def restart(self, kept: np.ndarray) -> None:
        """V becomes the Ritz vectors of some pairs, a thick restart (Wu and Simon 2000).

        With R = [kept, pending] orthonormal columns, Z <- Z R and T <- R^T T kept. All pending
        vectors stay. What R cuts off the columns of T is rounding, and counts in later residuals.

        Args:
          kept: columns of `Ritz.vectors`, (size, number kept).
        """
        rotation = np.concatenate([kept, np.eye(self.size)[:, self.pending]], axis=1)
        columns = self._matrix @ kept
        inside = rotation.T @ columns
        lost = columns - rotation @ inside
        dropped = kept.T @ self._dropped @ kept + lost.T @ lost
        total, count = rotation.shape[1], kept.shape[1]
        # Filled up with zeros to whole chunks: one shape, one program.
        whole = np.pad(rotation, ((0, 0), (0, -total % CHUNK)))
        rotated: list[Any] = []
        for first in range(0, whole.shape[1], CHUNK):
            rotated += chunks_of(self.combine(whole[:, first : first + CHUNK]))
        self._basis = Basis(tuple(rotated), total)
        self.done = np.arange(total) < count
        self._matrix, self._dropped = np.zeros((total, total)), np.zeros((total, total))
        self._matrix[:, :count], self._dropped[:count, :count] = inside, dropped
        self._ritz = None

    def combine(self, factors: np.ndarray) -> Block:
        """The block of k vectors Z factors, from (size of Z, k)."""
        return self._basis.combine(factors.T, self.like)

    def _orthonormalize(
        self, block: Block, factors: np.ndarray, negligible: float
    ) -> tuple[Block, np.ndarray, np.ndarray]:
        settings = {"negligible": negligible, "room": self.room, "draw": self._draw}
        return orthonormalize(block, self._basis, factors, **settings)

    def _append(self, block: Block) -> None:
        count = trees.count(block)
        self._basis = self._basis.extend(block)
        self.done = np.pad(self.done, (0, count))
        self._matrix, self._dropped = (
            np.pad(array, (0, count)) for array in (self._matrix, self._dropped)
        )
        self._ritz = None

    def _draw(self, count: int) -> Block:
        self._num_drawn += count
        return random_block(self._key, self._num_drawn - count, count, self.like)
