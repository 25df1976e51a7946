"""Estimated quantities with their errors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

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


def _with_interval(estimate: Estimate, spec: str) -> str:
    """The value with its interval, or the widest interval of an array."""
    if np.ndim(estimate.value):
        widest = format(np.max(np.asarray(estimate.upper) - estimate.lower), spec)
        return f"{np.shape(estimate.value)} estimates, intervals of up to {widest}"
    ends = (format(float(end), spec) for end in (estimate.lower, estimate.upper))
    return f"{format(float(estimate.value), spec)} ({' to '.join(ends)})"


@dataclass(frozen=True, eq=False)
class BoundedEstimate(Estimate):
    """An estimate from a spectrum, with a separate field for each error.

    ``lower`` and ``upper`` combine all of the errors. They are not the sum of the separate errors:
    the interval of the probes is computed at both ends of the interval of quadrature, where it has
    a different width than around the value. ``standard_error`` is that of the probes alone.

    It prints with its interval.

    Example:
      >>> print(BoundedEstimate(0.5, 0.01, 0.2, 0.9, (0.22, 0.88), 0.001, (0.48, 0.52)))
      0.5 (0.2 to 0.9)
    """

    quadrature: tuple[Any, Any]
    """(lower, upper): bounds on the value of these probes after infinitely many exact steps.

    They are certain for shares and quantiles, and estimated for other quantities.
    """
    coupling: Any
    """A certain bound on how far deflation has moved the value.

    For a share it is b/n for each end among the eigenvalues that deflation may have moved, where b
    is the rank of the coupling, and less where some rules leave nothing out.
    """
    probes: tuple[Any, Any]
    """(lower, upper): 95 % bounds for the randomness of the probes alone, around the value."""

    def __format__(self, spec: str) -> str:
        return _with_interval(self, spec)

    def map(self, f: Callable[[Any], Any]) -> BoundedEstimate:
        """The estimate with ``f`` applied to its value and to all bounds. ``f`` must increase.

        The standard error and the coupling are scaled by ``f`` as a difference is, so that ``f``
        must be linear, such as a reshape or a multiplication.
        """
        return BoundedEstimate(
            f(self.value),
            f(self.standard_error),
            f(self.lower),
            f(self.upper),
            (f(self.quadrature[0]), f(self.quadrature[1])),
            f(self.coupling),
            (f(self.probes[0]), f(self.probes[1])),
        )


@dataclass(frozen=True, eq=False)
class DataEstimate(Estimate):
    """An estimate whose error is that of a finite sample of data.

    ``standard_error`` says how far the estimate would vary from one data set to the next. ``lower``
    and ``upper`` combine this error with the two others that an estimate may have: the error of its
    computation, and the bias of a finite sample.

    It prints with its interval.
    """

    parts: np.ndarray
    """(J, ...): the estimate from each of J parts of the data alone."""
    data: tuple[Any, Any]
    """(lower, upper): 95 % bounds for the sample of data alone, around the value."""
    computation: tuple[Any, Any]
    """(lower, upper): bounds for the error of the computation alone, around the value.

    For a functional of a density, this is the error of its probes, quadrature and deflation. For an
    eigenvalue, it is the residual.
    """
    bias: Any = None
    """The estimated bias that the value would have without correction, or None if unknown.

    The cause of this bias is the finite number of examples. With too few data, outliers come out
    too large. The value has been corrected for it, exactly to first order in one over that number.
    """
    bias_range: tuple[Any, Any] | None = None
    """(lowest, highest): the biases that ``lower`` and ``upper`` allow for, or None if unknown."""

    def __format__(self, spec: str) -> str:
        return _with_interval(self, spec)


class Reach(NamedTuple):
    """The distances from a value down to the lower end of an interval, and up to the upper end."""

    below: np.ndarray
    above: np.ndarray


NOTHING = Reach(np.zeros(()), np.zeros(()))


class Bias(NamedTuple):
    """The bias of a value that has not been corrected for it."""

    value: np.ndarray | None
    """The best estimate, or None if there is none. The value is then not corrected."""
    lowest: np.ndarray
    highest: np.ndarray


def estimate_of_parts(
    value: np.ndarray,
    variance: np.ndarray,
    spread: np.ndarray,
    parts: np.ndarray,
    computation: Reach = NOTHING,
    bias: Bias | None = None,
) -> DataEstimate:
    """The `DataEstimate` of a value, from its estimates on J parts of the data (J, ...).

    Args:
      value: the value, before the correction of its bias.
      variance: the square of the standard error.
      spread: the variance that the interval covers, at least ``variance``. With J - 1 degrees of
        freedom, it gives Student's t interval.
      parts: the estimates on the parts.
      computation: the error of the computation. It is independent of the data, so that the squares
        of the distances add up.
      bias: the bias of ``value``. The interval covers every bias in its range.
    """
    from scipy.special import stdtrit

    data = stdtrit(len(parts) - 1, 0.975) * np.sqrt(spread)
    below, above = (np.hypot(data, each) for each in computation)
    lowest, highest = (bias.lowest, bias.highest) if bias else (0.0, 0.0)
    best = value if bias is None or bias.value is None else value - bias.value
    number: Any = float if np.ndim(value) == 0 else np.asarray
    return DataEstimate(
        value=number(best),
        standard_error=number(np.sqrt(variance)),
        lower=number(value - highest - below),
        upper=number(value - lowest + above),
        parts=parts,
        data=(number(best - data), number(best + data)),
        computation=(number(best - computation.below), number(best + computation.above)),
        bias=None if bias is None or bias.value is None else number(bias.value),
        bias_range=(number(lowest), number(highest)) if bias else None,
    )
