"""Krylov deflation: the theorem on its coupling, the rules it makes, and what it gains."""

import jax
import jax.numpy as jnp
import named_spectra as spectra
import numpy as np
import pytest
from problems import dense_hessian, mlp

import hessdensity as hd
from hessdensity.krylov import lanczos
from hessdensity.spectra import deflation
from hessdensity.spectra.accuracy import estimate
from hessdensity.spectra.quadrature import Tridiagonal, gauss_rule
from hessdensity.vectors.random import random_block


def dense_split(matrix, num_steps, key):
    """(eigenvalues of T, eigenvalues of C, beta, basis) of a Lanczos run on a dense matrix, by
    LAPACK in float64."""
    n = len(matrix)
    start = np.asarray(random_block(key, 0, 1, jax.ShapeDtypeStruct((n,), np.float64)))[0]
    basis, krylov = np.zeros((num_steps, n)), start
    for step in range(num_steps):
        for _ in range(3):
            krylov = krylov - basis.T @ (basis @ krylov)
        basis[step] = krylov / np.linalg.norm(krylov)
        krylov = matrix @ basis[step]
    for _ in range(3):
        krylov = krylov - basis.T @ (basis @ krylov)
    complement = np.linalg.svd(basis)[2][num_steps:]
    t, c = (np.linalg.eigvalsh(q @ matrix @ q.T) for q in (basis, complement))
    return t, c, np.linalg.norm(krylov), basis


@pytest.mark.parametrize("name", spectra.ORDINARY)
@pytest.mark.parametrize("num_steps", [1, 4, 15])
def test_deflation_moves_the_cumulative_by_one_eigenvalue_at_most_and_w1_by_two_beta(
    name, num_steps
):
    with jax.enable_x64():
        values = spectra.ORDINARY[name]
        matrix = hd.dense(hd.Matrix.from_eigenvalues(jnp.asarray(values), jax.random.key(1)))
        t, c, beta, _ = dense_split(matrix, num_steps, jax.random.key(2))
    split, values = np.sort(np.concatenate([t, c])), np.sort(values)
    middles = (split[1:] + split[:-1]) / 2
    for x in (middles, (values[1:] + values[:-1]) / 2):
        x = x[
            np.abs(x[:, None] - np.concatenate([split, values])).min(axis=1) > 1e-9
        ]  # not on an eigenvalue
        assert np.abs(np.searchsorted(split, x) - np.searchsorted(values, x)).max() <= 1
    assert np.abs(split - values).sum() <= 2 * beta * (1 + 1e-9) + 1e-12


@pytest.mark.parametrize("name", spectra.ALL)
def test_every_rule_is_a_probability_with_the_ritz_values_at_one_over_n(name, key, dtype):
    values = spectra.ALL[name]
    operator = hd.Matrix.from_eigenvalues(jnp.asarray(values, dtype), key)
    density = hd.spectral_density(operator, key, deflation_steps=12, num_steps=20, progress=False)
    slack = 200 * np.finfo(dtype).eps * (np.abs(values).max() or 1)
    for rule in density.rules:
        assert rule.weights.sum() == pytest.approx(1)
        assert (rule.weights[: rule.num_deflated] == 1 / values.size).all()
        assert (rule.weights >= 0).all()
        assert (np.diff(rule.nodes[: rule.num_deflated]) >= 0).all()
        assert (np.diff(rule.nodes[rule.num_deflated :]) >= 0).all()
        # Every node has an eigenvalue of the operator, not merely of a compression, within its
        # residual.
        nearest = np.abs(rule.nodes[:, None] - values).min(axis=1)
        assert (nearest <= rule.residuals + slack).all()
        assert values.min() - slack <= rule.nodes.min()
        assert rule.nodes.max() <= values.max() + slack


@pytest.mark.parametrize("name", spectra.ALL)
def test_a_run_through_the_whole_space_leaves_every_eigenvalue_and_no_error(name, key, dtype):
    values = np.unique(spectra.ALL[name].round(3))[:40]
    density = hd.spectral_density(
        hd.Matrix.from_eigenvalues(jnp.asarray(values, dtype), key), key, progress=False
    )
    assert density.num_matvecs == values.size
    np.testing.assert_allclose(
        density.nodes[0], values, atol=200 * np.finfo(dtype).eps * (np.abs(values).max() or 1)
    )
    assert density.trace().standard_error == 0
    error = density.description["error"]
    assert error["total"] == error["rounding"] <= 100 * np.finfo(dtype).eps
    middle = values.mean() + 0.0123
    bounds = density.cdf_bounds(middle)
    assert (bounds.lower, bounds.upper) == pytest.approx((np.mean(values <= middle),) * 2)


