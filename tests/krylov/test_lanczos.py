"""The engine: what Lanczos promises in exact arithmetic, to rounding."""

import json

import jax
import jax.numpy as jnp
import named_spectra as spectra
import numpy as np
import pytest

import hessdensity as hd
from hessdensity.krylov import lanczos
from hessdensity.krylov.engine import Step
from hessdensity.krylov.lanczos_engine import LanczosEngine
from hessdensity.vectors import basis
from hessdensity.vectors.random import random_block


def operator_of(values, key, dtype):
    return hd.Matrix.from_eigenvalues(jnp.asarray(values, dtype), key)


def run(operator, key, num_steps, count=2, deflated_basis=None):
    state = lanczos.init(random_block(key, 0, count, operator.like), num_steps, deflated_basis)
    for state in lanczos.iterate(operator, state):
        pass
    return state


def basis_of(state, probe):
    """(m, n) float64: the basis vectors whose products were taken; vectors are one array."""
    chunks = [np.moveaxis(np.asarray(chunk[probe], float), -2, 0) for chunk in state.basis.chunks]
    rows = np.concatenate([chunk.reshape(chunk.shape[0], -1) for chunk in chunks])
    return rows[: state.diagonal.shape[1]]


def tridiagonal(state, probe):
    off = state.off_diagonal[probe, :-1]
    return np.diag(state.diagonal[probe]) + np.diag(off, 1) + np.diag(off, -1)


@pytest.mark.parametrize("name", spectra.ORDINARY)
def test_the_basis_is_orthonormal_and_compresses_the_operator_to_T(name, key, dtype):
    values = spectra.ORDINARY[name]
    operator = operator_of(values, key, dtype)
    state, epsilon = run(operator, key, 50), np.finfo(dtype).eps
    matrix = hd.dense(operator)
    for probe in range(2):
        basis, t = basis_of(state, probe), tridiagonal(state, probe)
        assert np.abs(basis @ basis.T - np.eye(50)).max() < 40 * epsilon
        assert np.abs(basis @ matrix @ basis.T - t).max() < 60 * epsilon * np.abs(values).max()


def test_the_theorems_hold_in_the_middle_of_a_run(key, dtype):
    operator = operator_of(spectra.ORDINARY["outliers"], key, dtype)
    state, matrix, epsilon = (
        lanczos.init(random_block(key, 0, 1, operator.like), 30),
        hd.dense(operator),
        0,
    )
    epsilon = np.finfo(dtype).eps
    for state in lanczos.iterate(operator, state):
        basis = basis_of(state, 0)
        steps = len(basis)
        assert np.abs(basis @ basis.T - np.eye(steps)).max() < 40 * epsilon
        # A V^T - V^T T = beta_m v_m e_m^T
        rest = basis @ matrix - tridiagonal(state, 0) @ basis
        rest[-1] -= state.off_diagonal[0, -1] * np.asarray(state.vectors[0], float)
        assert np.abs(rest).max() < 100 * epsilon * 10


@pytest.mark.parametrize("name", spectra.BREAKDOWN)
def test_an_exhausted_krylov_space_ends_the_probe_inside_the_spectrum(name, key, dtype):
    values = spectra.BREAKDOWN[name]
    state = run(operator_of(values, key, dtype), key, 40)
    scale = np.abs(values).max() or 1.0
    assert state.diagonal.shape[1] <= min(40, values.size)
    for probe in range(2):
        basis = basis_of(state, probe)
        alive = np.linalg.norm(basis, axis=1) > 0
        gram = basis[alive] @ basis[alive].T
        assert np.abs(gram - np.eye(alive.sum())).max() < 40 * np.finfo(dtype).eps
        ritz = np.linalg.eigvalsh(tridiagonal(state, probe))
        assert ritz.min() > min(values.min(), 0) - 1e-5 * scale
        assert ritz.max() < max(values.max(), 0) + 1e-5 * scale


def test_one_probe_ends_and_the_others_go_on(key, dtype):
    values = np.arange(1.0, 21.0)
    operator = hd.Matrix(jnp.diag(jnp.asarray(values, dtype)))
    start = jnp.stack([jnp.eye(20, dtype=dtype)[3], jnp.ones(20, dtype)])
    state = lanczos.init(start, 10)
    for state in lanczos.iterate(operator, state):
        pass
    assert state.diagonal[0, 0] == pytest.approx(4)
    assert not state.off_diagonal[0].any()
    assert (state.off_diagonal[1] > 0).all()
    assert state.diagonal.shape == (2, 10)


