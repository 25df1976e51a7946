"""Sums over the entries of arrays whose rounding does not grow with their number, nor their
communication.

Precision. A float32 sum of n = 1e6 terms of one sign loses 2e-5 when accumulated naively, and that
becomes the loss of orthogonality of a Lanczos basis. Here a reduction goes one axis at a time and
no axis is longer than ``LONGEST``, so that its error does not grow with n.

Communication. Where a sharded axis is summed, XLA adds up over the devices there and then: axis by
axis, that would send whole arrays of partial sums. Which axes are sharded is not known while a
function is traced, but on how many devices the array lies is. An axis is cut into as many pieces as
it could have shards, and the sums within the pieces, which need no other device, come first. Those
over the pieces come last, all axes at once: only their result travels."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jax import lax

LONGEST = 1024


def num_devices(array: jax.Array) -> int:
    """How many devices the array's mesh has, known while it is traced too; 1 without a mesh."""
    return max(jax.typeof(array).sharding.mesh.size, 1)


def sum_products(x: jax.Array, y: jax.Array, keep: int) -> jax.Array:
    """Sum of x * y over all axes but one.

    Not a matrix-vector product, which reads memory twice as fast but accumulates naively: 2e-5 at n
    = 1e6 against 1e-7."""
    if (devices := num_devices(x)) == 1:
        return _bounded_sum(jnp.moveaxis(x, keep, 0), jnp.moveaxis(y, keep, 0))
    product = x * y
    axes = [axis for axis in range(product.ndim) if axis != keep % product.ndim]
    for axis in reversed(axes):
        product = _sum_pieces(product, axis, math.gcd(product.shape[axis], devices))
    return product.sum(axes)


def _bounded_sum(x: jax.Array, y: jax.Array) -> jax.Array:
    """Sum of x * y over all axes but the first, in stages of at most ``LONGEST`` terms.

    Not a plain sum: XLA would merge the stages of a reshaped axis into one naive sum, but for the
    barrier."""
    for axis in range(1, x.ndim):
        length = x.shape[axis]
        if length <= LONGEST:
            continue
        factor = factor_of(length)
        if factor is None:
            padding = [(0, -length % LONGEST if i == axis else 0) for i in range(x.ndim)]
            product = jnp.moveaxis(jnp.pad(x * y, padding), axis, -1)
            staged = product.reshape(*product.shape[:-1], -1, LONGEST).sum(-2)
            return _bounded_sum(staged, jnp.ones_like(staged))
        split = (length // factor, factor)
        x, y = (z.reshape(*z.shape[:axis], *split, *z.shape[axis + 1 :]) for z in (x, y))
        return _bounded_sum(lax.optimization_barrier(x), y)
    product = x * y
    for _ in range(1, product.ndim):
        product = product.sum(-1)
    return product


def _sum_pieces(terms: jax.Array, axis: int, count: int) -> jax.Array:
    """Sums over each of ``count`` equal pieces of an axis, in stages of at most ``LONGEST`` terms.

    The barrier is on the sums and not on the terms, which need then not be in memory.
    """
    before, after, length = terms.shape[:axis], terms.shape[axis + 1 :], terms.shape[axis] // count
    terms = terms.reshape(*before, count, length, *after)
    while length > LONGEST:
        factor = factor_of(length)
        if factor is None:
            factor = LONGEST
            terms = jnp.pad(
                terms, [(0, -length % factor if i == axis + 1 else 0) for i in range(terms.ndim)]
            )
        length = terms.shape[axis + 1] // factor
        terms = lax.optimization_barrier(
            terms.reshape(*before, count, length, factor, *after).sum(axis + 2)
        )
    return terms.sum(axis + 1)


def factor_of(length: int) -> int | None:
    """The largest divisor of a long axis by which to split it, or None."""
    return max((factor for factor in range(32, LONGEST + 1) if length % factor == 0), default=None)
