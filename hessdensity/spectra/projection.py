"""One vector in an eigenspace: its direction, its components, and the shares of its square."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from hessdensity.vectors import trees as _trees

from .eigenspace import Eigenspace

PyTree = Any

_ORTHONORMAL = 1e-3  # far above the rounding of a float32 basis, far below what vectors of another making are off by


def one_vector(eigenspace: Eigenspace) -> PyTree:
    """Shapes and dtypes of one eigenvector."""
    if not isinstance(eigenspace, Eigenspace):
        raise TypeError(
            f"eigenspace is a {type(eigenspace).__name__}; expected what "
            "hd.top_eigenspace(operator, key, rank) gives."
        )
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), eigenspace.vectors
    )


def unit(vector: PyTree, like: PyTree, what: str) -> tuple[PyTree, float]:
    """(a vector at unit length, as a block of one; its length).

    Raises:
      ValueError: it is not like ``like``, or a block of several, or zero, or not finite.
    """
    block, single = _trees.as_block(vector, like, what)
    if not single:
        raise ValueError(
            f"{what} is a block of {jax.tree.leaves(block)[0].shape[0]} vectors; expected a single "
            "one."
        )
    (length,) = np.asarray(_norm(block), float)
    if not (np.isfinite(length) and length > 0):
        why = "zero: it has no direction" if length == 0 else f"not finite, its norm is {length}"
        raise ValueError(f"{what} is {why}; expected a finite vector that is not zero.")
    return _shrink(block, jnp.asarray(length, _trees.scalar_dtype(block))), float(length)


def norm(vector: PyTree) -> float:
    """The Euclidean norm of a single vector."""
    return float(_norm(jax.tree.map(lambda leaf: leaf[None], vector))[0])


def components(eigenspace: Eigenspace, block: PyTree) -> np.ndarray:
    """The inner products q_i.v with one vector, a block of one: (rank,) float64.

    Raises: ValueError: the eigenvectors are not orthonormal. The squares add up to the squared norm
      of the projection only
        if they are, and that is what is compared; it costs what the inner products did.
    """
    along = _components(eigenspace.vectors, block)
    values = np.asarray(along, float)
    projected, expected = (
        float(_projected_norm(eigenspace.vectors, along)),
        float(np.linalg.norm(values)),
    )
    if not abs(projected - expected) <= _ORTHONORMAL * expected:  # written so that a NaN is refused
        raise ValueError(
            f"eigenspace.vectors are not orthonormal: a projection of norm {expected:.6g} has "
            f"{projected:.6g}. Take them as hd.top_eigenspace gave them, or orthonormalise."
        )
    return values


def shares(parts: np.ndarray, whole: float) -> np.ndarray:
    """Non-negative parts, added up, of the whole that they are part of; rounding may make them a
    little more."""
    return np.minimum(np.cumsum(parts) / whole, 1)


# Compiled once for each number and shape of vectors: new parameters compile nothing.

_norm = jax.jit(_trees.norm)


@jax.jit
def _shrink(block: PyTree, length: jax.Array) -> PyTree:
    return jax.tree.map(lambda leaf: leaf / length.astype(leaf.dtype), block)


@jax.jit
def _components(vectors: PyTree, block: PyTree) -> jax.Array:
    return _trees.inner(
        vectors, jax.tree.map(lambda leaf, v: jnp.broadcast_to(v, leaf.shape), vectors, block)
    )


@jax.jit
def _projected_norm(vectors: PyTree, along: jax.Array) -> jax.Array:
    # A sum over the few eigenvectors: its length needs no bound.
    scaled = _trees.scale(vectors, along)
    return _trees.norm(jax.tree.map(lambda leaf: leaf.sum(0, keepdims=True), scaled))[0]
