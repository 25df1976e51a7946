"""The trace alone: unbiased, exact where it can be, and with error bars that hold the truth."""

import jax
import jax.numpy as jnp
import named_spectra as spectra
import numpy as np
import pytest
from problems import dense_hessian, mlp

import hessdensity as hd
from hessdensity.estimators import exchangeable as _exchangeable
from hessdensity.vectors import basis

N = 300
DECAYS = {
    "flat": np.linspace(1, 2, N),
    "hyperbolic": 1 / np.arange(1, N + 1),
    "geometric": 0.9 ** np.arange(N),
    "outliers": np.abs(spectra.ORDINARY["outliers"]),
}


def operator_of(values, key, dtype, factor=1.0):
    return hd.Matrix.from_eigenvalues(jnp.asarray(factor * values, dtype), key)


def estimates(values, key, dtype, num_matvecs, count, **settings):
    operator = operator_of(values, key, dtype)
    keys = jax.random.split(key, count)
    return [hd.trace(operator, one, num_matvecs, progress=False, **settings) for one in keys]


@pytest.mark.parametrize("semidefinite", [False, True])
@pytest.mark.parametrize("name", DECAYS)
def test_the_interval_holds_the_truth_in_95_of_100_runs_and_the_mean_is_unbiased(
    name, semidefinite, key
):
    values = DECAYS[name]
    runs = estimates(values, key, np.float32, 24, 60, semidefinite=semidefinite)
    held = sum(run.lower <= values.sum() <= run.upper for run in runs)
    assert held >= 53  # of a binomial of 60 and 0.95, 99 in 100 are
    errors = np.array([run.value for run in runs]) - values.sum()
    rms = np.sqrt(np.mean(errors**2))
    assert abs(errors.mean()) < 3.5 * rms / np.sqrt(60)
    claimed = np.sqrt(np.mean([run.standard_error**2 for run in runs]))
    assert 0.8 * rms < claimed < 4 * rms


@pytest.mark.parametrize("semidefinite", [False, True])
def test_it_beats_random_vectors_alone(semidefinite, key):
    values = DECAYS["hyperbolic"]
    runs = estimates(values, key, np.float32, 40, 20, semidefinite=semidefinite)
    rms = np.sqrt(np.mean([(run.value - values.sum()) ** 2 for run in runs]))
    girard = np.sqrt(2 * N / (N + 2) * (np.sum(values**2) - values.sum() ** 2 / N) / 40)
    assert rms < girard / 3


@pytest.mark.parametrize("semidefinite", [False, True])
@pytest.mark.parametrize("rank", [1, 17])
def test_a_low_rank_is_exact_to_rounding(rank, semidefinite, key, dtype):
    values = np.concatenate([np.arange(1.0, rank + 1), np.zeros(200 - rank)])
    for run in estimates(values, key, dtype, 60, 3, semidefinite=semidefinite):
        allowed = 100 * np.finfo(dtype).eps * np.linalg.norm(values)
        assert run.value == pytest.approx(values.sum(), abs=allowed)
        assert run.standard_error < allowed
        assert run.lower <= values.sum() <= run.upper


@pytest.mark.parametrize("semidefinite", [False, True])
def test_multiplying_the_operator_scales_the_answer(semidefinite, key):
    values = DECAYS["outliers"]
    one, *others = (
        hd.trace(
            operator_of(values, key, np.float32, c),
            key,
            30,
            semidefinite=semidefinite,
            progress=False,
        )
        for c in (1, 1e-25, 1e-6, 1e6, 1e25)
    )
    for factor, scaled in zip((1e-25, 1e-6, 1e6, 1e25), others, strict=True):
        for name in ("value", "standard_error", "lower", "upper"):
            assert getattr(scaled, name) == pytest.approx(factor * getattr(one, name), rel=1e-3)


