"""Approximate eigenpairs of a symmetric operator, with their residuals."""

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
    """Approximate eigenpairs (lambda_i, q_i) of a symmetric operator, with descending eigenvalues.

    Indexing chooses some of the pairs: ``space[:3]``, ``space[space.converged]`` and
    ``space[[0, 2]]`` are eigenspaces again.

    Raises:
      ValueError: the fields differ in their number of pairs, or the values are not in descending
        order.

    Example:
      >>> import jax, numpy as np, hessdensity as hd
      >>> matrix = hd.Matrix(np.diag([1.0, -5.0, 3.0]))
      >>> space = hd.top_eigenspace(matrix, jax.random.key(0), 2, progress=False)
      >>> space.values.round(4).tolist(), space[:1].values.round(4).tolist()
      ([3.0, -5.0], [3.0])
    """

    values: np.ndarray
    """(rank,) float64: eigenvalues (Rayleigh quotients), from the largest to the smallest.

    The order is algebraic, also where the eigenvalues were selected by magnitude.
    """
    vectors: Block
    """Block of the eigenvectors. Every leaf has the shape (rank, *shape).

    The vectors are orthonormal, on the device, and placed like those of the operator.
    """
    residuals: np.ndarray
    """(rank,) float64: norms of H q - lambda q, in eigenvalue units.

    An eigenvalue of H lies within this distance of the value.
    """
    converged: np.ndarray
    """(rank,) bool: whether the pair met the tolerance of the run that found it.

    The residual is then at most tolerance x |value|, or at the rounding error of products with
    this operator, epsilon x max|lambda|. It is smaller than |value|, unless the value is a zero to
    this rounding error. The value was at rest: the last pass moved it by at most tolerance x
    |value|. `print` remarks on pairs that are limited by rounding.
    """
    num_matvecs: int
    """The number of products that were spent, counted in vectors."""
    num_passes: int = 0
    """The number of calls of the operator. Each is a pass over the data with a block of vectors."""
    description: dict[str, Any] = field(default_factory=dict)
    """The operator's own description, and the settings."""

    def __post_init__(self) -> None:
        for name, dtype in (("values", float), ("residuals", float), ("converged", bool)):
            array = np.array(getattr(self, name), dtype)
            array.setflags(write=False)
            object.__setattr__(self, name, array)
            if array.ndim != 1 or array.shape != self.values.shape:
                raise ValueError(
                    f"{name} has shape {array.shape}, expected (rank,), here "
                    f"({self.values.size},): one entry for each eigenpair."
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
            raise ValueError(
                f"values are {self.values}, expected in descending order. Sort the eigenpairs."
            )

    @property
    def rank(self) -> int:
        """The number of pairs."""
        return self.values.size

    @property
    def dimension(self) -> int:
        """n, the number of entries of one vector."""
        return trees.dimension(self.vectors)

    def __getitem__(self, index: Any) -> Eigenspace:
        """The eigenspace of some pairs: a slice, a boolean mask (rank,), or a list of indices.

        Its pairs are in descending order, whatever the order of the indices.

        Raises:
          TypeError: ``index`` is a single number. ``space[[i]]`` is the eigenspace of one pair.
          IndexError: an index is out of range.
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
                f"index {index!r} chooses a pair twice; choose each pair at most once."
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
        counts = f"rank {self.rank}, {self.converged.sum()} converged, n = {self.dimension:,}"
        return f"<Eigenspace of {counts}>"

    def __str__(self) -> str:
        about = self.description
        rows = [("", "eigenvalue", "residual", "")]
        columns = zip(self.values, self.residuals, self.converged, strict=True)
        for i, (value, residual, converged) in enumerate(columns, start=1):
            remark = self._remark(abs(value), residual, converged)
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

    def _remark(self, size: float, residual: float, converged: bool) -> str:
        """What limits a pair, given the size of its value and its residual."""
        about = self.description
        if not converged:
            unknown = "not converged: the residual exceeds the value"
            return unknown if residual >= size else "not converged"
        if "rounding" not in about or residual <= about["tolerance"] * size:
            return ""
        limit = f"the rounding error, {about['rounding']:.2g}"
        return f"zero to {limit}" if residual >= size else f"converged to {limit}"
