"""Converged means converged: small eigenvalues beside large ones, at the limits of rounding and of
noise, and at any scale."""

import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.sparse.linalg
from jax.flatten_util import ravel_pytree

import hessdensity as hd
from hessdensity.runs import run as run_module
from hessdensity.runs.memory import Free

N = 200
BULK = np.random.default_rng(0).standard_normal(N - 1)
MERIT = {"LM": np.abs, "LA": np.positive, "SA": np.negative}
# As the Hessian of a trained transformer: a power law above, and a few negative ones far below it.
TRANSFORMER = np.r_[
    394 * np.arange(1.0, 1801) ** -1.1,
    [-16.3, -3.4, -2.4, -1.9, -1.6, -1.4],
    -1.05 * np.arange(1.0, 195) ** -0.9,
]


def operator_of(values, dtype=np.float32):
    return hd.Matrix.from_eigenvalues(jnp.asarray(values, dtype), jax.random.key(5))


def exact(values, which, rank):
    """The wanted eigenvalues, descending."""
    return np.sort(values[np.argsort(-MERIT[which](values), kind="stable")][:rank])[::-1]


def top(operator, key, rank, which, **settings):
    return hd.top_eigenspace(operator, key, rank, which=which, progress=False, **settings)


def assert_judged(space, values, which):
    """A converged pair is where LAPACK has it, and within its tolerance or at the rounding."""
    size = np.abs(space.values)
    floor, tolerance = space.description["rounding"], space.description["tolerance"]
    wrong = np.abs(space.values - exact(values, which, space.rank))
    limit = np.maximum(tolerance * size, floor)
    told = (space.residuals < size) | ((space.residuals <= floor) & (size <= floor))
    assert np.all((space.residuals <= limit) & told | ~space.converged)
    assert np.all((wrong <= limit) | ~space.converged)


@pytest.mark.parametrize("block_size", [1, 4])
@pytest.mark.parametrize(("which", "outlier"), [("LA", 1e4), ("SA", 1e4), ("SA", 1e5), ("SA", 1e6)])
def test_eigenvalues_beside_a_far_outlier_are_lapacks(which, outlier, block_size, key, dtype):
    values = np.r_[outlier, BULK]
    space = top(operator_of(values, dtype), key, 3, which, block_size=block_size)
    assert space.converged.all()
    np.testing.assert_allclose(space.values, exact(values, which, 3), rtol=1e-4)
    assert_judged(space, values, which)


def test_eigenvalues_beside_a_far_outlier_are_arpacks_with_fewer_products(key):
    operator = operator_of(np.r_[1e4, BULK])
    calls = []

    def matvec(vector):
        calls.append(1)
        return np.asarray(operator @ jnp.asarray(vector.ravel(), jnp.float32), float)

    linear = scipy.sparse.linalg.LinearOperator((N, N), matvec=matvec, dtype=float)
    start = np.ones(N)
    theirs = scipy.sparse.linalg.eigsh(
        linear, 3, which="SA", tol=1e-4, v0=start, return_eigenvectors=False
    )
    space = top(operator, key, 3, "SA", block_size=1)
    np.testing.assert_allclose(space.values, np.sort(theirs)[::-1], rtol=1e-4)
    assert space.num_matvecs < len(calls)


def table_network():
    """(loss, params, batch): a small classifier, of a table whose columns have their own units.

    Its labels are its own predictions with a little noise, as after training.
    """
    rng = np.random.default_rng(0)
    x = ((rng.standard_normal((120, 12)) + 2) * np.geomspace(0.01, 300, 12)).astype(np.float32)

    def logits(params, x):
        return jnp.tanh(x @ params["W"] + params["b"][None]) @ params["v"]

    def loss(params, batch):
        z = logits(params, batch[0])
        return jnp.mean(jax.nn.softplus(z) - batch[1] * z)

    params = {
        "W": jnp.asarray(0.003 * rng.standard_normal((12, 8)), jnp.float32),
        "b": jnp.asarray(0.1 * rng.standard_normal(8), jnp.float32),
        "v": jnp.asarray(rng.standard_normal(8), jnp.float32),
    }
    y = jax.nn.sigmoid(logits(params, x)) + 0.01 * rng.standard_normal(120).astype(np.float32)
    return loss, params, (x, y)


