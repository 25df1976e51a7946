"""Estimated quantities with their errors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True, eq=False)
class Estimate:
    """An estimate with its error, scalar or array. All four fields have the same shape.

    It can be used as its value where a number or an array is expected (``float(e)``,
    ``np.asarray(e)``, ``plt.plot(x, e)``). It prints with its error: ``f"{e:.3g}"``.

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
    """One standard deviation of the estimate, in the units of the value."""
    lower: Any
    """Lower end of an interval that contains the true value in about 95 % of runs.

    With a heavy tail and one probe, it contains the true value less often.
    """
    upper: Any
    """Upper end of that interval."""

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.array(self.value, dtype=dtype) if copy else np.asarray(self.value, dtype=dtype)

    def __float__(self) -> float:
        return float(self.value)

    def __format__(self, spec: str) -> str:
        if np.ndim(self.value):
            largest = format(np.max(self.standard_error), spec)
            return f"{np.shape(self.value)} estimates, standard errors up to {largest}"
        return f"{format(self.value, spec)} ± {format(self.standard_error, '.2g')}"

    def __str__(self) -> str:
        return format(self, ".6g")


@dataclass(frozen=True, eq=False)
class BoundedEstimate(Estimate):
    """An estimated share of a spectrum, with a separate field for each error.

    ``lower`` and ``upper`` combine all of the errors. They are not the sum of the separate errors:
    the interval of the probes is computed at both ends of the interval of quadrature, where it has
    a different width than around the value.
    """

    quadrature: tuple[Any, Any]
    """(lower, upper): certain bounds on the value of these probes after infinitely many steps."""
    coupling: Any
    """A certain bound on how far deflation has moved the share.

    It is 1/n for each finite end of the interval, and less where some rules leave nothing out.
    """
    probes: tuple[Any, Any]
    """(lower, upper): 95 % bounds for the randomness of the probes alone, around the value."""


@dataclass(frozen=True, eq=False)
class DataEstimate(Estimate):
    """An estimate whose error is that of a finite sample of data.

    The error says how far the estimate would vary from one data set to the next.
    """

    parts: np.ndarray
    """(J, ...): the estimate from each of J parts of the data alone."""
    bias: Any = None
    """The part of the value that is due to the finite number of examples, or None if unknown.

    It is exact to first order in one over that number. With too few data, outliers come out too
    large.
    """


def estimate_of_parts(
    value: np.ndarray,
    variance: np.ndarray,
    spread: np.ndarray,
    parts: np.ndarray,
    bias: np.ndarray | None = None,
) -> DataEstimate:
    """The `DataEstimate` of a value, from its estimates on J parts of the data (J, ...).

    The interval covers the variance ``spread``, which is at least ``variance``.
    """
    from scipy.special import stdtrit

    reach = stdtrit(len(parts) - 1, 0.975) * np.sqrt(spread)
    number: Any = float if np.ndim(value) == 0 else np.asarray
    return DataEstimate(
        value=number(value),
        standard_error=number(np.sqrt(variance)),
        lower=number(value - reach),
        upper=number(value + reach),
        parts=parts,
        bias=None if bias is None else number(bias),
    )
