"""Evidence from random starts: what they would hardly have overlooked.

A random start has a part along every eigenvector, which is seldom small. The moments of its
recurrence bound the weight that an eigenvalue can have anywhere. Where this bound is small, there
is hardly another one: no second copy of an eigenvalue, and no eigenvalue beyond the others.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .ghosts import find_ghosts
from .quadrature import Rule, Tridiagonal, gauss_rule, largest_point_mass

# A node counts as a simple eigenvalue if a second copy would have stayed unseen with at most this
# probability.
_OVERLOOKED = 0.01

# A node with less than this share of the weight of one eigenvalue is not a sighting of it.
_SEEN = 1e-3

# An end of the spectrum lies outside of the enclosure with this probability.
_BEYOND = 0.05


# Evidence that an eigenvalue is simple -----------------------------------------------------------


def simple_for_orthogonal_probes(
    values: np.ndarray, residuals: np.ndarray, probes: Sequence[Tridiagonal], left: int
) -> np.ndarray:
    """Whether probes orthogonal to the eigenvectors of some eigenvalues exclude other copies.

    A copy would lie in the complement, where each probe is uniform on the sphere of N dimensions.
    Its weight would follow the law Beta(1/2, (N - 1)/2). The moments of a probe bound the weight
    that it can have at the eigenvalue (`largest_point_mass`). So the copy has stayed unseen with
    at most the probability that the weight is below this bound, for every probe. A probe that has
    found a node there has seen the copy.

    Args:
      values: the eigenvalues (c,).
      residuals: (c,): an eigenvalue lies within this distance of each.
      probes: the matrices of the probes.
      left: N.

    Returns:
      (c,) bool.
    """
    chances = []
    around = values + residuals * np.linspace(-1, 1, 9)[:, None]
    for probe in probes:
        mass = largest_point_mass(probe, around).max(axis=0)
        rule = gauss_rule(probe)
        seen = rule.weights * left > _SEEN
        reach = residuals[:, None] + rule.residuals[seen]
        met = np.any(np.abs(values[:, None] - rule.nodes[seen]) <= reach, axis=1)
        chances.append(np.where(met, 1.0, _chance_of_less(mass, left)))
    return _together(chances) <= _OVERLOOKED


def simple_for_parallel_probes(
    probes: Sequence[Tridiagonal], merged: Sequence[Rule], index: int
) -> np.ndarray:
    """Whether probes that ran side by side have found the same eigenvector at a probe's nodes.

    Let u and v be the starts of two probes, and P the projection to the eigenspace of an isolated
    eigenvalue. The rules have u.Pu and v.Pv, and the inner products of the Lanczos vectors with the
    other start give u.Pv. If the eigenvalue is simple, (u.Pv)^2 = u.Pu v.Pv. If it is multiple, Pu
    and Pv point in random directions of its eigenspace. The squared cosine between them is then
    close to 1 with a probability of at most 2/pi sqrt(1 - cosine^2).

    Args:
      probes: the matrices of all probes.
      merged: their rules with merged ghosts, from `merge_ghosts`.
      index: the position of the probe whose nodes are judged.

    Returns:
      (length,) bool, for the nodes of ``merged[index]``.
    """
    own = probes[index]
    ours = merged[index]
    together = probes_together(probes, index)
    if len(together) < 2:
        return np.zeros(ours.nodes.size, bool)
    # u.Pv for all copies of an eigenvalue together, which holds without orthogonality of the basis.
    nodes, vectors = own.eigh()
    seen, first = find_ghosts(nodes, vectors[0] ** 2, own.rounding_error)
    crossed = (own.start_products[: own.length].T @ vectors) * vectors[0]
    crossed = np.add.reduceat(crossed[:, seen], first, axis=1)
    chances = []
    for column, other in enumerate(together):
        if other == index:
            continue
        theirs = merged[other]
        nearest = np.abs(ours.nodes[:, None] - theirs.nodes).argmin(axis=1)
        reach = ours.residuals + theirs.residuals[nearest]
        same = np.abs(ours.nodes - theirs.nodes[nearest]) <= reach
        same &= theirs.isolated[nearest]
        squares = ours.weights * theirs.weights[nearest]
        cosine = np.minimum(crossed[column] ** 2 / np.where(squares > 0, squares, np.inf), 1)
        chances.append(np.where(same, 2 / np.pi * np.sqrt(1 - cosine), 1.0))
    return _together(chances) <= _OVERLOOKED


def _chance_of_less(mass: np.ndarray, dimension: int) -> np.ndarray:
    """The probability that a random start has at most some mass along one eigenvector."""
    from scipy.special import betainc

    if dimension == 1:
        return np.where(mass >= 1, 1.0, 0.0)
    return np.asarray(betainc(0.5, (dimension - 1) / 2, mass))


def _together(chances: Sequence[np.ndarray]) -> np.ndarray:
    """The chance that independent chances have a product as small as theirs (Fisher 1925).

    The product itself would be too small: of five chances between 0 and 1, it is below 0.05 four
    times in five.
    """
    from scipy.special import gammaincc

    with np.errstate(divide="ignore"):
        return np.asarray(gammaincc(len(chances), -np.sum(np.log(chances), axis=0)))


def probes_together(probes: Sequence[Tridiagonal], index: int) -> list[int]:
    """The positions of the probes that ran side by side with one probe, itself among them."""
    first = 0
    while first < len(probes):
        count = max(probes[first].start_products.shape[1], 1)
        if index < first + count:
            return list(range(first, first + count))
        first += count
    return [index]


# The ends of the spectrum ------------------------------------------------------------------------


def ends_of_the_spectrum(runs: Sequence[Tridiagonal], dimension: int) -> tuple[float, float]:
    """(low, high) within which each end of the spectrum lies with a probability of 95 %.

    The smallest and the largest Ritz value lie inside the spectrum. An eigenvalue beyond them has
    at least the weight of one eigenvector in every run from a random start, which follows the law
    Beta(1/2, (n - 1)/2). The moments of a run bound the weight that is possible there
    (`largest_point_mass`), and this bound falls fast. So the eigenvalue would have to be one that
    every run overlooks (van Dorsselaer, Hochstenbach and van der Vorst 2000).
    """
    ritz = np.concatenate([run.eigh()[0] for run in runs])
    low, high = float(ritz.min()), float(ritz.max())
    if dimension == 1 or any(run.length == dimension for run in runs):
        return low, high

    def overlooked(x: float) -> float:
        masses = [largest_point_mass(run, np.array([x])) for run in runs]
        return float(_together([_chance_of_less(mass, dimension) for mass in masses])[0])

    def end(start: float, sign: int) -> float:
        rounding = max(run.rounding_error for run in runs)
        step = max(high - low, abs(low), abs(high)) * 1e-9 + rounding
        if not step > 0:
            return start
        inside, outside = start, start + sign * step
        while overlooked(outside) > _BEYOND:
            step *= 2
            inside, outside = outside, start + sign * step
        for _ in range(40):
            middle = (inside + outside) / 2
            beyond = overlooked(middle) > _BEYOND
            inside, outside = (middle, outside) if beyond else (inside, middle)
        return outside + sign * rounding

    return end(low, -1), end(high, 1)
