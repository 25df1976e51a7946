"""Error bars for the sampling of the data: parts are what they say, cost what they say, and vary as
fresh data do."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from problems import dense_hessian, mlp

import hessdensity as hd
from hessdensity.losses import risk
from hessdensity.vectors import trees

VARIANCES = np.array(
    [9.0, 1, 1, 1, 1, 1]
)  # of the inputs of a least-squares problem: the Hessian is their covariance
N = 640


def half_square(w, x):
    return jnp.mean((x @ w) ** 2) / 2


def least_squares(seed, dtype=np.float32, count=N, num_batches=16):
    x = np.random.default_rng(seed).standard_normal((count, 6)) * np.sqrt(VARIANCES)
    x = x.astype(dtype)
    return hd.Hessian(half_square, jnp.zeros(6, dtype), hd.batches(x, count // num_batches)), x


def densities_of(hessian, key=None, num_parts=8, **settings):
    return hd.part_densities(
        hessian, jax.random.key(0) if key is None else key, num_parts, progress=False, **settings
    )


def largest(density):
    return density.extremes().largest


def trace(density):
    return density.trace()


# The parts' operator ------------------------------------------------------------------------------


@pytest.mark.parametrize("num_parts", [2, 3, 5])
def test_a_parts_products_are_those_of_its_batches_alone(num_parts, dtype):
    loss, params, batch = mlp(dtype)
    batches = hd.batches(batch, 15)  # five, the last one smaller: unequal parts
    hessian = hd.Hessian(loss, params, batches)
    rows = np.random.default_rng(0).standard_normal((2 * num_parts, 55))
    product, counts = hessian.multiply_parts(trees.unravel(rows, hessian.like), num_parts)
    for part in range(num_parts):
        own = slice(2 * part, 2 * part + 2)
        together = jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *batches[part::num_parts])
        exact = rows[own] @ dense_hessian(loss, params, together)
        np.testing.assert_allclose(
            trees.ravel(product)[own], exact, atol=2000 * np.finfo(dtype).eps
        )
        assert counts[part] == len(together[0])


def test_a_step_multiplies_each_batch_once_with_one_vector_a_probe(monkeypatch):
    calls, original = [], risk.add_batch

    def counting(kernel, loss, params, batch, arguments, total):
        calls.append(len(jax.tree.leaves(arguments)[0]))
        return original(kernel, loss, params, batch, arguments, total)

    monkeypatch.setattr(risk, "add_batch", counting)
    hessian, _ = least_squares(0)
    parts = densities_of(hessian, num_steps=3, num_probes=2)
    assert calls == [2] * 16 * 3
    assert parts.num_matvecs == 2 * 3


def test_a_parts_density_is_the_one_of_a_hessian_of_its_own(dtype):
    hessian, x = least_squares(0, dtype)
    key = jax.random.key(1)
    parts = densities_of(hessian, key, 4, num_steps=4)
    for part, density in enumerate(parts.densities):
        alone = hd.Hessian(half_square, jnp.zeros(6, dtype), hd.batches(x, 40)[part::4])
        expected = hd.spectral_density(
            alone, key, num_steps=4, num_probes=2, deflation_steps=0, progress=False
        )
        np.testing.assert_allclose(density.nodes, expected.nodes, rtol=1e-3)
        np.testing.assert_allclose(density.weights, expected.weights, atol=1e-3)


# The error bars -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def samples():
    """Fresh data sets: claims for the trace and the largest eigenvalue, the true one, the
    first-order claim for it."""
    found = []
    for seed in range(20):
        hessian, x = least_squares(seed)
        parts = densities_of(hessian, jax.random.key(seed), 16, num_steps=6, num_probes=4)
        values, vectors = np.linalg.eigh(x.T.astype(float) @ x / N)
        space = hd.Eigenspace(
            values[-1:], jnp.asarray(vectors.T[-1:], jnp.float32), [0.0], [True], 0
        )
        found.append(
            (
                parts.estimate(trace),
                parts.estimate(largest),
                values[-1],
                hd.eigenvalue_data_error(hessian, space),
            )
        )
    return found


def test_the_traces_standard_error_is_its_spread_over_fresh_data_sets(samples):
    """2 tr(S^2) / N, the variance of the trace of a Gaussian sample covariance: without what 4
    probes add."""
    true = 2 * np.sum(VARIANCES**2) / N
    claimed = [claim.standard_error**2 for claim, *_ in samples]
    assert np.mean(claimed) == pytest.approx(true, rel=0.6)
    conservative = [((claim.upper - claim.lower) / 2 / 2.13) ** 2 for claim, *_ in samples]
    assert np.mean(conservative) > 1.3 * true


def test_the_largest_eigenvalues_standard_error_is_its_spread_over_fresh_data_sets(samples):
    true = 2 * VARIANCES[0] ** 2 / N
    assert np.var([value for _, _, value, _ in samples], ddof=1) == pytest.approx(true, rel=0.7)
    assert np.mean([claim.standard_error**2 for _, claim, *_ in samples]) == pytest.approx(
        true, rel=0.35
    )
    assert np.mean([error.standard_error[0] ** 2 for *_, error in samples]) == pytest.approx(
        true, rel=0.35
    )
    held = sum(error.lower[0] <= VARIANCES[0] <= error.upper[0] for *_, error in samples)
    assert held >= 16


def test_a_parts_largest_eigenvalue_is_too_large_as_perturbation_theory_says(samples):
    """E lambda_1 - lambda_1 = 1/N sum lambda_1 lambda_j / (lambda_1 - lambda_j) (Lawley 1956)."""
    own = np.sum(VARIANCES[0] * VARIANCES[1:] / (VARIANCES[0] - VARIANCES[1:])) / N
    excess = np.mean([claim.value - value for _, claim, value, _ in samples])
    assert excess == pytest.approx(15 * own, rel=0.3)


def test_the_whole_seen_by_the_same_probes_tells_the_bias():
    hessian, _ = least_squares(3)
    key, settings = jax.random.key(5), {"num_steps": 5, "num_probes": 2}
    parts = densities_of(hessian, key, **settings)
    whole = hd.spectral_density(hessian, key, **settings, deflation_steps=0, progress=False)
    found = parts.estimate(largest, whole)
    assert found.value == largest(whole).value
    mean = np.mean([largest(density).value for density in parts.densities])
    assert found.bias == pytest.approx((mean - found.value) / 7)
    assert found.bias > 0
    assert found.lower < found.value < found.upper
    # The trace is linear in the data: for the same probes it has no bias at all.
    assert abs(parts.estimate(trace, whole).bias) < 1e-4
    other = hd.spectral_density(
        hessian, key, num_steps=5, num_probes=3, deflation_steps=0, progress=False
    )
    assert parts.estimate(largest, other).bias is None
    assert parts.estimate(largest).bias is None


def test_functionals_may_be_arrays_and_their_errors_are_one_by_one():
    parts = densities_of(least_squares(0)[0], num_steps=6)
    grid = np.linspace(0, 10, 7)
    found = parts.estimate(lambda density: density.cdf(grid))
    assert found.parts.shape == (8, 7)
    for index, x in enumerate(grid):
        one = parts.estimate(lambda density, x=x: density.cdf(x))
        for name in ("value", "standard_error", "lower", "upper"):
            assert getattr(found, name)[index] == pytest.approx(getattr(one, name), abs=1e-12)
    assert f"{found:.2g}".startswith("(7,) estimates")
    assert isinstance(parts.estimate(trace).value, float)


def test_unequal_parts_weigh_by_their_examples():
    """A mean of parts of 30, 30 and 10 examples is that of the data, for what is linear in them."""
    x = np.random.default_rng(0).standard_normal((70, 6)).astype(np.float32)
    hessian = hd.Hessian(half_square, jnp.zeros(6), hd.batches(x, 30))
    parts = densities_of(hessian, num_parts=3, num_steps=6, num_probes=1)
    assert parts.counts.tolist() == [30, 30, 10]
    whole = hd.spectral_density(
        hessian, jax.random.key(0), num_steps=6, num_probes=1, deflation_steps=0, progress=False
    )
    found = parts.estimate(trace)
    assert found.value == pytest.approx(whole.trace().value, rel=1e-5)
    weights = np.array([3, 3, 1]) / 7
    spread = weights @ (found.parts - weights @ found.parts) ** 2 / 2
    assert found.standard_error == pytest.approx(np.sqrt(spread))
    assert found.upper - found.value == pytest.approx(
        4.302653 * np.sqrt(spread)
    )  # Student's t of 2 degrees


def test_what_few_probes_add_is_told_from_the_data(key):
    """Identical parts but for a rotation: each probe sees them differ, the spectrum does not."""
    rng, batches = np.random.default_rng(0), []
    for _ in range(16):
        rotation = np.linalg.qr(rng.standard_normal((6, 6)))[0]
        batches.append((np.sqrt(6 * VARIANCES)[:, None] * rotation).astype(np.float32))
    hessian = hd.Hessian(half_square, jnp.zeros(6), batches)
    parts = densities_of(hessian, key, 16, num_steps=6, num_probes=16)
    found = parts.estimate(trace)
    assert found.standard_error < (found.upper - found.lower) / 2 / 2.13 * 0.75
    assert parts.estimate(largest).standard_error < 1e-4


@pytest.mark.parametrize("factor", [1e-10, 1e10])
def test_multiplying_the_loss_scales_the_errors(factor):
    _, x = least_squares(0)

    def scaled(w, x):
        return factor * half_square(w, x)

    one, other = (
        densities_of(hd.Hessian(loss, jnp.zeros(6), hd.batches(x, 40)), num_steps=6)
        for loss in (half_square, scaled)
    )
    for functional in (trace, largest):
        a, b = one.estimate(functional), other.estimate(functional)
        assert b.standard_error == pytest.approx(factor * a.standard_error, rel=1e-2)
        assert b.upper == pytest.approx(factor * a.upper, rel=1e-3)


# Eigenvalues from one pass ------------------------------------------------------------------------


def test_an_eigenvalues_error_is_the_spread_of_its_vectors_forms_over_batches(dtype):
    loss, params, batch = mlp(dtype)
    batches = hd.batches(batch, 30)
    hessian = hd.Hessian(loss, params, batches)
    weights = np.array([30, 30, 4]) / 64
    matrices = np.stack([dense_hessian(loss, params, one) for one in batches])
    values, vectors = np.linalg.eigh(np.tensordot(weights, matrices, axes=1))
    chosen = vectors.T[::-1][:6]
    block = trees.unravel(chosen, hessian.like)
    found = hd.eigenvalue_data_error(
        hessian, hd.Eigenspace(values[::-1][:6], block, np.zeros(6), np.ones(6), 0)
    )
    close = {"atol": 2000 * np.finfo(dtype).eps}
    np.testing.assert_allclose(found.value, values[::-1][:6], **close)
    forms = [np.sum(chosen @ matrix * chosen, axis=1) for matrix in matrices]
    np.testing.assert_allclose(found.parts, forms, **close)
    spread = weights @ (np.array(forms) - found.value) ** 2 / 2
    np.testing.assert_allclose(found.standard_error, np.sqrt(spread), **close)


@jax.custom_vjp
def cube(x):
    return x**3


cube.defvjp(lambda x: (cube(x), x), lambda x, g: (3 * x**2 * g,))


def test_a_model_that_refuses_forward_mode_has_parts_and_errors_too():
    def loss(rule, w, x):
        return jnp.mean(rule(x @ w) ** 2)

    x = np.random.default_rng(0).standard_normal((80, 4)).astype(np.float32)
    results = []
    for rule in (cube, lambda z: z**3):
        data = jnp.ones(4), hd.batches(x, 10)
        first, second = (hd.Hessian(functools.partial(loss, rule), *data) for _ in range(2))
        space = hd.Eigenspace([1.0], jnp.eye(4)[:1], [0.0], [True], 0)
        parts = densities_of(second, num_parts=4, num_steps=4)
        results.append((hd.eigenvalue_data_error(first, space).parts, parts.estimate(trace).parts))
    np.testing.assert_allclose(results[0][0], results[1][0], rtol=1e-4)
    np.testing.assert_allclose(results[0][1], results[1][1], rtol=1e-3)


# The loop around it, and bad input ----------------------------------------------------------------


def test_ctrl_c_returns_what_is_there_and_says_so(caplog, monkeypatch):
    hessian, _ = least_squares(0)
    multiply, left = hessian.multiply_parts, [3]

    def interrupted(block, num_parts):
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        return multiply(block, num_parts)

    monkeypatch.setattr(hessian, "multiply_parts", interrupted)
    parts = densities_of(hessian, num_steps=6)
    assert parts.num_matvecs == 6
    assert parts.densities[0].nodes.shape == (2, 3)
    assert "interrupted after 6 products" in str(parts)
    assert "interrupted after 6 products" in caplog.text
    with pytest.raises(KeyboardInterrupt):
        densities_of(hessian)


def test_it_prints_what_the_data_leave_open_and_its_progress(capsys):
    hessian, _ = least_squares(0)
    parts = hd.part_densities(hessian, jax.random.key(0), num_steps=6)
    out, err = capsys.readouterr()
    assert not out
    assert "12/12" in err
    text = str(parts)
    assert "8 parts of the data, 80 examples each, n = 6" in text
    assert "largest node" in text
    assert "6 steps of 2 probes, 12 products" in text
    assert parts.description["operator"]["num_examples"] == N


def test_shuffled_data_have_no_parts():
    rng, batches = np.random.default_rng(0), hd.batches(least_squares(0)[1], 40)

    def shuffling():
        return iter([batches[i] for i in rng.permutation(16)])

    hessian = hd.Hessian(half_square, jnp.ones(6), shuffling)  # where the batches' losses differ
    with (
        pytest.warns(UserWarning, match="another order in every pass"),
        pytest.raises(
            RuntimeError,
            match=r"a part of them would not be the same examples twice.*shuffle=False",
        ),
    ):
        densities_of(hessian)
    assert np.isfinite(hessian @ jnp.ones(6)).all()  # the whole is the same in any order
    with pytest.raises(RuntimeError, match="another order in every pass"):
        densities_of(hessian)


def test_more_parts_than_batches_are_refused_with_the_repair():
    with pytest.raises(
        ValueError, match=r"num_parts=20, but the 16 batches give the parts .* hd.batches"
    ):
        densities_of(least_squares(0)[0], num_parts=20)
    with pytest.raises(ValueError, match=r"data hold 1 batch .* hd.batches"):
        hd.eigenvalue_data_error(
            least_squares(0, num_batches=1)[0],
            hd.Eigenspace([1.0], jnp.eye(6)[:1], [0.0], [True], 0),
        )


@pytest.mark.parametrize(
    ("change", "error", "said"),
    [
        ({"num_parts": 1}, ValueError, "num_parts=1, expected a whole number of at least 2"),
        ({"num_steps": 0}, ValueError, "num_steps=0, expected a whole number of at least 1"),
        ({"num_probes": 1.5}, ValueError, "num_probes=1.5, expected a whole number"),
        ({"key": 0}, TypeError, "key is a int; expected a JAX random key"),
        (
            {"hessian": hd.Matrix(np.eye(3, dtype=np.float32))},
            TypeError,
            "hessian is a Matrix; expected hd.Hessian",
        ),
    ],
)
def test_arguments_that_cannot_be_are_refused(change, error, said):
    arguments = {"hessian": least_squares(0)[0], "key": jax.random.key(0)} | change
    with pytest.raises(error, match=said):
        hd.part_densities(**arguments, progress=False)


def test_functionals_and_eigenspaces_that_do_not_fit_are_refused():
    hessian, _ = least_squares(0)
    parts = densities_of(hessian, num_steps=3)
    with pytest.raises(
        ValueError, match=r"functional returned shapes .* Use a fixed grid, or a count"
    ):
        parts.estimate(lambda density: np.arange(1 + int(1e4 * density.trace().value) % 7))
    with pytest.raises(ValueError, match="8 values that are not finite"):
        parts.estimate(lambda density: np.nan)
    with pytest.raises(ValueError, match=r"eigenspace\.vectors"):
        hd.eigenvalue_data_error(hessian, hd.Eigenspace([1.0], jnp.eye(5)[:1], [0.0], [True], 0))
    with pytest.raises(TypeError, match="hessian is a Matrix"):
        hd.eigenvalue_data_error(
            hd.Matrix(jnp.eye(6)), hd.Eigenspace([1.0], jnp.eye(6)[:1], [0.0], [True], 0)
        )


def test_its_programs_are_compiled_once_for_all_batches_of_a_shape():
    hessian, _ = least_squares(0)
    space = hd.Eigenspace([1.0], jnp.eye(6)[:1], [0.0], [True], 0)
    hd.eigenvalue_data_error(hessian, space)
    compiled = risk.add_batch._cache_size()
    hd.eigenvalue_data_error(least_squares(1)[0], space)
    assert risk.add_batch._cache_size() == compiled
