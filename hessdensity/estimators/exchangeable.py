"""Exchangeable estimates of a trace, from the small matrices that the products give on the host.

k test vectors span a space in which the trace is computed exactly. The test vectors themselves
estimate the part outside of it. Each one tests the part that the k - 1 others leave out, and is
independent of this part. The k estimates are averaged (Epperly, Tropp and Webber 2024). So every
vector serves both tasks.

The space of the others is the whole space without a single direction, that of the dual vector d_i,
which is orthogonal to the span of the others. Leaving out a second vector is the same operation
within the space of the others. So the jackknife, which makes k estimates from k - 1 test vectors
each, costs O(k^3) in all.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import numpy as np

NEGATIVE = (
    "semidefinite=True, but a product shows the eigenvalue {:.3g} or a lower one; expected an "
    "operator without negative eigenvalues. Pass semidefinite=False (a Hessian is indefinite, its "
    "Gauss-Newton part is not)."
)


class Exchangeable(NamedTuple):
    """The estimate of a trace from k test vectors, in eigenvalue units."""

    value: float
    """The mean of the k leave-one-out estimates."""
    standard_error: float
    """The standard error of the value, by the jackknife."""
    size: float
    """Frobenius norm of the operator within the space. Rounding errors are relative to it."""


class _Space(NamedTuple):
    """The operator within the space of k test vectors, in an orthonormal basis of r vectors.

    Vectors are columns.
    """

    kept: float
    """The trace within the space."""
    left: int
    """The number of dimensions outside of the space of all test vectors but one."""
    dual: np.ndarray
    """(r, k): the dual vectors, or zeros if no direction is lost when one is left out."""
    image: np.ndarray
    """(r, k): the products of the compressed operator with the dual vectors."""

    def traces(self) -> np.ndarray:
        """(k,): the traces within the spaces of all test vectors but one."""
        return self.kept - _ratio((self.dual * self.image).sum(0), (self.dual**2).sum(0))

    def project(
        self, i: int, vectors: np.ndarray, images: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Project vectors and their products to the space without test vector i.

        There is one vector for each test vector. That of test vector i is left out.
        """
        length = np.linalg.norm(self.dual[:, i])
        direction = self.dual[:, i] / length
        image = self.image[:, i] / length
        along = np.delete(direction @ vectors, i)
        return (
            np.delete(vectors, i, axis=1) - np.outer(direction, along),
            np.delete(images, i, axis=1) - np.outer(image, along),
        )

    def without(self, i: int) -> _Space:
        """The space without test vector i."""
        lost = self.dual[:, i] @ self.image[:, i] / (self.dual[:, i] @ self.dual[:, i])
        return _Space(self.kept - lost, self.left + 1, *self.project(i, self.dual, self.image))


def from_range(
    forms: np.ndarray,
    products: np.ndarray,
    compression: np.ndarray,
    tests: np.ndarray,
    dimension: int,
    epsilon: float,
) -> Exchangeable:
    """XTrace, from products with k unit test vectors w_i, and with an orthonormal basis Q of these.

    Let Q_i be an orthonormal basis of the products with the other test vectors. Test vector i gives
    tr(Q_i^T A Q_i) + (N - k + 1) u^T A u / u^T u with u = w_i - Q_i Q_i^T w_i. This u is uniform on
    the sphere of the N - k + 1 dimensions that the others leave.

    Args:
      forms: (k,) w_i . A w_i.
      products: (r, k) Q^T A w_i, in columns.
      compression: (r, r) Q^T A Q.
      tests: (r, k) Q^T w_i, in columns.
      dimension: N.
      epsilon: relative error of the products. A direction that is not longer is rounding error.
    """
    count = forms.size
    axes, lengths, rows = np.linalg.svd(products, full_matrices=False)
    rank = int(np.sum(lengths > epsilon * lengths[0]))
    axes = axes[:, :rank]
    products = axes.T @ products
    tests = axes.T @ tests
    compression = axes.T @ compression @ axes
    compression = (compression + compression.T) / 2
    # If there are fewer directions than test vectors, the operator has no other directions, and
    # none is lost when a test vector is left out.
    dual = rows * (lengths[-1] / lengths)[:, None] if rank == count else np.zeros((rank, count))
    space = _Space(
        np.trace(compression), dimension - min(rank, count - 1), dual, compression @ dual
    )
    images = compression @ tests

    def estimates(
        space: _Space,
        forms: np.ndarray,
        products: np.ndarray,
        tests: np.ndarray,
        images: np.ndarray,
    ) -> np.ndarray:
        along = _ratio((space.dual * tests).sum(0), (space.dual**2).sum(0))
        inside = tests - space.dual * along
        image = images - space.image * along
        outside = forms - 2 * (inside * products).sum(0) + (inside * image).sum(0)
        return space.traces() + space.left * outside / (1 - (inside**2).sum(0))

    def without(i: int) -> np.ndarray:
        others = np.delete(forms, i), np.delete(products, i, axis=1)
        return estimates(space.without(i), *others, *space.project(i, tests, images))

    whole = estimates(space, forms, products, tests, images)
    return _jackknife(whole, without if rank == count else partial(np.delete, whole), compression)


