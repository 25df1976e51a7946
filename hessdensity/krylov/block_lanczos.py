"""H V = Z T: the products of a block Lanczos run, in terms of an orthonormal basis.

Z holds orthonormal vectors. Some of them, V, are "done": their products are known. The others are
"pending": the products have added them, or they are fresh random vectors. T holds the coefficients
of the products with respect to Z. T is not assumed to be symmetric. So the residual of a Ritz pair
(theta, V s) is known up to rounding, without storing a product and without computing another one:

    H V s - theta V s = Z (T s - theta [s; 0]).

Z is kept on the device in chunks of fixed size, and T is kept on the host.

T, the Ritz values and their residuals are in units of `scale`, a power of two near the norm of the
first products. So their squares neither overflow nor underflow, whatever the size of the operator,
and the scaling itself does not round.
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

from .engine import refuse_asymmetric


class Ritz(NamedTuple):
    """Ritz pairs (theta_i, Z s_i), in ascending order of theta_i, in units of the scale."""

    values: np.ndarray
    """(m,): theta_i, where m is the number of vectors done."""
    vectors: np.ndarray
    """(size of Z, m): column i is s_i. It is zero at pending vectors."""
    residuals: np.ndarray
    """(m,): norms of H Z s_i - theta_i Z s_i."""
    coupling: np.ndarray
    """(pending vectors, m): components of the residuals along the pending vectors."""
    noise: np.ndarray
    """(m,): norms of the parts of the residuals that come from errors of the products alone."""


class Columns(NamedTuple):
    """The columns of T and the vectors of Z that the products of some vectors add to H V = Z T.

    The numbers are in units of ``scale``.
    """

    vectors: Block | None
    """The new vectors of Z, or None if the products add none."""
    remainder: np.ndarray
    """(new vectors, products): the coefficients of the products on the new vectors."""
    along: np.ndarray
    """(size of Z before, products): the coefficients of the products on the earlier vectors."""
    norm: float
    """The norm of the operator, as far as it is known."""
    num_drawn: int
    """The number of random vectors drawn so far."""
    scale: float
    """The unit of the numbers, or 0 as long as all products are zero."""

    def scalars(self) -> dict[str, Any]:
        """All fields except the vectors, in types that JSON can hold."""
        arrays = {"remainder": self.remainder.tolist(), "along": self.along.tolist()}
        numbers = {"norm": self.norm, "num_drawn": self.num_drawn, "scale": self.scale}
        return {**arrays, **numbers}

    @staticmethod
    def of(vectors: Block | None, scalars: dict[str, Any]) -> Columns:
        """The inverse of `scalars`."""
        along = np.asarray(scalars["along"], float)
        remainder = np.asarray(scalars["remainder"], float).reshape(-1, along.shape[1])
        numbers = (scalars["norm"], scalars["num_drawn"], scalars["scale"])
        return Columns(vectors, remainder, along, *numbers)


class BlockLanczos:
    """The relation H V = Z T, which grows by products.

    Args:
      like: shapes, dtypes and shardings of one vector.
      key: random key of the fresh random vectors.
      basis_storage: where Z is kept: ``"device"``, or ``"host"`` for its full chunks.
    """

    def __init__(self, like: Vector, key: jax.Array, basis_storage: str = "device") -> None:
        self.like = like = trees.abstract(like)
        self.dimension = trees.size(like)
        self.done = np.zeros(0, bool)
        """(size of Z,) bool: whether the product of a vector is known."""
        self.scale = 0.0
        """The unit of T, of the Ritz pairs and of the norm. It is 0 until a product is not zero."""
        self.norm = 0.0
        """A lower bound of ||H||: the largest norm of a product, or size of a Ritz value."""
        self._basis = Basis(offload=basis_storage == "host")  # Z
        self._matrix = np.zeros((0, 0))  # T, whose columns are zero for pending vectors
        self._dropped = np.zeros((0, 0))  # Gram matrix of the parts of T that restarts dropped
        self._ritz: Ritz | None = None
        self._key = key
        self._num_drawn = 0
        self._epsilon = trees.epsilon(like)

    @property
    def size(self) -> int:
        """The number of vectors in Z."""
        return self.done.size

    @property
    def room(self) -> int:
        """The number of dimensions outside of the span of Z."""
        return self.dimension - self.size

    @property
    def pending(self) -> np.ndarray:
        """Positions in Z of the pending vectors, with the latest last."""
        return np.flatnonzero(~self.done)

    def add(self, block: Block) -> np.ndarray:
        """Extend Z by the span of a block, as pending vectors.

        Directions that Z contains already are replaced by random ones.

        Returns:
          (new vectors, k): coefficients of the unit vectors of the block on the new vectors.
        """
        block, norms = trees.unit(block)
        present = np.diag(np.sign(np.asarray(norms, float)))
        vectors, remainder, _ = self._orthonormalize(block, present, 64 * self._epsilon)
        self._append(vectors)
        return remainder

    def add_random(self, count: int) -> None:
        """Extend Z by fresh random vectors, as pending ones, as far as the space has room."""
        count = min(count, self.room)
        if count:
            self.add(self._draw(count))

    def vectors(self, chosen: np.ndarray) -> Block:
        """The vectors of Z at the chosen positions."""
        return self.combine(np.eye(self.size)[:, chosen])

    def columns(self, chosen: np.ndarray, product: Block) -> Columns:
        """The columns that the products of pending vectors add. Only `join` changes the state.

        Raises:
          FloatingPointError: a product holds a NaN or an infinity.
          ValueError: the operator is not symmetric, or not the same in every product.

        Cost: reads Z about four times.
        """
        product, norms = trees.unit(product)
        lengths = np.asarray(norms, float)
        if not np.all(np.isfinite(lengths)):
            raise FloatingPointError(NOT_FINITE)
        scale = self.scale or _power_of_two(lengths.max())
        lengths = lengths / (scale or 1.0)
        norm = max(self.norm, lengths.max())
        # H Z_chosen = Z along + W remainder. Only the length of these products tells which
        # directions are rounding error. Compared with the norm of H, the products in the bulk of a
        # spectrum with a far outlier are small altogether.
        negligible = 8 * self._epsilon * lengths.max()
        new, remainder, along = self._orthonormalize(product, np.diag(lengths), negligible)
        matrix, done = self._with_columns(chosen, along)
        # T is symmetric where both products are known.
        gaps = matrix[np.ix_(done, chosen)] - matrix[np.ix_(chosen, done)].T
        gap = np.linalg.norm(gaps, axis=0).max()
        refuse_asymmetric(float(gap), float(norm))
        vectors = new if remainder.size else None
        return Columns(vectors, remainder, along, float(norm), self._num_drawn, scale)

    def join(self, chosen: np.ndarray, columns: Columns) -> int:
        """Mark the chosen vectors as done, and add the new vectors of their products as pending.

        Returns the number of new vectors.
        """
        matrix, done = self._with_columns(chosen, columns.along)
        first = len(matrix)
        self.norm = columns.norm
        self.scale = columns.scale
        self._num_drawn = columns.num_drawn
        if columns.vectors is not None:
            self._append(columns.vectors)
        # T changes only now, so that a run that is interrupted before keeps its state.
        self.done[:first] = done
        self._matrix[:first, :first] = matrix
        self._matrix[first:, chosen] = columns.remainder
        self._ritz = None
        return len(columns.remainder)

    def _with_columns(self, chosen: np.ndarray, along: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(T, done) with the products of the chosen vectors."""
        matrix = self._matrix.copy()
        done = self.done.copy()
        matrix[:, chosen] = along
        done[chosen] = True
        return matrix, done

    def products(self) -> tuple[np.ndarray, np.ndarray]:
        """(V^T H V, components of H V along the pending vectors), in eigenvalue units."""
        known = self._matrix[:, self.done] * self.scale
        return known[self.done], known[~self.done]

    def ritz(self) -> Ritz:
        """The Ritz pairs of V: eigenpairs of the symmetric part of V^T H V.

        The other part of V^T H V, and what restarts have dropped, are zero for exact products.
        Their share of a residual is the noise of the pair. No further product changes it.
        """
        if self._ritz is not None:
            return self._ritz
        square = self._matrix[np.ix_(self.done, self.done)]
        values, inner = np.linalg.eigh((square + square.T) / 2)
        skew = (square - square.T) / 2 @ inner
        self.norm = max(self.norm, np.abs(values).max(initial=0))
        vectors = np.zeros((self.size, values.size))
        vectors[self.done] = inner
        # R = T S - [S; 0] Theta, plus the parts of T's columns that restarts have dropped.
        rest = self._matrix @ vectors - vectors * values
        lost = np.maximum((vectors * (self._dropped @ vectors)).sum(0), 0)
        residuals = np.sqrt((rest**2).sum(0) + lost)
        noise = np.sqrt((skew**2).sum(0) + lost)
        self._ritz = Ritz(values, vectors, residuals, rest[~self.done], noise)
        return self._ritz

    def restart(self, kept: np.ndarray) -> None:
        """Replace V by the Ritz vectors of some pairs: a thick restart (Wu and Simon 2000).

        R = [kept, pending] has orthonormal columns. Then Z <- Z R and T <- R^T T kept. All pending
        vectors remain. The part of T's columns that R drops is rounding error. It is included in
        later residuals.

        Args:
          kept: columns of `Ritz.vectors`, (size of Z, number kept).
        """
        # The layout in memory decides how BLAS rounds. With one layout, rotations from a file give
        # the same bits as those that were just computed.
        kept = np.ascontiguousarray(kept)
        rotation = np.concatenate([kept, np.eye(self.size)[:, self.pending]], axis=1)
        columns = self._matrix @ kept
        inside = rotation.T @ columns
        lost = columns - rotation @ inside
        dropped = kept.T @ self._dropped @ kept + lost.T @ lost
        total = rotation.shape[1]
        count = kept.shape[1]
        # Zeros are added up to whole chunks, so that one compiled program serves all shapes.
        whole = np.pad(rotation, ((0, 0), (0, -total % CHUNK)))
        rotated: list[Any] = []
        for first in range(0, whole.shape[1], CHUNK):
            rotated += chunks_of(self.combine(whole[:, first : first + CHUNK]))
        self._basis = Basis(tuple(rotated), total)
        self.done = np.arange(total) < count
        self._matrix = np.zeros((total, total))
        self._matrix[:, :count] = inside
        self._dropped = np.zeros((total, total))
        self._dropped[:count, :count] = dropped
        self._ritz = None

    def combine(self, factors: np.ndarray) -> Block:
        """The block of k vectors Z factors, for factors of shape (size of Z, k)."""
        return self._basis.combine(factors.T, self.like)

    def _orthonormalize(
        self, block: Block, factors: np.ndarray, negligible: float
    ) -> tuple[Block, np.ndarray, np.ndarray]:
        return orthonormalize(
            block, self._basis, factors, negligible=negligible, room=self.room, draw=self._draw
        )

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


def _power_of_two(length: float) -> float:
    """The power of two below a length, or 0 if the length is 0."""
    return float(np.ldexp(1.0, int(np.frexp(length)[1]) - 1)) if length else 0.0
