"""The answer and its error bars: identities for any rules, and coverage on exact spectra."""

import jax
import named_spectra as spectra
import numpy as np
import pytest
import scipy.stats

import hessdensity as hd
from hessdensity.spectra.evidence import ends_of_the_spectrum
from hessdensity.spectra.quadrature import Tridiagonal, gauss_rule


def sphere_rules(values, num_probes, rng, num_deflated=0):
    """One exact rule a probe: all eigenvalues as nodes, squared components of a point of the sphere
    as weights.

    The first ``num_deflated`` eigenvalues are deflated exactly.
    """
    n, rules = values.size, []
    for _ in range(num_probes):
        squares = rng.standard_normal(n - num_deflated) ** 2
        weights = np.concatenate(
            [np.full(num_deflated, 1 / n), squares / squares.sum() * (n - num_deflated) / n]
        )
        order = np.concatenate(
            [np.arange(num_deflated), num_deflated + np.argsort(values[num_deflated:])]
        )
        rules.append(hd.Rule(values[order], weights[order], num_deflated, np.zeros(n)))
    return hd.SpectralDensity(tuple(rules), n, num_probes)


def of_eigenvalues(values):
    """A density that knows every eigenvalue."""
    values = np.sort(np.asarray(values, float))
    rule = hd.Rule(values, np.full(values.size, 1 / values.size), 0, np.zeros(values.size))
    return hd.SpectralDensity((rule,), values.size, 0)


@pytest.fixture
def rng():
    return np.random.default_rng(7)


@pytest.mark.parametrize("name", spectra.ALL)
def test_exact_rules_give_exact_answers(name):
    values = spectra.ALL[name]
    density = of_eigenvalues(values)
    assert density.trace().value == pytest.approx(values.sum(), abs=1e-12)
    assert density.frobenius_norm().value == pytest.approx(np.linalg.norm(values))
    assert density.moment(3).value == pytest.approx(np.mean(values**3), abs=1e-12)
    assert density.expectation(np.cos).value == pytest.approx(np.mean(np.cos(values)))
    assert [float(end) for end in density.extremes()] == [values.min(), values.max()]
    x = np.linspace(values.min() - 1, values.max() + 1, 37)
    np.testing.assert_allclose(
        density.cdf(x), [(values <= point).mean() for point in x], atol=1e-12
    )
    assert density.mass(-0.1, 0.6).value == pytest.approx(
        np.mean((values >= -0.1) & (values <= 0.6))
    )
    for p in (0.0, 0.1, 0.5, 1.0):
        assert (
            density.quantile(p).value
            == np.sort(values)[max(int(np.ceil(p * values.size - 1e-9)) - 1, 0)]
        )


def test_the_density_is_the_sum_of_gaussians_and_integrates_to_one():
    values = spectra.ORDINARY["outliers"]
    density = of_eigenvalues(values)
    x = np.linspace(-4, 11, 20_001)
    expected = np.mean([scipy.stats.norm.pdf(x, value, 0.05) for value in values], axis=0)
    pdf = density.pdf(x, 0.05)
    np.testing.assert_allclose(pdf, expected, rtol=1e-9, atol=1e-300)
    assert np.trapezoid(pdf, x) == pytest.approx(1, abs=1e-9)
    assert density.pdf(0.3).value.shape == ()
    assert density.pdf(x.reshape(3, -1)).value.shape == (3, 6667)


