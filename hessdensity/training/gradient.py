"""Where a gradient lies: in the top eigenspace, and along which curvature."""

from __future__ import annotations

from typing import Any

import numpy as np

from hessdensity.errors import NOT_FINITE
from hessdensity.losses.risk import EmpiricalRisk
from hessdensity.losses.total import Loss
from hessdensity.operators.protocol import Operator, check
from hessdensity.spectra.eigenspace import Eigenspace
from hessdensity.spectra.subspaces import components, one_vector, shares, unit
from hessdensity.vectors import trees
from hessdensity.vectors.selection import Where
from hessdensity.vectors.trees import PyTree, Vector


def gradient(
    loss: Loss,
    params: PyTree,
    data: Any,
    *,
    where: Where = None,
    precision: str | None = "highest",
    data_axis: str | None = "data",
    microbatch: int | None = None,
) -> Vector:
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
      data_axis: the mesh axis over which examples are split, as for `Hessian`.
      microbatch: the most examples that go through the model at once, as for `Hessian`.

    Returns:
      A pytree like the Hessian's ``like``: None at held leaves, float32 where the parameters are
      shorter.

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
    risk = EmpiricalRisk(
        loss,
        params,
        data,
        where=where,
        precision=precision,
        data_axis=data_axis,
        microbatch=microbatch,
    )
    return risk.gradient()


def gradient_concentration(gradient: Vector, eigenspace: Eigenspace) -> np.ndarray:
    """Share of a gradient's squared norm in the top eigenvectors: c_k = sum over i <= k of
    (q_i.g)^2 / |g|^2.

    Near 1 where the gradient lies in the top eigenspace, as in networks without batch normalization
    (Ghorbani, Krishnan and Xiao 2019); k/n for a random direction.

    Args:
      gradient: one vector like those of the eigenspace, such as `gradient` gives; or any other
        direction, an update or a difference of checkpoints.
      eigenspace: rank eigenvectors q_i. Shares add up in its order, from the algebraically largest
        eigenvalue down.

    Returns:
      (rank,) float64, ascending, in [0, 1]: the share in the first 1, 2, ..., rank directions.

    Raises:
      ValueError: another structure or shape than the eigenvectors'; a gradient that is zero or not
        finite; eigenvectors that are not orthonormal, which a share needs.

    Cost: no product; reads the eigenvectors twice.

    Example:
      >>> import hessdensity as hd
      >>> space = hd.Eigenspace([3.0, 1.0], np.eye(4, dtype=np.float32)[:2], np.zeros(2), [True, True], 0)
      >>> gradient_concentration(np.array([3.0, 4.0, 0.0, 0.0], np.float32), space).round(2).tolist()
      [0.36, 1.0]
    """
    direction, _ = unit(gradient, one_vector(eigenspace), "gradient")
    return shares(components(eigenspace, direction) ** 2, 1.0)


def rayleigh_quotient(operator: Operator, vector: Vector) -> float:
    """The curvature along a vector: v.Hv / v.v, in eigenvalue units.

    Along the gradient it bounds the step: gradient descent of rate eta lowers the quadratic model
    of the loss exactly where eta times it is below 2.

    Args:
      operator: anything with ``like`` and ``@`` on blocks, such as a `Hessian`.
      vector: like ``operator.like``, of any length.

    Raises:
      ValueError: another structure or shape than ``operator.like``; a vector that is zero or not
        finite.
      FloatingPointError: the product is not finite.

    Cost: one product.

    Example:
      >>> import hessdensity as hd
      >>> rayleigh_quotient(hd.Matrix(np.diag([1.0, 3.0])), np.ones(2))
      2.0
    """
    check(operator)
    direction, _ = unit(vector, operator.like, "vector")
    product, _ = trees.as_block(operator @ direction, operator.like, "the operator's product")
    # The length again, for it is 1 to rounding only.
    value = float(trees.inner(direction, product)[0]) / float(trees.inner(direction, direction)[0])
    if not np.isfinite(value):
        raise FloatingPointError(NOT_FINITE)
    return value