def test_a_probe_in_an_exhausted_complement_finds_what_is_left_of_it(key, dtype):
    values = spectra.BREAKDOWN["eight of 300"]
    operator = hd.Matrix.from_eigenvalues(jnp.asarray(values, dtype), key)
    density = hd.spectral_density(operator, key, progress=False)
    exact = np.sort(values)
    assert hd.distance(density, exact) < 1e-5 * exact[-1]
    assert density.trace().value == pytest.approx(exact.sum(), rel=1e-5)
    np.testing.assert_allclose(density.outliers[:8, 0], exact[::-1][:8], rtol=1e-5)


def test_outliers_are_the_converged_ritz_values_and_the_eigenspace_holds_their_vectors(key, dtype):
    values = spectra.ORDINARY["outliers"]
    operator = hd.Matrix.from_eigenvalues(jnp.asarray(values, dtype), key)
    density = hd.spectral_density(
        operator, key, deflation_steps=25, keep_eigenspace=True, progress=False
    )
    far = values[np.abs(values) > 1]
    outliers = density.outliers[:, 0]
    np.testing.assert_allclose(outliers[np.abs(outliers) > 1], np.sort(far)[::-1], rtol=1e-5)
    assert (density.outliers[:, 1] <= 1e-4 * 10).all()
    space = density.eigenspace
    assert space.rank == 25
    assert np.isin(density.outliers[:, 0], space.values[space.converged]).all()
    vectors = np.asarray(space.vectors, float)
    np.testing.assert_allclose(vectors @ vectors.T, np.eye(25), atol=200 * np.finfo(dtype).eps)
    residuals = np.linalg.norm(
        np.asarray(operator @ space.vectors, float) - space.values[:, None] * vectors, axis=1
    )
    np.testing.assert_allclose(space.residuals, residuals, atol=300 * np.finfo(dtype).eps * 10)
    assert f"{outliers.size} eigenvalues found: 10, 7, 4, -3, 2" in str(density)


def test_the_eigenspace_of_a_network_is_a_tree_like_its_params(key):
    loss, params, batch = mlp(np.float32)
    hessian = hd.Hessian(loss, params, [batch])
    density = hd.spectral_density(
        hessian, key, deflation_steps=30, keep_eigenspace=True, progress=False
    )
    exact, vectors = np.linalg.eigh(dense_hessian(loss, params, batch))
    top = density.eigenspace[:3]
    assert top.converged.all()
    np.testing.assert_allclose(top.values, exact[::-1][:3], rtol=1e-4)
    flat = np.concatenate(
        [np.asarray(leaf).reshape(3, -1) for leaf in jax.tree.leaves(top.vectors)], axis=1
    )
    np.testing.assert_allclose(np.abs(np.sum(flat * vectors[:, ::-1].T[:3], axis=1)), 1, atol=1e-3)
    assert hd.spectral_density(hessian, key, deflation_steps=30, progress=False).eigenspace is None


def test_isolated_nodes_are_reset_to_one_over_n_and_the_rest_keeps_its_proportions():
    rng = np.random.default_rng(0)
    values = np.concatenate([[100.0, 60.0, -50.0], rng.standard_normal(197)])
    rule = gauss_rule(Tridiagonal(*spectra.lanczos(values, rng.dirichlet(np.full(200, 0.5)), 25)))
    every = np.ones(rule.nodes.size, bool)
    reset = deflation.pin_isolated(rule, 200, every)
    assert reset.num_deflated == 3
    assert reset.pinned
    np.testing.assert_allclose(reset.nodes[:3], [-50, 60, 100])
    assert (reset.weights[:3] == 1 / 200).all()
    assert reset.weights.sum() == pytest.approx(1)
    ratio = reset.weights[3:] / rule.weights[np.isin(rule.nodes, reset.nodes[3:])]
    np.testing.assert_allclose(ratio, ratio[0])
    # Every member of the family is reset in the same way.
    for nodes, weights in reset.members[1:]:
        assert weights.sum() == pytest.approx(197 / 200)
        assert weights[np.abs(nodes) > 40].sum() < 1e-9
    # Without evidence that they are simple, eigenvalues keep their weights.
    assert deflation.pin_isolated(rule, 200, ~every) is rule
    bulk = gauss_rule(Tridiagonal(*spectra.lanczos(values[3:], np.full(197, 1 / 197), 10)))
    assert deflation.pin_isolated(bulk, 197, np.ones(10, bool)).num_deflated == 0


def test_an_eigenvalue_that_probes_find_again_is_multiple_and_keeps_its_weight(key):
    rng = np.random.default_rng(0)
    values = np.concatenate([[10.0, 10.0, 7.0], rng.standard_normal(297) * 0.1])
    operator = hd.Matrix.from_eigenvalues(jnp.asarray(values, jnp.float32), key)
    own, *rest = hd.spectral_density(operator, key, deflation_steps=30, progress=False).rules
    reset = own.nodes[: own.num_deflated]
    assert reset[-1] == pytest.approx(7, rel=1e-5)
    for rule in rest:  # in the run by its rounding, or in the complement
        assert np.sum(np.abs(rule.nodes - 10) < 1e-3) == 2


