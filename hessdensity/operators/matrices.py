"""Matrices and functions as operators, for tests, notebooks and small problems."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from hessdensity.vectors import trees
from hessdensity.vectors.fingerprint import fingerprint
from hessdensity.vectors.random import random_block
from hessdensity.vectors.trees import Block, Vector


class Matrix:
    """A symmetric matrix as an operator, for tests, notebooks and small problems.

    Args:
      array: (n, n), symmetric; real.

    Raises:
      ValueError: the array is not square, not real or not symmetric to rounding.

    Cost: n^2 a product.

    Example:
      >>> Matrix(np.diag([1.0, 2.0])) @ jnp.ones(2)
      Array([1., 2.], dtype=float32)
    """

    def __init__(self, array: Any) -> None:
        array = jnp.asarray(array)
        if (
            array.ndim != 2
            or array.shape[0] != array.shape[1]
            or not jnp.issubdtype(array.dtype, jnp.floating)
        ):
            raise ValueError(
                f"array is {array.dtype}{list(array.shape)}; expected a real floating-point (n, n)."
            )
        gap, size = float(jnp.max(jnp.abs(array - array.T))), float(jnp.max(jnp.abs(array)))
        if gap > 64 * float(jnp.finfo(array.dtype).eps) * size:
            raise ValueError(
                f"array differs from its transpose by {gap:.3g}; expected a symmetric one: (a + "
                "a.T) / 2."
            )
        self.like = jax.ShapeDtypeStruct(array.shape[:1], array.dtype)
        self._multiply: Callable[[jax.Array], jax.Array] = partial(_dense_product, array)
        self._entries = fingerprint(array)

    @classmethod
    def from_eigenvalues(cls, values: Any, key: jax.Array) -> Matrix:
        """Q diag(values) Q^T, Q a product of three random Householder reflections: O(n) a product
        and in memory.

        Args:
          values: (n,) eigenvalues.
          key: decides the eigenvectors.
        """
        values = jnp.asarray(values)
        if values.ndim != 1 or not jnp.issubdtype(values.dtype, jnp.floating):
            raise ValueError(
                f"values is {values.dtype}{list(values.shape)}; expected real floating-point (n,)."
            )
        self = cls.__new__(cls)
        self.like = jax.ShapeDtypeStruct(values.shape, values.dtype)
        reflectors = random_block(key, 0, 3, self.like)
        self._multiply = partial(_reflected_product, values, reflectors)
        self._entries = fingerprint((values, reflectors))
        return self

    def __matmul__(self, vectors: jax.Array) -> jax.Array:
        block, single = trees.as_block(vectors, self.like)
        product = self._multiply(block)
        return product[0] if single else product

    def describe(self) -> dict[str, Any]:
        """What this operator is."""
        return {"kind": "Matrix", "entries": self._entries}


@jax.jit
def _dense_product(array: jax.Array, block: jax.Array) -> jax.Array:
    return jnp.matmul(block, array, precision=jax.lax.Precision.HIGHEST)


@jax.jit
def _reflected_product(values: jax.Array, reflectors: jax.Array, block: jax.Array) -> jax.Array:
    def reflect(block: jax.Array, normal: jax.Array) -> jax.Array:
        normals = jnp.broadcast_to(normal, block.shape)
        return trees.subtract(block, 2 * trees.inner(block, normals), normals)

    for normal in reflectors:
        block = reflect(block, normal)
    block = block * values[None]
    for normal in reflectors[::-1]:
        block = reflect(block, normal)
    return block


class FunctionOperator:
    """A function as an operator.

    Args:
      matvec: one vector, a pytree like ``like``, to its product. It must be linear and symmetric
        (`verify_operator`). It is called once a vector, outside of any compilation: it may be NumPy
        code; jit it yourself where it is JAX.
      like: pytree of arrays or ``jax.ShapeDtypeStruct``: shapes and dtypes of one vector.

    A class of your own, with ``like`` and ``@`` on blocks, can take all vectors at once.

    Example:
      >>> operator = FunctionOperator(lambda v: {"w": 2 * v["w"]}, {"w": jnp.zeros(3)})
      >>> operator @ {"w": jnp.ones(3)}
      {'w': Array([2., 2., 2.], dtype=float32)}
    """

    def __init__(self, matvec: Callable[[Vector], Vector], like: Vector) -> None:
        self.like = trees.abstract(
            jax.tree.map(lambda x: x if hasattr(x, "dtype") else jnp.asarray(x), like)
        )
        for name, leaf in zip(trees.paths(self.like), jax.tree.leaves(self.like), strict=True):
            if np.dtype(leaf.dtype) not in (np.dtype("float32"), np.dtype("float64")):
                raise TypeError(
                    f"like: leaf {name!r} is {leaf.dtype}; expected float32 or float64."
                )
        self._matvec = matvec

    def __matmul__(self, vectors: Block | Vector) -> Block | Vector:
        block, single = trees.as_block(vectors, self.like)
        count = jax.tree.leaves(block)[0].shape[0]
        products = [
            self._matvec(jax.tree.map(lambda leaf, i=index: leaf[i], block))
            for index in range(count)
        ]
        for product in products:
            trees.as_block(product, self.like, "matvec's product")
        return products[0] if single else jax.tree.map(lambda *leaves: jnp.stack(leaves), *products)

    def describe(self) -> dict[str, Any]:
        """What this operator is."""
        return {"kind": "FunctionOperator"}
