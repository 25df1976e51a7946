"""Chunks of a Lanczos basis: c vectors for each of k probes, laid out for the speed of memory.

A leaf of a vector is cut into rows: its last axis, or pieces of it where that is long. In a chunk
the basis vectors alternate row by row, (k, ..., c, row) for a leaf (..., row). A row of the vector
that they are multiplied with is then read once for all of them, from the nearest cache: four times
as fast as one basis vector after the other. On a mesh no axis is cut, so that every vector of a
chunk keeps the shards of the leaf."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from . import sums as _sums
from . import trees as _trees

PyTree = Any


def _in_rows(leaf: jax.Array) -> jax.Array:
    """A block's leaf with its last axis split where it is long: (k, ..., row)."""
    if leaf.ndim == 1:
        return leaf[:, None]
    length = leaf.shape[-1]
    factor = (
        _sums.factor_of(length) if length > _sums.LONGEST and _sums.num_devices(leaf) == 1 else None
    )
    return leaf if factor is None else leaf.reshape(*leaf.shape[:-1], length // factor, factor)


def _in_rows_of(basis: jax.Array, leaf: jax.Array) -> jax.Array:
    """A block's leaf in the rows of a chunk's."""
    return leaf.reshape(leaf.shape[0], *basis.shape[1:-2], basis.shape[-1])


def chunk(block: PyTree, rows: int) -> PyTree:
    """Room for ``rows`` basis vectors a probe, the block being the first and the others zero."""

    def make(leaf: jax.Array) -> jax.Array:
        first = jnp.expand_dims(_in_rows(leaf), -2)
        return jnp.pad(
            first, [(0, rows - 1 if axis == first.ndim - 2 else 0) for axis in range(first.ndim)]
        )

    return jax.tree.map(make, block)


def stack(block: PyTree) -> PyTree:
    """The vectors of a block as one full chunk of one probe."""
    return jax.tree.map(lambda leaf: jnp.moveaxis(_in_rows(leaf), 0, -2)[None], block)


def write_row(chunk: PyTree, block: PyTree, row: jax.Array | int) -> PyTree:
    """The chunk with the block as its basis vector number ``row``."""

    def write(basis: jax.Array, leaf: jax.Array) -> jax.Array:
        rows = jnp.expand_dims(_in_rows_of(basis, leaf), -2)
        return lax.dynamic_update_slice_in_dim(basis, rows, row, axis=basis.ndim - 2)

    return jax.tree.map(write, chunk, block)


def coefficients(chunk: PyTree, block: PyTree) -> jax.Array:
    """Inner products of each probe's basis vectors with its own vector, (k, c); a chunk of one
    probe serves all.

    Row by row, one small matrix-vector product each, and their sum: no partial sum is longer than a
    row, or than the number of rows. On a mesh as all inner products: only the coefficients leave a
    device."""

    def products(basis: jax.Array, rows: jax.Array) -> jax.Array:
        if _sums.num_devices(basis) > 1:
            return _sums.sum_products(basis, jnp.expand_dims(rows, -2), -2)
        axis, batch = rows.ndim - 1, tuple(range(rows.ndim - 1))
        sums = lax.dot_general(
            basis, rows, (((axis + 1,), (axis,)), (batch, batch)), precision=lax.Precision.HIGHEST
        )
        return sums.sum(batch)

    dtype, parts = _trees.scalar_dtype(block), []
    for basis, leaf in zip(jax.tree.leaves(chunk), jax.tree.leaves(block), strict=True):
        rows = _in_rows_of(basis, leaf)
        shared = basis.shape[0] != rows.shape[0]
        part = jax.vmap(products, in_axes=(None if shared else 0, 0))(
            basis[0] if shared else basis, rows
        )
        parts.append(part.astype(dtype))
    return functools.reduce(jnp.add, parts)


def subtract_combination(block: PyTree, coefficients: jax.Array, chunk: PyTree) -> PyTree:
    """Block minus the sum over c of coefficients[:, c] * basis vector c.

    Unrolled over the c basis vectors: one fused elementwise pass at the speed of memory, sharded as
    the leaves are."""

    def combine(leaf: jax.Array, basis: jax.Array) -> jax.Array:
        # The barriers keep XLA from computing, for every element, where it stands in the leaf.
        rows = lax.optimization_barrier(_in_rows_of(basis, leaf))
        for index in range(coefficients.shape[1]):
            rows = rows - basis[..., index, :] * _trees.column(coefficients[:, index], rows)
        return lax.optimization_barrier(rows).reshape(leaf.shape)

    return jax.tree.map(combine, block, chunk)


def combine(chunks: Iterable[PyTree], coefficients: np.ndarray, like: PyTree) -> PyTree:
    """Linear combinations of the basis vectors of one probe: a block of k vectors from coefficients
    (k, size)."""
    block = _trees.zeros(like, coefficients.shape[0])
    for position, chunk in enumerate(chunks):
        rows = jax.tree.leaves(chunk)[0].shape[-2]
        part = coefficients[:, position * rows : (position + 1) * rows]
        if np.any(part):
            padded = np.pad(part, [(0, 0), (0, rows - part.shape[1])])
            block = subtract_in_place(block, jnp.asarray(-padded, _trees.scalar_dtype(like)), chunk)
    return block


subtract_in_place = partial(jax.jit, donate_argnums=0)(subtract_combination)
