"""Where gradients lie: every share, measure and covariance against the dense Hessian and its
eigenvectors."""

import functools
import logging

import jax
import jax.numpy as jnp
import named_spectra as spectra
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree
from problems import example_losses, mean_loss, mlp

import hessdensity as hd
from hessdensity.losses import risk
from hessdensity.training import gradient_noise
from hessdensity.vectors import basis, trees
from hessdensity.vectors.random import random_block


def flat(tree):
    return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)]).astype(float)


def close(dtype):
    return {"rtol": 5e-4, "atol": 1e-5} if dtype == np.float32 else {"rtol": 1e-9, "atol": 1e-11}


@functools.lru_cache
def dense_pairs(dtype):
    """(the dense Hessian of the small network, its eigenvalues descending, its eigenvectors in
    rows)."""
    loss, params, batch = mlp(dtype)
    x, unravel = ravel_pytree(params)
    matrix = np.asarray(jax.jit(jax.hessian(lambda x: loss(unravel(x), batch)))(x), float)
    values, vectors = np.linalg.eigh(matrix)
    return matrix, values[::-1], vectors.T[::-1]


@functools.lru_cache
def example_gradients(dtype):
    """(64, n): the gradient of each example's loss."""
    _, params, (x, y) = mlp(dtype)
    each = jax.jit(
        jax.vmap(jax.grad(lambda p, x, y: mean_loss(p, (x[None], y[None]))), in_axes=(None, 0, 0))
    )
    return trees.ravel(each(params, x, y)).astype(float)


def eigenspace_of(rows, values, like):
    """Exact eigenvectors as an Eigenspace."""
    return hd.Eigenspace(
        values, trees.unravel(rows, like), np.zeros(len(rows)), np.ones(len(rows), bool), 0
    )


@pytest.fixture
def problem(dtype):
    """(loss, params, batch, the Hessian in uneven batches, its exact top eigenspace of rank 6)."""
    loss, params, batch = mlp(dtype)
    operator = hd.Hessian(loss, params, hd.batches(batch, 30))
    _, values, rows = dense_pairs(dtype)
    return loss, params, batch, operator, eigenspace_of(rows[:6], values[:6], operator.like)


# The gradient -------------------------------------------------------------------------------------


def test_the_gradient_is_that_of_the_mean_over_examples_however_they_are_batched(problem, dtype):
    loss, params, batch, operator, _ = problem
    expected = example_gradients(dtype).mean(0)
    for data in ([batch], hd.batches(batch, 30)):
        result = hd.gradient(loss, params, data)
        assert jax.tree.structure(result) == jax.tree.structure(params)
        np.testing.assert_allclose(flat(result), expected, **close(dtype))
    np.testing.assert_array_equal(
        flat(hd.gradient(loss, params, hd.batches(batch, 30))), flat(hd.Hessian.gradient(operator))
    )


def test_the_gradient_of_some_leaves_is_like_their_hessians_vectors():
    loss, params, batch = mlp(np.float32)
    result = hd.gradient(loss, params, [batch], where="second/*")
    expected = example_gradients(np.dtype("float32")).mean(0)[35:53]
    assert result["first"] == {"kernel": None, "bias": None}
    np.testing.assert_allclose(flat(result), expected, **close(np.float32))


# Its concentration --------------------------------------------------------------------------------


def test_the_concentration_is_the_dense_projections(problem, dtype):
    loss, params, batch, _, space = problem
    gradient = hd.gradient(loss, params, [batch])
    *_, rows = dense_pairs(dtype)
    g = flat(gradient)
    expected = np.cumsum((rows[:6] @ g) ** 2) / (g @ g)
    result = hd.gradient_concentration(gradient, space)
    np.testing.assert_allclose(result, expected, **close(dtype))
    assert (result.dtype, result.shape) == (float, (6,))


