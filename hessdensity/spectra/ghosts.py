"""Ghosts: the copies that a recurrence without reorthogonalization finds of its eigenvalues."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from .quadrature import Rule, Tridiagonal, gauss_rule

# (v.q)^2 of a random v is smaller for only one eigenvector in 10^10 / sqrt(n), so that a smaller
# weight is rounding error.
_WEIGHTLESS = 1e-20


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
    seen, first = find_ghosts(rule.nodes, rule.weights, probe.rounding_error)
    weights = rule.weights[seen]
    mass = np.add.reduceat(weights, first)
    center = np.add.reduceat(weights * rule.nodes[seen], first) / mass
    residuals = np.minimum.reduceat(rule.residuals[seen], first)
    return replace(rule, nodes=center, weights=mass / mass.sum(), residuals=residuals)


def find_ghosts(
    nodes: np.ndarray, weights: np.ndarray, rounding_error: float
) -> tuple[np.ndarray, np.ndarray]:
    """(the nodes with a weight (m,) bool, the positions among them of each first copy)."""
    seen = weights > _WEIGHTLESS
    return seen, np.flatnonzero(np.diff(nodes[seen], prepend=-np.inf) > 4 * rounding_error)
