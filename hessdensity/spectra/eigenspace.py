"""Eigenpairs with their residuals, and how two subspaces lie to each other."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np

from hessdensity.text import of_operator, table
from hessdensity.vectors import trees
from hessdensity.vectors.trees import Block


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
    vectors: Block
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
            trees.paths(self.vectors), jax.tree.leaves(self.vectors), strict=True
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
        return trees.dimension(self.vectors)

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
        rows = [("", "eigenvalue", "residual", "")]
        columns = zip(self.values, self.residuals, self.converged, strict=True)
        for i, (value, residual, converged) in enumerate(columns, start=1):
            remark = "" if converged else "not converged"
            rows.append((f"{i}", f"{value:.6g}", f"{residual:.2g}", remark))
        passes = f" in {self.num_passes} passes" if self.num_passes else ""
        seconds = f", {about['seconds']:.1f} s" if "seconds" in about else ""
        stopped = [f"  stopped: {about['stopped']}"] if about.get("stopped") else []
        return "\n".join(
            [
                f"Eigenspace {of_operator(about)}, n = {self.dimension:,}: "
                f"{self.converged.sum()} of {self.rank} pairs converged",
                *table(rows, left={3}),
                f"  spent {self.num_matvecs} products{passes}{seconds}",
                *stopped,
            ]
        )
