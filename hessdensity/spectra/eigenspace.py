"""Eigenpairs with their residuals, and how two subspaces lie to each other."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from hessdensity.vectors import chunks as _basis
from hessdensity.vectors import trees as _trees

PyTree = Any

_PIECE = 8


@dataclass(frozen=True, eq=False, repr=False)
class Eigenspace:
    """Approximate eigenpairs (lambda_i, q_i) of a symmetric operator, in descending order of the
    eigenvalues.

    ``space[:3]``, ``space[space.converged]`` and ``space[[0, 2]]`` are the eigenspaces of the pairs
    chosen.

    Raises:
      ValueError: the fields differ in their number of pairs, or the values do not descend.

    Example:
      >>> import hessdensity as hd
      >>> space = hd.top_eigenspace(hd.Matrix(np.diag([1.0, -5.0, 3.0])), jax.random.key(0), 2, progress=False)
      >>> space.values.round(4).tolist(), space[:1].values.round(4).tolist()
      ([3.0, -5.0], [3.0])
    """

    values: np.ndarray
    """(rank,) float64: eigenvalues (Rayleigh quotients), descending algebraically whichever were
    asked for."""
    vectors: PyTree
    """Block of the eigenvectors, every leaf (rank, *shape): orthonormal, on the device, placed like
    the operator's."""
    residuals: np.ndarray
    """(rank,) float64: norms of H q - lambda q, in eigenvalue units. An eigenvalue of H is as close
    as that."""
    converged: np.ndarray
    """(rank,) bool: whether the residual is small enough by the settings that made it."""
    num_matvecs: int
    """Products that were spent, in vectors."""
    num_passes: int = 0
    """Calls of the operator that were spent: passes over the data, each with a block of vectors."""
    description: dict[str, Any] = field(default_factory=dict)
    """What was computed: the operator's own description, settings."""

    def __post_init__(self) -> None:
        for name, dtype in (("values", float), ("residuals", float), ("converged", bool)):
            array = np.array(getattr(self, name), dtype)
            array.setflags(write=False)
            object.__setattr__(self, name, array)
            if array.ndim != 1 or array.shape != self.values.shape:
                raise ValueError(
                    f"{name} has shape {array.shape}, expected (rank,), here ({self.values.size},)."
                )
        for path, leaf in zip(
            _trees.paths(self.vectors), jax.tree.leaves(self.vectors), strict=True
        ):
            if np.shape(leaf)[:1] != (self.rank,):
                raise ValueError(
                    f"vectors: leaf {path!r} has shape {np.shape(leaf)}, expected (rank, ...) with "
                    f"rank = {self.rank}, the number of values."
                )
        if np.any(np.diff(self.values) > 0):
            raise ValueError(f"values are {self.values}, expected in descending order.")

    @property
    def rank(self) -> int:
        """The number of pairs."""
        return self.values.size

    @property
    def dimension(self) -> int:
        """n, the number of entries of one vector."""
        return sum(math.prod(leaf.shape[1:]) for leaf in jax.tree.leaves(self.vectors))

    def __getitem__(self, index: Any) -> Eigenspace:
        """The eigenspace of some of the pairs: a slice, a boolean mask (rank,), or indices;
        descending all the same.

        Raises:
          TypeError: ``index`` is a single number: ``space[[i]]`` is the space of one pair.
          IndexError: out of range.
          ValueError: a pair is chosen twice.
        """
        chosen = np.arange(self.rank)[index if isinstance(index, slice) else np.asarray(index)]
        if np.ndim(chosen) != 1:
            raise TypeError(
                f"index {index!r} of an Eigenspace; expected a slice, a mask or a list, such as "
                "[:3] or [[0, 2]]."
            )
        if np.unique(chosen).size != chosen.size:
            raise ValueError(
                f"index {index!r} chooses a pair twice; an eigenspace holds each one once."
            )
        chosen = np.sort(chosen)
        return Eigenspace(
            self.values[chosen],
            jax.tree.map(lambda leaf: leaf[chosen], self.vectors),
            self.residuals[chosen],
            self.converged[chosen],
            self.num_matvecs,
            self.num_passes,
            self.description,
        )

    def __repr__(self) -> str:
        return f"<Eigenspace of rank {self.rank}, {self.converged.sum()} converged, n = {self.dimension:,}>"

    def __str__(self) -> str:
        about = self.description
        kind = about.get("operator", {}).get("kind", "operator")
        article = "an" if kind == "operator" else "a"
        lines = [
            f"Eigenspace of {article} {kind}, n = {self.dimension:,}: "
            f"{self.converged.sum()} of {self.rank} pairs converged",
            f"  {'':>4} {'eigenvalue':>13} {'residual':>10}",
        ]
        for i, (value, residual, converged) in enumerate(
            zip(self.values, self.residuals, self.converged, strict=True), start=1
        ):
            lines.append(
                f"  {i:>4} {value:>13.6g} {residual:>10.2g}{'' if converged else '  not converged'}"
            )
        passes = f" in {self.num_passes} passes" if self.num_passes else ""
        seconds = f", {about['seconds']:.1f} s" if "seconds" in about else ""
        lines.append(f"  spent {self.num_matvecs} products{passes}{seconds}")
        if about.get("stopped"):
            lines.append(f"  stopped: {about['stopped']}")
        return "\n".join(lines)


