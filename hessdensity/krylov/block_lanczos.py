"""H V = Z T: what a block Lanczos run knows of an operator.

Z holds orthonormal vectors. Of some of them, V, the products are known ("done"); the others are
"pending": what the products added, or fresh random vectors. T has all the coefficients of the
products on Z, and no symmetry is assumed of it, so that the residual of a Ritz pair is known to
rounding without storing a product and without a further one:

    H V s - theta V s = Z (T s - theta [s; 0]).

Z is kept on the device in chunks of fixed size, T on the host.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from hessdensity.vectors import chunks as _basis
from hessdensity.vectors import trees as _trees
from hessdensity.vectors.basis import CHUNK, project_out

PyTree = Any

_ASYMMETRY = 0.05  # as in `lanczos`: above the rounding of a model in bfloat16, below a rule that is no derivative
_DEPENDENT = (
    0.01  # eigenvalue of the Gram matrix of unit vectors below which they are treated as dependent
)
_SWEEPS = 10  # two are the rule, four were seen where vectors were random stand-ins


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


class Step(NamedTuple):
    """What the products of chosen vectors add to a factorisation."""

    vectors: PyTree  # block of the new vectors of Z, or None
    remainder: np.ndarray  # (new vectors, products): the products' coefficients on them
    along: np.ndarray  # (size of Z before, products): on the others
    norm: float
    num_drawn: int  # random vectors used so far

    def scalars(self) -> dict[str, Any]:
        """All but the vectors, as JSON takes it."""
        return {
            **self._asdict(),
            "vectors": None,
            "remainder": self.remainder.tolist(),
            "along": self.along.tolist(),
        }

    @staticmethod
    def of(vectors: PyTree, scalars: dict[str, Any]) -> Step:
        """The inverse of `scalars`."""
        along = np.asarray(scalars["along"], float)
        remainder = np.asarray(scalars["remainder"], float).reshape(-1, along.shape[1])
        return Step(vectors, remainder, along, scalars["norm"], scalars["num_drawn"])


class Factorisation:
    """H V = Z T, growing by products.

    Args:
      like: shapes, dtypes and shardings of one vector.
      key: decides the fresh random vectors.
    """

    def __init__(self, like: PyTree, key: jax.Array) -> None:
        self.like = like = _trees.abstract(like)
        self.dimension = _trees.size(like)
        self.done = np.zeros(0, bool)
        self.norm = 0.0
        """Largest length of a product or size of a Ritz value so far: a lower bound of the
        operator's norm."""
        self._matrix = np.zeros((0, 0))  # T, columns of pending vectors being zero
        self._dropped = np.zeros(
            (0, 0)
        )  # Gram matrix of what restarts have cut off the columns of T
        self._chunks: list[PyTree] = []
        self._ritz: Ritz | None = None
        self._key, self._num_drawn = key, 0
        self._epsilon = _trees.epsilon(like)

    @property
    def size(self) -> int:
        """The number of vectors in Z."""
        return self.done.size

    @property
    def pending(self) -> np.ndarray:
        """Positions in Z of the pending vectors, the latest last."""
        return np.flatnonzero(~self.done)

    def add(self, block: PyTree) -> None:
        """The span of a block joins Z, pending, with random vectors in place of what lies in Z
        already."""
        with jax.default_matmul_precision("highest"):
            block, lengths = _unit(block)
            self._append(
                self._orthonormalise(block, np.diag(np.sign(_host(lengths))), 64 * self._epsilon)[0]
            )

    def add_random(self, count: int) -> None:
        """Fresh random vectors join Z, pending, as far as the space has room."""
        count = min(count, self.dimension - self.size)
        if count:
            self.add(self._draw(count))

    def multiply(self, operator: Any, chosen: np.ndarray) -> Step:
        """The products of pending vectors, and what they would add to Z, which does not change yet
        (`join`).

        Raises:
          FloatingPointError: a product holds a NaN or an infinity.
          ValueError: the operator is not symmetric, or not the same in every product.

        Cost: one product with a block of ``len(chosen)`` vectors. Reads Z some four times.
        """
        block = self.combine(np.eye(self.size)[:, chosen])
        product, _ = _trees.as_block(operator @ block, self.like, "the operator's product")
        with jax.default_matmul_precision("highest"):
            product, lengths = _unit(product)
            lengths = _host(lengths)
            if not np.all(np.isfinite(lengths)):
                raise FloatingPointError(
                    "the operator's product is not finite. Look for overflow, or for log(0) and "
                    "0/0."
                )
            norm = max(self.norm, lengths.max())
            new, remainder, along = self._orthonormalise(
                product, np.diag(lengths), 8 * self._epsilon * norm
            )
        matrix, done = self._with_columns(chosen, along)
        gap = np.linalg.norm(
            matrix[np.ix_(done, chosen)] - matrix[np.ix_(chosen, done)].T, axis=0
        ).max()
        if gap > _ASYMMETRY * norm:
            raise ValueError(
                "the operator is not symmetric, or not the same in every product: u.Hv and v.Hu "
                f"differ by {gap / norm:.2g} of its norm. hd.verify_operator(operator, key) tells "
                "more."
            )
        return Step(new if remainder.size else None, remainder, along, float(norm), self._num_drawn)

    def join(self, chosen: np.ndarray, step: Step) -> int:
        """Pending vectors are done; what their products add to Z is pending, last. Returns how many
        they are."""
        matrix, done = self._with_columns(chosen, step.along)
        first, self.norm, self._num_drawn = len(matrix), step.norm, step.num_drawn
        if step.vectors is not None:
            self._append(step.vectors)
        # Only now, so that a run that is interrupted is what it was before.
        self.done[:first], self._matrix[:first, :first] = done, matrix
        self._matrix[first:, chosen] = step.remainder
        self._ritz = None
        return len(step.remainder)

    def _with_columns(self, chosen: np.ndarray, along: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(T with the products of pending vectors, which are done then)."""
        matrix, done = self._matrix.copy(), self.done.copy()
        matrix[:, chosen], done[chosen] = along, True
        return matrix, done

    def ritz(self) -> Ritz:
        """The Ritz pairs of V: eigenpairs of T's symmetric part there."""
        if self._ritz is not None:
            return self._ritz
        square = self._matrix[np.ix_(self.done, self.done)]
        values, inner = np.linalg.eigh((square + square.T) / 2)
        self.norm = max(self.norm, np.abs(values).max(initial=0))
        vectors = np.zeros((self.size, values.size))
        vectors[self.done] = inner
        rest = self._matrix @ vectors - vectors * values
        squares = (rest**2).sum(0) + (vectors * (self._dropped @ vectors)).sum(0)
        self._ritz = Ritz(values, vectors, np.sqrt(np.maximum(squares, 0)), rest[~self.done])
        return self._ritz

    def restart(self, kept: np.ndarray) -> None:
        """V becomes the Ritz vectors of some pairs, a thick restart (Wu and Simon 2000); all
        pending vectors stay.

        What is cut off the columns of T, rounding, counts in later residuals.

        Args:
          kept: columns of `Ritz.vectors`, (size, number kept).
        """
        rotation = np.concatenate([kept, np.eye(self.size)[:, self.pending]], axis=1)
        columns = self._matrix @ kept
        inside = rotation.T @ columns
        lost = columns - rotation @ inside
        dropped = kept.T @ self._dropped @ kept + lost.T @ lost
        # Filled up with zeros to whole chunks: one shape, one program.
        whole = np.pad(rotation, ((0, 0), (0, -rotation.shape[1] % CHUNK)))
        self._chunks = [
            _stack(self.combine(whole[:, i : i + CHUNK])) for i in range(0, whole.shape[1], CHUNK)
        ]
        total, count = rotation.shape[1], kept.shape[1]
        self.done = np.arange(total) < count
        self._matrix, self._dropped = np.zeros((total, total)), np.zeros((total, total))
        self._matrix[:, :count], self._dropped[:count, :count] = inside, dropped
        self._ritz = None

    def combine(self, factors: np.ndarray) -> PyTree:
        """The block of k vectors Z factors, from (size of Z, k)."""
        with jax.default_matmul_precision("highest"):
            return _basis.combine(self._chunks, factors.T, self.like)

    def _orthonormalise(
        self, block: PyTree, lengths: np.ndarray, negligible: float
    ) -> tuple[PyTree, np.ndarray, np.ndarray]:
        """A block of unit vectors b_j, in products = sum over j of b_j lengths[j], as Z along + W
        remainder.

        Classical Gram-Schmidt against Z, then the eigenvectors of the block's own Gram matrix
        (Stathopoulos and Wu 2002), again until nothing changes. A direction of negligible length is
        rounding: a random one takes its place, with length 0, so that exhausted Krylov spaces are
        left by themselves.

        Returns: W, orthonormal to Z and in itself; remainder, (vectors of W, products); along,
          (size of Z, products).
        """
        remainder, along = lengths, np.zeros((self.size, lengths.shape[1]))
        room = self.dimension - self.size
        for sweep in range(_SWEEPS):
            if sweep and remainder.shape[0] > room:
                strongest = np.sort(
                    np.argsort(-np.linalg.norm(remainder, axis=1), kind="stable")[:room]
                )
                block, remainder = (
                    jax.tree.map(lambda leaf, rows=strongest: leaf[rows], block),
                    remainder[strongest],
                )
            if not remainder.size:
                break
            dead = np.linalg.norm(remainder, axis=1) <= negligible
            if np.any(dead):
                block = _replace(block, jnp.asarray(dead), self._draw(dead.size))
                remainder = np.where(dead[:, None], 0.0, remainder)
            block, removed = project_out(block, self._chunks)
            removed = removed[:, : self.size]
            along += removed.T @ remainder
            block, left = _unit(block)
            gram = _host(_gram(block))
            squares, axes = np.linalg.eigh(gram)
            root = np.sqrt(np.maximum(squares, dead.size * self._epsilon))
            change = max(np.abs(removed).max(initial=0), np.abs(gram - np.eye(dead.size)).max())
            # The symmetric root where the block is far from dependent: it hangs on no sign or turn
            # of eigenvectors, which another machine may choose otherwise. Else these, which single
            # out what the block does not have.
            turn = axes if squares.min(initial=1) > _DEPENDENT else np.eye(dead.size)
            block = _rotate(block, self._device(turn / root @ axes.T))
            remainder = turn * root @ axes.T @ (_host(left)[:, None] * remainder)
            if change < 1e-3:
                break
        return block, remainder, along

    def _append(self, block: PyTree) -> None:
        for index in range(jax.tree.leaves(block)[0].shape[0]):
            row = (self.size + index) % CHUNK
            if row == 0:
                self._chunks.append(_first_row(block, index))
            else:
                self._chunks[-1] = _write_row(self._chunks[-1], block, index, row)
        count = jax.tree.leaves(block)[0].shape[0]
        self.done = np.pad(self.done, (0, count))
        self._matrix, self._dropped = (
            np.pad(array, (0, count)) for array in (self._matrix, self._dropped)
        )
        self._ritz = None

    def _draw(self, count: int) -> PyTree:
        self._num_drawn += count
        return _trees.random_block(self._key, self._num_drawn - count, count, self.like)

    def _device(self, array: np.ndarray) -> jax.Array:
        return jnp.asarray(array, _trees.scalar_dtype(self.like))


def _host(array: jax.Array) -> np.ndarray:
    return np.asarray(array, float)


_stack = jax.jit(_basis.stack)


@jax.jit
def _unit(block: PyTree) -> tuple[PyTree, jax.Array]:
    """(the vectors at length 1, or zero where they are zero; their lengths)."""
    lengths = _trees.norm(block)
    return _trees.scale(block, 1 / jnp.where(lengths > 0, lengths, jnp.inf)), lengths


@jax.jit
def _gram(block: PyTree) -> jax.Array:
    return _basis.coefficients(_basis.stack(block), block)


@jax.jit
def _rotate(block: PyTree, factors: jax.Array) -> PyTree:
    """Vector i of the result is the sum over j of factors[i, j] * vector j."""
    return _basis.subtract_combination(
        jax.tree.map(jnp.zeros_like, block), -factors, _basis.stack(block)
    )


@jax.jit
def _replace(block: PyTree, where: jax.Array, other: PyTree) -> PyTree:
    return jax.tree.map(
        lambda x, y: jnp.where(where.reshape(-1, *[1] * (x.ndim - 1)), y, x), block, other
    )


@jax.jit
def _first_row(block: PyTree, index: jax.Array) -> PyTree:
    return _basis.chunk(_one(block, index), CHUNK)


@partial(jax.jit, donate_argnums=0)
def _write_row(chunk: PyTree, block: PyTree, index: jax.Array, row: jax.Array) -> PyTree:
    return _basis.write_row(chunk, _one(block, index), row)


def _one(block: PyTree, index: jax.Array) -> PyTree:
    return jax.tree.map(lambda leaf: jax.lax.dynamic_slice_in_dim(leaf, index, 1), block)
