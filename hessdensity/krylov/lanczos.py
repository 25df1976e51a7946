"""k independent Lanczos recurrences with reorthogonalization, by reverse communication.

The engine never calls an operator. A state asks for ``operator @ state.vectors``, and `update`
takes this product. So the operator may stream from disk or run on many hosts, and progress bars,
checkpoints and early stopping belong to the loop.

In exact arithmetic each recurrence builds

    A V = V T + beta_{m-1} v_m e_{m-1}^T,    V^T V = I,    T tridiagonal (Lanczos 1950),

with the columns v_0 .. v_{m-1} of V, alpha_j on the diagonal of T and beta_j beside it.

Rounding destroys the orthogonality as soon as a Ritz value converges (Paige 1976). So every new
vector is orthogonalized again, against all earlier ones. Without a stored basis the Gauss rules
remain correct, but copies of converged Ritz values appear (`hessdensity.spectra.deflation`).
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from hessdensity.errors import NOT_FINITE, NonFiniteProductError
from hessdensity.vectors import trees
from hessdensity.vectors.basis import CHUNK, STORAGES, Basis, chunks_of
from hessdensity.vectors.orthogonalize import orthogonalize, orthogonalize_locally, project_out
from hessdensity.vectors.trees import Block

from .engine import ASYMMETRY, Step, multiply

_SCALARS = (
    "diagonal",
    "off_diagonal",
    "deflation_coupling",
    "rounding_error",
    "asymmetric_norm",
    "start_products",
)


class LanczosState(NamedTuple):
    """Everything that the next step needs. It is a pytree, which can be saved after any step.

    Below, ``j`` is the number of steps done, and ``k`` is the number of probes.
    """

    vectors: Block
    """The k vectors to be multiplied next. A probe that has ended has the zero vector."""
    previous: Block
    """The k vectors before them."""
    basis: Basis | None
    """Vectors 0 to j of each probe, or None if they are not stored."""
    deflated_basis: Basis
    """The basis, with a single probe, that all probes stay orthogonal to."""
    operator_norm: float
    """A lower bound of the operator's norm, known beforehand.

    Anything small beside it is rounding error, also in the complement of ``deflated_basis``.
    """
    num_steps: int
    """The total number of steps."""
    diagonal: np.ndarray
    """(k, j) float64, on the host: alpha, the diagonal of each T."""
    off_diagonal: np.ndarray
    """(k, j) float64, on the host: beta, the entries below the diagonal of each T.

    The last one lies outside of T. If it is 0, the probe has ended.
    """
    deflation_coupling: np.ndarray
    """(k, j, r) float64, on the host: components of the products along ``deflated_basis``.

    r is the number of its vectors, with zeros added to fill whole chunks.
    """
    rounding_error: np.ndarray
    """(k,) float64, on the host: the error of the entries of T.

    It is the largest part of a product along earlier vectors, where exact arithmetic has none, or a
    few rounding units of the norm.
    """
    asymmetric_norm: np.ndarray
    """(k,) float64, on the host: |V^T (A - A^T) V|, in the Frobenius norm; see `asymmetry`."""
    starts: Block | None
    """The k start vectors, if no basis is stored and there are several. Otherwise None."""
    start_products: np.ndarray
    """(k, j, k) float64, on the host: inner products of each vector with all start vectors.

    They tell whether two probes have found the same eigenvector. Without ``starts`` the last
    dimension is 0.
    """


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
      start_vectors: block of k vectors, which are normalized here.
      num_steps: number of Lanczos steps m, at least 1. Clipped to the dimension that
        ``deflated_basis`` leaves.
      deflated_basis: block of m0 orthonormal vectors, or the `Basis` of an earlier run. All probes
        share it and stay orthogonal to it. Each recurrence then belongs to the operator's
        compression to the complement of this basis.
      basis_storage: where the basis is kept. ``"device"``: on the device. ``"host"``: in the
        memory of the host, in full chunks. Every step moves each chunk to the device and reads it
        there. ``"none"``: nowhere. Each vector is orthogonalized against the last two only.
      operator_norm: a lower bound of the operator's norm, if one is known.

    Raises:
      ValueError: ``num_steps`` is below 1, ``basis_storage`` is unknown, or a start vector is zero,
        is not finite, or lies in the span of ``deflated_basis``.

    Memory: k (m + 4) + m0 vectors at the end, with m and m0 rounded up to multiples of 8. With
    "host", 4 k of these and a few chunks are on the device. With "none" there are 4 k in all.
    """
    if num_steps < 1:
        raise ValueError(f"num_steps={num_steps}, expected at least 1.")
    if basis_storage not in STORAGES:
        allowed = ", ".join(map(repr, STORAGES))
        raise ValueError(f"basis_storage={basis_storage!r}, expected one of {allowed}.")
    k = trees.count(start_vectors)
    n = trees.dimension(start_vectors)
    deflated = _as_basis(deflated_basis)
    if deflated.size >= n:
        raise ValueError(
            f"deflated_basis holds {deflated.size} vectors of dimension {n}; expected fewer "
            "vectors than dimensions, so that the recurrence has a space."
        )
    norms = trees.norm(start_vectors)
    vectors, _, left = orthogonalize(trees.normalize(start_vectors, norms), deflated.chunks)
    if not np.all(left > 64 * trees.epsilon(start_vectors)):  # also true for NaN
        raise ValueError(
            f"start_vectors have norms {np.asarray(norms)}, and shares {left} of these lie outside "
            "of deflated_basis; expected finite vectors that are not zero there."
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
        asymmetric_norm=np.zeros(k),
        starts=vectors if stored is None and k > 1 else None,
        start_products=np.zeros((k, 0, k if stored is None and k > 1 else 0)),
    )