def overlap(u: Eigenspace | PyTree, v: Eigenspace | PyTree) -> float:
    """How much of one subspace lies in another: ||U^T V||_F^2 / k, the mean squared cosine of the
    principal angles.

    k is the smaller of the two ranks: 1 means that the smaller space lies within the larger one.
    Two random spaces of ranks k and l overlap by l/n.

    Args:
      u: an `Eigenspace`, or a block of orthonormal vectors.
      v: another, of any rank, on vectors of the same structure.

    Raises:
      ValueError: the vectors differ in structure or shapes, or there are none.

    Cost: no products; reads each of the k vectors of one space once for each of the other's, where
      they are.

    Source: Wu, Zhu, Wu, Wang and Ge (2020), for Hessians; Björck and Golub (1973), for the angles.

    Example:
      >>> x, y, z = np.eye(3, dtype=np.float32)
      >>> overlap(np.stack([x, y]), np.stack([x, z]))
      0.5
    """
    u, v = _pair(u, v)
    cosines = np.linalg.svd(_gram(u, v), compute_uv=False)
    return float(np.mean(np.minimum(cosines, 1) ** 2))


def principal_angles(u: Eigenspace | PyTree, v: Eigenspace | PyTree) -> np.ndarray:
    """The principal angles between two subspaces, in radians, ascending: (k,) float64, k the
    smaller rank.

    cos(theta_i) are the singular values of U^T V. Below 45 degrees they are taken from the sines
    instead, the singular values of (I - U U^T) V: a cosine cannot tell an angle below the root of
    the rounding unit from 0 (Björck and Golub 1973; Knyazev and Argentati 2002). So the error is a
    few rounding units of the vectors for every angle.

    Args:
      u: an `Eigenspace`, or a block of orthonormal vectors.
      v: another, of any rank, on vectors of the same structure.

    Raises:
      ValueError: the vectors differ in structure or shapes, or there are none.

    Cost: no products; as `overlap`, three times. Memory: three times the vectors of the smaller
      space.

    Example:
      >>> x, y, z = np.eye(3, dtype=np.float32)
      >>> np.degrees(principal_angles(np.stack([x, y]), np.stack([x, (y + z) / np.float32(2**0.5)]))).round(3).tolist()
      [0.0, 45.0]
    """
    u, v = _pair(u, v)
    if _count(u) < _count(v):
        u, v = v, u
    with jax.default_matmul_precision("highest"):
        # The principal vectors of v first: the sines of distinct angles are then one column's each.
        _, cosines, rotation = np.linalg.svd(_gram(v, u).T, full_matrices=False)
        dtype = _trees.scalar_dtype(v)
        rest = combination(v, rotation)
        for _ in range(2):  # once more for what rounding leaves in the plane
            rest = _project(rest, u)
        sizes = np.asarray(_norm(rest), float)
        rest = _scale(rest, jnp.asarray(1 / np.where(sizes > 0, sizes, np.inf), dtype))
        # Columns of unit length: their Gram matrix squares no small angle away. The lengths join
        # again in float64.
        eigenvalues, directions = np.linalg.eigh(_gram(rest, rest))
    root = np.sqrt(np.maximum(eigenvalues, 0))[:, None] * directions.T
    sines = np.linalg.svd(root * sizes, compute_uv=False)[::-1]
    small = cosines > math.sqrt(0.5)
    return np.sort(
        np.where(small, np.arcsin(np.minimum(sines, 1)), np.arccos(np.minimum(cosines, 1)))
    )


