"""Partitions of parameters into groups of leaves, or of slices of leaves."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from hessdensity.operators.protocol import check_count
from hessdensity.vectors import trees
from hessdensity.vectors.selection import Where, select
from hessdensity.vectors.trees import PyTree, Vector


@dataclass(frozen=True)
class LeafSlice:
    """One of several equal parts of a leaf, along one of its axes. `slices` makes all of them."""

    where: Where
    """The leaves, as for `Hessian`. A part is taken of each of them."""
    axis: int
    """The axis that is divided."""
    part: int
    """The number of this part, from 0."""
    parts: int
    """The number of parts."""


def slices(where: str, axis: int, parts: int) -> dict[str, LeafSlice]:
    """Groups for `BlockDiagonal`: equal parts of stacked leaves, such as heads, experts, layers.

    Args:
      where: a glob on the paths of the leaves. Part i of all of them forms one group.
      axis: the axis that is divided.
      parts: the number of parts, which must divide the length of the axis.

    Returns:
      A dictionary from ``"where[i]"`` to `LeafSlice`, which can be merged with further groups.

    Example:
      >>> list(slices("attention/qkv", axis=1, parts=3))
      ['attention/qkv[0]', 'attention/qkv[1]', 'attention/qkv[2]']
    """
    check_count("parts", parts)
    return {f"{where}[{part}]": LeafSlice(where, axis, part, parts) for part in range(parts)}


Groups = Mapping[str, Where | LeafSlice] | Iterable[str] | None
"""Groups by name, or globs, which are then also the names, or None for a group for each leaf."""


class Piece(NamedTuple):
    """A leaf, or a part of it."""

    leaf: int
    """Position of the leaf."""
    axis: int = 0
    """The axis that is cut."""
    start: int = 0
    """Where the part begins."""
    stop: int | None = None
    """Where the part ends, or None if it is the whole leaf."""

    def take(self, leaf: Any, lead: int = 0) -> Any:
        """The part of an array, behind ``lead`` leading axes."""
        if self.stop is None:
            return leaf
        if isinstance(leaf, jax.ShapeDtypeStruct):
            return self._abstract(leaf)
        return lax.slice_in_dim(leaf, self.start, self.stop, axis=self.axis + lead)

    def put(self, leaf: jax.Array, part: jax.Array, lead: int = 0) -> jax.Array:
        """An array with its part replaced, behind ``lead`` leading axes."""
        if self.stop is None:
            return part
        return lax.dynamic_update_slice_in_dim(leaf, part, self.start, self.axis + lead)

    def _abstract(self, leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        assert self.stop is not None
        shape = list(leaf.shape)
        shape[self.axis] = self.stop - self.start
        sharding = leaf.sharding
        if isinstance(sharding, NamedSharding):
            spec = [*sharding.spec, *[None] * (len(shape) - len(sharding.spec))]
            spec[self.axis] = None
            sharding = NamedSharding(sharding.mesh, PartitionSpec(*spec))
        return jax.ShapeDtypeStruct(tuple(shape), leaf.dtype, sharding=sharding)


@dataclass(frozen=True)
class Group:
    """A group of leaves and parts of leaves. It is hashable, as a static part of programs.

    Its vectors have the structure of the whole tree, with None in place of all other leaves.
    """

    structure: Any
    pieces: tuple[Piece, ...]

    def take(self, tree: PyTree, lead: int = 0) -> Vector:
        """The group's part of a tree, whose leaves have ``lead`` leading axes."""
        leaves = self.structure.flatten_up_to(tree)
        found: list[Any] = [None] * len(leaves)
        for piece in self.pieces:
            found[piece.leaf] = piece.take(leaves[piece.leaf], lead)
        return self.structure.unflatten(found)

    def put(self, tree: PyTree, part: Vector, lead: int = 0) -> PyTree:
        """A tree with the group's part replaced."""
        leaves = self.structure.flatten_up_to(tree)
        for piece, new in zip(self.pieces, jax.tree.leaves(part), strict=True):
            leaves[piece.leaf] = piece.put(leaves[piece.leaf], new, lead)
        return self.structure.unflatten(leaves)

    def __call__(
        self, function: Callable[[PyTree, PyTree], Any], params: PyTree, part: Vector, batch: PyTree
    ) -> Any:
        """A function of parameters and a batch, as a function of the group's part alone."""
        return function(self.put(params, part), batch)

    def describe(self, names: list[str]) -> list[str]:
        """The leaves and the parts of leaves, for a description."""
        return [
            names[piece.leaf]
            if piece.stop is None
            else f"{names[piece.leaf]}, axis {piece.axis} from {piece.start} to {piece.stop}"
            for piece in self.pieces
        ]


