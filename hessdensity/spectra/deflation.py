"""Krylov deflation: one estimate from a Lanczos run and from probes orthogonal to its basis.

A random start vector v gives an outlier the weight (v.q)^2, a chi-square variable around 1/n with
a spread of more than 100 %. This noise dominates stochastic Lanczos quadrature. Deflation therefore
makes a first run of m0 steps from a random v0 and keeps its basis Q. Every further probe starts,
and stays, orthogonal to Q.

Theorem. Let A be symmetric, T = Q A Q^T the tridiagonal matrix of the run, C the compression of A
to the complement of the span of Q, and beta the last off-diagonal entry of the run. For every x,
the number of eigenvalues up to x of A differs by at most 1 from that of T and C together, whether
the run has converged or not. Their cumulatives therefore differ by at most 1/n, and their W1
distance is at most 2 beta/n.

Proof. By A Q^T = Q^T T + beta q e^T, there is a single coupling in the basis of Q and its
complement: the one between the last Lanczos vector and the next one, q. So A = (T + C) + E, where E
has rank two and the eigenvalues beta and -beta. Adding the positive part of E moves every counting
function down by at most 1, and adding the negative part moves it up by at most 1 (Weyl's
interlacing). This proves the first claim. The W1 distance of two spectra of n eigenvalues is the
mean of |lambda_i(A) - lambda_i(T + C)| over sorted eigenvalues. This mean is at most the sum of
|eigenvalues of E| divided by n (Lidskii), which proves the second claim.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from .quadrature import Rule, Tridiagonal, gauss_rule, largest_point_mass

# (v.q)^2 of a random v is smaller for only one eigenvector in 10^10 / sqrt(n), so that a smaller
# weight is rounding error.
_WEIGHTLESS = 1e-20

# A node counts as a simple eigenvalue if a second copy would have stayed unseen with at most this
# probability.
_OVERLOOKED = 0.01

# A node with less than this share of the weight of one eigenvalue is not a sighting of it.
_SEEN = 1e-3

# An end of the spectrum lies outside of the enclosure with this probability.
_BEYOND = 0.05


def combine(
    run: Tridiagonal | None, probes: list[Tridiagonal], dimension: int, *, implicit: bool = False
) -> tuple[Rule, ...]:
    """The rules of a deflated estimate: one of the deflation run, if any, and one for each probe.

    All m0 Ritz values of the run enter the rules of the probes, each with weight exactly 1/n. The
    Gauss rule of the probe has the remaining weight (n - m0)/n. The run is a probe too, because v0
    was random. Its own quadrature is therefore one more rule, in which the simple isolated
    eigenvalues that it found are reset to weight 1/n (`pin_isolated`). It is left out if it has
    less than half of the steps of the probes.

    Args:
      run: the matrix of the deflation run, or None.
      probes: the matrices of the probes that were kept orthogonal to the run.
      dimension: n.
      implicit: whether the probes kept no basis. Their ghosts are then merged, and simple isolated
        eigenvalues have weight 1/n.
    """
    enclosure = ends_of_the_spectrum([run] if run else probes, dimension)
    if implicit:
        merged = list(map(merge_ghosts, probes))
        rules = [
            pin_isolated(rule, dimension, simple_for_parallel_probes(probes, merged, index))
            for index, rule in enumerate(merged)
        ]
    elif run is None:
        rules = list(map(gauss_rule, probes))
    else:
        rules = _deflated(run, probes, dimension)
    return tuple(rule.enclosed(enclosure) for rule in rules)


def _deflated(run: Tridiagonal, probes: list[Tridiagonal], dimension: int) -> list[Rule]:
    own = gauss_rule(run)
    left = dimension - run.length
    if not left:  # The run went through the whole space, so that these are all the eigenvalues.
        weights = np.full(dimension, 1 / dimension)
        return [Rule(own.nodes, weights, dimension, own.residuals)]
    if not probes:
        return [own]
    rules = [
        deflated_rule(own.nodes, own.residuals, each, dimension, run.coupling) for each in probes
    ]
    if 2 * run.length < min(each.length for each in probes):
        return rules  # its quadrature is far worse than theirs, and no probe can lower this error
    simple = simple_for_orthogonal_probes(own.nodes, own.residuals, probes, left)
    return [pin_isolated(own, dimension, simple), *rules]


def deflated_rule(
    ritz: np.ndarray,
    residuals: np.ndarray,
    probe: Tridiagonal,
    dimension: int,
    coupling: float,
    coupling_rank: int = 1,
) -> Rule:
    """The rule of a probe in the complement of a subspace with these Ritz values.

    Args:
      ritz: the Ritz values (m0,), each of weight 1/n.
      residuals: their residuals (m0,).
      probe: the matrix of the probe, whose rule has the remaining weight (n - m0)/n.
      dimension: n.
      coupling: nuclear norm of the block that couples the subspace to its complement.
      coupling_rank: rank of that block.
    """
    part = gauss_rule(probe)
    share = (dimension - ritz.size) / dimension
    return Rule(
        np.concatenate([ritz, part.nodes]),
        np.concatenate([np.full(ritz.size, 1 / dimension), part.weights * share]),
        ritz.size,
        np.concatenate([residuals, part.residuals]),
        coupling,
        coupling_rank,
        part.diagonal,
        part.off_diagonal,
    )


def merge_ghosts(probe: Tridiagonal) -> Rule:
    """The Gauss rule of a recurrence without reorthogonalization, with its ghosts merged.

    Such a recurrence finds a converged eigenvalue again and again. Copies of the node, equal up to
    rounding, share its weight, and new nodes of almost no weight appear between them (Paige 1976;
    Cullum and Willoughby 1985). This rule is already correct: it is the exact rule of a matrix
    whose eigenvalues are those of A, each blurred by rounding (Greenbaum 1989). But a node close to
    its own copies does not count as isolated. So nodes of negligible weight are dropped, and nodes
    that are closer than rounding can resolve are replaced by one node at their mean.
    """
    rule = gauss_rule(probe)
    seen, first = _ghosts(rule.nodes, rule.weights, probe.rounding_error)
    weights = rule.weights[seen]
    mass = np.add.reduceat(weights, first)
    center = np.add.reduceat(weights * rule.nodes[seen], first) / mass
    residuals = np.minimum.reduceat(rule.residuals[seen], first)
    return replace(rule, nodes=center, weights=mass / mass.sum(), residuals=residuals)


def _ghosts(
    nodes: np.ndarray, weights: np.ndarray, rounding_error: float
) -> tuple[np.ndarray, np.ndarray]:
    """(the nodes with a weight (m,) bool, the positions among them of each first copy)."""
    seen = weights > _WEIGHTLESS
    return seen, np.flatnonzero(np.diff(nodes[seen], prepend=-np.inf) > 4 * rounding_error)


def pin_isolated(rule: Rule, dimension: int, simple: np.ndarray) -> Rule:
    """The rule of a probe with weight 1/n for every simple isolated eigenvalue that it found.

    This is implicit deflation, which takes the noise out of these weights. A node whose residual is
    far below the distance to its neighbors is an eigenvalue, and its weight is the squared length
    of the probe's part in the eigenspace. If the eigenvalue is simple, its true weight is known:
    1/n. The other components of the probe remain a uniform point on their own sphere. The other
    weights are therefore rescaled to sum to (n - c)/n, where c is the number of nodes that are
    reset. An eigenvalue that may be multiple keeps its weight and the noise of this weight.

    Args:
      rule: the rule of a probe, without deflated nodes.
      dimension: n.
      simple: (length,) bool: whether the probes have shown that the eigenvalue at a node has no
        other copies.

    Returns:
      A `Rule` whose first c nodes are those that were reset.
    """
    # Where another Ritz pair may still belong to the same eigenvalue, rounding has brought a copy.
    distance = np.abs(rule.nodes[:, None] - rule.nodes)
    np.fill_diagonal(distance, np.inf)
    pinned = rule.isolated & simple & np.all(distance > rule.residuals, axis=1)
    rest = rule.weights[~pinned].sum()
    if not pinned.any() or not rest > 0:
        return rule
    share = 1 - pinned.sum() / dimension
    order = np.concatenate([np.flatnonzero(pinned), np.flatnonzero(~pinned)])
    weights = np.where(pinned, 1 / dimension, rule.weights * share / rest)
    return replace(
        rule,
        nodes=rule.nodes[order],
        weights=weights[order],
        num_deflated=int(pinned.sum()),
        residuals=rule.residuals[order],
        pinned=True,
    )


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
    seen, first = _ghosts(nodes, vectors[0] ** 2, own.rounding_error)
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
