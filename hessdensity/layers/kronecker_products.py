"""The largest eigenvalues of a Kronecker product, from the largest ones of its factors."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

_DENSE = 1000  # up to this size, all eigenpairs of a factor are computed
_FIRST = 12  # pairs of a large factor that are computed at first


def top_products(
    left: np.ndarray, right: np.ndarray, k: int
) -> list[tuple[float, np.ndarray, np.ndarray]]:
    """The k largest products of eigenvalues of two symmetric matrices, and the eigenvectors.

    Of a large matrix, some of the largest eigenvalues are computed. They suffice if the smallest of
    them times the largest of the other matrix is at most the k-th product found. Otherwise twice as
    many are computed. So the result is certain.
    """
    k = min(k, left.shape[0] * right.shape[0])
    count = _FIRST
    while True:
        first, second = _pairs(left, count), _pairs(right, count)
        products = np.outer(first.values, second.values)
        order = np.argsort(products, axis=None)[::-1][:k]
        rows, columns = np.unravel_index(order, products.shape)
        found = [
            (float(products[i, j]), first.vectors[:, i], second.vectors[:, j])
            for i, j in zip(rows, columns, strict=True)
        ]
        if (
            len(found) == k
            and first.suffice(found[-1][0], second)
            and second.suffice(found[-1][0], first)
        ):
            return found
        count *= 2


class _Pairs(NamedTuple):
    """Eigenpairs of a factor: all of them, or the largest of a large one."""

    values: np.ndarray
    vectors: np.ndarray
    complete: bool

    def suffice(self, least: float, other: _Pairs) -> bool:
        """Whether no pair that is missing here has a product above ``least``."""
        if self.complete:
            return True
        # The values here are the largest in size.
        return bool(np.abs(self.values).min() * np.abs(other.values).max() <= least)


def _pairs(matrix: np.ndarray, count: int) -> _Pairs:
    """The largest eigenpairs of a factor, or all of them if it is small."""
    from scipy.sparse.linalg import eigsh

    size = len(matrix)
    if size <= _DENSE or count >= size // 4:
        values, vectors = np.linalg.eigh(matrix)
        return _Pairs(values, vectors, True)
    start = np.random.default_rng(0).standard_normal(size)  # so that every call gives the same
    values, vectors = eigsh(matrix, count, which="LM", v0=start)
    return _Pairs(values, vectors, False)
