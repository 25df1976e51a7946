"""The spectrum over training: the same measures at every checkpoint, each starting from the one
before."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterable
from importlib.metadata import version
from typing import Any

import jax
import numpy as np

from hessdensity.estimators.spectral_density import spectral_density
from hessdensity.estimators.top_eigenspace import top_eigenspace
from hessdensity.krylov.lanczos import NonFiniteProduct
from hessdensity.operators.protocol import Operator, describe
from hessdensity.runs.progress import make_bar
from hessdensity.spectra.density import SpectralDensity
from hessdensity.spectra.eigenspace import Eigenspace, overlap
from hessdensity.spectra.projection import norm

from .gradient import gradient_concentration
from .track import Measurement, Track, check_k

PyTree = Any
logger = logging.getLogger("hessdensity")


class Tracker:
    """Measures a spectrum at one checkpoint after another, inside of a training loop; `track` for
    saved ones.

    At each: the top eigenspace, warm-started from the one before, its overlap with that, the share
    of the gradient in it, and the density. The random probes of the density are the same at every
    checkpoint, so that what changes is the network.

    Args: make_operator: parameters to operator: ``lambda params: hd.Hessian(loss, params, data)``.
      With one ``loss`` and
        parameters of one shape, later checkpoints compile nothing.
      key: JAX random key. rank: eigenpairs to follow. which: which, as for `top_eigenspace`. The
      default, the algebraically largest, is what `zeta` compares. tolerance: of the eigenpairs'
      residuals, as for `top_eigenspace`. block_size: vectors a pass over the data, as for
      `top_eigenspace`. max_matvecs: products a checkpoint's eigenspace may cost, as for
      `top_eigenspace`. num_classes: K, zeta being lambda_1 / lambda_K (default: the rank). density:
      estimate the density too. num_steps: Lanczos steps of a probe, as for `spectral_density`.
      num_probes: its probes. deflation_steps: its deflation. progress: show a bar of products done
      at the present checkpoint, on standard error.

    Raises: TypeError: ``make_operator`` is no function of the parameters, or ``key`` no key.
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
        tolerance: float = 1e-4,
        block_size: int = 4,
        max_matvecs: int | None = None,
        num_classes: int | None = None,
        density: bool = True,
        num_steps: int = 45,
        num_probes: int = 2,
        deflation_steps: int = 90,
        progress: bool = True,
    ) -> None:
        if not callable(make_operator):
            raise TypeError(
                f"make_operator is a {type(make_operator).__name__}; expected a function of the "
                "parameters, such as lambda params: hd.Hessian(loss, params, data)."
            )
        if not isinstance(key, jax.Array):
            raise TypeError(
                f"key is a {type(key).__name__}; expected a JAX random key, such as "
                "jax.random.key(0)."
            )
        if num_classes is not None:
            check_k(num_classes, rank, "num_classes")
        self._make_operator, self._rank, self._num_classes, self._progress = (
            make_operator,
            rank,
            num_classes,
            progress,
        )
        self._space_key, self._density_key = jax.random.split(key)
        self._space_settings: dict[str, Any] = {
            "which": which,
            "tolerance": tolerance,
            "block_size": block_size,
            "max_matvecs": max_matvecs,
        }
        self._density_settings: dict[str, Any] = {
            "num_steps": num_steps,
            "num_probes": num_probes,
            "deflation_steps": deflation_steps,
        }
        self._wants_density = density
        self._measurements: list[Measurement] = []
        self._eigenspace: Eigenspace | None = None
        self._description: dict[str, Any] = {
            "rank": rank,
            **self._space_settings,
            **(self._density_settings if density else {}),
            "key": np.asarray(jax.random.key_data(key)).tolist(),
            "stopped": None,
            "versions": {package: version(package) for package in ("hessdensity", "jax", "numpy")},
        }

    @property
    def track(self) -> Track:
        """All that was measured so far."""
        return Track(
            tuple(self._measurements), self._eigenspace, self._num_classes, dict(self._description)
        )

    def measure(self, step: float, params: PyTree) -> Measurement:
        """Measure one checkpoint; `track` has it then.

        Args:
          step: its number, above those before.
          params: what ``make_operator`` takes.

        Raises: ValueError: ``step`` is not above the last one; whatever `top_eigenspace` and
          `spectral_density` refuse. lanczos.NonFiniteProduct: a product is not finite.
          KeyboardInterrupt: at Ctrl-C; the checkpoint is left out.
        """
        last = self._measurements[-1].step if self._measurements else -math.inf
        if not step > last:
            raise ValueError(
                f"step={step!r}, expected more than the last checkpoint's, {last:,.10g}."
            )
        began = time.perf_counter()
        operator = self._make_operator(params)
        if not hasattr(operator, "like") or not hasattr(operator, "__matmul__"):
            raise TypeError(
                f"make_operator returned a {type(operator).__name__}; expected an operator: "
                "lambda params: hd.Hessian(loss, params, data)."
            )
        with make_bar(f"step {step:,.10g}", None, self._progress, leave=False) as bar:
            watched = _Watched(operator, bar)
            space = self._next_eigenspace(watched)
            density = self._density(watched)
            gradient = operator.gradient() if hasattr(operator, "gradient") else None
        length, concentration = (
            0.0 if gradient is None else norm(gradient),
            np.full(space.rank, np.nan),
        )
        about = describe(operator)
        measurement = Measurement(
            step=float(step),
            loss=float(about.get("loss", math.nan)),
            gradient_norm=length if gradient is not None else math.nan,
            values=space.values,
            residuals=space.residuals,
            converged=space.converged,
            # A gradient of zero, at a stationary point, has no direction and no share.
            concentration=gradient_concentration(gradient, space) if length else concentration,
            overlap=overlap(self._eigenspace, space) if self._eigenspace else math.nan,
            density=density,
            num_matvecs=space.num_matvecs,
            seconds=time.perf_counter() - began,
        )
        self._description["operator"] = about.get("kind", type(operator).__name__)
        self._eigenspace = space
        self._measurements.append(measurement)
        return measurement

    def _next_eigenspace(self, operator: _Watched) -> Eigenspace:
        # Another random vector at each checkpoint: what one misses the next one meets.
        key = jax.random.fold_in(self._space_key, len(self._measurements))
        space = top_eigenspace(
            operator,
            key,
            self._rank,
            **self._space_settings,
            start=self._eigenspace,
            progress=False,
        )
        _refuse_interruption(space.description)
        return space

    def _density(self, operator: _Watched) -> SpectralDensity | None:
        if not self._wants_density:
            return None
        density = spectral_density(
            operator, self._density_key, **self._density_settings, progress=False
        )
        _refuse_interruption(density.description)
        return density

    def stop(self, reason: str) -> None:
        """Note why this is all there is."""
        self._description["stopped"] = reason
        logger.warning("track: %s; these are the checkpoints measured.", reason)


