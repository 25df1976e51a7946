"""Gram-Schmidt against a stored basis, for k independent vectors and for a block.

One sweep is `project_out`. `orthogonalize` repeats it for k probes that know nothing of each other
(the three-term recurrence); `orthonormalize` also makes a block orthonormal in itself (the block
recurrence, and trace estimates).
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

_DEPENDENT = 0.01  # an eigenvalue of the Gram matrix of unit vectors below it: they are dependent
_CONVERGED = 1e-3  # what a sweep changes, after which the next one would change rounding alone
_MOST_SWEEPS = 10  # two are the rule; four were seen where vectors were random stand-ins


def project_out(block: Block, chunks: Iterable[Chunk]) -> tuple[Block, np.ndarray]:
    """One Gram-Schmidt sweep: b - Q (Q^T b), chunk by chunk. The block's memory is taken over.

    Each chunk is read for its coefficients and for what it takes away before the next one, so that
    a chunk that waits on the host is moved once. Within a chunk that is classical Gram-Schmidt,
    from chunk to chunk the modified one, which is no worse.

    Returns:
      The block less its parts along all basis vectors; those parts, (k, CHUNK x chunks) float64.
    """
    parts = [np.zeros((trees.count(block), 0))]
    for chunk in chunks:
        near = bases.on_device(chunk)
        along = bases.inner_products(near, block)
        block = bases.subtract_in_place(block, along, near)
        parts.append(along)
    return block, np.concatenate([np.asarray(part, float) for part in parts], axis=1)


def orthogonalize(block: Block, chunks: Sequence[Chunk]) -> tuple[Block, np.ndarray, np.ndarray]:
    """k independent vectors less their parts along a basis, by sweeps repeated where they cancel.

    A vector that comes in almost orthogonal, as the recurrence leaves it, needs one sweep: what is
    left along the basis is one rounding unit of its norm. Only a sweep that takes away much of the
    norm leaves a residual that is not small beside what remains, and then it is done again (Daniel,
    Gragg, Kaufman and Stewart 1976). That halves the reading of the basis.

    Returns:
      The block; (k,) norms of what the first sweep took away; (k,) norms of what is left.
    """
    before, removed = np.asarray(trees.norm(block)), None
    while True:
        block, parts = project_out(block, chunks)
        after = np.asarray(trees.norm(block))
        if removed is None:
            removed = np.linalg.norm(parts, axis=1)
        # A vector of the span shrinks by a rounding unit in each sweep, until it is zero.
        settled = (after > before / 2) | (after <= np.finfo(after.dtype).tiny)
        if np.all(settled) or not np.all(np.isfinite(after)):
            return block, removed, after
        before = after


def orthogonalize_locally(
    block: Block, vectors: Block, previous: Block
) -> tuple[Block, np.ndarray, np.ndarray]:
    """As `orthogonalize`, against the last two vectors of each probe alone."""
    block, removed, left = _orthogonalize_locally(block, vectors, previous)
    return block, np.asarray(removed, float), np.asarray(left)


@partial(jax.jit, donate_argnums=0)
def _orthogonalize_locally(
    block: Block, vectors: Block, previous: Block
) -> tuple[Block, jax.Array, jax.Array]:
    removed = jnp.zeros(())
    for other in (vectors, previous):
        along = trees.inner(block, other)
        block, removed = trees.subtract(block, along, other), jnp.hypot(removed, along)
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
    """An orthonormal basis W, orthogonal to Q, of what Q leaves of p given vectors.

    The given vectors are sum over j of b_j factors[j], the b_j being the block's unit vectors. With
    Q the basis,

        given vectors = Q along + W remainder,    W^T W = I,    Q^T W = 0.

    Each sweep is classical Gram-Schmidt against Q, then a change to the eigenvectors of the block's
    own Gram matrix B^T B = U S U^T: W = B U S^(-1/2) (Stathopoulos and Wu 2002). Not a QR
    factorization, which needs one more reduction for each vector. A direction of negligible length
    is rounding: a random one takes its place, with length 0, so that exhausted Krylov spaces are
    left by themselves.

    Args:
      block: k unit vectors, or zeros. Its memory is taken over.
      basis: Q, of one probe.
      factors: (k, p).
      negligible: length, in the units of ``factors``, up to which a direction is rounding.
      room: dimensions that Q leaves. The strongest directions are kept where it has fewer than k.
      draw: from a number to as many random unit vectors.

    Returns:
      W; remainder, (vectors of W, p); along, (size of Q, p).
    """
    remainder, along = factors, np.zeros((basis.size, factors.shape[1]))
    epsilon, dtype = trees.epsilon(block), trees.scalar_dtype(block)
    for sweep in range(_MOST_SWEEPS):
        if sweep and remainder.shape[0] > room:
            lengths = np.linalg.norm(remainder, axis=1)
            strongest = np.sort(np.argsort(-lengths, kind="stable")[:room])
            block = jax.tree.map(lambda leaf, rows=strongest: leaf[rows], block)
            remainder = remainder[strongest]
        if not remainder.size:
            break
        dead = np.linalg.norm(remainder, axis=1) <= negligible
        if np.any(dead):
            block = _replace(block, jnp.asarray(dead), draw(dead.size))
            remainder = np.where(dead[:, None], 0.0, remainder)
        # B <- B - Q (Q^T B), and what was taken away belongs to `along`.
        block, removed = project_out(block, basis.chunks)
        removed = removed[:, : basis.size]
        along += removed.T @ remainder
        block, norms = trees.unit(block)
        # B^T B = U S U^T. The floor keeps a direction that rounding has made up from growing.
        gram = np.asarray(_gram(block), float)
        squares, axes = np.linalg.eigh(gram)
        root = np.sqrt(np.maximum(squares, dead.size * epsilon))
        change = max(np.abs(removed).max(initial=0), np.abs(gram - np.eye(dead.size)).max())
        # The symmetric root U S^(-1/2) U^T where the block is far from dependent: it does not
        # depend on the signs or turns of eigenvectors, which another machine may choose otherwise.
        # Else U S^(-1/2), which singles out the directions that the block does not have.
        turn = axes if squares.min(initial=1) > _DEPENDENT else np.eye(dead.size)
        block = _rotate(block, jnp.asarray(turn / root @ axes.T, dtype))
        lengths = np.asarray(norms, float)[:, None]
        remainder = turn * root @ axes.T @ (lengths * remainder)
        if change < _CONVERGED:
            break
    return block, remainder, along


@jax.jit
def _gram(block: Block) -> jax.Array:
    """Inner products of a block's vectors with each other, (k, k)."""
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
    """Vectors of the other block where ``where`` (k,) is true."""
    return jax.tree.map(lambda x, y: jnp.where(trees.column(where, x) > 0, y, x), block, other)
