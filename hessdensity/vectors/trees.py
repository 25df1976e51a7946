"""Algebra on parameter pytrees, and the one place that fixes its precision.

A *vector* is a pytree of arrays. A *block* stacks k vectors: every leaf is (k, *leaf.shape). A
*chunk* stacks c basis vectors for each of k probes (`hessdensity.vectors.basis`). Vectors always
remain pytrees: a sharded parameter is never gathered into one flat array.

`hessdensity.vectors.sums` explains how inner products round and what devices send to each other.
"""

from __future__ import annotations

import functools
import math
from typing import Any, TypeAlias

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

PyTree: TypeAlias = Any
Vector: TypeAlias = Any
"""A pytree of arrays: one vector, such as a network's parameters."""
Block: TypeAlias = Any
"""k vectors in one pytree: every leaf has a leading axis of length k."""
Chunk: TypeAlias = Any
"""c basis vectors for each of k probes in one pytree, laid out for fast reading."""


def size(like: PyTree) -> int:
    """The number n of entries of one vector."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(like))


def dimension(block: Block) -> int:
    """The number n of entries of each vector in a block."""
    return sum(math.prod(leaf.shape[1:]) for leaf in jax.tree.leaves(block))


def scalar_dtype(like: PyTree) -> np.dtype:
    """The dtype of inner products: the widest dtype of any leaf."""
    return max(
        (np.dtype(leaf.dtype) for leaf in jax.tree.leaves(like)), key=lambda dtype: dtype.itemsize
    )


def epsilon(like: PyTree) -> float:
    """The largest rounding unit of any leaf."""
    return max(float(np.finfo(np.dtype(leaf.dtype)).eps) for leaf in jax.tree.leaves(like))


def paths(tree: PyTree) -> list[str]:
    """Names of the leaves, such as ``layer/kernel``.

    NNX appends ``/value`` to each name. This is a detail of its implementation, and is dropped.
    """
    names = (
        jax.tree_util.keystr(path, simple=True, separator="/")
        for path, _ in jax.tree.leaves_with_path(tree)
    )
    return [name.removesuffix("/value") for name in names]


def named(tree: PyTree) -> PyTree:
    """The tree with every leaf replaced by its name."""
    return jax.tree.unflatten(jax.tree.structure(tree), paths(tree))


# Inner products -----------------------------------------------------------------------------------


@jax.jit
def inner(a: Block, b: Block) -> jax.Array:
    """Inner products of two blocks, vector by vector: (k,)."""
    dtype = scalar_dtype(a)
    sums = (
        sum_products(x, y, 0).astype(dtype)
        for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    )
    return functools.reduce(jnp.add, sums)


@jax.jit
def norm(block: Block) -> jax.Array:
    """Euclidean norms of the k vectors: (k,).

    Each vector is first divided by its largest entry, because the squares of tiny or huge entries
    would leave the range of float32.
    """
    dtype = scalar_dtype(block)
    peaks = [
        jnp.abs(leaf).max(tuple(range(1, leaf.ndim)), initial=0) for leaf in jax.tree.leaves(block)
    ]
    peak = functools.reduce(jnp.maximum, [p.astype(dtype) for p in peaks])
    scaled = scale(block, 1 / jnp.where(peak > 0, peak, 1))
    return peak * jnp.sqrt(inner(scaled, scaled))


# Linear combinations ------------------------------------------------------------------------------


def column(scalars: jax.Array, leaf: jax.Array) -> jax.Array:
    """Scalars (k,) shaped to multiply a block's leaf (k, *shape), in the leaf's dtype."""
    return scalars.astype(leaf.dtype).reshape(-1, *[1] * (leaf.ndim - 1))


def scale(block: Block, factors: jax.Array) -> Block:
    """Each vector times its own factor."""
    return jax.tree.map(lambda leaf: leaf * column(factors, leaf), block)


@jax.jit
def normalize(block: Block, norms: jax.Array) -> Block:
    """Each vector divided by its own norm. A vector of norm 0 or infinity becomes zero."""
    return scale(block, 1 / jnp.where(norms > 0, norms, jnp.inf))


def unit(block: Block) -> tuple[Block, jax.Array]:
    """The vectors scaled to length 1, except that zero vectors remain zero; their norms (k,)."""
    norms = norm(block)
    return normalize(block, norms), norms


def subtract(block: PyTree, factors: jax.Array, other: PyTree) -> PyTree:
    """Block minus factors * other, vector by vector."""
    return jax.tree.map(lambda x, y: x - y * column(factors, x), block, other)


@jax.jit
def all_finite(tree: PyTree) -> jax.Array:
    """Whether every entry is finite, a scalar."""
    return functools.reduce(
        jnp.logical_and, [jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(tree)]
    )


def add(a: PyTree, b: PyTree) -> PyTree:
    """Sum of two trees of the same structure."""
    return jax.tree.map(jnp.add, a, b)


# Making, checking and moving blocks ---------------------------------------------------------------


def abstract(tree: PyTree) -> PyTree:
    """A description of a tree that holds no memory: shapes, dtypes and shardings.

    An array that the caller has not placed on devices is described without a sharding.
    """

    def describe(leaf: Any) -> jax.ShapeDtypeStruct:
        placed = isinstance(leaf, jax.ShapeDtypeStruct) or getattr(leaf, "committed", False)
        return jax.ShapeDtypeStruct(
            leaf.shape, leaf.dtype, sharding=leaf.sharding if placed else None
        )

    return jax.tree.map(describe, tree)


def stacked_sharding(leaf: jax.ShapeDtypeStruct, lead: int) -> Sharding | None:
    """The sharding of a stack of vectors: that of one vector behind ``lead`` replicated axes."""
    if isinstance(leaf.sharding, NamedSharding):
        return NamedSharding(leaf.sharding.mesh, PartitionSpec(*[None] * lead, *leaf.sharding.spec))
    return leaf.sharding


def one_of(block: Block) -> Vector:
    """Shapes, dtypes and shardings of one vector of a block."""

    def describe(leaf: Any) -> jax.ShapeDtypeStruct:
        sharding = getattr(leaf, "sharding", None)
        if isinstance(sharding, NamedSharding):
            sharding = NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec[1:]))
        elif not getattr(leaf, "committed", False):
            sharding = None
        return jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype, sharding=sharding)

    return jax.tree.map(describe, block)


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


def as_block(vectors: PyTree, like: PyTree, what: str = "operator @ block") -> tuple[PyTree, bool]:
    """``vectors`` as a block of vectors like ``like``, and whether they were one single vector.

    Raises:
      ValueError: the structure or a leaf's shape or dtype differs from ``like``'s.
    """
    structure: Any = jax.tree.structure(vectors)
    wanted = jax.tree.structure(like)
    if structure != wanted:
        raise ValueError(
            f"{what}: the structure is {structure}, but the operator's vectors have {wanted}. "
            "Build vectors with jax.tree.map over operator.like."
        )
    given = jax.tree.leaves(vectors)
    expected = jax.tree.leaves(like)
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


def count(block: Block) -> int:
    """The number k of vectors in a block."""
    return int(jax.tree.leaves(block)[0].shape[0])


def first_vector(block: Block) -> Vector:
    """The first of the k vectors."""
    return jax.tree.map(lambda leaf: leaf[0], block)


def as_single(vector: Vector) -> Block:
    """The block that holds one vector: the inverse of `first_vector`."""
    return jax.tree.map(lambda leaf: leaf[None], vector)


@jax.jit
def pick(block: Block, index: jax.Array | int) -> Block:
    """Vector number ``index`` as a block of one. One compiled program serves every index."""
    return jax.tree.map(lambda leaf: jax.lax.dynamic_slice_in_dim(leaf, index, 1), block)


def split(block: PyTree, count: int) -> list[PyTree]:
    """The block cut into pieces of at most ``count`` vectors."""
    total = jax.tree.leaves(block)[0].shape[0]
    if total <= count:
        return [block]
    return [
        jax.tree.map(lambda leaf, i=i: leaf[i : i + count], block) for i in range(0, total, count)
    ]


def join(blocks: list[PyTree]) -> PyTree:
    """The vectors of several blocks in one block: the inverse of `split`."""
    return (
        blocks[0]
        if len(blocks) == 1
        else jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *blocks)
    )


def ravel(block: PyTree) -> np.ndarray:
    """A block as a host array (k, n), with the leaves in tree order."""
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

    `jax.make_mesh` gives Explicit axes by default. With them the sharding is part of an array's
    type, and `vdot` and `tensordot` refuse such arrays.
    """

    def rewrap(leaf: Any) -> Any:
        sharding = getattr(leaf, "sharding", None)
        if (
            not isinstance(sharding, NamedSharding)
            or AxisType.Explicit not in sharding.mesh.axis_types
        ):
            return leaf
        names = sharding.mesh.axis_names
        mesh = Mesh(sharding.mesh.devices, names, axis_types=(AxisType.Auto,) * len(names))
        auto = NamedSharding(mesh, sharding.spec)
        if isinstance(leaf, jax.ShapeDtypeStruct):
            return leaf.update(sharding=auto)
        return jax.device_put(leaf, auto)

    return jax.tree.map(rewrap, tree)


def check_precision(precision: str | None) -> None:
    """Refuse what ``jax.default_matmul_precision`` does not know."""
    try:
        with jax.default_matmul_precision(precision):
            pass
    except Exception as error:
        raise ValueError(
            f"precision={precision!r} is unknown; expected 'highest', 'high', 'default' or None."
        ) from error