@pytest.mark.parametrize("factor", [1e-30, 1e-6, 1.0, 1e6, 1e30])
def test_a_vector_of_the_eigenspace_is_in_it_and_an_orthogonal_one_is_not_at_any_scale(
    problem, dtype, factor
):
    *_, space = problem
    rows, rng = trees.ravel(space.vectors).astype(float), np.random.default_rng(0)
    outside = rng.standard_normal(space.dimension)
    outside -= rows.T @ (rows @ outside)
    like = trees.one_of(space.vectors)

    def concentration(row):
        return hd.gradient_concentration(
            trees.first_vector(trees.unravel(factor * row[None], like)), space
        )

    rounding = 20 * np.finfo(dtype).eps
    inside = concentration(rng.standard_normal(6) @ rows)
    assert 1 - rounding <= inside[-1] <= 1
    np.testing.assert_allclose(concentration(rows[2]), [0, 0, 1, 1, 1, 1], atol=rounding)
    assert concentration(outside).max() <= rounding
    # Of one part in, and one of equal length out, half.
    length = np.linalg.norm(outside)
    np.testing.assert_allclose(
        concentration(outside / length + rows[1]), [0, *[0.5] * 5], atol=rounding
    )


def test_shares_ascend_within_0_and_1_in_the_eigenspaces_order(problem, key):
    *_, space = problem
    for i in range(4):
        vector = trees.first_vector(random_block(key, i, 1, trees.one_of(space.vectors)))
        result = hd.gradient_concentration(vector, space)
        assert np.all(np.diff(result) >= 0)
        assert result[0] >= 0
        assert result[-1] <= 1
    np.testing.assert_allclose(hd.gradient_concentration(vector, space[:3]), result[:3], rtol=1e-5)


def test_a_gradient_that_has_no_share_is_refused(problem):
    *_, operator, space = problem
    zero = jax.tree.map(jnp.zeros_like, operator.params)
    with pytest.raises(ValueError, match="gradient is zero: it has no direction"):
        hd.gradient_concentration(zero, space)
    with pytest.raises(ValueError, match="gradient is not finite, its norm is nan"):
        hd.gradient_concentration(
            jax.tree.map(lambda leaf: leaf + np.asarray(np.nan, leaf.dtype), zero), space
        )
    with pytest.raises(
        ValueError, match="gradient is a block of 6 vectors; expected a single vector"
    ):
        hd.gradient_concentration(space.vectors, space)
    with pytest.raises(ValueError, match=r"gradient: the structure is .*, but the operator's"):
        hd.gradient_concentration(zero["first"], space)
    with pytest.raises(
        ValueError, match=r"gradient: leaf 'unused' is float\d+\[3\], expected float\d+\[2\]"
    ):
        hd.gradient_concentration({**zero, "unused": jnp.zeros(3, zero["unused"].dtype)}, space)
    with pytest.raises(TypeError, match="eigenspace is a dict; expected an Eigenspace"):
        hd.gradient_concentration(zero, space.vectors)


def test_eigenvectors_that_are_not_orthonormal_are_never_taken_for_such(problem, key):
    *_, operator, space = problem
    vector = trees.first_vector(random_block(key, 0, 1, operator.like))
    long = jax.tree.map(lambda leaf: 2 * leaf, space.vectors)
    skewed = jax.tree.map(lambda leaf: leaf.at[1].set(leaf[0]), space.vectors)
    for vectors in (long, skewed):
        bad = hd.Eigenspace(space.values, vectors, space.residuals, space.converged, 0)
        with pytest.raises(
            ValueError, match=r"eigenspace.vectors are not orthonormal: a projection of norm"
        ):
            hd.gradient_concentration(vector, bad)


# The Rayleigh quotient and the measure ------------------------------------------------------------


@pytest.mark.parametrize("factor", [1e-20, 1.0, 1e20])
def test_the_rayleigh_quotient_is_the_curvature_along_the_vector_at_any_length(
    problem, dtype, factor
):
    loss, params, batch, operator, _ = problem
    gradient = hd.gradient(loss, params, [batch])
    g, (matrix, *_) = flat(gradient), dense_pairs(dtype)
    scaled = jax.tree.map(lambda leaf: leaf * np.asarray(factor, leaf.dtype), gradient)
    assert hd.rayleigh_quotient(operator, scaled) == pytest.approx(
        g @ matrix @ g / (g @ g), rel=close(dtype)["rtol"]
    )


def dense_measure(matrix, vector):
    """(eigenvalues ascending, share of the vector's square in each)."""
    values, vectors = np.linalg.eigh(matrix)
    return values, (vectors.T @ vector) ** 2 / (vector @ vector)


