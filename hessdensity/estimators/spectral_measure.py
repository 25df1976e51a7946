"""Where one vector lies in the spectrum: Lanczos quadrature from that vector."""

from __future__ import annotations

from pathlib import Path

from hessdensity.krylov import lanczos
from hessdensity.krylov.lanczos import LanczosEngine
from hessdensity.operators.protocol import Operator, check
from hessdensity.runs.memory import free_memory
from hessdensity.runs.plan import plan_from_sizes
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
    """How a vector g is distributed over the spectrum: sum over i of (q_i.g)^2 / |g|^2 delta(t -
    lambda_i).

    The gradient's whole concentration, without any eigenvector: num_steps of Lanczos from g give
    the Gauss rule of this measure (Golub and Meurant 2010). Nothing in it is random: ``cdf(x)`` is
    the share of |g|^2 in directions of eigenvalues up to x, ``mass(low, high)`` that in between
    with bounds that hold for certain, ``moment(1)`` the Rayleigh quotient g.Hg / g.g.

    Args:
      operator: anything with ``like`` and ``@`` on blocks, such as a `Hessian`.
      vector: like ``operator.like``, of any length.
      num_steps: Lanczos steps m, clipped to n: m nodes, exact for moments up to 2m - 1.
      checkpoint: a folder. Every step is saved there, and a later call with the same arguments
        resumes the run, as for `spectral_density`.
      progress: show a bar of products done on standard error.

    Returns:
      `SpectralMeasure`: standard errors are zero, ``lower`` and ``upper`` hold
      the quadrature's error. It plots beside the density of eigenvalues. After Ctrl-C the one that
      the steps done so far give: ``description["stopped"]`` says so.

    Raises:
      ValueError: another structure or shape than ``operator.like``; a vector that is zero or not
        finite; num_steps < 1; the operator turns out not to be symmetric.
      NonFiniteProductError: a product is not finite; its ``partial`` is the measure from the steps
        before, if any.

    Cost: num_steps products, each a pass over the data. Memory: num_steps + 4 vectors.

    Example:
      >>> import hessdensity as hd
      >>> measure = spectral_measure(hd.Matrix(np.diag([1.0, 2.0, 9.0])), np.array([3.0, 0.0, 4.0]), progress=False)
      >>> print(f"{measure.cdf(5.0).value:.2f} of the square at 1, Rayleigh quotient {measure.moment(1).value:.2f}")
      0.36 of the square at 1, Rayleigh quotient 6.12
    """
    dimension = check(operator)
    settings = MeasureSettings(num_steps)
    direction, norm = unit(vector, operator.like, "vector")

    def table() -> str:
        free = free_memory(operator.like)
        return str(plan_from_sizes(settings.computation, operator, settings.layouts, free))

    kept = {"num_steps": num_steps, "vector": fingerprint(vector)}
    options = {"checkpoint": checkpoint, "progress": progress}
    run = Run(settings.computation, operator, kept, table=table, **options)
    engine = LanczosEngine(lanczos.init(direction, num_steps))
    run.bar.total = engine.state.num_steps

    def compute() -> None:
        for _ in run.drive(engine):
            pass

    def answer() -> SpectralMeasure:
        (tridiagonal,) = tridiagonals(engine.state)
        description = run.describe(norm=norm, num_steps=engine.num_done)
        return SpectralMeasure((gauss_rule(tridiagonal),), dimension, run.num_matvecs, description)

    return run.execute(compute, answer)
