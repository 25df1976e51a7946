"""Angles between two subspaces, and the components of one vector in an eigenspace."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from hessdensity.vectors import trees
from hessdensity.vectors.basis import chunks_of, coefficients, combine
from hessdensity.vectors.orthogonalize import project_out
from hessdensity.vectors.trees import Block, PyTree

from .eigenspace import Eigenspace

# An orthonormal basis in float32 deviates by far less than this, and other vectors by far more.
_ORTHONORMAL = 1e-3


def overlap(u: Eigenspace | PyTree, v: Eigenspace | PyTree) -> float:
    """The share of one subspace that lies in another: ||U^T V||_F^2 / k.

    This is the mean squared cosine of the principal angles, and k is the smaller of the two ranks.
    An overlap of 1 means that the smaller space lies within the larger one. Two random spaces of
    ranks k and l overlap by l/n.

    Args:
      u: an `Eigenspace`, or a block of orthonormal vectors.
      v: another, of any rank, on vectors of the same structure.

    Raises:
      ValueError: the vectors differ in structure or shapes, or a space has no vectors.

    Cost: no products. Each of the k vectors of one space is read once for each vector of the other
      space, where it is stored.

    Source: Wu, Zhu, Wu, Wang and Ge (2020), for Hessians; Björck and Golub (1973), for the angles.

    Example:
      >>> import numpy as np
      >>> x, y, z = np.eye(3, dtype=np.float32)
      >>> overlap(np.stack([x, y]), np.stack([x, z]))
      0.5
    """
    u, v = _pair(u, v)
    cosines = np.linalg.svd(gram(u, v), compute_uv=False)
    return float(np.mean(np.minimum(cosines, 1) ** 2))


class OverlapCurve(NamedTuple):
    """The overlap of the first k vectors of two spaces, for k = 1 .. K."""

    ranks: np.ndarray
    """(K,) int: 1 .. K."""
    overlap: np.ndarray
    """(K,) float64: |U_k^T V_k|_F^2 / k."""
    chance: np.ndarray
    """(K,) float64: k/n, the expected overlap of two random spaces."""

    @property
    def peak(self) -> int:
        """The rank with the largest overlap."""
        return int(self.ranks[np.argmax(self.overlap)])


def overlap_curve(u: Eigenspace | PyTree, v: Eigenspace | PyTree) -> OverlapCurve:
    """The overlap of the first k vectors of two spaces, for every k up to the smaller rank.

    Args:
      u: an `Eigenspace`, or a block of orthonormal vectors.
      v: another, on vectors of the same structure.

    Raises:
      ValueError: as for `overlap`.

    Cost: that of one `overlap` with the largest k.

    Example:
      >>> import numpy as np
      >>> x, y, z = np.eye(3, dtype=np.float32)
      >>> curve = overlap_curve(np.stack([x, y]), np.stack([y, x]))
      >>> curve.overlap.tolist(), curve.peak
      ([0.0, 1.0], 2)
    """
    u, v = _pair(u, v)
    squares = gram(u, v) ** 2
    most = min(squares.shape)
    ranks = np.arange(1, most + 1)
    inside = np.cumsum(np.cumsum(squares, axis=0), axis=1)[ranks - 1, ranks - 1]
    return OverlapCurve(ranks, np.minimum(inside / ranks, 1), ranks / trees.dimension(u))


def principal_angles(u: Eigenspace | PyTree, v: Eigenspace | PyTree) -> np.ndarray:
    """The principal angles between two subspaces, in radians, in ascending order.

    The cosines, cos(theta_i), are the singular values of U^T V. An angle below 45 degrees is
    computed from its sine instead, a singular value of (I - U U^T) V: a cosine cannot distinguish
    an angle below the square root of the rounding unit from 0 (Björck and Golub 1973; Knyazev and
    Argentati 2002). So the error is a few rounding units of the vectors for every angle.

    Args:
      u: an `Eigenspace`, or a block of orthonormal vectors.
      v: another, of any rank, on vectors of the same structure.

    Raises:
      ValueError: the vectors differ in structure or shapes, or a space has no vectors.

    Returns:
      (k,) float64, where k is the smaller of the two ranks.

    Cost: no products. It reads the vectors three times as often as `overlap`. Memory: three times
      the vectors of the smaller space.

    Example:
      >>> import numpy as np
      >>> x, y, z = np.eye(3, dtype=np.float32)
      >>> tilted = np.stack([x, (y + z) / np.float32(2**0.5)])
      >>> np.degrees(principal_angles(np.stack([x, y]), tilted)).round(3).tolist()
      [0.0, 45.0]
    """
    u, v = _pair(u, v)
    if trees.count(u) < trees.count(v):
        u, v = v, u
    # Start from the principal vectors of v. The sines of distinct angles then belong to one column
    # each.
    _, cosines, rotation = np.linalg.svd(gram(v, u).T, full_matrices=False)
    rest = combine(chunks_of(v), rotation, trees.one_of(v))
    for _ in range(2):  # a second time, because rounding leaves components in the plane of u
        rest, _ = project_out(rest, chunks_of(u))
    rest, norms = trees.unit(rest)
    # The columns have unit length here, so that small angles are not lost when the Gram matrix
    # squares them. The lengths are multiplied back in float64.
    eigenvalues, directions = np.linalg.eigh(gram(rest, rest))
    sizes = np.asarray(norms, float)
    root = np.sqrt(np.maximum(eigenvalues, 0))[:, None] * directions.T
    sines = np.linalg.svd(root * sizes, compute_uv=False)[::-1]
    small = cosines > math.sqrt(0.5)
    return np.sort(
        np.where(small, np.arcsin(np.minimum(sines, 1)), np.arccos(np.minimum(cosines, 1)))
    )


def _pair(u: Eigenspace | PyTree, v: Eigenspace | PyTree) -> tuple[PyTree, PyTree]:
    """The vectors of both spaces as blocks of the same structure, with one dtype for each leaf."""
    u, v = (space.vectors if isinstance(space, Eigenspace) else space for space in (u, v))
    structures: Any = jax.tree.structure(u), jax.tree.structure(v)
    if structures[0] != structures[1]:
        raise ValueError(
            f"u and v are of different operators: their vectors have structures {structures}."
        )
    for path, x, y in zip(trees.paths(u), jax.tree.leaves(u), jax.tree.leaves(v), strict=True):
        if np.shape(x)[1:] != np.shape(y)[1:] or not np.ndim(x) or not np.ndim(y):
            where = f"leaf {path!r} is" if path else "they are"
            raise ValueError(
                f"u and v are of different operators: {where} {np.shape(x)} and {np.shape(y)}; "
                "expected blocks that differ in the first axis only."
            )
    if not min(trees.count(u), trees.count(v)):
        raise ValueError(
            f"u holds {trees.count(u)} vectors and v {trees.count(v)}; expected at least one in "
            "each."
        )

    def converted(x: Any, y: Any) -> jax.Array:
        # Rows on the host may be float64 although JAX computes in float32.
        dtype = np.promote_types(x.dtype, y.dtype)
        return jnp.asarray(x, jax.dtypes.canonicalize_dtype(dtype))

    return jax.tree.map(converted, u, v), jax.tree.map(converted, v, u)


def gram(u: Block, v: Block) -> np.ndarray:
    """Inner products of the vectors of two blocks: (k, l) float64 on the host."""
    return coefficients(chunks_of(v), u)[:, : trees.count(v)]


def one_vector(eigenspace: Eigenspace) -> PyTree:
    """Shapes and dtypes of one eigenvector."""
    if not isinstance(eigenspace, Eigenspace):
        raise TypeError(
            f"eigenspace is a {type(eigenspace).__name__}; expected an Eigenspace, as "
            "hd.top_eigenspace(operator, key, rank) returns it."
        )
    return trees.one_of(eigenspace.vectors)


def unit(vector: PyTree, like: PyTree, what: str) -> tuple[PyTree, float]:
    """A vector scaled to unit length, as a block of one, and its original length.

    Raises:
      ValueError: the vector does not match ``like``, is a block of several vectors, is zero, or is
        not finite.
    """
    block, single = trees.as_block(vector, like, what)
    if not single:
        raise ValueError(
            f"{what} is a block of {trees.count(block)} vectors; expected a single vector."
        )
    block, norms = trees.unit(block)
    (length,) = np.asarray(norms, float)
    if not (np.isfinite(length) and length > 0):
        why = "zero: it has no direction" if length == 0 else f"not finite, its norm is {length}"
        raise ValueError(f"{what} is {why}; expected a finite vector that is not zero.")
    return block, float(length)


def norm(vector: PyTree) -> float:
    """The Euclidean norm of a single vector."""
    return float(trees.norm(trees.as_single(vector))[0])


def components(eigenspace: Eigenspace, block: PyTree) -> np.ndarray:
    """The inner products q_i.v with one vector v, a block of one: (rank,) float64.

    Raises:
      ValueError: the eigenvectors are not orthonormal. Only if they are, the squares of the inner
        products add up to the squared norm of the projection. The function compares these two
        numbers, which costs as much as the inner products.
    """
    vectors = eigenspace.vectors
    values = gram(block, vectors)[0]
    projection = combine(chunks_of(vectors), values[None], trees.one_of(vectors))
    projected = float(trees.norm(projection)[0])
    expected = float(np.linalg.norm(values))
    if not abs(projected - expected) <= _ORTHONORMAL * expected:  # also true for NaN
        raise ValueError(
            f"eigenspace.vectors are not orthonormal: a projection of norm {expected:.6g} has norm "
            f"{projected:.6g} instead. Use the vectors that hd.top_eigenspace returned, or "
            "orthonormalize yours."
        )
    return values


def shares(parts: np.ndarray, whole: float) -> np.ndarray:
    """Cumulative shares of non-negative parts in their whole.

    They are at most 1, although rounding may make the sum of the parts larger than the whole.
    """
    return np.minimum(np.cumsum(parts) / whole, 1)
