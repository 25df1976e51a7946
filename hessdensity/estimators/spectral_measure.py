"""The distribution of one vector over the spectrum, by Lanczos quadrature from that vector."""

from __future__ import annotations

from pathlib import Path

from hessdensity.krylov import lanczos
from hessdensity.krylov.lanczos_engine import LanczosEngine
from hessdensity.operators.protocol import Operator, check
from hessdensity.runs.run import Run
from hessdensity.spectra.measure import SpectralMeasure
from hessdensity.spectra.quadrature import gauss_rule
from hessdensity.spectra.subspaces import unit
from hessdensity.vectors.fingerprint import fingerprint
from hessdensity.vectors.trees import Vector

from .density_run import tridiagonals
from .settings import MeasureSettings


def spectral_measure(
    operator: Operator,
    vector: Vector,
    num_steps: int = MeasureSettings.num_steps,
    *,
    checkpoint: str | Path | None = None,
    progress: bool = True,
) -> SpectralMeasure:
    """Compute how a vector g is distributed over the spectrum, by Lanczos quadrature.

    The measure is sum over i of (q_i.g)^2 / |g|^2 delta(t - lambda_i). num_steps Lanczos steps from
    g give its Gauss rule (Golub and Meurant 2010). For a gradient, this is its concentration over
    the whole spectrum, without any eigenvector. Nothing in it is random: ``cdf(x)`` is the share of
    |g|^2 in directions with eigenvalues up to x, ``mass(low, high)`` is the share in between, with
    certain bounds, and ``moment(1)`` is the Rayleigh quotient g.Hg / g.g.

    Args:
      operator: anything with ``like`` and ``@`` on blocks, such as a `Hessian`.
      vector: g, with the structure and shapes of ``operator.like``. Its length does not matter.
      num_steps: Lanczos steps m, clipped to n. They give m nodes, exact for moments up to 2m - 1.
      checkpoint: a folder in which every step is saved. Calling again with the same arguments
        resumes the run, as for `spectral_density`.
      progress: show a bar of products done on standard error.

    Returns:
      `SpectralMeasure`. Its standard errors are zero, and ``lower`` and ``upper`` include the error
      of quadrature. It can be plotted beside the density of eigenvalues. After Ctrl-C it is the
      measure from the steps done so far, and ``description["stopped"]`` says so.

    Raises:
      ValueError: ``vector`` has another structure or shape than ``operator.like``, or it is zero or
        not finite. Or ``num_steps`` is below 1, or the operator turns out not to be symmetric.
      NonFiniteProductError: a product is not finite. ``partial`` is the measure from the steps
        before, if there are any.

    Cost: num_steps products, each a pass over the data. Memory: num_steps + 4 vectors.

    Example:
      >>> import numpy as np, hessdensity as hd
      >>> operator = hd.Matrix(np.diag([1.0, 2.0, 9.0]))
      >>> measure = spectral_measure(operator, np.array([3.0, 0.0, 4.0]), progress=False)
      >>> share, quotient = measure.cdf(5.0).value, measure.moment(1).value
      >>> print(f"{share:.2f} of the square at 1, Rayleigh quotient {quotient:.2f}")
      0.36 of the square at 1, Rayleigh quotient 6.12
    """
    dimension = check(operator)
    settings = MeasureSettings(num_steps)
    direction, norm = unit(vector, operator.like, "vector")

    others = {"vector": fingerprint(vector)}
    run = Run(operator, settings, others=others, checkpoint=checkpoint, progress=progress)
    run.total = min(num_steps, dimension)

    def answer(engine: LanczosEngine) -> SpectralMeasure:
        (tridiagonal,) = tridiagonals(engine.state)
        description = run.describe(norm=norm, num_steps=engine.num_done)
        return SpectralMeasure((gauss_rule(tridiagonal),), dimension, run.num_matvecs, description)

    return run.execute_engine(lambda: LanczosEngine(lanczos.init(direction, num_steps)), answer)
