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
      array: a real, symmetric array (n, n).

    Raises:
      ValueError: the array is not square, not real or not symmetric to rounding.

    Cost: n^2 operations for the product with one vector.

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
                f"array is {array.dtype}{list(array.shape)}; expected a real floating-point array "
                "of shape (n, n)."
            )
        gap = float(jnp.max(jnp.abs(array - array.T)))
        size = float(jnp.max(jnp.abs(array)))
        if gap > 64 * float(jnp.finfo(array.dtype).eps) * size:
            raise ValueError(
                f"array differs from its transpose by {gap:.3g}; expected a symmetric array, such "
                "as (a + a.T) / 2."
            )
        self.like = jax.ShapeDtypeStruct(array.shape[:1], array.dtype)
        self._multiply: Callable[[jax.Array], jax.Array] = partial(_dense_product, array)
        self._entries = fingerprint(array)

    @classmethod
    def from_eigenvalues(cls, values: Any, key: jax.Array) -> Matrix:
        """Q diag(values) Q^T, where Q is a product of three random Householder reflections.

        Args:
          values: (n,) eigenvalues.
          key: JAX random key, which determines the eigenvectors.

        Raises:
          ValueError: ``values`` is not a real floating-point array (n,).

        Cost: O(n) operations for the product with one vector, and O(n) memory.
        """
        values = jnp.asarray(values)
        if values.ndim != 1 or not jnp.issubdtype(values.dtype, jnp.floating):
            raise ValueError(
                f"values is {values.dtype}{list(values.shape)}; expected a real floating-point "
                "array of shape (n,)."
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
        """A description of this operator. JSON-serializable."""
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

    A class of your own, with ``like`` and ``@`` on blocks, can multiply all vectors together.

    Args:
      matvec: maps one vector, a pytree like ``like``, to its product. It must be linear and
        symmetric (check it with `verify_operator`). It is called once for each vector, outside of
        any compilation, so it may be NumPy code. If it is JAX code, compile it with ``jax.jit``.
      like: pytree of arrays or ``jax.ShapeDtypeStruct``: shapes and dtypes of one vector.

    Raises:
      TypeError: a leaf of ``like`` is neither float32 nor float64.
      ValueError (in a product): the result of ``matvec`` differs from ``like`` in structure, shape
        or dtype.

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
        """A description of this operator. JSON-serializable."""
        return {"kind": "FunctionOperator"}