@pytest.mark.parametrize("num_deflated", [0, 5])
@pytest.mark.parametrize("num_probes", [1, 2, 4])
def test_two_standard_errors_cover_the_truth_as_often_as_they_should(num_probes, num_deflated, rng):
    values = np.concatenate([[10.0, 7.0, 4.0, 3.0, -2.0], rng.standard_normal(295) * 0.3])
    functions = {
        "trace": lambda x: x,
        "tail": lambda x: (np.abs(x) < 0.2).astype(float),
        "smooth": np.tanh,
    }
    covered = dict.fromkeys(functions, 0)
    runs = 400
    for _ in range(runs):
        density = sphere_rules(values, num_probes, rng, num_deflated)
        for name, f in functions.items():
            estimate = density.expectation(f)
            covered[name] += abs(estimate.value - f(values).mean()) <= 2 * estimate.standard_error
    if not num_deflated:
        # The five outliers, 0.7 of the variance in five squared Gaussians a probe, make the trace's
        # law skewed.
        assert covered.pop("trace") > (0.80 if num_probes == 1 else 0.84) * runs
    for count in covered.values():
        # The binomial's own 5 sigma around 95.4 %.
        assert abs(count / runs - 0.954) < 5 * np.sqrt(0.954 * 0.046 / runs)


@pytest.mark.parametrize("num_probes", [1, 2])
@pytest.mark.parametrize("name", ["one outlier", "ten outliers", "power law", "both signs"])
def test_the_intervals_of_trace_and_norm_cover_where_two_standard_errors_do_not(
    name, num_probes, rng
):
    values = {
        "one outlier": np.concatenate([[100.0], np.full(499, 1e-3)]),
        "ten outliers": np.concatenate([np.geomspace(1, 10, 10), rng.standard_normal(490) * 0.01]),
        "power law": 1 / np.arange(1.0, 501.0),
        "both signs": np.concatenate([[10.0, -7.0], rng.standard_normal(498) * 0.1]),
    }[name]
    densities = [sphere_rules(values, num_probes, rng) for _ in range(300)]
    for estimates, exact in (
        ([d.trace() for d in densities], values.sum()),
        ([d.frobenius_norm() for d in densities], np.linalg.norm(values)),
    ):
        covered = np.mean([e.lower <= exact <= e.upper for e in estimates])
        symmetric = np.mean([abs(e.value - exact) <= 2 * e.standard_error for e in estimates])
        # One probe that meets a heavy tail cannot know how heavy it is.
        assert covered > (0.83 if num_probes == 1 else 0.88)
        assert covered >= symmetric - 0.05
        assert all(
            e.lower <= e.value * (1 + 1e-6) and e.value <= e.upper * (1 + 1e-6) for e in estimates
        )
    if values.min() >= 0:
        assert min(d.trace().lower for d in densities) >= 0


@pytest.mark.parametrize("num_probes", [1, 3])
def test_the_variance_formula_is_unbiased(num_probes, rng):
    values = spectra.ORDINARY["linear"]
    estimates = [sphere_rules(values, num_probes, rng).moment(2) for _ in range(2000)]
    spread = np.var([estimate.value for estimate in estimates])
    claimed = np.mean([estimate.standard_error**2 for estimate in estimates])
    assert claimed == pytest.approx(spread, rel=5 * np.sqrt(2 / 2000))
    exact = 2 / (num_probes * (values.size + 2)) * np.var(values**2)
    assert claimed == pytest.approx(exact, rel=0.02)


@pytest.mark.parametrize("share", [0.02, 0.5, 0.97])
@pytest.mark.parametrize("num_probes", [1, 4])
def test_the_beta_intervals_of_shares_cover_in_95_percent(share, num_probes, rng):
    values = (np.arange(100) >= 100 * share).astype(float)
    runs, covered = 500, 0
    for _ in range(runs):
        bounds = sphere_rules(values, num_probes, rng).cdf(0.5)
        covered += bounds.lower <= share <= bounds.upper
    assert abs(covered / runs - 0.95) < 5 * np.sqrt(0.95 * 0.05 / runs)


@pytest.mark.parametrize("num_probes", [1, 2, 10])
def test_the_interval_of_an_outliers_density_covers_though_its_weight_is_a_chi_square(
    num_probes, rng
):
    values = np.concatenate([np.zeros(499), [1.0]])
    exact, runs = scipy.stats.norm.pdf(0, 0, 0.01) / 500, 500
    bounds = [sphere_rules(values, num_probes, rng).pdf(1.0, 0.01) for _ in range(runs)]
    covered = sum(bool(b.lower <= exact <= b.upper) for b in bounds)
    # At least: fewer than one eigenvalue is not believed, so that the upper end never misses.
    assert covered / runs > 0.95 - 3 * np.sqrt(0.95 * 0.05 / runs)
    assert min(float(b.lower) for b in bounds) < exact / 2


