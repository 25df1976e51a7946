"""k independent Lanczos recurrences by reverse communication, with reorthogonalisation.

The engine never calls an operator: a state asks for ``operator @ state.vectors``, and `update` takes the answer. So the
operator may stream from disk or run on many hosts, and progress, checkpoints and early stops belong to the loop.

In exact arithmetic A V^T = V^T T + beta_m v_m e_m^T, with V orthonormal and T tridiagonal (Lanczos 1950). Rounding
destroys the orthogonality as soon as a Ritz value converges (Paige 1976), so that every new vector is orthogonalised
again against all the earlier ones, kept in chunks of fixed size: each kernel is compiled once, however many the steps.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from . import _basis, _trees

PyTree = Any

_ASYMMETRY = 0.05  # far above the rounding of a model that computes in bfloat16, far below a rule that is no derivative

CHUNK = 8
"""Basis vectors a chunk: few, because the last chunk is read whole, and zeros take memory."""


class Basis(NamedTuple):
    """Orthonormal vectors of one probe, in chunks."""

    chunks: tuple[PyTree, ...]
    """CHUNK vectors each, the last ones of the last chunk being zero."""
    size: int
    """How many they are."""
    norm: float = 0.0
    """The operator's, as far as it is known: what is small beside it is rounding, in their complement too."""


class LanczosState(NamedTuple):
    """What the next step needs: a pytree, which may be saved after any step and resumed.

    ``j`` below is the number of steps done, ``k`` that of probes.
    """

    vectors: PyTree
    """Block of the k vectors whose products are asked for; a probe that has ended has the zero vector."""
    previous: PyTree
    """Block of the k vectors before them."""
    basis: tuple[PyTree, ...]
    """Chunks of CHUNK vectors a probe that hold vectors 0..j; those not yet reached are zero."""
    against: Basis
    """The basis, of one probe, that all probes stay orthogonal to."""
    num_steps: int
    """Steps to be done in all."""
    diagonal: np.ndarray
    """(k, j) float64, on the host: the diagonal of each T."""
    off_diagonal: np.ndarray
    """(k, j) float64, on the host: entries below it, the last one (beta_m) dangling. 0 ends a probe."""
    outside: np.ndarray
    """(k, j, r) float64, on the host: parts of the products along ``against``, r its vectors and zeros."""
    noise: np.ndarray
    """(k,) float64, on the host: the largest part of a product that lay along earlier vectors, where there is none in
    exact arithmetic, or a few rounding units of the norm: how far the entries of T can be trusted."""


class NonFiniteProduct(FloatingPointError):
    """A product was not finite. ``step`` counts from 0; ``partial`` is the answer from the steps before it, or None."""

    def __init__(self, step: int, reason: str) -> None:
        super().__init__(f"Lanczos step {step}: {reason}")
        self.step = step
        self.partial: Any = None


def init(start_vectors: PyTree, num_steps: int, against: PyTree | Basis | None = None) -> LanczosState:
    """The state before the first step.

    Args:
      start_vectors: block of k vectors; normalised here.
      num_steps: Lanczos length m, at least 1. Clipped to the dimension that ``against`` leaves.
      against: block of m0 orthonormal vectors, or the `Basis` of an earlier run, shared by all probes, that the whole
        recurrence stays orthogonal to: it then belongs to the operator's compression to their complement.

    Raises:
      ValueError: num_steps < 1, or a start vector that is zero or not finite, or lies in the span of ``against``.

    Memory: k (m + 4) + m0 vectors by the end, m and m0 rounded up to a multiple of 8.
    """
    if num_steps < 1:
        raise ValueError(f"num_steps={num_steps}, expected at least 1.")
    like = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), start_vectors)
    n, count = _trees.size(like), jax.tree.leaves(start_vectors)[0].shape[0]
    if against is None:
        against = Basis((), 0)
    elif not isinstance(against, Basis):
        chunks = tuple(_as_chunk(piece) for piece in _trees.split(against, CHUNK))
        against = Basis(chunks, jax.tree.leaves(against)[0].shape[0])
    if against.size >= n:
        raise ValueError(f"against holds {against.size} vectors of dimension {n}; nothing is left for the recurrence.")
    with jax.default_matmul_precision("highest"):
        before = _norm(start_vectors)
        vectors, _, after = _orthogonalise(_normalise(start_vectors, before), against.chunks)
        if not np.all(after > 64 * _trees.epsilon(like)):  # written so that a NaN is refused
            raise ValueError(
                f"start_vectors have norms {np.asarray(before)}, and {after} of each is left outside of `against`; "
                "expected finite vectors that are not zero there."
            )
        vectors = _normalise(vectors, jnp.asarray(after))
        return LanczosState(
            vectors=vectors,
            previous=jax.tree.map(jnp.zeros_like, vectors),
            basis=_append((), vectors, 0),
            against=against,
            num_steps=min(num_steps, n - against.size),
            diagonal=np.zeros((count, 0)),
            off_diagonal=np.zeros((count, 0)),
            outside=np.zeros((count, 0, CHUNK * len(against.chunks))),
            noise=np.zeros(count),
        )


