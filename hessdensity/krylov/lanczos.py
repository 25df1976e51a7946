"""k independent Lanczos recurrences by reverse communication, with reorthogonalisation.

The engine never calls an operator: a state asks for ``operator @ state.vectors``, and `update`
takes the answer. So the operator may stream from disk or run on many hosts, and progress,
checkpoints and early stops belong to the loop.

In exact arithmetic A V^T = V^T T + beta_m v_m e_m^T, with V orthonormal and T tridiagonal (Lanczos
1950). Rounding destroys the orthogonality as soon as a Ritz value converges (Paige 1976), so that
every new vector is orthogonalised again against all the earlier ones, kept in chunks of fixed size:
each kernel is compiled once, however many the steps. Without a basis the Gauss rules stay right,
but copies of converged Ritz values appear (`deflation.merge_ghosts`)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from hessdensity.vectors import trees as _trees
from hessdensity.vectors.basis import CHUNK as CHUNK
from hessdensity.vectors.basis import TIERS as TIERS
from hessdensity.vectors.basis import Basis as Basis
from hessdensity.vectors.basis import (
    append,
    as_chunks,
    norm,
    orthogonalise,
    orthogonalise_locally,
    project_out,
)

PyTree = Any

_SCALARS = ("diagonal", "off_diagonal", "outside", "noise")
_ASYMMETRY = 0.05  # far above the rounding of a model that computes in bfloat16, far below a rule that is no derivative


class LanczosState(NamedTuple):
    """What the next step needs: a pytree, which may be saved after any step and resumed.

    ``j`` below is the number of steps done, ``k`` that of probes.
    """

    vectors: PyTree
    """Block of the k vectors whose products are asked for; a probe that has ended has the zero
    vector."""
    previous: PyTree
    """Block of the k vectors before them."""
    basis: tuple[PyTree, ...]
    """Chunks of CHUNK vectors a probe that hold vectors 0..j; those not yet reached are zero. Empty
    in tier "none"."""
    offload: bool
    """Whether full chunks wait in the host's memory."""
    against: Basis
    """The basis, of one probe, that all probes stay orthogonal to."""
    num_steps: int
    """Steps to be done in all."""
    diagonal: np.ndarray
    """(k, j) float64, on the host: the diagonal of each T."""
    off_diagonal: np.ndarray
    """(k, j) float64, on the host: entries below it, the last one (beta_m) dangling. 0 ends a
    probe."""
    outside: np.ndarray
    """(k, j, r) float64, on the host: parts of the products along ``against``, r its vectors and
    zeros."""
    noise: np.ndarray
    """(k,) float64, on the host: the largest part of a product that lay along earlier vectors,
    where there is none in exact arithmetic, or a few rounding units of the norm: how far the
    entries of T can be trusted."""


class NonFiniteProduct(FloatingPointError):
    """A product was not finite. ``step`` counts from 0; ``partial`` is the answer from the steps
    before it, or None."""

    def __init__(self, step: int, reason: str) -> None:
        super().__init__(f"Lanczos step {step}: {reason}")
        self.step = step
        self.partial: Any = None


