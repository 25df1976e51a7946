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


@dataclass(frozen=True, eq=False)
class DataEstimate(Estimate):
    """An estimate whose error is that of the sample of data: how far it would vary from one data
    set to the next."""

    parts: np.ndarray
    """(J, ...) the estimate from each part of the data alone."""
    bias: Any = None
    """How far the whole data's value is off for having finitely many examples, to first order in
    one over their number; None where it is not known. Too few data overrate the outliers."""


def estimate_of_parts(
    value: np.ndarray,
    variance: np.ndarray,
    spread: np.ndarray,
    parts: np.ndarray,
    bias: np.ndarray | None = None,
) -> DataEstimate:
    """What J parts (J, ...) make of a value: ``spread`` is the variance, not smaller, that the
    interval is to cover."""
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
