"""Estimates of a spectrum from random probes, with their error bars."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from .estimate import BoundedEstimate, Estimate
from .quadrature import Rule, cumulative, cumulative_bounds

Values = Callable[[np.ndarray], np.ndarray]
"""Several functions in one, which maps nodes (j,) to values (j, number of functions)."""


class RuleStatistics:
    """Statistics of k rules, which are independent measurements of a spectrum of n eigenvalues.

    The deflated part of a rule is certain. The remaining N = n - num_deflated dimensions are left
    to the rule's probe, which is uniform on their sphere. The mean of f over the probe's part has
    variance 2/(N + 2) x (mean f^2 - (mean f)^2), and a share F follows a Beta law.

    Args:
      rules: one for each probe. They may differ in their number of deflated nodes.
      dimension: n.
      random: whether the rules come from random probes. Otherwise quadrature is the only error.
    """

    def __init__(self, rules: tuple[Rule, ...], dimension: int, random: bool) -> None:
        left = np.array([dimension - rule.num_deflated for rule in rules], float)
        self._rules = rules
        self._each = left / dimension
        """Share of the dimensions that each rule leaves to its probe."""
        self._part = float(self._each.mean())
        """Mean of these shares over the rules."""
        # ``freedom`` belongs to the mean of the probes' parts, weighted by their shares. The
        # variance of this mean is 2/freedom times the variance over the spectrum. It is estimated
        # without bias by 2/(freedom - 2) times the variance within the rules, because the rules
        # scatter around their own mean. For equal rules, freedom = k (N + 2).
        squares = np.sum(self._each**2 / (left + 2))
        self._freedom = (
            np.inf if not random or not squares else float(self._each.sum() ** 2 / squares)
        )
        self._dimension = max(float(left.mean()), 1.0)
        self._coupled = float(np.mean([rule.coupling > 0 for rule in rules])) / dimension
        """The largest error of the cumulative from the couplings that the rules leave out."""

    def _deflated(self, values: Values) -> np.ndarray:
        """The contribution of the deflated parts to the means, which has no random error."""
        counts = [rule.num_deflated for rule in self._rules]
        pairs = zip(self._rules, counts, strict=True)
        return np.mean(
            [(rule.weights[:c, None] * values(rule.nodes[:c])).sum(0) for rule, c in pairs], axis=0
        )

    def _parts(self) -> list[tuple[np.ndarray, np.ndarray]]:
        """(nodes, weights) of each probe's Gauss rule, with weights that sum to 1.

        If no dimension is left to a probe, its rule has a single node, with weight 0.
        """
        parts = []
        for rule in self._rules:
            nodes = rule.nodes[rule.num_deflated :]
            weights = rule.weights[rule.num_deflated :]
            parts.append(
                (nodes, weights / weights.sum()) if nodes.size else (np.zeros(1), np.zeros(1))
            )
        return parts

    def _mean(self, parts: list[Any]) -> np.ndarray:
        """Mean over the probes' parts (one array for each), weighted by their shares."""
        weights = self._each / (self._each.sum() or 1)
        return np.tensordot(weights, np.stack(parts), axes=1)

    def expectations(self, values: Values) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """(value, standard error, lower, upper) of the means of several functions.

        The bounds hold for functions that are never negative.
        """
        parts = [(values(nodes), weights[:, None]) for nodes, weights in self._parts()]
        mean = self._mean([(weights * f).sum(0) for f, weights in parts])
        # The spread is taken around the pooled mean. The formula mean f^2 - (mean f)^2 would cancel
        # when f is far from zero.
        spread = self._mean([(weights * (f - mean) ** 2).sum(0) for f, weights in parts])
        error = np.sqrt(2 * spread / max(self._freedom - 2, 1))
        bounds = (mean, mean)
        if np.isfinite(self._freedom):
            bounds = positive_interval(mean, error, self._freedom, self._dimension)
        deflated = self._deflated(values)
        value, lower, upper = (deflated + self._part * part for part in (mean, *bounds))
        return value, self._part * error, lower, upper

    def signed_expectation(self, values: Values) -> Estimate:
        """The mean of a single function, which may take both signs."""
        value, error, *_ = self.expectations(values)
        # A signed function is the difference of two non-negative ones. The upper end of one is
        # therefore combined with the lower end of the other.
        _, _, gain_low, gain_high = self.expectations(lambda nodes: np.maximum(values(nodes), 0))
        _, _, loss_low, loss_high = self.expectations(lambda nodes: np.maximum(-values(nodes), 0))
        return Estimate(
            *(float(part[0]) for part in (value, error, gain_low - loss_high, gain_high - loss_low))
        )

    def share(
        self, low: Any, high: Any, enclosure: tuple[float, float] = (-np.inf, np.inf)
    ) -> BoundedEstimate:
        """Share of the eigenvalues in [low, high], with every error. The ends may be arrays."""
        low, high = np.broadcast_arrays(np.asarray(low, float), np.asarray(high, float))
        # No eigenvalue lies beyond the enclosure, so an end there is replaced by an infinite one.
        low = np.where(low <= enclosure[0], -np.inf, np.where(low > enclosure[1], np.inf, low))
        high = np.where(high >= enclosure[1], np.inf, np.where(high < enclosure[0], -np.inf, high))
        seen, least, most = (
            self._mean(list(shares)) for shares in zip(*self._gauss_shares(low, high), strict=True)
        )
        sure, sure_least, sure_most = (
            np.mean(s, axis=0) for s in zip(*self._ritz_shares(low, high), strict=True)
        )
        coupling = self._coupled * (np.isfinite(low).astype(float) + np.isfinite(high))
        error = self._part * np.sqrt(2 * seen * np.maximum(1 - seen, 0) / max(self._freedom - 2, 1))
        probes = tuple(sure + self._part * end for end in self._interval(seen, seen))
        quadrature = sure_least + self._part * least, sure_most + self._part * most
        ends = self._interval(least, most)
        lower = np.clip(sure_least + self._part * ends[0] - coupling, 0, 1)
        upper = np.clip(sure_most + self._part * ends[1] + coupling, 0, 1)
        return BoundedEstimate(
            sure + self._part * seen, error, lower, upper, quadrature, coupling, probes
        )

    def _gauss_shares(
        self, low: np.ndarray, high: np.ndarray
    ) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """(value, least, most): the share of each probe's part in [low, high], with its bounds."""
        for rule, (nodes, weights) in zip(self._rules, self._parts(), strict=True):
            inner, outer = _widened(low, high, rule)
            value = cumulative(nodes, weights, high) - cumulative(
                nodes, weights, np.nextafter(low, -np.inf)
            )
            least = (
                cumulative_bounds(nodes, weights, inner[1])[0]
                - cumulative_bounds(nodes, weights, inner[0])[1]
            )
            most = (
                cumulative_bounds(nodes, weights, outer[1])[1]
                - cumulative_bounds(nodes, weights, outer[0])[0]
            )
            yield np.maximum(value, 0), np.clip(least, 0, 1), np.clip(most, 0, 1)

    def _ritz_shares(self, low: np.ndarray, high: np.ndarray) -> Iterator[tuple[np.ndarray, ...]]:
        """(value, least, most): the share of each rule's deflated part in [low, high].

        The three differ only by the rounding error of the nodes.
        """
        for rule in self._rules:
            nodes = rule.nodes[: rule.num_deflated]
            weights = rule.weights[: rule.num_deflated]
            ends = ((low, high), *_widened(low, high, rule))
            yield tuple(
                np.maximum(
                    cumulative(nodes, weights, b)
                    - cumulative(nodes, weights, np.nextafter(a, -np.inf)),
                    0,
                )
                for a, b in ends
            )

    def _interval(self, low: np.ndarray, high: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """95 % bounds on a share, if the share that the probes saw is between low and high."""
        return (
            share_interval(low, high, self._freedom) if np.isfinite(self._freedom) else (low, high)
        )


def _widened(
    low: np.ndarray, high: np.ndarray, rule: Rule
) -> tuple[tuple[np.ndarray, ...], tuple[np.ndarray, ...]]:
    """The interval [low, high], once smaller and once larger by the rounding error of the nodes.

    The callers account for the other errors.
    """
    rounding = rule.residuals.min()
    return (low + rounding, high - rounding), (low - rounding, high + rounding)


# Intervals ----------------------------------------------------------------------------------------


def share_interval(
    low: np.ndarray, high: np.ndarray, freedom: float
) -> tuple[np.ndarray, np.ndarray]:
    """95 % bounds on the share F of a spectrum, from shares that random probes saw.

    A probe that is uniform on the sphere of N dimensions sees a share that follows the law
    Beta(N F / 2, N (1 - F) / 2), because its squared components are chi-square variables divided by
    their sum. The mean over k probes has the mean F and the variance of Beta(c F, c (1 - F)) with
    c = k (N + 2) / 2 - 1. For k = 1 this is the law itself. The bounds are the shares F for which
    the share seen is the 97.5 % quantile of this law (lower) and the 2.5 % quantile (upper).

    Args:
      low: the smallest share that the probes may have seen, in [0, 1]. Quadrature leaves the share
        uncertain.
      high: the largest such share.
      freedom: k (N + 2).

    Returns:
      (lower, upper), of the broadcast shape of ``low`` and ``high``.
    """
    from scipy.special import betainc

    concentration = freedom / 2 - 1

    def solve(seen: np.ndarray, level: float) -> np.ndarray:
        # P(Beta <= seen) decreases as F grows, so bisection finds F, for all of ``seen`` together.
        left = np.zeros_like(seen)
        right = np.ones_like(seen)
        for _ in range(60):
            middle = (left + right) / 2
            above = betainc(concentration * middle, concentration * (1 - middle), seen) > level
            left = np.where(above, middle, left)
            right = np.where(above, right, middle)
        return (left + right) / 2

    # Sums of weights miss 1 by rounding. A share of exactly 1 has no uncertainty.
    low, high = (np.clip(np.where(np.asarray(x) > 1 - 1e-12, 1.0, x), 0, 1) for x in (low, high))
    lower = np.where((low > 0) & (low < 1), solve(low, 0.975), low)
    upper = np.where((high > 0) & (high < 1), solve(high, 0.025), high)
    # A tiny share has so few degrees of freedom that its chi-square variable almost always falls
    # below the share seen. The solution is then useless as a lower bound, so the interval always
    # includes the shares seen.
    return np.minimum(lower, low), np.maximum(upper, high)


def positive_interval(
    mean: np.ndarray, error: np.ndarray, freedom: float, dimension: float
) -> tuple[np.ndarray, np.ndarray]:
    """95 % bounds on the mean of a non-negative function over a spectrum.

    The function is replaced by one that is K on a share F of the spectrum and 0 elsewhere, with the
    same mean K F and the same mean square K^2 F. The bounds are K times those on F. They are exact
    for a function that is zero at all eigenvalues but one. The weight of that eigenvalue is a
    chi-square variable with k degrees of freedom. With two probes it is uncertain by a factor of
    four downwards and of forty upwards, which two standard errors to either side would hide.

    Args:
      mean: the mean that the probes saw.
      error: its standard error.
      freedom: k (N + 2).
      dimension: N. A share that is not empty is at least 1/N.

    Returns:
      (lower, upper), of the shape of ``mean``.
    """
    seen = mean > 0
    variance = np.divide(error, mean, out=np.zeros_like(mean), where=seen) ** 2 * (freedom - 2) / 2
    share = 1 / (1 + variance)
    lower, upper = share_interval(share, share, freedom)
    height = mean / share
    return height * lower, height * np.where(seen, np.maximum(upper, 1 / dimension), 0)
