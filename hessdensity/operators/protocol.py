"""Symmetric operators on pytrees, known only through ``operator @ block``.

The protocol has two members, and a user's own class needs nothing else: ``operator.like``, a pytree
with the shapes and dtypes (and shardings) of one vector, and ``operator @ block``, where every leaf
of ``block`` has one more leading axis. Two more are used where they exist: ``operator.describe() ->
dict`` is recorded in results, and ``operator.restrict(where)`` gives a principal block more cheaply
than products of padded vectors would."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from hessdensity.vectors import trees as _trees
from hessdensity.vectors.fingerprint import fingerprint
from hessdensity.vectors.selection import Where, select

PyTree = Any


class Operator(Protocol):
    """What the algorithms ask of an operator."""

    @property
    def like(self) -> PyTree:
        """Shapes, dtypes and shardings of one vector."""

    def __matmul__(self, block: PyTree, /) -> PyTree:
        """The products of k vectors, every leaf (k, *shape)."""


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
        reflectors = _trees.random_block(key, 0, 3, self.like)
        self._multiply = partial(_reflected_product, values, reflectors)
        self._entries = fingerprint((values, reflectors))
        return self

    def __matmul__(self, vectors: jax.Array) -> jax.Array:
        block, single = _trees.as_block(vectors, self.like)
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
        return _trees.subtract(block, 2 * _trees.inner(block, normals), normals)

    for normal in reflectors:
        block = reflect(block, normal)
    block = block * values[None]
    for normal in reflectors[::-1]:
        block = reflect(block, normal)
    return block


class FunctionOperator:
    """A function as an operator.

    Args: matvec: one vector, a pytree like ``like``, to its product. It must be linear and
      symmetric (`verify_operator`).
        It is called once a vector, outside of any compilation: it may be NumPy code; jit it
        yourself where it is JAX.
      like: pytree of arrays or ``jax.ShapeDtypeStruct``: shapes and dtypes of one vector.

    A class of your own, with ``like`` and ``@`` on blocks, can take all vectors at once.

    Example:
      >>> operator = FunctionOperator(lambda v: {"w": 2 * v["w"]}, {"w": jnp.zeros(3)})
      >>> operator @ {"w": jnp.ones(3)}
      {'w': Array([2., 2., 2.], dtype=float32)}
    """

    def __init__(self, matvec: Callable[[PyTree], PyTree], like: PyTree) -> None:
        self.like = _trees.abstract(
            jax.tree.map(lambda x: x if hasattr(x, "dtype") else jnp.asarray(x), like)
        )
        for name, leaf in zip(_trees.paths(self.like), jax.tree.leaves(self.like), strict=True):
            if np.dtype(leaf.dtype) not in (np.dtype("float32"), np.dtype("float64")):
                raise TypeError(
                    f"like: leaf {name!r} is {leaf.dtype}; expected float32 or float64."
                )
        self._matvec = matvec

    def __matmul__(self, vectors: PyTree) -> PyTree:
        block, single = _trees.as_block(vectors, self.like)
        count = jax.tree.leaves(block)[0].shape[0]
        products = [
            self._matvec(jax.tree.map(lambda leaf, i=index: leaf[i], block))
            for index in range(count)
        ]
        for product in products:
            _trees.as_block(product, self.like, "matvec's product")
        return products[0] if single else jax.tree.map(lambda *leaves: jnp.stack(leaves), *products)

    def describe(self) -> dict[str, Any]:
        """What this operator is."""
        return {"kind": "FunctionOperator"}


class Restricted:
    """A principal block of an operator: the rows and columns of the leaves that match.

    For a `Hessian` the same as its ``where=``: the held leaves carry no tangents, which is cheaper
    than a masked product. For any other operator, the full product of vectors padded with zeros.

    Args:
      operator: the operator.
      where: a glob on paths, or a predicate, as for `Hessian`.

    Raises:
      ValueError: nothing matches.

    Example:
      >>> like = {"a": jnp.zeros(2), "b": jnp.zeros(2)}
      >>> whole = FunctionOperator(lambda v: {"a": v["a"] + v["b"], "b": v["a"]}, like)
      >>> Restricted(whole, "a") @ {"a": jnp.ones(2), "b": None}
      {'a': Array([1., 1.], dtype=float32), 'b': None}
    """

    def __init__(self, operator: Operator, where: Where) -> None:
        self._selection = select(operator.like, where)
        self.like, self._held = self._selection.split(operator.like)
        restrict = getattr(operator, "restrict", None)
        self._restricted: Operator | None = restrict(where) if restrict else None
        self._whole = operator

    def __matmul__(self, vectors: PyTree) -> PyTree:
        if self._restricted is not None:
            return self._restricted @ vectors
        block, single = _trees.as_block(vectors, self.like)
        count = jax.tree.leaves(block)[0].shape[0]
        padded = self._selection.merge(block, [_trees.zeros(leaf, count) for leaf in self._held])
        product, _ = self._selection.split(self._whole @ padded)
        return _trees.first_vector(product) if single else product

    def describe(self) -> dict[str, Any]:
        """What this operator is."""
        return {
            **describe(self._restricted or self._whole),
            "restricted_to": _trees.paths(self.like),
        }


def check(operator: Operator, key: jax.Array | None = None) -> int:
    """The dimension n of an operator's vectors.

    Raises:
      TypeError: it is no operator, or its vectors are not float32 or float64, or the key is none.
      ValueError: its vectors hold no entries.
    """
    if not hasattr(operator, "like") or not hasattr(operator, "__matmul__"):
        raise TypeError(
            f"operator is a {type(operator).__name__}; expected hd.Hessian(loss, params, data), "
            "hd.Matrix(array), or an object with `like` and `@`."
        )
    if key is not None and not isinstance(key, jax.Array):
        raise TypeError(
            f"key is a {type(key).__name__}; expected a JAX random key, such as jax.random.key(0)."
        )
    for name, leaf in zip(_trees.paths(operator.like), jax.tree.leaves(operator.like), strict=True):
        if np.dtype(leaf.dtype) not in (np.dtype("float32"), np.dtype("float64")):
            raise TypeError(
                f"operator.like: leaf {name!r} is {leaf.dtype}; expected float32 or float64 "
                "vectors."
            )
    n = _trees.size(operator.like)
    if not n:
        raise ValueError(
            "operator.like holds no entries; expected vectors of at least one dimension."
        )
    return n


def describe(operator: Operator) -> dict[str, Any]:
    """The operator's own description, or the name of its class."""
    own = getattr(operator, "describe", None)
    return dict(own()) if own else {"kind": type(operator).__name__}