def test_the_bounds_of_a_mass_hold_the_quadratures_error(key):
    # 97 % of the spectrum in a hair's breadth around zero: three steps cannot tell the sign.
    values = np.concatenate(
        [np.random.default_rng(0).standard_normal(970) * 1e-7, np.linspace(0.1, 1, 30)]
    )
    operator = hd.Matrix.from_eigenvalues(values.astype(np.float32), key)
    for num_steps in (3, 5, 9, 20):
        density = hd.spectral_density(
            operator, key, num_steps=num_steps, num_probes=4, progress=False
        )
        mass = density.mass(-1, 0)
        assert mass.lower <= np.mean(values <= 0) <= mass.upper
        assert mass.lower <= mass.value <= mass.upper


def test_all_mass_lies_between_the_infinities(key):
    operator = hd.Matrix.from_eigenvalues(np.linspace(-1, 1, 100, dtype=np.float32), key)
    density = hd.spectral_density(operator, key, num_steps=3, progress=False)
    everything = density.mass(-np.inf, np.inf)
    assert (everything.lower, everything.value, everything.upper) == pytest.approx((1, 1, 1))
    assert density.mass(-np.inf, 0.5).lower > 0


def test_quantiles_bracket_the_truth_and_invert_the_cdf(rng):
    values = np.sort(rng.standard_normal(400))
    density = sphere_rules(values, 2, rng)
    for p in (0.05, 0.5, 0.9):
        quantile = density.quantile(p)
        assert quantile.lower <= np.quantile(values, p) <= quantile.upper
        assert (
            density.cdf(quantile.value).value
            >= p
            > density.cdf(np.nextafter(quantile.value, -np.inf)).value
        )


@pytest.mark.parametrize("factor", [1e-6, 1e6])
def test_every_output_scales_with_the_right_power(factor, rng):
    values = spectra.ORDINARY["outliers"]
    plain = sphere_rules(values, 2, np.random.default_rng(1))
    scaled = sphere_rules(values * factor, 2, np.random.default_rng(1))
    assert scaled.trace().value == pytest.approx(factor * plain.trace().value)
    assert scaled.trace().standard_error == pytest.approx(factor * plain.trace().standard_error)
    assert scaled.frobenius_norm().standard_error == pytest.approx(
        factor * plain.frobenius_norm().standard_error
    )
    assert scaled.moment(3).value == pytest.approx(factor**3 * plain.moment(3).value)
    assert scaled.bandwidth == pytest.approx(factor * plain.bandwidth)
    x = np.linspace(-4, 11, 50)
    np.testing.assert_allclose(
        np.asarray(scaled.pdf(x * factor)) * factor, plain.pdf(x), rtol=1e-6, atol=1e-300
    )
    np.testing.assert_allclose(scaled.cdf(x * factor), plain.cdf(x))
    assert scaled.quantile(0.3).value == pytest.approx(factor * plain.quantile(0.3).value)
    assert hd.distance(scaled, values * factor) == pytest.approx(
        factor * hd.distance(plain, values)
    )


@pytest.mark.parametrize("name", ["identity", "zero", "one"])
def test_a_spectrum_of_one_value_has_no_error(name):
    values = spectra.BREAKDOWN[name]
    rule = gauss_rule(Tridiagonal(values[:1], np.zeros(1)))
    density = hd.SpectralDensity((rule, rule), values.size, 2)
    assert density.trace().value == pytest.approx(values.sum())
    assert density.trace().standard_error == 0
    assert density.bandwidth > 0
    assert np.all(np.isfinite(np.asarray(density.pdf(np.linspace(-5, 5, 11)))))
    assert str(density)