def test_the_whole_measure_of_a_gradient_is_the_dense_one(problem, dtype):
    loss, params, batch, operator, _ = problem
    gradient = hd.gradient(loss, params, [batch])
    matrix, *_ = dense_pairs(dtype)
    values, weights = dense_measure(matrix, flat(gradient))
    measure = hd.spectral_measure(operator, gradient, 60, progress=False)
    assert isinstance(measure, hd.SpectralMeasure)
    assert not isinstance(measure, hd.SpectralDensity)
    assert measure.dimension == 55
    # Between eigenvalues, where a node's rounding moves nothing across.
    middles = (values[1:] + values[:-1]) / 2
    middles = middles[np.diff(values) > 1e-3 * np.abs(values).max()]
    assert middles.size > 20
    expected = [weights[values <= x].sum() for x in middles]
    cdf = measure.cdf(middles)
    np.testing.assert_allclose(cdf, expected, atol=1e-4 if dtype == np.float32 else 1e-9)
    np.testing.assert_array_equal(cdf.standard_error, 0)
    assert measure.quantile(0.5).value == pytest.approx(
        values[np.searchsorted(np.cumsum(weights), 0.5)], abs=1e-4
    )
    assert hd.rayleigh_quotient(operator, gradient) == pytest.approx(
        measure.moment(1).value, rel=1e-4
    )


@pytest.mark.parametrize("num_steps", [1, 8])
@pytest.mark.parametrize("name", ["ring", "outliers"])
def test_few_steps_give_the_first_moments_and_bounds_that_hold(name, num_steps, key, dtype):
    values = spectra.ALL[name]
    operator = hd.Matrix.from_eigenvalues(jnp.asarray(values, dtype), key)
    vector = np.random.default_rng(3).standard_normal(values.size).astype(dtype) ** 3
    exact, weights = dense_measure(hd.dense(operator), vector.astype(float))
    measure = hd.spectral_measure(operator, vector, num_steps, progress=False)
    assert measure.num_matvecs == measure.nodes.size == num_steps
    size = np.abs(exact).max()
    for k in range(2 * num_steps):
        assert measure.moment(k).value == pytest.approx(
            weights @ exact**k, abs=(1e-4 if dtype == np.float32 else 1e-10) * size**k
        )
    x = np.linspace(exact[0] - 0.01 * size, exact[-1], 41)
    bounds, truth = measure.cdf_bounds(x), np.array([weights[exact <= point].sum() for point in x])
    assert np.all(bounds.lower <= truth + 1e-6)
    assert np.all(bounds.upper >= truth - 1e-6)


@pytest.mark.parametrize("name", ["zero", "eight of 300", "one"])
def test_a_spectrum_of_few_values_ends_the_measure_early(name, key, dtype):
    values = spectra.BREAKDOWN[name]
    operator = hd.Matrix.from_eigenvalues(jnp.asarray(values, dtype), key)
    measure = hd.spectral_measure(operator, np.ones(values.size, dtype), 40, progress=False)
    assert measure.num_matvecs <= min(values.size, np.unique(values).size + 3)
    assert measure.weights.sum() == pytest.approx(1)
    slack = 1e-5 * (np.abs(values).max() or 1)
    assert values.min() - slack <= measure.extent[0] <= measure.extent[1] <= values.max() + slack


@pytest.mark.parametrize(("of_operator", "of_vector"), [(1e-6, 1e6), (1e6, 1e-6)])
def test_a_measure_scales_with_the_operator_and_not_with_the_vector(of_operator, of_vector, key):
    values = spectra.ORDINARY["outliers"]
    vector = np.linspace(1, 2, values.size, dtype=np.float32)
    plain, scaled = (
        hd.spectral_measure(
            hd.Matrix.from_eigenvalues(jnp.asarray(a * values, jnp.float32), key),
            np.float32(b) * vector,
            20,
            progress=False,
        )
        for a, b in ((1.0, 1.0), (of_operator, of_vector))
    )
    np.testing.assert_allclose(
        scaled.moment(1).value, of_operator * plain.moment(1).value, rtol=1e-4
    )
    np.testing.assert_allclose(scaled.cdf(of_operator * 0.5).value, plain.cdf(0.5).value, atol=1e-3)
    assert scaled.description["norm"] == pytest.approx(of_vector * np.linalg.norm(vector), rel=1e-5)


