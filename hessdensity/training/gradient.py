"""Where a gradient lies: in the top eigenspace, and over the whole spectrum."""

from __future__ import annotations

import logging
import time
from importlib.metadata import version
from typing import Any

import jax
import numpy as np

from hessdensity.krylov import lanczos
from hessdensity.losses.total import Loss
from hessdensity.operators.hessian import Hessian
from hessdensity.operators.protocol import Operator, check, describe
from hessdensity.runs.progress import make_bar
from hessdensity.spectra.density import SpectralDensity
from hessdensity.spectra.eigenspace import Eigenspace
from hessdensity.spectra.projection import components, one_vector, shares, unit
from hessdensity.spectra.quadrature import Tridiagonal, gauss_rule
from hessdensity.vectors import trees as _trees
from hessdensity.vectors.selection import Where

PyTree = Any
logger = logging.getLogger("hessdensity")

_inner = jax.jit(_trees.inner)


def gradient(
    loss: Loss, params: PyTree, data: Any, *, where: Where = None, precision: str | None = "highest"
) -> PyTree:
    """The gradient of the mean loss over all examples of the data: (1/N) sum over examples of their
    gradients.

    The same as ``hd.Hessian(loss, params, data).gradient()``, in the same precision, so that it
    belongs to the eigenvectors of that Hessian.

    Args:
      loss: ``loss(params, batch)``, the mean over the batch's examples, or `Total`.
      params: pytree of parameters.
      data: batches, as for `Hessian`; uneven ones are weighted as they should.
      where: the leaves that form the vector, as for `Hessian`.
      precision: matrix-product precision, as for `Hessian`.

    Returns: A pytree like the Hessian's ``like``: None at held leaves, float32 where the parameters
      are shorter.

    Raises:
      TypeError, ValueError: as `Hessian`.
      FloatingPointError: the gradient is not finite; names the batch.

    Cost: one pass over the data, one gradient a batch.

    Example:
      >>> import jax.numpy as jnp
      >>> loss = lambda w, batch: jnp.mean(jnp.sum(batch * w, axis=1) ** 2) / 2
      >>> print(3 * gradient(loss, jnp.ones(2), [jnp.array([[1.0, 0.0], [0.0, 2.0]]), jnp.array([[0.0, 0.0]])]))
      [1. 4.]
    """
    return Hessian(loss, params, data, where=where, precision=precision).gradient()


def gradient_concentration(gradient: PyTree, eigenspace: Eigenspace) -> np.ndarray:
    """Share of a gradient's squared norm in the top eigenvectors: c_k = sum over i <= k of
    (q_i.g)^2 / |g|^2.

    Near 1 where the gradient lies in the top eigenspace, as in networks without batch normalisation
    (Ghorbani, Krishnan and Xiao 2019); k/n for a random direction.

    Args: gradient: one vector like those of the eigenspace, such as `gradient` gives; or any other
      direction, an update
        or a difference of checkpoints.
      eigenspace: rank eigenvectors q_i. Shares add up in its order, from the algebraically largest
        eigenvalue down.

    Returns:
      (rank,) float64, ascending, in [0, 1]: the share in the first 1, 2, ..., rank directions.

    Raises: ValueError: another structure or shape than the eigenvectors'; a gradient that is zero
      or not finite;
        eigenvectors that are not orthonormal, which a share needs.

    Cost: no product; reads the eigenvectors twice.

    Example:
      >>> import hessdensity as hd
      >>> space = hd.Eigenspace([3.0, 1.0], np.eye(4, dtype=np.float32)[:2], np.zeros(2), [True, True], 0)
      >>> gradient_concentration(np.array([3.0, 4.0, 0.0, 0.0], np.float32), space).round(2).tolist()
      [0.36, 1.0]
    """
    direction, _ = unit(gradient, one_vector(eigenspace), "gradient")
    return shares(components(eigenspace, direction) ** 2, 1.0)


