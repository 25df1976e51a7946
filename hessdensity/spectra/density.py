"""The result of `hessdensity.spectral_density`: a spectral density with its error bars."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from .estimate import BoundedEstimate
from .measure import SpectralMeasure
from .quadrature import Rule
from .summary import found, summarize

if TYPE_CHECKING:
    from .eigenspace import Eigenspace


# A Ritz pair counts as an eigenpair if its residual is at most this share of the operator's norm.
CONVERGED = 1e-4


@dataclass(frozen=True, eq=False)
class SpectralDensity(SpectralMeasure):
    """The distribution of the n eigenvalues: mass 1, with weight 1/n for each eigenvalue.

    The density is the mean of ``rules``, one for each probe. Everything below is computed from
    these rules. ``print(density)`` shows a summary.

    Estimates are `BoundedEstimate`. Their intervals hold three errors, and have each by itself:

    - The probes are random. Each is uniform on the sphere of N = n - num_deflated dimensions. Over
      its part of the spectrum, the expectation of f has variance 2/(N + 2) x
      (mean f^2 - (mean f)^2), and a share F follows a Beta law. One probe is enough for this.
      ``standard_error`` is the error of the probes alone.
    - Quadrature has few steps. The rules that agree with what a probe has seen differ by this
      error (`hessdensity.spectra.quadrature`).
    - Deflation leaves out a coupling (`hessdensity.spectra.deflation`).

    ``description["error"]`` estimates the distance to the true spectrum by cause.

    Example:
      >>> import hessdensity as hd
      >>> rule = hd.Rule(nodes=[0, 2], weights=[0.75, 0.25], num_deflated=0, residuals=[0, 0])
      >>> density = hd.SpectralDensity((rule,), dimension=100, num_matvecs=2)
      >>> print(f"trace {density.trace():.3g}, share up to 1 {density.cdf(1.0):.2g}")
      trace 50 (28.4 to 75.6), share up to 1 0.75 (0.62 to 0.86)
    """

    kind: ClassVar[str] = "density"
    random: ClassVar[bool] = True

    rules: tuple[Rule, ...]
    """One `Rule` for each probe, each of mass 1."""
    dimension: int
    """n, the number of eigenvalues."""
    num_matvecs: int
    """The number of products with the operator that were spent."""
    description: dict[str, Any] = field(default_factory=dict)
    """The operator's own description, the settings, the versions and the estimated error."""
    eigenspace: Eigenspace | None = None
    """The deflated Ritz vectors, if ``keep_eigenspace`` asked for them. They are not saved."""

    def trace(self) -> BoundedEstimate:
        """tr(H), in eigenvalue units. Quadrature and deflation leave it exact."""
        return self.moment(1).map(lambda part: self.dimension * part)

    def frobenius_norm(self) -> BoundedEstimate:
        """sqrt(tr(H^2)), in eigenvalue units."""
        square = self.moment(2)

        def root(mean: float) -> float:
            return float(np.sqrt(self.dimension * max(mean, 0)))

        value = root(square.value)
        slope = self.dimension / (2 * value) if value else 0.0
        return BoundedEstimate(
            value,
            slope * square.standard_error,
            root(square.lower),
            root(square.upper),
            (root(square.quadrature[0]), root(square.quadrature[1])),
            slope * square.coupling,
            (root(square.probes[0]), root(square.probes[1])),
        )

    @property
    def outliers(self) -> np.ndarray:
        """(count, 2) float64: eigenvalues that deflation found, descending, and their residuals.

        These are the Ritz values with a residual of at most 1e-4 times the size of the largest
        node, and with no other Ritz value within ten residuals.
        """
        rule = max(self.rules, key=lambda rule: rule.num_deflated)
        nodes = rule.nodes[: rule.num_deflated]
        residuals = rule.residuals[: rule.num_deflated]
        below = np.diff(nodes, prepend=-np.inf)
        above = np.diff(nodes, append=np.inf)
        reach = np.minimum(np.minimum(below, above) / 10, CONVERGED * max(map(abs, self.extent)))
        return np.stack([nodes, residuals], axis=1)[residuals <= reach][::-1]

    def __str__(self) -> str:
        rows = {
            "outliers": found(self.outliers),
            "trace": f"{self.trace():.6g}",
            "Frobenius norm": f"{self.frobenius_norm():.6g}",
        }
        return summarize(self, "Spectral density", rows)
