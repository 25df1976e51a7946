"""Rows of square roots: signs and rows give each example's second derivative by its outputs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import hessdensity as hd
from hessdensity import losses
from hessdensity.losses import roots
from hessdensity.losses.total import as_total

MASK = np.array([[1, 1, 1, 1], [1, 1, 0, 0], [0, 0, 0, 0]], bool)


def saddle(outputs, targets):
    """Neither convex nor quadratic, and different for every example."""
    return jnp.mean(jnp.sum(jnp.sin(outputs * targets), axis=1) + outputs[:, 0] * outputs[:, 1])


def weighted(outputs, labels, weights):
    """Cross-entropy with a weight for each example."""
    chosen = jnp.take_along_axis(outputs, labels[:, None], axis=1)[:, 0]
    each = jax.nn.logsumexp(outputs, axis=1) - chosen
    return hd.Total(jnp.sum(each * weights), jnp.sum(weights))


def real(*shape, seed=0):
    rng = np.random.default_rng([seed, *shape])
    return jnp.asarray(rng.standard_normal(shape), jnp.zeros(0).dtype)


def labels(*shape, below):
    return jnp.asarray(np.random.default_rng(shape).integers(0, below, shape), jnp.int32)


def masses():
    """Label rows that sum to something else than 1, one of them to 0."""
    rows = jnp.abs(real(5, 4, seed=1))
    return rows.at[2].set(0.0)


CASES = {
    "integer labels": lambda: (losses.cross_entropy, real(5, 4), [labels(5, below=4)]),
    "probability labels": lambda: (losses.cross_entropy, real(5, 4), [masses()]),
    "labels at positions": lambda: (losses.cross_entropy, real(3, 2, 4), [labels(3, 2, below=4)]),
    "probabilities at positions": lambda: (
        losses.cross_entropy,
        real(3, 2, 4),
        [jnp.abs(real(3, 2, 4, seed=1))],
    ),
    "squared error": lambda: (losses.mean_squared_error, real(5, 3), [real(5, 3, seed=1)]),
    "squared error of scalars": lambda: (losses.mean_squared_error, real(5), [real(5, seed=1)]),
    "squared error of images": lambda: (
        losses.mean_squared_error,
        real(3, 2, 2),
        [real(3, 2, 2, seed=1)],
    ),
    "next token": lambda: (
        losses.next_token_cross_entropy,
        real(3, 4, 3),
        [labels(3, 4, below=3)],
    ),
    "next token and padding": lambda: (
        losses.next_token_cross_entropy,
        real(3, 4, 3),
        [labels(3, 4, below=3), jnp.asarray(MASK)],
    ),
    "example weights": lambda: (
        weighted,
        real(4, 3),
        [labels(4, below=3), jnp.asarray([1, 0, 2.5, 0.5], jnp.zeros(0).dtype)],
    ),
    "a saddle": lambda: (saddle, real(5, 3), [real(5, 3, seed=1)]),
}
SAMPLED = [name for name in CASES if CASES[name]()[0] in roots.SAMPLED]


def hessians(criterion, outputs, targets):
    """(examples, c, c): blocks of the whole second derivative of the sum, which has no others."""
    shape = outputs.shape

    def total(flat):
        return as_total(criterion(flat.reshape(shape), *targets), (outputs, *targets)).sum

    whole = np.asarray(jax.jit(jax.hessian(total))(outputs.ravel()), float)
    whole = whole.reshape(shape[0], outputs[0].size, shape[0], outputs[0].size)
    blocks = whole[np.arange(shape[0]), :, np.arange(shape[0])]
    assert np.abs(whole).sum() == pytest.approx(np.abs(blocks).sum())
    return blocks


def squared(found):
    """(examples, c, c): the sum over rows of sign r r^T."""
    rows = np.asarray(found.rows, float)
    rows = rows.reshape(*rows.shape[:2], -1)
    return np.einsum("kb,kbi,kbj->bij", np.asarray(found.signs, float), rows, rows)


IN_FLOAT32 = ["integer labels", "probability labels", "squared error", "a saddle"]


@pytest.mark.parametrize(
    ("name", "precision"),
    [*((name, "float64") for name in CASES), *((name, "float32") for name in IN_FLOAT32)],
)
def test_exact_rows_give_the_second_derivative_of_each_example(name, precision):
    with jax.enable_x64(precision == "float64"):
        check_exact_rows(name, 1e-12 if precision == "float64" else 2e-6)


def check_exact_rows(name, allowed):
    criterion, outputs, targets = CASES[name]()
    exact = hessians(criterion, outputs, targets)
    # In two calls, the second of which has places for more rows than there are.
    count = roots.num_rows(outputs)
    most = max(count - 2, 2)
    rows_of = jax.jit(lambda part: roots.exact_rows(criterion, outputs, targets, part))
    found = [rows_of(jnp.arange(start, start + most)) for start in (0, most)]
    assert {each.rows.dtype.name for each in found} == {outputs.dtype.name}
    np.testing.assert_allclose(sum(map(squared, found)), exact, atol=allowed)


def test_a_saddle_has_rows_of_both_signs():
    criterion, outputs, targets = CASES["a saddle"]()
    rows_of = jax.jit(lambda part: roots.exact_rows(criterion, outputs, targets, part))
    found = rows_of(jnp.arange(3))
    eigenvalues = np.linalg.eigvalsh(hessians(criterion, outputs, targets))
    assert (eigenvalues < -0.1).any()
    np.testing.assert_array_equal(np.sign(found.signs).T, np.sign(eigenvalues))


@pytest.mark.parametrize("name", CASES)
def test_the_examples_by_themselves_add_up_to_the_batch(name):
    criterion, outputs, targets = CASES[name]()
    whole = as_total(criterion(outputs, *targets), (outputs, *targets))
    each = jax.jit(lambda: roots.example_totals(criterion, outputs, targets))()
    assert each.sum.shape == each.count.shape == (len(outputs),)
    assert float(each.sum.sum()) == pytest.approx(float(whole.sum), rel=1e-5)
    assert float(each.count.sum()) == pytest.approx(float(whole.count))


@pytest.mark.parametrize("name", SAMPLED)
def test_sampled_rows_are_unbiased(name, key):
    criterion, outputs, targets = CASES[name]()
    exact = hessians(criterion, outputs, targets)

    @jax.jit
    @jax.vmap
    def sample(key):
        return roots.sampled_rows(criterion, outputs, targets, key, 4)

    rows, signs = jax.device_get(sample(jax.random.split(key, 500)))
    samples = np.array([squared(roots.Rows(*each)) for each in zip(rows, signs, strict=True)])
    error = samples.std(axis=0, ddof=1) / np.sqrt(len(samples))
    expected = np.linalg.norm(error)  # of the mean, in the norm of all entries together
    assert np.linalg.norm(samples.mean(axis=0) - exact) <= 2 * expected + 1e-6
    assert expected < 0.06 * np.linalg.norm(exact)  # the comparison says something


def test_random_signs_of_a_squared_error_are_exact_on_the_diagonal(key):
    criterion, outputs, targets = CASES["squared error"]()
    found = squared(roots.sampled_rows(criterion, outputs, targets, key, 3))
    np.testing.assert_allclose(np.diagonal(found, 0, 1, 2), 2 / 3, rtol=1e-6)


def test_batches_with_different_losses_have_different_keys(key):
    totals = [hd.Total(jnp.asarray([1.0, 2.0]), 2), hd.Total(jnp.asarray([1.0, 2.5]), 2)]
    keys = [jax.random.key_data(roots.key_of_batch(key, total)) for total in totals]
    assert not np.array_equal(*keys)
    np.testing.assert_array_equal(keys[0], jax.random.key_data(roots.key_of_batch(key, totals[0])))