def test_a_measure_refuses_what_one_vector_cannot_tell_and_saves_and_prints(tmp_path, key):
    operator = hd.Matrix.from_eigenvalues(np.linspace(1, 2, 30, dtype=np.float32), key)
    measure = hd.spectral_measure(operator, np.ones(30, np.float32), 5, progress=False)
    assert not hasattr(measure, "trace")
    assert not hasattr(measure, "frobenius_norm")
    measure.save(tmp_path / "measure.npz")
    with pytest.raises(ValueError, match=r"Read it with hd\.SpectralMeasure\.load\(path\)"):
        hd.SpectralDensity.load(tmp_path / "measure.npz")
    loaded = hd.SpectralMeasure.load(tmp_path / "measure.npz")
    np.testing.assert_array_equal(loaded.nodes, measure.nodes)
    assert "Rayleigh quotient" in str(loaded)
    assert "5 products" in str(loaded)


def test_an_interrupted_measure_is_that_of_the_steps_done(key, caplog):
    matrix = hd.Matrix.from_eigenvalues(np.linspace(-1, 1, 50, dtype=np.float32), key)
    calls = []

    def product(vector):
        calls.append(1)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return matrix @ vector

    vector = np.ones(50, np.float32)
    with caplog.at_level(logging.WARNING, logger="hessdensity"):
        measure = hd.spectral_measure(
            hd.FunctionOperator(product, matrix.like), vector, 20, progress=False
        )
    assert measure.num_matvecs == 4
    assert measure.description["stopped"] == "interrupted after 4 products"
    assert "interrupted" in caplog.text
    whole = hd.spectral_measure(matrix, vector, 4, progress=False)
    np.testing.assert_allclose(measure.nodes, whole.nodes, rtol=1e-5)
    calls[:] = [1] * 4
    with pytest.raises(KeyboardInterrupt):
        hd.spectral_measure(hd.FunctionOperator(product, matrix.like), vector, 20, progress=False)


def test_a_product_that_is_not_finite_hands_over_the_measure_so_far(key):
    matrix, calls = hd.Matrix.from_eigenvalues(np.linspace(-1, 1, 50, dtype=np.float32), key), []

    def product(vector):
        calls.append(1)
        return matrix @ vector * np.float32(np.nan if len(calls) == 4 else 1)

    operator = hd.FunctionOperator(product, matrix.like)
    with pytest.raises(hd.NonFiniteProductError, match="Step 3") as caught:
        hd.spectral_measure(operator, np.ones(50, np.float32), 20, progress=False)
    assert caught.value.partial.num_matvecs == 3
    calls[:] = [1] * 3
    with pytest.raises(FloatingPointError, match="the operator's product is not finite"):
        hd.rayleigh_quotient(operator, np.ones(50, np.float32))


def test_the_bar_counts_products_and_can_be_silenced(key, capsys):
    operator, vector = hd.Matrix(jnp.eye(4) * jnp.arange(4.0)[:, None]), np.ones(4, np.float32)
    hd.spectral_measure(operator, vector, 3, progress=False)
    assert capsys.readouterr() == ("", "")
    hd.spectral_measure(operator, vector, 3)
    assert "3/3" in capsys.readouterr().err


def test_vectors_and_steps_that_cannot_be_are_refused():
    operator = hd.Matrix(jnp.eye(3))
    for vector, said in (
        (np.zeros(3, np.float32), "vector is zero"),
        (np.full(3, np.inf, np.float32), "vector is not finite"),
        (np.ones(4, np.float32), r"vector: the vector is float32\[4\], expected float32\[3\]"),
        (np.ones((2, 3), np.float32), "vector is a block of 2 vectors"),
        ({"w": np.ones(3, np.float32)}, "vector: the structure is"),
    ):
        with pytest.raises(ValueError, match=said):
            hd.spectral_measure(operator, vector, progress=False)
        with pytest.raises(ValueError, match=said):
            hd.rayleigh_quotient(operator, vector)
    with pytest.raises(ValueError, match="num_steps=0, expected a whole number"):
        hd.spectral_measure(operator, np.ones(3, np.float32), 0)


