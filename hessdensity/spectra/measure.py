"""The measure of a vector over a spectrum, computed from its quadrature rules alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Self

import numpy as np

from hessdensity.coordinate import LINEAR, Coordinate

from . import archive
from .estimate import BoundedEstimate, Estimate
from .functions import checked, constant_variation, sampled_variation
from .quadrature import Rule
from .smoothing import kernel, kernel_variation, resolution, seen_density
from .statistics import RuleStatistics
from .summary import summarize

if TYPE_CHECKING:
    from matplotlib.axes import Axes  # noqa: TID251


class Extremes(NamedTuple):
    """The two ends of a spectrum, in eigenvalue units."""

    smallest: Estimate
    largest: Estimate


@dataclass(frozen=True, eq=False)
class SpectralMeasure:
    """How one vector g is distributed over a spectrum: mass (q_i.g)^2 / |g|^2 at eigenvalue i.

    `hessdensity.spectral_measure` computes it, and ``print(measure)`` shows a summary. In its
    methods, a share of the eigenvalues means a share of the squared norm |g|^2. Nothing is random:
    standard errors are 0, and ``lower`` and ``upper`` are the error of quadrature.

    Example:
      >>> import hessdensity as hd
      >>> rule = hd.Rule(nodes=[0, 2], weights=[0.75, 0.25], num_deflated=0, residuals=[0, 0])
      >>> measure = hd.SpectralMeasure((rule,), dimension=100, num_matvecs=2)
      >>> print(f"Rayleigh quotient {measure.moment(1):.3g}")
      Rayleigh quotient 0.5 (0.5 to 0.5)
    """

    kind: ClassVar[str] = "measure"
    """The name of this type in files, summaries and axis labels."""
    random: ClassVar[bool] = False
    """Whether the rules come from random probes."""

    rules: tuple[Rule, ...]
    """One `Rule` for each probe, each of mass 1."""
    dimension: int
    """n, the number of eigenvalues."""
    num_matvecs: int
    """The number of products with the operator that were spent."""
    description: dict[str, Any] = field(default_factory=dict)
    """The operator's own description, the settings, the versions and the estimated error."""

    def __post_init__(self) -> None:
        if not self.rules:
            raise ValueError("rules is empty, expected at least one rule.")
        if max(rule.num_deflated for rule in self.rules) > self.dimension:
            raise ValueError(
                f"rules: one deflates more nodes than the dimension={self.dimension}; expected "
                "dimension to be n, the number of eigenvalues."
            )

    @property
    def nodes(self) -> np.ndarray:
        """(num_rules, longest) float64, in eigenvalue units.

        Shorter rules repeat their last node, with weight 0.
        """
        longest = max(rule.nodes.size for rule in self.rules)
        return np.stack(
            [np.pad(rule.nodes, (0, longest - rule.nodes.size), mode="edge") for rule in self.rules]
        )

    @property
    def weights(self) -> np.ndarray:
        """(num_rules, longest) float64. Each row sums to 1 and is padded with 0."""
        longest = self.nodes.shape[1]
        return np.stack(
            [np.pad(rule.weights, (0, longest - rule.weights.size)) for rule in self.rules]
        )

    @property
    def bandwidth(self) -> float:
        """The default smoothing: a standard deviation, in eigenvalue units.

        It is 1/500 of the range of the nodes, or half of the median distance between the nodes
        that are no eigenvalues, if that is larger. Below that distance, most of the spectrum is not
        resolved: only more steps make it finer. But it is at most 1/50 of the range, or half of
        the mean distance between a probe's nodes, so that a few nodes that hold most of the
        spectrum do not blur the rest of it.
        """
        return self.resolved_bandwidth()

    @property
    def resolved_from(self) -> float:
        """The bandwidth below which most of the spectrum is not resolved, in eigenvalue units.

        It is half of the median distance between nodes that are no eigenvalues, by weight, and 0
        if there are none.
        """
        return resolution(self.rules) / 2

    def resolved_bandwidth(self, coordinate: Coordinate = LINEAR) -> float:
        """The default smoothing in a coordinate of the axis, in its units (see `bandwidth`)."""
        low, high = (float(end) for end in coordinate.forward(np.array(self.extent)))
        scale = max(abs(low), abs(high))
        smallest = max((high - low) / 500, scale / 1e5)
        steps = max(rule.nodes.size - rule.num_deflated for rule in self.rules)
        largest = (high - low) / min(50, 2 * max(steps, 1))
        return max(smallest, min(resolution(self.rules, coordinate) / 2, largest)) or 1.0

    @property
    def extent(self) -> tuple[float, float]:
        """(smallest, largest) node, in eigenvalue units."""
        return float(self.nodes.min()), float(self.nodes.max())

    @cached_property
    def _statistics(self) -> RuleStatistics:
        return RuleStatistics(self.rules, self.dimension, self.random)

    # Smooth quantities ----------------------------------------------------------------------------

    def pdf(
        self, x: Any, bandwidth: float | None = None, coordinate: Coordinate = LINEAR
    ) -> BoundedEstimate:
        """The smoothed density at x: the mean over the spectrum of N(x; lambda, bandwidth^2).

        Args:
          x: eigenvalues, any shape.
          bandwidth: standard deviation of the Gaussian, in eigenvalue units (default:
            ``self.bandwidth``).
          coordinate: a map of the axis, such as that of a symlog plot. The Gaussian is then one of
            the coordinate, ``bandwidth`` is in its units, and the density is per unit of it.

        Returns:
          `BoundedEstimate` of x's shape, in 1/eigenvalue units. It is not renormalized on a grid.
          The error of quadrature is estimated where the kernel is wider than the distance between
          the nodes of the families. Elsewhere it is certain, and wide.

        Raises:
          ValueError: ``bandwidth`` is not positive.
        """
        width = self.resolved_bandwidth(coordinate) if bandwidth is None else bandwidth
        if not width > 0:
            raise ValueError(
                f"bandwidth={bandwidth}, expected a positive standard deviation in eigenvalue "
                "units."
            )
        forward = coordinate.forward
        x = np.asarray(x, float)
        points = forward(x.ravel())
        statistics = self._statistics
        estimate = statistics.expectations(
            lambda nodes: kernel(points - forward(nodes)[:, None], width),
            lambda low, high: kernel_variation(points, width, low, high, coordinate),
            lambda index: seen_density(statistics, index, points, width, coordinate),
        )
        return estimate.map(lambda part: np.reshape(part, x.shape))

    def expectation(self, f: Callable[[np.ndarray], Any]) -> BoundedEstimate:
        """Mean of ``f``: g.f(H)g / |g|^2 for the measure of g, tr f(H) / n for a density.

        The error of quadrature is estimated from the rules that agree with what the probes have
        seen. It is not certain: a jump or a spike of ``f`` between the nodes stays unseen. For the
        share between two values, `mass` has certain bounds.

        Args:
          f: an elementwise function of an array of nodes, such as ``np.log1p``.

        Raises:
          ValueError: ``f`` does not return one finite number for each node.
        """
        values = checked(f, self.extent)
        return self._statistics.signed_expectation(
            values, sampled_variation(values, self.rules, self.extent)
        )

    def moment(self, k: int) -> BoundedEstimate:
        """Mean of the k-th power, in eigenvalue units to the power k.

        Quadrature is exact up to k = 2 num_steps - 1.
        """
        values = checked(lambda nodes: nodes**k, self.extent)
        # The trace is that of the two parts, whatever couples them.
        variation = (
            constant_variation if k < 2 else sampled_variation(values, self.rules, self.extent)
        )
        exact = k < self._statistics.num_exact_moments
        return self._statistics.signed_expectation(values, variation, exact)

    # Shares and quantiles -------------------------------------------------------------------------

    def cdf(self, x: Any) -> BoundedEstimate:
        """Share of the eigenvalues that are <= x, with bounds that include every error.

        The value is a step function. The bounds are those of `cdf_bounds` without an enclosure.

        Args:
          x: eigenvalues, any shape.

        Returns:
          `BoundedEstimate` of x's shape.
        """
        return self._statistics.share(-np.inf, np.asarray(x, float))

    def cdf_bounds(
        self, x: Any, enclosure: tuple[float, float] = (-np.inf, np.inf)
    ) -> BoundedEstimate:
        """Share of the eigenvalues that are <= x, with bounds that include every error.

        The result has each of three errors by itself, and combines them in ``lower`` and ``upper``:

        - Quadrature: num_steps is limited. Chebyshev-Markov-Stieltjes bounds contain the cumulative
          of each probe's own measure, for every spectrum.
        - Coupling: deflation left out a coupling. This moves the share by at most 1/n, whether the
          run has converged or not (see `hessdensity.spectra.deflation`).
        - Probes: they are random. Their Beta law gives bounds at 95 %.

        The rigorous bounds of quadrature are wide: between two nodes, they are as far apart as the
        weights of both nodes together.

        Args:
          x: eigenvalues, any shape.
          enclosure: (low, high) that contains the whole spectrum, if known. Products alone never
            give a certain enclosure, but a norm of the operator does.

        Returns:
          `BoundedEstimate` of x's shape.

        Raises:
          ValueError: the enclosure is empty, or a node lies outside of it by more than its
            residual.
        """
        x = np.asarray(x, float)
        low, high = enclosure
        nodes, residuals = (
            np.concatenate([getattr(r, f) for r in self.rules]) for f in ("nodes", "residuals")
        )
        if not low < high or np.any(nodes + residuals < low) or np.any(nodes - residuals > high):
            raise ValueError(
                f"enclosure={enclosure}, expected (low, high) that holds the whole spectrum. There "
                f"are eigenvalues near {nodes.min():.6g} and {nodes.max():.6g}: widen it."
            )
        return self._statistics.share(-np.inf, x, enclosure)

    def mass(self, low: float, high: float) -> BoundedEstimate:
        """Share of the eigenvalues in [low, high].

        The value is that of the rules. It may depend on a single node if ``low`` or ``high`` lies
        in a dense part of the spectrum. So ``lower`` and ``upper`` include every error, as those of
        `cdf_bounds` do. Always read and quote them with the value.

        The share of negative eigenvalues, ``mass(-inf, 0)``, cannot be determined where many
        eigenvalues are zero or nearly zero, as in every large network. Rounding decides their sign,
        and plain quadrature gives anything from 0 to 1 when num_steps changes. Ask for
        ``mass(-inf, -epsilon)`` instead, with an epsilon that has a meaning in your problem, such
        as 1e-3 of the largest eigenvalue.

        Raises:
          ValueError: ``low`` is greater than ``high``.
        """
        if not low <= high:
            raise ValueError(f"low={low}, high={high}: expected low <= high.")
        return self._statistics.share(float(low), float(high))

    def quantile(self, p: float) -> BoundedEstimate:
        """The eigenvalue below which a share p of the spectrum lies.

        It is the smallest node with cdf >= p. ``lower`` and ``upper`` invert the bounds of `cdf`,
        so that they include every error. The standard error is a quarter of the distance between
        the bounds that the probes alone would give. Where a bound stays beyond p up to the last
        node, the end of the spectrum (see `extremes`) takes its place.

        Raises:
          ValueError: ``p`` is not in [0, 1].
        """
        if not 0 <= p <= 1:
            raise ValueError(f"p={p}, expected a share in [0, 1].")
        nodes = np.unique(np.concatenate([rule.estimate[0] for rule in self.rules]))
        cdf = self.cdf(nodes)
        smallest, largest = self.extremes()

        def first(levels: np.ndarray, beyond: float) -> float:
            # Sums of weights miss 1 by rounding. If they miss p, the answer is the last node.
            position = int(np.searchsorted(np.maximum.accumulate(levels), p - 1e-12))
            found = float(nodes[position]) if position < nodes.size else beyond
            return float(np.clip(found, smallest.lower, largest.upper))

        last = float(nodes[-1])
        # The bounds are constant up to the next node, which the eigenvalue may be just below.
        lower = first(np.append(cdf.upper[1:], 1.0), last)
        least = first(np.append(cdf.quadrature[1][1:], 1.0), last)
        value = first(cdf.value, last)
        upper = first(cdf.lower, largest.upper)
        most = first(cdf.quadrature[0], largest.upper)
        probes = first(cdf.probes[1], last), first(cdf.probes[0], last)
        moved = [first(cdf.value + sign * cdf.coupling, last) - value for sign in (-1, 1)]
        rounding = max(rule.rounding for rule in self.rules)
        return BoundedEstimate(
            value,
            (probes[1] - probes[0]) / 4,
            min(lower, value) - rounding,
            max(upper, value) + rounding,
            (min(least, value) - rounding, max(most, value) + rounding),
            max(map(abs, moved)),
            probes,
        )

    def extremes(self) -> Extremes:
        """The smallest and the largest node. Their standard errors are their residuals.

        An eigenvalue lies within the residual of the node. The interval from ``lower`` to ``upper``
        contains the end of the spectrum in 95 % of runs: the node lies inside of the spectrum, and
        a random start overlooks an eigenvalue only if its weight there is very small
        (`hessdensity.spectra.evidence.ends_of_the_spectrum`). For the measure of a vector, an
        eigenvalue lies in the interval, and nothing is known of others.
        """
        nodes = np.concatenate([rule.nodes for rule in self.rules])
        residuals = np.concatenate([rule.residuals for rule in self.rules])
        rounding = float(residuals.min())
        ends = []
        for position, sign in ((nodes.argmin(), -1), (nodes.argmax(), 1)):
            node, residual = float(nodes[position]), float(residuals[position])
            beyond = self._statistics.enclosure[(1 + sign) // 2]
            interval = sorted((node - sign * rounding, max(sign * beyond, sign * node) * sign))
            if not np.isfinite(beyond):
                interval = [node - residual, node + residual]
            ends.append(Estimate(node, residual, *interval))
        return Extremes(*ends)

    def plot(self, ax: Axes | None = None, **options: Any) -> Axes:
        """Draw the distribution, and return the matplotlib Axes.

        ``options`` are those of `hessdensity.plots.plot_density`.
        """
        from hessdensity.plots import plot_density

        return plot_density(self, ax, **options)

    def __str__(self) -> str:
        rayleigh = {"Rayleigh quotient": f"{self.moment(1).value:.6g}"}
        return summarize(self, "Measure of a vector over the spectrum", rayleigh)

    def save(self, path: str | Path) -> None:
        """Write everything but vectors to exactly ``path``, as a versioned npz without pickles."""
        archive.write(path, self.kind, self.contents())

    def contents(self) -> archive.Contents:
        """The fields that are saved."""
        return archive.Contents(self.rules, self.dimension, self.num_matvecs, self.description)

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read a file that `save` wrote. The result equals the saved one bit for bit.

        Raises:
          FileNotFoundError: there is no such file.
          ValueError: the file holds something else, or has a newer version of the format.
        """
        return cls(*archive.read(path, cls.kind))