def group_of(like: Vector, name: str, group: Where | LeafSlice) -> Group:
    """A single group of a tree's leaves, or parts of leaves.

    Raises:
      ValueError: it matches no leaf, or an axis cannot be divided.
    """
    names = trees.paths(like)
    where = group.where if isinstance(group, LeafSlice) else group
    chosen = [i for i, own in enumerate(select(like, where).chosen) if own]
    pieces = [Piece(i) for i in chosen]
    if isinstance(group, LeafSlice):
        leaves = jax.tree.leaves(like)
        pieces = [_slice(name, group, i, names[i], leaves[i].shape) for i in chosen]
    return Group(jax.tree.structure(like), tuple(pieces))


def partition(like: Vector, groups: Groups = None) -> dict[str, Group]:
    """Divide the leaves of a tree into groups.

    Args:
      like: pytree of arrays or of their shapes.
      groups: a mapping from names to globs, predicates or `LeafSlice`; or globs, which are then
        also the names; or None for one group for each leaf.

    Raises:
      ValueError: a group matches no leaf, an axis cannot be divided, groups overlap, or leaves are
        in no group. The message names them.
    """
    names = trees.paths(like)
    structure = jax.tree.structure(like)
    if groups is None:
        return {name: Group(structure, (Piece(i),)) for i, name in enumerate(names)}
    if isinstance(groups, str):
        groups = [groups]
    wanted = dict(groups) if isinstance(groups, Mapping) else {glob: glob for glob in groups}
    found = {name: group_of(like, name, group) for name, group in wanted.items()}
    _check_cover(found, names, jax.tree.leaves(like))
    return found


def _slice(name: str, group: LeafSlice, leaf: int, path: str, shape: tuple[int, ...]) -> Piece:
    check_count(f"groups[{name!r}]: parts", group.parts)
    check_count(f"groups[{name!r}]: part", group.part, 0, group.parts - 1)
    axis = group.axis + len(shape) if group.axis < 0 else group.axis
    if not 0 <= axis < len(shape) or shape[axis] % group.parts:
        raise ValueError(
            f"groups[{name!r}]: axis {group.axis} of leaf {path!r} with shape {list(shape)} cannot "
            f"be divided into {group.parts} equal parts. Choose an axis and a number of parts that "
            "divides its length."
        )
    length = shape[axis] // group.parts
    return Piece(leaf, axis, group.part * length, (group.part + 1) * length)


def _check_cover(groups: Mapping[str, Group], names: list[str], leaves: list[Any]) -> None:
    """Raise ValueError unless every entry of every leaf is in one group."""
    owners: dict[int, list[tuple[str, Piece]]] = {i: [] for i in range(len(names))}
    for name, group in groups.items():
        for piece in group.pieces:
            for other, own in owners[piece.leaf]:
                if _overlap(piece, own):
                    raise ValueError(
                        f"groups: {other!r} and {name!r} both have leaf {names[piece.leaf]!r}. "
                        "Each entry must be in one group: make one of them narrower."
                    )
            owners[piece.leaf].append((name, piece))
    missing = [
        names[i]
        for i, own in owners.items()
        if sum(_size(piece, leaves[i]) for _, piece in own) < trees.size(leaves[i])
    ]
    if missing:
        raise ValueError(
            f"groups: {', '.join(map(repr, missing[:10]))}{' and others' * (len(missing) > 10)} "
            "are not, or not wholly, in a group. Add a group for them, or leave them out of the "
            "operator: hd.Hessian(..., where=...)."
        )


def _overlap(a: Piece, b: Piece) -> bool:
    if a.stop is None or b.stop is None or a.axis != b.axis:
        return True
    return a.start < b.stop and b.start < a.stop


def _size(piece: Piece, leaf: Any) -> int:
    if piece.stop is None:
        return trees.size(leaf)
    return trees.size(leaf) // leaf.shape[piece.axis] * (piece.stop - piece.start)
