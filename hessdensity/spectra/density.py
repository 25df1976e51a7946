"""The answer of the main job: a spectral density with its error bars."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from .estimate import Estimate
from .measure import SpectralMeasure
from .summary import found, summarize

if TYPE_CHECKING:
    from .eigenspace import Eigenspace


CONVERGED = 1e-4  # residual, over the operator's norm, of a Ritz pair that passes for an eigenpair


@dataclass(frozen=True, eq=False)
class SpectralDensity(SpectralMeasure):
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

    kind: ClassVar[str] = "density"
    random: ClassVar[bool] = True

    eigenspace: Eigenspace | None = None
    """The deflated Ritz vectors, where they were asked for (``keep_eigenspace``). Not saved."""

    def trace(self) -> Estimate:
        """tr(H), in eigenvalue units."""
        mean, n = self.moment(1), self.dimension
        return Estimate(n * mean.value, n * mean.standard_error, n * mean.lower, n * mean.upper)

    def frobenius_norm(self) -> Estimate:
        """sqrt(tr(H^2)), in eigenvalue units."""
        square = self.moment(2)
        value, lower, upper = (
            float(np.sqrt(self.dimension * x)) for x in (square.value, square.lower, square.upper)
        )
        error = self.dimension * square.standard_error / (2 * value) if value else 0.0
        return Estimate(value, error, lower, upper)

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

    def __str__(self) -> str:
        rows = {
            "outliers": found(self.outliers),
            "trace": f"{self.trace():.6g}",
            "Frobenius norm": f"{self.frobenius_norm():.6g}",
        }
        return summarize(self, "Spectral density", rows)