def combination(block: PyTree, factors: np.ndarray) -> PyTree:
    """Linear combinations of a block's r vectors: vector i is the sum over j of factors[i, j] *
    vector j.

    Args:
      block: r vectors.
      factors: (k, r).
    """
    dtype = _trees.scalar_dtype(block)
    total = jax.tree.map(lambda leaf: jnp.zeros((len(factors), *leaf.shape[1:]), leaf.dtype), block)
    with jax.default_matmul_precision("highest"):
        for index, piece in enumerate(_trees.split(block, _PIECE)):
            columns = factors[:, index * _PIECE : (index + 1) * _PIECE]
            total = _subtract_combination(total, jnp.asarray(-columns, dtype), piece)
    return total


def _pair(u: Eigenspace | PyTree, v: Eigenspace | PyTree) -> tuple[PyTree, PyTree]:
    """Two blocks with vectors of one structure, of one dtype a leaf."""
    u, v = (space.vectors if isinstance(space, Eigenspace) else space for space in (u, v))
    structures: Any = jax.tree.structure(u), jax.tree.structure(v)
    if structures[0] != structures[1]:
        raise ValueError(
            f"u and v are of different operators: their vectors have structures {structures}."
        )
    for path, x, y in zip(_trees.paths(u), jax.tree.leaves(u), jax.tree.leaves(v), strict=True):
        if np.shape(x)[1:] != np.shape(y)[1:] or not np.ndim(x) or not np.ndim(y):
            where = f"leaf {path!r} is" if path else "they are"
            raise ValueError(
                f"u and v are of different operators: {where} {np.shape(x)} and {np.shape(y)}; "
                "expected blocks, which differ in the first axis alone."
            )
    if not min(_count(u), _count(v)):
        raise ValueError(
            f"u holds {_count(u)} vectors and v {_count(v)}; expected at least one in each."
        )
    u, v = (
        jax.tree.map(lambda x, y: jnp.asarray(x, np.promote_types(x.dtype, y.dtype)), *pair)
        for pair in ((u, v), (v, u))
    )
    return u, v


def _count(block: PyTree) -> int:
    return int(jax.tree.leaves(block)[0].shape[0])


def _gram(u: PyTree, v: PyTree) -> np.ndarray:
    """Inner products of two blocks' vectors, (k, l) float64 on the host."""
    with jax.default_matmul_precision("highest"):
        parts = [np.asarray(_inner_products(u, piece), float) for piece in _trees.split(v, _PIECE)]
        return np.concatenate(parts, axis=1)


def _project(block: PyTree, u: PyTree) -> PyTree:
    """The block less its parts along the vectors of u."""
    for piece in _trees.split(u, _PIECE):
        block = _subtract_combination(block, _inner_products(block, piece), piece)
    return block


# Compiled for the shapes of a piece: a program that reads all of a space's vectors would grow with
# its rank.
_norm = jax.jit(_trees.norm)
_scale = jax.jit(_trees.scale)


@jax.jit
def _inner_products(u: PyTree, v: PyTree) -> jax.Array:
    return _basis.coefficients(_basis.stack(v), u)


@jax.jit
def _subtract_combination(block: PyTree, factors: jax.Array, vectors: PyTree) -> PyTree:
    return _basis.subtract_combination(block, factors, _basis.stack(vectors))