@pytest.mark.parametrize("semidefinite", [False, True])
@pytest.mark.parametrize("name", ["zero", "identity"])
def test_a_multiple_of_the_identity_is_exact(name, semidefinite, key, dtype):
    values = spectra.BREAKDOWN[name]
    run = hd.trace(
        operator_of(values, key, dtype), key, 20, semidefinite=semidefinite, progress=False
    )
    assert run.value == pytest.approx(values.sum(), rel=float(100 * np.finfo(dtype).eps))
    assert run.lower <= values.sum() <= run.upper


def test_negative_eigenvalues_that_are_rounding_are_no_reason_to_refuse(dtype):
    """A matrix with eigenvalues 2^-i is semidefinite up to the rounding of its entries only."""
    values = 0.5 ** np.arange(1, N + 1)
    operator = operator_of(values, jax.random.key(3), dtype)
    for key in jax.random.split(jax.random.key(1), 40):
        run = hd.trace(operator, key, 200, semidefinite=True, block_size=64, progress=False)
        assert run.lower <= values.sum() <= run.upper
        assert run.upper - run.lower < 1000 * np.finfo(dtype).eps


@pytest.mark.parametrize("semidefinite", [False, True])
@pytest.mark.parametrize("num_matvecs", [4, 6])
@pytest.mark.parametrize("name", ["flat", "hyperbolic", "outliers"])
def test_the_interval_of_the_fewest_products_holds_the_truth(name, num_matvecs, semidefinite, key):
    values = DECAYS[name]
    runs = estimates(values, key, np.float32, num_matvecs, 60, semidefinite=semidefinite)
    assert sum(run.lower <= values.sum() <= run.upper for run in runs) >= 53
    assert all(np.isfinite(run.upper) for run in runs)


class Rows:
    """diag(1, .., 1, 0, .., 0): the products leave a space of few coordinates, in which nothing is
    left by the end."""

    like = jax.ShapeDtypeStruct((200,), jnp.float32)

    def __init__(self, count, factor=1.0):
        self.diagonal = factor * (jnp.arange(200) < count).astype(jnp.float32)[None]

    def __matmul__(self, block):
        return block * self.diagonal


@pytest.mark.parametrize("semidefinite", [False, True])
@pytest.mark.parametrize("rows", [3, 8, 9])
def test_an_exhausted_space_is_no_trouble(rows, semidefinite, key):
    run = hd.trace(Rows(rows), key, 40, semidefinite=semidefinite, progress=False)
    assert run.value == pytest.approx(rows, rel=1e-5)
    assert run.standard_error < 1e-4


@pytest.mark.parametrize("n", [1, 3, 24])
def test_in_few_dimensions_it_is_the_sum_of_the_diagonal(n, key, dtype):
    matrix = np.random.default_rng(0).standard_normal((n, n))
    matrix = (matrix + matrix.T).astype(dtype)
    run = hd.trace(hd.Matrix(matrix), key, 24, progress=False)
    assert run.value == pytest.approx(np.trace(matrix.astype(float)), abs=1e-12)
    assert run.lower <= np.trace(matrix) <= run.upper
    assert run.standard_error <= 8 * np.finfo(dtype).eps * np.linalg.norm(matrix)


@pytest.mark.parametrize("n", [25, 30, 50])
@pytest.mark.parametrize("semidefinite", [False, True])
def test_barely_more_dimensions_than_products_are_estimated_all_the_same(n, semidefinite, key):
    values = np.linspace(0, 1, n)
    runs = estimates(values, key, np.float32, 24, 12, semidefinite=semidefinite)
    assert sum(run.lower <= values.sum() <= run.upper for run in runs) >= 10


@pytest.mark.parametrize("semidefinite", [False, True])
def test_blocks_do_not_matter_and_the_key_decides(semidefinite, key):
    operator = operator_of(DECAYS["outliers"], key, np.float32)
    runs = [
        hd.trace(operator, key, 30, semidefinite=semidefinite, block_size=size, progress=False)
        for size in (1, 4, 99)
    ]
    for run in runs[1:]:
        assert run.value == pytest.approx(runs[0].value, rel=1e-4)
        assert run.standard_error == pytest.approx(runs[0].standard_error, rel=1e-3)
    assert hd.trace(operator, jax.random.key(1), 30, progress=False).value != runs[0].value


