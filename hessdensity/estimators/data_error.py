"""Error bars for the sampling of the data: how far would a number change with other data from the
same source?"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from hessdensity.data.passes import Report
from hessdensity.operators.derivatives import group_size
from hessdensity.operators.hessian import Hessian
from hessdensity.spectra.eigenspace import Eigenspace
from hessdensity.spectra.estimate import Estimate
from hessdensity.vectors import trees as _trees

PyTree = Any


@dataclass(frozen=True, eq=False)
class DataEstimate(Estimate):
    """An estimate whose error is that of the sample of data: how far it would vary from one data
    set to the next."""

    parts: np.ndarray
    """(J, ...) the estimate from each part of the data alone."""
    bias: Any = None
    """How far the whole data's value is off for having finitely many examples, to first order in
    one over their number; None where it is not known. Too few data overrate the outliers."""


def estimate_of_parts(
    value: np.ndarray,
    variance: np.ndarray,
    spread: np.ndarray,
    parts: np.ndarray,
    bias: np.ndarray | None = None,
) -> DataEstimate:
    """What J parts (J, ...) make of a value: ``spread`` is the variance, not smaller, that the
    interval is to cover."""
    from scipy.special import stdtrit

    reach = stdtrit(len(parts) - 1, 0.975) * np.sqrt(spread)
    number: Any = float if np.ndim(value) == 0 else np.asarray
    return DataEstimate(
        value=number(value),
        standard_error=number(np.sqrt(variance)),
        lower=number(value - reach),
        upper=number(value + reach),
        parts=parts,
        bias=None if bias is None else number(bias),
    )


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

    Returns: `DataEstimate` of shape (rank,), its value the Rayleigh quotients of the vectors, which
      are the eigenvalues where the eigenspace is of this Hessian; ``parts`` (B, rank), those of the
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
      >>> import hessdensity as hd
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
    block, _ = _trees.as_block(eigenspace.vectors, hessian.like, "eigenspace.vectors")
    mode = hessian.mode
    try:
        forms, counts = _forms(hessian, block)
    except TypeError:
        hessian @ _trees.first_vector(
            block
        )  # finds the mode of differentiation that the model allows, or raises
        if hessian.mode == mode:
            raise
        forms, counts = _forms(hessian, block)
    if len(counts) < 2:
        raise ValueError(
            f"data hold {len(counts)} batch with any example; expected two at least, which can "
            "differ: cut them with hd.batches(arrays, batch_size)."
        )
    weights = counts / counts.sum()
    value = weights @ forms
    variance = weights @ (forms - value) ** 2 / (len(counts) - 1)
    return estimate_of_parts(value, variance, variance, forms)


def _forms(hessian: Hessian, block: PyTree) -> tuple[np.ndarray, np.ndarray]:
    """v.Hv for the Hessian of each batch that holds examples, (batches, k), and the numbers of
    examples, (batches,)."""
    groups = _trees.split(block, group_size(hessian.like))

    def step(forms: list[Any], index: int, piece: PyTree) -> tuple[list[Any], Report]:
        zeros = [jax.tree.map(jnp.zeros_like, group) for group in groups]
        products, report = hessian._add(groups, zeros, piece, hessian.mode)
        return [
            *forms,
            (index, [_inner(*pair) for pair in zip(groups, products, strict=True)]),
        ], report

    sums, reports = hessian._pass(step, [], partial(hessian._spread, groups[0], hessian.mode))
    counts = np.array([report.count.item() for report in reports], float)
    forms = np.zeros((len(reports), jax.tree.leaves(block)[0].shape[0]))
    for index, row in jax.device_get(sums):
        forms[index] += np.concatenate(row)
    return (forms / np.where(counts > 0, counts, 1)[:, None])[counts > 0], counts[counts > 0]


_inner = jax.jit(_trees.inner)
