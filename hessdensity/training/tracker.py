"""The spectrum over training: the same measurements at every checkpoint, one after the other."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, cast

import jax
import numpy as np

from hessdensity.errors import NonFiniteProductError, RunTerminated
from hessdensity.estimators.settings import TrackSettings
from hessdensity.estimators.spectral_density import spectral_density
from hessdensity.estimators.top_eigenspace import top_eigenspace
from hessdensity.operators.algebra import CountingOperator
from hessdensity.operators.protocol import Operator, check_key, describe
from hessdensity.runs.failures import explained, terminable
from hessdensity.runs.memory import free_memory
from hessdensity.runs.plan import plan_from_sizes
from hessdensity.runs.progress import make_bar
from hessdensity.runs.run import key_data
from hessdensity.runs.steps import versions
from hessdensity.spectra.density import SpectralDensity
from hessdensity.spectra.eigenspace import Eigenspace
from hessdensity.spectra.subspaces import norm, overlap
from hessdensity.text import plural
from hessdensity.vectors import trees
from hessdensity.vectors.trees import PyTree, Vector

from .gradient import gradient_concentration
from .saved_points import SavedPoints
from .track import Track, TrackPoint, check_k

logger = logging.getLogger("hessdensity")


class Tracker:
    """Measure a spectrum at one checkpoint after another, inside a training loop.

    `track` does the same for saved checkpoints. At each checkpoint, the tracker measures the top
    eigenspace, its overlap with the one before, the share of the gradient in it, and the density.
    Each eigenspace is the warm start for the next one. The random probes of the density are the
    same at every checkpoint, so that all changes come from the network.

    Args:
      make_operator: maps parameters to an operator, such as
        ``lambda params: hd.Hessian(loss, params, data)``. If ``loss`` is always the same function
        and the parameters have the same shapes, later checkpoints compile nothing.
      key: JAX random key.
      rank: number of eigenpairs to follow.
      which: the end of the spectrum, as for `top_eigenspace`. The default is the algebraically
        largest eigenvalues, which `zeta` compares.
      tolerance: tolerance for the residuals of eigenpairs, as for `top_eigenspace`.
      block_size: number of vectors in a pass over the data, as for `top_eigenspace`.
      max_matvecs: largest number of products for the eigenspace of a checkpoint, as for
        `top_eigenspace`.
      num_classes: K, for zeta = lambda_1 / lambda_K. By default the rank.
      density: whether to estimate the density, too.
      num_steps: Lanczos steps of each probe, as for `spectral_density`.
      num_probes: number of probes, as for `spectral_density`.
      deflation_steps: Lanczos steps of the deflation run, as for `spectral_density`.
      checkpoint: a folder in which every measured checkpoint is saved, and every step of the
        current one. A later `Tracker` with the same arguments that measures the same checkpoints
        reads the saved results and continues after them.
      progress: show a bar of products done at the current checkpoint, on standard error.

    Raises:
      TypeError: ``make_operator`` is not a function, or ``key`` is not a JAX random key.
      ValueError: ``num_classes`` is not between 1 and the rank, or another setting is out of range.
        Settings that do not go with the operator are refused by the first call of `measure`.

    Cost: for each checkpoint with the defaults, 180 products for the density, the products of the
    eigenspace, and one pass for the gradient. The closer the last checkpoint, the fewer products
    the eigenspace needs. Memory: between measurements, the eigenvectors of one checkpoint.

    Example:
      >>> import jax, jax.numpy as jnp, hessdensity as hd
      >>> loss = lambda w, x: jnp.mean(jnp.tanh(x @ w) ** 2)
      >>> data = [jnp.linspace(-1, 1, 40).reshape(8, 5)]
      >>> hessian = lambda params: hd.Hessian(loss, params, data)
      >>> tracker = hd.Tracker(hessian, jax.random.key(0), rank=2, progress=False)
      >>> w = jnp.ones(5)
      >>> for step in range(3):  # the steps of training
      ...     point = tracker.measure(step, w)
      ...     w = w - 0.1 * jax.grad(loss)(w, data[0])
      >>> tracker.track.values.shape, len(tracker.track.densities)
      ((3, 2), 3)
    """

    def __init__(
        self,
        make_operator: Callable[[PyTree], Operator],
        key: jax.Array,
        *,
        rank: int = TrackSettings.rank,
        which: str = TrackSettings.which,
        tolerance: float = TrackSettings.tolerance,
        block_size: int = TrackSettings.block_size,
        max_matvecs: int | None = None,
        num_classes: int | None = None,
        density: bool = TrackSettings.density,
        num_steps: int | None = None,
        num_probes: int | None = None,
        deflation_steps: int | None = None,
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
        self._make_operator = make_operator
        self._progress = progress
        self._num_classes = num_classes
        self._checkpoint = checkpoint
        self._space_key, self._density_key = jax.random.split(key)
        self._settings = TrackSettings(
            rank,
            which,
            tolerance,
            block_size,
            max_matvecs,
            density,
            cast(int, num_steps),
            cast(int, num_probes),
            cast(int, deflation_steps),
        )
        self._points: list[TrackPoint] = []
        self._eigenspace: Eigenspace | None = None
        self._saved: SavedPoints | None = None
        self._identity = {
            "computation": TrackSettings.computation,
            **self._settings.identity(),
            "key": key_data(key),
        }
        self._description = {**self._identity, "stopped": None, "versions": versions()}

    @property
    def track(self) -> Track:
        """The track of all checkpoints measured so far."""
        about = {**self._description, "seconds": sum(point.seconds for point in self._points)}
        return Track(tuple(self._points), self._eigenspace, self._num_classes, about)

    def measure(self, step: float, params: PyTree) -> TrackPoint:
        """Measure one checkpoint, and add it to `track`.

        Args:
          step: the number of the checkpoint, larger than all before.
          params: the argument of ``make_operator``.

        Raises:
          TypeError: ``make_operator`` does not return an operator.
          ValueError: ``step`` is not larger than the last one, or the folder ``checkpoint`` holds
            other parameters. Also if `top_eigenspace` or `spectral_density` refuse a setting.
          NonFiniteProductError: a product is not finite.
          KeyboardInterrupt: Ctrl-C was pressed. The checkpoint is left out.
        """
        last = self._points[-1].step if self._points else -math.inf
        if not step > last:
            raise ValueError(
                f"step={step!r}, expected more than the step of the last checkpoint, {last:,.10g}."
            )
        operator = self._make_operator(params)
        if not hasattr(operator, "like") or not hasattr(operator, "__matmul__"):
            raise TypeError(
                f"make_operator returned a {type(operator).__name__}; expected an operator, as "
                "from lambda params: hd.Hessian(loss, params, data)."
            )
        if self._saved is None and self._checkpoint is not None:
            like = trees.abstract(operator.like)
            self._saved = SavedPoints(self._checkpoint, like, self._identity)
        found = None if self._saved is None else self._saved.take(len(self._points), step, operator)
        if found is None:
            self.check_data()
            found = self._measured(step, operator)
        point, space = found
        kind = describe(operator).get("kind", type(operator).__name__)
        self._description["operator"] = {"kind": kind}
        self._eigenspace = space
        self._points.append(point)
        return point

    def _measured(self, step: float, operator: Operator) -> tuple[TrackPoint, Eigenspace]:
        """Measure one checkpoint, and save the results when they are complete."""
        began, free = time.perf_counter(), free_memory(operator.like)

        def plan() -> str:
            return str(plan_from_sizes(operator, self._settings, free))

        bar = make_bar(f"step {step:,.10g}", None, self._progress, leave=False)
        with bar, explained(plan, self._checkpoint):
            counting = CountingOperator(operator, bar.update)
            space = self._next_eigenspace(counting)
            density = self._density(counting)
            gradient = self._gradient(operator)
        length = math.nan if gradient is None else norm(gradient)
        concentration = np.full(space.rank, np.nan)
        if length > 0:  # at a stationary point, the gradient has no direction and no shares
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
        if self._saved is not None:
            self._saved.add(len(self._points), point, space, operator)
        return point, space

    def _next_eigenspace(self, operator: Operator) -> Eigenspace:
        # The random vector changes with the checkpoint, so that one can find what another missed.
        key = jax.random.fold_in(self._space_key, len(self._points))
        space = top_eigenspace(
            operator,
            key,
            **self._settings.eigenspace.identity(),
            start=self._eigenspace,
            checkpoint=self._folder("eigenspace"),
            progress=False,
        )
        _refuse_interruption(space.description)
        return space

    def _gradient(self, operator: Operator) -> Vector | None:
        if not hasattr(operator, "gradient"):
            return None
        try:
            return operator.gradient()
        except FloatingPointError as error:
            raise NonFiniteProductError(len(self._points), str(error)) from error

    def _density(self, operator: Operator) -> SpectralDensity | None:
        if not self._settings.density:
            return None
        density = spectral_density(
            operator,
            self._density_key,
            **self._settings.spectrum.identity(),
            checkpoint=self._folder("density"),
            progress=False,
        )
        _refuse_interruption(density.description)
        return density

    def _folder(self, name: str) -> str | None:
        return None if self._saved is None else self._saved.folder(len(self._points), name)

    def check_data(self) -> None:
        """Refuse other data than those of the points that were read from ``checkpoint``.

        `track` calls it at the end, and `measure` before it measures a new point.

        Cost: a product of the last of these points, once.
        """
        if self._saved is not None:
            self._saved.check_data()

    def stop(self, reason: str) -> None:
        """Record why the track ends early, and log it."""
        self._description["stopped"] = reason
        logger.warning("track: %s. The result holds the checkpoints measured so far.", reason)


def track(
    make_operator: Callable[[PyTree], Operator],
    checkpoints: Iterable[tuple[float, PyTree]],
    key: jax.Array,
    **settings: Any,
) -> Track:
    """Measure the spectrum at every checkpoint of a training run.

    `Tracker` documents the measurements and the settings.

    Args:
      make_operator: maps parameters to an operator, such as
        ``lambda params: hd.Hessian(loss, params, data)``.
      checkpoints: pairs (step, params) with ascending steps, in a list, or from a generator that
        loads one after the other.
      key: JAX random key.
      settings: settings of `Tracker`, such as ``rank=10``, ``which="LA"``, ``density=True``,
        ``num_steps`` or ``progress``.

    Returns:
      `Track`. After Ctrl-C it holds the checkpoints measured so far, and ``description["stopped"]``
      says so.

    Raises:
      ValueError: a checkpoint is not a pair, there is no checkpoint, or the steps do not ascend.
      NonFiniteProductError: a product is not finite, as after a run has diverged. ``partial`` is
        the track of the checkpoints before, if there are any.

    Example:
      >>> import jax, jax.numpy as jnp, hessdensity as hd
      >>> loss = lambda w, x: jnp.mean(jnp.tanh(x @ w) ** 2)
      >>> data = [jnp.linspace(-1, 1, 40).reshape(8, 5)]
      >>> checkpoints = [(0, jnp.ones(5)), (1000, jnp.zeros(5))]
      >>> hessian = lambda params: hd.Hessian(loss, params, data)
      >>> settings = {"rank": 2, "density": False, "progress": False}
      >>> print(hd.track(hessian, checkpoints, jax.random.key(0), **settings))
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
                        "a pair (step, params)."
                    )
                tracker.measure(*checkpoint)
            tracker.check_data()
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
    """Raise KeyboardInterrupt after an interrupted part. A track has complete checkpoints only."""
    if str(description.get("stopped")).startswith("interrupted"):
        raise KeyboardInterrupt
