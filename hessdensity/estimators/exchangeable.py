"""Exchangeable estimates of a trace, from the small matrices that the products leave on the host.

k test vectors span a space in which the trace is taken exactly. What lies outside is seen by the
test vectors themselves: each one tests what the k - 1 others leave, of which it is independent, and
the k estimates are averaged (Epperly, Tropp and Webber 2024). No vector is spent on one task alone.

The space of the others is the whole one without a single direction, that of the dual vector d_i:
orthogonal to all that the others span. Leaving out a second one is the same again, within the
others' space. So the jackknife, k estimates from k - 1 test vectors each, costs O(k^3) in all."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import numpy as np

NEGATIVE = (
    "semidefinite=True, but a product shows the eigenvalue {:.3g} or a lower one; expected an "
    "operator without negative eigenvalues. Leave semidefinite=False (a Hessian is indefinite, its "
    "Gauss-Newton part is not)."
)


class Exchangeable(NamedTuple):
    """A trace as k test vectors estimate it, in the units of eigenvalues."""

    value: float
    """The mean of the k leave-one-out estimates."""
    standard_error: float
    """By the jackknife."""
    size: float
    """Frobenius norm of the operator within the space: what rounding is relative to."""


class _Space(NamedTuple):
    """What k test vectors know of a space of r dimensions, in an orthonormal basis of it; vectors
    are columns."""

    kept: float
    """The trace within the space."""
    left: int
    """Dimensions outside of the space of all test vectors but one."""
    dual: np.ndarray
    """(r, k) dual vectors, or zeros where no direction is lost with a test vector."""
    image: np.ndarray
    """(r, k) the compressed operator's products with them."""

    def traces(self) -> np.ndarray:
        """(k,) traces within the spaces of all test vectors but one."""
        return self.kept - _ratio((self.dual * self.image).sum(0), (self.dual**2).sum(0))

    def project(
        self, i: int, vectors: np.ndarray, images: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Vectors, one a test vector, and their products, of the others alone and in the others'
        space."""
        length = np.linalg.norm(self.dual[:, i])
        direction, image = self.dual[:, i] / length, self.image[:, i] / length
        along = np.delete(direction @ vectors, i)
        return (
            np.delete(vectors, i, axis=1) - np.outer(direction, along),
            np.delete(images, i, axis=1) - np.outer(image, along),
        )

    def without(self, i: int) -> _Space:
        """The space of the others."""
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
    """XTrace, from products with k test vectors w_i of length 1, and with an orthonormal basis Q of
    these products.

    Test vector i gives tr(Q_i^T A Q_i) + (N - k + 1) u^T A u / u^T u, u = w_i - Q_i Q_i^T w_i, Q_i
    being a basis of the products with the others. u is uniform on the sphere of what they leave, of
    N - k + 1 dimensions.

    Args:
      forms: (k,) w_i . A w_i.
      products: (r, k) Q^T A w_i, in columns.
      compression: (r, r) Q^T A Q.
      tests: (r, k) Q^T w_i, in columns.
      dimension: N.
      epsilon: relative error of the products; a direction no longer than that is none.
    """
    count = forms.size
    axes, lengths, rows = np.linalg.svd(products, full_matrices=False)
    rank = int(np.sum(lengths > epsilon * lengths[0]))
    axes = axes[:, :rank]
    products, tests, compression = axes.T @ products, axes.T @ tests, axes.T @ compression @ axes
    compression = (compression + compression.T) / 2
    # Fewer directions than test vectors: the operator has no others, and none is lost with a test
    # vector.
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
        inside, image = tests - space.dual * along, images - space.image * along
        outside = forms - 2 * (inside * products).sum(0) + (inside * image).sum(0)
        return space.traces() + space.left * outside / (1 - (inside**2).sum(0))

    def without(i: int) -> np.ndarray:
        others = np.delete(forms, i), np.delete(products, i, axis=1)
        return estimates(space.without(i), *others, *space.project(i, tests, images))

    whole = estimates(space, forms, products, tests, images)
    return _jackknife(whole, without if rank == count else partial(np.delete, whole), compression)


def from_core(
    core: np.ndarray, gram: np.ndarray, products: np.ndarray, dimension: int, shift: float
) -> Exchangeable:
    """XNysTrace, for a positive semi-definite operator, from products with k test vectors w_i of
    length 1.

    Within the space of test vectors W stands the Nystrom approximation A<W> = A W (W^T A W)^-1 W^T
    A. Test vector i gives tr A<W_i> + (N - k + 1) u^T (A - A<W_i>) u / u^T u, W_i being the others
    and u its part orthogonal to them, where u^T (A - A<W_i>) u = 1 / ((W^T A W)^-1)_ii and u^T u =
    1 / ((W^T W)^-1)_ii.

    Args:
      core: (k, k) W^T A W.
      gram: (k, k) W^T W.
      products: (r, k) the products A w_i in an orthonormal basis, in columns.
      dimension: N.
      shift: added to the operator, and N times taken from the trace: it must exceed the rounding of
        ``core``.

    Raises:
      ValueError: a Rayleigh quotient among the test vectors is negative, beyond the shift.
    """
    count = len(core)
    root = np.linalg.inv(np.linalg.cholesky(gram))
    values, axes = np.linalg.eigh(root @ core @ root.T)
    if values[0] < -shift / 2:
        raise ValueError(NEGATIVE.format(values[0]))
    dual = (
        axes / np.sqrt(values + shift)
    ).T @ root  # dual^T dual is the inverse of core + shift gram
    half = products @ dual.T
    # The products with the shifted operator, by their basis: a Gram matrix of them would be too
    # coarse.
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
    """Quotients, and 0 where b is."""
    return np.divide(a, b, out=np.zeros_like(a), where=b > 0)


def _jackknife(
    whole: np.ndarray, without: Callable[[int], np.ndarray], compression: np.ndarray
) -> Exchangeable:
    """The mean of the estimates, and its spread as the test vectors are left out in turn.

    Not the spread of the estimates themselves, which have all directions but one in common: where
    the spectrum decays fast it is too small, by a factor of up to four. The jackknife is too large
    instead, on average (Efron and Stein 1981), as the error of k - 1 test vectors is."""
    means = np.array([without(i).mean() for i in range(whole.size)])
    spread = (1 - 1 / whole.size) * np.sum((means - means.mean()) ** 2)
    return Exchangeable(
        float(whole.mean()), float(np.sqrt(spread)), float(np.linalg.norm(compression))
    )
