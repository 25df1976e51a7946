"""The place of a gradient in the spectrum: its share in the top eigenspace, and its curvature."""

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
    """Compute the gradient of the mean loss over all N examples of the data.

    This is (1/N) times the sum of the gradients of all examples. It is the same as
    ``hd.Hessian(loss, params, data).gradient()``, in the same precision, so that it matches the
    eigenvectors of that Hessian.

    Args:
      loss: ``loss(params, batch)``, the mean over the batch's examples, or a `Total`.
      params: pytree of parameters.
      data: batches, as for `Hessian`. They are weighted by their number of examples.
      where: the leaves that form the vector, as for `Hessian`.
      precision: matrix-product precision, as for `Hessian`.
      data_axis: the mesh axis over which examples are split, as for `Hessian`.
      microbatch: the largest number of examples that go through the model together, as for
        `Hessian`.

    Returns:
      A pytree like the Hessian's ``like``: None at leaves that are held fixed, and float32 where
      the dtype of the parameters is shorter.

    Raises:
      TypeError, ValueError: as for `Hessian`.
      FloatingPointError: the gradient is not finite. The message names the batch.

    Cost: one pass over the data, with one gradient of each batch.

    Example:
      >>> import jax.numpy as jnp
      >>> loss = lambda w, batch: jnp.mean(jnp.sum(batch * w, axis=1) ** 2) / 2
      >>> data = [jnp.array([[1.0, 0.0], [0.0, 2.0]]), jnp.array([[0.0, 0.0]])]
      >>> print(3 * gradient(loss, jnp.ones(2), data))
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
    """Compute the share of a gradient's squared norm in the top eigenvectors.

    The share is c_k = sum over i <= k of (q_i.g)^2 / |g|^2. It is near 1 if the gradient lies in
    the top eigenspace, as in networks without batch normalization (Ghorbani, Krishnan and Xiao
    2019). It is k/n for a random direction.

    Args:
      gradient: one vector like those of the eigenspace, such as the result of `gradient`. It may be
        any other direction, such as an update or a difference of checkpoints.
      eigenspace: rank eigenvectors q_i. Shares are summed in its order, starting with the
        algebraically largest eigenvalue.

    Returns:
      (rank,) float64, ascending, in [0, 1]: the share in the first 1, 2, ..., rank directions.

    Raises:
      ValueError: the structure or a shape of ``gradient`` differs from that of the eigenvectors, or
        ``gradient`` is zero or not finite. Or the eigenvectors are not orthonormal, which they must
        be for shares.

    Cost: no products. It reads the eigenvectors twice.

    Example:
      >>> import numpy as np, hessdensity as hd
      >>> vectors = np.eye(4, dtype=np.float32)[:2]
      >>> space = hd.Eigenspace([3.0, 1.0], vectors, np.zeros(2), [True, True], 0)
      >>> direction = np.array([3.0, 4.0, 0.0, 0.0], np.float32)
      >>> gradient_concentration(direction, space).round(2).tolist()
      [0.36, 1.0]
    """
    direction, _ = unit(gradient, one_vector(eigenspace), "gradient")
    return shares(components(eigenspace, direction) ** 2, 1.0)


def rayleigh_quotient(operator: Operator, vector: Vector) -> float:
    """Compute the curvature along a vector, v.Hv / v.v, in eigenvalue units.

    Along the gradient, the curvature bounds the step size: gradient descent with learning rate eta
    decreases the quadratic model of the loss if and only if eta times the curvature is below 2.

    Args:
      operator: anything with ``like`` and ``@`` on blocks, such as a `Hessian`.
      vector: v, with the structure and shapes of ``operator.like``. Its length does not matter.

    Raises:
      ValueError: the structure or a shape of ``vector`` differs from that of ``operator.like``, or
        ``vector`` is zero or not finite.
      FloatingPointError: the product is not finite.

    Cost: one product.

    Example:
      >>> import numpy as np, hessdensity as hd
      >>> rayleigh_quotient(hd.Matrix(np.diag([1.0, 3.0])), np.ones(2))
      2.0
    """
    check(operator)
    direction, _ = unit(vector, operator.like, "vector")
    product, _ = trees.as_block(operator @ direction, operator.like, "the operator's product")
    # Divide by the squared length once more, because it is 1 only up to rounding.
    value = float(trees.inner(direction, product)[0]) / float(trees.inner(direction, direction)[0])
    if not np.isfinite(value):
        raise FloatingPointError(NOT_FINITE)
    return value