def init(
    start_vectors: PyTree,
    num_steps: int,
    against: PyTree | Basis | None = None,
    *,
    tier: str = "device",
) -> LanczosState:
    """The state before the first step.

    Args: start_vectors: block of k vectors; normalised here. num_steps: Lanczos length m, at least
      1. Clipped to the dimension that ``against`` leaves. against: block of m0 orthonormal vectors,
      or the `Basis` of an earlier run, shared by all probes, that the whole
        recurrence stays orthogonal to: it then belongs to the operator's compression to their
        complement.
      tier: where the basis is kept. ``"device"``; ``"host"``, full chunks in the host's memory,
        each moved to the device and read there in every step; ``"none"``, nowhere: only the last
        two vectors are orthogonalised against.

    Raises: ValueError: num_steps < 1, an unknown tier, or a start vector that is zero or not
      finite, or lies in the span of
        ``against``.

    Memory: k (m + 4) + m0 vectors by the end, m and m0 rounded up to a multiple of 8. On the device
    there are of these 4 k and a few chunks with "host"; with "none" there are 4 k in all."""
    if num_steps < 1:
        raise ValueError(f"num_steps={num_steps}, expected at least 1.")
    if tier not in TIERS:
        raise ValueError(f"tier={tier!r}, expected one of {', '.join(map(repr, TIERS))}.")
    like = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), start_vectors
    )
    n, count = _trees.size(like), jax.tree.leaves(start_vectors)[0].shape[0]
    if against is None:
        against = Basis((), 0)
    elif not isinstance(against, Basis):
        against = Basis(as_chunks(against), jax.tree.leaves(against)[0].shape[0])
    if against.size >= n:
        raise ValueError(
            f"against holds {against.size} vectors of dimension {n}; nothing is left for the "
            "recurrence."
        )
    with jax.default_matmul_precision("highest"):
        before = norm(start_vectors)
        vectors, _, after = orthogonalise(_normalise(start_vectors, before), against.chunks)
        if not np.all(after > 64 * _trees.epsilon(like)):  # written so that a NaN is refused
            raise ValueError(
                f"start_vectors have norms {np.asarray(before)}, and {after} of each is left "
                "outside of `against`; expected finite vectors that are not zero there."
            )
        vectors = _normalise(vectors, jnp.asarray(after))
        return LanczosState(
            vectors=vectors,
            previous=jax.tree.map(jnp.zeros_like, vectors),
            basis=() if tier == "none" else append((), vectors, 0, offload=False),
            offload=tier == "host",
            against=against,
            num_steps=min(num_steps, n - against.size),
            diagonal=np.zeros((count, 0)),
            off_diagonal=np.zeros((count, 0)),
            outside=np.zeros((count, 0, CHUNK * len(against.chunks))),
            noise=np.zeros(count),
        )


def update(state: LanczosState, product: PyTree) -> LanczosState:
    """One step: takes ``operator @ state.vectors`` and gives the state that asks for the next
    product.

    The state's memory is taken over: it may not be used again, save for what is on the host.

    A probe ends where its Krylov space is invariant: beta <= 8 eps times what is known of the
    operator's norm. Its off-diagonal is then exactly 0, its next vector 0, and the others go on. A
    smaller beta would be rounding, a larger one does no harm: the vector that follows is orthogonal
    to the others, whatever it is.

    Raises: NonFiniteProduct: the product holds a NaN or an infinity. ValueError: the operator is
      not symmetric. For a symmetric one the three terms leave nothing along the earlier
        vectors; what the orthogonalisation takes away there tells, at no cost.

    Cost: reads the basis twice.
    """
    step = state.diagonal.shape[1]
    with jax.default_matmul_precision("highest"):
        last = state.off_diagonal[:, -1] if step else np.zeros(state.diagonal.shape[0])
        residual, alpha = _recur(
            product, state.vectors, state.previous, jnp.asarray(last, _trees.scalar_dtype(product))
        )
        residual, along = project_out(
            residual, state.against.chunks
        )  # a true coupling, if it is not invariant
        if state.basis:
            residual, removed, beta = orthogonalise(residual, (*state.against.chunks, *state.basis))
        else:
            residual, removed, beta = orthogonalise_locally(residual, state.vectors, state.previous)
        alpha = np.asarray(alpha, float)
        if not np.all(np.isfinite(alpha)) or not np.all(np.isfinite(beta)):
            raise NonFiniteProduct(
                step,
                "the operator's product is not finite. Look for overflow, or for log(0) and 0/0.",
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
                f"Lanczos step {step}: the operator is not symmetric, or not the same in every "
                f"product. Of this one, {np.max(removed / whole):.2g} of the operator's norm lies "
                "along earlier vectors, where a symmetric one has nothing. "
                "hd.verify_operator(operator, key) tells more."
            )
        alive = beta > 8 * epsilon * size
        # Dividing by an infinite number makes a zero vector of the residual of a probe that has
        # ended.
        vectors = _normalise(residual, jnp.asarray(np.where(alive, beta, np.inf), beta.dtype))
        noise = np.maximum.reduce([state.noise, removed, 4 * epsilon * size])
        return _joined(state, vectors, alpha, np.where(alive, beta, 0.0), along, noise)


