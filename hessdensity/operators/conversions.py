"""Conversion of an operator to a dense matrix, and to a SciPy operator."""

from __future__ import annotations

from typing import Any

import numpy as np

from hessdensity.vectors import trees

from .protocol import Operator


def dense(operator: Operator, *, block_size: int = 64, max_size: int = 20_000) -> np.ndarray:
    """The whole matrix (n, n) in float64 on the host, with the leaves in tree order.

    Args:
      operator: any operator.
      block_size: the number of vectors multiplied together.
      max_size: the largest n accepted.

    Raises:
      ValueError: n > ``max_size``.

    Cost: n products and n^2 entries of memory, so this is for small n.

    Example:
      >>> import hessdensity as hd
      >>> dense(hd.Matrix(np.diag([1.0, 2.0]))).tolist()
      [[1.0, 0.0], [0.0, 2.0]]
    """
    n = trees.size(operator.like)
    if n > max_size:
        raise ValueError(
            f"operator has n = {n:,}, but max_size={max_size:,}. The dense matrix would take "
            f"{8e-9 * n * n:.3g} GB and {n:,} products. Use hd.spectral_density, or pass a larger "
            "max_size."
        )
    rows = [np.eye(min(block_size, n - start), n, start) for start in range(0, n, block_size)]
    return np.concatenate(
        [trees.ravel(operator @ trees.unravel(part, operator.like)) for part in rows]
    ).astype(float)


def to_scipy(operator: Operator) -> Any:
    """The operator as a SciPy operator on flat vectors, with the leaves in tree order.

    Returns:
      A ``scipy.sparse.linalg.LinearOperator`` of shape (n, n).

    Example:
      >>> import hessdensity as hd
      >>> to_scipy(hd.Matrix(np.diag([1.0, 2.0]))).matvec(np.ones(2)).tolist()
      [1.0, 2.0]
    """
    from scipy.sparse.linalg import LinearOperator

    like = operator.like
    n = trees.size(like)

    def matmat(columns: np.ndarray) -> np.ndarray:
        return trees.ravel(operator @ trees.unravel(columns.reshape(n, -1).T, like)).T

    def matvec(vector: np.ndarray) -> np.ndarray:
        return matmat(vector)[:, 0]

    dtype = trees.scalar_dtype(like)
    return LinearOperator((n, n), matvec=matvec, matmat=matmat, rmatvec=matvec, dtype=dtype)
