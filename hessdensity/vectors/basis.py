"""Stored bases: orthonormal vectors in chunks of fixed size, on the device or on the host.

Layout of a chunk. Each leaf of a vector is cut into rows: its last axis, or pieces of its last axis
if that is long. In a chunk the c basis vectors alternate row by row: a leaf (..., row) becomes
(k, ..., c, row). When a chunk is multiplied with a vector, each row of that vector is read once for
all c basis vectors, from the nearest cache. This is four times as fast as reading one basis vector
after the other. On a mesh no axis is cut, so that every vector of a chunk keeps the shards of its
leaf.

Every kernel has the shape of a block or of a chunk, so that the number of compiled programs does
not grow with the basis. Arguments that a kernel consumes are donated, so that nothing is copied.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from . import sums, trees
from .trees import Block, Chunk, Vector

CHUNK = 8
"""Basis vectors in a chunk: few, because the unused ones of the last chunk are read and stored."""

STORAGES = ("device", "host", "none")
"""Where a basis is kept: on the device beside the vectors, in the host's memory, or nowhere."""

_HOST = "pinned_host"  # JAX's name for host memory that a device can read directly


class Basis(NamedTuple):
    """Orthonormal vectors, the same number for each of k probes.

    The basis of a single probe can be used for k vectors. With ``offload`` the full chunks stay in
    the host's memory and come to the device one at a time. The arithmetic and its order do not
    change, so the results are bit-identical with and without ``offload``.
    """

    chunks: tuple[Chunk, ...] = ()
    """Chunks of CHUNK vectors each; the vectors of the last chunk not yet filled are zero."""
    size: int = 0
    """The number of vectors of each probe."""
    offload: bool = False
    """Whether full chunks are kept in the host's memory."""

    def append(self, block: Block) -> Basis:
        """The basis with one more vector for each probe. It reuses the last chunk's memory."""
        size = int(self.size)  # an array, where the basis was saved and restored as a pytree
        row = size % CHUNK
        if row:
            chunks = (*self.chunks[:-1], write_row(self.chunks[-1], block, row))
        else:
            full = tuple(map(_to_host, self.chunks[-1:])) if self.offload else self.chunks[-1:]
            chunks = (*self.chunks[:-1], *full, first_row(block))
        return self._replace(chunks=chunks, size=size + 1)

    def extend(self, block: Block) -> Basis:
        """The basis of one probe with the k vectors of a block appended one after the other."""
        basis = self
        for index in range(trees.count(block)):
            basis = basis.append(trees.pick(block, index))
        return basis

    def combine(self, factors: np.ndarray, like: Vector) -> Block:
        """Linear combinations of one probe's vectors: k of them, from ``factors`` (k, size)."""
        return combine(self.chunks, factors, like)


def chunks_of(block: Block) -> Iterator[Chunk]:
    """The vectors of a block as the chunks of one probe, made one at a time."""
    for piece in trees.split(block, CHUNK):
        yield as_chunk(piece)


def coefficients(chunks: Iterable[Chunk], block: Block) -> np.ndarray:
    """Inner products of all basis vectors with each of k vectors: (k, CHUNK x chunks) float64.

    The chunks hold the basis of a single probe, which is used for all k vectors, or the bases of k
    probes, one for each vector.
    """
    parts = [np.asarray(inner_products(on_device(chunk), block), float) for chunk in chunks]
    return np.concatenate([np.zeros((trees.count(block), 0)), *parts], axis=1)


def combine(chunks: Iterable[Chunk], factors: np.ndarray, like: Vector) -> Block:
    """Linear combinations of the basis vectors of one probe: a block of k vectors.

    Args:
      chunks: the basis, in the order of its vectors. Chunks whose factors are all zero are not
        read.
      factors: (k, number of vectors).
      like: shapes, dtypes and shardings of one vector.
    """
    block = trees.zeros(like, factors.shape[0])
    for position, chunk in enumerate(chunks):
        part = factors[:, position * CHUNK : (position + 1) * CHUNK]
        if np.any(part):
            padded = np.pad(part, [(0, 0), (0, CHUNK - part.shape[1])])
            factor = jnp.asarray(-padded, trees.scalar_dtype(like))
            block = subtract_in_place(block, factor, on_device(chunk))
    return block


def on_device(chunk: Chunk) -> Chunk:
    """The chunk on its devices, moved there if it is stored on the host."""

    def fetch(leaf: jax.Array) -> jax.Array:
        on_host = leaf.sharding.memory_kind == _HOST
        return jax.device_put(leaf, leaf.sharding.with_memory_kind("device")) if on_host else leaf

    return jax.tree.map(fetch, chunk)


def _to_host(chunk: Chunk) -> Chunk:
    def put(leaf: jax.Array) -> jax.Array:
        return jax.device_put(leaf, leaf.sharding.with_memory_kind(_HOST))

    return jax.tree.map(put, chunk)


