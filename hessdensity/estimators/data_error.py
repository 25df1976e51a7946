"""Error bars of eigenvalues due to the sample of data."""

from __future__ import annotations

import numpy as np

from hessdensity.operators.hessian import Hessian
from hessdensity.spectra.eigenspace import Eigenspace
from hessdensity.spectra.estimate import Bias, DataEstimate, Reach, estimate_of_parts
from hessdensity.vectors import trees
from hessdensity.vectors.basis import chunks_of, coefficients
from hessdensity.vectors.trees import Block

_PARTS = 4  # parts of the data, whose difference shows the couplings
_TOGETHER = 8  # eigenvectors that go through the data together, once for each part


def eigenvalue_data_error(hessian: Hessian, eigenspace: Eigenspace) -> DataEstimate:
    """Compute standard errors of eigenvalues due to the data, from a single pass over the data.

    The Hessian is a mean over examples, H = sum over batches of w_b H_b with w_b = N_b / N. Let v
    be the eigenvector of an eigenvalue. To first order in the change of the data, the eigenvalue
    changes by v^T (change of H) v, so that

        standard_error^2 = sum_b w_b (v^T H_b v - lambda)^2 / (B - 1),
        lambda = sum_b w_b v^T H_b v,

    where B is the number of batches.

    The second order is a bias, the sum of (u^T (change of H) v)^2 / (lambda - mu) over the other
    eigenvalues mu, with eigenvectors u. Outliers come out too large, and the more so the more
    parameters there are for each example. A second pass measures the size of the coupling,
    c^2 = sum over u of (u^T (change of H) v)^2, from the difference between four parts of the data.
    The interval includes every bias up to a bound (``bias_range``):

    - An eigenvector u of ``eigenspace`` moves lambda by sqrt(g^2 / 4 + c_u^2) - g / 2 at most, as a
      matrix with two eigenvalues does, where g is their distance.
    - All others together move it by 4 c^2 / (g + 2 c), where g is the distance to the nearest value
      that one of them may have. This is 2 c for g = 0, as at the edge of a semicircle, and four
      times the second order for large g.

    So the interval also holds for eigenvalues close to each other. The distance g is unknown for
    the last of the eigenvalues, which makes its interval wide: find one eigenvalue more than you
    need. The other eigenvalues are taken to lie where the ``which`` of `top_eigenspace` says. For
    the gradient along the same eigenvectors, see `gradient_covariance`.

    Args:
      hessian: a `Hessian` of at least two batches, of independent examples in random order.
      eigenspace: eigenpairs of this Hessian, from `top_eigenspace` or `spectral_density`.

    Returns:
      `DataEstimate` of shape (rank,). The value is the Rayleigh quotients of the vectors, which are
      the eigenvalues if the eigenspace is that of this Hessian. It is not corrected for the bias.
      ``parts`` (B, rank) has the Rayleigh quotients of the batches. More batches are better:
      the interval uses Student's t with B - 1 degrees of freedom.

    Raises:
      TypeError: ``hessian`` is not a `Hessian`.
      ValueError: the vectors do not match those of the Hessian, or there are fewer than two
        batches.
      RuntimeError: the data differ from those of the first pass, or come in another order.
      FloatingPointError: a product is not finite.

    Cost: 2 rank products, in 1 + rank / 8 passes over the data. Memory: rank + 64 vectors.

    Source: the delta method on the perturbation of eigenvalues (Anderson 1963, for covariances).
      The bounds of the bias are ours (``benchmarks/data_bounds.py``).

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
    residuals = np.asarray(eigenspace.residuals, float)
    reach = Reach(residuals, residuals)
    which = eigenspace.description.get("which", "LM")
    bias = _bias(hessian, block, value, residuals, min(_PARTS, len(counts)), which)
    return estimate_of_parts(value, variance, variance, forms, reach, bias)


def _bias(
    hessian: Hessian,
    block: Block,
    values: np.ndarray,
    residuals: np.ndarray,
    num_parts: int,
    which: str,
) -> Bias:
    """The bounds of the second order, from the products with parts of the data."""
    squares, rest = _couplings(hessian, block, residuals, num_parts)
    gaps = values[:, None] - values
    size = np.sqrt(gaps**2 + 4 * squares)
    moves = 2 * _ratio(squares, np.abs(gaps) + size)
    # Eigenvalues below push lambda up, and those above push it down.
    up = np.where(gaps > 0, moves, 0).sum(axis=1)
    down = np.where(gaps < 0, moves, 0).sum(axis=1)
    boundary = {
        "LA": np.full(values.shape, values.min()),
        "SA": np.full(values.shape, values.max()),
        "LM": np.sign(values) * np.abs(values).min(),
    }[which]
    gap = np.abs(values - boundary)
    move = 4 * _ratio(rest, gap + 2 * np.sqrt(rest))
    others_below = values >= 0 if which == "LM" else np.full(values.shape, which == "LA")
    up += np.where(others_below, move, 0)
    down += np.where(others_below, 0, move)
    return Bias(None, -down, up)


def _couplings(
    hessian: Hessian, block: Block, residuals: np.ndarray, num_parts: int
) -> tuple[np.ndarray, np.ndarray]:
    """The mean squares of what the change of H couples each vector with, for all of the data.

    Returns:
      (rank, rank) the squares of u^T (change of H) v for the vectors u of the block, 0 for u = v.
      (rank,) the sum of the squares for all other u.
    """
    squares = []
    sums = []
    for group in trees.split(block, _TOGETHER):
        product, numbers = hessian.multiply_parts(trees.join([group] * num_parts), num_parts)
        # The mean over the parts is H v, which has no component but lambda v and the residual. So
        # the parts' other components are their deviations.
        weights = np.array(numbers, float) / np.sum(numbers) / (num_parts - 1)
        along = coefficients(chunks_of(block), product)[:, : trees.count(block)]
        along = along.reshape(num_parts, trees.count(group), -1)
        lengths = np.asarray(trees.norm(product), float).reshape(num_parts, -1)
        squares.append(np.tensordot(weights, along**2, axes=1))
        sums.append(weights @ lengths**2)
    inside = np.concatenate(squares)
    rest = np.concatenate(sums) - inside.sum(axis=1) - residuals**2 / (num_parts - 1)
    np.fill_diagonal(inside, 0)
    return inside, np.maximum(rest, 0)


def _ratio(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """The quotients a / b, or 0 where b is 0."""
    return np.divide(a, b, out=np.zeros_like(a), where=b > 0)
