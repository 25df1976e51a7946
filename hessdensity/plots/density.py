"""Draw a spectral density, smoothed or as a cumulative share. Nothing is shown or saved here."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.axes import Axes

from .axes import Measure, XScale, check_scale, finish, new_axes


def plot_density(
    density: Measure,
    ax: Axes | None = None,
    *,
    bandwidth: float | None = None,
    label: str | None = None,
    x_scale: XScale = "linear",
    band: bool = True,
    eigenvalues: Any = None,
    outliers: bool = True,
    **line_options: Any,
) -> Axes:
    """Draw the smoothed density with the band of its error bars.

    The density axis is logarithmic, so that outliers stay visible.

    Args:
      density: the density to draw. To draw several on one Axes, call again with the same ``ax`` and
        another ``label``.
      ax: the Axes to draw on (default: those of a new figure).
      bandwidth: standard deviation of the smoothing, in eigenvalue units (default:
        ``density.bandwidth``). The legend states it, because the values of the density depend on
        it.
      label: name in the legend.
      x_scale: ``"linear"``, or ``"symlog"`` to stretch the bulk around zero and show outliers of
        both signs beside it.
      band: shade the interval of ``density.pdf``.
      eigenvalues: the exact eigenvalues (n,), if known. They are drawn under the curve with the
        same smoothing, and with a tick for each.
      outliers: mark ``density.outliers``, the eigenvalues that deflation found, along the top.
      line_options: options of ``Axes.plot``: ``color``, ``linestyle``, ``linewidth``.

    Returns:
      The Axes.

    Raises:
      ValueError: ``x_scale`` is unknown.
    """
    check_scale(x_scale)
    ax = new_axes(ax, (7, 4))
    before = (ax.get_xlim(), ax.get_ylim()) if ax.has_data() else None
    width = density.bandwidth if bandwidth is None else bandwidth
    x = _grid(density, width, x_scale)
    # The density axis ends at a twentieth of the peak of one single eigenvalue. Below that, there
    # are only the tails of Gaussians, which mean nothing.
    floor = 0.05 / (density.dimension * width * np.sqrt(2 * np.pi))
    if eigenvalues is not None:
        _plot_exact(ax, np.asarray(eigenvalues, float), x, width)
    estimate = density.pdf(x, width)
    name = f"{label}, " if label else ""
    (line,) = ax.plot(
        x, estimate, label=f"{name}bandwidth {width:.2g}", **{"linewidth": 1.2, **line_options}
    )
    if band:
        ax.fill_between(
            x, estimate.lower, estimate.upper, color=line.get_color(), alpha=0.25, linewidth=0
        )
    found = getattr(density, "outliers", np.zeros((0, 2)))[:, 0] if outliers else np.zeros(0)
    if found.size:
        (marks,) = ax.plot(
            found, np.full(found.size, 0.98), "v", color=line.get_color(), markersize=4, alpha=0.6
        )
        marks.set(transform=ax.get_xaxis_transform(), label=f"{found.size} eigenvalues found")
    ax.set_yscale("log")
    low = floor
    high = 2 * float(np.max(estimate))
    left, right = x[0], x[-1]
    if before:
        (first, last), (bottom, top) = before
        left = min(left, first)
        right = max(right, last)
        high = max(high, top)
        # An earlier plot may have used a linear axis, whose lower limit need not be positive.
        low = min(low, bottom) if bottom > 0 else low
    ax.set_xlim(left, right)
    ax.set_ylim(low, high)
    ax.set_ylabel(
        "spectral density (1 / eigenvalue)"
        if density.random
        else "share of the squared norm (1 / eigenvalue)"
    )
    return finish(ax, x_scale, width)


def plot_cumulative(
    density: Measure,
    ax: Axes | None = None,
    *,
    label: str | None = None,
    x_scale: XScale = "linear",
    band: bool = True,
    eigenvalues: Any = None,
    **line_options: Any,
) -> Axes:
    """Draw the share of eigenvalues up to x, a step function that needs no bandwidth.

    The arguments, the result and the errors are those of `plot_density`.
    """
    check_scale(x_scale)
    ax = new_axes(ax, (7, 4))
    nodes = np.unique(density.nodes)
    linear_within = 1e-3 * max(map(abs, density.extent)) or 1.0
    margin = linear_within if x_scale == "symlog" else 20 * linear_within
    x = np.concatenate([[nodes[0] - margin], nodes, [nodes[-1] + margin]])
    if eigenvalues is not None:
        exact = np.sort(np.asarray(eigenvalues, float))
        ax.step(
            exact,
            np.arange(1, exact.size + 1) / exact.size,
            where="post",
            color="0.6",
            linewidth=2.5,
            label="exact",
            zorder=0.9,
        )
    estimate = density.cdf(x)
    (line,) = ax.step(
        x, estimate, where="post", label=label or "estimate", **{"linewidth": 1.2, **line_options}
    )
    if band:
        ax.fill_between(
            x,
            estimate.lower,
            estimate.upper,
            step="post",
            color=line.get_color(),
            alpha=0.25,
            linewidth=0,
        )
    ax.set_ylabel("share of eigenvalues up to x")
    return finish(ax, x_scale, linear_within)


def _grid(density: Measure, width: float, x_scale: XScale) -> np.ndarray:
    """Points of evaluation: an even grid, with more points around every node and around zero."""
    low, high = density.extent
    stretch = 0.4 if x_scale == "symlog" else 0.0
    margin = 6 * width if x_scale == "symlog" else max(6 * width, 0.03 * (high - low))
    low = low - margin - stretch * abs(low)
    high = high + margin + stretch * abs(high)
    even = np.linspace(low, high, 2000)
    peaks = (np.unique(density.nodes)[:, None] + width * np.linspace(-5, 5, 31)).ravel()
    near_zero = (
        np.geomspace(width / 10, max(abs(low), abs(high)), 400)
        if x_scale == "symlog"
        else np.zeros(0)
    )
    x = np.unique(np.concatenate([even, peaks, near_zero, -near_zero]))
    return x[(x >= low) & (x <= high)]


def _plot_exact(ax: Axes, eigenvalues: np.ndarray, x: np.ndarray, width: float) -> None:
    """Draw exact eigenvalues, smoothed with the same bandwidth, and a tick for each."""
    exact = np.zeros_like(x)
    for part in np.array_split(eigenvalues, max(eigenvalues.size // 500, 1)):
        exact += np.exp(-0.5 * ((x[:, None] - part) / width) ** 2).sum(1)
    exact /= eigenvalues.size * width * np.sqrt(2 * np.pi)
    # This line is drawn below the band, which it would hide otherwise.
    ax.plot(x, exact, color="0.6", linewidth=3.5, label="exact, same bandwidth", zorder=0.9)
    ticks = np.full(eigenvalues.shape, 0.02)
    ax.plot(
        eigenvalues,
        ticks,
        "|",
        color="0.35",
        markersize=6,
        transform=ax.get_xaxis_transform(),
        label="eigenvalues",
    )