def dense(operator: Operator, *, block_size: int = 64, max_size: int = 20_000) -> np.ndarray:
    """The whole matrix, (n, n) float64 on the host, leaves in tree order. n products, for small n.

    Args:
      operator: any operator.
      block_size: vectors a product.
      max_size: the largest n accepted.

    Raises:
      ValueError: n > max_size.

    Example:
      >>> dense(Matrix(np.diag([1.0, 2.0]))).tolist()
      [[1.0, 0.0], [0.0, 2.0]]
    """
    n = _trees.size(operator.like)
    if n > max_size:
        raise ValueError(
            f"operator has n = {n:,}: the dense matrix takes {8e-9 * n * n:.3g} GB and {n:,} "
            "products. Use hd.spectral_density, or pass max_size= to insist."
        )
    rows = [np.eye(min(block_size, n - start), n, start) for start in range(0, n, block_size)]
    return np.concatenate(
        [_trees.ravel(operator @ _trees.unravel(part, operator.like)) for part in rows]
    ).astype(float)


def to_scipy(operator: Operator) -> Any:
    """The operator as a ``scipy.sparse.linalg.LinearOperator`` on flat vectors, leaves in tree
    order.

    Example:
      >>> to_scipy(Matrix(np.diag([1.0, 2.0]))).matvec(np.ones(2)).tolist()
      [1.0, 2.0]
    """
    from scipy.sparse.linalg import LinearOperator

    n, like = _trees.size(operator.like), operator.like

    def matmat(columns: np.ndarray) -> np.ndarray:
        return _trees.ravel(operator @ _trees.unravel(columns.reshape(n, -1).T, like)).T

    return LinearOperator(
        (n, n), matvec=lambda v: matmat(v)[:, 0], matmat=matmat, rmatvec=lambda v: matmat(v)[:, 0],
        dtype=_trees.scalar_dtype(like),
    )  # fmt: skip
