"""How far two spectra are apart."""

from __future__ import annotations

from typing import Any

import numpy as np

from .measure import SpectralMeasure


def distance(a: SpectralMeasure | Any, b: SpectralMeasure | Any) -> float:
    """Wasserstein-1 distance between two spectra, the integral of |cdf difference|, in eigenvalue
    units.

    Args:
      a: a `SpectralDensity` or `SpectralMeasure`, or an array of exact eigenvalues.
      b: likewise.

    Example:
      >>> distance([0.0, 1.0], [0.0, 3.0])
      1.0
    """
    from scipy.stats import wasserstein_distance

    (nodes_a, weights_a), (nodes_b, weights_b) = _measure(a), _measure(b)
    return float(wasserstein_distance(nodes_a, nodes_b, weights_a, weights_b))


def _measure(spectrum: SpectralMeasure | Any) -> tuple[np.ndarray, np.ndarray]:
    if isinstance(spectrum, SpectralMeasure):
        rules = spectrum.rules
        return np.concatenate([r.nodes for r in rules]), np.concatenate(
            [r.weights for r in rules]
        ) / len(rules)
    values = np.asarray(spectrum, float)
    if values.ndim != 1 or not values.size:
        raise ValueError(
            f"a spectrum of shape {values.shape}; expected a SpectralDensity or eigenvalues (n,)."
        )
    return values, np.full(values.size, 1 / values.size)
