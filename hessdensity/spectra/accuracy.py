"""The error of an estimated spectrum by cause, estimated from the spectrum itself."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from .quadrature import Rule, cumulative


class Accuracy(NamedTuple):
    """The estimated W1 distance to the true spectrum, divided by the spectrum's range, by cause.

    It is an estimate, not a bound. Rigorous bounds (`SpectralDensity.cdf_bounds`) are tens of times
    wider.
    """

    quadrature: float
    """Error of too few steps: the mean W1 between the members of the families and their mean."""
    probes: float
    """Error of too few probes: the expected W1 distance due to their randomness.

    It is sqrt(2/pi) times the integral of sqrt(2 F (1 - F) / (k (N + 2))).
    """
    coupling: float
    """Error of the coupling that deflation left out: at most 2 beta / n."""
    rounding: float
    """Error of the products: rounding moves an eigenvalue by about this much."""

    @property
    def total(self) -> float:
        """The sum of the errors."""
        return self.quadrature + self.probes + self.coupling + self.rounding


def estimate(rules: tuple[Rule, ...], dimension: int, rounding_error: float = 0.0) -> Accuracy:
    """The accuracy of a spectrum of n eigenvalues that is the mean of some rules.

    Args:
      rules: one for each probe.
      dimension: n.
      rounding_error: error of the tridiagonal matrices, in eigenvalue units.
    """
    nodes = np.unique(np.concatenate([rule.nodes for rule in rules]))
    span = float(nodes[-1] - nodes[0])
    if not span > 0:
        return Accuracy(0.0, 0.0, 0.0, 0.0)
    coupling = 2 * float(np.mean([rule.coupling for rule in rules])) / dimension
    return Accuracy(
        _quadrature(rules) / span,
        _probe_noise(rules, dimension, nodes) / span,
        coupling / span,
        float(rounding_error) / span,
    )


def _quadrature(rules: tuple[Rule, ...]) -> float:
    """The mean W1 distance between members at the same angle and the mean of all members."""
    from scipy.stats import wasserstein_distance

    whole = [np.concatenate(each) for each in zip(*(rule.estimate for rule in rules), strict=True)]
    families = [rule.members[1:] or rule.members for rule in rules]
    distances = []
    for j in range(max(map(len, families))):
        parts = []
        for rule, family in zip(rules, families, strict=True):
            sure = slice(0, rule.num_deflated)
            parts += [(rule.nodes[sure], rule.weights[sure]), family[j % len(family)]]
        one = [np.concatenate(each) for each in zip(*parts, strict=True)]
        distances.append(wasserstein_distance(one[0], whole[0], one[1], whole[1]))
    return float(np.mean(distances))


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