def track(
    make_operator: Callable[[PyTree], Operator],
    checkpoints: Iterable[tuple[float, PyTree]],
    key: jax.Array,
    **settings: Any,
) -> Track:
    """Measure the spectrum at every checkpoint of a training run: `Tracker` has the measures, and
    the settings.

    Args: make_operator: parameters to operator: ``lambda params: hd.Hessian(loss, params, data)``.
      checkpoints: pairs (step, params), the steps ascending: a list, or a generator that loads one
      after the other. key: JAX random key. settings: those of `Tracker`: ``rank=10``,
      ``which="LA"``, ``density=True``, ``num_steps``, ``progress``, ...

    Returns: `Track`. After Ctrl-C that of the checkpoints measured so far;
      ``description["stopped"]`` says so.

    Raises: ValueError: a checkpoint is no pair; no checkpoint; steps that do not ascend.
      lanczos.NonFiniteProduct: a product is not finite, as after a run has diverged; its
      ``partial`` is the track of
        the checkpoints before, if any.

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
    try:
        for number, checkpoint in enumerate(checkpoints):
            if not isinstance(checkpoint, tuple | list) or len(checkpoint) != 2:
                raise ValueError(
                    f"checkpoints: number {number} is a {type(checkpoint).__name__}; expected "
                    "(step, params)."
                )
            tracker.measure(*checkpoint)
    except NonFiniteProduct as error:
        error.partial = tracker.track if len(tracker.track) else None
        raise
    except KeyboardInterrupt:
        if not len(tracker.track):
            raise
        tracker.stop(f"interrupted after {len(tracker.track)} checkpoints")
    if not len(tracker.track):
        raise ValueError("checkpoints is empty; expected pairs (step, params).")
    return tracker.track


class _Watched:
    """An operator that counts its products on a bar."""

    def __init__(self, operator: Operator, bar: Any) -> None:
        self.like = operator.like
        self._operator, self._bar = operator, bar

    def __matmul__(self, block: PyTree) -> PyTree:
        product = self._operator @ block
        self._bar.update(jax.tree.leaves(block)[0].shape[0])
        return product

    def describe(self) -> dict[str, Any]:
        """What the operator is."""
        return describe(self._operator)


def _refuse_interruption(description: dict[str, Any]) -> None:
    """Ctrl-C ends an algorithm with what it has; a checkpoint half measured is no row of a track."""
    if str(description.get("stopped")).startswith("interrupted"):
        raise KeyboardInterrupt
