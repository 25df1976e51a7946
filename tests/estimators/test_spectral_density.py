"""The main job, end to end on operators whose spectrum is known."""

import logging

import jax
import jax.numpy as jnp
import named_spectra as spectra
import numpy as np
import pytest
import scipy.sparse.linalg
from problems import dense_hessian, mlp

import hessdensity as hd
from hessdensity.vectors.random import random_block


def operator_of(name, key, dtype, factor=1.0):
    return hd.Matrix.from_eigenvalues(jnp.asarray(factor * spectra.ALL[name], dtype), key)


def density_of(name, key, dtype, factor=1.0, **settings):
    return hd.spectral_density(
        operator_of(name, key, dtype, factor), key, progress=False, **settings
    )


@pytest.mark.parametrize("name", spectra.ALL)
def test_weights_are_a_probability_and_nodes_stay_in_the_spectrum(name, key, dtype):
    values = spectra.ALL[name]
    density = density_of(name, key, dtype, num_steps=40, num_probes=3)
    slack = 100 * np.finfo(dtype).eps * (np.abs(values).max() or 1)
    assert (density.weights >= 0).all()
    np.testing.assert_allclose(density.weights.sum(1), 1, atol=1e-12)
    assert density.extent[0] >= values.min() - slack
    assert density.extent[1] <= values.max() + slack


@pytest.mark.parametrize("name", spectra.BREAKDOWN)
def test_a_spectrum_of_few_values_is_found_value_by_value_with_the_probes_own_masses(
    name, key, dtype
):
    values = spectra.BREAKDOWN[name]
    operator = operator_of(name, key, dtype)
    density = hd.spectral_density(
        operator, key, num_steps=40, num_probes=2, deflation_steps=0, progress=False
    )
    probes = np.asarray(random_block(key, 0, 2, operator.like), float)
    exact, vectors = np.linalg.eigh(hd.dense(operator))
    slack = 1e-5 * (np.abs(values).max() or 1)
    for rule, probe in zip(density.rules, probes, strict=True):
        near = [
            rule.weights[np.abs(rule.nodes - value) < slack].sum() for value in np.unique(values)
        ]
        masses = [
            ((vectors.T @ probe)[np.abs(exact - value) < slack] ** 2).sum()
            for value in np.unique(values)
        ]
        np.testing.assert_allclose(near, masses, atol=200 * np.finfo(dtype).eps)
        assert sum(near) == pytest.approx(1)
    assert density.num_matvecs <= 2 * min(40, values.size, np.unique(values).size + 3)


@pytest.mark.parametrize("name", spectra.ORDINARY)
def test_the_estimate_is_within_its_error_bars(name, key, dtype):
    values = spectra.ORDINARY[name]
    density = density_of(name, key, dtype, num_steps=60, num_probes=10)
    assert abs(density.trace().value - values.sum()) < 4 * density.trace().standard_error
    assert abs(density.moment(2).value - np.mean(values**2)) < 4 * density.moment(2).standard_error
    assert hd.distance(density, values) < 0.02 * np.ptp(values)
    for end, exact in zip(density.extremes(), (values.min(), values.max()), strict=True):
        assert end.value == pytest.approx(exact, abs=0.02 * np.ptp(values))
        assert (
            np.abs(values - end.value).min()
            <= end.standard_error + 100 * np.finfo(dtype).eps * np.abs(values).max()
        )


def test_the_first_moments_of_a_probe_are_those_of_its_products(key, dtype):
    operator = operator_of("outliers", key, dtype)
    density = hd.spectral_density(
        operator, key, num_steps=7, num_probes=2, deflation_steps=0, progress=False
    )
    probes = random_block(key, 0, 2, operator.like)
    rows, matrix = np.asarray(probes, float), hd.dense(operator)
    for rule, v in zip(density.rules, rows, strict=True):
        moments = [rule.weights @ rule.nodes**k for k in range(14)]
        exact = [v @ np.linalg.matrix_power(matrix, k) @ v for k in range(14)]
        np.testing.assert_allclose(moments, exact, rtol=5000 * np.finfo(dtype).eps)


