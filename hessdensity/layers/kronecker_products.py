"""The largest eigenvalues of a Kronecker product, from the largest ones of its factors."""

from __future__ import annotations

import numpy as np

_DENSE = 1000  # up to this size, all eigenpairs of a factor are computed
_BLOCK = 32  # vectors by which the Krylov space of a large factor grows
CONVERGED = 1e-6
"""The largest residual of a known pair of a factor, as a share of its largest eigenvalue."""


def top_products(
    left: np.ndarray, right: np.ndarray, k: int
) -> list[tuple[float, np.ndarray, np.ndarray]]:
    """The k largest products of eigenvalues of two symmetric matrices, and the eigenvectors.

    Of a large matrix, only the eigenvalues of the largest size are computed. They suffice if the
    smallest of these sizes times the largest of the other matrix is at most the k-th product found.
    Otherwise more of them are computed. So the result is certain.

    Args:
      left: (n, n).
      right: (m, m).
      k: the number of products, clipped to n m.

    Returns:
      For each product, in descending order: its value, the eigenvector of ``left`` (n,), and that
      of ``right`` (m,).
    """
    k = min(k, left.shape[0] * right.shape[0])
    pair = _Factor(left), _Factor(right)
    while True:
        first, second = pair
        products = np.outer(first.values, second.values)
        order = np.argsort(products, axis=None)[::-1][:k]
        least = float(products.ravel()[order[-1]]) if len(order) == k else -np.inf
        short = [
            factor
            for factor, other in ((first, second), (second, first))
            if not factor.suffices(least, other)
        ]
        if not short:
            rows, columns = np.unravel_index(order, products.shape)
            u, v = first.vectors, second.vectors
            pairs = zip(rows, columns, strict=True)
            return [(float(products[i, j]), u[:, i], v[:, j]) for i, j in pairs]
        for factor in short:
            factor.extend()


class _Factor:
    """The eigenpairs of a symmetric matrix: all of them, or those of the largest size.

    Those of a large matrix come from block Lanczos without restarts: A Q = Q T + N R E^T, where E
    picks the newest block. A Ritz pair Q s has the residual |R E^T s|.
    """

    def __init__(self, matrix: np.ndarray) -> None:
        self._matrix = matrix
        self.complete = len(matrix) <= _DENSE
        self._basis = np.zeros((len(matrix), 0))
        self._small = np.zeros((0, 0))
        if self.complete:
            self.values, self._rotation = np.linalg.eigh(matrix)
            return
        start = np.random.default_rng(0).standard_normal((len(matrix), _BLOCK))
        self._next = np.linalg.qr(start)[0]
        self.values, self._rotation = np.zeros(0), self._small
        self.extend()

    @property
    def vectors(self) -> np.ndarray:
        """The eigenvectors that belong to ``values``, as columns."""
        return self._rotation if self.complete else self._basis @ self._rotation

    def suffices(self, least: float, other: _Factor) -> bool:
        """Whether no eigenvalue that is not known can give a product above ``least``."""
        if self.complete:
            return True
        if not self.values.size:
            return False
        return bool(np.abs(self.values).min() * np.abs(other.values).max(initial=0) <= least)

    def extend(self) -> None:
        """Make the Krylov space larger until more eigenpairs are known."""
        known = self.values.size
        while self.values.size <= known and not self.complete:
            size = self._basis.shape[1]
            wanted = max(4 * _BLOCK, size * 5 // 4)
            if 2 * wanted > len(self._matrix):
                self.values, self._rotation = np.linalg.eigh(self._matrix)
                self.complete = True
                return
            while self._basis.shape[1] < wanted:
                self._grow()
            self._solve()

    def _grow(self) -> None:
        """Add one block to the Krylov space."""
        before = self._basis.shape[1]
        self._basis = np.concatenate([self._basis, self._next], axis=1)
        rest = self._matrix @ self._next
        column = self._basis.T @ rest
        small = np.zeros((before + _BLOCK, before + _BLOCK))
        small[:before, :before] = self._small
        small[:, before:] = column
        small[before:] = column.T
        self._small = small
        for _ in range(2):
            rest = rest - self._basis @ (self._basis.T @ rest)
        self._next, self._coupling = np.linalg.qr(rest)

    def _solve(self) -> None:
        """Take the Ritz pairs of the largest sizes, down to the first that has not converged."""
        values, rotation = np.linalg.eigh(self._small)
        order = np.argsort(np.abs(values))[::-1]
        values, rotation = values[order], rotation[:, order]
        residuals = np.linalg.norm(self._coupling @ rotation[-_BLOCK:], axis=0)
        settled = residuals <= CONVERGED * np.abs(values[0])
        count = values.size if settled.all() else int(np.argmin(settled))
        self.values, self._rotation = values[:count], rotation[:, :count]
