"""Shares of a spectrum from random probes, with every error that they have."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from .estimate import BoundedEstimate
from .intervals import share_interval
from .quadrature import Rule, cumulative, cumulative_bounds

_LAST_BITS = 1e-14  # relative error of a sum of weights


class Range(NamedTuple):
    """A value with the least and the most that it may be, arrays of the same shape."""

    value: np.ndarray
    least: np.ndarray
    most: np.ndarray


class Shares:
    """What k rules know of the shares of n eigenvalues. The rules are independent measurements.

    The deflated part of a rule is certain. The remaining N = n - num_deflated dimensions are left
    to the rule's probe, which is uniform on their sphere, so that a share F follows a Beta law. The
    rules of a family differ by the error of quadrature, which is certain for shares.

    Args:
      rules: one for each probe. They may differ in their number of deflated nodes.
      dimension: n.
      random: whether the rules come from random probes. Otherwise quadrature is the only error.
    """

    def __init__(self, rules: tuple[Rule, ...], dimension: int, random: bool) -> None:
        left = np.array([dimension - rule.num_deflated for rule in rules], float)
        self._rules = rules
        self._n = dimension
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
        self.enclosure = (
            min(rule.enclosure[0] for rule in rules),
            max(rule.enclosure[1] for rule in rules),
        )
        """(low, high): each end of the spectrum lies within it in 95 % of runs."""
        self.members = [_of_mass_one(rule) for rule in rules]
        """For each rule, the (nodes, weights) of its members, with weights that sum to 1."""
        self._coupled = [_coupled_range(rule) for rule in rules]

    def share(
        self, low: Any, high: Any, enclosure: tuple[float, float] = (-np.inf, np.inf)
    ) -> BoundedEstimate:
        """Share of the eigenvalues in [low, high], with every error. The ends may be arrays."""
        low, high = np.broadcast_arrays(np.asarray(low, float), np.asarray(high, float))
        low, high = within(enclosure, low, high)
        seen = self._mean([self.seen_share(i, low, high) for i in range(len(self._rules))])
        sure = Range(
            *(
                np.mean(each, axis=0)
                for each in zip(*(_ritz_share(r, low, high) for r in self._rules), strict=True)
            )
        )
        coupling = self._coupled_ends(low) + self._coupled_ends(high)
        value = seen.value
        error = np.sqrt(2 * value * np.maximum(1 - value, 0) / max(self._freedom - 2, 1))
        around = self._interval(value, value)
        probes = sure.value + self._part * around[0], sure.value + self._part * around[1]
        quadrature = sure.least + self._part * seen.least, sure.most + self._part * seen.most
        ends = self._interval(seen.least, seen.most)
        lower = (sure.least + self._part * ends[0] - coupling) * (1 - _LAST_BITS)
        upper = (sure.most + self._part * ends[1] + coupling) * (1 + _LAST_BITS)
        return BoundedEstimate(
            sure.value + self._part * value,
            self._part * error,
            np.clip(lower, 0, 1),
            np.clip(upper, 0, 1),
            quadrature,
            coupling,
            probes,
        )

    def exact(self, index: int) -> bool:
        """Whether quadrature is exact for what a probe has seen."""
        return self._rules[index].exact

    def seen_share(self, index: int, low: np.ndarray, high: np.ndarray) -> Range:
        """The share of one probe's part in [low, high], with certain bounds."""
        rule = self._rules[index]
        members = self.members[index]
        value = np.mean([_share(*each, low, high) for each in members[1:] or members], axis=0)
        inner, outer = _widened(low, high, rule)
        if rule.exact:
            least, most = (_share(*members[0], *ends) for ends in (inner, outer))
        else:
            least = (
                cumulative_bounds(members, inner[1])[0] - cumulative_bounds(members, inner[0])[1]
            )
            most = cumulative_bounds(members, outer[1])[1] - cumulative_bounds(members, outer[0])[0]
        return Range(value, np.clip(least, 0, value), np.clip(most, value, 1))

    def _coupled_ends(self, ends: np.ndarray) -> np.ndarray:
        """The most that the couplings may have moved the cumulative at these points."""
        total = np.zeros(ends.shape)
        for rule, coupled in zip(self._rules, self._coupled, strict=True):
            if coupled is not None:
                moved = (ends >= coupled[0]) & (ends <= coupled[1])
                total = total + rule.coupling_rank * moved / (self._n * len(self._rules))
        return total

    def _interval(self, low: np.ndarray, high: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """95 % bounds on a share, if the share that the probes saw is between low and high."""
        return (
            share_interval(low, high, self._freedom) if np.isfinite(self._freedom) else (low, high)
        )

    def _mean(self, parts: list[Range]) -> Range:
        """Mean over the probes' parts, weighted by their shares."""
        return Range(*(self._weighted(list(each)) for each in zip(*parts, strict=True)))

    def _weighted(self, parts: list[np.ndarray]) -> np.ndarray:
        weights = self._each / (self._each.sum() or 1)
        return np.tensordot(weights, np.stack(parts), axes=1)


def within(
    enclosure: tuple[float, float], low: np.ndarray, high: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """The intervals [low, high], with infinite ends in place of those beyond an enclosure."""
    start, end = enclosure
    low = np.where(low <= start, -np.inf, np.where(low > end, np.inf, low))
    high = np.where(high >= end, np.inf, np.where(high < start, -np.inf, high))
    return low, high


def _of_mass_one(rule: Rule) -> list[tuple[np.ndarray, np.ndarray]]:
    """The members of a rule, with weights that sum to 1.

    If no dimension is left to a probe, its rule has a single node, with weight 0.
    """
    if rule.num_deflated == rule.nodes.size:
        return [(np.zeros(1), np.zeros(1))]
    return [(nodes, weights / (weights.sum() or 1)) for nodes, weights in rule.members]


def _coupled_range(rule: Rule) -> tuple[float, float] | None:
    """(low, high) within which the coupling of a rule may have moved eigenvalues, or None.

    The coupling of an isolated Ritz pair to the rest is its residual. Without these pairs, the
    coupling joins what is left of the subspace to its complement. It moves no eigenvalue further
    than its norm.
    """
    if not rule.coupling:
        return None
    rest = rule.nodes[~rule.isolated | (np.arange(rule.nodes.size) >= rule.num_deflated)]
    return float(rest.min() - rule.coupling), float(rest.max() + rule.coupling)


def uncertainty(rule: Rule) -> np.ndarray:
    """(num_deflated,): how far the eigenvalues may be from the Ritz values that stand for them.

    An eigenvalue lies within the residual of an isolated Ritz value. For other Ritz values of a
    subspace, the error of the coupling includes this.
    """
    residuals = rule.residuals[: rule.num_deflated]
    if not rule.coupling:
        return residuals
    return np.where(rule.isolated[: rule.num_deflated], residuals, rule.rounding)


def _share(nodes: np.ndarray, weights: np.ndarray, low: np.ndarray, high: np.ndarray) -> np.ndarray:
    below = cumulative(nodes, weights, np.nextafter(low, -np.inf))
    return np.maximum(cumulative(nodes, weights, high) - below, 0)


def _ritz_share(rule: Rule, low: np.ndarray, high: np.ndarray) -> Range:
    """The share of a rule's deflated part in [low, high]."""
    nodes = rule.nodes[: rule.num_deflated]
    weights = rule.weights[: rule.num_deflated]
    reach = uncertainty(rule)
    inner, outer = ([np.sort(nodes + sign * reach) for sign in each] for each in ((-1, 1), (1, -1)))
    # The weights are equal, so that the order of the nodes does not matter.
    least = cumulative(inner[1], weights, high) - cumulative(
        inner[0], weights, np.nextafter(low, -np.inf)
    )
    most = cumulative(outer[1], weights, high) - cumulative(
        outer[0], weights, np.nextafter(low, -np.inf)
    )
    value = _share(nodes, weights, low, high)
    return Range(value, np.clip(least, 0, value), np.maximum(most, value))


def _widened(
    low: np.ndarray, high: np.ndarray, rule: Rule
) -> tuple[tuple[np.ndarray, ...], tuple[np.ndarray, ...]]:
    """The interval [low, high], once smaller and once larger by the rounding error of the nodes.

    The callers account for the other errors.
    """
    rounding = rule.rounding
    return (low + rounding, high - rounding), (low - rounding, high + rounding)
