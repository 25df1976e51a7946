"""k independent Lanczos recurrences by reverse communication, with reorthogonalization.

The engine never calls an operator: a state asks for ``operator @ state.vectors``, and `update`
takes the answer. So the operator may stream from disk or run on many hosts, and progress,
checkpoints and early stops belong to the loop.

In exact arithmetic each recurrence builds

    A V = V T + beta_m v_m e_m^T,    V^T V = I,    T tridiagonal (Lanczos 1950).

Rounding destroys the orthogonality as soon as a Ritz value converges (Paige 1976). So every new
vector is orthogonalized again against all the earlier ones. Without a stored basis the Gauss rules
stay right, but copies of converged Ritz values appear (`hessdensity.spectra.deflation`).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from hessdensity.errors import NOT_FINITE, NonFiniteProductError
from hessdensity.vectors import trees
from hessdensity.vectors.basis import CHUNK, STORAGES, Basis, chunks_of
from hessdensity.vectors.orthogonalize import orthogonalize, orthogonalize_locally, project_out
from hessdensity.vectors.trees import Block

from .engine import Step, multiply

ASYMMETRY = 0.05
"""The part of a product, relative to the operator's norm, from which an operator counts as not
symmetric: far above the rounding of a model in bfloat16, far below a rule that is no derivative."""

_SCALARS = ("diagonal", "off_diagonal", "deflation_coupling", "rounding_error")


class LanczosState(NamedTuple):
    """What the next step needs: a pytree, which may be saved after any step and resumed.

    ``j`` below is the number of steps done, ``k`` that of probes.
    """

    vectors: Block
    """The k vectors whose products are asked for; a probe that has ended has the zero vector."""
    previous: Block
    """The k vectors before them."""
    basis: Basis | None
    """Vectors 0..j of each probe, or None where they are not stored."""
    deflated_basis: Basis
    """The basis, of one probe, that all probes stay orthogonal to."""
    operator_norm: float
    """A lower bound of the operator's norm, known beforehand: what is small beside it is rounding,
    in the complement of ``deflated_basis`` too."""
    num_steps: int
    """Steps to be done in all."""
    diagonal: np.ndarray
    """(k, j) float64, on the host: alpha, the diagonal of each T."""
    off_diagonal: np.ndarray
    """(k, j) float64, on the host: beta, the entries below it; the last one dangles. 0 ends a
    probe."""
    deflation_coupling: np.ndarray
    """(k, j, r) float64, on the host: components of the products along ``deflated_basis``, r being
    its vectors, filled up with zeros to whole chunks."""
    rounding_error: np.ndarray
    """(k,) float64, on the host: how far the entries of T can be trusted. The largest part of a
    product that lay along earlier vectors, where exact arithmetic has none, or a few rounding units
    of the norm."""


def init(
    start_vectors: Block,
    num_steps: int,
    deflated_basis: Block | Basis | None = None,
    *,
    basis_storage: str = "device",
    operator_norm: float = 0.0,
) -> LanczosState:
    """The state before the first step.

    Args:
      start_vectors: block of k vectors; they are normalized here.
      num_steps: Lanczos length m, at least 1. Clipped to the dimension that ``deflated_basis``
        leaves.
      deflated_basis: block of m0 orthonormal vectors, or the `Basis` of an earlier run. All probes
        share it and stay orthogonal to it: each recurrence then belongs to the operator's
        compression to its complement.
      basis_storage: where the basis is kept. ``"device"``; ``"host"``, full chunks in the host's
        memory, each moved to the device and read there in every step; ``"none"``, nowhere: each
        vector is orthogonalized against the last two alone.
      operator_norm: a lower bound of the operator's norm, if one is known.

    Raises:
      ValueError: num_steps < 1; an unknown ``basis_storage``; a start vector that is zero, or not
        finite, or lies in the span of ``deflated_basis``.

    Memory: k (m + 4) + m0 vectors by the end, m and m0 rounded up to a multiple of 8. With "host",
    4 k of these and a few chunks are on the device; with "none" there are 4 k in all.
    """
    if num_steps < 1:
        raise ValueError(f"num_steps={num_steps}, expected at least 1.")
    if basis_storage not in STORAGES:
        allowed = ", ".join(map(repr, STORAGES))
        raise ValueError(f"basis_storage={basis_storage!r}, expected one of {allowed}.")
    k, n = trees.count(start_vectors), trees.dimension(start_vectors)
    deflated = _as_basis(deflated_basis)
    if deflated.size >= n:
        raise ValueError(
            f"deflated_basis holds {deflated.size} vectors of dimension {n}; nothing is left for "
            "the recurrence."
        )
    given = trees.norm(start_vectors)
    vectors, _, left = orthogonalize(trees.normalize(start_vectors, given), deflated.chunks)
    if not np.all(left > 64 * trees.epsilon(start_vectors)):  # written so that a NaN is refused
        raise ValueError(
            f"start_vectors have norms {np.asarray(given)}, and {left} of each lies outside of "
            "deflated_basis; expected finite vectors that are not zero there."
        )
    vectors = trees.normalize(vectors, jnp.asarray(left))
    stored = None if basis_storage == "none" else Basis(offload=basis_storage == "host")
    return LanczosState(
        vectors=vectors,
        previous=jax.tree.map(jnp.zeros_like, vectors),
        basis=None if stored is None else stored.append(vectors),
        deflated_basis=deflated,
        operator_norm=operator_norm,
        num_steps=min(num_steps, n - deflated.size),
        diagonal=np.zeros((k, 0)),
        off_diagonal=np.zeros((k, 0)),
        deflation_coupling=np.zeros((k, 0, CHUNK * len(deflated.chunks))),
        rounding_error=np.zeros(k),
    )


def _as_basis(given: Block | Basis | None) -> Basis:
    if given is None:
        return Basis()
    return given if isinstance(given, Basis) else Basis(tuple(chunks_of(given)), trees.count(given))


def update(state: LanczosState, product: Block) -> LanczosState:
    """One step: takes ``operator @ state.vectors``, gives the state that asks for the next product.

    It takes over the state's memory: the state may not be used again, save for what is on the host.

    A probe ends where its Krylov space is invariant: beta <= 8 eps times what is known of the
    operator's norm. Its off-diagonal is then exactly 0, its next vector 0, and the others continue.
    A smaller beta would be rounding. A larger one does no harm: the vector that follows is
    orthogonal to the others, whatever it is.

    Raises:
      NonFiniteProductError: the product holds a NaN or an infinity.
      ValueError: the operator is not symmetric. The three terms of a symmetric one leave nothing
        along the earlier vectors; what reorthogonalization takes away there tells, at no cost.

    Cost: reads the basis twice.
    """
    step = state.diagonal.shape[1]
    # w = A v_j - beta_{j-1} v_{j-1},    alpha_j = w . v_j,    w <- w - alpha_j v_j
    last = state.off_diagonal[:, -1] if step else np.zeros(len(state.diagonal))
    beta_before = jnp.asarray(last, trees.scalar_dtype(product))
    residual, alpha = _recur(product, state.vectors, state.previous, beta_before)
    # The part along the deflated basis Q is a true coupling, where Q's span is not invariant:
    # w <- w - Q (Q^T w), and Q^T w is kept.
    residual, coupling = project_out(residual, state.deflated_basis.chunks)
    # Against all that the recurrence should have left orthogonal: what is found there is rounding.
    if state.basis is not None:
        chunks = (*state.deflated_basis.chunks, *state.basis.chunks)
        residual, removed, beta = orthogonalize(residual, chunks)
    else:
        residual, removed, beta = orthogonalize_locally(residual, state.vectors, state.previous)
    alpha = np.asarray(alpha, float)
    if not np.all(np.isfinite(alpha)) or not np.all(np.isfinite(beta)):
        raise NonFiniteProductError(step, NOT_FINITE)
    epsilon, norm = trees.epsilon(product), _norm_of(state, alpha)
    _refuse_asymmetric(step, removed, np.maximum(norm, beta))
    # v_{j+1} = w / beta_j; the vector of a probe that has ended becomes zero.
    beta = np.where(beta > 8 * epsilon * norm, beta, 0)
    vectors = trees.normalize(residual, jnp.asarray(beta))
    rounding = np.maximum.reduce([state.rounding_error, removed, 4 * epsilon * norm])
    return _advanced(state, vectors, alpha, beta.astype(float), coupling, rounding)


def _norm_of(state: LanczosState, alpha: np.ndarray) -> np.ndarray:
    """What is known of the operator's norm, for each probe: (k,).

    The largest row sum bounds the norm of T from above, within a factor of two.
    """
    rows = np.abs(np.concatenate([state.diagonal, alpha[:, None]], axis=1))
    rows[:, :-1] += state.off_diagonal
    rows[:, 1:] += state.off_diagonal
    return np.maximum(rows.max(axis=1), state.operator_norm)


def _refuse_asymmetric(step: int, removed: np.ndarray, norm: np.ndarray) -> None:
    if np.any(removed > ASYMMETRY * norm):
        raise ValueError(
            f"Lanczos step {step}: the operator is not symmetric, or not the same in every "
            f"product. Of this product, {np.max(removed / norm):.2g} of the operator's norm lies "
            "along earlier vectors, where a symmetric operator has nothing. "
            "hd.verify_operator(operator, key) tells more."
        )


def _advanced(
    state: LanczosState,
    vectors: Block,
    alpha: np.ndarray,
    beta: np.ndarray,
    coupling: np.ndarray,
    rounding: np.ndarray,
) -> LanczosState:
    """The state with the results of one more step."""
    step, basis = state.diagonal.shape[1] + 1, state.basis
    return state._replace(
        vectors=vectors,
        previous=state.vectors,
        basis=basis if basis is None or step == state.num_steps else basis.append(vectors),
        diagonal=np.concatenate([state.diagonal, alpha[:, None]], axis=1),
        off_diagonal=np.concatenate([state.off_diagonal, beta[:, None]], axis=1),
        deflation_coupling=np.concatenate([state.deflation_coupling, coupling[:, None]], axis=1),
        rounding_error=rounding,
    )


def last_step(state: LanczosState) -> Step:
    """What the last step has added to a state."""
    last = (state.diagonal[:, -1], state.off_diagonal[:, -1], state.deflation_coupling[:, -1])
    values = (part.tolist() for part in (*last, state.rounding_error))
    return Step(state.vectors, dict(zip(_SCALARS, values, strict=True)))


def replay(state: LanczosState, step: Step) -> LanczosState:
    """`update` without a product, from what `last_step` gave of it: the same state, bit for bit."""
    alpha, beta, coupling, rounding = (np.asarray(step.scalars[name], float) for name in _SCALARS)
    return _advanced(state, step.vectors, alpha, beta, coupling.reshape(alpha.size, -1), rounding)


def extend(state: LanczosState, num_steps: int) -> LanczosState:
    """The state with ``num_steps`` steps to be done in all, clipped as by `init`; never fewer."""
    n, done = trees.dimension(state.vectors), state.diagonal.shape[1]
    num_steps, basis = min(num_steps, n - state.deflated_basis.size), state.basis
    if num_steps <= state.num_steps:
        return state
    # The vector after the last step was not stored, since no step was to follow.
    if basis is not None and done == state.num_steps:
        basis = basis.append(state.vectors)
    return state._replace(num_steps=num_steps, basis=basis)


def complete(state: LanczosState) -> bool:
    """Whether no step is left: all are done, or every probe has ended."""
    done = state.diagonal.shape[1]
    return done == state.num_steps or (done > 0 and not np.any(state.off_diagonal[:, -1]))


def release(state: LanczosState) -> LanczosState:
    """The state without its vectors: what it found remains, and no step can follow."""
    deflated = Basis(size=state.deflated_basis.size)
    return state._replace(vectors=None, previous=None, basis=None, deflated_basis=deflated)


def iterate(operator: Any, state: LanczosState) -> Iterator[LanczosState]:
    """The plain host loop: yields the state after each step that is left.

    It ends after ``num_steps``, or when every probe has ended. Long runs use
    `hessdensity.runs.run.Run`, which also saves, resumes and counts.

    Example:
      >>> import hessdensity as hd
      >>> state = init(jnp.ones((1, 2)), num_steps=2)
      >>> for state in iterate(hd.Matrix(np.diag([1.0, 3.0])), state):
      ...     print(state.diagonal.round(3).tolist())
      [[2.0]]
      [[2.0, 2.0]]

    Raises:
      NonFiniteProductError: a product is not finite; names the step.

    Cost: one product with k vectors in each step.
    """
    while not complete(state):
        product = multiply(operator, state.vectors, state.diagonal.shape[1])
        state = update(state, product)
        yield state


class LanczosEngine:
    """A `LanczosState` as an `Engine`, which a run can drive."""

    def __init__(self, state: LanczosState) -> None:
        self.state = state

    @property
    def complete(self) -> bool:
        """Whether no step is left."""
        return complete(self.state)

    @property
    def num_done(self) -> int:
        """The number of steps done."""
        return self.state.diagonal.shape[1]

    def request(self) -> Block:
        """The k vectors whose products are asked for."""
        return self.state.vectors

    def take(self, product: Block) -> Step:
        """`update`."""
        self.state = update(self.state, product)
        return last_step(self.state)

    def replay(self, step: Step) -> None:
        """`replay`."""
        self.state = replay(self.state, step)


@jax.jit
def _recur(
    product: Block, vectors: Block, previous: Block, beta: jax.Array
) -> tuple[Block, jax.Array]:
    """The three-term recurrence: (A v - beta v_previous - alpha v, alpha).

    The product is not donated: it belongs to the operator.
    """
    residual = trees.subtract(product, beta, previous)
    alpha = trees.inner(residual, vectors)
    return trees.subtract(residual, alpha, vectors), alpha
