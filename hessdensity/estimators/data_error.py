"""Error bars of eigenvalues due to the sample of data."""

from __future__ import annotations

from hessdensity.operators.hessian import Hessian
from hessdensity.spectra.eigenspace import Eigenspace
from hessdensity.spectra.estimate import DataEstimate, estimate_of_parts
from hessdensity.vectors import trees


def eigenvalue_data_error(hessian: Hessian, eigenspace: Eigenspace) -> DataEstimate:
    """Compute standard errors of eigenvalues due to the data, from a single pass over the data.

    The Hessian is a mean over examples, H = sum over batches of w_b H_b with w_b = N_b / N. Let v
    be the eigenvector of an eigenvalue. To first order in the change of the data, the eigenvalue
    changes by v^T (change of H) v, so that

        standard_error^2 = sum_b w_b (v^T H_b v - lambda)^2 / (B - 1),
        lambda = sum_b w_b v^T H_b v,

    where B is the number of batches. The second order is a bias, the sum of
    (u^T (change of H) v)^2 / (lambda - mu) over the other eigenvalues mu, with eigenvectors u. It
    is negligible where eigenvalues are further apart than their standard errors. Where they are
    not, the error of their sum is still correct. `part_densities` needs no such condition, but
    costs more. For the gradient along the same eigenvectors, see `gradient_covariance`.

    Args:
      hessian: a `Hessian` of at least two batches, of independent examples in random order.
      eigenspace: eigenpairs of this Hessian, from `top_eigenspace` or `spectral_density`.

    Returns:
      `DataEstimate` of shape (rank,). The value is the Rayleigh quotients of the vectors, which are
      the eigenvalues if the eigenspace is that of this Hessian. ``parts`` (B, rank) has the
      Rayleigh quotients of the batches. More batches are better, because ``lower`` and ``upper``
      use Student's t with B - 1 degrees of freedom.

    Raises:
      TypeError: ``hessian`` is not a `Hessian`.
      ValueError: the vectors do not match those of the Hessian, or there are fewer than two
        batches.
      RuntimeError: the data differ from those of the first pass.
      FloatingPointError: a product is not finite.

    Cost: rank products in one pass over the data. Memory: rank vectors.

    Source: the delta method on the perturbation of eigenvalues (Anderson 1963, for covariances).

    Example:
      >>> import jax, jax.numpy as jnp, numpy as np, hessdensity as hd
      >>> x = np.random.default_rng(0).standard_normal((400, 2)).astype(np.float32)
      >>> x *= np.float32([3, 1])
      >>> loss = lambda w, x: jnp.mean((x @ w) ** 2) / 2
      >>> hessian = hd.Hessian(loss, jnp.zeros(2), hd.batches(x, 10))
      >>> space = hd.top_eigenspace(hessian, jax.random.key(0), 1, progress=False)
      >>> error = eigenvalue_data_error(hessian, space).standard_error[0]
      >>> textbook = 9 * np.sqrt(2 / 400)  # for the variance of a Gaussian
      >>> bool(0.7 < error / textbook < 1.3)
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
            f"data hold {len(counts)} batch with examples; expected at least two, which can "
            "differ. Cut the data into more batches with hd.batches(arrays, batch_size)."
        )
    weights = counts / counts.sum()
    value = weights @ forms
    variance = weights @ (forms - value) ** 2 / (len(counts) - 1)
    return estimate_of_parts(value, variance, variance, forms)