def _as_basis(given: Block | Basis | None) -> Basis:
    if given is None:
        return Basis()
    return given if isinstance(given, Basis) else Basis(tuple(chunks_of(given)), trees.count(given))


def update(state: LanczosState, product: Block) -> LanczosState:
    """Do one step with ``operator @ state.vectors``, and return the state that it leads to.

    The memory of ``state`` is reused. Only its fields on the host may be used after the call.

    A probe ends when its Krylov space is invariant, that is, when beta <= 8 eps times the known
    norm of the operator. Its off-diagonal entry is then exactly 0, its next vector is 0, and the
    other probes continue. A smaller beta would be rounding error. A larger beta does no harm,
    because the next vector is orthogonal to the others in any case.

    Raises:
      NonFiniteProductError: the product holds a NaN or an infinity.
      ValueError: the operator is not symmetric. For a symmetric operator, the three terms leave
        nothing along the earlier vectors. The part that reorthogonalization removes there shows the
        asymmetry, at no further cost.

    Cost: reads the basis twice.
    """
    step = state.diagonal.shape[1]
    # w = A v_j - beta_{j-1} v_{j-1},    alpha_j = w . v_j,    w <- w - alpha_j v_j
    last = state.off_diagonal[:, -1] if step else np.zeros(len(state.diagonal))
    beta_before = jnp.asarray(last, trees.scalar_dtype(product))
    residual, alpha = _recur(product, state.vectors, state.previous, beta_before)
    # Where the span of the deflated basis Q is not invariant, the part along Q is a true coupling:
    # w <- w - Q (Q^T w), and Q^T w is kept.
    residual, coupling = project_out(residual, state.deflated_basis.chunks)
    # In exact arithmetic, w is now orthogonal to all earlier vectors. Anything found along them is
    # rounding error, and is removed.
    if state.basis is not None:
        chunks = (*state.deflated_basis.chunks, *state.basis.chunks)
        residual, removed, beta = orthogonalize(residual, chunks)
    else:
        residual, removed, beta = orthogonalize_locally(residual, state.vectors, state.previous)
    alpha = np.asarray(alpha, float)
    if not np.all(np.isfinite(alpha)) or not np.all(np.isfinite(beta)):
        raise NonFiniteProductError(step, NOT_FINITE)
    epsilon = trees.epsilon(product)
    norm = _norm_of(state, alpha)
    _refuse_asymmetric(step, removed, np.maximum(norm, beta))
    # v_{j+1} = w / beta_j. The vector of a probe that has ended becomes zero.
    beta = np.where(beta > 8 * epsilon * norm, beta, 0)
    vectors = trees.normalize(residual, jnp.asarray(beta))
    rounding = np.maximum.reduce([state.rounding_error, removed, 4 * epsilon * norm])
    # The part removed is V^T A v_j beyond what T has of it. Its counterpart, v_j^T A V beyond T, is
    # zero, because A v_i lies in the span of v_0 .. v_{i+1}. So it is a column of V^T (A - A^T) V.
    asymmetric = np.hypot(state.asymmetric_norm, np.sqrt(2) * removed)
    products = _products_with_starts(state)
    numbers = (alpha, beta.astype(float), coupling, rounding, asymmetric, products)
    return _advanced(state, vectors, *numbers)