@pytest.mark.parametrize("factor", [1e-6, 1e6])
def test_multiplying_the_operator_scales_the_answer(factor, key, dtype):
    plain = density_of("outliers", key, dtype, num_steps=30, deflation_steps=20)
    scaled = density_of("outliers", key, dtype, factor, num_steps=30, deflation_steps=20)
    np.testing.assert_allclose(scaled.nodes / factor, plain.nodes, atol=2e-4 * 10)
    assert scaled.trace().value == pytest.approx(factor * plain.trace().value, rel=1e-4)
    assert scaled.extremes().largest.value == pytest.approx(
        factor * plain.extremes().largest.value, rel=1e-5
    )
    assert scaled.bandwidth == pytest.approx(factor * plain.bandwidth, rel=1e-5)


def test_probes_can_be_added_later_and_the_same_key_gives_the_same_answer(key):
    four = density_of("linear", key, np.float32, num_steps=10, num_probes=4, deflation_steps=5)
    two = density_of("linear", key, np.float32, num_steps=10, num_probes=2, deflation_steps=5)
    again = density_of("linear", key, np.float32, num_steps=10, num_probes=4, deflation_steps=5)
    np.testing.assert_array_equal(four.nodes, again.nodes)
    np.testing.assert_allclose(four.nodes[:3], two.nodes, atol=1e-5)
    other = density_of(
        "linear",
        jax.random.fold_in(key, 1),
        np.float32,
        num_steps=10,
        num_probes=4,
        deflation_steps=5,
    )
    assert np.abs(other.nodes - four.nodes).max() > 1e-3


def test_scipys_extreme_eigenvalues_of_a_networks_hessian_are_the_extreme_nodes(key):
    loss, params, batch = mlp(np.float32)
    hessian = hd.Hessian(loss, params, hd.batches(batch, 30))
    density = hd.spectral_density(
        hessian, key, num_steps=40, num_probes=1, deflation_steps=0, progress=False
    )
    start = np.ones(55, np.float32)
    largest = scipy.sparse.linalg.eigsh(
        hd.to_scipy(hessian), 1, which="LA", return_eigenvectors=False, v0=start
    )[0]
    smallest = scipy.sparse.linalg.eigsh(
        hd.to_scipy(hessian), 1, which="SA", return_eigenvectors=False, v0=start
    )[0]
    assert density.extremes().largest.value == pytest.approx(largest, rel=1e-5)
    assert density.extremes().smallest.value == pytest.approx(smallest, rel=1e-4)
    exact = np.linalg.eigvalsh(dense_hessian(loss, params, batch))
    assert density.extremes().largest.value == pytest.approx(exact[-1], rel=1e-5)


def test_the_reference_networks_spectrum_is_met(shared_data, key):
    """Ghorbani, Krishnan and Xiao's verification: 15,910 eigenvalues, against the rule that
    W1/range <= 1e-4."""
    exact = np.load(shared_data / "reference" / "mnist_mlp_784_20_10.npz")["eigenvalues"]
    operator = hd.Matrix.from_eigenvalues(jnp.asarray(exact, jnp.float32), key)
    distances = []
    for seed in range(4):
        probes = jax.random.key(seed)
        density = hd.spectral_density(
            operator, probes, num_steps=90, num_probes=10, deflation_steps=0, progress=False
        )
        distances.append(hd.distance(density, exact) / np.ptp(exact))
        assert abs(density.trace().value - exact.sum()) < 4 * density.trace().standard_error
        assert density.extremes().largest.value == pytest.approx(exact[-1], rel=1e-5)
        assert density.extremes().smallest.value == pytest.approx(exact[0], rel=1e-5)
    assert np.mean(distances) < 1e-4


# The loop around it -------------------------------------------------------------------------------


class Interrupted:
    """An operator during whose product number ``at`` something happens."""

    like = jax.ShapeDtypeStruct((50,), jnp.float32)

    def __init__(self, at, happening):
        self.left, self.happening = at, happening

    def __matmul__(self, block):
        self.left -= 1
        return self.happening(block) if self.left < 0 else block * jnp.arange(50.0)[None]


def interrupt(_):
    raise KeyboardInterrupt