def from_core(
    core: np.ndarray,
    gram: np.ndarray,
    products: np.ndarray,
    dimension: int,
    shift: float,
    rounding: float = 0.0,
) -> Exchangeable:
    """XNysTrace of a positive semi-definite operator, from products with k unit test vectors w_i.

    The Nystrom approximation A<W> = A W (W^T A W)^-1 W^T A represents the operator within the space
    of test vectors W. Let W_i be the other test vectors, and u the part of w_i orthogonal to them.
    Test vector i gives tr A<W_i> + (N - k + 1) u^T (A - A<W_i>) u / u^T u, where
    u^T (A - A<W_i>) u = 1 / ((W^T A W)^-1)_ii and u^T u = 1 / ((W^T W)^-1)_ii.

    Args:
      core: (k, k) W^T A W.
      gram: (k, k) W^T W.
      products: (r, k) the products A w_i in an orthonormal basis, in columns.
      dimension: N.
      shift: multiple of the identity that is added to the operator. The trace is corrected by N
        times as much. The shift must exceed the rounding error of ``core``. It is
        increased to twice the size of a negative Rayleigh quotient.
      rounding: size of a negative Rayleigh quotient that rounding of the products may cause.

    Raises:
      ValueError: a Rayleigh quotient among the test vectors is negative, by more than ``rounding``
        and more than half of the shift.
    """
    count = len(core)
    root = np.linalg.inv(np.linalg.cholesky(gram))
    values, axes = np.linalg.eigh(root @ core @ root.T)
    if values[0] < -max(shift / 2, rounding):
        raise ValueError(NEGATIVE.format(values[0]))
    shift = max(shift, -2 * values[0])
    # dual^T dual is the inverse of core + shift gram.
    dual = (axes / np.sqrt(values + shift)).T @ root
    half = products @ dual.T
    # The products with the shifted operator are taken in their basis. Their Gram matrix would be
    # too inaccurate.
    compression = half.T @ half + 2 * shift * np.eye(count) - shift**2 * dual @ gram @ dual.T
    space = _Space(np.trace(compression), dimension - count + 1, dual, compression @ dual)
    inverse = root.T @ root

    def estimates(space: _Space, inverse_lengths: np.ndarray) -> np.ndarray:
        return (
            space.traces()
            + space.left * inverse_lengths / (space.dual**2).sum(0)
            - shift * dimension
        )

    def without(i: int) -> np.ndarray:
        return estimates(
            space.without(i), np.delete(np.diag(inverse) - inverse[i] ** 2 / inverse[i, i], i)
        )

    return _jackknife(estimates(space, np.diag(inverse)), without, compression)


def _ratio(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """The quotients a / b, or 0 where b is 0."""
    return np.divide(a, b, out=np.zeros_like(a), where=b > 0)


def _jackknife(
    whole: np.ndarray, without: Callable[[int], np.ndarray], compression: np.ndarray
) -> Exchangeable:
    """The mean of the estimates, and its spread when each test vector is left out in turn.

    The spread of the estimates themselves would not do. They have all directions but one in common,
    so that their spread is too small where the spectrum decays fast, by a factor of up to four. The
    jackknife is too large instead, on average (Efron and Stein 1981), as is the error of k - 1 test
    vectors.
    """
    means = np.array([without(i).mean() for i in range(whole.size)])
    spread = (1 - 1 / whole.size) * np.sum((means - means.mean()) ** 2)
    return Exchangeable(
        float(whole.mean()), float(np.sqrt(spread)), float(np.linalg.norm(compression))
    )