def rayleigh_quotient(operator: Operator, vector: PyTree) -> float:
    """The curvature along a vector: v.Hv / v.v, in eigenvalue units.

    Along the gradient it bounds the step: gradient descent of rate eta lowers the quadratic model
    of the loss exactly where eta times it is below 2.

    Args:
      operator: anything with ``like`` and ``@`` on blocks, such as a `Hessian`.
      vector: like ``operator.like``, of any length.

    Raises: ValueError: another structure or shape than ``operator.like``; a vector that is zero or
      not finite. FloatingPointError: the product is not finite.

    Cost: one product.

    Example:
      >>> import hessdensity as hd
      >>> rayleigh_quotient(hd.Matrix(np.diag([1.0, 3.0])), np.ones(2))
      2.0
    """
    check(operator)
    direction, _ = unit(vector, operator.like, "vector")
    product, _ = _trees.as_block(operator @ direction, operator.like, "the operator's product")
    # The length again, for it is 1 to rounding only.
    value = float(_inner(direction, product)[0]) / float(_inner(direction, direction)[0])
    if not np.isfinite(value):
        raise FloatingPointError(
            "the operator's product is not finite. Look for overflow, or for log(0) and 0/0."
        )
    return value


def spectral_measure(
    operator: Operator, vector: PyTree, num_steps: int = 60, *, progress: bool = True
) -> SpectralDensity:
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
      progress: show a bar of products done on standard error.

    Returns: `SpectralDensity` with ``given=True``: standard errors are zero, ``lower`` and
      ``upper`` hold the quadrature's error. It plots beside the density of eigenvalues. After
      Ctrl-C the one that the steps done so far give: ``description["stopped"]`` says so.

    Raises: ValueError: another structure or shape than ``operator.like``; a vector that is zero or
      not finite; num_steps < 1;
        the operator turns out not to be symmetric.
      lanczos.NonFiniteProduct: a product is not finite; its ``partial`` is the measure from the
      steps before, if any.

    Cost: num_steps products, each a pass over the data. Memory: num_steps + 4 vectors.

    Example:
      >>> import hessdensity as hd
      >>> measure = spectral_measure(hd.Matrix(np.diag([1.0, 2.0, 9.0])), np.array([3.0, 0.0, 4.0]), progress=False)
      >>> print(f"{measure.cdf(5.0).value:.2f} of the square at 1, Rayleigh quotient {measure.moment(1).value:.2f}")
      0.36 of the square at 1, Rayleigh quotient 6.12
    """
    if not isinstance(num_steps, int | np.integer) or num_steps < 1:
        raise ValueError(f"num_steps={num_steps!r}, expected a whole number of at least 1.")
    began, stopped = time.perf_counter(), None
    check(operator)
    direction, length = unit(vector, operator.like, "vector")
    last = lanczos.init(direction, num_steps)

    def answer() -> SpectralDensity:
        (diagonal,), (off_diagonal,), (noise,) = last.diagonal, last.off_diagonal, last.noise
        description = {
            "operator": describe(operator),
            "norm": length,
            "num_steps": diagonal.size,
            "seconds": time.perf_counter() - began,
            "stopped": stopped,
            "versions": {package: version(package) for package in ("hessdensity", "jax", "numpy")},
        }
        rule = gauss_rule(Tridiagonal(diagonal, off_diagonal, noise=noise))
        return SpectralDensity(
            (rule,), _trees.size(operator.like), diagonal.size, description, given=True
        )

    with make_bar("spectral measure", last.num_steps, progress) as bar:
        try:
            for state in lanczos.iterate(operator, last):
                last = state
                bar.update()
        except lanczos.NonFiniteProduct as error:
            error.partial = answer() if last.diagonal.size else None
            raise
        except KeyboardInterrupt:
            if not last.diagonal.size:
                raise
            stopped = f"interrupted after {last.diagonal.size} products"
            logger.warning(
                "spectral_measure: %s; this is the measure from the products done.", stopped
            )
    return answer()
