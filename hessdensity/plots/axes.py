"""What all plots share: an ``Axes``, its scales, and the protocols of what can be drawn.

This wing imports no result type, so that a result can draw itself.
"""

from __future__ import annotations

from typing import Any, Literal, Protocol

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backend_bases import FigureCanvasBase
from matplotlib.ticker import SymmetricalLogLocator

XScale = Literal["linear", "symlog"]
LINSCALE = 0.6
"""Length of the linear part of a symlog axis, in decades on either side."""


class Curve(Protocol):
    """An estimate at many points: its value as an array, between ``lower`` and ``upper``."""

    lower: Any
    upper: Any

    def __array__(self) -> np.ndarray: ...


class Measure(Protocol):
    """What is drawn of a `SpectralDensity` or a `SpectralMeasure`."""

    random: bool
    rules: Any
    dimension: int

    @property
    def nodes(self) -> np.ndarray: ...

    @property
    def bandwidth(self) -> float: ...

    @property
    def extent(self) -> tuple[float, float]: ...

    def pdf(self, x: Any, bandwidth: float | None = None) -> Curve: ...

    def cdf(self, x: Any) -> Curve: ...


def new_axes(ax: Axes | None, size: tuple[float, float]) -> Axes:
    """The given Axes, or those of a new figure of this size, in inches."""
    return ax if ax is not None else plt.subplots(figsize=size, layout="constrained")[1]


def check_scale(x_scale: str) -> None:
    """Refuse an unknown scale."""
    if x_scale not in ("linear", "symlog"):
        raise ValueError(f"x_scale={x_scale!r}, expected 'linear' or 'symlog'.")


def finish(ax: Axes, x_scale: XScale, linear_within: float) -> Axes:
    """Scale and label the eigenvalue axis, and add the legend."""
    if x_scale == "symlog":
        ax.set_xscale("symlog", linthresh=linear_within, linscale=LINSCALE)
        ax.xaxis.set_major_locator(symlog_ticks(linear_within))
    ax.set_xlabel("eigenvalue")
    ax.legend(frameon=False)
    return ax


def symlog_ticks(linear_within: float) -> SymmetricalLogLocator:
    """Ticks at powers of ten outside of the linear part."""
    return SymmetricalLogLocator(base=10, linthresh=10 ** np.ceil(np.log10(linear_within)))


def formats() -> list[str]:
    """The file suffixes that matplotlib can save a figure as."""
    return sorted(FigureCanvasBase.get_supported_filetypes())