def test_deflated_nodes_carry_no_noise_and_the_probes_the_rest(rng):
    values = np.concatenate([[100.0, 50.0], rng.standard_normal(98)])
    density = sphere_rules(values, 1, rng, num_deflated=2)
    assert density.weights.sum() == pytest.approx(1)
    assert abs(density.trace().value - values.sum()) < 5 * np.sqrt(98) * 1.5
    # Of an indicator of the deflated part nothing is uncertain.
    assert density.expectation(lambda x: (x > 40).astype(float)).standard_error < 1e-12
    assert density.mass(40, 200).value == pytest.approx(0.02)
    assert density.mass(40, 200).lower == pytest.approx(0.02)


def test_distance_is_w1_and_a_metric():
    a, b, c = (
        of_eigenvalues(spectra.ORDINARY[name]) for name in ("linear", "geometric", "outliers")
    )
    assert hd.distance(a, a) == 0
    assert hd.distance(a, b) == pytest.approx(hd.distance(b, a))
    assert hd.distance(a, c) <= hd.distance(a, b) + hd.distance(b, c)
    shifted = spectra.ORDINARY["linear"] + 0.25
    assert hd.distance(a, shifted) == pytest.approx(0.25)
    with pytest.raises(ValueError, match=r"shape \(2, 2\)"):
        hd.distance(a, np.eye(2))


def test_saved_is_loaded_bit_for_bit(tmp_path, rng):
    density = sphere_rules(spectra.ORDINARY["outliers"], 3, rng, num_deflated=4)
    short = gauss_rule(Tridiagonal(np.array([1.0, 2.0]), np.array([0.5, 0.1])))
    density = hd.SpectralDensity(
        (*density.rules, hd.Rule(short.nodes, short.weights, 4, short.residuals)),
        300,
        17,
        {"key": [1, 2], "loss": 0.1},
    )
    density.save(tmp_path / "density.anything")
    loaded = hd.SpectralDensity.load(tmp_path / "density.anything")
    for ours, theirs in zip(density.rules, loaded.rules, strict=True):
        for field in ("nodes", "weights", "residuals", "num_deflated"):
            np.testing.assert_array_equal(getattr(ours, field), getattr(theirs, field))
    assert (loaded.dimension, loaded.num_matvecs, loaded.description) == (
        300,
        17,
        {"key": [1, 2], "loss": 0.1},
    )


def test_a_file_that_is_no_saved_density_is_refused(tmp_path):
    np.savez(tmp_path / "other.npz", x=np.ones(3))
    np.save(tmp_path / "array.npy", np.ones(3))
    (tmp_path / "text.npz").write_text("not a zip")
    (tmp_path / "empty.npz").write_bytes(b"")
    np.savez(tmp_path / "pickle.npz", x=np.array([object()], dtype=object))
    for path in sorted(tmp_path.iterdir()):
        with pytest.raises(ValueError, match="is not a saved density; expected a file written by"):
            hd.SpectralDensity.load(path)
    with pytest.raises(FileNotFoundError):
        hd.SpectralDensity.load(tmp_path / "missing.npz")
    of_eigenvalues([1.0]).save(tmp_path / "new.npz")
    newer = dict(np.load(tmp_path / "new.npz")) | {"version": 99}
    np.savez(tmp_path / "new.npz", **newer)
    with pytest.raises(ValueError, match="version 99"):
        hd.SpectralDensity.load(tmp_path / "new.npz")