def _products_with_starts(state: LanczosState) -> np.ndarray:
    """The inner products of the vectors that were multiplied with all start vectors: (k, k)."""
    count = len(state.diagonal)
    if state.starts is None:
        return np.zeros((count, 0))
    found = np.zeros((count, count))
    for shift in range(count):
        # Vector i and start i + shift.
        products = _inner_shifted(state.vectors, state.starts, shift)
        found[np.arange(count), (np.arange(count) + shift) % count] = np.asarray(products, float)
    return found


def _norm_of(state: LanczosState, alpha: np.ndarray) -> np.ndarray:
    """The norm of the operator as far as each probe knows it: (k,).

    The largest row sum bounds the norm of T from above, within a factor of two.
    """
    rows = np.abs(np.concatenate([state.diagonal, alpha[:, None]], axis=1))
    rows[:, :-1] += state.off_diagonal
    rows[:, 1:] += state.off_diagonal
    return np.maximum(rows.max(axis=1), float(state.operator_norm))


def _refuse_asymmetric(step: int, removed: np.ndarray, norm: np.ndarray) -> None:
    if np.any(removed > ASYMMETRY * norm):
        raise ValueError(
            f"Lanczos step {step}: the operator is not symmetric, or not the same in every "
            f"product. A part of this product, {np.max(removed / norm):.2g} of the operator's "
            "norm, lies along earlier vectors, where a symmetric operator has none. Examine it "
            "with hd.verify_operator(operator, key)."
        )


def _advanced(
    state: LanczosState,
    vectors: Block,
    alpha: np.ndarray,
    beta: np.ndarray,
    coupling: np.ndarray,
    rounding: np.ndarray,
    asymmetric: np.ndarray,
    start_products: np.ndarray,
) -> LanczosState:
    """The state with the results of one more step."""
    step = state.diagonal.shape[1] + 1
    basis = state.basis
    return state._replace(
        vectors=vectors,
        previous=state.vectors,
        basis=basis if basis is None or step == state.num_steps else basis.append(vectors),
        diagonal=np.concatenate([state.diagonal, alpha[:, None]], axis=1),
        off_diagonal=np.concatenate([state.off_diagonal, beta[:, None]], axis=1),
        deflation_coupling=np.concatenate([state.deflation_coupling, coupling[:, None]], axis=1),
        rounding_error=rounding,
        asymmetric_norm=asymmetric,
        start_products=np.concatenate([state.start_products, start_products[:, None]], axis=1),
    )


def last_step(state: LanczosState) -> Step:
    """Everything that the last step has added to a state."""
    last = (state.diagonal[:, -1], state.off_diagonal[:, -1], state.deflation_coupling[:, -1])
    errors = (state.rounding_error, state.asymmetric_norm)
    values = (part.tolist() for part in (*last, *errors, state.start_products[:, -1]))
    return Step(state.vectors, dict(zip(_SCALARS, values, strict=True)))


