"""The answer: a spectral density with its error bars, which sees nothing but rules."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from . import archive as _archive
from .estimate import BoundedEstimate, Estimate
from .quadrature import Rule
from .statistics import Probes
from .summary import in_words

if TYPE_CHECKING:
    from matplotlib.axes import Axes  # noqa: TID251

    from .eigenspace import Eigenspace


CONVERGED = 1e-4  # residual, over the operator's norm, of a Ritz pair that passes for an eigenpair


class Extremes(NamedTuple):
    """The two ends of a spectrum, in eigenvalue units."""

    smallest: Estimate
    largest: Estimate


@dataclass(frozen=True, eq=False)
class SpectralDensity:
    """The distribution of the n eigenvalues: mass 1, each eigenvalue counting 1/n.

    The mean of ``rules``, one a probe; everything below is computed from them. Error bars describe
    the probes' randomness, exactly: the part of the spectrum that a probe uniform on the sphere of
    N = n - num_deflated dimensions sees has variance 2/(N + 2) x (mean f^2 - (mean f)^2) in the
    expectation of f, and a share F follows a Beta law. They are defined from one probe on. The
    errors of quadrature (num_steps too small) and of deflation are not in them, save where a method
    says so (`cdf_bounds`, `mass`); ``description["error"]`` estimates them all.

    ``print`` it for a summary.

    Example:
      >>> rule = Rule(nodes=[0.0, 2.0], weights=[0.75, 0.25], num_deflated=0, residuals=[0.0, 0.0])
      >>> density = SpectralDensity((rule,), dimension=100, num_matvecs=2)
      >>> print(f"{density.trace():.3g}, {density.cdf(1.0):.2g}")
      50 ± 12, 0.75 ± 0.061
    """

    rules: tuple[Rule, ...]
    """One `Rule` a probe, each of mass 1."""
    dimension: int
    """n, the number of eigenvalues."""
    num_matvecs: int
    """Products with the operator that were spent."""
    description: dict[str, Any] = field(default_factory=dict)
    """What was computed: the operator's own description, settings, versions, the estimated error.
    """
    eigenspace: Eigenspace | None = None
    """The deflated Ritz vectors, where they were asked for (``keep_eigenspace``). Not saved."""
    given: bool = False
    """The rules are of a vector that was given (`spectral_measure`), not of random probes: a share
    is then one of the vector's squared norm, nothing is random, and bounds hold the quadrature's
    error alone."""

    def __post_init__(self) -> None:
        if not self.rules:
            raise ValueError("rules is empty, expected at least one rule.")
        if max(rule.num_deflated for rule in self.rules) > self.dimension:
            raise ValueError(f"rules: one deflates more nodes than the dimension={self.dimension}.")

    @property
    def nodes(self) -> np.ndarray:
        """(num_rules, longest) float64, in eigenvalue units; shorter rules repeat their last node,
        at weight 0."""
        longest = max(rule.nodes.size for rule in self.rules)
        return np.stack(
            [np.pad(rule.nodes, (0, longest - rule.nodes.size), mode="edge") for rule in self.rules]
        )

    @property
    def weights(self) -> np.ndarray:
        """(num_rules, longest) float64, each row summing to 1, padded with 0."""
        longest = self.nodes.shape[1]
        return np.stack(
            [np.pad(rule.weights, (0, longest - rule.weights.size)) for rule in self.rules]
        )

    @property
    def bandwidth(self) -> float:
        """The default smoothing, a standard deviation in eigenvalue units: 1/500 of the range of
        the nodes."""
        low, high = self.extent
        scale = max(abs(low), abs(high))
        return max((high - low) / 500, scale / 1e5) or 1.0

    @property
    def extent(self) -> tuple[float, float]:
        """(smallest, largest) node."""
        return float(self.nodes.min()), float(self.nodes.max())

    @cached_property
    def _probes(self) -> Probes:
        return Probes(self.rules, self.dimension, self.given)

    # Smooth quantities -----------------------------------------------------------------------------------------------

    def pdf(self, x: Any, bandwidth: float | None = None) -> Estimate:
        """The density at ``x``, smoothed: mean over rules of sum_i w_i N(x; node_i, bandwidth^2).

        Args: x: eigenvalues, any shape. bandwidth: standard deviation of the Gaussian, in
          eigenvalue units (default: ``self.bandwidth``).

        Returns:
          `Estimate` of x's shape, in 1/eigenvalue units. Nothing is renormalised on a grid.

        Raises:
          ValueError: bandwidth <= 0.
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
            part.reshape(x.shape) for part in self._probes.expectations(kernel)
        )
        return Estimate(value, error, lower, upper)

    def expectation(self, f: Callable[[np.ndarray], Any]) -> Estimate:
        """Mean of ``f`` over the eigenvalues, tr f(H) / n.

        Args:
          f: a function of an array of nodes, elementwise, such as ``np.log1p``.

        Raises:
          ValueError: ``f`` does not return one finite number a node.
        """

        def values(nodes: np.ndarray) -> np.ndarray:
            result = np.asarray(f(nodes), float)
            if result.shape != nodes.shape or not np.all(np.isfinite(result)):
                raise ValueError(
                    f"f must give one finite number a node: {nodes.size} nodes from "
                    f"{nodes.min():.3g} to {nodes.max():.3g} gave shape {result.shape}, "
                    f"{np.sum(~np.isfinite(result))} not finite. Nodes may be negative."
                )
            return result[:, None]

        return self._probes.signed_expectation(values)

    def moment(self, k: int) -> Estimate:
        """tr(H^k) / n, in eigenvalue units to the power k. Quadrature is exact up to k = 2
        num_steps - 1."""
        return self.expectation(lambda nodes: nodes**k)

    def trace(self) -> Estimate:
        """tr(H), in eigenvalue units."""
        self._refuse_given("trace")
        mean, n = self.moment(1), self.dimension
        return Estimate(n * mean.value, n * mean.standard_error, n * mean.lower, n * mean.upper)

    def frobenius_norm(self) -> Estimate:
        """sqrt(tr(H^2)), in eigenvalue units."""
        self._refuse_given("frobenius_norm")
        square = self.moment(2)
        value, lower, upper = (
            float(np.sqrt(self.dimension * x)) for x in (square.value, square.lower, square.upper)
        )
        error = self.dimension * square.standard_error / (2 * value) if value else 0.0
        return Estimate(value, error, lower, upper)

    def _refuse_given(self, name: str) -> None:
        if self.given:
            raise ValueError(
                f"{name}: the measure of one vector does not tell it; moment(1) is that vector's "
                "Rayleigh quotient."
            )

    # Shares and quantiles --------------------------------------------------------------------------------------------

    def cdf(self, x: Any) -> Estimate:
        """Share of the eigenvalues that are <= x: the cumulative of the rules, a step function.

        Args:
          x: eigenvalues, any shape.

        Returns:
          `Estimate` of x's shape; ``lower`` and ``upper`` from the Beta law of the probes.
        """
        share = self._probes.share(-np.inf, np.asarray(x, float))
        return Estimate(share.value, share.standard_error, *share.probes)

    def cdf_bounds(
        self, x: Any, enclosure: tuple[float, float] = (-np.inf, np.inf)
    ) -> BoundedEstimate:
        """Share of the eigenvalues that are <= x, between bounds that hold.

        Three errors, kept apart and combined. Quadrature: num_steps are few;
        Chebyshev-Markov-Stieltjes bounds hold the cumulative of each probe's own measure, whatever
        the spectrum. Coupling: deflation left out a coupling, which moves the share by 1/n at most,
        converged or not (see `hessdensity.deflation`). Probes: their Beta law, at 95 %. Rigorous
        bounds are wide: between two nodes lies the weight of both.

        Args: x: eigenvalues, any shape. enclosure: (low, high) that holds the whole spectrum, if
          known: nothing lies outside. Products alone never
            give one for certain; a norm of the operator does.

        Returns:
          `BoundedEstimate` of x's shape.

        Raises: ValueError: the enclosure is empty, or a node lies outside of it by more than its
          residual.
        """
        x, (low, high) = np.asarray(x, float), enclosure
        nodes, residuals = (
            np.concatenate([getattr(r, f) for r in self.rules]) for f in ("nodes", "residuals")
        )
        if not low < high or np.any(nodes + residuals < low) or np.any(nodes - residuals > high):
            raise ValueError(
                f"enclosure={enclosure}, expected (low, high) that holds the whole spectrum; there "
                f"are eigenvalues near {nodes.min():.6g} and {nodes.max():.6g}."
            )
        return self._probes.share(-np.inf, x, enclosure)

    def mass(self, low: float, high: float) -> BoundedEstimate:
        """Share of the eigenvalues in [low, high].

        The value is that of the rules and may hang on a single node when ``low`` or ``high`` falls
        into a dense part of the spectrum. So ``lower`` and ``upper`` hold every error, as those of
        `cdf_bounds` do: they are to be read, and quoted, with the value.

        The fraction of negative eigenvalues, ``mass(-inf, 0)``, cannot be answered where many
        eigenvalues are zero or nearly so, as in every large network: rounding decides their sign,
        and plain quadrature answers anything from 0 to 1 as num_steps change. Ask away from zero,
        ``mass(-inf, -epsilon)``, with an epsilon that means something to you, such as 1e-3 of the
        largest eigenvalue.

        Raises:
          ValueError: low > high.
        """
        if not low <= high:
            raise ValueError(f"low={low}, high={high}: expected low <= high.")
        return self._probes.share(float(low), float(high))

    def quantile(self, p: float) -> Estimate:
        """The eigenvalue below which a share p of the spectrum lies: the smallest node with cdf >=
        p.

        ``lower`` and ``upper`` invert the bounds of `cdf`; the standard error is a quarter of their
        distance.

        Raises:
          ValueError: p is not in [0, 1].
        """
        if not 0 <= p <= 1:
            raise ValueError(f"p={p}, expected a share in [0, 1].")
        nodes = np.unique(np.concatenate([rule.nodes for rule in self.rules]))
        cdf = self.cdf(nodes)

        def first(levels: np.ndarray) -> float:
            # Sums of weights miss 1 by rounding; the last node is the answer then.
            return float(nodes[min(int(np.searchsorted(levels, p - 1e-12)), nodes.size - 1)])

        lower, value, upper = (
            first(np.maximum.accumulate(level)) for level in (cdf.upper, cdf.value, cdf.lower)
        )
        return Estimate(value, (upper - lower) / 4, lower, upper)

    def extremes(self) -> Extremes:
        """The smallest and the largest node, with residuals.

        An eigenvalue lies in [lower, upper], which for a residual far below the gaps to its
        neighbours is the extreme one. That no eigenvalue lies beyond, products alone cannot prove:
        a probe may miss a direction."""
        nodes = np.concatenate([rule.nodes for rule in self.rules])
        residuals = np.concatenate([rule.residuals for rule in self.rules])
        ends = [(float(nodes[i]), float(residuals[i])) for i in (nodes.argmin(), nodes.argmax())]
        return Extremes(
            *(Estimate(node, residual, node - residual, node + residual) for node, residual in ends)
        )

    @property
    def outliers(self) -> np.ndarray:
        """(count, 2) float64: eigenvalues that deflation has found, descending, each with its
        residual.

        Ritz values with a residual of at most 1e-4 of the largest node in size, the next one ten
        residuals away."""
        rule = max(self.rules, key=lambda rule: rule.num_deflated)
        nodes, residuals = rule.nodes[: rule.num_deflated], rule.residuals[: rule.num_deflated]
        below, above = np.diff(nodes, prepend=-np.inf), np.diff(nodes, append=np.inf)
        reach = np.minimum(np.minimum(below, above) / 10, CONVERGED * max(map(abs, self.extent)))
        return np.stack([nodes, residuals], axis=1)[residuals <= reach][::-1]

    def plot(self, ax: Axes | None = None, **options: Any) -> Axes:
        """Draw the density; returns the matplotlib Axes. ``options`` as for
        `hessdensity.plots.plot_density`."""
        from hessdensity.plots.density import plot_density

        return plot_density(self, ax, **options)

    def __str__(self) -> str:
        return in_words(self)

    def save(self, path: str | Path) -> None:
        """Write a versioned ``.npz`` without pickles to exactly ``path``; all but the eigenspace."""
        contents = _archive.Contents(
            self.rules, self.dimension, self.num_matvecs, self.description, self.given
        )
        _archive.write(path, contents)

    @staticmethod
    def load(path: str | Path) -> SpectralDensity:
        """Read what `save` wrote, equal to what was saved bit for bit.

        Raises:
          FileNotFoundError: there is no such file.
          ValueError: the file is not a saved density, or one of a newer version of the format.
        """
        return SpectralDensity(**_archive.read(path)._asdict())