# The noise of batches -----------------------------------------------------------------------------


def explicit(dtype, batch_size):
    """(batch gradients, their mean, covariance of a batch of the mean size), all n directions, from
    each example's."""
    batches = np.split(example_gradients(dtype), range(batch_size, 64, batch_size))
    gradients, counts = (
        np.stack([rows.mean(0) for rows in batches]),
        np.array([len(rows) for rows in batches]),
    )
    mean = counts @ gradients / 64
    deviations = gradients - mean
    return (
        gradients,
        mean,
        (deviations.T * counts) @ deviations * len(batches) / 64 / (len(batches) - 1),
    )


@pytest.mark.parametrize("batch_size", [4, 6, 33])
def test_the_covariance_is_that_of_the_explicit_gradients(problem, dtype, batch_size):
    loss, params, batch, _, space = problem
    data = hd.batches(batch, batch_size)
    gradients, mean, covariance = explicit(dtype, batch_size)
    rows = trees.ravel(space.vectors).astype(float)
    result = hd.gradient_covariance(loss, params, data, space)
    np.testing.assert_allclose(result.mean, rows @ mean, **close(dtype))
    np.testing.assert_allclose(result.covariance, rows @ covariance @ rows.T, **close(dtype))
    rtol = close(dtype)["rtol"]
    assert result.total_variance == pytest.approx(np.trace(covariance), rel=rtol)
    assert result.squared_norm == pytest.approx(mean @ mean, rel=rtol)
    expected = np.cumsum(np.diag(rows @ covariance @ rows.T)) / np.trace(covariance)
    np.testing.assert_allclose(result.noise_concentration, expected, **close(dtype))
    np.testing.assert_allclose(
        result.gradient_concentration,
        hd.gradient_concentration(hd.gradient(loss, params, data), space),
        **close(dtype),
    )
    assert (result.num_batches, result.num_examples, result.dimension) == (len(data), 64, 55)
    np.testing.assert_array_equal(result.values, space.values)
    if batch_size == 4:  # even batches: the usual sample covariance
        np.testing.assert_allclose(result.covariance, np.cov(rows @ gradients.T), **close(dtype))


def top_of(params, rank=3):
    """The exact top eigenspace of the small network's float32 Hessian."""
    _, values, rows = dense_pairs(np.dtype("float32"))
    return eigenspace_of(rows[:rank], values[:rank], trees.abstract(params))


def mean_of(w, batch):
    """A loss whose gradient is the mean of the batch: every covariance is known."""
    return jnp.mean(batch @ w)


def axes(n, rank):
    return hd.Eigenspace(
        np.arange(rank)[::-1], np.eye(n, dtype=np.float32)[:rank], np.zeros(rank), [True] * rank, 0
    )


def test_uneven_batches_of_random_examples_give_the_covariance_of_the_mean_size_without_bias():
    rng = np.random.default_rng(5)
    x = rng.standard_normal((14, 3)).astype(np.float32) * np.array([1, 2, 3], np.float32)
    space, params = axes(3, 2), jnp.zeros(3)
    runs = [
        hd.gradient_covariance(mean_of, params, hd.batches(rng.permutation(x), 6), space).covariance
        for _ in range(100)
    ]
    expected = np.cov(x[:, :2].T) / (14 / 3)
    error = np.std(runs, axis=0) / np.sqrt(len(runs))
    assert np.all(np.abs(np.mean(runs, axis=0) - expected) < 5 * error)


def test_noise_that_is_small_beside_the_gradient_is_not_lost_in_it():
    rng = np.random.default_rng(6)
    x = (1e3 + 1e-2 * rng.standard_normal((40, 5))).astype(np.float32)
    result = hd.gradient_covariance(mean_of, jnp.zeros(5), hd.batches(x, 1), axes(5, 2))
    expected = np.cov(x.astype(float).T)
    np.testing.assert_allclose(
        result.covariance, expected[:2, :2], rtol=0.02, atol=0.02 * np.trace(expected)
    )
    assert result.total_variance == pytest.approx(np.trace(expected), rel=0.02)


def scaled_loss(factor, params, batch):
    return factor * mean_loss(params, batch)


