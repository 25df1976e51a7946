"""From an operator to a dense matrix, and to SciPy."""

from __future__ import annotations

from typing import Any

import numpy as np

from hessdensity.vectors import trees

from .protocol import Operator


def dense(operator: Operator, *, block_size: int = 64, max_size: int = 20_000) -> np.ndarray:
    """The whole matrix, (n, n) float64 on the host, leaves in tree order. n products, for small n.

    Args:
      operator: any operator.
      block_size: vectors a product.
      max_size: the largest n accepted.

    Raises:
      ValueError: n > max_size.

    Example:
      >>> dense(Matrix(np.diag([1.0, 2.0]))).tolist()
      [[1.0, 0.0], [0.0, 2.0]]
    """
    n = trees.size(operator.like)
    if n > max_size:
        raise ValueError(
            f"operator has n = {n:,}: the dense matrix takes {8e-9 * n * n:.3g} GB and {n:,} "
            "products. Use hd.spectral_density, or pass max_size= to insist."
        )
    rows = [np.eye(min(block_size, n - start), n, start) for start in range(0, n, block_size)]
    return np.concatenate(
        [trees.ravel(operator @ trees.unravel(part, operator.like)) for part in rows]
    ).astype(float)


def to_scipy(operator: Operator) -> Any:
    """The operator as a ``scipy.sparse.linalg.LinearOperator`` on flat vectors, leaves in tree
    order.

    Example:
      >>> to_scipy(Matrix(np.diag([1.0, 2.0]))).matvec(np.ones(2)).tolist()
      [1.0, 2.0]
    """
    from scipy.sparse.linalg import LinearOperator

    n, like = trees.size(operator.like), operator.like

    def matmat(columns: np.ndarray) -> np.ndarray:
        return trees.ravel(operator @ trees.unravel(columns.reshape(n, -1).T, like)).T

    def matvec(vector: np.ndarray) -> np.ndarray:
        return matmat(vector)[:, 0]

    dtype = trees.scalar_dtype(like)
    return LinearOperator((n, n), matvec=matvec, matmat=matmat, rmatvec=matvec, dtype=dtype)
