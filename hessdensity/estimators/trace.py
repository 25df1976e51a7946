"""The trace alone, from as few products as it takes: exchangeable estimates, with their error."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import numpy as np

from hessdensity.operators.protocol import Operator, check
from hessdensity.runs.memory import free_memory
from hessdensity.runs.plan import plan_from_sizes
from hessdensity.runs.run import Run, key_data
from hessdensity.spectra.estimate import Estimate

from .settings import TraceSettings
from .trace_engines import ExactEngine, NystromEngine, RangeEngine, TraceEngine


@dataclass(frozen=True, eq=False)
class TraceEstimate(Estimate):
    """An estimated trace, in eigenvalue units."""

    num_matvecs: int = 0
    """Products that were spent."""
    description: dict[str, Any] = field(default_factory=dict)
    """What was computed: the operator's own description, settings, versions."""


def trace(
    operator: Operator,
    key: jax.Array,
    num_matvecs: int,
    *,
    semidefinite: bool = TraceSettings.semidefinite,
    block_size: int = TraceSettings.block_size,
    checkpoint: str | Path | None = None,
    progress: bool = True,
) -> TraceEstimate:
    """Estimate the sum of an operator's eigenvalues, by XTrace or XNysTrace.

    Half of the products go to k = num_matvecs // 2 random vectors w_i, uniform on the sphere of
    R^n, and make an orthonormal basis Q of their span; the other half to Q. In that span the trace
    is exact, and it holds the eigenvalues that are far from the others. With Q_i the basis without
    the product number i, and u_i the part of w_i outside of it,

        tr_i = tr(Q_i^T H Q_i) + (n - k + 1) u_i^T H u_i / u_i^T u_i,    trace = mean of tr_i:

    every test vector sees what the others leave, is independent of it, and uniform on its sphere.
    So each tr_i is unbiased, and the error falls as 1/num_matvecs, where random vectors alone
    (Girard 1989; Hutchinson 1990) have 1/sqrt(num_matvecs); with the singular values of H, where
    these decay faster.

    Args:
      operator: anything with ``like`` and ``@`` on blocks, such as a `Hessian`.
      key: JAX random key; test vector i uses ``fold_in(key, i)``.
      num_matvecs: products to spend, at least 4; an odd one is left. From n on the trace is exact,
        of n products.
      semidefinite: say that no eigenvalue is negative (Gauss-Newton, Fisher, covariance; a Hessian
        is not). All products then go to test vectors, and the Nystrom approximation takes Q's
        place.
      block_size: vectors that go through the data together.
      checkpoint: a folder. Every step is saved there, and a later call with the same arguments
        resumes the run, as for `spectral_density`. It holds all products.
      progress: show a bar of products done on standard error.

    Returns:
      `TraceEstimate`, in eigenvalue units. After Ctrl-C the one that the products done so far give:
      ``description["stopped"]`` says so. The standard error is that of the jackknife over test
      vectors: on average it is not too small, whatever the spectrum (Efron and Stein 1981), and too
      large where a test vector more would be worth much, by a factor of two to eight. (The spread
      of the tr_i, which the paper takes, is too small there by up to four.) ``lower`` and ``upper``
      add a Student's t of k - 1 degrees. Rounding of the products is in them, a bias of the
      operator is not.

    Raises:
      TypeError: ``operator`` is none, or ``key`` is no key.
      ValueError: a number that cannot be; the products show an operator that is not symmetric, or
        one with negative eigenvalues where ``semidefinite``.
      FloatingPointError: a product is not finite.

    Cost: num_matvecs products, in num_matvecs / block_size passes over the data, and O(n
      num_matvecs^2) operations.
    Memory: num_matvecs / 2 + 3 block_size vectors; if ``semidefinite``, 2 num_matvecs + 2
      block_size.

    Source: Epperly, Tropp and Webber (2024), with what is left of the test vectors normalized; the
      jackknife is ours.

    Example:
      >>> import hessdensity as hd
      >>> eigenvalues = 1 / np.arange(1, 1001) ** 2
      >>> operator = hd.Matrix.from_eigenvalues(eigenvalues, jax.random.key(0))
      >>> estimate = trace(operator, jax.random.key(1), 60, progress=False)
      >>> bool(estimate.lower < eigenvalues.sum() < estimate.upper), bool(estimate.standard_error < 0.02)
      (True, True)
    """
    dimension = check(operator, key)
    settings = TraceSettings(num_matvecs, semidefinite, block_size)

    def table() -> str:
        free = free_memory(operator.like)
        return str(plan_from_sizes(settings.computation, operator, settings.layouts, free))

    kept = {**dataclasses.asdict(settings), "key": key_data(key)}
    options = {"checkpoint": checkpoint, "progress": progress}
    run = Run(settings.computation, operator, kept, table=table, **options)
    engine: TraceEngine
    if num_matvecs >= dimension:
        engine, total = ExactEngine(operator.like, block_size, semidefinite), dimension
    elif semidefinite:
        engine, total = NystromEngine(operator.like, key, num_matvecs, block_size), num_matvecs
    else:
        count = num_matvecs // 2
        engine, total = RangeEngine(operator.like, key, count, block_size), 2 * count
    run.bar.total = total

    def compute() -> None:
        for _ in run.drive(engine):
            pass

    def answer() -> TraceEstimate:
        value, error, freedom = engine.estimate()
        about = run.describe(num_matvecs=run.num_matvecs)
        return TraceEstimate(*_interval(value, error, freedom), run.num_matvecs, about)

    return run.execute(compute, answer)


def _interval(value: float, error: float, freedom: float) -> tuple[float, float, float, float]:
    """(value, standard error, lower, upper) by a Student's t of so many degrees of freedom."""
    from scipy.special import stdtrit

    reach = float(stdtrit(min(freedom, 1e6), 0.975)) * error if np.isfinite(error) else np.inf
    return value, error, value - reach, value + reach
