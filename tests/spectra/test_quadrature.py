"""Gauss rules: what m steps know of a measure, exactly."""

import itertools

import named_spectra as spectra
import numpy as np
import pytest

from hessdensity.spectra.quadrature import (
    ANGLES,
    Tridiagonal,
    cumulative,
    cumulative_bounds,
    gauss_rule,
    largest_point_mass,
    radau_rules,
)
from hessdensity.spectra.statistics import RuleStatistics


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
    lower, upper = cumulative_bounds(rule.members, x)
    exact = cumulative(values, masses, x)
    left = exact - np.array([masses[values == point].sum() for point in x])
    assert (lower <= left + 1e-12).all()
    assert (exact <= upper + 1e-12).all()
    for nodes, weights in rule.members:
        step = cumulative(nodes, weights, x)
        assert (lower <= step + 1e-12).all()
        assert (step <= upper + 1e-12).all()
    # The Gauss rule alone gives bounds that are wider.
    wider = cumulative_bounds(rule.members[:1], x)
    assert (wider[0] <= lower).all()
    assert (upper <= wider[1]).all()
    assert np.mean(upper - lower) < 0.75 * np.mean(wider[1] - wider[0])


def test_the_cumulative_is_a_right_continuous_step():
    x = np.array([-1.0, 0.0, 0.5, 2.0, 3.0])
    np.testing.assert_array_equal(
        cumulative(np.array([0.0, 2.0]), np.array([0.25, 0.75]), x), [0, 0.25, 0.25, 1, 1]
    )


# The family --------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_steps", [1, 2, 5, 8])
@pytest.mark.parametrize("name", spectra.ORDINARY)
def test_every_member_reproduces_moments_up_to_2m_and_so_does_their_mean(name, num_steps):
    values, masses = measure(name)
    rule = gauss_rule(Tridiagonal(*spectra.lanczos(values, masses, num_steps)))
    scale = np.abs(values).max()
    mean = rule.estimate
    assert mean[1].sum() == pytest.approx(1)
    for nodes, weights in [*rule.members[1:], mean]:
        assert (weights >= 0).all()
        for k in range(2 * num_steps + 1):
            exact = masses @ (values / scale) ** k
            assert weights @ (nodes / scale) ** k == pytest.approx(exact, abs=1e-11)


@pytest.mark.parametrize("name", spectra.ORDINARY)
def test_two_members_interlace_and_every_point_is_a_node_of_one(name):
    values, masses = measure(name)
    diagonal, off_diagonal = spectra.lanczos(values, masses, 6)
    nodes, _ = radau_rules(diagonal, off_diagonal, ANGLES)
    gauss = gauss_rule(Tridiagonal(diagonal, off_diagonal)).nodes
    for one, other in itertools.pairwise(nodes):
        assert (one < other).all()
        assert (other[:-1] < one[1:]).all()
    assert (nodes[:, :-1] < gauss).all()
    assert (gauss < nodes[:, 1:]).all()
    rule = gauss_rule(Tridiagonal(diagonal, off_diagonal))
    for x in np.linspace(values[0], values[-1], 7) + 1e-3:
        angle = rule.angles_through(np.array([x]))
        found, weights = radau_rules(diagonal, off_diagonal, angle)
        position = np.abs(found[0] - x).argmin()
        assert found[0, position] == pytest.approx(x, abs=1e-9)
        # Its weight is the most that a measure with these moments can have at x.
        most = largest_point_mass(Tridiagonal(diagonal, off_diagonal), np.array([x]))
        assert weights[0, position] == pytest.approx(most[0], rel=1e-6)


@pytest.mark.parametrize("num_steps", [1, 4, 12])
@pytest.mark.parametrize("name", spectra.ALL)
def test_no_atom_is_heavier_than_the_largest_point_mass(name, num_steps):
    values, masses = measure(name)
    found = Tridiagonal(*spectra.lanczos(values, masses, num_steps))._replace(rounding_error=1e-12)
    most = largest_point_mass(found, values)
    assert (masses <= most * (1 + 2e-3)).all()  # rounding of a converged eigenvalue
    assert (most <= 1).all()
    rule = gauss_rule(found)
    np.testing.assert_allclose(largest_point_mass(found, rule.nodes), rule.weights, rtol=2e-3)


@pytest.mark.parametrize("name", spectra.ORDINARY)
def test_the_mean_of_the_family_is_closer_to_the_measure_than_the_gauss_rule(name):
    from scipy.stats import wasserstein_distance

    values, masses = measure(name)
    rule = gauss_rule(Tridiagonal(*spectra.lanczos(values, masses, 12)))
    gauss, mean = (
        wasserstein_distance(nodes, values, weights, masses)
        for nodes, weights in ((rule.nodes, rule.weights), rule.estimate)
    )
    assert mean < 0.95 * gauss


def test_an_exhausted_space_has_one_member_and_no_error():
    rule = gauss_rule(Tridiagonal(np.array([1.0, 2.0]), np.array([0.5, 0.0])))
    assert rule.exact
    assert len(rule.members) == 1


@pytest.mark.parametrize("scale", [1e-300, 1e-35, 1e200])
def test_rules_of_any_scale_have_the_same_weights(scale):
    values, masses = measure("outliers")
    diagonal, off_diagonal = spectra.lanczos(values, masses, 10)
    plain = gauss_rule(Tridiagonal(diagonal, off_diagonal))
    scaled = gauss_rule(Tridiagonal(scale * diagonal, scale * off_diagonal))
    for one, other in zip(plain.members, scaled.members, strict=True):
        np.testing.assert_allclose(other[0] / scale, one[0], rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose(other[1], one[1], rtol=1e-9, atol=1e-14)


@pytest.mark.parametrize("name", spectra.ORDINARY)
@pytest.mark.parametrize("num_steps", [4, 9])
def test_the_family_bounds_the_mean_of_an_indicator_as_well_as_is_possible(name, num_steps):
    """For an indicator, the extremes over all rules are the Chebyshev-Markov-Stieltjes bounds."""
    values, masses = measure(name)
    rule = gauss_rule(Tridiagonal(*spectra.lanczos(values, masses, num_steps)))
    statistics = RuleStatistics((rule,), values.size, random=False)
    for jump in np.linspace(values[0], values[-1], 9)[1:-1] + 1e-3:

        def above(nodes, jump=jump):
            return (nodes > jump)[:, None].astype(float)

        ((nodes, weights),) = rule.family(rule.angles_through(np.array([jump])))
        position = np.abs(nodes - jump).argmin()
        least, most = weights[position + 1 :].sum(), weights[position:].sum()
        evenly = statistics._means(rule, above, rule.members)
        found = statistics._extremes_of_family(0, above, evenly)
        assert found[0] == pytest.approx(least, abs=0.01)
        assert found[1] == pytest.approx(most, abs=0.01)