@pytest.mark.parametrize("copies", [1, 2, 10])
def test_without_a_basis_two_probes_tell_a_simple_eigenvalue_from_a_multiple_one(
    copies, key, dtype
):
    values = 0.1 * np.random.default_rng(0).standard_normal(600)
    values[:20] = np.repeat(np.linspace(4, 10, 20 // copies), copies)
    operator = hd.Matrix.from_eigenvalues(jnp.asarray(values, dtype), key)
    held, reset = [], []
    for seed in range(8):
        density = hd.spectral_density(operator, jax.random.key(seed), basis="none", progress=False)
        for rule in density.rules:
            # Of the isolated ones. Another copy is overlooked once in a hundred eigenvalues.
            reset.append(np.sum(rule.nodes[: rule.num_deflated] > 3))
        trace, mass = density.trace(), density.mass(3, np.inf)
        held.append(trace.lower <= values.sum() <= trace.upper)
        held.append(mass.lower <= 20 / 600 + 1e-12 <= mass.upper + 2e-12)
    assert np.mean(reset) > 12 if copies == 1 else np.mean(reset) < 1
    assert np.mean(held) >= 0.8


def test_one_probe_without_a_basis_takes_no_eigenvalue_for_simple(key):
    operator = hd.Matrix.from_eigenvalues(
        jnp.asarray(spectra.ORDINARY["outliers"], jnp.float32), key
    )
    density = hd.spectral_density(operator, key, basis="none", num_probes=1, progress=False)
    assert density.rules[0].num_deflated == 0


def test_more_multiple_eigenvalues_than_steps_are_not_taken_for_simple(key, dtype):
    # The probes cannot show all second copies, so that only the evidence of their moments remains.
    rng = np.random.default_rng(1)
    values = np.concatenate([np.repeat(np.linspace(1, 10, 60), 2), 0.1 * rng.standard_normal(480)])
    operator = hd.Matrix.from_eigenvalues(jnp.asarray(values, dtype), key)
    held, reset = 0, []
    for seed in range(8):
        density = hd.spectral_density(
            operator, jax.random.key(seed), num_steps=20, deflation_steps=110, progress=False
        )
        own = density.rules[0]
        reset.append(np.sum(own.nodes[: own.num_deflated] > 0.9))
        trace = density.trace()
        held += trace.lower <= values.sum() <= trace.upper
    assert np.mean(reset) < 3  # of 60 eigenvalues
    assert held >= 6


def test_the_residual_of_a_probes_node_knows_of_the_coupling_to_the_deflated_space(key):
    with jax.enable_x64():
        values = spectra.ORDINARY["linear"]
        operator = hd.Matrix.from_eigenvalues(jnp.asarray(values), key)
        *_, run = lanczos.iterate(operator, lanczos.init(random_block(key, 0, 1, operator.like), 3))
        probe = lanczos.init(random_block(key, 1, 1, operator.like), 6, run.basis)
        *_, probe = lanczos.iterate(operator, probe)
        t = Tridiagonal(probe.diagonal[0], probe.off_diagonal[0], probe.deflation_coupling[0])
        nodes, vectors = t.eigh()
        basis = np.concatenate([np.asarray(chunk)[0] for chunk in probe.basis.chunks])[:6]
        ritz = vectors.T @ basis
        true = np.linalg.norm(
            np.asarray(operator @ jnp.asarray(ritz)) - nodes[:, None] * ritz, axis=1
        )
    np.testing.assert_allclose(t.residuals(vectors), true, rtol=1e-6)
    without = Tridiagonal(probe.diagonal[0], probe.off_diagonal[0]).residuals(vectors)
    assert (without < 0.97 * true).any()


def test_deflation_removes_the_noise_of_outliers(key, dtype):
    values = np.concatenate([np.geomspace(1, 20, 20), 0.05 * np.arange(1, 1981) ** -0.8])
    operator = hd.Matrix.from_eigenvalues(jnp.asarray(values, dtype), key)
    w1, traces = {}, {}
    for name, settings in {
        "plain": {"deflation_steps": 0, "num_steps": 60, "num_probes": 2},
        "deflated": {"deflation_steps": 60, "num_steps": 30, "num_probes": 2},
    }.items():
        runs = [
            hd.spectral_density(operator, jax.random.key(s), progress=False, **settings)
            for s in range(3)
        ]
        assert {run.num_matvecs for run in runs} == {120}
        w1[name] = np.mean([hd.distance(run, values) for run in runs])
        traces[name] = max(abs(run.trace().value / values.sum() - 1) for run in runs)
        for run in runs:
            assert (
                abs(run.trace().value - values.sum())
                < 4 * run.trace().standard_error + 1e-4 * values.sum()
            )
    assert w1["deflated"] < w1["plain"] / 20
    assert traces["deflated"] < traces["plain"] / 20


def test_the_reference_networks_targets_are_met(shared_data, key):
    exact = np.load(shared_data / "reference" / "mnist_mlp_784_20_10.npz")["eigenvalues"]
    operator = hd.Matrix.from_eigenvalues(jnp.asarray(exact, jnp.float32), key)
    for settings, products, target in (
        ({}, 180, 5e-5),
        ({"deflation_steps": 80, "num_steps": 40, "num_probes": 1}, 120, 6e-5),
    ):
        runs = [
            hd.spectral_density(operator, jax.random.key(s), progress=False, **settings)
            for s in range(6)
        ]
        assert {run.num_matvecs for run in runs} == {products}
        assert np.mean([hd.distance(run, exact) for run in runs]) < target * np.ptp(exact)
        assert np.sqrt(np.mean([(run.trace().value / exact.sum() - 1) ** 2 for run in runs])) < 0.05


# Until an error is reached ------------------------------------------------------------------------


def test_a_tolerance_is_reached_and_it_is_told_where_the_products_went(key, dtype):
    values = spectra.ORDINARY["linear"]
    operator = hd.Matrix.from_eigenvalues(jnp.asarray(np.tile(values, 10), dtype), key)
    loose, tight = (
        hd.spectral_density(
            operator,
            key,
            num_steps=10,
            deflation_steps=10,
            tolerance=t,
            max_matvecs=9999,
            progress=False,
        )
        for t in (0.05, 0.008)
    )
    for density, tolerance in ((loose, 0.05), (tight, 0.008)):
        error, spent = density.description["error"], density.description["spent"]
        assert error["total"] == pytest.approx(
            error["quadrature"] + error["probes"] + error["coupling"] + error["rounding"]
        )
        assert error["total"] <= tolerance
        assert spent["deflation"] + sum(k * m for k, m in spent["probes"]) == density.num_matvecs
        assert hd.distance(density, values) <= 2 * error["total"] * np.ptp(values)
        assert density.description["stopped"] is None
    assert tight.num_matvecs > loose.num_matvecs


def test_steps_added_later_are_the_steps_of_a_longer_run(key, dtype):
    operator = hd.Matrix.from_eigenvalues(jnp.asarray(spectra.ORDINARY["linear"], dtype), key)
    start = random_block(key, 0, 2, operator.like)
    *_, whole = lanczos.iterate(operator, lanczos.init(start, 20))
    *_, state = lanczos.iterate(operator, lanczos.init(start, 7))
    assert lanczos.extend(state, 5) is state
    *_, state = lanczos.iterate(operator, lanczos.extend(state, 20))
    np.testing.assert_array_equal(state.diagonal, whole.diagonal)
    np.testing.assert_array_equal(state.off_diagonal, whole.off_diagonal)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"tolerance": 1e-6, "max_matvecs": 60}, "max_matvecs=60 allows no more products"),
        # The coupling alone is above the tolerance, but the other errors can still be lowered.
        ({"tolerance": 1e-5, "deflation_steps": 3}, "max_matvecs=230 allows no more products"),
    ],
)
def test_a_tolerance_out_of_reach_ends_and_says_so(settings, said, key, caplog):
    operator = hd.Matrix.from_eigenvalues(jnp.asarray(spectra.ORDINARY["linear"], jnp.float32), key)
    settings = {"num_steps": 10, "deflation_steps": 0, **settings}
    density = hd.spectral_density(operator, key, progress=False, **settings)
    assert said in density.description["stopped"]
    assert said in caplog.text
    assert said in str(density)


def test_an_exhausted_space_has_no_quadrature_error():
    t = Tridiagonal(np.array([1.0, 2.0, 3.0]), np.array([0.5, 0.5, 0.0]))
    open_end = t._replace(off_diagonal=np.array([0.5, 0.5, 0.5]))
    assert estimate((gauss_rule(t),), 1000).quadrature == 0
    assert estimate((gauss_rule(open_end),), 1000).quadrature > 0


def test_ctrl_c_during_deflation_leaves_a_plain_probe(key):
    calls = iter(range(100))

    def matvec(v):
        if next(calls) == 9:
            raise KeyboardInterrupt
        return v * jnp.arange(50.0)

    operator = hd.FunctionOperator(matvec, jnp.zeros(50))
    density = hd.spectral_density(
        operator, key, deflation_steps=20, keep_eigenspace=True, progress=False
    )
    assert density.num_matvecs == 9
    (rule,) = density.rules
    assert rule.num_deflated == 0
    assert density.eigenspace.rank == 9
    assert "interrupted after 9 products" in str(density)
