"""Gram-Schmidt against a stored basis, for k independent vectors and for a block.

One sweep is `project_out`. `orthogonalize` repeats it for k independent probes, as the three-term
recurrence needs. `orthonormalize` also makes the vectors of a block orthonormal to each other, as
the block recurrence and the trace estimates need.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from . import basis as bases
from . import trees
from .basis import Basis
from .trees import Block, Chunk

_DEPENDENT = 0.01  # unit vectors whose Gram matrix has an eigenvalue below this are dependent
_MOST_SWEEPS = 10  # usually two are enough; four were seen where random vectors had replaced some


def project_out(block: Block, chunks: Iterable[Chunk]) -> tuple[Block, np.ndarray]:
    """One Gram-Schmidt sweep: b - Q (Q^T b), chunk by chunk. The block's memory is reused.

    The coefficients of a chunk are computed and subtracted before the next chunk is read, so that a
    chunk stored on the host is moved only once. This is classical Gram-Schmidt within a chunk, and
    modified Gram-Schmidt from chunk to chunk, which is no less accurate.

    Returns:
      The block minus its components along all basis vectors; the coefficients of these components,
      (k, CHUNK x chunks) float64.
    """
    parts = [np.zeros((trees.count(block), 0))]
    for chunk in chunks:
        loaded = bases.on_device(chunk)
        along = bases.inner_products(loaded, block)
        block = bases.subtract_in_place(block, along, loaded)
        parts.append(along)
    return block, np.concatenate([np.asarray(part, float) for part in parts], axis=1)


def orthogonalize(block: Block, chunks: Sequence[Chunk]) -> tuple[Block, np.ndarray, np.ndarray]:
    """Make k independent vectors orthogonal to a basis, repeating sweeps that remove much.

    One sweep leaves a component along the basis of about one rounding unit of the vector's norm
    before the sweep. For a vector that is already almost orthogonal, as the recurrence produces it,
    that is enough. Only if the sweep removes much of the norm is this component not small compared
    with the vector that remains. Then the sweep is repeated (Daniel, Gragg, Kaufman and Stewart
    1976). This test halves the reading of the basis.

    Returns:
      The block; norms (k,) of the components that the first sweep removed; norms (k,) of the
      vectors that remain.
    """
    before = np.asarray(trees.norm(block))
    removed = None
    while True:
        block, parts = project_out(block, chunks)
        after = np.asarray(trees.norm(block))
        if removed is None:
            removed = np.linalg.norm(parts, axis=1)
        # Each sweep multiplies the norm of a vector in the span of the basis by about one rounding
        # unit. The second condition ends the sweeps when such a vector is zero.
        settled = (after > before / 2) | (after <= np.finfo(after.dtype).tiny)
        if np.all(settled) or not np.all(np.isfinite(after)):
            return block, removed, after
        before = after


def orthogonalize_locally(
    block: Block, vectors: Block, previous: Block
) -> tuple[Block, np.ndarray, np.ndarray]:
    """Like `orthogonalize`, but only against the last two vectors of each probe."""
    block, removed, left = _orthogonalize_locally(block, vectors, previous)
    return block, np.asarray(removed, float), np.asarray(left)


@partial(jax.jit, donate_argnums=0)
def _orthogonalize_locally(
    block: Block, vectors: Block, previous: Block
) -> tuple[Block, jax.Array, jax.Array]:
    removed = jnp.zeros(())
    for other in (vectors, previous):
        along = trees.inner(block, other)
        block = trees.subtract(block, along, other)
        removed = jnp.hypot(removed, along)
    return block, removed, trees.norm(block)


def orthonormalize(
    block: Block,
    basis: Basis,
    factors: np.ndarray,
    *,
    negligible: float,
    room: int,
    draw: Callable[[int], Block],
) -> tuple[Block, np.ndarray, np.ndarray]:
    """Orthonormal basis W of the parts of p given vectors that are orthogonal to a basis Q.

    The given vectors are the sums over j of b_j factors[j], where b_j are the unit vectors of the
    block. They are decomposed into

        given vectors = Q along + W remainder,    W^T W = I,    Q^T W = 0.

    Each sweep first applies Gram-Schmidt against Q (`project_out`). Then it orthonormalizes the
    block B by the eigenvectors of its Gram matrix B^T B = U S U^T: W = B U S^(-1/2) (Stathopoulos
    and Wu 2002). A QR factorization would need one more reduction for each vector. A direction of
    negligible length is rounding error. A random direction of length 0 replaces it, so that the
    recurrence leaves an exhausted Krylov space without further provision.

    Args:
      block: k unit vectors, or zeros. Its memory is reused.
      basis: Q, of one probe.
      factors: (k, p).
      negligible: length, in the units of ``factors``, up to which a direction is rounding error.
      room: dimension of the orthogonal complement of Q. If it is less than k, only that many of
        the longest directions are kept.
      draw: returns the given number of random unit vectors.

    Returns:
      W; remainder, (number of vectors in W, p); along, (size of Q, p).
    """
    remainder = factors
    along = np.zeros((basis.size, factors.shape[1]))
    fresh = np.zeros(len(factors), bool)  # random vectors that replace negligible directions
    epsilon, dtype = trees.epsilon(block), trees.scalar_dtype(block)
    rotated = False  # only then are the longest directions those that hold the most
    for _ in range(_MOST_SWEEPS):
        if rotated and len(remainder) > room:
            lengths = np.linalg.norm(remainder, axis=1)
            longest = np.sort(np.argsort(-lengths, kind="stable")[:room])
            block = jax.tree.map(lambda leaf, rows=longest: leaf[rows], block)
            remainder, fresh = remainder[longest], fresh[longest]
        if not remainder.size:
            break
        # B <- B - Q (Q^T B), at unit length. The components removed are added to `along`.
        block, removed = project_out(block, basis.chunks)
        removed = removed[:, : basis.size]
        along += removed.T @ remainder
        block, norms = trees.unit(block)
        remainder = np.asarray(norms, float)[:, None] * remainder
        # With its length, so that rounding error at unit length does not pass for a direction.
        negligible_now = (np.linalg.norm(remainder, axis=1) <= negligible) & ~fresh
        if np.any(negligible_now):
            block = _replace(block, jnp.asarray(negligible_now), draw(len(remainder)))
            remainder = np.where(negligible_now[:, None], 0.0, remainder)
            fresh |= negligible_now
            continue  # the random vectors have components along Q
        # B^T B = U S U^T
        gram = np.asarray(_gram(block), float)
        inverse_root, root, symmetric = _roots(gram, epsilon)
        block = _rotate(block, jnp.asarray(inverse_root, dtype))
        rotated = True
        remainder = root @ remainder
        fresh &= symmetric  # otherwise each new vector is a combination of all
        # The correction is of second order in the change: after a small one rounding error is left.
        change = max(np.abs(removed).max(initial=0), np.abs(gram - np.eye(len(gram))).max())
        if change < np.sqrt(epsilon):
            break
    return block, remainder, along


def _roots(gram: np.ndarray, epsilon: float) -> tuple[np.ndarray, np.ndarray, bool]:
    """(an inverse square root of a Gram matrix, its inverse, whether both are symmetric).

    The symmetric root U S^(-1/2) U^T if the vectors are far from dependent. It does not depend on
    the signs or rotations of the eigenvectors, which another machine may choose differently.
    Otherwise S^(-1/2) U^T, which isolates the directions that the vectors lack.
    """
    squares, axes = np.linalg.eigh(gram)
    # The floor on S keeps rounding error from being scaled to length 1.
    root = np.sqrt(np.maximum(squares, len(gram) * epsilon))
    symmetric = bool(squares.min() > _DEPENDENT)
    rotation = axes if symmetric else np.eye(len(gram))
    return rotation / root @ axes.T, rotation * root @ axes.T, symmetric


@jax.jit
def _gram(block: Block) -> jax.Array:
    """Inner products of a block's vectors with each other: (k, k)."""
    count = trees.count(block)
    parts = [bases.inner_products(chunk, block) for chunk in bases.chunks_of(block)]
    return jnp.concatenate(parts, axis=1)[:, :count]


@jax.jit
def _rotate(block: Block, factors: jax.Array) -> Block:
    """Vector i of the result is the sum over j of factors[i, j] * vector j."""
    total = jax.tree.map(jnp.zeros_like, block)
    for position, chunk in enumerate(bases.chunks_of(block)):
        part = factors[:, position * bases.CHUNK : (position + 1) * bases.CHUNK]
        total = bases.subtract_combination(total, -part, chunk)
    return total


@jax.jit
def _replace(block: Block, where: jax.Array, other: Block) -> Block:
    """The block with the vectors where ``where`` (k,) is true taken from the other block."""
    return jax.tree.map(lambda x, y: jnp.where(trees.column(where, x) > 0, y, x), block, other)
