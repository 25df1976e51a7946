"""The measure of a vector over a spectrum, computed from its quadrature rules alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Self

import numpy as np

from . import archive
from .estimate import BoundedEstimate, Estimate
from .quadrature import Rule
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
    standard errors are 0, and ``lower`` and ``upper`` include the error of quadrature where a
    method says so (`cdf_bounds`, `mass`).

    Example:
      >>> import hessdensity as hd
      >>> rule = hd.Rule(nodes=[0, 2], weights=[0.75, 0.25], num_deflated=0, residuals=[0, 0])
      >>> measure = hd.SpectralMeasure((rule,), dimension=100, num_matvecs=2)
      >>> print(f"Rayleigh quotient {measure.moment(1):.3g}")
      Rayleigh quotient 0.5 ± 0
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
        """The default smoothing: 1/500 of the range of the nodes.

        It is a standard deviation, in eigenvalue units.
        """
        low, high = self.extent
        scale = max(abs(low), abs(high))
        return max((high - low) / 500, scale / 1e5) or 1.0

    @property
    def extent(self) -> tuple[float, float]:
        """(smallest, largest) node, in eigenvalue units."""
        return float(self.nodes.min()), float(self.nodes.max())

    @cached_property
    def _statistics(self) -> RuleStatistics:
        return RuleStatistics(self.rules, self.dimension, self.random)

    # Smooth quantities ----------------------------------------------------------------------------

    def pdf(self, x: Any, bandwidth: float | None = None) -> Estimate:
        """The smoothed density at x: mean over the rules of sum_i w_i N(x; node_i, bandwidth^2).

        Args:
          x: eigenvalues, any shape.
          bandwidth: standard deviation of the Gaussian, in eigenvalue units (default:
            ``self.bandwidth``).

        Returns:
          `Estimate` of x's shape, in 1/eigenvalue units. It is not renormalized on a grid.

        Raises:
          ValueError: ``bandwidth`` is not positive.
        """
        width = self.bandwidth if bandwidth is None else bandwidth
        if not width > 0:
            raise ValueError(
                f"bandwidth={bandwidth}, expected a positive standard deviation in eigenvalue "
                "units."
            )
        x = np.asarray(x, float)

        def kernel(nodes: np.ndarray) -> np.ndarray:
            return np.exp(-0.5 * ((x.ravel() - nodes[:, None]) / width) ** 2) / (
                width * np.sqrt(2 * np.pi)
            )

        value, error, lower, upper = (
            part.reshape(x.shape) for part in self._statistics.expectations(kernel)
        )
        return Estimate(value, error, lower, upper)

    def expectation(self, f: Callable[[np.ndarray], Any]) -> Estimate:
        """Mean of ``f``: g.f(H)g / |g|^2 for the measure of g, tr f(H) / n for a density.

        Args:
          f: an elementwise function of an array of nodes, such as ``np.log1p``.

        Raises:
          ValueError: ``f`` does not return one finite number for each node.
        """

        def values(nodes: np.ndarray) -> np.ndarray:
            result = np.asarray(f(nodes), float)
            if result.shape != nodes.shape or not np.all(np.isfinite(result)):
                raise ValueError(
                    f"f must return one finite number for each node. For {nodes.size} nodes from "
                    f"{nodes.min():.3g} to {nodes.max():.3g} it returned shape {result.shape}, "
                    f"with {np.sum(~np.isfinite(result))} not finite. Define f for negative nodes, "
                    "too."
                )
            return result[:, None]

        return self._statistics.signed_expectation(values)

    def moment(self, k: int) -> Estimate:
        """Mean of the k-th power, in eigenvalue units to the power k.

        Quadrature is exact up to k = 2 num_steps - 1.
        """
        return self.expectation(lambda nodes: nodes**k)

    # Shares and quantiles -------------------------------------------------------------------------

    def cdf(self, x: Any) -> Estimate:
        """Share of the eigenvalues that are <= x: the cumulative of the rules, a step function.

        Args:
          x: eigenvalues, any shape.

        Returns:
          `Estimate` of x's shape. ``lower`` and ``upper`` follow from the Beta law of the probes.
        """
        share = self._statistics.share(-np.inf, np.asarray(x, float))
        return Estimate(share.value, share.standard_error, *share.probes)

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

    def quantile(self, p: float) -> Estimate:
        """The eigenvalue below which a share p of the spectrum lies.

        It is the smallest node with cdf >= p. ``lower`` and ``upper`` invert the bounds of `cdf`.
        The standard error is a quarter of the distance between them.

        Raises:
          ValueError: ``p`` is not in [0, 1].
        """
        if not 0 <= p <= 1:
            raise ValueError(f"p={p}, expected a share in [0, 1].")
        nodes = np.unique(np.concatenate([rule.nodes for rule in self.rules]))
        cdf = self.cdf(nodes)

        def first(levels: np.ndarray) -> float:
            # Sums of weights miss 1 by rounding. If they miss p, the answer is the last node.
            return float(nodes[min(int(np.searchsorted(levels, p - 1e-12)), nodes.size - 1)])

        lower, value, upper = (
            first(np.maximum.accumulate(level)) for level in (cdf.upper, cdf.value, cdf.lower)
        )
        return Estimate(value, (upper - lower) / 4, lower, upper)

    def extremes(self) -> Extremes:
        """The smallest and the largest node, with their residuals as errors.

        An eigenvalue lies in [lower, upper]. It is the extreme one if the residual is far below the
        gaps to the neighbors. But products alone cannot prove that no eigenvalue lies beyond,
        because a probe may miss a direction.
        """
        nodes = np.concatenate([rule.nodes for rule in self.rules])
        residuals = np.concatenate([rule.residuals for rule in self.rules])
        ends = [(float(nodes[i]), float(residuals[i])) for i in (nodes.argmin(), nodes.argmax())]
        return Extremes(
            *(Estimate(node, residual, node - residual, node + residual) for node, residual in ends)
        )

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