def test_arguments_that_cannot_be_are_refused():
    density, x = of_eigenvalues([1.0, 2.0]), np.ones(1)
    for call, said in (
        (lambda: density.pdf(0.0, bandwidth=0.0), "bandwidth=0.0, expected a positive"),
        (lambda: density.mass(2, 1), "expected low <= high"),
        (lambda: density.quantile(1.5), r"p=1.5, expected a share in \[0, 1\]"),
        (lambda: density.expectation(lambda x: np.where(x > 1, np.nan, x)), "with 1 not finite"),
        (lambda: density.expectation(lambda x: 3.0), "one finite number for each node"),
        (lambda: hd.SpectralDensity((), 3, 0), "rules is empty"),
        (
            lambda: hd.SpectralDensity((hd.Rule(x, x, 1, x), hd.Rule(x, x, 2, x)), 1, 0),
            "deflates more nodes than",
        ),
    ):
        with pytest.raises(ValueError, match=said):
            call()


def test_an_estimate_stands_in_for_its_value_and_prints_its_error():
    scalar, array = (
        hd.Estimate(1.23456, 0.1, 1.0, 1.4),
        hd.Estimate(np.arange(3.0), np.ones(3), np.ones(3), np.ones(3)),
    )
    assert float(scalar) == 1.23456
    assert f"{scalar:.3g}" == "1.23 ± 0.1"
    assert str(scalar) == "1.23456 ± 0.1"
    np.testing.assert_array_equal(np.asarray(array) + 1, [1, 2, 3])
    assert np.asarray(array, np.float32).dtype == np.float32
    assert "(3,) estimates" in str(array)


def test_a_density_prints_its_main_figures(rng):
    text = str(sphere_rules(spectra.ORDINARY["outliers"], 2, rng))
    for part in ("n = 300", "largest node", "smallest node", "trace", "±", " to ", "2 products"):
        assert part in text


def test_results_are_immutable(rng):
    density = sphere_rules(spectra.ORDINARY["linear"], 1, rng)
    with pytest.raises(AttributeError):
        density.dimension = 3
    with pytest.raises(AttributeError):
        density.trace().value = 0.0
    assert not jax.tree.leaves(density)[1:]


# Errors kept apart --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["linear", "outliers", "three values", "eight of 300"])
@pytest.mark.parametrize("deflation_steps", [0, 15])
def test_combined_bounds_hold_each_error_and_the_truth_in_95_percent(
    name, deflation_steps, key, dtype
):
    values = np.sort(spectra.ALL[name])
    operator = hd.Matrix.from_eigenvalues(values.astype(dtype), key)
    x = np.linspace(values[0] - 1.003, values[-1] + 1.017, 41)
    truth = np.searchsorted(values, x, side="right") / values.size
    held = []
    for seed in range(20):
        density = hd.spectral_density(
            operator,
            jax.random.key(seed),
            num_steps=8,
            deflation_steps=deflation_steps,
            progress=False,
        )
        bounds = density.cdf_bounds(x)
        for inner in (bounds.quadrature, bounds.probes):
            assert (bounds.lower <= np.asarray(inner[0]) + 1e-9).all()
            assert (np.asarray(inner[1]) <= bounds.upper + 1e-9).all()
        held.append((bounds.lower <= truth + 1e-9) & (truth <= bounds.upper + 1e-9))
        coupled = any(rule.coupling for rule in density.rules)
        assert np.any(bounds.coupling > 0) == coupled
        assert bounds.coupling.max() <= 1 / values.size
        # No coupling moves eigenvalues beyond both spectra.
        assert not bounds.coupling[[0, -1]].any()
        for field in ("value", "lower", "upper"):
            np.testing.assert_array_equal(getattr(bounds, field), getattr(density.cdf(x), field))
    assert np.mean(held) >= 0.92


def test_an_enclosure_says_that_nothing_lies_outside_of_it(key):
    values = np.linspace(-1, 1, 300)
    density = hd.spectral_density(
        hd.Matrix.from_eigenvalues(values.astype(np.float32), key),
        key,
        num_steps=6,
        deflation_steps=0,
        progress=False,
    )
    outside = np.array([-1.2, 1.2])
    without, given = density.cdf_bounds(outside), density.cdf_bounds(outside, (-1.1, 1.1))
    assert without.upper[0] > 0
    assert without.lower[1] < 1
    np.testing.assert_allclose([given.lower, given.upper], [[0, 1], [0, 1]])
    for enclosure in ((0.0, 1.1), (1.0, -1.0)):
        with pytest.raises(
            ValueError, match="expected \\(low, high\\) that holds the whole spectrum"
        ):
            density.cdf_bounds(0.0, enclosure)


