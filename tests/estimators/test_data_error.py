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
    conservative = [((claim.data[1] - claim.value) / 2.13) ** 2 for claim, *_ in samples]
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
    mean = np.mean([largest(density).value for density in parts.densities])
    assert found.bias == pytest.approx((mean - largest(whole).value) / 7)
    assert found.value == pytest.approx(largest(whole).value - found.bias)
    assert found.bias > 0
    assert found.bias_range == pytest.approx((0, 7 * found.bias))
    assert found.lower < found.value < found.upper
    # The trace is linear in the data: for the same probes it has no bias at all.
    assert abs(parts.estimate(trace, whole).bias) < 1e-4
    other = hd.spectral_density(
        hessian, key, num_steps=5, num_probes=3, deflation_steps=0, progress=False
    )
    found = parts.estimate(largest, other)
    assert found.bias is None
    assert found.value == largest(other).value
    assert found.lower <= found.value - found.bias_range[1] < found.value < found.upper
    assert parts.estimate(largest).bias is None
    assert parts.estimate(largest).bias_range is None
    with pytest.raises(ValueError, match="paired has other probes than the parts"):
        parts.estimate(largest, paired=other)


def test_the_whole_gives_the_value_and_the_pair_of_the_parts_gives_the_bias():
    hessian, _ = least_squares(3)
    key, settings = jax.random.key(5), {"num_steps": 5, "num_probes": 2}
    parts = densities_of(hessian, key, **settings)
    paired, whole = (
        hd.spectral_density(hessian, key, **settings, deflation_steps=steps, progress=False)
        for steps in (0, 6)
    )
    found, alone = parts.estimate(trace, whole, paired), parts.estimate(trace, paired=paired)
    assert alone.value == parts.estimate(trace, paired).value
    assert found.bias == alone.bias
    assert found.value == pytest.approx(trace(whole).value - found.bias)
    # Six steps of deflation leave nothing to the probes, so that only the data's error remains.
    assert found.upper - found.lower < 0.7 * (alone.upper - alone.lower)


def test_the_interval_is_that_of_the_data_and_of_the_estimate_itself_by_the_root_of_squares():
    hessian, _ = least_squares(3)
    key, settings = jax.random.key(5), {"num_steps": 6, "num_probes": 3}
    parts = densities_of(hessian, key, **settings)
    whole = hd.spectral_density(hessian, key, **settings, deflation_steps=0, progress=False)
    own, found = trace(whole), parts.estimate(trace, whole)
    ends = zip(found.data, found.computation, (own.lower, own.upper), strict=True)
    halves = []
    for data, computation, end in ends:
        assert computation - found.value == pytest.approx(end - own.value)
        halves.append(np.hypot(data - found.value, computation - found.value))
    assert found.value - found.lower == pytest.approx(halves[0], rel=1e-3)
    assert found.upper - found.value == pytest.approx(halves[1], rel=1e-3)
    listed = parts.estimate(lambda density: [density.trace(), density.cdf(2.0)], whole)
    assert listed.upper[0] == pytest.approx(found.upper)
    assert f"{found:.3g}" == f"{found.value:.3g} ({found.lower:.3g} to {found.upper:.3g})"


def test_the_noise_of_a_plain_number_is_that_of_leaving_out_one_probe():
    """The trace of k probes is a mean, whose jackknife is its standard error from the spread."""
    hessian, _ = least_squares(3)
    key = jax.random.key(5)

    def plain(density):
        return density.trace().value

    parts = densities_of(hessian, key, num_steps=6, num_probes=4)
    whole = hd.spectral_density(
        hessian, key, num_steps=6, num_probes=4, deflation_steps=0, progress=False
    )
    found = parts.estimate(plain, whole)
    each = [6 * rule.weights @ rule.nodes for rule in whole.rules]
    half = 3.182446 * np.std(each, ddof=1) / 2  # Student's t of 3 degrees, a mean of 4
    assert found.computation[1] - found.value == pytest.approx(half, rel=1e-3)
    single = densities_of(hessian, key, num_steps=6, num_probes=1)
    assert single.estimate(plain).upper == np.inf
    assert np.isfinite(single.estimate(trace).upper)


FLAT = np.r_[np.ones(9), 9.0]
DECAYING = 9.0 / np.arange(1, 11)