def update(state: LanczosState, product: PyTree) -> LanczosState:
    """One step: takes ``operator @ state.vectors`` and gives the state that asks for the next product.

    The state's memory is taken over: it may not be used again, save for what is on the host.

    A probe ends where its Krylov space is invariant: beta <= 8 eps times what is known of the operator's norm. Its
    off-diagonal is then exactly 0, its next vector 0, and the others go on. A smaller beta would be rounding, a larger
    one does no harm: the vector that follows is orthogonal to the others, whatever it is.

    Raises:
      NonFiniteProduct: the product holds a NaN or an infinity.
      ValueError: the operator is not symmetric. For a symmetric one the three terms leave nothing along the earlier
        vectors; what the orthogonalisation takes away there tells, at no cost.

    Cost: reads the basis twice.
    """
    step = state.diagonal.shape[1]
    with jax.default_matmul_precision("highest"):
        last = state.off_diagonal[:, -1] if step else np.zeros(state.diagonal.shape[0])
        residual, alpha = _recur(
            product, state.vectors, state.previous, jnp.asarray(last, _trees.scalar_dtype(product))
        )
        residual, along = _project_out(residual, state.against.chunks)  # a true coupling, if it is not invariant
        residual, removed, beta = _orthogonalise(residual, (*state.against.chunks, *state.basis))
        alpha = np.asarray(alpha, float)
        if not np.all(np.isfinite(alpha)) or not np.all(np.isfinite(beta)):
            raise NonFiniteProduct(
                step, "the operator's product is not finite. Look for overflow, or for log(0) and 0/0."
            )
        diagonal = np.concatenate([state.diagonal, alpha[:, None]], axis=1)
        epsilon = _trees.epsilon(product)
        # The largest row sum bounds the norm of T from above, within a factor of two.
        rows = np.abs(diagonal)
        rows[:, :-1] += state.off_diagonal
        rows[:, 1:] += state.off_diagonal
        size = np.maximum(rows.max(axis=1), state.against.norm)
        whole = np.maximum(size, beta)
        if np.any(removed > _ASYMMETRY * whole):
            raise ValueError(
                f"Lanczos step {step}: the operator is not symmetric, or not the same in every product. Of "
                f"this one, {np.max(removed / whole):.2g} of the operator's norm lies along earlier vectors, where a "
                "symmetric one has nothing. hd.verify_operator(operator, key) tells more."
            )
        alive = beta > 8 * epsilon * size
        off_diagonal = np.concatenate([state.off_diagonal, np.where(alive, beta, 0.0)[:, None]], axis=1)
        # Dividing by an infinite number makes a zero vector of the residual of a probe that has ended.
        vectors = _normalise(residual, jnp.asarray(np.where(alive, beta, np.inf), beta.dtype))
        return state._replace(
            vectors=vectors,
            previous=state.vectors,
            basis=_append(state.basis, vectors, step + 1) if step + 1 < state.num_steps else state.basis,
            diagonal=diagonal,
            off_diagonal=off_diagonal,
            outside=np.concatenate([state.outside, _on_host(along, len(alpha))[:, None]], axis=1),
            noise=np.maximum.reduce([state.noise, removed, 4 * epsilon * size]),
        )


def extend(state: LanczosState, num_steps: int) -> LanczosState:
    """The state with more steps to be done, ``num_steps`` in all, clipped as by `init`; never with fewer."""
    n = sum(leaf[0].size for leaf in jax.tree.leaves(state.vectors))
    num_steps, done = min(num_steps, n - state.against.size), state.diagonal.shape[1]
    if num_steps <= state.num_steps:
        return state
    # The vector after the last step was not kept, since no step was to follow.
    basis = _append(state.basis, state.vectors, done) if done == state.num_steps else state.basis
    return state._replace(num_steps=num_steps, basis=basis)


