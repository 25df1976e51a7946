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

from dataclasses import replace

import numpy as np

from .evidence import (
    ends_of_the_spectrum,
    simple_for_orthogonal_probes,
    simple_for_parallel_probes,
)
from .ghosts import merge_ghosts
from .quadrature import Rule, Tridiagonal, gauss_rule


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
