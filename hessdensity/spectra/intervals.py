"""95 % intervals for what random probes have seen of a spectrum."""

from __future__ import annotations

import numpy as np

_NORMAL = 1.96  # standard deviations that hold 95 % of a normal variable

# Relative variance over the spectrum below which a mean of probes is close to normal.
_ALMOST_CONSTANT = 1e-6


def share_interval(
    low: np.ndarray, high: np.ndarray, freedom: float
) -> tuple[np.ndarray, np.ndarray]:
    """95 % bounds on the share F of a spectrum, from shares that random probes saw.

    A probe that is uniform on the sphere of N dimensions sees a share that follows the law
    Beta(N F / 2, N (1 - F) / 2), because its squared components are chi-square variables divided by
    their sum. The mean over k probes has the mean F and the variance of Beta(c F, c (1 - F)) with
    c = k (N + 2) / 2 - 1. For k = 1 this is the law itself. The bounds are the shares F for which
    the share seen is the 97.5 % quantile of this law (lower) and the 2.5 % quantile (upper).

    Args:
      low: the smallest share that the probes may have seen, in [0, 1]. Quadrature leaves the share
        uncertain.
      high: the largest such share.
      freedom: k (N + 2).

    Returns:
      (lower, upper), of the broadcast shape of ``low`` and ``high``.
    """
    from scipy.special import betainc

    concentration = freedom / 2 - 1

    def solve(seen: np.ndarray, level: float) -> np.ndarray:
        # P(Beta <= seen) decreases as F grows, so bisection finds F, for all of ``seen`` together.
        left = np.zeros_like(seen)
        right = np.ones_like(seen)
        for _ in range(60):
            middle = (left + right) / 2
            above = betainc(concentration * middle, concentration * (1 - middle), seen) > level
            left = np.where(above, middle, left)
            right = np.where(above, right, middle)
        return (left + right) / 2

    # Sums of weights miss 1 by rounding. A share of exactly 1 has no uncertainty.
    low, high = (np.clip(np.where(np.asarray(x) > 1 - 1e-12, 1.0, x), 0, 1) for x in (low, high))
    lower = np.where((low > 0) & (low < 1), solve(low, 0.975), low)
    upper = np.where((high > 0) & (high < 1), solve(high, 0.025), high)
    # A tiny share has so few degrees of freedom that its chi-square variable almost always falls
    # below the share seen. The solution is then useless as a lower bound, so the interval always
    # includes the shares seen.
    return np.minimum(lower, low), np.maximum(upper, high)


def positive_interval(
    mean: np.ndarray,
    error: np.ndarray,
    freedom: float,
    dimension: float,
    ends: tuple[np.ndarray, np.ndarray],
) -> tuple[np.ndarray, np.ndarray]:
    """95 % bounds on the mean of a non-negative function over a spectrum.

    The function is replaced by one that is K on a share F of the spectrum and 0 elsewhere, with the
    same mean K F and the same mean square K^2 F. The bounds are K times those on F. They are exact
    for a function that is zero at all eigenvalues but one. The weight of that eigenvalue is a
    chi-square variable with k degrees of freedom. With two probes it is uncertain by a factor of
    four downwards and of forty upwards, which two standard errors to either side would hide. A
    function that is almost constant has the interval of a normal variable.

    Args:
      mean: the mean that the probes saw.
      error: its standard error.
      freedom: k (N + 2).
      dimension: N. A share that is not empty is at least 1/N.
      ends: the least and the most that the probes may have seen. Quadrature leaves it uncertain.

    Returns:
      (lower, upper), of the shape of ``mean``.
    """
    low, high = ends
    seen = mean > 0
    variance = np.divide(error, mean, out=np.zeros_like(mean), where=seen) ** 2 * (freedom - 2) / 2
    height = mean * (1 + variance)

    def share(end: np.ndarray) -> np.ndarray:
        with np.errstate(over="ignore"):  # far more than a tiny height is all of it
            found = np.divide(end, height, out=np.zeros_like(mean), where=seen & (height > 0))
        return np.minimum(found, 1)

    lower, upper = share_interval(share(low), share(high), freedom)
    normal = variance < _ALMOST_CONSTANT
    lower = np.where(normal, low - _NORMAL * error, height * lower)
    upper = np.where(normal, high + _NORMAL * error, height * np.maximum(upper, 1 / dimension))
    return np.where(seen, np.clip(lower, 0, low), 0), np.where(seen, np.maximum(upper, high), high)