def replay(state: LanczosState, step: Step) -> LanczosState:
    """The result of `update` bit for bit, from the result of `last_step` instead of a product."""
    alpha, beta, coupling, *others = (np.asarray(step.scalars[name], float) for name in _SCALARS)
    others[-1] = others[-1].reshape(alpha.size, -1)
    return _advanced(state, step.vectors, alpha, beta, coupling.reshape(alpha.size, -1), *others)


def asymmetry(state: LanczosState) -> np.ndarray:
    """How far the products are from those of a symmetric operator: (k,), a share of its norm.

        |V^T (A - A^T) V| / |T|,    in Frobenius norms,

    where T is the part of V^T A V that a symmetric operator has. The norm known beforehand replaces
    that of T if it is larger. Rounding in float32 gives 1e-7 to 1e-5.

    The eigenvalues of T differ from those of the symmetric part of V^T A V by at most half of
    ``state.asymmetric_norm``, in the root of the sum of squares (Hoffman and Wielandt 1953).

    V spans the Krylov space, so this is a lower bound. Without a stored basis, only the last two
    vectors are compared, and the bound is lower still.
    """
    squares = np.sum(state.diagonal**2, axis=1) + 2 * np.sum(
        state.off_diagonal[:, :-1] ** 2, axis=1
    )
    norm = np.maximum(np.sqrt(squares), float(state.operator_norm))
    return np.where(norm > 0, state.asymmetric_norm / np.where(norm > 0, norm, 1), 0.0)


def extend(state: LanczosState, num_steps: int) -> LanczosState:
    """The state with a total of ``num_steps`` steps, clipped as by `init`, and never fewer."""
    n = trees.dimension(state.vectors)
    done = state.diagonal.shape[1]
    num_steps = min(num_steps, n - state.deflated_basis.size)
    basis = state.basis
    if num_steps <= state.num_steps:
        return state
    # The vector after the last step was not stored, because no step was to follow.
    if basis is not None and done == state.num_steps:
        basis = basis.append(state.vectors)
    return state._replace(num_steps=num_steps, basis=basis)


def complete(state: LanczosState) -> bool:
    """Whether no step is left, because all are done or every probe has ended."""
    done = state.diagonal.shape[1]
    return done == state.num_steps or (done > 0 and not np.any(state.off_diagonal[:, -1]))


def release(state: LanczosState) -> LanczosState:
    """The state without its vectors. Its results remain, but no step can follow."""
    deflated = Basis(size=state.deflated_basis.size)
    return state._replace(vectors=None, previous=None, basis=None, deflated_basis=deflated)


def iterate(operator: Any, state: LanczosState) -> Iterator[LanczosState]:
    """Run the plain host loop, and yield the state after each step.

    The loop ends after ``num_steps`` steps or when every probe has ended. Long runs use
    `hessdensity.runs.run.Run`, which also saves, resumes and counts.

    Example:
      >>> import jax.numpy as jnp, numpy as np, hessdensity as hd
      >>> state = hd.lanczos.init(jnp.ones((1, 2)), num_steps=2)
      >>> for state in hd.lanczos.iterate(hd.Matrix(np.diag([1.0, 3.0])), state):
      ...     print(state.diagonal.round(3).tolist())
      [[2.0]]
      [[2.0, 2.0]]

    Raises:
      NonFiniteProductError: a product is not finite. The message names the step.

    Cost: one product with k vectors in each step.
    """
    while not complete(state):
        product = multiply(operator, state.vectors, state.diagonal.shape[1])
        state = update(state, product)
        yield state


@partial(jax.jit, static_argnums=2)
def _inner_shifted(vectors: Block, others: Block, shift: int) -> jax.Array:
    """Inner products (k,) of vector i with the other vector i + shift."""
    return trees.inner(vectors, jax.tree.map(lambda leaf: jnp.roll(leaf, -shift, axis=0), others))


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
