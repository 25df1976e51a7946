"""An estimated quantity, and how far to trust it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True, eq=False)
class Estimate:
    """An estimate with its error, scalar or array: all four fields have one shape.

    It stands in for its value where a number or an array is wanted (``float(e)``,
    ``np.asarray(e)``, ``plt.plot(x, e)``) and prints with its error: ``f"{e:.3g}"``.

    Example:
      >>> e = Estimate(1.0, 0.25, 0.5, 1.5)
      >>> print(e)
      1 ± 0.25
      >>> float(e) + 1
      2.0
    """

    value: Any
    """The estimate."""
    standard_error: Any
    """One standard deviation of the estimate, in its units."""
    lower: Any
    """Lower end of the interval that holds the truth in about 95 % of runs (less for a heavy tail
    and one probe)."""
    upper: Any
    """Upper end of that interval."""

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.array(self.value, dtype=dtype) if copy else np.asarray(self.value, dtype=dtype)

    def __float__(self) -> float:
        return float(self.value)

    def __format__(self, spec: str) -> str:
        if np.ndim(self.value):
            return f"{np.shape(self.value)} estimates, standard errors up to {format(np.max(self.standard_error), spec)}"
        return f"{format(self.value, spec)} ± {format(self.standard_error, '.2g')}"

    def __str__(self) -> str:
        return format(self, ".6g")


@dataclass(frozen=True, eq=False)
class BoundedEstimate(Estimate):
    """An estimated share of a spectrum whose errors are kept apart; ``lower`` and ``upper`` combine
    them all.

    They do not add up: the probes' interval is taken around the two ends of the quadrature's, where
    it is another."""

    quadrature: tuple[Any, Any]
    """(lower, upper): what these probes would have shown after infinitely many steps lies between,
    for certain."""
    coupling: Any
    """How far deflation may have moved the share, at most, for certain: 1/n for each finite end of
    the interval, less where some rules leave nothing out."""
    probes: tuple[Any, Any]
    """(lower, upper): 95 % bounds for the probes' randomness alone, around the value."""


def share_interval(
    low: np.ndarray, high: np.ndarray, freedom: float
) -> tuple[np.ndarray, np.ndarray]:
    """95 % bounds on the share F of a spectrum, from shares seen by random probes.

    A probe uniform on the sphere of N dimensions sees Beta(N F / 2, N (1 - F) / 2) of a share F:
    its squared components are those of a chi-square over a sum of chi-squares. The mean over k
    probes has the same mean and the variance of Beta(c F, c (1 - F)), c = k (N + 2) / 2 - 1, which
    is the law itself for k = 1. The bounds are the shares for which what was seen is the 2.5 % and
    the 97.5 % quantile.

    Args:
      low: the smallest share that may have been seen (quadrature leaves it uncertain), in [0, 1].
      high: the largest.
      freedom: k (N + 2).

    Returns:
      (lower, upper), of the broadcast shape of ``low`` and ``high``.
    """
    from scipy.special import betainc

    concentration = freedom / 2 - 1

    def solve(seen: np.ndarray, level: float) -> np.ndarray:
        # P(Beta <= seen) falls as F grows: bisection, vectorised over what was seen.
        left, right = np.zeros_like(seen), np.ones_like(seen)
        for _ in range(60):
            middle = (left + right) / 2
            above = betainc(concentration * middle, concentration * (1 - middle), seen) > level
            left, right = np.where(above, middle, left), np.where(above, right, middle)
        return (left + right) / 2

    # Sums of weights miss 1 by rounding, and of a share of 1 nothing is uncertain.
    low, high = (np.clip(np.where(np.asarray(x) > 1 - 1e-12, 1.0, x), 0, 1) for x in (low, high))
    lower = np.where((low > 0) & (low < 1), solve(low, 0.975), low)
    upper = np.where((high > 0) & (high < 1), solve(high, 0.025), high)
    # A share so small that a chi-square of its few degrees is all but sure to fall below it bounds
    # nothing from below.
    return np.minimum(lower, low), np.maximum(upper, high)


def positive_interval(
    mean: np.ndarray, error: np.ndarray, freedom: float, dimension: float
) -> tuple[np.ndarray, np.ndarray]:
    """95 % bounds on the mean of a non-negative function over a spectrum.

    The function is taken for one that is K on a share F of the spectrum and 0 elsewhere, with the
    same mean K F and the same mean square K^2 F, and the bounds are those on F: exactly so where it
    hangs on one eigenvalue. There its weight is a chi-square of k degrees, for two probes uncertain
    by a factor of four downwards and of forty upwards, which two standard errors to either side
    would hide.

    Args:
      mean: what the probes saw.
      error: its standard error.
      freedom: k (N + 2).
      dimension: N; no share that is not empty is below 1/N.

    Returns:
      (lower, upper), of the shape of ``mean``.
    """
    seen = mean > 0
    variance = np.divide(error, mean, out=np.zeros_like(mean), where=seen) ** 2 * (freedom - 2) / 2
    share = 1 / (1 + variance)
    lower, upper = share_interval(share, share, freedom)
    height = mean / share
    return height * lower, height * np.where(seen, np.maximum(upper, 1 / dimension), 0)