def test_the_measure_of_a_given_vector_has_no_randomness_and_no_trace(rng):
    values = spectra.ORDINARY["outliers"]
    (rule,) = sphere_rules(values, 1, rng).rules
    density = hd.SpectralMeasure((rule,), values.size, 1)
    for estimate in (density.cdf(0.1), density.moment(2), density.pdf(0.1)):
        assert estimate.standard_error == 0
        assert estimate.lower == pytest.approx(estimate.value)
        assert estimate.upper == pytest.approx(estimate.value)
    assert density.mass(3, 20).value == pytest.approx(rule.weights[rule.nodes > 3].sum())
    assert not hasattr(density, "trace")
    assert not hasattr(density, "frobenius_norm")
    assert "Rayleigh quotient" in str(density)
    assert "trace" not in str(density)


def test_rules_that_differ_in_what_they_deflate_are_weighed_by_what_they_leave(rng):
    values = np.concatenate([[100.0, 50.0], rng.standard_normal(98)])
    covered = 0
    for _ in range(300):
        rules = (
            *sphere_rules(values, 1, rng, num_deflated=2).rules,
            *sphere_rules(values, 1, rng, num_deflated=1).rules,
        )
        estimate = hd.SpectralDensity(rules, 100, 2).expectation(np.tanh)
        covered += abs(estimate.value - np.tanh(values).mean()) <= 2 * estimate.standard_error
    assert abs(covered / 300 - 0.954) < 5 * np.sqrt(0.954 * 0.046 / 300)


def test_a_density_of_the_first_version_of_the_format_is_read(tmp_path, rng):
    density = sphere_rules(spectra.ORDINARY["linear"], 2, rng)
    density.save(tmp_path / "new.npz")
    saved = dict(np.load(tmp_path / "new.npz")) | {"version": 1}
    del saved["coupling"]
    np.savez(tmp_path / "old.npz", **saved)
    old = hd.SpectralDensity.load(tmp_path / "old.npz")
    np.testing.assert_array_equal(old.nodes, density.nodes)
    assert type(old) is hd.SpectralDensity
    assert old.rules[0].coupling == 0


def test_the_interval_of_an_almost_constant_function_covers_in_95_percent(rng):
    # Its relative error is 1e-9, which a law of shares near 1 would round to nothing.
    values = rng.standard_normal(150)

    def almost_constant(nodes):
        return 1 + 1e-8 * nodes

    found = [sphere_rules(values, 2, rng).expectation(almost_constant) for _ in range(400)]
    truth = almost_constant(values).mean()
    assert np.mean([each.lower <= truth <= each.upper for each in found]) >= 0.93
    width = np.median([each.upper - each.lower for each in found])
    assert width < 6 * np.std([each.value for each in found])


@pytest.mark.parametrize("num_runs", [1, 2, 5])
def test_the_ends_of_the_spectrum_lie_in_their_enclosure_in_95_percent(num_runs, rng):
    # Eigenvalues so close together that no run reaches the end.
    values = np.sort(np.repeat([-1.0, 0.3, 2.0], 60) + 1e-2 * rng.standard_normal(180))
    held = []
    for _ in range(150):
        runs = []
        for _ in range(num_runs):
            squares = rng.standard_normal(values.size) ** 2
            recurrence = spectra.lanczos(values, squares / squares.sum(), 10)
            runs.append(Tridiagonal(*recurrence)._replace(rounding_error=1e-13))
        low, high = ends_of_the_spectrum(runs, values.size)
        held += [low <= values[0], values[-1] <= high]
    assert np.mean(held) >= 0.92
    assert high - low < 1.1 * np.ptp(values)
