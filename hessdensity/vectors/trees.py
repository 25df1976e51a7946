"""Algebra on parameter pytrees, and the one place that fixes its precision.

A *vector* is a pytree of arrays; a *block* stacks k vectors, every leaf being (k, *leaf.shape); a
*chunk* stacks c basis vectors for each of k probes, every leaf being (k, c, *leaf.shape). Trees
stay trees: a sharded parameter is never gathered into one flat array.

How inner products round, and what they send between devices, is said in `_sums`.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import (
    AxisType,
    Mesh,
    NamedSharding,
    PartitionSpec,
    Sharding,
    SingleDeviceSharding,
)

from .sums import sum_products

PyTree = Any


def size(like: PyTree) -> int:
    """The number n of entries of one vector."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(like))


def scalar_dtype(like: PyTree) -> np.dtype:
    """The dtype in which inner products are taken: the widest of the leaves'."""
    return max(
        (np.dtype(leaf.dtype) for leaf in jax.tree.leaves(like)), key=lambda dtype: dtype.itemsize
    )


def epsilon(like: PyTree) -> float:
    """The rounding unit of the coarsest leaf."""
    return max(float(np.finfo(np.dtype(leaf.dtype)).eps) for leaf in jax.tree.leaves(like))


def paths(tree: PyTree) -> list[str]:
    """Names of the leaves, ``layer/kernel``; NNX's trailing ``/value`` is an implementation's
    detail and is dropped."""
    names = (
        jax.tree_util.keystr(path, simple=True, separator="/")
        for path, _ in jax.tree.leaves_with_path(tree)
    )
    return [name.removesuffix("/value") for name in names]


def named(tree: PyTree) -> PyTree:
    """The tree with every leaf replaced by its name."""
    return jax.tree.unflatten(jax.tree.structure(tree), paths(tree))


# Inner products ------------------------------------------------------------------------------------------------------


def inner(a: PyTree, b: PyTree) -> jax.Array:
    """Inner products of two blocks, vector by vector: (k,)."""
    dtype = scalar_dtype(a)
    sums = (
        sum_products(x, y, 0).astype(dtype)
        for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    )
    return functools.reduce(jnp.add, sums)


def norm(block: PyTree) -> jax.Array:
    """Euclidean norms of the k vectors: (k,).

    Scaled by the largest entry first: the squares of tiny and huge ones would leave the range of
    float32."""
    dtype = scalar_dtype(block)
    peaks = [
        jnp.abs(leaf).max(tuple(range(1, leaf.ndim)), initial=0) for leaf in jax.tree.leaves(block)
    ]
    peak = functools.reduce(jnp.maximum, [p.astype(dtype) for p in peaks])
    scaled = scale(block, 1 / jnp.where(peak > 0, peak, 1))
    return peak * jnp.sqrt(inner(scaled, scaled))


# Linear combinations -------------------------------------------------------------------------------------------------


def column(scalars: jax.Array, leaf: jax.Array) -> jax.Array:
    """Scalars (k,) shaped to multiply a block's leaf (k, *shape), in the leaf's dtype."""
    return scalars.astype(leaf.dtype).reshape(-1, *[1] * (leaf.ndim - 1))


def scale(block: PyTree, factors: jax.Array) -> PyTree:
    """Each vector times its own factor."""
    return jax.tree.map(lambda leaf: leaf * column(factors, leaf), block)


def subtract(block: PyTree, factors: jax.Array, other: PyTree) -> PyTree:
    """Block minus factors * other, vector by vector."""
    return jax.tree.map(lambda x, y: x - y * column(factors, x), block, other)


def all_finite(tree: PyTree) -> jax.Array:
    """Whether every entry is finite, a scalar."""
    return functools.reduce(
        jnp.logical_and, [jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(tree)]
    )


def add(a: PyTree, b: PyTree) -> PyTree:
    """Sum of two trees of one structure."""
    return jax.tree.map(jnp.add, a, b)


# Making, checking and moving blocks ----------------------------------------------------------------------------------


def abstract(tree: PyTree) -> PyTree:
    """Shapes, dtypes and, where the caller has placed the arrays, shardings; a description that
    holds no memory."""

    def describe(leaf: Any) -> jax.ShapeDtypeStruct:
        placed = isinstance(leaf, jax.ShapeDtypeStruct) or getattr(leaf, "committed", False)
        return jax.ShapeDtypeStruct(
            leaf.shape, leaf.dtype, sharding=leaf.sharding if placed else None
        )

    return jax.tree.map(describe, tree)


def stacked_sharding(leaf: jax.ShapeDtypeStruct, lead: int) -> Sharding | None:
    """The sharding of a stack of vectors: that of one vector, the leading axes replicated."""
    if isinstance(leaf.sharding, NamedSharding):
        return NamedSharding(leaf.sharding.mesh, PartitionSpec(*[None] * lead, *leaf.sharding.spec))
    return leaf.sharding