# The layout ---------------------------------------------------------------------------------------


def _in_rows(leaf: jax.Array) -> jax.Array:
    """A block's leaf as (k, ..., row): its last axis, split if it is long."""
    if leaf.ndim == 1:
        return leaf[:, None]
    length = leaf.shape[-1]
    splits = length > sums.LONGEST and sums.num_devices(leaf) == 1
    factor = sums.factor_of(length) if splits else None
    return leaf if factor is None else leaf.reshape(*leaf.shape[:-1], length // factor, factor)


def _in_rows_of(basis: jax.Array, leaf: jax.Array) -> jax.Array:
    """A block's leaf cut into the same rows as a chunk's leaf."""
    return leaf.reshape(leaf.shape[0], *basis.shape[1:-2], basis.shape[-1])


@jax.jit
def first_row(block: Block) -> Chunk:
    """A new chunk: the block holds each probe's first vector, and the other vectors are zero."""

    def make(leaf: jax.Array) -> jax.Array:
        first = jnp.expand_dims(_in_rows(leaf), -2)
        axis = first.ndim - 2
        return jnp.pad(first, [(0, CHUNK - 1 if i == axis else 0) for i in range(first.ndim)])

    return jax.tree.map(make, block)


@partial(jax.jit, donate_argnums=0)
def write_row(chunk: Chunk, block: Block, row: jax.Array | int) -> Chunk:
    """The chunk with basis vector number ``row`` of each probe taken from the block."""

    def write(basis: jax.Array, leaf: jax.Array) -> jax.Array:
        rows = jnp.expand_dims(_in_rows_of(basis, leaf), -2)
        return lax.dynamic_update_slice_in_dim(basis, rows, row, axis=basis.ndim - 2)

    return jax.tree.map(write, chunk, block)


@jax.jit
def as_chunk(block: Block) -> Chunk:
    """Up to CHUNK vectors as one chunk of one probe, padded with zero vectors."""

    def stack(leaf: jax.Array) -> jax.Array:
        rows = jnp.moveaxis(_in_rows(leaf), 0, -2)[None]
        missing = CHUNK - leaf.shape[0]
        axis = rows.ndim - 2
        return jnp.pad(rows, [(0, missing if i == axis else 0) for i in range(rows.ndim)])

    return jax.tree.map(stack, block)


# The two kernels that read a chunk ----------------------------------------------------------------


@jax.jit
def inner_products(chunk: Chunk, block: Block) -> jax.Array:
    """Inner products of each probe's basis vectors with its own vector: (k, c), on the device.

    Each row gives one small matrix-vector product, and these are added up. So no partial sum is
    longer than a row, or than the number of rows. On a mesh the sum is taken as for all inner
    products (`hessdensity.vectors.sums`): only the coefficients leave a device. A chunk of one
    probe is used for all k vectors.
    """

    def products(basis: jax.Array, rows: jax.Array) -> jax.Array:
        if sums.num_devices(basis) > 1:
            return sums.sum_products(basis, jnp.expand_dims(rows, -2), -2)
        axis = rows.ndim - 1
        batch = tuple(range(axis))
        contracted = (((axis + 1,), (axis,)), (batch, batch))
        by_row = lax.dot_general(basis, rows, contracted, precision=lax.Precision.HIGHEST)
        return by_row.sum(batch)

    dtype = trees.scalar_dtype(block)
    parts = []
    for basis, leaf in zip(jax.tree.leaves(chunk), jax.tree.leaves(block), strict=True):
        rows = _in_rows_of(basis, leaf)
        shared = basis.shape[0] != rows.shape[0]
        each = jax.vmap(products, in_axes=(None if shared else 0, 0))
        parts.append(each(basis[0] if shared else basis, rows).astype(dtype))
    return functools.reduce(jnp.add, parts)


def subtract_combination(block: Block, factors: jax.Array, chunk: Chunk) -> Block:
    """The block minus the sum over c of factors[:, c] * basis vector c.

    The loop over the c basis vectors is unrolled into one fused elementwise pass, which runs at the
    speed of memory and keeps the sharding of the leaves.
    """

    def subtract(leaf: jax.Array, basis: jax.Array) -> jax.Array:
        # Without the barriers XLA would compute, for every element, its position in the leaf.
        rows = lax.optimization_barrier(_in_rows_of(basis, leaf))
        for index in range(factors.shape[1]):
            rows = rows - basis[..., index, :] * trees.column(factors[:, index], rows)
        return lax.optimization_barrier(rows).reshape(leaf.shape)

    return jax.tree.map(subtract, block, chunk)


subtract_in_place = partial(jax.jit, donate_argnums=0)(subtract_combination)