@pytest.mark.parametrize("block_size", [1, 4])
def test_the_smallest_eigenvalues_of_a_network_on_a_raw_table_are_lapacks(block_size, key):
    loss, params, batch = table_network()
    hessian = hd.Hessian(loss, params, [batch])
    with jax.enable_x64(True):
        double = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float64), params)
        flat, rebuild = ravel_pytree(double)
        data = tuple(jnp.asarray(part, jnp.float64) for part in batch)
        matrix = np.asarray(jax.hessian(lambda w: loss(rebuild(w), data))(flat))
    values = np.linalg.eigvalsh(matrix)
    assert values[-1] > 1000 * abs(values[3])
    space = top(hessian, key, 4, "SA", block_size=block_size)
    assert space.converged.all()
    np.testing.assert_allclose(space.values, values[3::-1], rtol=1e-2)


@pytest.mark.parametrize("seed", range(12))
def test_no_pair_is_said_to_have_converged_that_has_not(seed):
    rng = np.random.default_rng(seed)
    spread = rng.standard_normal(N) * 10 ** rng.uniform(-6, 0, N)
    values = [spread, rng.standard_t(2, N), np.r_[10 ** rng.uniform(2, 7), BULK]][seed % 3]
    which = str(rng.choice(["LA", "SA"]))
    tolerance = float(10 ** rng.uniform(-5, -2))
    settings = {"max_matvecs": int(rng.integers(12, 100)), "tolerance": tolerance}
    space = top(operator_of(values), jax.random.key(seed), 4, which, **settings)
    assert_judged(space, values, which)


def test_what_rounding_hides_is_said(key, caplog):
    values = np.r_[1e6, -1.0, np.geomspace(1e-4, 1e-6, N - 2)]
    with caplog.at_level(logging.WARNING, "hessdensity"):
        space = top(operator_of(values), key, 3, "SA")
    floor = np.finfo(np.float32).eps * 1e6
    assert space.description["rounding"] == pytest.approx(floor, rel=1e-5)
    assert_judged(space, values, "SA")
    np.testing.assert_allclose(space.values, [0, 0, -1], atol=0.01)
    assert "zero to the rounding error, 0.12" in str(space)
    assert "converged only to the rounding error of float32" in caplog.text
    assert "residuals below 0.12 cannot be computed" in caplog.text


def test_a_pair_whose_residual_exceeds_its_value_is_marked(key):
    values = np.r_[1e3, np.geomspace(1e-3, 1, N - 1)]
    space = top(operator_of(values), key, 3, "SA", max_matvecs=12)
    assert not space.converged.any()
    assert "not converged: the residual exceeds the value" in str(space)


def in_bfloat16(operator):
    """The same operator, with products that are rounded to bfloat16."""

    def matvec(vector):
        return (operator @ vector).astype(jnp.bfloat16).astype(jnp.float32)

    return hd.FunctionOperator(matvec, operator.like)


@pytest.mark.parametrize("block_size", [1, 4])
@pytest.mark.parametrize("which", ["LA", "SA"])
def test_a_run_ends_at_the_noise_of_its_products(which, block_size, key, caplog):
    values = np.r_[0.1 * BULK[:-4], [-3.0, 2.0, 4.0, 7.0, 10.0]]
    operator = in_bfloat16(operator_of(values))
    with caplog.at_level(logging.WARNING, "hessdensity"):
        space = top(operator, key, 4, which, block_size=block_size)
    assert space.num_matvecs < 90
    assert not space.converged.any()
    assert "the products' noise of 0.0" in space.description["stopped"]
    assert "of the norm is reached; 0 of 4 pairs have converged" in caplog.text
    np.testing.assert_allclose(space.values, exact(values, which, 4), rtol=4e-3)


