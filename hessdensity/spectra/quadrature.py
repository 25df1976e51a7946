"""Gauss rules of tridiagonal matrices, and rigorous bounds on a cumulative from such a rule."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np


@dataclass(frozen=True, eq=False)
class Rule:
    """A discrete measure of mass 1 on the real line: the estimate of a spectrum from one probe.

    The first ``num_deflated`` nodes are the Ritz values of a deflated subspace. Each has weight
    1/n, without random error. The other nodes are the Gauss rule of the probe v: its m nodes and
    weights integrate polynomials up to degree 2m - 1 exactly against the probe's own spectral
    measure, sum over i of (v.q_i)^2 delta(t - lambda_i).

    Nodes are Ritz values, not eigenvalues. Only a node with a small residual is close to an
    eigenvalue.
    """

    nodes: np.ndarray
    """(length,) float64, in eigenvalue units. Each of the two parts is in ascending order."""
    weights: np.ndarray
    """(length,) float64, non-negative. They sum to 1."""
    num_deflated: int
    """The number of deflated Ritz values, which come first among the nodes."""
    residuals: np.ndarray
    """(length,) float64: an eigenvalue lies within this distance of the node.

    Residuals are never below the rounding error of the run.
    """
    coupling: float = 0.0
    """Norm of the block that couples the deflated subspace to its complement, in eigenvalue units.

    The rule leaves this block out, with an error of at most 1/n in the cumulative and of at most
    2 coupling/n in W1. The coupling is 0 where nothing is left out.
    """

    def __post_init__(self) -> None:
        for name in ("nodes", "weights", "residuals"):
            array = np.array(getattr(self, name), float)
            array.flags.writeable = False
            object.__setattr__(self, name, array)


class Tridiagonal(NamedTuple):
    """The tridiagonal matrix T of a Lanczos recurrence of j steps, on the host.

    It satisfies A V = V T + beta v_j e_{j-1}^T + Q coupling^T for the operator A. The columns of V
    are the Lanczos vectors v_0 .. v_{j-1}. The columns of Q are the r vectors that the recurrence
    was kept orthogonal to.
    """

    diagonal: np.ndarray
    """(j,) float64."""
    off_diagonal: np.ndarray
    """(j,) float64, ending with beta. T ends at the first zero: the Krylov space is invariant."""
    deflation_coupling: np.ndarray = np.zeros((0, 0))
    """(j, r) float64: components of the products along the vectors of Q. Empty without Q."""
    rounding_error: float = 0.0
    """Error of the entries, in eigenvalue units. Residuals are taken to be at least twice this."""

    @property
    def length(self) -> int:
        """The number of steps up to the end of the Krylov space."""
        ends = np.flatnonzero(self.off_diagonal == 0)
        return int(ends[0]) + 1 if ends.size else self.diagonal.size

    @property
    def coupling(self) -> float:
        """The last off-diagonal entry, beta. It is 0 if the Krylov space is invariant."""
        return float(self.off_diagonal[self.length - 1])

    def leading(self, num_steps: int) -> Tridiagonal:
        """The tridiagonal matrix of the first ``num_steps`` steps alone."""
        diagonal, off_diagonal, coupling = (part[:num_steps] for part in self[:3])
        return Tridiagonal(diagonal, off_diagonal, coupling, self.rounding_error)

    def eigh(self) -> tuple[np.ndarray, np.ndarray]:
        """Ritz values (m,), ascending, and Ritz vectors in the Lanczos basis, as columns (m, m)."""
        length = self.length
        off = self.off_diagonal[: length - 1]
        values, vectors = np.linalg.eigh(
            np.diag(self.diagonal[:length]) + np.diag(off, 1) + np.diag(off, -1)
        )
        return values, vectors

    def residuals(self, vectors: np.ndarray) -> np.ndarray:
        """(m,): norms of A y - theta y for the Ritz vectors y that `eigh` returned."""
        squares = (self.coupling * vectors[-1]) ** 2
        if self.deflation_coupling.size:
            squares = squares + np.sum(
                (self.deflation_coupling[: self.length].T @ vectors) ** 2, axis=0
            )
        return np.maximum(np.sqrt(squares), 2 * self.rounding_error)


def gauss_rule(tridiagonal: Tridiagonal) -> Rule:
    """The Gauss rule of a Lanczos recurrence (Golub and Welsch 1969).

    The nodes are the eigenvalues of T. The weights are the squared first components of its
    eigenvectors.

    Returns:
      A `Rule` without deflated nodes. Its length m is the number of steps, or fewer if the Krylov
      space ended early.

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
    """Mass of a discrete measure in (-inf, x], for every x. The nodes must ascend."""
    return np.concatenate([[0.0], np.cumsum(weights)])[np.searchsorted(nodes, x, side="right")]


def cumulative_bounds(
    nodes: np.ndarray, weights: np.ndarray, x: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Bounds (lower, upper) at every x on the cumulative of the measure behind a Gauss rule.

    They also bound the limit of the cumulative from the left. The nodes must ascend.

    By the Chebyshev-Markov-Stieltjes inequalities (Akhiezer 1965, chapter 2), the true cumulative
    at a node lies between the sum of the weights strictly below the node and the sum of the weights
    up to it. Between two nodes it therefore lies between the weights strictly below the left one
    and those up to the right one. The bounds are rigorous for every spectrum.
    """
    sums = np.concatenate([[0.0], np.cumsum(weights)])
    lower = sums[np.maximum(np.searchsorted(nodes, x, side="left") - 1, 0)]
    upper = sums[np.minimum(np.searchsorted(nodes, x, side="right") + 1, nodes.size)]
    # Mass may lie beyond every node, but not beyond the infinities.
    return np.where(x == np.inf, sums[-1], lower), np.where(x == -np.inf, 0.0, upper)
