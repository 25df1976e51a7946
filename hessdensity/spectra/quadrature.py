"""Quadrature rules of tridiagonal matrices, and rigorous bounds on a cumulative from such rules.

m Lanczos steps determine the moments of a measure up to degree 2m. They do not determine the
measure. One member of a family of rules stands for each of the measures that are left:

    T_{m+1}(phi): T_m, bordered by beta, with the last diagonal entry alpha + beta tan(phi).

Each member is a Gauss-Radau rule: its m + 1 nodes integrate polynomials up to degree 2m exactly,
and for every x there is a phi that makes x a node (Golub 1973). Two members interlace. So their
mean is smoother than the Gauss rule, and their spread shows what m steps leave open. For a
cumulative, this spread is exactly the Chebyshev-Markov-Stieltjes bounds (Akhiezer 1965, chapter 2).
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import NamedTuple, TypeAlias

import numpy as np

Members: TypeAlias = "list[tuple[np.ndarray, np.ndarray]]"
"""(nodes, weights) of several rules, each with ascending nodes."""

# A node is isolated if its residual is at most this share of the distance to the next node. Its
# Ritz value is then off by 1e-4 of that distance, and the weight by as much.
_ISOLATED = 0.01

_LAST_BITS = 1e-12  # relative distance of nodes between which nothing can be told apart

ANGLES = np.pi * ((np.arange(16) + 0.5) / 16 - 0.5)
"""The angles of a family. 8 give the same mean, and certain bounds that are a little wider."""


@dataclass(frozen=True, eq=False)
class Rule:
    """A discrete measure of mass 1 on the real line: the estimate of a spectrum from one probe.

    The first ``num_deflated`` nodes are the Ritz values of a deflated subspace. Each has weight
    1/n, without random error. The other nodes are the Gauss rule of the probe v: its m nodes and
    weights integrate polynomials up to degree 2m - 1 exactly against the probe's own spectral
    measure, sum over i of (v.q_i)^2 delta(t - lambda_i).

    Nodes are Ritz values, not eigenvalues. Only a node with a small residual is close to an
    eigenvalue.

    The Gauss rule is one of many rules that agree with what the probe has seen. ``members`` holds
    others. Their mean is the estimate, and their spread is the error of quadrature (see
    `hessdensity.spectra.quadrature`).
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
    """Nuclear norm of half of the coupling between the deflated subspace and its complement.

    The rule leaves the coupling out, with an error of at most ``coupling_rank / n`` in the
    cumulative and of at most 2 coupling/n in W1. Both are 0 where nothing is left out.
    """
    coupling_rank: int = 1
    """Rank of the coupling: the number of vectors that the deflation started from."""
    diagonal: np.ndarray = field(default_factory=lambda: np.zeros(0))
    """(m,) float64: the diagonal of the tridiagonal matrix of the probe.

    Empty if it is unknown, as in files of earlier versions. The rule then has no family.
    """
    off_diagonal: np.ndarray = field(default_factory=lambda: np.zeros(0))
    """(m,) float64: the entries below the diagonal. The last one lies outside of the matrix.

    If it is 0, the Krylov space of the probe is exhausted, and quadrature is exact.
    """
    pinned: bool = False
    """Whether the probe itself found the deflated nodes, as eigenvalues of weight 1/n."""
    enclosure: tuple[float, float] = (-np.inf, np.inf)
    """(low, high), in eigenvalue units: each end of the spectrum lies within it in 95 % of runs."""

    def __post_init__(self) -> None:
        for name in ("nodes", "weights", "residuals", "diagonal", "off_diagonal"):
            array = np.array(getattr(self, name), float)
            array.flags.writeable = False
            object.__setattr__(self, name, array)

    def enclosed(self, enclosure: tuple[float, float]) -> Rule:
        """The rule with this enclosure of the spectrum."""
        return replace(self, enclosure=enclosure)

    @property
    def rounding(self) -> float:
        """Rounding error of the nodes, in eigenvalue units. No residual is smaller."""
        return float(self.residuals.min())

    @cached_property
    def isolated(self) -> np.ndarray:
        """(length,) bool: whether a node's residual is far below the distance to the others."""
        order = np.argsort(self.nodes, kind="stable")
        gaps = np.diff(self.nodes[order])
        distance = np.empty(self.nodes.size)
        distance[order] = np.minimum(np.append(gaps, np.inf), np.insert(gaps, 0, np.inf))
        return self.residuals <= _ISOLATED * distance

    @property
    def share(self) -> float:
        """The weight of the probe's part."""
        return float(self.weights[self.num_deflated :].sum())

    def family(self, angles: np.ndarray) -> Members:
        """(nodes, weights) of the probe's rules at some angles phi, each with the probe's share."""
        nodes, weights = radau_rules(self.diagonal, self.off_diagonal, angles)
        if self.pinned:
            pinned = slice(0, self.num_deflated)
            reach = 2 * self.residuals[pinned]
            weights = np.array(
                [
                    _without(*each, self.nodes[pinned], reach)
                    for each in zip(nodes, weights, strict=True)
                ]
            )
        return [(x, w * self.share) for x, w in zip(nodes, weights, strict=True)]

    @cached_property
    def members(self) -> Members:
        """(nodes, weights) of the rules of the probe's part that agree with its moments.

        The first is the Gauss rule. The others are the family at evenly spread angles. The mean of
        the family is the estimate. Without a family, the Gauss rule is.
        """
        own = self.nodes[self.num_deflated :], self.weights[self.num_deflated :]
        return [own] if self.exact or not self.diagonal.size else [own, *self.family(ANGLES)]

    def angles_through(self, points: np.ndarray) -> np.ndarray:
        """The angle of the rule with a node at each point. No point is a node of the Gauss rule."""
        alpha, beta = self.diagonal[-1], self.off_diagonal[-1]
        values, last = self._last_components
        # The determinant of T_{m+1} - x, expanded in its last row and column, is zero.
        entry = points - beta**2 * np.sum(last**2 / (points[:, None] - values), axis=1)
        return np.arctan((entry - alpha) / beta)

    @cached_property
    def _last_components(self) -> tuple[np.ndarray, np.ndarray]:
        """The eigenvalues of T, and the last components of its eigenvectors."""
        values, vectors = _eigh(self.diagonal, self.off_diagonal[:-1], "stev")
        return values, vectors[-1]

    @cached_property
    def gaps(self) -> tuple[np.ndarray, np.ndarray]:
        """(left, right): the gaps between nodes, with one as wide beside each outermost node.

        Gaps that rounding could have made are left out.
        """
        values, _ = self._last_components
        widths = np.diff(values) if values.size > 1 else np.abs(values) + self.off_diagonal[-1:]
        edges = np.concatenate([values[:1] - widths[:1], values, values[-1:] + widths[-1:]])
        wide = np.diff(edges) > _LAST_BITS * np.abs(edges).max()
        return edges[:-1][wide], edges[1:][wide]

    @cached_property
    def crossing(self) -> tuple[np.ndarray, Members]:
        """Points in every gap between nodes, three in each, and the rules with a node there.

        Where the probe knows the spectrum well, a node stays in its place at almost every angle,
        and crosses a gap within a tiny range of angles. So evenly spread angles do not show what a
        function with a jump in this gap may do.
        """
        left, right = self.gaps
        points = np.concatenate([left + share * (right - left) for share in (0.1, 0.5, 0.9)])
        return points, self.family(self.angles_through(points))

    @property
    def exact(self) -> bool:
        """Whether the rule has no error of quadrature."""
        if self.diagonal.size:
            return not self.off_diagonal[-1]
        return not self.residuals[self.num_deflated :].any()

    @property
    def estimate(self) -> tuple[np.ndarray, np.ndarray]:
        """(nodes, weights) of the estimate: the deflated part and the mean of the family."""
        family = self.members[1:] or self.members
        nodes, weights = (np.concatenate(each) for each in zip(*family, strict=True))
        count = self.num_deflated
        return (
            np.concatenate([self.nodes[:count], nodes]),
            np.concatenate([self.weights[:count], weights / len(family)]),
        )


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
    start_products: np.ndarray = np.zeros((0, 0))
    """(j, k) float64: inner products of the Lanczos vectors with the starts of k probes, or empty.

    Only recurrences without a stored basis have them, for the probes that ran together.
    """

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
        products = self.start_products[:num_steps]
        return Tridiagonal(diagonal, off_diagonal, coupling, self.rounding_error, products)

    def eigh(self) -> tuple[np.ndarray, np.ndarray]:
        """Ritz values (m,), ascending, and Ritz vectors in the Lanczos basis, as columns (m, m)."""
        length = self.length
        # The vectors of this driver are orthogonal to the last bit.
        return _eigh(self.diagonal[:length], self.off_diagonal[: length - 1], "stev")

    def residuals(self, vectors: np.ndarray) -> np.ndarray:
        """(m,): norms of A y - theta y for the Ritz vectors y that `eigh` returned."""
        couplings = np.abs(self.coupling * vectors[-1])
        if self.deflation_coupling.size:
            others = self.deflation_coupling[: self.length].T
            unit = np.abs(others).max() or 1.0  # so that squares do not overflow
            lengths = unit * np.linalg.norm(others / unit @ vectors, axis=0)
            couplings = np.hypot(couplings, lengths)
        return np.maximum(couplings, 2 * self.rounding_error)


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
    length = tridiagonal.length
    return Rule(
        nodes,
        weights / weights.sum(),
        0,
        tridiagonal.residuals(vectors),
        diagonal=tridiagonal.diagonal[:length],
        off_diagonal=tridiagonal.off_diagonal[:length],
    )


