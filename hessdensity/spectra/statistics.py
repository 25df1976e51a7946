"""Means of functions over a spectrum from random probes, with every error that they have."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from .estimate import BoundedEstimate
from .intervals import positive_interval
from .quadrature import Members, Rule
from .shares import Range, Shares, uncertainty

Values = Callable[[np.ndarray], np.ndarray]
"""Several functions in one, which maps nodes (j,) to values (j, number of functions)."""

# The spread of a family is the error of quadrature only to leading order: this many spreads are
# taken (``benchmarks/bounds.py``).
_SPREADS = 1.5

_LAST_BITS = 1e-15  # relative rounding of a sum of weights

_CLOSER = 4  # times that the points around an extreme are refined


class Variation(NamedTuple):
    """How much several functions change on an interval, (number of functions,) each."""

    total: np.ndarray
    """The total variation."""
    steepest: np.ndarray
    """The largest absolute derivative, or infinity if it is unknown."""


class RuleStatistics(Shares):
    """What k rules know of the means of functions over a spectrum of n eigenvalues.

    The mean of f over a probe's part has variance 2/(N + 2) x (mean f^2 - (mean f)^2). The error of
    quadrature is estimated by the spread of a family.
    """

    @property
    def num_exact_moments(self) -> float:
        """Moments below this degree have no error of quadrature."""
        return min(map(_exact_moments, self._rules))

    def expectations(
        self,
        values: Values,
        variation: Callable[[float, float], Variation],
        certain: Callable[[int], Range | None] = lambda _: None,
    ) -> BoundedEstimate:
        """The means of several functions that are never negative.

        Args:
          values: the functions.
          variation: how much they change on an interval, which the coupling moves eigenvalues in.
          certain: maps the position of a rule to certain bounds on what its probe has seen, or
            None. Where they are not NaN, they replace the spread of the family.
        """
        mean, error = self._seen(values, certain)
        least = np.maximum(mean.least, 0)
        law = self._law_of_positive(values, mean.value, error)
        bounds = law(mean.value, mean.value)
        ends = law(least, mean.most)
        coupling = np.zeros_like(error) + self._coupling_error(variation)
        sure = self._deflated(values)
        return BoundedEstimate(
            sure.value + self._part * mean.value,
            self._part * error,
            np.maximum(sure.least + self._part * ends[0] - coupling, 0),
            sure.most + self._part * ends[1] + coupling,
            (sure.least + self._part * least, sure.most + self._part * mean.most),
            coupling,
            (sure.value + self._part * bounds[0], sure.value + self._part * bounds[1]),
        )

    def signed_expectation(
        self,
        values: Values,
        variation: Callable[[float, float], Variation],
        exact: bool = False,
    ) -> BoundedEstimate:
        """The mean of a single function, which may take both signs.

        Args:
          values: the function.
          variation: as for `expectations`.
          exact: whether quadrature is exact for this function.
        """
        # A constant has no noise. Around it, a function is the difference of two that are not
        # negative. The upper end of one is therefore combined with the lower end of the other.
        middle = self._median(values)
        gain = self._probes_of_positive(lambda x: np.maximum(values(x) - middle, 0))
        loss = self._probes_of_positive(lambda x: np.maximum(middle - values(x), 0))
        mean, error = self._seen(values, exact=exact)
        error = self._part * error
        coupling = np.zeros_like(error) + self._coupling_error(variation)
        sure = self._deflated(values)
        value = sure.value + self._part * mean.value
        quadrature = sure.least + self._part * mean.least, sure.most + self._part * mean.most
        probes = middle + gain[0] - loss[1], middle + gain[1] - loss[0]
        # The parts of one sign have kinks, so that quadrature is worse for them than for the whole.
        last_bits = _LAST_BITS * (np.abs(value) + np.abs(middle))
        lower = probes[0] - (value - quadrature[0]) - coupling - last_bits
        upper = probes[1] + (quadrature[1] - value) + coupling + last_bits
        found = BoundedEstimate(value, error, lower, upper, quadrature, coupling, probes)
        return found.map(lambda part: float(part[0]))

    def _probes_of_positive(self, values: Values) -> tuple[np.ndarray, np.ndarray]:
        """95 % bounds for the probes alone on the mean of a function that is never negative."""
        mean, error = self._seen(values, exact=True)
        sure = self._deflated(values).value
        low, high = self._law_of_positive(values, mean.value, error)(mean.value, mean.value)
        return sure + self._part * low, sure + self._part * high

    def _law_of_positive(
        self, values: Values, mean: np.ndarray, error: np.ndarray
    ) -> Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]:
        """The law of the probes for the mean of a function that is never negative.

        It maps the least and the most that the probes may have seen to 95 % bounds on the mean over
        their parts.
        """
        if not np.isfinite(self._freedom):
            return lambda low, high: (low, high)
        missed = [self._missed(i, values, mean) for i in range(len(self._rules))]
        masses, means, spreads = (list(part) for part in zip(*missed, strict=True))
        # With the missed part, the mass is more than 1.
        mass, more = 1 + self._weighted(masses), self._weighted(means)
        cautious = np.hypot(error, self._error_of_spreads(spreads)) / np.sqrt(mass)
        sphere = self._freedom, self._dimension

        def bounds(low: np.ndarray, high: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            lower, upper = positive_interval(mean, error, *sphere, (low, high))
            ends = (low + more) / mass, (high + more) / mass
            _, raised = positive_interval((mean + more) / mass, cautious, *sphere, ends)
            return lower, np.maximum(upper, raised)

        return bounds

    def _median(self, values: Values) -> float:
        """The median of a function over what the probes have seen."""
        nodes, weights = (
            np.concatenate(each)
            for each in zip(*(members[0] for members in self.members), strict=True)
        )
        found = values(nodes)[:, 0]
        order = np.argsort(found)
        sums = np.cumsum(weights[order])
        return float(found[order][np.searchsorted(sums, sums[-1] / 2)])

    def _seen(
        self,
        values: Values,
        certain: Callable[[int], Range | None] = lambda _: None,
        exact: bool = False,
    ) -> tuple[Range, np.ndarray]:
        """What the probes have seen of the functions' means, and the standard error of this."""
        found = []
        means = []
        for index, members in enumerate(self.members):
            each = [(values(nodes), weights[:, None]) for nodes, weights in members]
            member_means = np.array([(weights * f).sum(0) for f, weights in each])
            # The first member is the Gauss rule, which is the only one without a family.
            value = member_means[1:].mean(0) if len(each) > 1 else member_means[0]
            means.append(each[1:] or each)
            least = most = value
            if not exact and not self._rules[index].exact:
                ends = member_means.min(0), member_means.max(0)
                if value.size == 1:
                    ends = self._extremes_of_family(index, values, member_means[:, 0])
                least, most = (value + _SPREADS * (end - value) for end in ends)
                sure = certain(index)
                if sure is not None:
                    least = np.where(np.isnan(sure.least), least, np.minimum(sure.least, value))
                    most = np.where(np.isnan(sure.most), most, np.maximum(sure.most, value))
            moved = self._rounding(index, values, each[0][0])
            found.append(Range(value, least - moved, most + moved))
        mean = self._mean(found)
        # The spread is taken around the pooled mean. The formula mean f^2 - (mean f)^2 would cancel
        # when f is far from zero.
        spreads = [
            np.mean([(weights * (f - mean.value) ** 2).sum(0) for f, weights in each], axis=0)
            for each in means
        ]
        return mean, self._error_of_spreads(spreads)

    def _error_of_spreads(self, spreads: list[np.ndarray]) -> np.ndarray:
        """The standard error of a mean over the probes, from the variance within each part."""
        return np.sqrt(2 * self._weighted(spreads) / max(self._freedom - 2, 1))

    def _missed(
        self, index: int, values: Values, mean: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """What a probe has missed of the mass, and of the means and variances of some functions.

        An isolated node is an eigenvalue, whose true weight is at least 1/N. A probe that happens
        to see less of it takes the mean, and its own noise, for smaller than they are.
        """
        rule = self._rules[index]
        alone = rule.isolated[rule.num_deflated :]
        if not alone.any():
            return np.zeros(()), np.zeros_like(mean), np.zeros_like(mean)
        nodes, weights = self.members[index][0]
        missed = np.where(alone, np.maximum(1 / self._dimension - weights, 0), 0)
        found = values(nodes)
        return missed.sum(), missed @ found, missed @ (found - mean) ** 2

    def _extremes_of_family(
        self, index: int, values: Values, means: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """The smallest and the largest mean of one function, (1,) each, over the whole family."""
        rule = self._rules[index]
        ends = [means.min(), means.max()]
        if rule.diagonal.size:
            points, members = rule.crossing
            means = self._means(rule, values, members)
            ends = [
                -max(-ends[0], self._largest(rule, lambda x: -values(x), points, -means)),
                max(ends[1], self._largest(rule, values, points, means)),
            ]
        return np.array(ends[:1]), np.array(ends[1:])

    def _largest(self, rule: Rule, values: Values, points: np.ndarray, means: np.ndarray) -> float:
        """The largest mean of one function over the rules with a node in the best gap."""
        best = int(np.argmax(means))
        found, center = float(means[best]), points[best]
        left, right = rule.gaps
        gap = int(np.argmin(np.maximum(left - center, center - right)))
        reach = 0.4 * (right[gap] - left[gap])
        # Look closer and closer around the best.
        for _ in range(_CLOSER):
            near = center + reach * np.linspace(-1, 1, 10)
            near = near[(near > left[gap]) & (near < right[gap])]
            means = self._means(rule, values, rule.family(rule.angles_through(near)))
            center = near[np.argmax(means)]
            found = max(found, float(means.max()))
            reach /= 4
        return found

    @staticmethod
    def _means(rule: Rule, values: Values, members: Members) -> np.ndarray:
        """The mean of one function by each of some rules of a family."""
        means = [float(weights @ values(nodes)[:, 0]) for nodes, weights in members]
        return np.array(means) / rule.share

    def _rounding(self, index: int, values: Values, here: np.ndarray) -> np.ndarray:
        """How far rounding of the products may move the means that a probe sees.

        ``here`` are the values at the nodes of the Gauss rule.

        It moves the nodes by as much as the smallest residual. To first order in this, the changes
        have random signs and average out over the N dimensions. To second order they do not. If a
        Krylov space is exhausted up to rounding, what is left out has no random sign either.
        """
        nodes, weights = self.members[index][0]
        reach = self._rules[index].rounding
        if not reach:
            return np.zeros(1)
        above, below = values(nodes + reach), values(nodes - reach)
        averaged = 1.0 if self._rules[index].exact else np.sqrt(self._dimension)
        first = np.abs(above - below) / (2 * averaged)
        second = np.abs(above + below - 2 * here) / 2
        return np.asarray(weights @ (first + second))

    def _deflated(self, values: Values) -> Range:
        """The contribution of the deflated parts to the means, which has no random error."""
        found = []
        for rule in self._rules:
            nodes = rule.nodes[: rule.num_deflated]
            weights = rule.weights[: rule.num_deflated]
            reach = uncertainty(rule)
            each = np.stack([values(nodes + sign * reach) for sign in (0, -1, 1)])
            ends = each[0], each.min(axis=0), each.max(axis=0)
            found.append(Range(*(weights @ part for part in ends)))
        return Range(*(np.mean(part, axis=0) for part in zip(*found, strict=True)))

    def _coupling_error(self, variation: Callable[[float, float], Variation]) -> np.ndarray:
        """The most that the couplings may have changed the means of some functions.

        Counting functions differ by at most the rank of the coupling, so that a mean differs by at
        most rank / n times the variation of f. Sorted eigenvalues differ by at most 2 coupling in
        sum, so that it differs by at most 2 coupling / n times the largest slope of f.
        """
        total: np.ndarray = np.zeros(1)
        for rule, ends in zip(self._rules, self._coupled, strict=True):
            if ends is not None:
                change = variation(*ends)
                most = np.minimum(
                    rule.coupling_rank * change.total, 2 * rule.coupling * change.steepest
                )
                total = total + most / (self._n * len(self._rules))
        return total


def _exact_moments(rule: Rule) -> float:
    """Moments below this degree are exact: twice the number of steps of the probe.

    In a block, a part of the third product of a probe is already outside of the space.
    """
    if rule.exact or rule.num_deflated == rule.nodes.size:
        return np.inf
    if rule.coupling_rank > 1:
        return 4
    return 2 * (rule.diagonal.size or rule.nodes.size - rule.num_deflated)
