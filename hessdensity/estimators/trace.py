"""The trace alone, from as few products as it takes: exchangeable estimates, with their error."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from hessdensity.operators.protocol import Operator, check, dense
from hessdensity.runs.progress import make_bar
from hessdensity.spectra.estimate import Estimate
from hessdensity.vectors import chunks as _basis
from hessdensity.vectors import trees as _trees

from . import exchangeable as _exchangeable

PyTree = Any

_SHIFT = 4  # rounding units that a positive semi-definite operator is shifted by
_ASYMMETRY = 0.05  # as in `lanczos`: above the rounding of a model in bfloat16, below a rule that is no derivative


def trace(
    operator: Operator,
    key: jax.Array,
    num_matvecs: int,
    *,
    semidefinite: bool = False,
    block_size: int = 8,
    progress: bool = True,
) -> Estimate:
    """Estimate the sum of an operator's eigenvalues, by XTrace or XNysTrace.

    Half of the products go to k = num_matvecs // 2 random vectors w_i, uniform on the sphere of
    R^n, and make an orthonormal basis Q of their span; the other half to Q. In that span the trace
    is exact, and it holds the eigenvalues that are far from the others. With Q_i the basis without
    the product number i, and u_i the part of w_i outside of it,

        tr_i = tr(Q_i^T H Q_i) + (n - k + 1) u_i^T H u_i / u_i^T u_i,    trace = mean of tr_i:

    every test vector sees what the others leave, is independent of it, and uniform on its sphere.
    So each tr_i is unbiased, and the error falls as 1/num_matvecs, where random vectors alone
    (Girard 1989; Hutchinson 1990) have 1/sqrt(num_matvecs); with the singular values of H, where
    these decay faster.

    Args: operator: anything with ``like`` and ``@`` on blocks, such as a `Hessian`. key: JAX random
      key; test vector i uses ``fold_in(key, i)``. num_matvecs: products to spend, at least 4; an
      odd one is left. From n on the trace is exact, of n products. semidefinite: say that no
      eigenvalue is negative (Gauss-Newton, Fisher, covariance; a Hessian is not). All
        products then go to test vectors, and the Nystrom approximation takes Q's place.
      block_size: vectors that go through the data together.
      progress: show a bar of products done on standard error.

    Returns: `Estimate`, in eigenvalue units. The standard error is that of the jackknife over test
      vectors: on average it is not too small, whatever the spectrum (Efron and Stein 1981), and too
      large where a test vector more would be worth much, by a factor of two to eight. (The spread
      of the tr_i, which the paper takes, is too small there by up to four.) ``lower`` and ``upper``
      add a Student's t of k - 1 degrees. Rounding of the products is in them, a bias of the
      operator is not.

    Raises: TypeError: ``operator`` is none, or ``key`` is no key. ValueError: a number that cannot
      be; the products show an operator that is not symmetric, or one with negative
        eigenvalues where ``semidefinite``.
      FloatingPointError: a product is not finite.

    Cost: num_matvecs products, in num_matvecs / block_size passes over the data, and O(n
    num_matvecs^2) operations. Memory: num_matvecs / 2 + 3 block_size vectors; if ``semidefinite``,
    2 num_matvecs + 2 block_size.

    Source: Epperly, Tropp and Webber (2024), with what is left of the test vectors normalised; the
      jackknife is ours.

    Example:
      >>> import hessdensity as hd
      >>> eigenvalues = 1 / np.arange(1, 1001) ** 2
      >>> operator = hd.Matrix.from_eigenvalues(eigenvalues, jax.random.key(0))
      >>> estimate = trace(operator, jax.random.key(1), 60, progress=False)
      >>> bool(estimate.lower < eigenvalues.sum() < estimate.upper), bool(estimate.standard_error < 0.02)
      (True, True)
    """
    dimension = check(operator, key)
    for name, value, least in (("num_matvecs", num_matvecs, 4), ("block_size", block_size, 1)):
        if not isinstance(value, int | np.integer) or value < least:
            raise ValueError(f"{name}={value!r}, expected a whole number of at least {least}.")
    if num_matvecs >= dimension:
        return _exact(operator, block_size, semidefinite)
    count = num_matvecs if semidefinite else num_matvecs // 2
    with make_bar("trace", num_matvecs // count * count, progress) as bar:
        run = _Run(operator, key, block_size, bar)
        found = run.nystrom(count) if semidefinite else run.range(count)
    rounding = 8 * _trees.epsilon(operator.like) * found.size
    return _interval(found.value, float(np.hypot(found.standard_error, rounding)), count - 1)


class _Run:
    """Products with random vectors, in blocks, and the small matrices that they leave on the host."""

    def __init__(self, operator: Operator, key: jax.Array, block_size: int, bar: Any) -> None:
        self._operator, self._key, self._block_size, self._bar = operator, key, block_size, bar
        self._dimension = _trees.size(operator.like)
        self._epsilon = _trees.epsilon(operator.like)

    def range(self, count: int) -> _exchangeable.Exchangeable:
        """XTrace of ``count`` test vectors."""
        basis, forms = _Basis(self._epsilon), []
        for tests in self._tests(count):
            products = self._multiply(tests)
            forms.append(np.asarray(_inner(tests, products), float))
            basis.extend(products)
        # Drawn again, so that the test vectors need not be kept.
        tests = np.concatenate(
            [_coefficients_of(basis.chunks, block) for block in self._tests(count)], axis=1
        )
        blocks = (
            _unstack(chunk, tuple(jax.tree.leaves(self._operator.like))) for chunk in basis.chunks
        )
        structure = jax.tree.structure(self._operator.like)
        images = [
            _coefficients_of(basis.chunks, self._multiply(jax.tree.unflatten(structure, b)))
            for b in blocks
        ]
        compression = np.concatenate(images, axis=1)
        _refuse_asymmetric(compression)
        return _exchangeable.from_range(
            np.concatenate(forms), basis.factors, compression, tests, self._dimension, self._epsilon
        )

    def nystrom(self, count: int) -> _exchangeable.Exchangeable:
        """XNysTrace of ``count`` test vectors."""
        basis, chunks = _Basis(self._epsilon), [_stack(block) for block in self._tests(count)]
        core, gram = [], []
        for tests in self._tests(count):
            products = self._multiply(tests)
            core.append(_coefficients_of(chunks, products))
            gram.append(_coefficients_of(chunks, tests))
            basis.extend(products)
        square = np.concatenate(core, axis=1)
        asymmetry = _refuse_asymmetric(square)
        size = float(np.linalg.norm(basis.factors))
        if not size:
            return _exchangeable.Exchangeable(0.0, 0.0, 0.0)
        # The rounding of inner products, or what the operator's own precision shows of itself.
        shift = max(_SHIFT * self._epsilon * size, asymmetry)
        return _exchangeable.from_core(
            (square + square.T) / 2,
            np.concatenate(gram, axis=1),
            basis.factors,
            self._dimension,
            shift,
        )

    def _tests(self, count: int) -> Iterator[PyTree]:
        for first in range(0, count, self._block_size):
            number = min(self._block_size, count - first)
            yield _trees.random_block(self._key, first, number, self._operator.like)

    def _multiply(self, block: PyTree) -> PyTree:
        product, _ = _trees.as_block(
            self._operator @ block, self._operator.like, "the operator's product"
        )
        if not _all_finite(product):
            raise FloatingPointError(
                "the operator's product is not finite. Look for overflow, or for log(0) and 0/0."
            )
        self._bar.update(jax.tree.leaves(block)[0].shape[0])
        return product


class _Basis:
    """Blocks of vectors as an orthonormal basis times factors, one chunk a block."""

    def __init__(self, epsilon: float) -> None:
        self.chunks: list[PyTree] = []
        self._columns: list[np.ndarray] = []
        self._epsilon = epsilon

    @property
    def factors(self) -> np.ndarray:
        """(r, r) float64, on the host: column j has the coefficients of vector j, in basis vectors
        up to j."""
        size = len(self._columns)
        return np.stack(
            [np.pad(column, (0, size - column.size)) for column in self._columns], axis=1
        )

    def extend(self, block: PyTree) -> None:
        """Classical Gram-Schmidt, repeated until nothing cancels: of the block against the basis,
        then in itself.

        What is left of a vector may be its rounding: that is a direction as good as another, once
        it is orthogonal to the rest. Only in a space that is exhausted, such as that of the nonzero
        rows, nothing is left: a zero vector stands for it."""
        first, lengths = len(self._columns), np.asarray(_norm(block), float)
        own = _stack(jax.tree.map(jnp.zeros_like, block))
        block, left = _shrink(block, lengths), (lengths > 0).astype(float)
        block, left, along = self._project(block, left, self.chunks)
        for row, vector in enumerate(_trees.split(block, 1)):
            within = np.zeros(lengths.size)
            before, column = left[row : row + 1], along[row]
            # Against the whole basis again only where much cancels, which brings what was
            # negligible to light.
            vector, after, part = self._project(vector, before, [own], once=True)
            within += part[0]
            if 0 < after[0] <= before[0] / 2:
                vector, after, part = self._project(vector, after, [*self.chunks, own])
                column, within = column + part[0, :first], within + part[0, first:]
            within[row] = after[0]
            own = _write_row(own, _shrink(vector, after), row)
            self._columns.append(lengths[row] * np.concatenate([column, within[: row + 1]]))
        self.chunks.append(own)

    def _project(
        self, block: PyTree, before: np.ndarray, chunks: list[PyTree], once: bool = False
    ) -> tuple[PyTree, np.ndarray, np.ndarray]:
        """(block less its parts along the chunks, the norms left, the parts); a norm of rounding
        size is 0."""
        along = np.zeros((before.size, 0))
        while chunks:
            parts = [_coefficients(chunk, block) for chunk in chunks]
            for chunk, part in zip(chunks, parts, strict=True):
                block = _subtract_combination(block, part, chunk)
            taken = np.concatenate([np.asarray(part, float) for part in parts], axis=1)
            along = along + taken if along.size else taken
            after = np.asarray(_norm(block), float)
            after = np.where((before > 0) & (after > self._epsilon / 16), after, 0.0)
            enough = once or np.all((after > before / 2) | (after == 0))
            before = after
            if enough:
                break
        return block, before, along


def _coefficients_of(chunks: list[PyTree], block: PyTree) -> np.ndarray:
    """Inner products of all basis vectors with a block of b: (r, b) float64, on the host."""
    return np.concatenate([np.asarray(_coefficients(chunk, block), float).T for chunk in chunks])


def _refuse_asymmetric(square: np.ndarray) -> float:
    """How far u.Hv and v.Hu are apart, in the spectral norm."""
    gap, size = np.linalg.norm(square - square.T, 2), np.linalg.norm(square, 2)
    if gap > _ASYMMETRY * size:
        raise ValueError(
            "the operator is not symmetric, or not the same in every product: u.Hv and v.Hu "
            f"differ by {gap / size:.2g} of its norm. hd.verify_operator(operator, key) tells more."
        )
    return float(gap)


def _exact(operator: Operator, block_size: int, semidefinite: bool) -> Estimate:
    """The trace of the whole matrix: cheaper, for few dimensions."""
    matrix = dense(operator, block_size=block_size)
    if not np.all(np.isfinite(matrix)):
        raise FloatingPointError(
            "the operator's product is not finite. Look for overflow, or for log(0) and 0/0."
        )
    gap = _refuse_asymmetric(matrix)
    rounding = _trees.epsilon(operator.like) * float(np.linalg.norm(matrix))
    if semidefinite:
        lowest = float(np.linalg.eigvalsh((matrix + matrix.T) / 2)[0])
        if lowest < -max(_SHIFT * rounding, gap):
            raise ValueError(_exchangeable.NEGATIVE.format(lowest))
    return _interval(float(np.trace(matrix)), rounding, np.inf)


def _interval(value: float, error: float, freedom: float) -> Estimate:
    from scipy.special import stdtrit

    reach = float(stdtrit(min(freedom, 1e6), 0.975)) * error
    return Estimate(value, error, value - reach, value + reach)


# Compiled for the shapes of a block, so that their number does not grow with the products.

_norm = jax.jit(_trees.norm)
_inner = jax.jit(_trees.inner)
_all_finite = jax.jit(_trees.all_finite)
_coefficients = jax.jit(_basis.coefficients)
_subtract_combination = jax.jit(_basis.subtract_combination)
_stack = jax.jit(_basis.stack)
_write_row = partial(jax.jit, donate_argnums=0)(_basis.write_row)


def _shrink(block: PyTree, lengths: np.ndarray) -> PyTree:
    """The vectors over their lengths; zero where these are."""
    return _divide(
        block, jnp.asarray(np.where(lengths > 0, lengths, np.inf), _trees.scalar_dtype(block))
    )


@jax.jit
def _divide(block: PyTree, lengths: jax.Array) -> PyTree:
    return jax.tree.map(lambda leaf: leaf / _trees.column(lengths, leaf), block)


@partial(jax.jit, static_argnums=1)
def _unstack(chunk: PyTree, like: tuple[jax.ShapeDtypeStruct, ...]) -> list[jax.Array]:
    """The leaves of the block that a chunk of one probe holds: the inverse of `_basis.stack`."""
    leaves = jax.tree.leaves(chunk)
    rows = leaves[0].shape[-2]
    return [
        jnp.moveaxis(leaf, -2, 1).reshape(rows, *vector.shape)
        for leaf, vector in zip(leaves, like, strict=True)
    ]