def radau_rules(
    diagonal: np.ndarray, off_diagonal: np.ndarray, angles: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """(nodes, weights) of the Gauss-Radau rules of T at some angles phi, each (angles, m + 1)."""
    last = diagonal[-1] + off_diagonal[-1] * np.tan(angles)
    pairs = [_eigh(np.append(diagonal, entry), off_diagonal, "stemr") for entry in last]
    nodes = np.array([values for values, _ in pairs])
    weights = np.array([vectors[0] ** 2 for _, vectors in pairs])
    return nodes, weights / weights.sum(axis=1, keepdims=True)


def _eigh(
    diagonal: np.ndarray, off_diagonal: np.ndarray, driver: str
) -> tuple[np.ndarray, np.ndarray]:
    """Eigenvalues, ascending, and eigenvectors, as columns, of a tridiagonal matrix.

    ``stemr`` is the fastest driver for large matrices, but it may fail for a matrix with tight
    clusters. ``stev`` never fails.
    """
    from scipy.linalg import eigh_tridiagonal

    try:
        return eigh_tridiagonal(diagonal, off_diagonal, lapack_driver=driver, check_finite=False)
    except np.linalg.LinAlgError:
        return eigh_tridiagonal(diagonal, off_diagonal, lapack_driver="stev", check_finite=False)


def _without(
    nodes: np.ndarray, weights: np.ndarray, values: np.ndarray, reach: np.ndarray
) -> np.ndarray:
    """The weights of a rule without the nodes that stand for some eigenvalues, of mass 1."""
    distance = np.abs(nodes[:, None] - values)
    taken = np.any(distance <= reach, axis=1)
    taken[distance.argmin(axis=0)] = True
    rest = np.where(taken, 0.0, weights)
    return rest / (rest.sum() or 1)


def largest_point_mass(tridiagonal: Tridiagonal, x: np.ndarray) -> np.ndarray:
    """The most mass that a measure with this tridiagonal matrix can have at x, for every x.

    This is the Christoffel function 1 / sum over k of p_k(x)^2, where p_0 .. p_m are the
    orthonormal polynomials of the measure (Akhiezer 1965, chapter 2). It falls fast beyond the
    spectrum.
    """
    length = tridiagonal.length
    before = np.zeros_like(x, dtype=float)
    polynomial = np.ones_like(before)
    total = np.ones_like(before)
    # A space that is exhausted is so up to rounding, which is also in x.
    off = np.maximum(tridiagonal.off_diagonal[:length], 16 * tridiagonal.rounding_error)
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
        for step in range(length):
            # beta_j p_{j+1} = (x - alpha_j) p_j - beta_{j-1} p_{j-1}
            following = (x - tridiagonal.diagonal[step]) * polynomial
            following = (following - (off[step - 1] if step else 0) * before) / off[step]
            before, polynomial = polynomial, following
            total = total + polynomial**2
        return np.where(np.isfinite(total), 1 / total, 0.0)


def cumulative(nodes: np.ndarray, weights: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Mass of a discrete measure in (-inf, x], for every x. The nodes must ascend."""
    return np.concatenate([[0.0], np.cumsum(weights)])[np.searchsorted(nodes, x, side="right")]


def cumulative_bounds(members: Members, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Bounds (lower, upper) at every x on the cumulative of the measure behind some rules.

    They also bound the limit of the cumulative from the left. Every rule is a Gauss or Gauss-Radau
    rule of the measure, and its nodes ascend.

    By the Chebyshev-Markov-Stieltjes inequalities (Akhiezer 1965, chapter 2), the true cumulative
    at a node lies between the sum of the weights strictly below the node and the sum of the weights
    up to it. Between two nodes it therefore lies between the weights strictly below the left one
    and those up to the right one. The bounds are rigorous for every spectrum, and the more members
    of the family, the closer they are to the best that the moments allow.
    """
    lower, upper = np.full(np.shape(x), -np.inf), np.full(np.shape(x), np.inf)
    for nodes, weights in members:
        sums = np.concatenate([[0.0], np.cumsum(weights)])
        left = np.maximum(np.searchsorted(nodes, x, side="left") - 1, 0)
        right = np.minimum(np.searchsorted(nodes, x, side="right") + 1, nodes.size)
        # Mass may lie beyond every node, but not beyond the infinities.
        lower = np.maximum(lower, np.where(x == np.inf, sums[-1], sums[left]))
        upper = np.minimum(upper, np.where(x == -np.inf, 0.0, sums[right]))
    return lower, upper