def test_vectors_may_be_trees(key):
    loss, params, batch = mlp(np.float32)
    hessian = hd.Hessian(loss, params, hd.batches(batch, 32))
    exact = np.trace(dense_hessian(loss, params, batch))
    runs = [
        hd.trace(hessian, one, 40, block_size=4, progress=False) for one in jax.random.split(key, 4)
    ]
    assert sum(run.lower <= exact <= run.upper for run in runs) >= 3
    assert hd.trace(hessian, key, 60, block_size=4, progress=False).value == pytest.approx(
        exact, rel=1e-5
    )


class Counted:
    """An operator that notes the sizes of its blocks."""

    like = jax.ShapeDtypeStruct((300,), jnp.float32)

    def __init__(self, happening=lambda block: block * jnp.linspace(0, 1, 300)[None]):
        self.sizes, self.happening = [], happening

    def __matmul__(self, block):
        self.sizes.append(len(block))
        return self.happening(block)


@pytest.mark.parametrize(
    ("settings", "sizes"),
    [
        ({}, [8, 7, 8, 7]),
        ({"block_size": 15}, [15, 15]),
        ({"semidefinite": True}, [8, 8, 8, 6]),
        ({"semidefinite": True, "block_size": 30}, [30]),
    ],
)
def test_it_spends_what_it_may_in_passes_of_a_block(settings, sizes, key, capsys):
    operator = Counted()
    hd.trace(operator, key, 30, progress=False, **settings)
    assert operator.sizes == sizes
    assert capsys.readouterr() == ("", "")
    hd.trace(operator, key, 31, **settings)
    out, err = capsys.readouterr()
    assert not out
    assert "30/30" in err or "31/31" in err


@pytest.mark.parametrize("take", [_exchangeable.from_range, _exchangeable.from_core])
def test_a_leave_one_out_estimate_is_the_one_made_without_that_vector(take):
    """The jackknife's downdates, against the computation done again with k - 1 test vectors."""
    rng, dimension, count = np.random.default_rng(0), 60, 9
    values = np.linspace(0, 1, dimension) ** 3
    tests = rng.standard_normal((dimension, count))
    tests /= np.linalg.norm(tests, axis=0)

    def found(tests):
        products = values[:, None] * tests
        basis, triangle = np.linalg.qr(products)
        if take is _exchangeable.from_core:
            return take(tests.T @ products, tests.T @ tests, triangle, dimension, 1e-14)
        forms = np.sum(tests * products, axis=0)
        return take(
            forms, triangle, basis.T @ (values[:, None] * basis), basis.T @ tests, dimension, 1e-15
        )

    means = np.array([found(np.delete(tests, i, axis=1)).value for i in range(count)])
    jackknife = np.sqrt((1 - 1 / count) * np.sum((means - means.mean()) ** 2))
    assert found(tests).standard_error == pytest.approx(jackknife, rel=1e-6)