def abstract_block(like: PyTree, count: int) -> PyTree:
    """Shapes, dtypes and shardings of a block of ``count`` vectors."""

    def describe(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        placed = stacked_sharding(leaf, 1) or SingleDeviceSharding(jax.devices()[0])
        return jax.ShapeDtypeStruct((count, *leaf.shape), leaf.dtype, sharding=placed)

    return jax.tree.map(describe, like)


def zeros(like: PyTree, *lead: int) -> PyTree:
    """Zeros of shape (*lead, *leaf.shape), placed like the vectors."""
    return jax.tree.map(
        lambda leaf: jnp.zeros(
            (*lead, *leaf.shape), leaf.dtype, device=stacked_sharding(leaf, len(lead))
        ),
        like,
    )


def random_block(key: jax.Array, first: int, count: int, like: PyTree) -> PyTree:
    """``count`` vectors uniform on the unit sphere: normalised Gaussians, E[v vT] = I/n.

    Vector i depends on ``fold_in(key, first + i)`` alone: not on how many are drawn with it, nor on
    any sharding."""
    leaves = jax.tree.leaves(like)
    block = _gaussian_sampler(tuple(leaves))(
        key, jnp.arange(first, first + count, dtype=jnp.uint32)
    )
    return jax.tree.unflatten(jax.tree.structure(like), _normalise(block))


@functools.lru_cache
def _gaussian_sampler(leaves: tuple[jax.ShapeDtypeStruct, ...]) -> Any:
    def sample(key: jax.Array, indices: jax.Array) -> list[jax.Array]:
        keys = jax.vmap(
            lambda index: jax.random.split(jax.random.fold_in(key, index), len(leaves))
        )(indices)
        return [
            jax.vmap(functools.partial(jax.random.normal, shape=leaf.shape, dtype=leaf.dtype))(
                keys[:, position]
            )
            for position, leaf in enumerate(leaves)
        ]

    return jax.jit(sample, out_shardings=[stacked_sharding(leaf, 1) for leaf in leaves])


@jax.jit
def _normalise(block: PyTree) -> PyTree:
    """At unit length. Not in one program with the draw, which XLA would repeat in every use and
    compile for minutes."""
    return scale(block, 1 / norm(block))


def as_block(vectors: PyTree, like: PyTree, what: str = "operator @ block") -> tuple[PyTree, bool]:
    """``vectors`` as a block of k vectors like ``like``, and whether it was given as a single one.

    Raises:
      ValueError: the structure or a leaf's shape or dtype differs from ``like``'s.
    """
    structure: Any
    structure, wanted = jax.tree.structure(vectors), jax.tree.structure(like)
    if structure != wanted:
        raise ValueError(
            f"{what}: the structure is {structure}, but the operator's vectors have {wanted}. "
            "Build vectors with jax.tree.map over operator.like."
        )
    given, expected = jax.tree.leaves(vectors), jax.tree.leaves(like)
    single = all(np.ndim(x) == len(leaf.shape) for x, leaf in zip(given, expected, strict=True))
    count = None if single else np.shape(given[0])[:1]
    for name, x, leaf in zip(paths(like), given, expected, strict=True):
        allowed = leaf.shape if single else (*(count or ("k",)), *leaf.shape)
        short = x.dtype.kind != "f" or x.dtype.itemsize < np.dtype(leaf.dtype).itemsize
        if np.shape(x) != allowed or short:
            where = f"leaf {name!r}" if name else "the vector"
            raise ValueError(
                f"{what}: {where} is {x.dtype}{list(np.shape(x))}, expected {np.dtype(leaf.dtype)}"
                f"{list(allowed)}, or {list(leaf.shape)} in every leaf for a single vector."
            )
    block = jax.tree.map(lambda x, leaf: jnp.asarray(x, leaf.dtype), vectors, like)
    return (jax.tree.map(lambda leaf: leaf[None], block) if single else block), single


def first_vector(block: PyTree) -> PyTree:
    """The first of the k vectors."""
    return jax.tree.map(lambda leaf: leaf[0], block)


def split(block: PyTree, count: int) -> list[PyTree]:
    """The block in pieces of at most ``count`` vectors."""
    total = jax.tree.leaves(block)[0].shape[0]
    if total <= count:
        return [block]
    return [
        jax.tree.map(lambda leaf, i=i: leaf[i : i + count], block) for i in range(0, total, count)
    ]


def join(blocks: list[PyTree]) -> PyTree:
    """The inverse of `split`."""
    return (
        blocks[0]
        if len(blocks) == 1
        else jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *blocks)
    )


def ravel(block: PyTree) -> np.ndarray:
    """A block as a host array (k, n), leaves in tree order."""
    leaves = [np.asarray(leaf) for leaf in jax.tree.leaves(block)]
    return np.concatenate([leaf.reshape(leaf.shape[0], -1) for leaf in leaves], axis=1)


def unravel(rows: np.ndarray, like: PyTree) -> PyTree:
    """The block whose k vectors are the rows of an array (k, n): the inverse of `ravel`."""
    leaves = jax.tree.leaves(like)
    ends = np.cumsum([math.prod(leaf.shape) for leaf in leaves])
    pieces = np.split(rows, ends[:-1], axis=1)
    shaped = [
        jax.device_put(piece.reshape(-1, *leaf.shape).astype(leaf.dtype), stacked_sharding(leaf, 1))
        for piece, leaf in zip(pieces, leaves, strict=True)
    ]
    return jax.tree.unflatten(jax.tree.structure(like), shaped)


def auto_axes(tree: PyTree) -> PyTree:
    """The same arrays on Auto mesh axes of the same devices.

    `jax.make_mesh` gives Explicit axes, for which sharding is part of the type; `vdot` and
    `tensordot` refuse those."""

    def rewrap(leaf: Any) -> Any:
        sharding = getattr(leaf, "sharding", None)
        if (
            not isinstance(sharding, NamedSharding)
            or AxisType.Explicit not in sharding.mesh.axis_types
        ):
            return leaf
        names = sharding.mesh.axis_names
        mesh = Mesh(sharding.mesh.devices, names, axis_types=(AxisType.Auto,) * len(names))
        return jax.device_put(leaf, NamedSharding(mesh, sharding.spec))

    return jax.tree.map(rewrap, tree)
