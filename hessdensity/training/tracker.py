"""The spectrum over training: the same measures at every checkpoint, each from the one before."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from hessdensity.errors import NonFiniteProductError, RunTerminated
from hessdensity.estimators.settings import DensitySettings, EigenspaceSettings
from hessdensity.estimators.spectral_density import spectral_density
from hessdensity.estimators.top_eigenspace import top_eigenspace
from hessdensity.krylov.engine import Step
from hessdensity.operators.algebra import CountingOperator
from hessdensity.operators.protocol import Operator, check_key, describe
from hessdensity.runs.failures import terminable
from hessdensity.runs.progress import make_bar
from hessdensity.runs.run import key_data
from hessdensity.runs.steps import SavedSteps, versions
from hessdensity.spectra.density import SpectralDensity
from hessdensity.spectra.eigenspace import Eigenspace
from hessdensity.spectra.subspaces import norm, overlap
from hessdensity.text import plural
from hessdensity.vectors.trees import PyTree

from . import track_archive
from .gradient import gradient_concentration
from .track import Track, TrackPoint, check_k

logger = logging.getLogger("hessdensity")


class Tracker:
    """Measures a spectrum at one checkpoint after another, inside of a training loop; `track` for
    saved ones.

    At each: the top eigenspace, warm-started from the one before, its overlap with that, the share
    of the gradient in it, and the density. The random probes of the density are the same at every
    checkpoint, so that what changes is the network.

    Args:
      make_operator: parameters to operator: ``lambda params: hd.Hessian(loss, params, data)``. With
        one ``loss`` and parameters of one shape, later checkpoints compile nothing.
      key: JAX random key.
      rank: eigenpairs to follow.
      which: which, as for `top_eigenspace`. The default, the algebraically largest, is what `zeta`
        compares.
      tolerance: of the eigenpairs' residuals, as for `top_eigenspace`.
      block_size: vectors a pass over the data, as for `top_eigenspace`.
      max_matvecs: products a checkpoint's eigenspace may cost, as for `top_eigenspace`.
      num_classes: K, zeta being lambda_1 / lambda_K (default: the rank).
      density: estimate the density too.
      num_steps: Lanczos steps of a probe, as for `spectral_density`.
      num_probes: its probes.
      deflation_steps: its deflation.
      checkpoint: a folder. Every measured checkpoint is saved there, and every step of the present
        one. A later `Tracker` with the same arguments, given the same checkpoints, takes from it
        what is there and continues.
      progress: show a bar of products done at the present checkpoint, on standard error.

    Raises:
      TypeError: ``make_operator`` is no function of the parameters, or ``key`` no key.
      ValueError: num_classes is not within the rank; other settings are refused by the first
        `measure`.

    Cost: of a checkpoint with the defaults, the density's 180 products, the eigenspace's, which are
    fewer the nearer the last checkpoint is, and one pass for the gradient. Memory: between
    measurements, the eigenvectors of one.

    Example:
      >>> import jax.numpy as jnp, hessdensity as hd
      >>> loss = lambda w, x: jnp.mean(jnp.tanh(x @ w) ** 2)
      >>> data = [jnp.linspace(-1, 1, 40).reshape(8, 5)]
      >>> tracker = Tracker(lambda w: hd.Hessian(loss, w, data), jax.random.key(0), rank=2, progress=False)
      >>> w = jnp.ones(5)
      >>> for step in range(3):  # of training
      ...     measurement = tracker.measure(step, w)
      ...     w = w - 0.1 * jax.grad(loss)(w, data[0])
      >>> tracker.track.values.shape, len(tracker.track.densities)
      ((3, 2), 3)
    """

    def __init__(
        self,
        make_operator: Callable[[PyTree], Operator],
        key: jax.Array,
        *,
        rank: int = 10,
        which: str = "LA",
        tolerance: float = EigenspaceSettings.tolerance,
        block_size: int = EigenspaceSettings.block_size,
        max_matvecs: int | None = None,
        num_classes: int | None = None,
        density: bool = True,
        num_steps: int = DensitySettings.num_steps,
        num_probes: int = DensitySettings.num_probes,
        deflation_steps: int = DensitySettings.deflation_steps,
        checkpoint: str | Path | None = None,
        progress: bool = True,
    ) -> None:
        if not callable(make_operator):
            raise TypeError(
                f"make_operator is a {type(make_operator).__name__}; expected a function of the "
                "parameters, such as lambda params: hd.Hessian(loss, params, data)."
            )
        check_key(key)
        if num_classes is not None:
            check_k(num_classes, rank, "num_classes")
        self._make_operator, self._progress = make_operator, progress
        self._num_classes, self._checkpoint = num_classes, checkpoint
        self._space_key, self._density_key = jax.random.split(key)
        self._space_settings: dict[str, Any] = {
            "rank": rank,
            "which": which,
            "tolerance": tolerance,
            "block_size": block_size,
            "max_matvecs": max_matvecs,
        }
        self._density_settings: dict[str, Any] | None = None
        if density:
            self._density_settings = {
                "num_steps": num_steps,
                "num_probes": num_probes,
                "deflation_steps": deflation_steps,
            }
        self._points: list[TrackPoint] = []
        self._eigenspace: Eigenspace | None = None
        self._steps: SavedSteps | None = None
        self._settings: dict[str, Any] = {
            "computation": "track",
            **self._space_settings,
            **(self._density_settings or {}),
            "key": key_data(key),
        }
        self._description = {**self._settings, "stopped": None, "versions": versions()}

    @property
    def track(self) -> Track:
        """All that was measured so far."""
        about = dict(self._description)
        return Track(tuple(self._points), self._eigenspace, self._num_classes, about)

    def measure(self, step: float, params: PyTree) -> TrackPoint:
        """Measure one checkpoint; `track` has it then.

        Args:
          step: its number, above those before.
          params: what ``make_operator`` takes.

        Raises:
          ValueError: ``step`` is not above the last one; whatever `top_eigenspace` and
            `spectral_density` refuse; the folder ``checkpoint`` holds other parameters.
          NonFiniteProductError: a product is not finite.
          KeyboardInterrupt: at Ctrl-C; the checkpoint is left out.
        """
        last = self._points[-1].step if self._points else -math.inf
        if not step > last:
            raise ValueError(
                f"step={step!r}, expected more than the last checkpoint's, {last:,.10g}."
            )
        operator = self._make_operator(params)
        if not hasattr(operator, "like") or not hasattr(operator, "__matmul__"):
            raise TypeError(
                f"make_operator returned a {type(operator).__name__}; expected an operator: "
                "lambda params: hd.Hessian(loss, params, data)."
            )
        if self._steps is None:
            folder = self._folder("points")
            self._steps = SavedSteps(folder, operator, self._settings)
        point, space = self._saved(step, operator) or self._measured(step, operator)
        kind = describe(operator).get("kind", type(operator).__name__)
        self._description["operator"] = {"kind": kind}
        self._eigenspace = space
        self._points.append(point)
        return point

    def _measured(self, step: float, operator: Operator) -> tuple[TrackPoint, Eigenspace]:
        """The measures of one checkpoint, saved when they are complete."""
        began = time.perf_counter()
        with make_bar(f"step {step:,.10g}", None, self._progress, leave=False) as bar:
            counting = CountingOperator(operator, bar.update)
            space = self._next_eigenspace(counting)
            density = self._density(counting)
            gradient = operator.gradient() if hasattr(operator, "gradient") else None
        length = math.nan if gradient is None else norm(gradient)
        concentration = np.full(space.rank, np.nan)
        if length > 0:  # at a stationary point the gradient has no direction, and no share
            concentration = gradient_concentration(gradient, space)
        point = TrackPoint(
            step=float(step),
            loss=float(describe(operator).get("loss", math.nan)),
            gradient_norm=length,
            values=space.values,
            residuals=space.residuals,
            converged=space.converged,
            concentration=concentration,
            overlap=overlap(self._eigenspace, space) if self._eigenspace else math.nan,
            density=density,
            num_matvecs=space.num_matvecs,
            seconds=time.perf_counter() - began,
        )
        self._save(point, space, operator)
        return point, space

    def _next_eigenspace(self, operator: Operator) -> Eigenspace:
        # Another random vector at each checkpoint: what one misses the next one meets.
        key = jax.random.fold_in(self._space_key, len(self._points))
        space = top_eigenspace(
            operator,
            key,
            **self._space_settings,
            start=self._eigenspace,
            checkpoint=self._folder("eigenspace"),
            progress=False,
        )
        _refuse_interruption(space.description)
        return space

    def _density(self, operator: Operator) -> SpectralDensity | None:
        if self._density_settings is None:
            return None
        folder = self._folder("density")
        settings = {**self._density_settings, "checkpoint": folder, "progress": False}
        density = spectral_density(operator, self._density_key, **settings)
        _refuse_interruption(density.description)
        return density

    # On disk: a folder with the points measured, and one each for what is being measured. --------

    def _folder(self, name: str) -> str | None:
        return None if self._checkpoint is None else f"{self._checkpoint}/{name}"

    def _saved(self, step: float, operator: Operator) -> tuple[TrackPoint, Eigenspace] | None:
        """The measures of the next checkpoint, if they are on disk."""
        if self._steps is None or not (found := self._steps.take()):
            return None
        (vectors, scalars), _ = found
        now = {"step": float(step), "params": describe(operator).get("params")}
        for name, value in now.items():
            if scalars[name] != value:
                raise ValueError(
                    f"checkpoint={str(self._checkpoint)!r}: checkpoint number {len(self._points)} "
                    f"had {name} {scalars[name]!r}, now {value!r}. Give the same checkpoints in "
                    "the same order, or another folder."
                )
        density = track_archive.density_from_json(scalars["density"])
        point = TrackPoint.of(scalars["columns"], density)
        pairs = point.values, vectors, point.residuals, point.converged
        return point, Eigenspace(*pairs, point.num_matvecs)

    def _save(self, point: TrackPoint, space: Eigenspace, operator: Operator) -> None:
        """Add a point on disk, and drop the steps that led to it."""
        if self._steps is None or self._checkpoint is None:
            return
        from etils import epath

        contents = point.density.contents() if point.density else None
        scalars = {
            "step": point.step,
            "params": describe(operator).get("params"),
            "columns": point.columns(),
            "density": track_archive.density_as_json(contents),
        }
        self._steps.add(Step(space.vectors, scalars), point.num_matvecs)
        self._steps.finish()
        for name in ("eigenspace", "density"):
            folder = epath.Path(self._folder(name))
            if folder.exists() and jax.process_index() == 0:
                folder.rmtree()

    def stop(self, reason: str) -> None:
        """Note why this is all there is."""
        self._description["stopped"] = reason
        logger.warning("track: %s; the result is that of the checkpoints measured.", reason)


def track(
    make_operator: Callable[[PyTree], Operator],
    checkpoints: Iterable[tuple[float, PyTree]],
    key: jax.Array,
    **settings: Any,
) -> Track:
    """Measure the spectrum at every checkpoint of a training run: `Tracker` has the measures, and
    the settings.

    Args:
      make_operator: parameters to operator: ``lambda params: hd.Hessian(loss, params, data)``.
      checkpoints: pairs (step, params), the steps ascending: a list, or a generator that loads one
        after the other.
      key: JAX random key.
      settings: those of `Tracker`: ``rank=10``, ``which="LA"``, ``density=True``, ``num_steps``,
        ``progress``, ...

    Returns:
      `Track`. After Ctrl-C that of the checkpoints measured so far; ``description["stopped"]`` says
      so.

    Raises:
      ValueError: a checkpoint is no pair; no checkpoint; steps that do not ascend.
      NonFiniteProductError: a product is not finite, as after a run has diverged; its ``partial``
        is the track of the checkpoints before, if any.

    Example:
      >>> import jax.numpy as jnp, hessdensity as hd
      >>> loss = lambda w, x: jnp.mean(jnp.tanh(x @ w) ** 2)
      >>> data = [jnp.linspace(-1, 1, 40).reshape(8, 5)]
      >>> checkpoints = [(0, jnp.ones(5)), (1000, jnp.zeros(5))]
      >>> hessian = lambda params: hd.Hessian(loss, params, data)
      >>> print(track(hessian, checkpoints, jax.random.key(0), rank=2, density=False, progress=False))
      Track of a Hessian, 2 checkpoints
         step ... lambda_1 ...
            0 ...
        1,000 ...
    """
    tracker = Tracker(make_operator, key, **settings)
    with terminable(settings.get("checkpoint")):
        try:
            for number, checkpoint in enumerate(checkpoints):
                if not isinstance(checkpoint, tuple | list) or len(checkpoint) != 2:
                    raise ValueError(
                        f"checkpoints: number {number} is a {type(checkpoint).__name__}; expected "
                        "(step, params)."
                    )
                tracker.measure(*checkpoint)
        except (NonFiniteProductError, RunTerminated) as error:
            error.partial = tracker.track if len(tracker.track) else None
            raise
        except KeyboardInterrupt:
            if not len(tracker.track):
                raise
            tracker.stop(f"interrupted after {plural(len(tracker.track), 'checkpoint')}")
    if not len(tracker.track):
        raise ValueError("checkpoints is empty; expected pairs (step, params).")
    return tracker.track


def _refuse_interruption(description: dict[str, Any]) -> None:
    """Ctrl-C ends a part with what it has; a checkpoint half measured does not join a track."""
    if str(description.get("stopped")).startswith("interrupted"):
        raise KeyboardInterrupt
