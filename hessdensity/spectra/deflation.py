"""Krylov deflation: how a Lanczos run, and probes kept orthogonal to its basis, make one estimate
of the spectrum.

One random start gives an outlier the weight (v.q)^2, a chi-square around 1/n with more than 100 %
spread: that noise dominates stochastic Lanczos quadrature. So a first run of m0 steps from a random
v0 keeps its basis Q, and every further probe starts, and stays, orthogonal to Q.

Theorem. Let A be symmetric, T = Q A Q^T the run's tridiagonal matrix, C the compression of A to the
complement of Q's span, beta the run's last off-diagonal entry. The number of eigenvalues up to x,
of A and of T and C together, differ by at most 1 for every x, converged or not; hence the
cumulatives by at most 1/n, and W1 by at most 2 beta/n.

Proof. A V^T = V^T T + beta q e^T leaves, in the basis of Q and its complement, a single coupling:
between the last Lanczos vector and the next one, q. So A = (T + C) + E, E of rank two with
eigenvalues beta and -beta. Adding the positive part moves every counting function down by at most
1, adding the negative part up by at most 1 (Weyl's interlacing), which gives the first claim. W1 of
two spectra of n is the mean of |lambda_i(A) - lambda_i(T + C)| over sorted eigenvalues, at most the
sum of |eigenvalues of E| over n (Lidskii), which gives the second."""

from __future__ import annotations

import numpy as np

from .quadrature import Rule, Tridiagonal, gauss_rule

_WEIGHTLESS = 1e-20  # (v.q)^2 of a random v is below that for one eigenvector in 10^10 / sqrt(n): it is rounding
_ISOLATED = 0.01  # of the distance to the next node: the Ritz value is then off by 1e-4 of it, the weight by as much


def combine(
    run: Tridiagonal | None, probes: list[Tridiagonal], dimension: int, *, implicit: bool = False
) -> tuple[Rule, ...]:
    """The rules of a deflated estimate: the deflation run's own, if there is one, and one a probe.

    All m0 Ritz values of the run enter the probes' rules at weight exactly 1/n, the Gauss rule of
    the probe carries (n - m0)/n. The run is a probe as well: v0 was random. Its own quadrature,
    with the isolated eigenvalues that it found reset to weight 1/n (`isolate`), is one more rule.

    Args:
      run: of the deflation, or None.
      probes: of the probes that were kept orthogonal to it.
      dimension: n.
      implicit: the probes had no basis: of each the ghosts are merged, and isolated eigenvalues
        have weight 1/n.
    """
    if implicit:
        return tuple(isolate(merge_ghosts(probe), dimension) for probe in probes)
    if run is None:
        return tuple(map(gauss_rule, probes))
    own, left = gauss_rule(run), dimension - run.length
    ritz, vectors = run.eigh()
    residuals = run.residuals(vectors)
    if not left:  # The run went through the whole space: these are all the eigenvalues.
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
    return (isolate(own, dimension, parts), *rules)


def merge_ghosts(probe: Tridiagonal) -> Rule:
    """The Gauss rule of a recurrence without reorthogonalization, its ghosts merged.

    Such a recurrence finds a converged eigenvalue again and again: copies of its node, equal to
    rounding, that share its weight, and between them newcomers of next to no weight (Paige 1976;
    Cullum and Willoughby 1985). The rule as it stands is right: it is the exact one of a matrix
    whose eigenvalues are those of A, each blurred by rounding (Greenbaum 1989). But a node crowded
    by its own copies does not pass for isolated. So the weightless are dropped, and nodes closer
    than rounding can tell become one, at their mean."""
    rule = gauss_rule(probe)
    seen = rule.weights > _WEIGHTLESS
    nodes, weights, residuals = rule.nodes[seen], rule.weights[seen], rule.residuals[seen]
    first = np.flatnonzero(np.diff(nodes, prepend=-np.inf) > 4 * probe.rounding_error)
    mass = np.add.reduceat(weights, first)
    center = np.add.reduceat(weights * nodes, first) / mass
    return Rule(center, mass / mass.sum(), 0, np.minimum.reduceat(residuals, first))


def isolate(rule: Rule, dimension: int, elsewhere: list[Rule] = ()) -> Rule:  # type: ignore[assignment]
    """Implicit deflation: a probe's rule with every isolated eigenvalue that it found at weight
    1/n, without noise.

    A node whose residual is far below the distance to its neighbors is an eigenvalue, and the
    probe's weight there is (v.q)^2. That eigenvalue's true weight is known, 1/n; the probe's other
    components remain a uniform point of their own sphere, so that the rest is rescaled to (n -
    c)/n, c being the number of nodes reset.

    Args:
      rule: of a probe, without deflated nodes.
      dimension: n.
      elsewhere: rules of probes kept orthogonal to this one's basis. What they find again at the
        same place is a multiple eigenvalue, and keeps its weight. Without them, eigenvalues are
        taken to be simple unless the weight is too large for one.

    Returns:
      A `Rule` whose first c nodes are those reset.
    """
    distance = np.full(rule.nodes.size, np.inf)
    gaps = np.diff(rule.nodes)
    distance[1:] = gaps
    distance[:-1] = np.minimum(distance[:-1], gaps)
    # A chi-square of one degree is above 20 once in 100,000.
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