def iterate(operator: Any, state: LanczosState) -> Iterator[LanczosState]:
    """The host loop, the only place that calls the operator: yields the state after each step that is left.

    Ends after ``num_steps``, or when every probe has ended.

    Example:
      >>> import hessdensity as hd
      >>> state = init(jnp.ones((1, 2)), num_steps=2)
      >>> for state in iterate(hd.Matrix(np.diag([1.0, 3.0])), state):
      ...     print(state.diagonal.round(3).tolist())
      [[2.0]]
      [[2.0, 2.0]]

    Raises:
      NonFiniteProduct: names the step, and what the operator said of it (its batch).

    Cost: one product with k vectors a step.
    """
    while state.diagonal.shape[1] < state.num_steps and not _ended(state):
        try:
            product, _ = _trees.as_block(operator @ state.vectors, operator.like, "the operator's product")
        except FloatingPointError as error:
            raise NonFiniteProduct(state.diagonal.shape[1], str(error)) from error
        state = update(state, product)
        yield state


def _ended(state: LanczosState) -> bool:
    return state.off_diagonal.shape[1] > 0 and not np.any(state.off_diagonal[:, -1])


def _orthogonalise(block: PyTree, chunks: tuple[PyTree, ...]) -> tuple[PyTree, np.ndarray, np.ndarray]:
    """Classical Gram-Schmidt against all chunks, repeated where it cancelled.

    A block that comes in almost orthogonal, as the recurrence leaves it, needs one pass: what is left is one rounding
    unit of its norm. Only a pass that takes away much of the norm leaves a residual that is not small beside what
    remains, and then it is done again (Daniel, Gragg, Kaufman and Stewart 1976), which halves the reading of the basis.

    Returns:
      The block, the norms of what the first pass took away, the norms of what is left.
    """
    before, removed = np.asarray(_norm(block)), None
    while True:
        block, coefficients = _project_out(block, chunks)
        after = np.asarray(_norm(block))
        if removed is None:
            removed = np.linalg.norm(_on_host(coefficients, after.size), axis=1)
        # A vector of the span shrinks by a rounding unit a pass, until it is zero.
        if np.all((after > before / 2) | (after <= np.finfo(after.dtype).tiny)) or not np.all(np.isfinite(after)):
            return block, removed, after
        before = after


def _on_host(coefficients: list[jax.Array], count: int) -> np.ndarray:
    """Coefficients chunk by chunk as one (count, r) float64 array."""
    return np.concatenate([np.zeros((count, 0)), *(np.asarray(part, float) for part in coefficients)], axis=1)


def _project_out(block: PyTree, chunks: tuple[PyTree, ...]) -> tuple[PyTree, list[jax.Array]]:
    """(the block less its parts along all basis vectors, those parts)."""
    coefficients = [_coefficients(chunk, block) for chunk in chunks]
    for chunk, factors in zip(chunks, coefficients, strict=True):
        block = _subtract_combination(block, factors, chunk)
    return block, coefficients


def _append(basis: tuple[PyTree, ...], vectors: PyTree, position: int) -> tuple[PyTree, ...]:
    """The basis with one more vector for each probe, in the last chunk's memory or in a new chunk's."""
    row = position % CHUNK
    if row == 0:
        return (*basis, _first_row(vectors))
    return (*basis[:-1], _write_row(basis[-1], vectors, row))


# The compiled kernels. Every one has the shape of a block or of a chunk, so that their number does not grow with the
# steps; consumed arguments are donated, so that nothing is copied.

_norm = jax.jit(_trees.norm)
_coefficients = jax.jit(_basis.coefficients)
_subtract_combination = partial(jax.jit, donate_argnums=0)(_basis.subtract_combination)


@jax.jit
def _recur(product: PyTree, vectors: PyTree, previous: PyTree, beta: jax.Array) -> tuple[PyTree, jax.Array]:
    """The three-term recurrence: (A v - beta v_previous - alpha v, alpha). The product is the operator's to keep."""
    residual = _trees.subtract(product, beta, previous)
    alpha = _trees.inner(residual, vectors)
    return _trees.subtract(residual, alpha, vectors), alpha


@jax.jit
def _normalise(vectors: PyTree, norms: jax.Array) -> PyTree:
    return _trees.scale(vectors, 1 / norms)


@jax.jit
def _as_chunk(vectors: PyTree) -> PyTree:
    """Up to CHUNK vectors as the chunk of one probe."""
    first = jax.tree.map(lambda leaf: leaf[:1], vectors)
    result = _basis.chunk(first, CHUNK)
    for row in range(1, jax.tree.leaves(vectors)[0].shape[0]):
        result = _basis.write_row(result, jax.tree.map(lambda leaf, row=row: leaf[row : row + 1], vectors), row)
    return result


_first_row = jax.jit(partial(_basis.chunk, rows=CHUNK))
_write_row = partial(jax.jit, donate_argnums=0)(_basis.write_row)