def test_a_leave_one_out_estimate_is_the_papers_formula():
    """tr(Q_i^T A Q_i) + (N - k + 1) u^T A u / u^T u with Q_i and u made from scratch; the same for
    Nystrom."""
    rng, dimension, count = np.random.default_rng(0), 40, 6
    values = rng.standard_normal(dimension)
    tests = rng.standard_normal((dimension, count))
    tests /= np.linalg.norm(tests, axis=0)
    products = values[:, None] * tests
    basis, triangle = np.linalg.qr(products)
    expected, nystrom = [], []
    for i in range(count):
        others = np.linalg.qr(np.delete(products, i, axis=1))[0]
        u = tests[:, i] - others @ (others.T @ tests[:, i])
        expected.append(
            np.sum(values[:, None] * others**2)
            + (dimension - count + 1) * np.sum(values * u**2) / np.sum(u**2)
        )
        rest, rest_products = (
            np.delete(tests, i, axis=1),
            np.delete(values[:, None] ** 2 * tests, i, axis=1),
        )
        approximation = rest_products @ np.linalg.solve(rest.T @ rest_products, rest_products.T)
        plane = np.linalg.qr(rest)[0]
        u = tests[:, i] - plane @ (plane.T @ tests[:, i])
        residual = np.sum(values**2 * u**2) - u @ approximation @ u
        nystrom.append(np.trace(approximation) + (dimension - count + 1) * residual / np.sum(u**2))
    forms = np.sum(tests * products, axis=0)
    compression = basis.T @ (values[:, None] * basis)
    found = _exchangeable.from_range(
        forms, triangle, compression, basis.T @ tests, dimension, 1e-15
    )
    assert found.value == pytest.approx(np.mean(expected), rel=1e-10)
    squares = values[:, None] ** 2 * tests
    found = _exchangeable.from_core(
        tests.T @ squares, tests.T @ tests, np.linalg.qr(squares)[1], dimension, 1e-15
    )
    assert found.value == pytest.approx(np.mean(nystrom), rel=1e-9)


# Bad input ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_matvecs", [30, 400])
def test_an_operator_that_is_not_symmetric_is_refused(num_matvecs, key):
    skew = jnp.asarray(np.random.default_rng(0).standard_normal((300, 300)), jnp.float32)
    with pytest.raises(
        ValueError, match=r"not symmetric, or not the same in every product.*verify_operator"
    ):
        hd.trace(Counted(lambda block: block @ skew), key, num_matvecs, progress=False)
    with pytest.raises(ValueError, match="not symmetric"):
        hd.trace(
            Counted(lambda block: block @ skew), key, num_matvecs, semidefinite=True, progress=False
        )


@pytest.mark.parametrize("num_matvecs", [30, 400])
@pytest.mark.parametrize("factor", [1e-10, 1.0])
def test_a_negative_eigenvalue_is_refused_where_there_should_be_none(num_matvecs, factor, key):
    operator = operator_of(spectra.ORDINARY["outliers"], key, np.float32, factor)
    assert hd.trace(operator, key, num_matvecs, progress=False).lower < factor * 25
    with pytest.raises(
        ValueError,
        match=r"semidefinite=True, but a product shows the eigenvalue -.*semidefinite=False",
    ):
        hd.trace(operator, key, num_matvecs, semidefinite=True, progress=False)


@pytest.mark.parametrize("num_matvecs", [30, 400])
def test_a_product_that_is_not_finite_is_refused(num_matvecs, key):
    with pytest.raises(FloatingPointError, match="product is not finite"):
        hd.trace(Counted(lambda block: block * jnp.nan), key, num_matvecs, progress=False)


@pytest.mark.parametrize(
    ("change", "error", "said"),
    [
        ({"num_matvecs": 3}, ValueError, "num_matvecs=3, expected a whole number of at least 4"),
        ({"num_matvecs": 10.0}, ValueError, "num_matvecs=10.0, expected a whole number"),
        ({"block_size": 0}, ValueError, "block_size=0, expected a whole number of at least 1"),
        ({"operator": np.eye(3)}, TypeError, "operator is a ndarray; expected hd.Hessian"),
        ({"key": 0}, TypeError, "key is a int; expected a JAX random key"),
    ],
)
def test_arguments_that_cannot_be_are_refused(change, error, said):
    arguments = {
        "operator": hd.Matrix(jnp.eye(3)),
        "key": jax.random.key(0),
        "num_matvecs": 8,
    } | change
    with pytest.raises(error, match=said):
        hd.trace(**arguments, progress=False)


def test_memory_holds_no_more_programs_than_shapes_of_blocks(key):
    operator = operator_of(DECAYS["flat"], key, np.float32)
    hd.trace(operator, key, 32, progress=False)
    compiled = basis.inner_products._cache_size()
    hd.trace(operator, key, 96, progress=False)
    assert basis.inner_products._cache_size() == compiled
