"""Draw spectral densities, smoothed or as cumulative shares. Nothing is shown or saved here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from hessdensity.coordinate import Coordinate

from .axes import (
    Measure,
    Scale,
    XScale,
    check_scale,
    coordinate_of,
    finish,
    new_axes,
    shared_scale,
)

Densities = Measure | Mapping[str, Measure]
"""One density, or several by name."""

# A curve is drawn as resolved where the interval of quadrature is narrower than this many times its
# middle.
_RESOLVED = 1.0


def plot_density(
    density: Densities,
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

    The density axis is logarithmic, so that outliers stay visible. The line is dotted where the
    error of quadrature is as large as the density: there, more steps would show another curve. The
    band holds every error, of the probes, of quadrature and of deflation.

    Args:
      density: the density to draw, or several, ``{"before": one, "after": other}``. All densities
        on one Axes have the same bandwidth: the largest default of those drawn first.
      ax: the Axes to draw on (default: those of a new figure).
      bandwidth: standard deviation of the smoothing, in units of the eigenvalue axis: eigenvalues,
        or decades on a symlog axis. The legend states it, because the values of the density depend
        on it.
      label: name in the legend. Several densities have names of their own.
      x_scale: ``"linear"``, or ``"symlog"`` to stretch the bulk around zero and show outliers of
        both signs beside it. The smoothing and the density are those of the axis, per decade.
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
    every = _by_name(density, label)
    ax = new_axes(ax, (7, 4))
    before = (ax.get_xlim(), ax.get_ylim()) if ax.has_data() else None
    scale = shared_scale(ax, lambda: scale_of(list(every.values()), x_scale), bandwidth)
    coordinate = coordinate_of(x_scale, scale.linear_within)
    x = _grid(list(every.values()), scale.bandwidth, coordinate)
    if eigenvalues is not None:
        _plot_exact(ax, np.asarray(eigenvalues, float), x, scale.bandwidth, coordinate)
    # The density axis ends at a twentieth of the peak of one single eigenvalue. Below that, there
    # are only the tails of Gaussians, which mean nothing.
    least = max(each.dimension for each in every.values()) * scale.bandwidth * np.sqrt(2 * np.pi)
    limits = [0.05 / least, 0.0]
    for name, each in every.items():
        highest = _draw(ax, each, x, scale, coordinate, name, x_scale, band, outliers, line_options)
        limits[1] = max(limits[1], 2 * highest)
    ax.set_yscale("log")
    left, right = x[0], x[-1]
    if before:
        (first, last), (bottom, top) = before
        left = min(left, first)
        right = max(right, last)
        limits[1] = max(limits[1], top)
        # An earlier plot may have used a linear axis, whose lower limit need not be positive.
        limits[0] = min(limits[0], bottom) if bottom > 0 else limits[0]
    ax.set_xlim(left, right)
    ax.set_ylim(*limits)
    what = "spectral density" if next(iter(every.values())).random else "share of the squared norm"
    ax.set_ylabel(f"{what} ({'1 / eigenvalue' if x_scale == 'linear' else 'per decade'})")
    return finish(ax, x_scale, scale.linear_within)


def _draw(
    ax: Axes,
    density: Measure,
    x: np.ndarray,
    scale: Scale,
    coordinate: Coordinate,
    name: str,
    x_scale: XScale,
    band: bool,
    outliers: bool,
    line_options: dict[str, Any],
) -> float:
    """Draw one density, and return its largest value."""
    estimate = density.pdf(x, scale.bandwidth, coordinate)
    value = np.asarray(estimate)
    unit = " decades" if x_scale == "symlog" else ""
    title = f"{name}, " if name else ""
    options = {"linewidth": 1.2, **line_options}
    least, most = (np.asarray(end) for end in estimate.quadrature)
    resolved = most - least <= _RESOLVED * (most + least) / 2
    (line,) = ax.plot(
        x,
        np.where(resolved, value, np.nan),
        label=f"{title}bandwidth {scale.bandwidth:.2g}{unit}",
        **options,
    )
    seen = value > 0.05 / (density.dimension * scale.bandwidth * np.sqrt(2 * np.pi))
    if np.any(~resolved & seen):
        options = {**options, "color": line.get_color(), "linestyle": ":", "alpha": 0.6}
        # The ends of a dotted part meet those of the full line.
        dotted = ~resolved | ~np.roll(resolved, 1) | ~np.roll(resolved, -1)
        ax.plot(x, np.where(dotted, value, np.nan), label="not resolved (more steps)", **options)
    if band:
        errors = "probes, quadrature, deflation" if density.random else "quadrature"
        ax.fill_between(
            x,
            estimate.lower,
            estimate.upper,
            color=line.get_color(),
            alpha=0.25,
            linewidth=0,
            label=f"95 %: {errors}" if density.random else f"error of {errors}",
        )
    found = getattr(density, "outliers", np.zeros((0, 2)))[:, 0] if outliers else np.zeros(0)
    if found.size:
        (marks,) = ax.plot(
            found, np.full(found.size, 0.98), "v", color=line.get_color(), markersize=4, alpha=0.6
        )
        marks.set(transform=ax.get_xaxis_transform(), label=f"{found.size} eigenvalues found")
    return float(value.max())


def plot_cumulative(
    density: Densities,
    ax: Axes | None = None,
    *,
    label: str | None = None,
    x_scale: XScale = "linear",
    band: bool = True,
    eigenvalues: Any = None,
    **line_options: Any,
) -> Axes:
    """Draw the share of eigenvalues up to x, a step function that needs no bandwidth.

    The dark band is the interval of the probes alone. The light band holds every error: the bounds
    of ``density.cdf``.

    The arguments, the result and the errors are those of `plot_density`.
    """
    check_scale(x_scale)
    every = _by_name(density, label)
    ax = new_axes(ax, (7, 4))
    scale = shared_scale(ax, lambda: scale_of(list(every.values()), x_scale))
    nodes = np.unique(np.concatenate([each.nodes.ravel() for each in every.values()]))
    linear_within = scale.linear_within
    margin = linear_within if x_scale == "symlog" else 20 * linear_within
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
    for name, each in every.items():
        own = np.unique(np.concatenate([rule.estimate[0] for rule in each.rules]))
        own = own[(own >= nodes[0]) & (own <= nodes[-1])]
        x = np.concatenate([[nodes[0] - margin], own, [nodes[-1] + margin]])
        estimate = each.cdf(x)
        options = {"linewidth": 1.2, **line_options}
        (line,) = ax.step(x, estimate, where="post", label=name or "estimate", **options)
        bands = [(estimate.lower, estimate.upper, 0.15, "95 %: every error")]
        if each.random:
            bands.append((*estimate.probes, 0.3, "95 %: probes alone"))
        for lower, upper, alpha, what in bands if band else ():
            ax.fill_between(
                x,
                lower,
                upper,
                step="post",
                color=line.get_color(),
                alpha=alpha,
                linewidth=0,
                label=what if each.random else "error of quadrature",
            )
    ax.set_ylabel("share of eigenvalues up to x")
    return finish(ax, x_scale, linear_within)


def _by_name(density: Densities, label: str | None) -> dict[str, Measure]:
    return dict(density) if isinstance(density, Mapping) else {label or "": density}


def scale_of(densities: list[Measure], x_scale: XScale) -> Scale:
    """The scale of several densities."""
    size = max(abs(end) for density in densities for end in density.extent)
    linear_within = 1e-3 * size or 1.0
    coordinate = coordinate_of(x_scale, linear_within)
    widths = [density.resolved_bandwidth(coordinate) for density in densities]
    return Scale(linear_within, max(widths))


def _grid(densities: list[Measure], width: float, coordinate: Coordinate) -> np.ndarray:
    """Points of evaluation: even on the axis, with more points around every node."""
    nodes = np.unique(np.concatenate([density.nodes.ravel() for density in densities]))
    positions = coordinate.forward(nodes)
    margin = max(6 * width, 0.03 * float(np.ptp(positions)))
    low = positions[0] - margin
    high = positions[-1] + margin
    even = np.linspace(low, high, 2000)
    peaks = (positions[:, None] + width * np.linspace(-5, 5, 31)).ravel()
    # Points that are closer than a fraction of the bandwidth are drawn as one.
    u = np.unique(np.round(np.concatenate([even, peaks]) / (width / 50))) * (width / 50)
    u = np.unique(np.concatenate([u, positions]))
    return coordinate.backward(u[(u >= low) & (u <= high)])


def _plot_exact(
    ax: Axes, eigenvalues: np.ndarray, x: np.ndarray, width: float, coordinate: Coordinate
) -> None:
    """Draw exact eigenvalues, smoothed with the same bandwidth, and a tick for each."""
    exact = np.zeros_like(x)
    points = coordinate.forward(x)[:, None]
    for part in np.array_split(coordinate.forward(eigenvalues), max(eigenvalues.size // 500, 1)):
        exact += np.exp(-0.5 * ((points - part) / width) ** 2).sum(1)
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
