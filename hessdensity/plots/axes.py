"""Shared by all plots: an ``Axes``, its scales, and the protocols of objects that can be drawn.

This wing imports no result type, so that a result can draw itself.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, Literal, NamedTuple, Protocol
from weakref import WeakKeyDictionary

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backend_bases import FigureCanvasBase
from matplotlib.scale import SymmetricalLogTransform
from matplotlib.ticker import SymmetricalLogLocator

from hessdensity.coordinate import LINEAR, Coordinate

XScale = Literal["linear", "symlog"]
LINSCALE = 0.6
"""Length of the linear part of a symlog axis, in decades on either side."""


class Curve(Protocol):
    """An estimate at many points: its value as an array, between ``lower`` and ``upper``."""

    @property
    def lower(self) -> Any:
        """The lower ends of the intervals, an array."""

    @property
    def upper(self) -> Any:
        """The upper ends of the intervals, an array."""

    def __array__(self) -> np.ndarray: ...


class BoundedCurve(Curve, Protocol):
    """A `Curve` whose interval holds several errors."""

    @property
    def quadrature(self) -> tuple[Any, Any]:
        """The ends of the interval of quadrature alone."""

    @property
    def probes(self) -> tuple[Any, Any]:
        """The ends of the interval of the probes alone."""


class Scale(NamedTuple):
    """What several spectra on one Axes have in common."""

    linear_within: float
    """The eigenvalues up to this absolute value are on the linear part of a symlog axis."""
    bandwidth: float
    """The standard deviation of the smoothing, in units of the coordinate."""


_SCALES: WeakKeyDictionary[Axes, Scale] = WeakKeyDictionary()


def shared_scale(ax: Axes, make: Callable[[], Scale], bandwidth: float | None = None) -> Scale:
    """The scale of the first spectra that were drawn on an Axes, or that of ``make()``.

    Curves with different bandwidths cannot be compared. A ``bandwidth`` that is given counts.
    """
    scale = _SCALES.get(ax) or make()
    if bandwidth is not None:
        scale = scale._replace(bandwidth=bandwidth)
    _SCALES[ax] = scale
    return scale


def coordinate_of(x_scale: XScale, linear_within: float) -> Coordinate:
    """The coordinate of an axis: eigenvalues, or decades on a symlog axis."""
    if x_scale == "linear":
        return LINEAR
    transform = SymmetricalLogTransform(10, linear_within, LINSCALE)
    inverted = transform.inverted()

    def forward(x: Any) -> np.ndarray:
        return np.asarray(transform.transform_non_affine(np.asarray(x, float))) / linear_within

    def backward(u: Any) -> np.ndarray:
        return np.asarray(inverted.transform_non_affine(np.asarray(u, float) * linear_within))

    return Coordinate(forward, backward)


class Measure(Protocol):
    """The members of a `SpectralDensity` or a `SpectralMeasure` that are drawn."""

    random: ClassVar[bool]
    """Whether the rules come from random probes."""

    @property
    def rules(self) -> Any:
        """One `Rule` for each probe."""

    @property
    def dimension(self) -> int:
        """The number n of eigenvalues."""

    @property
    def nodes(self) -> np.ndarray:
        """The nodes of all rules, in eigenvalue units."""

    @property
    def bandwidth(self) -> float:
        """The default standard deviation of the smoothing, in eigenvalue units."""

    @property
    def extent(self) -> tuple[float, float]:
        """The smallest and the largest node, in eigenvalue units."""

    def resolved_bandwidth(self, coordinate: Coordinate = ...) -> float:
        """The default standard deviation of the smoothing, in units of a coordinate."""

    def pdf(
        self, x: Any, bandwidth: float | None = None, coordinate: Coordinate = ...
    ) -> BoundedCurve:
        """The smoothed density at x."""

    def cdf(self, x: Any) -> BoundedCurve:
        """The share of eigenvalues up to x."""


def new_axes(ax: Axes | None, size: tuple[float, float]) -> Axes:
    """The given Axes, or the Axes of a new figure of this size in inches."""
    return ax if ax is not None else plt.subplots(figsize=size, layout="constrained")[1]


def check_scale(x_scale: str) -> None:
    """Raise ValueError if the scale is unknown."""
    if x_scale not in ("linear", "symlog"):
        raise ValueError(f"x_scale={x_scale!r}, expected 'linear' or 'symlog'.")


def finish(ax: Axes, x_scale: XScale, linear_within: float) -> Axes:
    """Set the scale and the label of the eigenvalue axis, and add the legend."""
    if x_scale == "symlog":
        ax.set_xscale("symlog", linthresh=linear_within, linscale=LINSCALE)
        ax.xaxis.set_major_locator(symlog_ticks(linear_within))
    ax.set_xlabel("eigenvalue")
    ax.legend(frameon=False)
    return ax


def symlog_ticks(linear_within: float) -> SymmetricalLogLocator:
    """Ticks at the powers of ten outside of the linear part."""
    return SymmetricalLogLocator(base=10, linthresh=10 ** np.ceil(np.log10(linear_within)))


def formats() -> list[str]:
    """The file suffixes that matplotlib can save a figure as."""
    return sorted(FigureCanvasBase.get_supported_filetypes())
