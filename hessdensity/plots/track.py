"""Draw the spectrum over training as a heat map. Nothing is shown or saved here."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm

from hessdensity.coordinate import Coordinate

from .axes import LINSCALE, Measure, coordinate_of, new_axes, symlog_ticks


class TrackLike(Protocol):
    """The members of a `Track` that are drawn."""

    @property
    def densities(self) -> Sequence[Measure | None]:
        """One density for each of T checkpoints, or None where it was not measured."""

    @property
    def steps(self) -> np.ndarray:
        """The training steps of the checkpoints, (T,), ascending."""

    @property
    def values(self) -> np.ndarray:
        """The tracked eigenvalues, (T, rank), descending."""

    @property
    def rank(self) -> int:
        """The number of tracked eigenvalues."""

    def __len__(self) -> int: ...


def plot_track(
    track: TrackLike,
    ax: Axes | None = None,
    *,
    linear_within: float | None = None,
    bandwidth: float = 0.05,
    eigenvalues: bool = True,
    num_rows: int = 400,
    **mesh_options: Any,
) -> Axes:
    """Draw the density over training as a heat map.

    The horizontal axis is the training step. The vertical axis is the eigenvalue, on a symlog
    scale. The color is the density per length of this axis, that is, the share of the eigenvalues
    per decade, on a logarithmic scale. Equal areas of one color hold equal shares, and an outlier
    is as visible at 10 as at 0.1. (A density per unit of eigenvalue, with one bandwidth for all,
    would draw an outlier as a line too thin to see.)

    Args:
      track: a track with densities.
      ax: the Axes to draw on (default: those of a new figure).
      linear_within: eigenvalues of up to this absolute value are on a linear scale (default: 1e-3
        of the largest absolute value of a node).
      bandwidth: standard deviation of the Gaussian smoothing, in decades of the axis.
      eigenvalues: draw the eigenvalues of the tracked eigenspaces as lines.
      num_rows: number of cells along the eigenvalue axis.
      mesh_options: options of ``Axes.pcolormesh``: ``cmap``, ``norm``.

    Returns:
      The Axes, with a color bar.

    Raises:
      ValueError: a checkpoint has no density, or ``bandwidth`` or ``linear_within`` is not
        positive.
    """
    densities = [density for density in track.densities if density is not None]
    if not densities or len(densities) < len(track):
        raise ValueError(
            f"track has densities for {len(densities)} of {len(track)} checkpoints; measure them "
            "with density=True."
        )
    for name, width in (("bandwidth", bandwidth), ("linear_within", linear_within)):
        if width is not None and not width > 0:
            raise ValueError(f"{name}={width}, expected a positive number.")
    low = min(density.extent[0] for density in densities)
    high = max(density.extent[1] for density in densities)
    size = linear_within or 1e-3 * max(abs(low), abs(high)) or 1.0
    coordinate = coordinate_of("symlog", size)
    bottom, top = coordinate.forward(np.array([low, high]))
    edges = np.linspace(bottom - 4 * bandwidth, top + 4 * bandwidth, num_rows + 1)
    rows = (edges[1:] + edges[:-1]) / 2
    cells = np.stack(
        [_over_the_axis(density, coordinate, rows, bandwidth) for density in densities], axis=1
    )
    ax = new_axes(ax, (7, 4.5))
    # The color scale starts at a fifth of the peak of one single eigenvalue. Anything less is the
    # tail of a Gaussian.
    least = 0.2 / (max(density.dimension for density in densities) * bandwidth * np.sqrt(2 * np.pi))
    norm = LogNorm(least, max(float(cells.max()), 2 * least))
    options = {"cmap": "magma", "norm": norm, **mesh_options}
    y = coordinate.backward(edges)
    mesh = ax.pcolormesh(
        _step_edges(track.steps), y, np.maximum(cells, least), rasterized=True, **options
    )
    ax.figure.colorbar(mesh, ax=ax, label="share of eigenvalues per decade")
    if eigenvalues:
        label = f"top {track.rank} eigenvalues"
        for column in track.values.T:
            ax.plot(
                track.steps,
                column,
                ".-",
                color="w",
                markersize=2.5,
                linewidth=0.4,
                alpha=0.7,
                label=label,
            )
            label = "_"
    ax.set_yscale("symlog", linthresh=size, linscale=LINSCALE)
    ax.yaxis.set_major_locator(symlog_ticks(size))
    ax.set_ylim(y[0], y[-1])
    ax.set_xlabel("training step")
    ax.set_ylabel("eigenvalue")
    return ax


def _over_the_axis(
    density: Measure, coordinate: Coordinate, rows: np.ndarray, bandwidth: float
) -> np.ndarray:
    """The smoothed density of the eigenvalues' positions on the axis, per decade.

    A node of the bulk represents the eigenvalues around it. Its weight is therefore spread as far
    as its residual to both sides, but at most half-way to its neighbors. The gaps between a few
    nodes then do not look like gaps in the spectrum, and a converged node is a line.
    """
    from scipy.special import ndtr

    total = np.zeros_like(rows)
    for rule in density.rules:
        for part in (slice(rule.num_deflated), slice(rule.num_deflated, None)):
            nodes = rule.nodes[part]
            weights = rule.weights[part]
            residuals = rule.residuals[part]
            half = np.diff(nodes, prepend=-np.inf, append=np.inf) / 2
            ends = nodes - np.minimum(residuals, half[:-1]), nodes + np.minimum(residuals, half[1:])
            left, right = (coordinate.forward(end) for end in ends)
            # The width must not be zero, because the weight is divided by it. A thousandth of the
            # bandwidth is narrow enough.
            width = np.maximum(right - left, 1e-3 * bandwidth)
            middle = (left + right) / 2
            above, below = (
                (rows[:, None] - middle + side * width / 2) / bandwidth for side in (1, -1)
            )
            total += (ndtr(above) - ndtr(below)) @ (weights / width)
    return total / len(density.rules)


def _step_edges(steps: np.ndarray) -> np.ndarray:
    """Edges of the cells around the steps, half-way between neighboring steps."""
    if steps.size == 1:
        return steps[0] + np.array([-0.5, 0.5])
    middles = (steps[1:] + steps[:-1]) / 2
    return np.concatenate([[2 * steps[0] - middles[0]], middles, [2 * steps[-1] - middles[-1]]])
