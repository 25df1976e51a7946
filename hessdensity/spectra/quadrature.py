"""From a tridiagonal matrix to a Gauss rule, and what such a rule says for certain of its measure's
cumulative."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np


@dataclass(frozen=True, eq=False)
class Rule:
    """A discrete measure of mass 1 on the real line: what one probe knows of the spectrum.

    ``num_deflated`` nodes come first, Ritz values of a deflated subspace at weight 1/n each,
    without noise. The Gauss rule of the probe follows: the m nodes and weights that integrate
    polynomials up to degree 2m - 1 exactly against the probe's own spectral measure, sum over i of
    (v.q_i)^2 delta(t - lambda_i).

    Nodes are Ritz values, not eigenvalues: only those with a small residual are close to one.
    """

    nodes: np.ndarray
    """(length,) float64, in eigenvalue units; each of the two parts ascends."""
    weights: np.ndarray
    """(length,) float64, non-negative, summing to 1."""
    num_deflated: int
    """How many of the first nodes are deflated Ritz values."""
    residuals: np.ndarray
    """(length,) float64: an eigenvalue lies within this distance of the node. Not below the
    rounding of the run."""
    coupling: float = 0.0
    """Norm of what the operator couples the deflated subspace with the rest by, in eigenvalue
    units: it is left out, an error of at most 1/n in the cumulative and of 2 coupling/n in W1. 0
    where nothing is left out."""

    def __post_init__(self) -> None:
        for name in ("nodes", "weights", "residuals"):
            array = np.array(getattr(self, name), float)
            array.flags.writeable = False
            object.__setattr__(self, name, array)


class Tridiagonal(NamedTuple):
    """What a Lanczos recurrence of j steps leaves on the host: A V^T = V^T T + beta v_j e_j^T + Q^T
    coupling^T."""

    diagonal: np.ndarray
    """(j,) float64."""
    off_diagonal: np.ndarray
    """(j,) float64, the last one beta. T ends at the first zero: the Krylov space was invariant
    there."""
    deflation_coupling: np.ndarray = np.zeros((0, 0))
    """(j, r) float64: components of the products along the r vectors that the recurrence was kept
    orthogonal to; or empty, where there are none."""
    rounding_error: float = 0.0
    """How far the entries can be trusted, in eigenvalue units; residuals are not taken to be below
    twice it."""

    @property
    def length(self) -> int:
        """Steps up to the end of the Krylov space."""
        ends = np.flatnonzero(self.off_diagonal == 0)
        return int(ends[0]) + 1 if ends.size else self.diagonal.size

    @property
    def coupling(self) -> float:
        """The last off-diagonal entry, beta: 0 where the Krylov space is invariant."""
        return float(self.off_diagonal[self.length - 1])

    def leading(self, num_steps: int) -> Tridiagonal:
        """What a run of fewer steps would have left."""
        diagonal, off_diagonal, coupling = (part[:num_steps] for part in self[:3])
        return Tridiagonal(diagonal, off_diagonal, coupling, self.rounding_error)

    def eigh(self) -> tuple[np.ndarray, np.ndarray]:
        """Ritz values (m,), ascending, and Ritz vectors in the basis, the columns of (m, m)."""
        length = self.length
        off = self.off_diagonal[: length - 1]
        values, vectors = np.linalg.eigh(
            np.diag(self.diagonal[:length]) + np.diag(off, 1) + np.diag(off, -1)
        )
        return values, vectors

    def residuals(self, vectors: np.ndarray) -> np.ndarray:
        """Norms of A y - theta y of the Ritz vectors that `eigh` gave: (m,)."""
        squares = (self.coupling * vectors[-1]) ** 2
        if self.deflation_coupling.size:
            squares = squares + np.sum(
                (self.deflation_coupling[: self.length].T @ vectors) ** 2, axis=0
            )
        return np.maximum(np.sqrt(squares), 2 * self.rounding_error)


def gauss_rule(tridiagonal: Tridiagonal) -> Rule:
    """The Gauss rule of a Lanczos recurrence (Golub and Welsch 1969).

    Nodes are the eigenvalues of T, weights the squared first components of its eigenvectors.

    Returns:
      A `Rule` without deflated nodes, of m nodes or fewer.

    Cost: O(m^3) on the host.

    Example:
      >>> t = Tridiagonal(np.array([1.0, 1.0]), np.array([1.0, 0.0]))
      >>> gauss_rule(t).nodes.round(6).tolist(), gauss_rule(t).weights.round(6).tolist()
      ([0.0, 2.0], [0.5, 0.5])
    """
    nodes, vectors = tridiagonal.eigh()
    weights = vectors[0] ** 2
    return Rule(nodes, weights / weights.sum(), 0, tridiagonal.residuals(vectors))


def cumulative(nodes: np.ndarray, weights: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Mass of a discrete measure in (-inf, x], for every x; nodes ascend."""
    return np.concatenate([[0.0], np.cumsum(weights)])[np.searchsorted(nodes, x, side="right")]


def cumulative_bounds(
    nodes: np.ndarray, weights: np.ndarray, x: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """(lower, upper) that hold the cumulative of a Gauss rule's own measure at every x, and its
    limit from the left.

    Chebyshev-Markov-Stieltjes: at a node the true cumulative lies between the weights strictly
    below it and those up to it. Between two nodes it therefore lies between the weights strictly
    below the left one and those up to the right one. Rigorous, whatever the spectrum; nodes ascend.
    (Akhiezer 1965, chapter 2.)"""
    sums = np.concatenate([[0.0], np.cumsum(weights)])
    lower = sums[np.maximum(np.searchsorted(nodes, x, side="left") - 1, 0)]
    upper = sums[np.minimum(np.searchsorted(nodes, x, side="right") + 1, nodes.size)]
    # Nothing lies beyond the infinities, though something may beyond any node.
    return np.where(x == np.inf, sums[-1], lower), np.where(x == -np.inf, 0.0, upper)