@pytest.mark.parametrize("factor", [1e-6, 1e-3, 1e3, 1e6])
def test_T_of_a_scaled_and_shifted_operator_is_scaled_and_shifted(factor, key, dtype):
    values = spectra.ORDINARY["linear"]
    plain = run(operator_of(values, key, dtype), key, 20)
    scaled = run(operator_of(factor * (values + 3.0), key, dtype), key, 20)
    tolerance = 400 * np.finfo(dtype).eps * 4
    np.testing.assert_allclose(scaled.diagonal / factor, plain.diagonal + 3.0, atol=tolerance)
    np.testing.assert_allclose(scaled.off_diagonal / factor, plain.off_diagonal, atol=tolerance)


@pytest.mark.parametrize("factor", [1e-30, 1e30])
def test_no_threshold_is_absolute(factor, key):
    values = spectra.BREAKDOWN["eight of 300"]
    state = run(operator_of(factor * values, key, np.float32), key, 40)
    assert state.diagonal.shape[1] <= 12
    assert np.linalg.eigvalsh(tridiagonal(state, 0)).max() == pytest.approx(10 * factor, rel=1e-5)


def test_a_recurrence_against_a_basis_stays_orthogonal_to_it(key, dtype):
    values = spectra.ORDINARY["outliers"]
    operator = operator_of(values, key, dtype)
    first = run(operator, jax.random.fold_in(key, 1), 20, count=1)
    against = basis_of(first, 0)
    state = run(operator, key, 30, deflated_basis=jnp.asarray(against, dtype))
    compression = np.linalg.svd(against)[2][20:]
    allowed = np.linalg.eigvalsh(compression @ hd.dense(operator) @ compression.T)
    for probe in range(2):
        basis = basis_of(state, probe)
        assert np.abs(basis @ against.T).max() < 40 * np.finfo(dtype).eps
        assert np.abs(basis @ basis.T - np.eye(30)).max() < 40 * np.finfo(dtype).eps
        ritz = np.linalg.eigvalsh(tridiagonal(state, probe))
        assert ritz.max() < allowed.max() + 1e-5
        assert ritz.min() > allowed.min() - 1e-5
    n = values.size
    assert (
        run(operator, key, n, deflated_basis=jnp.asarray(against, dtype)).diagonal.shape[1]
        <= n - 20
    )


def test_a_state_saved_and_resumed_in_the_middle_equals_an_uninterrupted_run(key, dtype):
    operator = operator_of(spectra.ORDINARY["outliers"], key, dtype)
    whole = run(operator, key, 25)
    state = lanczos.init(random_block(key, 0, 2, operator.like), 25)
    for _ in range(11):
        state = lanczos.update(state, operator @ state.vectors)
    saved = jax.tree.map(np.array, state)
    host = {"num_steps": int(saved.num_steps)}
    host |= {name: getattr(saved, name) for name in ("diagonal", "off_diagonal", "rounding_error")}
    resumed = jax.tree.map(jnp.asarray, saved)._replace(**host)
    for resumed in lanczos.iterate(operator, resumed):
        pass
    np.testing.assert_array_equal(resumed.diagonal, whole.diagonal)
    np.testing.assert_array_equal(resumed.off_diagonal, whole.off_diagonal)


def test_compilation_does_not_grow_with_the_steps(key):
    operator = operator_of(spectra.ORDINARY["linear"], key, np.float32)
    kernels = [
        lanczos._recur,
        basis.write_row,
        basis.first_row,
        basis.subtract_in_place,
    ]
    run(operator, key, 2 * lanczos.CHUNK)
    before = [kernel._cache_size() for kernel in kernels]
    run(operator, key, 9 * lanczos.CHUNK + 3)
    assert [kernel._cache_size() for kernel in kernels] == before


def test_matfree_computes_the_same_tridiagonal_matrix(key, dtype):
    from matfree import decomp

    matrix = hd.dense(operator_of(spectra.ORDINARY["outliers"], key, dtype)).astype(dtype)
    start = random_block(key, 0, 1, jax.ShapeDtypeStruct((300,), dtype))
    state = lanczos.init(start, 15)
    for state in lanczos.iterate(hd.Matrix(jnp.asarray((matrix + matrix.T) / 2)), state):
        pass
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        theirs = decomp.tridiag_sym(15, reortho="full")(lambda v: matrix @ v, start[0])
    np.testing.assert_allclose(
        tridiagonal(state, 0), theirs.J_small, atol=2e4 * np.finfo(dtype).eps
    )


