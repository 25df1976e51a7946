"""The error of an estimated spectrum by cause, estimated from the spectrum itself."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from .deflation import combine
from .quadrature import Rule, Tridiagonal, cumulative


class Accuracy(NamedTuple):
    """The estimated W1 distance to the true spectrum, divided by the spectrum's range, by cause.

    It is an estimate, not a bound. Rigorous bounds (`SpectralDensity.cdf_bounds`) are tens of times
    wider.
    """

    quadrature: float
    """Error of too few steps: W1 between these rules and rules of two thirds of their steps."""
    probes: float
    """Error of too few probes: the expected W1 distance due to their randomness.

    It is sqrt(2/pi) times the integral of sqrt(2 F (1 - F) / (k (N + 2))).
    """
    coupling: float
    """Error of the coupling that deflation left out: at most 2 beta / n."""

    @property
    def total(self) -> float:
        """The sum of the three errors."""
        return self.quadrature + self.probes + self.coupling


def estimate(
    run: Tridiagonal | None, probes: list[Tridiagonal], dimension: int, *, implicit: bool = False
) -> Accuracy:
    """The accuracy of the rules that `deflation.combine` makes from the same arguments.

    Args:
      run: the matrix of the deflation run, or None.
      probes: the matrices of the probes.
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
    """The first two thirds of a run's steps. An exhausted run has no error and is kept whole."""
    return (
        tridiagonal.leading(-(-2 * tridiagonal.length // 3))
        if tridiagonal.coupling
        else tridiagonal
    )


def _probe_noise(rules: tuple[Rule, ...], dimension: int, nodes: np.ndarray) -> float:
    """Mean absolute error of the cumulative due to the probes, integrated over the spectrum.

    The mean absolute deviation of a Gaussian is sqrt(2/pi) times its standard deviation.
    """
    variance = np.zeros(nodes.size - 1)
    for rule in rules:
        left = dimension - rule.num_deflated
        if left:
            part = rule.nodes[rule.num_deflated :]
            weights = rule.weights[rule.num_deflated :]
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
