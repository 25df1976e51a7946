"""How far an estimated spectrum may be from the true one, estimated from itself, and where the
error is."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from .deflation import combine
from .quadrature import Rule, Tridiagonal, cumulative


class Accuracy(NamedTuple):
    """The estimated W1 distance to the true spectrum, over the spectrum's range, by cause.

    An estimate, not a bound: rigorous bounds are tens of times wider
    (`SpectralDensity.cdf_bounds`)."""

    quadrature: float
    """Too few steps: W1 between the rules and those of two thirds of their steps."""
    probes: float
    """Too few probes: the expected W1 of their randomness, sqrt(2/pi) integral of sqrt(2 F (1 - F)
    / (k (N + 2)))."""
    coupling: float
    """What deflation left out: 2 beta / n, at most."""

    @property
    def total(self) -> float:
        """The sum."""
        return self.quadrature + self.probes + self.coupling


def estimate(
    run: Tridiagonal | None, probes: list[Tridiagonal], dimension: int, *, implicit: bool = False
) -> Accuracy:
    """The accuracy of the rules that `deflation.combine` makes of these.

    Args:
      run: of the deflation, or None.
      probes: of the probes.
      dimension: n.
      implicit: as for `deflation.combine`.
    """
    rules = combine(run, probes, dimension, implicit=implicit)
    fewer = list(map(_two_thirds, probes))
    shorter = combine(
        _two_thirds(run) if run and not probes else run, fewer, dimension, implicit=implicit
    )
    nodes = np.unique(np.concatenate([rule.nodes for rule in rules]))
    span = float(nodes[-1] - nodes[0])
    if not span > 0:
        return Accuracy(0.0, 0.0, 0.0)
    coupling = 2 * float(np.mean([rule.coupling for rule in rules])) / dimension
    return Accuracy(
        _w1(rules, shorter) / span, _probe_noise(rules, dimension, nodes) / span, coupling / span
    )


def _two_thirds(tridiagonal: Tridiagonal) -> Tridiagonal:
    """A run of two thirds of the steps; an exhausted one has no error, and stays."""
    return (
        tridiagonal.leading(-(-2 * tridiagonal.length // 3))
        if tridiagonal.coupling
        else tridiagonal
    )


def _probe_noise(rules: tuple[Rule, ...], dimension: int, nodes: np.ndarray) -> float:
    """Mean over a Gaussian's |deviation|, sqrt(2/pi) of its standard deviation, integrated over the
    spectrum."""
    variance = np.zeros(nodes.size - 1)
    for rule in rules:
        left = dimension - rule.num_deflated
        if left:
            part, weights = rule.nodes[rule.num_deflated :], rule.weights[rule.num_deflated :]
            share = cumulative(part, weights / weights.sum(), nodes[:-1])
            variance += (left / dimension) ** 2 * 2 * share * np.maximum(1 - share, 0) / (left + 2)
    return float(np.sum(np.sqrt(2 / np.pi * variance) * np.diff(nodes)) / len(rules))


def _w1(rules: tuple[Rule, ...], others: tuple[Rule, ...]) -> float:
    from scipy.stats import wasserstein_distance

    measures = [
        [np.concatenate([getattr(r, f) for r in each]) for each in (rules, others)]
        for f in ("nodes", "weights")
    ]
    return float(wasserstein_distance(*measures[0], *measures[1]))