def test_ctrl_c_returns_what_is_there_and_says_so(key, caplog):
    with caplog.at_level(logging.WARNING, logger="hessdensity"):
        density = hd.spectral_density(
            Interrupted(7, interrupt),
            key,
            num_steps=20,
            num_probes=2,
            deflation_steps=0,
            progress=False,
        )
    whole = hd.spectral_density(
        Interrupted(99, interrupt),
        key,
        num_steps=7,
        num_probes=2,
        deflation_steps=0,
        progress=False,
    )
    np.testing.assert_array_equal(density.nodes, whole.nodes)
    assert density.num_matvecs == 14
    assert "interrupted after 14 products" in caplog.text
    assert "interrupted after 14 products" in str(density)
    with pytest.raises(KeyboardInterrupt):
        hd.spectral_density(Interrupted(0, interrupt), key, progress=False)


def test_a_product_that_is_not_finite_names_step_and_batch_and_keeps_what_was_computed(key):
    with pytest.raises(
        hd.NonFiniteProductError, match="Step 4: the operator's product is not finite"
    ) as caught:
        hd.spectral_density(
            Interrupted(4, lambda block: block * jnp.nan),
            key,
            num_probes=2,
            deflation_steps=0,
            progress=False,
        )
    assert caught.value.partial.num_matvecs == 8
    assert caught.value.partial.nodes.shape == (2, 4)
    batches = [jnp.ones((2, 3)), jnp.ones((2, 3)) * 1e30]
    hessian = hd.Hessian(lambda w, x: jnp.mean(x @ w) ** 2, jnp.ones(3), batches)
    with pytest.raises(
        hd.NonFiniteProductError, match=r"Step 0: .*not finite in batch 1 of 2"
    ) as caught:
        hd.spectral_density(hessian, key, progress=False)
    assert caught.value.partial is None


def test_the_bar_counts_products_and_can_be_silenced(key, capsys):
    density_of("linear", key, np.float32, num_steps=5, num_probes=3, deflation_steps=4)
    assert capsys.readouterr() == ("", "")
    hd.spectral_density(
        operator_of("linear", key, np.float32), key, num_steps=5, num_probes=3, deflation_steps=4
    )
    out, err = capsys.readouterr()
    assert not out
    assert "19/19" in err
    assert "HVP/s" in err


def test_a_result_records_what_made_it(key):
    loss, params, batch = mlp(np.float32)
    hessian = hd.Hessian(loss, params, [batch])
    description = hd.spectral_density(
        hessian, key, num_steps=3, deflation_steps=4, progress=False
    ).description
    assert description["num_steps"] == 3
    assert description["num_probes"] == 2
    assert description["deflation_steps"] == 4
    assert description["spent"] == {"deflation": 4, "probes": [[2, 3]]}
    assert description["stopped"] is None
    assert description["key"] == np.asarray(jax.random.key_data(key)).tolist()
    assert description["operator"]["num_examples"] == 64
    assert description["versions"]["hessdensity"] == hd.__version__


@pytest.mark.parametrize(
    ("change", "error", "said"),
    [
        ({"num_steps": 0}, ValueError, "num_steps=0, expected a whole number"),
        ({"num_probes": 0}, ValueError, "num_probes=0, expected a whole number"),
        (
            {"deflation_steps": -1},
            ValueError,
            "deflation_steps=-1, expected a whole number of at least 0",
        ),
        (
            {"tolerance": 2.0},
            ValueError,
            "tolerance=2.0, expected a W1 distance over the spectrum's range",
        ),
        ({"max_matvecs": 10}, ValueError, "max_matvecs is given without tolerance="),
        (
            {"keep_eigenspace": True, "deflation_steps": 0},
            ValueError,
            "keep_eigenspace=True needs deflation",
        ),
        ({"operator": np.eye(3)}, TypeError, "operator is a ndarray; expected hd.Hessian"),
        ({"key": 0}, TypeError, "key is a int; expected a JAX random key"),
        ({"operator": hd.FunctionOperator(abs, jnp.zeros((0, 3)))}, ValueError, "has no entries"),
    ],
)
def test_arguments_that_cannot_be_are_refused(change, error, said):
    arguments = {
        "operator": hd.Matrix(jnp.eye(3)),
        "key": jax.random.key(0),
        "progress": False,
    } | change
    with pytest.raises(error, match=said):
        hd.spectral_density(arguments.pop("operator"), arguments.pop("key"), **arguments)