def _joined(
    state: LanczosState,
    vectors: PyTree,
    alpha: np.ndarray,
    beta: np.ndarray,
    along: np.ndarray,
    noise: np.ndarray,
) -> LanczosState:
    """The state with the results of one more step."""
    step, basis = state.diagonal.shape[1] + 1, state.basis
    return state._replace(
        vectors=vectors,
        previous=state.vectors,
        basis=append(basis, vectors, step, state.offload)
        if basis and step < state.num_steps
        else basis,
        diagonal=np.concatenate([state.diagonal, alpha[:, None]], axis=1),
        off_diagonal=np.concatenate([state.off_diagonal, beta[:, None]], axis=1),
        outside=np.concatenate([state.outside, along[:, None]], axis=1),
        noise=noise,
    )


def last_step(state: LanczosState) -> tuple[PyTree, dict[str, Any]]:
    """What the last step added to a state: its block of vectors, and its scalars as JSON takes
    them."""
    scalars = (state.diagonal[:, -1], state.off_diagonal[:, -1], state.outside[:, -1], state.noise)
    return state.vectors, dict(zip(_SCALARS, (part.tolist() for part in scalars), strict=True))


def replay(state: LanczosState, vectors: PyTree, scalars: dict[str, Any]) -> LanczosState:
    """`update` without a product, from what `last_step` gave of it: the same state, bit for bit."""
    alpha, beta, along, noise = (np.asarray(scalars[name], float) for name in _SCALARS)
    return _joined(state, vectors, alpha, beta, along.reshape(alpha.size, -1), noise)


def extend(state: LanczosState, num_steps: int) -> LanczosState:
    """The state with more steps to be done, ``num_steps`` in all, clipped as by `init`; never with
    fewer."""
    n = sum(leaf[0].size for leaf in jax.tree.leaves(state.vectors))
    num_steps, done = min(num_steps, n - state.against.size), state.diagonal.shape[1]
    if num_steps <= state.num_steps:
        return state
    # The vector after the last step was not kept, since no step was to follow.
    basis = state.basis
    if basis and done == state.num_steps:
        basis = append(basis, state.vectors, done, state.offload)
    return state._replace(num_steps=num_steps, basis=basis)


def iterate(operator: Any, state: LanczosState) -> Iterator[LanczosState]:
    """The host loop, the only place that calls the operator: yields the state after each step that
    is left.

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
    while not complete(state):
        try:
            product, _ = _trees.as_block(
                operator @ state.vectors, operator.like, "the operator's product"
            )
        except FloatingPointError as error:
            raise NonFiniteProduct(state.diagonal.shape[1], str(error)) from error
        state = update(state, product)
        yield state


def complete(state: LanczosState) -> bool:
    """Whether no step is left: all are done, or every probe has ended."""
    done = state.diagonal.shape[1]
    return done == state.num_steps or (done > 0 and not np.any(state.off_diagonal[:, -1]))


def release(state: LanczosState) -> LanczosState:
    """The state without its vectors: what it found remains, and it cannot go on."""
    return state._replace(
        vectors=None, previous=None, basis=(), against=Basis((), state.against.size)
    )


@jax.jit
def _recur(
    product: PyTree, vectors: PyTree, previous: PyTree, beta: jax.Array
) -> tuple[PyTree, jax.Array]:
    """The three-term recurrence: (A v - beta v_previous - alpha v, alpha). The product is the
    operator's to keep."""
    residual = _trees.subtract(product, beta, previous)
    alpha = _trees.inner(residual, vectors)
    return _trees.subtract(residual, alpha, vectors), alpha


@jax.jit
def _normalise(vectors: PyTree, norms: jax.Array) -> PyTree:
    return _trees.scale(vectors, 1 / norms)
