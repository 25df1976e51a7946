"""The distance between two spectra."""

from __future__ import annotations

from typing import Any

import numpy as np

from .measure import SpectralMeasure


def distance(a: SpectralMeasure | Any, b: SpectralMeasure | Any) -> float:
    """Wasserstein-1 distance between two spectra, in eigenvalue units.

    This is the integral of the absolute difference of the two cumulatives.

    Args:
      a: a `SpectralDensity` or `SpectralMeasure`, or an array of exact eigenvalues.
      b: the other spectrum, of any of these types.

    Raises:
      ValueError: an array is empty or is not one-dimensional.

    Example:
      >>> distance([0.0, 1.0], [0.0, 3.0])
      1.0
    """
    from scipy.stats import wasserstein_distance

    nodes_a, weights_a = _measure(a)
    nodes_b, weights_b = _measure(b)
    return float(wasserstein_distance(nodes_a, nodes_b, weights_a, weights_b))


def _measure(spectrum: SpectralMeasure | Any) -> tuple[np.ndarray, np.ndarray]:
    if isinstance(spectrum, SpectralMeasure):
        nodes, weights = zip(*(rule.estimate for rule in spectrum.rules), strict=True)
        return np.concatenate(nodes), np.concatenate(weights) / len(spectrum.rules)
    values = np.asarray(spectrum, float)
    if values.ndim != 1 or not values.size:
        raise ValueError(
            f"a or b is an array of shape {values.shape}; expected a SpectralDensity, a "
            "SpectralMeasure, or an array of n >= 1 eigenvalues, shape (n,)."
        )
    return values, np.full(values.size, 1 / values.size)
