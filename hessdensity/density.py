"""The answer: a spectral density with its error bars, which sees nothing but rules."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from . import _archive
from ._summary import in_words
from .quadrature import Rule, cumulative, cumulative_bounds
from .results import Estimate, positive_interval, share_interval

if TYPE_CHECKING:
    from matplotlib.axes import Axes  # noqa: TID251


class Extremes(NamedTuple):
    """The two ends of a spectrum, in eigenvalue units."""

    smallest: Estimate
    largest: Estimate


@dataclass(frozen=True, eq=False)
class SpectralDensity:
    """The distribution of the n eigenvalues: mass 1, each eigenvalue counting 1/n.

    The mean of ``rules``, one a probe; everything below is computed from them. Error bars describe the probes'
    randomness, exactly: the part of the spectrum that a probe uniform on the sphere of N = n - num_deflated dimensions
    sees has variance 2/(N + 2) x (mean f^2 - (mean f)^2) in the expectation of f, and a share F follows a Beta law.
    They are defined from one probe on. The error of quadrature (num_steps too small) is not in them, save where a
    method says so.

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
    """What was computed: the operator's own description, settings, versions."""

    def __post_init__(self) -> None:
        if not self.rules:
            raise ValueError("rules is empty, expected at least one rule.")
        if len({rule.num_deflated for rule in self.rules}) > 1:
            raise ValueError("rules differ in num_deflated; expected those of one run, which deflates one subspace.")

    @property
    def nodes(self) -> np.ndarray:
        """(num_rules, longest) float64, in eigenvalue units; shorter rules repeat their last node, at weight 0."""
        longest = max(rule.nodes.size for rule in self.rules)
        return np.stack([np.pad(rule.nodes, (0, longest - rule.nodes.size), mode="edge") for rule in self.rules])

    @property
    def weights(self) -> np.ndarray:
        """(num_rules, longest) float64, each row summing to 1, padded with 0."""
        longest = self.nodes.shape[1]
        return np.stack([np.pad(rule.weights, (0, longest - rule.weights.size)) for rule in self.rules])

    @property
    def bandwidth(self) -> float:
        """The default smoothing, a standard deviation in eigenvalue units: 1/500 of the range of the nodes."""
        low, high = self.extent
        scale = max(abs(low), abs(high))
        return max((high - low) / 500, scale / 1e5) or 1.0

    @property
    def extent(self) -> tuple[float, float]:
        """(smallest, largest) node."""
        return float(self.nodes.min()), float(self.nodes.max())

    # What the probes see, apart from what was deflated ---------------------------------------------------------------

    @property
    def _num_deflated(self) -> int:
        return self.rules[0].num_deflated

    @property
    def _probed(self) -> float:
        """Share of the dimensions that is left to the probes: N/n."""
        return 1 - self._num_deflated / self.dimension

    @property
    def _freedom(self) -> float:
        """The number k (N + 2).

        The variance of a mean is 2/freedom of the variance over the spectrum; 2/(freedom - 2) of the variance within
        the rules estimates it without bias, since they scatter around their own mean.
        """
        return len(self.rules) * (self.dimension - self._num_deflated + 2)

    def _deflated_sum(self, values: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
        count = self._num_deflated
        return (self.rules[0].weights[:count, None] * values(self.rules[0].nodes[:count])).sum(0)

    def _probe_parts(self) -> list[tuple[np.ndarray, np.ndarray]]:
        """(nodes, weights of sum 1) of each probe's Gauss rule."""
        parts = [(rule.nodes[rule.num_deflated :], rule.weights[rule.num_deflated :]) for rule in self.rules]
        return [(nodes, weights / (weights.sum() or 1)) for nodes, weights in parts]

    def _expectations(self, values: Callable[[np.ndarray], np.ndarray]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(sum over the deflated part, mean over the probes' part, its standard error) of several functions.

        They are given as one, from nodes (j,) to (j, number of functions).
        """
        parts = [(values(nodes), weights[:, None]) for nodes, weights in self._probe_parts()]
        mean = np.mean([(weights * f).sum(0) for f, weights in parts], axis=0)
        # Around the pooled mean and not as mean f^2 - (mean f)^2, which cancels when f is far from zero.
        spread = np.mean([(weights * (f - mean) ** 2).sum(0) for f, weights in parts], axis=0)
        return self._deflated_sum(values), mean, np.sqrt(2 * spread / max(self._freedom - 2, 1))

    def _positive(self, values: Callable[[np.ndarray], np.ndarray]) -> tuple[np.ndarray, ...]:
        """(value, standard error, lower, upper) of the means of several functions; the bounds if they are >= 0."""
        deflated, mean, error = self._expectations(values)
        bounds = positive_interval(mean, error, self._freedom, max(self.dimension - self._num_deflated, 1))
        value, lower, upper = (deflated + self._probed * part for part in (mean, *bounds))
        return value, self._probed * error, lower, upper

    # Smooth quantities -----------------------------------------------------------------------------------------------

    def pdf(self, x: Any, bandwidth: float | None = None) -> Estimate:
        """The density at ``x``, smoothed: mean over rules of sum_i w_i N(x; node_i, bandwidth^2).

        Args:
          x: eigenvalues, any shape.
          bandwidth: standard deviation of the Gaussian, in eigenvalue units (default: ``self.bandwidth``).

        Returns:
          `Estimate` of x's shape, in 1/eigenvalue units. Nothing is renormalised on a grid.

        Raises:
          ValueError: bandwidth <= 0.
        """
        width = self.bandwidth if bandwidth is None else bandwidth
        if not width > 0:
            raise ValueError(f"bandwidth={bandwidth}, expected a positive standard deviation in eigenvalue units.")
        x = np.asarray(x, float)

        def kernel(nodes: np.ndarray) -> np.ndarray:
            return np.exp(-0.5 * ((x.ravel() - nodes[:, None]) / width) ** 2) / (width * np.sqrt(2 * np.pi))

        value, error, lower, upper = (part.reshape(x.shape) for part in self._positive(kernel))
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
                    f"f must give one finite number a node: {nodes.size} nodes from {nodes.min():.3g} to "
                    f"{nodes.max():.3g} gave shape {result.shape}, {np.sum(~np.isfinite(result))} not finite. "
                    "Nodes may be negative."
                )
            return result[:, None]

        value, error, *_ = self._positive(values)
        # A signed function is two non-negative ones: the upper end of one goes with the lower end of the other.
        _, _, gain_low, gain_high = self._positive(lambda nodes: np.maximum(values(nodes), 0))
        _, _, loss_low, loss_high = self._positive(lambda nodes: np.maximum(-values(nodes), 0))
        return Estimate(*(float(part[0]) for part in (value, error, gain_low - loss_high, gain_high - loss_low)))

    def moment(self, k: int) -> Estimate:
        """tr(H^k) / n, in eigenvalue units to the power k. Quadrature is exact up to k = 2 num_steps - 1."""
        return self.expectation(lambda nodes: nodes**k)

    def trace(self) -> Estimate:
        """tr(H), in eigenvalue units."""
        mean, n = self.moment(1), self.dimension
        return Estimate(n * mean.value, n * mean.standard_error, n * mean.lower, n * mean.upper)

    def frobenius_norm(self) -> Estimate:
        """sqrt(tr(H^2)), in eigenvalue units."""
        square = self.moment(2)
        value, lower, upper = (float(np.sqrt(self.dimension * x)) for x in (square.value, square.lower, square.upper))
        error = self.dimension * square.standard_error / (2 * value) if value else 0.0
        return Estimate(value, error, lower, upper)

    # Shares and quantiles --------------------------------------------------------------------------------------------

    def cdf(self, x: Any) -> Estimate:
        """Share of the eigenvalues that are <= x: the cumulative of the rules, a step function.

        Args:
          x: eigenvalues, any shape.

        Returns:
          `Estimate` of x's shape; ``lower`` and ``upper`` from the Beta law of the probes.
        """
        x = np.asarray(x, float)
        deflated = self._deflated_sum(lambda nodes: (nodes[:, None] <= x.ravel()).astype(float)).reshape(x.shape)
        share = np.mean([cumulative(nodes, weights, x) for nodes, weights in self._probe_parts()], axis=0)
        return self._share(deflated, share, share, share)

    def mass(self, low: float, high: float) -> Estimate:
        """Share of the eigenvalues in [low, high].

        The value is that of the rules and may hang on a single node when ``low`` or ``high`` falls into a dense part
        of the spectrum (near 0, say). So ``lower`` and ``upper`` hold the quadrature's error too
        (Chebyshev-Markov-Stieltjes bounds), beside the Beta law of the probes: they are to be read, and quoted, with
        the value.

        Raises:
          ValueError: low > high.
        """
        if not low <= high:
            raise ValueError(f"low={low}, high={high}: expected low <= high.")
        deflated = self._deflated_sum(lambda nodes: ((nodes >= low) & (nodes <= high)).astype(float)[:, None])[0]
        shares, lowest, highest = [], [], []
        ends = np.array([low, high], float)
        for nodes, weights in self._probe_parts():
            shares.append(weights[(nodes >= low) & (nodes <= high)].sum())
            below, above = cumulative_bounds(nodes, weights, ends)
            lowest.append(max(below[1] - above[0], 0.0))
            highest.append(above[1] - below[0])
        return self._share(deflated, *(np.mean(part) for part in (shares, lowest, highest)))

    def quantile(self, p: float) -> Estimate:
        """The eigenvalue below which a share p of the spectrum lies: the smallest node with cdf >= p.

        ``lower`` and ``upper`` invert the bounds of `cdf`; the standard error is a quarter of their distance.

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

        lower, value, upper = (first(np.maximum.accumulate(level)) for level in (cdf.upper, cdf.value, cdf.lower))
        return Estimate(value, (upper - lower) / 4, lower, upper)

    def _share(self, deflated: Any, share: Any, low: Any, high: Any) -> Estimate:
        """A share of the whole from one of the probes' part that lies in [low, high] but for the probes' randomness."""
        lower, upper = share_interval(low, high, self._freedom)
        error = self._probed * np.sqrt(2 * share * np.maximum(1 - share, 0) / max(self._freedom - 2, 1))
        value, lower, upper = (deflated + self._probed * part for part in (share, lower, upper))
        return Estimate(*(np.asarray(part) if np.ndim(part) else float(part) for part in (value, error, lower, upper)))

    def extremes(self) -> Extremes:
        """The smallest and the largest node, with residuals.

        An eigenvalue lies in [lower, upper], which for a residual far below the gaps to its neighbours is the extreme
        one. That no eigenvalue lies beyond, products alone cannot prove: a probe may miss a direction.
        """
        nodes = np.concatenate([rule.nodes for rule in self.rules])
        residuals = np.concatenate([rule.residuals for rule in self.rules])
        ends = [(float(nodes[i]), float(residuals[i])) for i in (nodes.argmin(), nodes.argmax())]
        return Extremes(*(Estimate(node, residual, node - residual, node + residual) for node, residual in ends))

    def plot(self, ax: Axes | None = None, **options: Any) -> Axes:
        """Draw the density; returns the matplotlib Axes. ``options`` as for `hessdensity.plots.plot_density`."""
        from .plots import plot_density

        return plot_density(self, ax, **options)

    def __str__(self) -> str:
        return in_words(self)

    def save(self, path: str | Path) -> None:
        """Write a versioned ``.npz`` without pickles to exactly ``path``."""
        _archive.write(path, self.rules, self.dimension, self.num_matvecs, self.description)

    @staticmethod
    def load(path: str | Path) -> SpectralDensity:
        """Read what `save` wrote, equal to what was saved bit for bit.

        Raises:
          FileNotFoundError: there is no such file.
          ValueError: the file is not a saved density, or one of a newer version of the format.
        """
        return SpectralDensity(*_archive.read(path))
