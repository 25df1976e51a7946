"""Orthogonalisation against a basis in chunks, wherever the chunks are kept.

Three tiers of memory. "device": the chunks lie beside the vectors, sharded as they are. "host":
full chunks wait in the host's memory and come to the device one at a time. "none": there is no
basis, and only the last two vectors are orthogonalised against. The first two do the same
arithmetic in the same order, so that they agree bit for bit."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from . import chunks as _basis
from . import trees as _trees

PyTree = Any

CHUNK = 8
"""Basis vectors a chunk: few, because the last chunk is read whole, and zeros take memory."""

TIERS = ("device", "host", "none")
_HOST = "pinned_host"  # JAX's name of the memory that a device can read by itself


class Basis(NamedTuple):
    """Orthonormal vectors of one probe, in chunks."""

    chunks: tuple[PyTree, ...]
    """CHUNK vectors each, the last ones of the last chunk being zero."""
    size: int
    """How many they are."""
    norm: float = 0.0
    """The operator's, as far as it is known: what is small beside it is rounding, in their
    complement too."""


def orthogonalise(
    block: PyTree, chunks: tuple[PyTree, ...]
) -> tuple[PyTree, np.ndarray, np.ndarray]:
    """Gram-Schmidt against all chunks, one after the other, repeated where it cancelled.

    A block that comes in almost orthogonal, as the recurrence leaves it, needs one pass: what is
    left is one rounding unit of its norm. Only a pass that takes away much of the norm leaves a
    residual that is not small beside what remains, and then it is done again (Daniel, Gragg,
    Kaufman and Stewart 1976), which halves the reading of the basis.

    Returns:
      The block, the norms of what the first pass took away, the norms of what is left.
    """
    before, removed = np.asarray(norm(block)), None
    while True:
        block, coefficients = project_out(block, chunks)
        after = np.asarray(norm(block))
        if removed is None:
            removed = np.linalg.norm(coefficients, axis=1)
        # A vector of the span shrinks by a rounding unit a pass, until it is zero.
        if np.all((after > before / 2) | (after <= np.finfo(after.dtype).tiny)) or not np.all(
            np.isfinite(after)
        ):
            return block, removed, after
        before = after


def project_out(block: PyTree, chunks: Sequence[PyTree]) -> tuple[PyTree, np.ndarray]:
    """(the block less its parts along all basis vectors, those parts (k, CHUNK times the chunks) in
    float64).

    Chunk by chunk, each read for its coefficients and for what it takes away before the next: one
    that waits on the host is moved once. Within a chunk that is classical Gram-Schmidt, from chunk
    to chunk the modified one, which is no worse."""
    parts = []
    for chunk in chunks:
        near = on_device(chunk)
        parts.append(_coefficients(near, block))
        block = _basis.subtract_in_place(block, parts[-1], near)
    count = jax.tree.leaves(block)[0].shape[0]
    return block, np.concatenate(
        [np.zeros((count, 0)), *(np.asarray(part, float) for part in parts)], axis=1
    )


def orthogonalise_locally(
    block: PyTree, vectors: PyTree, previous: PyTree
) -> tuple[PyTree, np.ndarray, np.ndarray]:
    """As `orthogonalise`, against the last two vectors alone."""
    block, removed, left = _orthogonalise_locally(block, vectors, previous)
    return block, np.asarray(removed, float), np.asarray(left)


def append(
    basis: tuple[PyTree, ...], vectors: PyTree, position: int, offload: bool
) -> tuple[PyTree, ...]:
    """The basis with one more vector for each probe, in the last chunk's memory or in a new
    chunk's.

    The chunk that a new one follows is full; with ``offload`` it goes to the host's memory then.
    """
    row = position % CHUNK
    if row:
        return (*basis[:-1], _write_row(basis[-1], vectors, row))
    if offload:
        basis = (*basis[:-1], *map(_to_host, basis[-1:]))
    return (*basis, _first_row(vectors))


def as_chunks(block: PyTree) -> tuple[PyTree, ...]:
    """The vectors of a block as the chunks of one probe."""
    return tuple(_as_chunk(piece) for piece in _trees.split(block, CHUNK))


def _to_host(chunk: PyTree) -> PyTree:
    return jax.tree.map(
        lambda leaf: jax.device_put(leaf, leaf.sharding.with_memory_kind(_HOST)), chunk
    )


def on_device(chunk: PyTree) -> PyTree:
    """The chunk where its vectors are, from wherever it is kept."""

    def fetch(leaf: jax.Array) -> jax.Array:
        away = leaf.sharding.memory_kind == _HOST
        return jax.device_put(leaf, leaf.sharding.with_memory_kind("device")) if away else leaf

    return jax.tree.map(fetch, chunk)


# The compiled kernels. Every one has the shape of a block or of a chunk, so that their number does
# not grow with the steps; consumed arguments are donated, so that nothing is copied.

norm = jax.jit(_trees.norm)
_coefficients = jax.jit(_basis.coefficients)
_first_row = jax.jit(partial(_basis.chunk, rows=CHUNK))
_write_row = partial(jax.jit, donate_argnums=0)(_basis.write_row)


@partial(jax.jit, donate_argnums=0)
def _orthogonalise_locally(
    block: PyTree, vectors: PyTree, previous: PyTree
) -> tuple[PyTree, jax.Array, jax.Array]:
    removed = jnp.zeros(())
    for other in (vectors, previous):
        along = _trees.inner(block, other)
        block, removed = _trees.subtract(block, along, other), jnp.hypot(removed, along)
    return block, removed, _trees.norm(block)


@jax.jit
def _as_chunk(vectors: PyTree) -> PyTree:
    """Up to CHUNK vectors as the chunk of one probe."""
    first = jax.tree.map(lambda leaf: leaf[:1], vectors)
    result = _basis.chunk(first, CHUNK)
    for row in range(1, jax.tree.leaves(vectors)[0].shape[0]):
        result = _basis.write_row(
            result, jax.tree.map(lambda leaf, row=row: leaf[row : row + 1], vectors), row
        )
    return result