@pytest.mark.parametrize("variances", [FLAT, DECAYING], ids=["flat bulk", "power law"])
def test_the_intervals_hold_the_populations_values_over_fresh_data_sets(variances):
    """Largest, smallest and trace, by the data and bias of `part_densities`, in 40 data sets; the
    t interval of the data alone held the smallest in none of them."""
    held = np.zeros((40, 4))
    alone = np.zeros(40)
    truth = {"largest": variances.max(), "smallest": variances.min(), "trace": variances.sum()}

    def together(density):
        ends = density.extremes()
        return [ends.largest, ends.smallest, density.trace()]

    for seed in range(40):
        random = np.random.default_rng(seed)
        x = (random.standard_normal((240, 10)) * np.sqrt(variances)).astype(np.float32)
        hessian = hd.Hessian(half_square, jnp.zeros(10), hd.batches(x, 30))
        key, settings = jax.random.key(seed), {"num_steps": 10, "num_probes": 2}
        parts = densities_of(hessian, key, **settings)
        paired = hd.spectral_density(hessian, key, **settings, deflation_steps=0, progress=False)
        found = parts.estimate(together, paired=paired)
        population = np.array([*truth.values()])
        held[seed, :3] = (found.lower <= population) & (population <= found.upper)
        assert np.all(np.isfinite(found.upper - found.lower))
        assert found.upper[0] - found.lower[0] < variances.max()
        alone[seed] = found.data[1][1] + found.bias[1] > variances.min()
        values, vectors = np.linalg.eigh(x.T.astype(float) @ x / 240)
        space = hd.Eigenspace(
            values[-1:], jnp.asarray(vectors.T[-1:], jnp.float32), [0.0], [True], 0
        )
        error = hd.eigenvalue_data_error(hessian, space)
        held[seed, 3] = error.lower[0] <= variances.max() <= error.upper[0]
    assert np.all(held.mean(axis=0) >= 0.85)
    assert alone.mean() < 0.2


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
    assert found.data[1] - found.value == pytest.approx(
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
    assert found.standard_error < (found.data[1] - found.value) / 2.13 * 0.75
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


@pytest.mark.parametrize(
    ("dimension", "spikes"),
    [(30, []), (30, [9.0]), (30, [9.0, 8.0]), (600, [9.0])],
    ids=["a bulk", "an outlier", "two close outliers", "more parameters than examples"],
)
def test_an_eigenvalues_interval_holds_the_populations_also_where_perturbation_theory_fails(
    dimension, spikes
):
    """Three eigenvalues with a bulk of ones below; the data alone would miss those of the bulk, and
    with few examples the outlier, in most of 40 data sets."""
    variances = np.r_[spikes, np.ones(dimension - len(spikes))]
    held, alone = np.zeros((40, 3)), np.zeros((40, 3))
    for seed in range(40):
        random = np.random.default_rng(seed)
        x = (random.standard_normal((240, dimension)) * np.sqrt(variances)).astype(np.float32)
        hessian = hd.Hessian(half_square, jnp.zeros(dimension), hd.batches(x, 30))
        _, roots, vectors = np.linalg.svd(x.astype(float), full_matrices=False)
        block = jnp.asarray(vectors[:3], jnp.float32)
        space = hd.Eigenspace(roots[:3] ** 2 / 240, block, np.zeros(3), np.ones(3), 0)
        found = hd.eigenvalue_data_error(hessian, space)
        held[seed] = (found.lower <= variances[:3]) & (variances[:3] <= found.upper)
        alone[seed] = (found.data[0] <= variances[:3]) & (variances[:3] <= found.data[1])
        assert np.all(found.upper - found.lower < 2.5 * found.value)
    assert np.all(held.mean(axis=0) >= 0.85)
    assert np.all(alone.mean(axis=0)[len(spikes) :] < 0.5)
    if dimension > 240:
        assert alone[:, 0].mean() < 0.6


def test_the_couplings_are_those_of_the_parts_and_the_bound_of_the_bias_is_its_formula(dtype):
    hessian, x = least_squares(1, dtype)
    x = x.astype(float)
    close = {"rtol": 1e4 * float(np.finfo(dtype).eps)}
    values, vectors = np.linalg.eigh(x.T @ x / N)
    chosen = vectors.T[:-3:-1]
    space = hd.Eigenspace(values[:-3:-1], jnp.asarray(chosen, dtype), [0, 0], [True, True], 0)
    found = hd.eigenvalue_data_error(hessian, space)
    batches = x.reshape(4, 4, 40, 6).swapaxes(0, 1).reshape(4, 160, 6)  # batch i: part i modulo 4
    changes = [vectors.T @ (part.T @ part / 160 - x.T @ x / N) @ vectors for part in batches]
    squares = np.mean(np.square(changes), axis=0) / 3
    between, first, second = squares[-1, -2], squares[-1, :-2].sum(), squares[-2, :-2].sum()
    gap = values[-1] - values[-2]
    pair = np.sqrt(gap**2 / 4 + between) - gap / 2
    up = [4 * first / (gap + 2 * np.sqrt(first)) + pair, 2 * np.sqrt(second)]
    np.testing.assert_allclose(found.bias_range[1], up, **close)
    np.testing.assert_allclose(found.bias_range[0], [0, -pair], **close)
    np.testing.assert_allclose(found.data[0] - found.bias_range[1], found.lower, **close)
    np.testing.assert_allclose(found.data[1] - found.bias_range[0], found.upper, **close)


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
