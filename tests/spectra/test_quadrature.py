"""Gauss rules: what m steps know of a measure, exactly."""

import named_spectra as spectra
import numpy as np
import pytest

from hessdensity.spectra.quadrature import Tridiagonal, cumulative, cumulative_bounds, gauss_rule


def measure(name):
    values = np.unique(spectra.ALL[name].round(12))
    masses = np.random.default_rng(1).dirichlet(np.ones(values.size))
    return values, masses


@pytest.mark.parametrize("num_steps", [1, 2, 5, 8])
@pytest.mark.parametrize("name", spectra.ORDINARY)
def test_an_m_node_rule_reproduces_moments_up_to_2m_minus_1_and_misses_moment_2m_by_the_betas(
    name, num_steps
):
    values, masses = measure(name)
    diagonal, off_diagonal = spectra.lanczos(values, masses, num_steps)
    rule = gauss_rule(Tridiagonal(diagonal, off_diagonal))
    scale = np.abs(values).max()
    for k in range(2 * num_steps):
        moment, exact = rule.weights @ (rule.nodes / scale) ** k, masses @ (values / scale) ** k
        assert moment == pytest.approx(exact, abs=1e-12)
    missed = masses @ (values / scale) ** (2 * num_steps) - rule.weights @ (rule.nodes / scale) ** (
        2 * num_steps
    )
    assert missed == pytest.approx(np.prod(off_diagonal / scale) ** 2, rel=1e-6, abs=1e-13)


@pytest.mark.parametrize("name", spectra.ALL)
def test_weights_are_non_negative_and_sum_to_one(name):
    rule = gauss_rule(Tridiagonal(*spectra.lanczos(*measure(name), 20)))
    assert (rule.weights >= 0).all()
    assert rule.weights.sum() == pytest.approx(1, abs=1e-14)
    assert (np.diff(rule.nodes) > 0).all()


@pytest.mark.parametrize("name", spectra.BREAKDOWN)
def test_an_exhausted_measure_is_found_exactly(name):
    values, masses = measure(name)
    rule = gauss_rule(Tridiagonal(*spectra.lanczos(values, masses, 20)))
    assert rule.nodes.size == values.size
    np.testing.assert_allclose(rule.nodes, values, atol=1e-12 * np.abs(values).max())
    np.testing.assert_allclose(rule.weights, masses, atol=1e-12)
    assert not rule.residuals.any()


@pytest.mark.parametrize("name", spectra.ORDINARY)
def test_an_eigenvalue_lies_within_the_residual_of_every_node(name):
    values, masses = measure(name)
    rule = gauss_rule(Tridiagonal(*spectra.lanczos(values, masses, 15)))
    distances = np.abs(rule.nodes[:, None] - values).min(1)
    assert (distances <= rule.residuals + 1e-12).all()


def test_residuals_are_not_taken_below_the_noise_of_the_products():
    rule = gauss_rule(Tridiagonal(np.array([4.0, 1.0]), np.array([0.0, 0.0]), rounding_error=2e-7))
    assert rule.residuals.tolist() == [4e-7]


@pytest.mark.parametrize("num_steps", [1, 3, 10])
@pytest.mark.parametrize("name", spectra.ORDINARY)
def test_the_bounds_hold_the_cumulative_everywhere_and_from_the_left(name, num_steps):
    values, masses = measure(name)
    rule = gauss_rule(Tridiagonal(*spectra.lanczos(values, masses, num_steps)))
    x = np.concatenate([values, rule.nodes, np.linspace(values[0] - 1, values[-1] + 1, 500)])
    lower, upper = cumulative_bounds(rule.nodes, rule.weights, x)
    exact = cumulative(values, masses, x)
    left = exact - np.array([masses[values == point].sum() for point in x])
    assert (lower <= left + 1e-12).all()
    assert (exact <= upper + 1e-12).all()
    step = cumulative(rule.nodes, rule.weights, x)
    assert (lower <= step + 1e-12).all()
    assert (step <= upper + 1e-12).all()


def test_the_cumulative_is_a_right_continuous_step():
    x = np.array([-1.0, 0.0, 0.5, 2.0, 3.0])
    np.testing.assert_array_equal(
        cumulative(np.array([0.0, 2.0]), np.array([0.25, 0.75]), x), [0, 0.25, 0.25, 1, 1]
    )