@pytest.mark.parametrize(
    ("start", "num_steps", "deflated", "said"),
    [
        (np.ones((1, 4)), 0, None, "num_steps=0, expected at least 1"),
        (np.zeros((1, 4)), 2, None, "start_vectors have norms"),
        (np.full((1, 4), np.nan), 2, None, "expected finite"),
        (np.eye(4)[:1], 2, np.eye(4)[:2], "outside of deflated_basis"),
        (np.eye(4)[:1], 2, np.eye(4), "expected fewer vectors than dimensions"),
    ],
)
def test_a_start_that_cannot_be_is_refused(start, num_steps, deflated, said):
    arrays = (None if a is None else jnp.asarray(a, jnp.float32) for a in (start, deflated))
    start, deflated = arrays
    with pytest.raises(ValueError, match=said):
        lanczos.init(start, num_steps, deflated)


def test_an_operator_that_is_not_symmetric_is_refused_at_no_cost(key, dtype):
    wrong = np.random.default_rng(0).standard_normal((30, 30))
    nonsymmetric = hd.FunctionOperator(
        lambda v: jnp.asarray(wrong, dtype) @ v, jnp.zeros(30, dtype)
    )
    drifting = iter(range(100))
    unstable = hd.FunctionOperator(
        lambda v: v * jnp.roll(jnp.arange(30.0, dtype=dtype), next(drifting)), nonsymmetric.like
    )
    for operator in (nonsymmetric, unstable):
        with pytest.raises(
            ValueError, match=r"step [1-5]: the operator is not symmetric, or not the same"
        ):
            run(operator, key, 10, count=1)


@pytest.mark.parametrize("count", [1, 4])
def test_a_symmetric_operator_is_not_taken_for_another(count, key):
    # Balanced spectra, whose first diagonal entry is zero by cancellation, at the ends of the range
    # of float32.
    for seed in range(8):
        for factor in (1e-30, 1.0, 1e30):
            values = factor * np.concatenate(
                [np.ones(200), -np.ones(200), np.linspace(-0.1, 0.1, 100)]
            )
            run(operator_of(values, key, np.float32), jax.random.key(seed), 12, count)


def test_the_products_noise_is_measured(key):
    rounded = hd.FunctionOperator(
        lambda v: (v.astype(jnp.bfloat16) * jnp.linspace(-1, 1, 500, dtype=jnp.bfloat16)).astype(
            jnp.float32
        ),
        jnp.zeros(500, jnp.float32),
    )
    assert 1e-5 < run(rounded, key, 30).rounding_error.max() < 1e-2
    assert (
        run(operator_of(np.linspace(-1, 1, 500), key, np.float32), key, 30).rounding_error.max()
        < 5e-6
    )


def nearly_symmetric(dtype, share, n=60):
    """(operator, matrix): an asymmetric matrix with |A - A^T| = share |A|, about."""
    rng = np.random.default_rng(1)
    symmetric, skew = (rng.standard_normal((n, n)) for _ in range(2))
    symmetric = symmetric + symmetric.T
    skew = skew - skew.T
    matrix = symmetric + share / 2 * skew * np.linalg.norm(symmetric) / np.linalg.norm(skew)
    array = jnp.asarray(matrix, dtype)
    return hd.FunctionOperator(lambda v: array @ v, jnp.zeros(n, dtype)), matrix


@pytest.mark.parametrize("storage", ["device", "host"])
def test_the_asymmetry_is_that_of_the_compression_exactly(storage, key, dtype):
    operator, matrix = nearly_symmetric(dtype, 0.05)
    state = lanczos.init(random_block(key, 0, 2, operator.like), 25, basis_storage=storage)
    for state in lanczos.iterate(operator, state):
        pass
    shares = lanczos.asymmetry(state)
    for probe in range(2):
        basis, t = basis_of(state, probe), tridiagonal(state, probe)
        compression = basis @ matrix @ basis.T
        expected = np.linalg.norm(compression - compression.T)
        assert state.asymmetric_norm[probe] == pytest.approx(expected, rel=1e-4)
        assert shares[probe] == pytest.approx(expected / np.linalg.norm(t), rel=1e-4)
        # Hoffman and Wielandt
        symmetric = np.linalg.eigvalsh((compression + compression.T) / 2)
        moved = np.linalg.norm(np.linalg.eigvalsh(t) - symmetric)
        assert moved <= state.asymmetric_norm[probe] / 2