def test_a_covariance_scales_with_the_square_of_the_loss():
    _, params, batch = mlp(np.float32)
    space = top_of(params)
    plain, *scaled = (
        # The factor is an argument of what is compiled, once.
        hd.gradient_covariance(
            jax.tree_util.Partial(scaled_loss, jnp.float32(factor)), params, data, space
        )
        for data in [hd.batches(batch, 32)]
        for factor in (1.0, 1e-30, 1e-6, 1e6, 1e30)
    )
    for factor, result in zip((1e-30, 1e-6, 1e6, 1e30), scaled, strict=True):
        np.testing.assert_allclose(
            result.covariance / factor**2, plain.covariance, rtol=1e-3, atol=1e-6
        )
        assert result.total_variance == pytest.approx(
            factor**2 * plain.total_variance, rel=1e-4, abs=0
        )
        np.testing.assert_allclose(result.noise_concentration, plain.noise_concentration, rtol=1e-3)


def test_batches_of_no_example_count_for_nothing():
    loss, params, (x, y) = mlp(np.float32)

    def masked(params, batch):
        (x, y), mask = batch
        return hd.Total(jnp.sum(jnp.where(mask, example_losses(params, (x, y)), 0)), mask.sum())

    ones, none = np.ones(16, bool), np.zeros(16, bool)
    batches = hd.batches((x, y), 16)
    masks = [none, ones, ones, ones]
    space = top_of(params)
    result = hd.gradient_covariance(masked, params, list(zip(batches, masks, strict=True)), space)
    expected = hd.gradient_covariance(loss, params, batches[1:], space)
    assert (result.num_batches, result.num_examples) == (3, 48)
    np.testing.assert_allclose(result.covariance, expected.covariance, rtol=1e-4, atol=1e-7)
    assert result.total_variance == pytest.approx(expected.total_variance, rel=1e-4)


def test_a_covariance_prints_a_table_and_is_silent_where_there_is_no_noise():
    loss, params, batch = mlp(np.float32)
    space = top_of(params)
    text = str(hd.gradient_covariance(loss, params, hd.batches(batch, 8), space))
    assert "Gradients of 8 batches of 8 examples, n = 55" in text
    assert len(text.splitlines()) == 7
    none = hd.gradient_covariance(loss, params, [batch, batch], space)
    assert none.total_variance == 0
    assert np.isnan(none.noise_concentration).all()
    assert "nan" in str(none)


def test_covariances_that_cannot_be_are_refused():
    loss, params, batch = mlp(np.float32)
    space = top_of(params)
    with pytest.raises(ValueError, match="data hold 1 batch with examples; expected at least two"):
        hd.gradient_covariance(loss, params, [batch], space)
    with pytest.raises(
        ValueError, match=r"eigenspace.vectors: the structure is .* but the operator's vectors have"
    ):
        hd.gradient_covariance(loss, params, hd.batches(batch, 8), space, where="first/*")
    with pytest.raises(TypeError, match="loss returned shape"):
        hd.gradient_covariance(example_losses, params, hd.batches(batch, 8), space)
    broken = [batch, (batch[0] * np.float32(np.inf), batch[1])]
    with pytest.raises(FloatingPointError, match="the gradient is not finite in batch 1 of 2"):
        hd.gradient_covariance(loss, params, broken, space)
    bad = hd.Eigenspace(
        space.values,
        jax.tree.map(lambda leaf: 3 * leaf, space.vectors),
        space.residuals,
        space.converged,
        0,
    )
    with pytest.raises(ValueError, match="not orthonormal"):
        hd.gradient_covariance(loss, params, hd.batches(batch, 8), bad)


def test_new_parameters_compile_nothing():
    loss, params, batch = mlp(np.float32)
    data = hd.batches(batch, 32)

    def measure(params):
        operator, space = hd.Hessian(loss, params, data), top_of(params)
        gradient = hd.gradient(loss, params, data)
        hd.gradient_concentration(gradient, space)
        hd.spectral_measure(operator, gradient, 5, progress=False)
        hd.gradient_covariance(loss, params, data, space)
        kernels = basis.inner_products, gradient_noise._add_deviation, risk.add_batch
        return [kernel._cache_size() for kernel in kernels]

    assert measure(params) == measure(jax.tree.map(lambda leaf: 2 * leaf, params))
