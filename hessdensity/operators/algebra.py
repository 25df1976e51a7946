"""Operators made from other operators: wrappers, differences and principal blocks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax

from hessdensity.vectors import trees
from hessdensity.vectors.selection import Selection, Where, select
from hessdensity.vectors.trees import Block, Vector

from .protocol import OPTIONAL_MEMBERS, Operator, describe


class Wrapper:
    """An operator that wraps another one and forwards its members.

    A subclass overrides the members in which it differs, usually ``@``. The wrapper has an optional
    member of the protocol if, and only if, the wrapped operator has it.
    """

    def __init__(self, operator: Operator) -> None:
        self._operator = operator

    @property
    def like(self) -> Vector:
        """Shapes, dtypes and shardings of one vector."""
        return self._operator.like

    def __matmul__(self, vectors: Block | Vector) -> Block | Vector:
        return self._operator @ vectors

    def __getattr__(self, name: str) -> Any:
        # Python calls this only for a name that neither the instance nor its class has.
        # Not `restrict`: a block of the wrapped operator would lose what the wrapper does.
        if name in OPTIONAL_MEMBERS and name != "restrict":
            return getattr(self._operator, name)
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def describe(self) -> dict[str, Any]:
        """The description of the wrapped operator."""
        return describe(self._operator)


class CountingOperator(Wrapper):
    """An operator that reports the number of its products.

    Args:
      operator: the operator that computes the products.
      report: called after each product with the number of its vectors.
    """

    def __init__(self, operator: Operator, report: Callable[[int], Any]) -> None:
        super().__init__(operator)
        self._report = report

    def __matmul__(self, vectors: Block | Vector) -> Block | Vector:
        block, single = trees.as_block(vectors, self.like)
        product = self._operator @ block
        self._report(trees.count(block))
        return trees.first_vector(product) if single else product


class Difference(Wrapper):
    """The difference A - B of two operators on the same vectors."""

    def __init__(self, a: Operator, b: Operator) -> None:
        super().__init__(a)
        self._subtracted = b

    def __matmul__(self, vectors: Block | Vector) -> Block | Vector:
        block, single = trees.as_block(vectors, self.like)
        pair = self._operator @ block, self._subtracted @ block
        product = jax.tree.map(lambda x, y: x - y, *pair)
        return trees.first_vector(product) if single else product

    def __getattr__(self, name: str) -> Any:
        if name == "gradient":
            raise AttributeError("a difference of operators has no loss, hence no gradient")
        return super().__getattr__(name)

    def describe(self) -> dict[str, Any]:
        """The descriptions of both operators."""
        both = {"of": describe(self._operator), "minus": describe(self._subtracted)}
        return {"kind": "Difference", **both}


class Restricted(Wrapper):
    """A principal block of an operator: the rows and columns of the selected leaves.

    For a `Hessian` this is the same as its ``where=``. The leaves held fixed carry no tangents,
    which is cheaper than a product with padded vectors. For any other operator a product is a full
    product with vectors padded with zeros.

    Args:
      operator: the operator.
      where: a glob on paths, or a predicate on the path, as for `Hessian`.

    Raises:
      ValueError: no leaf matches.

    Example:
      >>> import jax.numpy as jnp, hessdensity as hd
      >>> like = {"a": jnp.zeros(2), "b": jnp.zeros(2)}
      >>> whole = hd.FunctionOperator(lambda v: {"a": v["a"] + v["b"], "b": v["a"]}, like)
      >>> Restricted(whole, "a") @ {"a": jnp.ones(2), "b": None}
      {'a': Array([1., 1.], dtype=float32), 'b': None}
    """

    def __init__(self, operator: Operator, where: Where) -> None:
        selection = select(operator.like, where)
        restrict = getattr(operator, "restrict", None)
        super().__init__(restrict(where) if restrict else _Padded(operator, selection))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._operator, name) if name == "restrict" else super().__getattr__(name)

    def describe(self) -> dict[str, Any]:
        """The description of the operator, and the leaves of this block."""
        return {**describe(self._operator), "restricted_to": trees.paths(self.like)}


class _Padded(Wrapper):
    """A principal block by products of the whole operator with zero-padded vectors."""

    def __init__(self, operator: Operator, selection: Selection) -> None:
        super().__init__(operator)
        self._selection = selection
        self._like, self._held = selection.split(operator.like)

    @property
    def like(self) -> Vector:
        return self._like

    def __matmul__(self, vectors: Block | Vector) -> Block | Vector:
        block, single = trees.as_block(vectors, self.like)
        product = self._part(self._operator @ self._pad(block, trees.count(block)))
        return trees.first_vector(product) if single else product

    def __getattr__(self, name: str) -> Any:
        member = super().__getattr__(name)
        if name == "params":
            return self._part(member)
        if name == "gradient":

            def gradient(offset: Vector | None = None) -> Vector:
                return self._part(member(None if offset is None else self._pad(offset)))

            return gradient
        return member

    def _pad(self, vectors: Any, *lead: int) -> Any:
        held = [trees.zeros(leaf, *lead) for leaf in self._held]
        return self._selection.merge(vectors, held)

    def _part(self, vectors: Any) -> Any:
        return self._selection.split(vectors)[0]
