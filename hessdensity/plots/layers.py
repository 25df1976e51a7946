"""Draw the structure of layers: overlaps, singular values, correspondences, eigenvalues, densities.

Nothing is shown or saved here.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure

from .axes import Measure, XScale, new_axes, shared_scale
from .density import plot_density, scale_of

_DECADES = 0.05  # the least default smoothing of small multiples on a symlog axis


class CurveOfOverlaps(Protocol):
    """The members of an `OverlapCurve` that are drawn."""

    @property
    def ranks(self) -> np.ndarray:
        """1 .. K."""

    @property
    def overlap(self) -> np.ndarray:
        """The overlap of the first k vectors."""

    @property
    def chance(self) -> np.ndarray:
        """The overlap of two random spaces."""

    @property
    def peak(self) -> int:
        """The rank with the largest overlap."""


class Maps(Protocol):
    """The members of a `Correspondence` that are drawn."""

    @property
    def input(self) -> np.ndarray:
        """(n, k)."""

    @property
    def output(self) -> np.ndarray:
        """(m, k)."""


def plot_overlap(
    curve: CurveOfOverlaps,
    ax: Axes | None = None,
    *,
    outputs: int | None = None,
    label: str | None = None,
    **line_options: Any,
) -> Axes:
    """Draw the overlap of the first k eigenvectors of two models, with its peak.

    Args:
      curve: an `OverlapCurve`.
      ax: the Axes to draw on (default: those of a new figure).
      outputs: the output dimension of the layer, which is marked. Two models of the same layer have
        their peak there if E[x x^T] is almost of rank one (Wu et al. 2020).
      label: the label of the curve in the legend.
      line_options: options of ``Axes.plot`` for the curve.

    Returns:
      The Axes.
    """
    ax = new_axes(ax, (6, 4))
    (line,) = ax.plot(curve.ranks, curve.overlap, label=label or "overlap", **line_options)
    height = float(curve.overlap[curve.peak - 1])
    ax.plot(
        [curve.peak],
        [height],
        "o",
        color=line.get_color(),
        label=f"peak {height:.2f} at k = {curve.peak}",
    )
    ax.plot(curve.ranks, curve.chance, ":", color="0.4", label="two random spaces, k/n")
    if outputs is not None:
        ax.axvline(outputs, color="0.6", linestyle="--", label=f"outputs of the layer, {outputs}")
    ax.set(xlabel="k", ylabel="overlap of the top k eigenvectors", ylim=(0, 1.02))
    ax.legend(frameon=False)
    return ax


def plot_singular_values(
    shares: np.ndarray, ax: Axes | None = None, *, num_values: int = 10
) -> Axes:
    """Draw the singular values of eigenvectors as matrices. A single bar of 1 is rank one.

    Args:
      shares: (k, r), as `hessdensity.singular_values` returns them.
      ax: the Axes to draw on (default: those of a new figure).
      num_values: the number of singular values of each eigenvector that are drawn.

    Returns:
      The Axes.

    Raises:
      ValueError: ``shares`` does not have two axes.
    """
    if np.ndim(shares) != 2:
        raise ValueError(
            f"shares has shape {np.shape(shares)}, expected (k, r): the singular values of k "
            "eigenvectors. Choose one matrix of a layer with a stack or groups."
        )
    ax = new_axes(ax, (6, 4))
    shown = np.asarray(shares)[:, :num_values]
    image = ax.imshow(
        shown.T,
        aspect="auto",
        origin="lower",
        vmin=0,
        vmax=1,
        cmap="viridis",
        extent=(0.5, len(shown) + 0.5, 0.5, shown.shape[1] + 0.5),
    )
    figure = ax.get_figure()
    assert figure is not None
    figure.colorbar(image, ax=ax, label="singular value / Frobenius norm")
    ax.set(xlabel="eigenvector", ylabel="singular value")
    return ax


def plot_correspondence(
    maps: Maps, axes: Sequence[Axes] | None = None, *, num_rows: int = 30
) -> tuple[Axes, Axes]:
    """Draw how the eigenvectors of a layer's Hessian follow those of both factors, as heat maps.

    Args:
      maps: a `Correspondence`.
      axes: two Axes to draw on (default: those of a new figure).
      num_rows: the number of eigenvectors of each factor that are drawn.

    Returns:
      The two Axes, for E[x x^T] and for E[M].
    """
    if axes is None:
        _, axes = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    names = ("eigenvector of E[x x$^T$]", "eigenvector of E[M]")
    for ax, rows, name in zip(axes, (maps.input, maps.output), names, strict=True):
        shown = np.maximum(rows[:num_rows], 1e-4)
        extent = (0.5, shown.shape[1] + 0.5, 0.5, len(shown) + 0.5)
        image = ax.imshow(
            shown, aspect="auto", origin="lower", norm=LogNorm(1e-3, 1), extent=extent
        )
        figure = ax.get_figure()
        assert figure is not None
        figure.colorbar(image, ax=ax, label="squared length of the component")
        ax.set(xlabel="eigenvector of the layer's Hessian", ylabel=name)
    first, second = axes
    return first, second


def plot_eigenvalues(
    values: Mapping[str, np.ndarray], ax: Axes | None = None, **line_options: Any
) -> Axes:
    """Draw several lists of eigenvalues by rank, such as exact and Kronecker ones.

    Args:
      values: eigenvalues in descending order, by the label of the legend.
      ax: the Axes to draw on (default: those of a new figure).
      line_options: options of ``Axes.plot``.

    Returns:
      The Axes.
    """
    ax = new_axes(ax, (6, 4))
    for marker, (label, each) in zip("ox^sdv" * len(values), values.items(), strict=False):
        ranks = np.arange(1, len(each) + 1)
        ax.plot(ranks, each, marker, label=label, fillstyle="none", **line_options)
    if all(np.all(np.asarray(each) > 0) for each in values.values()):
        ax.set_yscale("log")
    ax.set(xlabel="rank", ylabel="eigenvalue")
    ax.legend(frameon=False)
    return ax


def plot_layer_densities(
    densities: Mapping[str, Measure],
    *,
    columns: int = 3,
    x_scale: XScale = "symlog",
    bandwidth: float | None = None,
    size: tuple[float, float] = (4, 2.6),
) -> Figure:
    """Draw the densities of layers as small multiples, with the same axes and bandwidth.

    Args:
      densities: a density for each group, as `layer_densities` returns them.
      columns: the number of columns.
      x_scale: the scale of the eigenvalues.
      bandwidth: as for `plot_density`; by default the largest default of all densities, and at
        least 0.05 decades on a symlog axis.
      size: width and height of each panel, in inches.

    Returns:
      The Figure, with one legend for all panels.

    Raises:
      ValueError: there are no densities.
    """
    if not densities:
        raise ValueError("densities is empty; expected a density for each group.")
    columns = min(columns, len(densities))
    rows = -(-len(densities) // columns)
    figure, axes = plt.subplots(
        rows,
        columns,
        figsize=(size[0] * columns, size[1] * rows + 0.4),
        sharex=True,
        sharey=True,
        squeeze=False,
        layout="constrained",
    )
    scale = scale_of(list(densities.values()), x_scale)
    if bandwidth is not None:
        scale = scale._replace(bandwidth=bandwidth)
    elif x_scale == "symlog":
        scale = scale._replace(bandwidth=max(scale.bandwidth, _DECADES))
    panels = list(axes.flat)
    legend: dict[str, Any] = {}
    for ax, (name, density) in zip(panels, densities.items(), strict=False):
        shared_scale(ax, lambda: scale)
        plot_density(density, ax, x_scale=x_scale)
        ax.set_title(f"{name}, n = {density.dimension:,}", fontsize="medium")
        for handle, text in zip(*ax.get_legend_handles_labels(), strict=True):
            # Each panel has another number of outliers.
            legend.setdefault(re.sub(r"^[\d,]+ eig", "eig", text), handle)
        ax.get_legend().remove()
        ax.label_outer()
    for ax in panels[len(densities) :]:
        ax.remove()
    figure.legend(
        legend.values(), legend.keys(), loc="outside lower center", ncols=3, frameon=False
    )
    return figure
