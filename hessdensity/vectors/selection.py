"""Select the leaves of a tree that form the vector; the other leaves are held fixed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import jax
import jax.numpy as jnp

from . import trees
from .trees import PyTree, Vector

Where = str | Callable[[str], bool] | None


@dataclass(frozen=True)
class Selection:
    """A split of a tree's leaves, by position, into selected and held ones.

    It is hashable, so that it can be a static part of a compiled function.
    """

    structure: Any
    chosen: tuple[bool, ...]

    def split(self, tree: Any) -> tuple[Any, list[Any]]:
        """The tree with None in place of the held leaves; the held leaves."""
        leaves = self.structure.flatten_up_to(tree)
        selected = [
            leaf if chosen else None for leaf, chosen in zip(leaves, self.chosen, strict=True)
        ]
        return self.structure.unflatten(selected), [
            x for x, chosen in zip(leaves, self.chosen, strict=True) if not chosen
        ]

    def merge(self, selected: Any, held: list[Any]) -> Any:
        """The whole tree: the inverse of `split`."""
        sources = {True: iter(jax.tree.leaves(selected)), False: iter(held)}
        return self.structure.unflatten([next(sources[chosen]) for chosen in self.chosen])

    def __call__(
        self, loss: Callable[[Any, Any], Any], held: list[Any], selected: Any, batch: Any
    ) -> Any:
        """The loss as a function of the selected leaves alone."""
        return loss(self.merge(selected, held), batch)


def select(tree: Any, where: Where) -> Selection:
    """Select the leaves of ``tree`` whose path matches ``where``.

    Args:
      tree: pytree of arrays.
      where: a glob on the path, a predicate on the path, or None for all leaves.

    Raises:
      TypeError: ``where`` is not a glob, a function or None.
      ValueError: no leaf matches (the message lists the paths), or the tree has no leaves.
    """
    names = trees.paths(tree)
    if where is None:
        chosen = [True] * len(names)
    elif isinstance(where, str):
        chosen = [fnmatchcase(name, where) for name in names]
    elif callable(where):
        chosen = [bool(where(name)) for name in names]
    else:
        raise TypeError(
            f"where={where!r} is a {type(where).__name__}; expected a glob such as 'Dense_0/*', a "
            "function of the path, or None for all leaves."
        )
    if not names:
        raise ValueError("params has no leaves; expected a pytree of arrays.")
    if not any(chosen):
        listed = "\n  ".join(names[:40] + ["..."] * (len(names) > 40))
        raise ValueError(f"where={where!r} matches no leaf. The paths are:\n  {listed}")
    return Selection(jax.tree.structure(tree), tuple(chosen))


def as_vector(selected: PyTree) -> Vector:
    """Selected parameters as arrays that can be differentiated by, float32 at least.

    Descriptions of arrays (``jax.ShapeDtypeStruct``) stay descriptions.

    Raises:
      TypeError: a leaf is not real floating-point.
    """
    return jax.tree.map(_differentiable, trees.named(selected), selected)


def refuse_abstract(params: PyTree) -> None:
    """Raise TypeError if a leaf is a description of an array and has no numbers."""
    if any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(params)):
        raise TypeError(
            "params holds descriptions of arrays (jax.ShapeDtypeStruct), so that nothing can be "
            "computed. Give arrays. A plan needs none: hd.plan(operator, timed=False)."
        )


def _differentiable(name: str, leaf: Any) -> jax.Array | jax.ShapeDtypeStruct:
    array = leaf if isinstance(leaf, jax.ShapeDtypeStruct) else jnp.asarray(leaf)
    if not jnp.issubdtype(array.dtype, jnp.floating):
        raise TypeError(
            f"params leaf {name!r} is {array.dtype}; a derivative needs real floating-point "
            f"leaves. Hold it fixed: where=lambda path: path != {name!r}."
        )
    if array.dtype.itemsize >= 4:
        return array
    if isinstance(array, jax.ShapeDtypeStruct):
        return array.update(dtype=jnp.dtype("float32"))
    return array.astype(jnp.float32)
