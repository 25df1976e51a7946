"""Hashes that identify arrays, and that do not depend on how the arrays are sharded."""

from __future__ import annotations

import hashlib

import jax
import jax.numpy as jnp
from jax import lax

from . import trees
from .trees import PyTree


def signature(tree: PyTree) -> list[str]:
    """Name, dtype and shape of every leaf, as text."""
    return [
        f"{name} {x.dtype}{list(x.shape)}"
        for name, x in zip(trees.paths(tree), jax.tree.leaves(tree), strict=True)
    ]


def fingerprint(tree: PyTree) -> str:
    """A hash of all values, shapes and names, which does not depend on sharding.

    The values enter as sums of integers. Integer addition is associative, so the order in which
    devices add up does not matter.
    """
    tree = jax.tree.map(jnp.asarray, tree)
    leaves = jax.tree.leaves(tree)
    sums = [int(_hash_leaf(leaf)) for leaf in leaves]
    return hashlib.sha256(repr((signature(tree), sums)).encode()).hexdigest()[:16]


@jax.jit
def _hash_leaf(leaf: jax.Array) -> jax.Array:
    """The sum over all entries of a 32-bit hash of the entry's bits and position."""
    leaf = jax.random.key_data(leaf) if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf
    leaf = leaf.astype(jnp.uint8) if leaf.dtype == bool else leaf
    bits = lax.bitcast_convert_type(
        leaf, {1: jnp.uint8, 2: jnp.uint16}.get(leaf.dtype.itemsize, jnp.uint32)
    )
    bits = bits.astype(jnp.uint32)
    position = lax.iota(jnp.uint32, bits.size).reshape(bits.shape)
    mixed = (bits ^ (position * jnp.uint32(0x9E3779B9))) * jnp.uint32(0x85EBCA6B)
    return jnp.sum(mixed ^ (mixed >> 15), dtype=jnp.uint32)