def test_over_the_whole_space_the_asymmetry_is_that_of_the_operator(key, dtype):
    operator, matrix = nearly_symmetric(dtype, 0.02, n=20)
    share = lanczos.asymmetry(run(operator, key, 20, count=1))[0]
    assert share == pytest.approx(np.linalg.norm(matrix - matrix.T) / np.linalg.norm(matrix), 0.01)


@pytest.mark.parametrize("name", spectra.ORDINARY)
def test_a_symmetric_operator_has_an_asymmetry_of_rounding(name, key, dtype):
    state = run(operator_of(spectra.ORDINARY[name], key, dtype), key, 50)
    assert lanczos.asymmetry(state).max() < 40 * np.finfo(dtype).eps


def test_an_operator_of_zeros_has_no_asymmetry(key):
    assert not lanczos.asymmetry(run(hd.Matrix(np.zeros((9, 9), np.float32)), key, 3)).any()


def test_without_a_basis_the_asymmetry_is_a_lower_bound(key, dtype):
    operator, _ = nearly_symmetric(dtype, 0.05)
    found = {}
    for storage in ("device", "none"):
        state = lanczos.init(random_block(key, 0, 2, operator.like), 25, basis_storage=storage)
        for state in lanczos.iterate(operator, state):
            pass
        found[storage] = lanczos.asymmetry(state)
    assert np.all(found["none"] > 1e-4)
    assert np.all(found["none"] < found["device"])


def test_below_outliers_that_are_deflated_rounding_is_no_asymmetry(key):
    """Beside a bulk of 1e-6, float32 rounding of an outlier of 1 would be an asymmetry of 10 %."""
    values = np.concatenate([[1.0], 1e-6 * np.linspace(-1, 1, 199)])
    operator = operator_of(values, key, np.float32)
    first = run(operator, key, 8, count=1)
    state = lanczos.init(random_block(key, 1, 2, operator.like), 20, first.basis, operator_norm=1.0)
    for state in lanczos.iterate(operator, state):
        pass
    assert lanczos.asymmetry(state).max() < 1e-5


@pytest.mark.parametrize("factor", [1e-6, 1e6])
def test_the_asymmetry_does_not_depend_on_the_scale(factor, key):
    operator, matrix = nearly_symmetric(np.float32, 0.05)
    array = jnp.asarray(factor * matrix, np.float32)
    scaled = hd.FunctionOperator(lambda v: array @ v, jnp.zeros(60, np.float32))
    plain, other = (lanczos.asymmetry(run(op, key, 20)) for op in (operator, scaled))
    np.testing.assert_allclose(plain, other, rtol=1e-4)


def test_a_replayed_step_restores_the_asymmetry_bit_for_bit(key, dtype):
    operator, _ = nearly_symmetric(dtype, 0.05)
    start = random_block(key, 0, 2, operator.like)
    engine, replayed = (LanczosEngine(lanczos.init(start, 6)) for _ in range(2))
    while not engine.complete:
        step = engine.take(operator @ engine.request())
        saved = json.loads(json.dumps(step.scalars))
        replayed.replay(Step(jax.tree.map(jnp.copy, step.vectors), saved))
    assert engine.asymmetry == replayed.asymmetry > 0.01
    np.testing.assert_array_equal(engine.state.asymmetric_norm, replayed.state.asymmetric_norm)


def test_a_product_is_the_operators_to_keep_and_is_checked(key):
    class Identity:
        like = jax.ShapeDtypeStruct((20,), jnp.float32)

        def __matmul__(self, block):
            return block

    assert run(Identity(), key, 5).diagonal[:, 0] == pytest.approx(1)
    wrong = Identity()
    wrong.like, state = jax.ShapeDtypeStruct((21,), jnp.float32), lanczos.init(jnp.ones((1, 20)), 3)
    with pytest.raises(ValueError, match=r"the operator's product: the vector is float32\[1, 20\]"):
        list(lanczos.iterate(wrong, state))


def test_a_product_that_is_not_finite_names_the_step(key):
    calls = iter([1.0, 1.0, np.nan])
    operator = hd.FunctionOperator(lambda v: v * jnp.arange(5.0) * next(calls), jnp.zeros(5))
    state = lanczos.init(random_block(key, 0, 1, operator.like), 5)
    with pytest.raises(hd.NonFiniteProductError, match="Step 2") as caught:
        list(lanczos.iterate(operator, state))
    assert caught.value.step == 2
