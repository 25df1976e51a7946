"""Which arrays are these? The same answer however they are sharded."""

from __future__ import annotations

import hashlib

import jax
import jax.numpy as jnp
from jax import lax

from . import trees
from .trees import PyTree


def signature(tree: PyTree) -> list[str]:
    """Name, dtype and shape of every leaf, in words."""
    return [
        f"{name} {x.dtype}{list(x.shape)}"
        for name, x in zip(trees.paths(tree), jax.tree.leaves(tree), strict=True)
    ]


def fingerprint(tree: PyTree) -> str:
    """A hash of all values, shapes and names, the same however the arrays are sharded: integer sums
    associate."""
    tree = jax.tree.map(jnp.asarray, tree)
    leaves = jax.tree.leaves(tree)
    sums = [int(_hash_leaf(leaf)) for leaf in leaves]
    return hashlib.sha256(repr((signature(tree), sums)).encode()).hexdigest()[:16]


@jax.jit
def _hash_leaf(leaf: jax.Array) -> jax.Array:
    leaf = jax.random.key_data(leaf) if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf
    leaf = leaf.astype(jnp.uint8) if leaf.dtype == bool else leaf
    bits = lax.bitcast_convert_type(
        leaf, {1: jnp.uint8, 2: jnp.uint16}.get(leaf.dtype.itemsize, jnp.uint32)
    )
    bits = bits.astype(jnp.uint32)
    place = lax.iota(jnp.uint32, bits.size).reshape(bits.shape)
    mixed = (bits ^ (place * jnp.uint32(0x9E3779B9))) * jnp.uint32(0x85EBCA6B)
    return jnp.sum(mixed ^ (mixed >> 15), dtype=jnp.uint32)
