"""Draw what changes over training, and where a gradient lies. Nothing is shown or saved here."""

from __future__ import annotations

from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.scale import SymmetricalLogTransform
from matplotlib.ticker import SymmetricalLogLocator

from hessdensity.spectra.density import SpectralDensity
from hessdensity.training.track import Track

from .density import plot_cumulative

_LINSCALE = 0.6


def plot_track(
    track: Track,
    ax: Axes | None = None,
    *,
    linear_within: float | None = None,
    bandwidth: float = 0.05,
    eigenvalues: bool = True,
    num_rows: int = 400,
    **mesh_options: Any,
) -> Axes:
    """The density over training as a heat map: training step, eigenvalue on a symlog axis, colour
    by logarithm.

    The colour is the density over the axis as drawn, the share of the eigenvalues per decade: equal
    areas of one colour hold equal shares, and an outlier is as visible at 10 as at 0.1. (The
    density per unit of eigenvalue, with one bandwidth for all, would leave an outlier a line too
    thin to see.)

    Args: track: with densities. ax: where (default: a new figure). linear_within: eigenvalues up to
      this size are drawn linearly (default: 1e-3 of the largest node in size). bandwidth: standard
      deviation of the Gaussian smoothing, in decades of the axis. eigenvalues: draw the eigenvalues
      of the tracked eigenspaces as lines. num_rows: cells along the eigenvalue axis. mesh_options:
      for ``Axes.pcolormesh``: ``cmap``, ``norm``.

    Returns:
      The Axes, with a colour bar.

    Raises:
      ValueError: a checkpoint has no density, or a width is not positive.
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
    low, high = (
        min(density.extent[0] for density in densities),
        max(density.extent[1] for density in densities),
    )
    size = linear_within or 1e-3 * max(abs(low), abs(high)) or 1.0
    transform = SymmetricalLogTransform(10, size, _LINSCALE)
    bottom, top = transform.transform(np.array([low, high])) / size
    edges = np.linspace(bottom - 4 * bandwidth, top + 4 * bandwidth, num_rows + 1)
    rows = (edges[1:] + edges[:-1]) / 2
    cells = np.stack(
        [_over_the_axis(density, transform, size, rows, bandwidth) for density in densities], axis=1
    )
    ax = ax if ax is not None else plt.subplots(figsize=(7, 4.5), layout="constrained")[1]
    # One eigenvalue's own peak is the least there is to see.
    least = 0.2 / (max(density.dimension for density in densities) * bandwidth * np.sqrt(2 * np.pi))
    options = {
        "cmap": "magma",
        "norm": LogNorm(least, max(float(cells.max()), 2 * least)),
        **mesh_options,
    }
    y = transform.inverted().transform(edges * size)
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
    ax.set_yscale("symlog", linthresh=size, linscale=_LINSCALE)
    ax.yaxis.set_major_locator(
        SymmetricalLogLocator(base=10, linthresh=10 ** np.ceil(np.log10(size)))
    )
    ax.set_ylim(y[0], y[-1])
    ax.set_xlabel("training step")
    ax.set_ylabel("eigenvalue")
    return ax


def plot_concentration(
    concentration: Any,
    ax: Axes | None = None,
    *,
    label: str = "gradient",
    dimension: int | None = None,
    **options: Any,
) -> Axes:
    """The share of a gradient in the top 1, 2, ... eigenvectors, as `gradient_concentration` gives
    it.

    Args:
      concentration: (rank,) shares.
      ax: where (default: a new figure). Several on one Axes: call again with another ``label``.
      label: name in the legend.
      dimension: n, to draw the share k/n of a random direction as well.
      options: for ``Axes.plot``.

    Returns:
      The Axes.
    """
    shares = np.asarray(concentration, float)
    if shares.ndim != 1 or not shares.size:
        raise ValueError(f"concentration has shape {shares.shape}, expected (rank,) shares.")
    ax = ax if ax is not None else plt.subplots(figsize=(5, 3.5), layout="constrained")[1]
    counts = np.arange(1, shares.size + 1)
    ax.plot(
        counts, shares, label=label, **{"marker": "o", "markersize": 3, "linewidth": 1.2, **options}
    )
    if dimension is not None:
        ax.plot(
            counts,
            counts / dimension,
            color="0.6",
            linestyle="--",
            linewidth=1,
            label="a random direction",
        )
    ax.set_xlabel("number of top eigenvectors")
    ax.set_ylabel("share of the squared norm")
    ax.set_ylim(0, 1.03)
    ax.legend(frameon=False)
    return ax


def plot_measure(
    measure: SpectralDensity,
    density: SpectralDensity,
    ax: Axes | None = None,
    *,
    label: str = "gradient",
) -> Axes:
    """Where a vector lies beside where the eigenvalues do: the two cumulative shares, on a symlog
    axis.

    Args:
      measure: of the vector, from `spectral_measure`.
      density: of the eigenvalues, from `spectral_density`.
      ax: where (default: a new figure).
      label: what the vector is.

    Returns:
      The Axes.
    """
    if not measure.given or density.given:
        raise ValueError(
            "expected the measure of a vector, from hd.spectral_measure, and then a density of "
            "eigenvalues."
        )
    ax = plot_cumulative(density, ax, x_scale="symlog", label="eigenvalues", color="0.4")
    plot_cumulative(measure, ax, x_scale="symlog", label=label, color="tab:red")
    ax.set_ylabel("share up to x")
    return ax


def _over_the_axis(
    density: SpectralDensity, transform: Any, size: float, rows: np.ndarray, bandwidth: float
) -> np.ndarray:
    """The density of the eigenvalues' places on the axis, in decades, smoothed.

    A node of the bulk stands for eigenvalues around it: its weight is spread as far as its
    residual, at most half-way to its neighbours. So the gaps between few nodes are no gaps in the
    spectrum, and a converged node is a line."""
    from scipy.special import ndtr

    total = np.zeros_like(rows)
    for rule in density.rules:
        for part in (slice(rule.num_deflated), slice(rule.num_deflated, None)):
            nodes, weights, residuals = rule.nodes[part], rule.weights[part], rule.residuals[part]
            half = np.diff(nodes, prepend=-np.inf, append=np.inf) / 2
            ends = nodes - np.minimum(residuals, half[:-1]), nodes + np.minimum(residuals, half[1:])
            left, right = (transform.transform(end) / size for end in ends)
            # A box of no width has no height either: a thousandth of the bandwidth is none.
            middle, width = (left + right) / 2, np.maximum(right - left, 1e-3 * bandwidth)
            above, below = (
                (rows[:, None] - middle + side * width / 2) / bandwidth for side in (1, -1)
            )
            total += (ndtr(above) - ndtr(below)) @ (weights / width)
    return total / len(density.rules)


def _step_edges(steps: np.ndarray) -> np.ndarray:
    """Edges of cells around the steps: half-way between them."""
    if steps.size == 1:
        return steps[0] + np.array([-0.5, 0.5])
    middles = (steps[1:] + steps[:-1]) / 2
    return np.concatenate([[2 * steps[0] - middles[0]], middles, [2 * steps[-1] - middles[-1]]])
