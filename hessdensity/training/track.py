"""Results of tracking a spectrum over training, with one row for each checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from hessdensity.spectra.archive import Contents
from hessdensity.spectra.density import SpectralDensity
from hessdensity.spectra.eigenspace import Eigenspace
from hessdensity.text import of_operator, plural, table

from . import track_archive

if TYPE_CHECKING:
    from matplotlib.axes import Axes  # noqa: TID251


def zeta(eigenspace: Eigenspace, k: int | None = None) -> float:
    """Compute how far the largest eigenvalue stands out: lambda_1 / lambda_k.

    lambda_i is the i-th largest eigenvalue. With k the number of classes, the ratio is small with
    batch normalization and large without it (Ghorbani, Krishnan and Xiao 2019).

    Args:
      eigenspace: the algebraically largest eigenvalues: ``which="LA"``, or ``"LM"`` as long as
        lambda_k is positive.
      k: 1 to the rank. By default the rank.

    Raises:
      ValueError: ``k`` is out of range, or lambda_k is not positive, so that the ratio does not
        compare sizes.

    Example:
      >>> import numpy as np, hessdensity as hd
      >>> vectors = np.eye(4, dtype=np.float32)[:3]
      >>> zeta(hd.Eigenspace([6.0, 3.0, 2.0], vectors, np.zeros(3), [True] * 3, 0))
      3.0
    """
    rank = eigenspace.rank
    k = rank if k is None else k
    check_k(k, rank)
    largest = eigenspace.values[0]
    last = eigenspace.values[k - 1]
    if not last > 0:
        raise ValueError(
            f"lambda_{k} = {last:.4g} is not positive, so that lambda_1 cannot be compared with "
            "it. Choose a smaller k."
        )
    return float(largest / last)


def check_k(k: Any, rank: int, name: str = "k") -> None:
    """Refuse ``k`` unless it is a whole number from 1 to the rank."""
    if not isinstance(k, int | np.integer) or not 1 <= k <= rank:
        raise ValueError(
            f"{name}={k!r}, expected a whole number from 1 to {rank}, the rank of the eigenspace."
        )


@dataclass(frozen=True, eq=False)
class TrackPoint:
    """One checkpoint of a `Track`. Everything in it is on the host."""

    step: float
    """The training step, or any other number that orders the checkpoints."""
    loss: float
    """The mean loss over the data, or NaN if the operator does not tell it."""
    gradient_norm: float
    """|g| of the full gradient, or NaN for an operator without ``gradient()``."""
    values: np.ndarray
    """(rank,) float64: the eigenvalues, descending."""
    residuals: np.ndarray
    """(rank,) float64: their residuals, in eigenvalue units."""
    converged: np.ndarray
    """(rank,) bool: whether their residuals meet the tolerance."""
    concentration: np.ndarray
    """(rank,) float64: share of |g|^2 in the first 1, 2, ... eigenvectors, or NaN without g.

    `gradient_concentration` computes it.
    """
    overlap: float
    """The `overlap` of the eigenspace with that of the checkpoint before, or NaN for the first."""
    density: SpectralDensity | None
    """The spectral density, or None if it was left out."""
    num_matvecs: int
    """The number of products spent on the eigenspace.

    ``density.num_matvecs`` more were spent on the density.
    """
    seconds: float
    """The time that the measurement took."""

    @staticmethod
    def of(columns: Mapping[str, Any], contents: Contents | None) -> TrackPoint:
        """A point from its saved columns, and the contents of its density."""
        row: dict[str, Any] = {name: np.asarray(value) for name, value in columns.items()}
        row |= {name: float(value) for name, value in row.items() if not np.ndim(value)}
        row |= {"converged": row["converged"].astype(bool), "num_matvecs": int(row["num_matvecs"])}
        return TrackPoint(**row, density=SpectralDensity(*contents) if contents else None)

    def columns(self) -> dict[str, Any]:
        """All fields except the density, in types that JSON can hold. The inverse of `of`."""
        return {name: np.asarray(getattr(self, name), float).tolist() for name in COLUMNS}


COLUMNS = tuple(f.name for f in fields(TrackPoint) if f.name != "density")


@dataclass(frozen=True, eq=False, repr=False)
class Track:
    """The spectrum over training, with one point for each checkpoint.

    ``print(track)`` shows a table, and ``track.plot()`` draws a heat map. With T checkpoints and
    eigenspaces of the same rank, the properties are arrays (T,) or (T, rank), in the order of the
    steps.

    Example:
      >>> import jax, numpy as np, hessdensity as hd
      >>> checkpoints = [(0, 1.0), (100, 2.0)]  # the parameters are a number here
      >>> scaled = lambda params: hd.Matrix(params * np.diag([1.0, 2.0, 3.0, 6.0]))
      >>> track = hd.track(scaled, checkpoints, jax.random.key(0), rank=2, progress=False)
      >>> track.values.round(3).tolist()
      [[6.0, 3.0], [12.0, 6.0]]
      >>> track.zetas().round(3).tolist(), track.overlaps.round(3).tolist()
      ([2.0, 2.0], [nan, 1.0])
    """

    points: tuple[TrackPoint, ...]
    """One point for each checkpoint, in the order of the steps."""
    eigenspace: Eigenspace | None = None
    """The eigenspace of the last checkpoint, with its vectors on the device. It is not saved."""
    num_classes: int | None = None
    """K: zeta is lambda_1 / lambda_K by default. If it is None, the rank replaces it."""
    description: dict[str, Any] = field(default_factory=dict)
    """The settings, the versions, and the reason why the run ended early, if it did."""

    @property
    def steps(self) -> np.ndarray:
        """(T,) float64: the steps, ascending."""
        return self._column("step")

    @property
    def losses(self) -> np.ndarray:
        """(T,) float64: the mean losses."""
        return self._column("loss")

    @property
    def gradient_norms(self) -> np.ndarray:
        """(T,) float64: the norms of the full gradients, in units of loss over parameter."""
        return self._column("gradient_norm")

    @property
    def values(self) -> np.ndarray:
        """(T, rank) float64: the eigenvalues, descending."""
        return self._column("values")

    @property
    def residuals(self) -> np.ndarray:
        """(T, rank) float64: their residuals, in eigenvalue units."""
        return self._column("residuals")

    @property
    def converged(self) -> np.ndarray:
        """(T, rank) bool: whether their residuals meet the tolerance."""
        return self._column("converged").astype(bool)

    @property
    def concentrations(self) -> np.ndarray:
        """(T, rank) float64: share of |g|^2 in the first 1, 2, ..., rank eigenvectors."""
        return self._column("concentration")

    @property
    def overlaps(self) -> np.ndarray:
        """(T,) float64: overlap of each eigenspace with the one before. The first is NaN."""
        return self._column("overlap")

    @property
    def num_matvecs(self) -> np.ndarray:
        """(T,) int: the number of products spent, on the eigenspace and on the density."""
        spent = [m.num_matvecs + (m.density.num_matvecs if m.density else 0) for m in self.points]
        return np.array(spent, int)

    @property
    def densities(self) -> tuple[SpectralDensity | None, ...]:
        """One `SpectralDensity` for each checkpoint, or None where it was left out."""
        return tuple(point.density for point in self.points)

    @property
    def rank(self) -> int:
        """The number of eigenvalues at each checkpoint."""
        return self.points[0].values.size if self.points else 0

    def zetas(self, k: int | None = None) -> np.ndarray:
        """(T,) float64: lambda_1 / lambda_k (`zeta`), or NaN where lambda_k is not positive.

        Args:
          k: 1 to the rank. By default ``num_classes``, or the rank without it.
        """
        if not self.points:
            return np.zeros(0)
        k = k or self._k
        check_k(k, self.rank)
        first = self.values[:, 0]
        last = self.values[:, k - 1]
        return np.divide(first, last, out=np.full(first.size, np.nan), where=last > 0)

    @property
    def _k(self) -> int:
        return self.num_classes or self.rank

    def _column(self, name: str) -> np.ndarray:
        return np.array([getattr(point, name) for point in self.points], float)

    def __len__(self) -> int:
        return len(self.points)

    def __repr__(self) -> str:
        return f"<Track of {len(self)} checkpoints, rank {self.rank}>"

    def __str__(self) -> str:
        about = self.description
        k = self._k
        rank = self.rank
        of = f" {of_operator(about)}" if "operator" in about else ""
        title = f"Track{of}, {plural(len(self), 'checkpoint')}"
        if not self.points:
            return title
        zetas = self.zetas()
        spent = self.num_matvecs
        unsure = (~self.converged).sum(1)
        columns: list[tuple[str, Callable[[int, TrackPoint], str]]] = [
            ("step", lambda i, m: f"{m.step:,.10g}"),
            ("loss", lambda i, m: _number(m.loss, ".5g")),
            ("|gradient|", lambda i, m: _number(m.gradient_norm, ".3g")),
            ("lambda_1", lambda i, m: f"{m.values[0]:.4g}"),
            (f"lambda_{k}", lambda i, m: f"{m.values[k - 1]:.4g}"),
            ("zeta", lambda i, m: _number(zetas[i], ".3g")),
            (f"gradient in top {rank}", lambda i, m: _number(m.concentration[-1], ".3f")),
            ("overlap", lambda i, m: _number(m.overlap, ".3f")),
            ("products", lambda i, m: f"{spent[i]:,}"),
        ]
        if unsure.any():
            columns.append(("not converged", lambda i, m: f"{unsure[i]}" if unsure[i] else ""))
        rows = [[name for name, _ in columns]]
        rows += [[cell(i, m) for _, cell in columns] for i, m in enumerate(self.points)]
        stopped = [f"  stopped: {about['stopped']}"] if about.get("stopped") else []
        return "\n".join([title, *table(rows), *stopped])

    def plot(self, ax: Axes | None = None, **options: Any) -> Axes:
        """Draw a heat map of the density over training, and return the matplotlib Axes.

        ``options`` are those of `hessdensity.plots.plot_track`.
        """
        from hessdensity.plots import plot_track

        return plot_track(self, ax, **options)

    def save(self, path: str | Path) -> None:
        """Write everything but the eigenspace to exactly ``path``.

        The file is a versioned npz without pickles.
        """
        columns = {name: self._column(name) for name in COLUMNS}
        densities = [density.contents() if density else None for density in self.densities]
        about = {"num_classes": self.num_classes, "description": self.description}
        track_archive.write(path, track_archive.TrackContents(columns, densities, about))

    @staticmethod
    def load(path: str | Path) -> Track:
        """Read a file that `save` wrote. The result equals the saved fields bit for bit.

        Raises:
          FileNotFoundError: there is no such file.
          ValueError: the file is not a saved track, or has a newer version of the format.
        """
        columns, densities, about = track_archive.read(path)
        description = about["description"]
        if isinstance(description.get("operator"), str):  # as version 0.1 wrote it
            description["operator"] = {"kind": description["operator"]}
        if missing := set(COLUMNS) - set(columns):
            raise ValueError(
                f"path={str(path)!r} is a damaged track: the columns {sorted(missing)} are "
                "missing. Save it again."
            )
        points = tuple(
            TrackPoint.of({name: column[i] for name, column in columns.items()}, contents)
            for i, contents in enumerate(densities)
        )
        return Track(points, None, about["num_classes"], description)


def _number(value: float, spec: str) -> str:
    return format(value, spec) if np.isfinite(value) else "-"