def test_noise_below_the_tolerance_is_no_hindrance(key):
    values = np.r_[0.1 * BULK[:-4], [-3.0, 2.0, 4.0, 7.0, 10.0]]
    space = top(in_bfloat16(operator_of(values)), key, 3, "LA", tolerance=0.01)
    assert space.converged.all()
    assert space.description["stopped"] is None


@pytest.mark.parametrize("which", ["LM", "SA"])
@pytest.mark.parametrize(
    ("factor", "dtype"),
    [(1e-300, "float64"), (1e200, "float64"), (1e-30, "float32"), (1e36, "float32")],
)
def test_every_scale_has_the_same_pairs(factor, dtype, which, key):
    values = np.r_[0.1 * BULK[:-4], [-3.0, 2.0, 4.0, 7.0, 10.0]]
    with jax.enable_x64(dtype == "float64"):
        plain = top(operator_of(values, dtype), key, 3, which)
        scaled = top(operator_of(factor * values, dtype), key, 3, which)
    assert scaled.converged.all()
    assert scaled.num_matvecs == plain.num_matvecs
    np.testing.assert_allclose(scaled.values / factor, exact(values, which, 3), rtol=1e-6)
    np.testing.assert_allclose(scaled.residuals / factor, plain.residuals, atol=1e-5)


def test_where_products_underflow_no_wrong_word_is_said(key):
    values = 1e-35 * np.r_[0.1 * BULK[:-4], [-3.0, 2.0, 4.0, 7.0, 10.0]]
    space = top(operator_of(values), key, 3, "LM")
    np.testing.assert_allclose(space.values, exact(values, "LM", 3), rtol=1e-3)
    assert np.all(space.residuals > 1e-4 * np.abs(space.values)) or space.converged.any()
    assert_judged(space, values, "LM")


def test_the_smallest_eigenvalues_of_a_transformer_need_few_products(key):
    operator = operator_of(TRANSFORMER)
    space = top(operator, key, 5, "SA")
    assert space.converged.all()
    assert space.description["basis_size"] == 256
    assert space.num_matvecs < 130
    np.testing.assert_allclose(space.values, exact(TRANSFORMER, "SA", 5), rtol=1e-5)
    bound = top(operator, key, 5, "SA", basis_size=64)
    assert space.num_matvecs <= bound.num_matvecs < 200
    np.testing.assert_allclose(bound.values, space.values, rtol=1e-5)


def test_the_basis_is_the_largest_that_fits_and_a_resumed_run_keeps_it(key, tmp_path, monkeypatch):
    operator = operator_of(TRANSFORMER)
    vector = 4 * TRANSFORMER.size
    settings = {"computation": "top_eigenspace", "rank": 5, "timed": False}
    sizes = [256, 128, 3 * 5 + 4 * 4]
    plan = hd.plan(operator, **settings)
    assert [layout.device_bytes for layout in plan.layouts] == [
        (5 + size * 3 // 2 + 16) * vector for size in sizes
    ]

    def with_memory(vectors):
        free = Free(vectors * vector, 10**12)
        monkeypatch.setattr(run_module, "free_memory", lambda like: free)

    for size in sizes:
        with_memory(5 + size * 3 // 2 + 16)
        folder = tmp_path / str(size)
        first = top(operator, key, 5, "SA", max_matvecs=20, checkpoint=folder)
        assert first.description["basis_size"] == size
        with_memory(1)
        again = top(operator, key, 5, "SA", max_matvecs=20, checkpoint=folder)
        assert again.description["basis_size"] == size
        np.testing.assert_array_equal(again.values, first.values)


def test_a_track_of_the_smallest_eigenvalues_has_their_sign(key):
    values = np.r_[1e5, BULK]
    found = hd.track(
        operator_of, [(0, values), (1, 1.1 * values)], key, rank=3, which="SA", density=False
    )
    expected = np.stack([exact(values, "SA", 3), 1.1 * exact(values, "SA", 3)])
    np.testing.assert_allclose(found.values, expected, rtol=1e-3)
