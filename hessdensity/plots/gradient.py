"""Draw the parts of a gradient along eigenvectors. Nothing is shown or saved here."""

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
    """Draw the share of a gradient in the top 1, 2, ... eigenvectors.

    Args:
      concentration: (rank,) shares of the squared norm, from `gradient_concentration`.
      ax: the Axes to draw on (default: those of a new figure). To draw several gradients on one
        Axes, call again with another ``label``.
      label: name in the legend.
      dimension: n, to draw the share k/n of a random direction as well.
      options: options of ``Axes.plot``.

    Returns:
      The Axes.

    Raises:
      ValueError: ``concentration`` is not one-dimensional, or it is empty.
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
    """Draw two cumulative shares: of a vector's squared norm, and of the eigenvalues.

    The eigenvalue axis has a symlog scale.

    Args:
      measure: the measure of the vector, from `spectral_measure`.
      density: the density of the eigenvalues, from `spectral_density`.
      ax: the Axes to draw on (default: those of a new figure).
      label: name of the vector in the legend.

    Returns:
      The Axes.

    Raises:
      ValueError: ``measure`` is not that of a vector, or ``density`` is not that of eigenvalues.
    """
    if measure.random or not density.random:
        raise ValueError(
            "measure and density: expected the measure of a vector, from hd.spectral_measure, "
            "and the density of the eigenvalues, from hd.spectral_density, in this order."
        )
    ax = plot_cumulative(density, ax, x_scale="symlog", label="eigenvalues", color="0.4")
    plot_cumulative(measure, ax, x_scale="symlog", label=label, color="tab:red")
    ax.set_ylabel("share up to x")
    return ax
