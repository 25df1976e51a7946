"""Batches that can be iterated repeatedly: which data are accepted, and which are refused."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np

from hessdensity.vectors import trees
from hessdensity.vectors.trees import PyTree

_WRAP = (
    "wrap one batch in a list, [batch], or cut arrays into batches with "
    "hd.batches(arrays, batch_size)."
)


def batches(arrays: PyTree, batch_size: int) -> list[PyTree]:
    """Cut in-memory arrays into a list of batches of ``batch_size`` examples.

    The last batch is smaller if ``batch_size`` does not divide the number of examples.

    Args:
      arrays: a pytree of arrays that share their leading axis, such as ``(x, y)``.
      batch_size: examples in a batch.

    Raises:
      TypeError: a leaf is not an array.
      ValueError: the arrays differ in length, or ``batch_size`` < 1.

    Example:
      >>> [x.shape for x in batches(np.zeros((64, 3)), 30)]
      [(30, 3), (30, 3), (4, 3)]
    """
    if not isinstance(batch_size, int) or batch_size < 1:
        raise ValueError(f"batch_size={batch_size}, expected a whole number of at least 1.")
    for name, leaf in zip(trees.paths(arrays), jax.tree.leaves(arrays), strict=True):
        if not _is_array(leaf):
            raise TypeError(
                f"arrays: leaf {name!r} is a {type(leaf).__name__}; expected arrays. Convert lists "
                "with np.asarray."
            )
    lengths = leading_lengths(arrays)
    length = next(iter(lengths.values()), None)
    if length is None or len(set(lengths.values())) != 1:
        raise ValueError(f"arrays must share their leading axis, but their lengths are {lengths}.")
    slices = [slice(start, start + batch_size) for start in range(0, length, batch_size)]
    return [jax.tree.map(lambda array, rows=rows: array[rows], arrays) for rows in slices]


def leading_lengths(batch: PyTree) -> dict[str, int | None]:
    """The length of each leaf's leading axis (None for a scalar), by the leaf's path."""
    shapes = [np.shape(leaf) for leaf in jax.tree.leaves(batch)]
    pairs = zip(trees.paths(batch), shapes, strict=True)
    return {name: shape[0] if shape else None for name, shape in pairs}


def fresh(source: Any) -> Iterator[PyTree]:
    """A new iterator over the batches, starting at the first one."""
    if hasattr(source, "__iter__"):
        return iter(source)
    if hasattr(source, "__getitem__"):
        # A map-style dataset. Python's own protocol ends at an IndexError, which such a dataset
        # need not raise. Its length ends the iteration.
        if hasattr(source, "__len__"):
            return (source[index] for index in range(len(source)))
        return iter(source)
    made = source()
    if not hasattr(made, "__iter__") and not hasattr(made, "__getitem__"):
        raise TypeError(
            f"data: the function returned a {type(made).__name__}; expected an iterator over "
            "batches."
        )
    return fresh(made)


def refuse_misuse(source: Any) -> None:
    """Raise TypeError for data that cannot be iterated twice, or that are a single batch."""
    kind = type(source).__name__
    if _is_array(source):
        raise TypeError(f"data is a bare {kind}, which would be iterated row by row; {_WRAP}")
    members = _members(source)
    if isinstance(source, Mapping) or (members and all(map(_is_array, members))):
        raise TypeError(
            f"data is a bare {kind} of arrays, which is one batch, not a collection of batches; "
            f"{_WRAP}"
        )
    if isinstance(source, list) and len({np.ndim(x) for x in source if _is_array(x)}) > 1:
        raise TypeError(
            "data is a list of arrays of different rank, which is one batch, not a collection of "
            f"batches; {_WRAP}"
        )
    if hasattr(source, "__next__") or (
        hasattr(source, "__iter__") and isinstance(source, Iterator)
    ):
        raise TypeError(
            f"data is a one-shot iterator ({kind}), which would be empty in the second pass. Every "
            "product needs a pass of its own. Give a list, a loader object, or a function that "
            "returns a fresh iterator."
        )
    if not (callable(source) or hasattr(source, "__iter__") or hasattr(source, "__getitem__")):
        raise TypeError(
            f"data is a {kind}; expected batches that can be iterated twice, or a function that "
            "returns them."
        )


def _members(source: Any) -> Any:
    if isinstance(source, Mapping):
        return source.values()
    return source if isinstance(source, tuple) else ()


def _is_array(value: Any) -> bool:
    return hasattr(value, "shape") and hasattr(value, "dtype")
