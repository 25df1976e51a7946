"""Draw where a gradient lies. Nothing is shown or saved here."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.axes import Axes

from .axes import Measure, new_axes
from .density import plot_cumulative


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
    ax = new_axes(ax, (5, 3.5))
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
    measure: Measure,
    density: Measure,
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
    if measure.random or not density.random:
        raise ValueError(
            "expected the measure of a vector, from hd.spectral_measure, and then a density of "
            "eigenvalues."
        )
    ax = plot_cumulative(density, ax, x_scale="symlog", label="eigenvalues", color="0.4")
    plot_cumulative(measure, ax, x_scale="symlog", label=label, color="tab:red")
    ax.set_ylabel("share up to x")
    return ax
