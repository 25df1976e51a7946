"""From a tridiagonal matrix to a Gauss rule, and what such a rule says for certain of its measure's cumulative."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, eq=False)
class Rule:
    """A discrete measure of mass 1 on the real line: what one probe knows of the spectrum.

    ``num_deflated`` nodes come first, Ritz values of a deflated subspace at weight 1/n each, without noise. The Gauss
    rule of the probe follows: the m nodes and weights that integrate polynomials up to degree 2m - 1 exactly against
    the probe's own spectral measure, sum over i of (v.q_i)^2 delta(t - lambda_i).

    Nodes are Ritz values, not eigenvalues: only those with a small residual are close to one.
    """

    nodes: np.ndarray
    """(length,) float64, in eigenvalue units; each of the two parts ascends."""
    weights: np.ndarray
    """(length,) float64, non-negative, summing to 1."""
    num_deflated: int
    """How many of the first nodes are deflated Ritz values."""
    residuals: np.ndarray
    """(length,) float64: an eigenvalue lies within this distance of the node."""

    def __post_init__(self) -> None:
        for name in ("nodes", "weights", "residuals"):
            array = np.array(getattr(self, name), float)
            array.flags.writeable = False
            object.__setattr__(self, name, array)


def gauss_rule(diagonal: np.ndarray, off_diagonal: np.ndarray, noise: float = 0.0) -> Rule:
    """The Gauss rule of a Lanczos recurrence (Golub and Welsch 1969).

    Nodes are the eigenvalues theta_i of T = tridiag(off_diagonal, diagonal, off_diagonal), weights the squared first
    components of its eigenvectors s_i, residuals |beta_m s_mi| = norm(A y_i - theta_i y_i) of the Ritz vectors.

    Args:
      diagonal: (m,) float64.
      off_diagonal: (m,) float64, the last one beta_m. T ends at the first zero: the Krylov space was invariant there.
      noise: how far the entries of T can be trusted, in eigenvalue units; residuals are not taken to be below it.

    Returns:
      A `Rule` without deflated nodes, of m nodes or fewer.

    Cost: O(m^3) on the host.
    """
    ends = np.flatnonzero(off_diagonal == 0)
    length = int(ends[0]) + 1 if ends.size else diagonal.size
    off = off_diagonal[: length - 1]
    nodes, vectors = np.linalg.eigh(np.diag(diagonal[:length]) + np.diag(off, 1) + np.diag(off, -1))
    weights = vectors[0] ** 2
    residuals = np.abs(off_diagonal[length - 1] * vectors[-1])
    return Rule(nodes, weights / weights.sum(), 0, np.maximum(residuals, noise))


def cumulative(nodes: np.ndarray, weights: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Mass of a discrete measure in (-inf, x], for every x; nodes ascend."""
    return np.concatenate([[0.0], np.cumsum(weights)])[np.searchsorted(nodes, x, side="right")]


def cumulative_bounds(nodes: np.ndarray, weights: np.ndarray, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(lower, upper) that hold the cumulative of a Gauss rule's own measure at every x, and its limit from the left.

    Chebyshev-Markov-Stieltjes: at a node the true cumulative lies between the weights strictly below it and those up to
    it. Between two nodes it therefore lies between the weights strictly below the left one and those up to the right
    one. Rigorous, whatever the spectrum; nodes ascend. (Akhiezer 1965, chapter 2.)
    """
    sums = np.concatenate([[0.0], np.cumsum(weights)])
    lower = sums[np.maximum(np.searchsorted(nodes, x, side="left") - 1, 0)]
    upper = sums[np.minimum(np.searchsorted(nodes, x, side="right") + 1, nodes.size)]
    # Nothing lies beyond the infinities, though something may beyond any node.
    return np.where(x == np.inf, sums[-1], lower), np.where(x == -np.inf, 0.0, upper)
