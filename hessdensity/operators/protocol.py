"""The operator protocol: symmetric operators on pytrees, known only through ``operator @ block``.

Two members are required, and a user's own class needs nothing else: ``operator.like``, a pytree
with the shapes and dtypes (and shardings) of one vector, and ``operator @ block``, where every leaf
of ``block`` has one more leading axis.
"""

from __future__ import annotations

from typing import Any, Protocol

import jax
import numpy as np

from hessdensity.losses.composition import Composition
from hessdensity.vectors import trees
from hessdensity.vectors.trees import Block, Vector


class Operator(Protocol):
    """The members of an operator that the algorithms need."""

    @property
    def like(self) -> Vector:
        """Shapes, dtypes and shardings of one vector."""

    def __matmul__(self, block: Block, /) -> Block:
        """The products of k vectors, every leaf (k, *shape)."""


OPTIONAL_MEMBERS = {
    "describe": "() -> dict: a description, recorded in results, compared when a run is resumed",
    "restrict": "(where) -> operator: a principal block, cheaper than products of padded vectors",
    "temporary_bytes": "(num_vectors) -> int: memory of a product beside vectors and weights",
    "params": "the parameters at which derivatives are taken, a vector",
    "gradient": "(offset=None) -> vector: gradient of the loss at params + offset",
    "composition": "() -> Composition: rules and dtypes that can make products asymmetric",
    "additivity": "() -> Additivity: whether the loss is a mean over examples",
}
"""Members that are used if an operator has them. A `Wrapper` forwards them."""


def check(operator: Operator, key: jax.Array | None = None) -> int:
    """Check an operator, and return the dimension n of its vectors.

    Raises:
      TypeError: ``operator`` lacks ``like`` or ``@``, or its vectors are not float32 or float64, or
        ``key`` is not a JAX random key.
      ValueError: its vectors have no entries.
    """
    if not hasattr(operator, "like") or not hasattr(operator, "__matmul__"):
        raise TypeError(
            f"operator is a {type(operator).__name__}; expected hd.Hessian(loss, params, data), "
            "hd.Matrix(array), or an object with `like` and `@`."
        )
    if key is not None:
        check_key(key)
    for name, leaf in zip(trees.paths(operator.like), jax.tree.leaves(operator.like), strict=True):
        if np.dtype(leaf.dtype) not in (np.dtype("float32"), np.dtype("float64")):
            raise TypeError(
                f"operator.like: leaf {name!r} is {leaf.dtype}; expected float32 or float64 "
                "vectors."
            )
    n = trees.size(operator.like)
    if not n:
        raise ValueError(
            "operator.like has no entries; expected vectors of at least one dimension."
        )
    return n


def check_key(key: Any) -> None:
    """Raise TypeError if ``key`` is not a JAX random key."""
    if not isinstance(key, jax.Array):
        raise TypeError(
            f"key is a {type(key).__name__}; expected a JAX random key, such as jax.random.key(0)."
        )


def check_count(name: str, value: Any, least: int = 1, most: int | None = None) -> None:
    """Raise ValueError if ``value`` is not a whole number from ``least`` to ``most``."""
    whole = isinstance(value, int | np.integer) and not isinstance(value, bool)
    if not whole or value < least or (most is not None and value > most):
        allowed = f"of at least {least}" if most is None else f"from {least} to {most:,}"
        raise ValueError(f"{name}={value!r}, expected a whole number {allowed}.")


def describe(operator: Operator) -> dict[str, Any]:
    """The operator's own description, or the name of its class."""
    own = getattr(operator, "describe", None)
    return dict(own()) if own else {"kind": type(operator).__name__}


def composition_of(operator: Any) -> Composition:
    """The composition of the operator's model, or an empty one if it does not tell."""
    own = getattr(operator, "composition", None)
    return own() if own else Composition()
