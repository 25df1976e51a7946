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

import numpy as np

from .quadrature import Rule, Tridiagonal, gauss_rule

# (v.q)^2 of a random v is smaller for only one eigenvector in 10^10 / sqrt(n), so that a smaller
# weight is rounding error.
_WEIGHTLESS = 1e-20

# A node is isolated if its residual is at most this share of the distance to the next node. Its
# Ritz value is then off by 1e-4 of that distance, and the weight by as much.
_ISOLATED = 0.01


def combine(
    run: Tridiagonal | None, probes: list[Tridiagonal], dimension: int, *, implicit: bool = False
) -> tuple[Rule, ...]:
    """The rules of a deflated estimate: one of the deflation run, if any, and one for each probe.

    All m0 Ritz values of the run enter the rules of the probes, each with weight exactly 1/n. The
    Gauss rule of the probe has the remaining weight (n - m0)/n. The run is a probe too, because v0
    was random. Its own quadrature is therefore one more rule, in which the isolated eigenvalues
    that it found are reset to weight 1/n (`pin_isolated`).

    Args:
      run: the matrix of the deflation run, or None.
      probes: the matrices of the probes that were kept orthogonal to the run.
      dimension: n.
      implicit: whether the probes kept no basis. Their ghosts are then merged, and isolated
        eigenvalues have weight 1/n.
    """
    if implicit:
        return tuple(pin_isolated(merge_ghosts(probe), dimension) for probe in probes)
    if run is None:
        return tuple(map(gauss_rule, probes))
    own = gauss_rule(run)
    left = dimension - run.length
    ritz, vectors = run.eigh()
    residuals = run.residuals(vectors)
    if not left:  # The run went through the whole space, so that these are all the eigenvalues.
        return (Rule(ritz, np.full(dimension, 1 / dimension), dimension, residuals),)
    if not probes:
        return (own,)
    parts = list(map(gauss_rule, probes))
    rules = [
        Rule(
            np.concatenate([ritz, part.nodes]),
            np.concatenate([np.full(ritz.size, 1 / dimension), part.weights * left / dimension]),
            ritz.size,
            np.concatenate([residuals, part.residuals]),
            run.coupling,
        )
        for part in parts
    ]
    return (pin_isolated(own, dimension, parts), *rules)


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
    seen = rule.weights > _WEIGHTLESS
    nodes = rule.nodes[seen]
    weights = rule.weights[seen]
    residuals = rule.residuals[seen]
    first = np.flatnonzero(np.diff(nodes, prepend=-np.inf) > 4 * probe.rounding_error)
    mass = np.add.reduceat(weights, first)
    center = np.add.reduceat(weights * nodes, first) / mass
    return Rule(center, mass / mass.sum(), 0, np.minimum.reduceat(residuals, first))


def pin_isolated(rule: Rule, dimension: int, elsewhere: Sequence[Rule] = ()) -> Rule:
    """The rule of a probe with weight 1/n for every isolated eigenvalue that the probe found.

    This is implicit deflation, which takes the noise out of these weights. A node whose residual is
    far below the distance to its neighbors is an eigenvalue, and its weight is (v.q)^2. But the
    true weight of this eigenvalue is known: 1/n. The other components of the probe remain a uniform
    point on their own sphere. The other weights are therefore rescaled to sum to (n - c)/n, where c
    is the number of nodes that are reset.

    Args:
      rule: the rule of a probe, without deflated nodes.
      dimension: n.
      elsewhere: rules of probes kept orthogonal to the basis of this one. A node that they find
        again at the same place is a multiple eigenvalue, and keeps its weight. Without such rules,
        an eigenvalue is taken to be simple unless its weight is too large for a simple one.

    Returns:
      A `Rule` whose first c nodes are those that were reset.
    """
    distance = np.full(rule.nodes.size, np.inf)
    gaps = np.diff(rule.nodes)
    distance[1:] = gaps
    distance[:-1] = np.minimum(distance[:-1], gaps)
    # A chi-square variable with one degree of freedom exceeds 20 once in 100,000 cases.
    single = (rule.residuals <= _ISOLATED * distance) & (rule.weights * dimension < 20)
    for other in elsewhere:
        seen = other.weights * dimension > 1e-3
        reach = np.minimum(
            rule.residuals[:, None] + other.residuals[None, seen], distance[:, None] / 2
        )
        single &= ~np.any(np.abs(rule.nodes[:, None] - other.nodes[None, seen]) <= reach, axis=1)
    rest = rule.weights[~single].sum()
    if not single.any() or not rest > 0:
        return rule
    count = int(single.sum())
    order = np.concatenate([np.flatnonzero(single), np.flatnonzero(~single)])
    weights = np.where(single, 1 / dimension, rule.weights * (1 - count / dimension) / rest)
    return Rule(rule.nodes[order], weights[order], count, rule.residuals[order])
