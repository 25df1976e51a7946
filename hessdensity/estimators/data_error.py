"""Error bars of eigenvalues for the sampling of the data."""

from __future__ import annotations

from hessdensity.operators.hessian import Hessian
from hessdensity.spectra.eigenspace import Eigenspace
from hessdensity.spectra.estimate import DataEstimate, estimate_of_parts
from hessdensity.vectors import trees


def eigenvalue_data_error(hessian: Hessian, eigenspace: Eigenspace) -> DataEstimate:
    """Standard errors of eigenvalues due to the data, from a single pass over them.

    The Hessian is a mean over examples, H = sum over batches of w_b H_b, w_b = N_b / N. To first
    order in the change of the data an eigenvalue changes by v^T (change of H) v, v being its
    eigenvector, so that

        standard_error^2 = sum_b w_b (v^T H_b v - lambda)^2 / (B - 1),    lambda = sum_b w_b v^T H_b
        v,

    B being the number of batches. The second order, a bias, is the sum over other eigenvalues mu of
    (u^T change v)^2 / (lambda - mu): the first order stands alone where eigenvalues are further
    apart than their standard errors. Where they are not, their sum has an error still.
    `part_densities` needs no such condition, and costs more. For the gradient along the same
    eigenvectors see `gradient_covariance`.

    Args:
      hessian: a `Hessian` of at least two batches, of independent examples in random order.
      eigenspace: eigenpairs of it, from `top_eigenspace` or `spectral_density`.

    Returns:
      `DataEstimate` of shape (rank,), its value the Rayleigh quotients of the vectors, which are
      the eigenvalues where the eigenspace is of this Hessian; ``parts`` (B, rank), those of the
      batches. The more batches the better: ``lower`` and ``upper`` take a Student's t of B - 1
      degrees.

    Raises:
      TypeError: ``hessian`` is no `Hessian`.
      ValueError: the vectors are not like the Hessian's; fewer than two batches.
      RuntimeError: the data differ from those of the first pass.
      FloatingPointError: a product is not finite.

    Cost: rank products in one pass over the data. Memory: rank vectors.

    Source: the delta method on the perturbation of eigenvalues (Anderson 1963, for covariances).

    Example:
      >>> import jax, jax.numpy as jnp, numpy as np, hessdensity as hd
      >>> x = np.random.default_rng(0).standard_normal((400, 2)).astype(np.float32) * np.float32([3, 1])
      >>> hessian = hd.Hessian(lambda w, x: jnp.mean((x @ w) ** 2) / 2, jnp.zeros(2), hd.batches(x, 10))
      >>> space = hd.top_eigenspace(hessian, jax.random.key(0), 1, progress=False)
      >>> error = eigenvalue_data_error(hessian, space).standard_error[0]
      >>> bool(0.7 < error / (9 * np.sqrt(2 / 400)) < 1.3)  # the textbook's, for the variance of a Gaussian
      True
    """
    if not isinstance(hessian, Hessian):
        raise TypeError(
            f"hessian is a {type(hessian).__name__}; expected hd.Hessian(loss, params, data)."
        )
    block, _ = trees.as_block(eigenspace.vectors, hessian.like, "eigenspace.vectors")
    forms, counts = hessian.forms_by_batch(block)
    if len(counts) < 2:
        raise ValueError(
            f"data hold {len(counts)} batch with any example; expected two at least, which can "
            "differ: cut them with hd.batches(arrays, batch_size)."
        )
    weights = counts / counts.sum()
    value = weights @ forms
    variance = weights @ (forms - value) ** 2 / (len(counts) - 1)
    return estimate_of_parts(value, variance, variance, forms)
