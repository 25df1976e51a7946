"""Random vectors that depend on neither the sharding nor the number of vectors drawn together."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from . import trees
from .trees import Block, Vector


def random_block(key: jax.Array, first: int, count: int, like: Vector) -> Block:
    """``count`` vectors uniform on the unit sphere: normalized Gaussians, E[v v^T] = I/n.

    Vector i depends only on ``fold_in(key, first + i)``. Neither the number of vectors drawn with
    it nor the sharding changes it.
    """
    leaves = jax.tree.leaves(like)
    indices = jnp.arange(first, first + count, dtype=jnp.uint32)
    block = jax.tree.unflatten(
        jax.tree.structure(like), _gaussian_sampler(tuple(leaves))(key, indices)
    )
    # This is a separate program. Together with the draw, XLA would repeat the draw for every use of
    # its result, and would compile for minutes.
    return trees.unit(block)[0]


@functools.lru_cache
def _gaussian_sampler(leaves: tuple[jax.ShapeDtypeStruct, ...]) -> Any:
    def sample(key: jax.Array, indices: jax.Array) -> list[jax.Array]:
        def keys_of(index: jax.Array) -> jax.Array:
            return jax.random.split(jax.random.fold_in(key, index), len(leaves))

        keys = jax.vmap(keys_of)(indices)
        return [
            jax.vmap(functools.partial(jax.random.normal, shape=leaf.shape, dtype=leaf.dtype))(
                keys[:, position]
            )
            for position, leaf in enumerate(leaves)
        ]

    return jax.jit(sample, out_shardings=[trees.stacked_sharding(leaf, 1) for leaf in leaves])
