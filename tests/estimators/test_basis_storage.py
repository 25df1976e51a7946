"""Where a basis is kept changes the memory, and nothing else; without one, ghosts are merged."""

import jax
import jax.numpy as jnp
import named_spectra as spectra
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import hessdensity as hd
from hessdensity.krylov import lanczos
from hessdensity.spectra import ghosts
from hessdensity.spectra.quadrature import Tridiagonal, gauss_rule
from hessdensity.vectors.random import random_block


def operator_of(name, key, dtype):
    return hd.Matrix.from_eigenvalues(jnp.asarray(spectra.ALL[name], dtype), key)


def run(operator, key, num_steps, tier, count=2):
    state = lanczos.init(random_block(key, 0, count, operator.like), num_steps, basis_storage=tier)
    for state in lanczos.iterate(operator, state):
        pass
    return state


def tridiagonals(state):
    return [
        Tridiagonal(*parts)
        for parts in zip(
            state.diagonal,
            state.off_diagonal,
            state.deflation_coupling,
            state.rounding_error,
            strict=True,
        )
    ]


def assert_equal_rules(ours, theirs):
    for a, b in zip(ours.rules, theirs.rules, strict=True):
        np.testing.assert_array_equal(a.nodes, b.nodes)
        np.testing.assert_array_equal(a.weights, b.weights)


@pytest.mark.parametrize("name", ["outliers", "eight of 300"])
def test_a_basis_on_the_host_gives_the_density_of_one_on_the_device_bit_for_bit(name, key, dtype):
    operator, settings = (
        operator_of(name, key, dtype),
        {"num_steps": 20, "deflation_steps": 30, "progress": False},
    )
    here = hd.spectral_density(operator, key, basis="device", keep_eigenspace=True, **settings)
    there = hd.spectral_density(operator, key, basis="host", keep_eigenspace=True, **settings)
    assert_equal_rules(here, there)
    np.testing.assert_array_equal(here.eigenspace.vectors, there.eigenspace.vectors)
    assert there.description["basis"] == "host"


def test_on_the_host_are_all_full_chunks_but_the_last(key):
    state = run(operator_of("linear", key, np.float32), key, 3 * lanczos.CHUNK + 1, "host")
    assert [chunk.sharding.memory_kind for chunk in state.basis.chunks] == ["pinned_host"] * 3 + [
        "device"
    ]


def test_a_sharded_basis_on_the_host_keeps_its_shards(key):
    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:4])
    like = jax.ShapeDtypeStruct(
        (4096,), jnp.float32, sharding=NamedSharding(mesh, PartitionSpec("data"))
    )
    values = jax.device_put(jnp.linspace(-1, 1, 4096), like.sharding)
    operator = hd.FunctionOperator(jax.jit(lambda v: v * values), like)
    states = [run(operator, key, 20, tier) for tier in ("device", "host")]
    for chunks in zip(*(state.basis.chunks for state in states), strict=True):
        assert (
            len({shard.data.shape for chunk in chunks for shard in chunk.addressable_shards}) == 1
        )
    np.testing.assert_array_equal(states[0].diagonal, states[1].diagonal)


@pytest.mark.parametrize("name", spectra.ALL)
def test_without_a_basis_nodes_stay_in_the_spectrum_and_moments_are_the_probes_own(
    name, key, dtype
):
    operator, values = operator_of(name, key, dtype), spectra.ALL[name]
    state = run(operator, key, 60, "none")
    assert state.basis is None
    vectors = np.asarray(random_block(key, 0, 2, operator.like), float)
    matrix, scale = hd.dense(operator), np.abs(values).max() or 1
    for probe, vector in zip(tridiagonals(state), vectors, strict=True):
        rule = ghosts.merge_ghosts(probe)
        slack = float(200 * np.finfo(dtype).eps * scale)
        assert values.min() - slack < rule.nodes[0]
        assert rule.nodes[-1] < values.max() + slack
        assert rule.weights.sum() == pytest.approx(1, abs=1e-12)
        power = vector
        for k in range(1, 6):
            power = matrix @ power / scale
            assert rule.weights @ (rule.nodes / scale) ** k == pytest.approx(
                vector @ power, abs=500 * slack / scale
            )


def test_ghosts_share_one_eigenvalues_weight_and_are_merged(key):
    operator, values = operator_of("outliers", key, np.float32), spectra.ALL["outliers"]
    (probe,) = tridiagonals(run(operator, key, 120, "none", count=1))
    plain, merged = gauss_rule(probe), ghosts.merge_ghosts(probe)
    eigenvectors = np.linalg.eigh(hd.dense(operator))[1]
    start = np.asarray(random_block(key, 0, 1, operator.like), float)[0]
    for index in (-1, -2, -3, 0):
        value, mass = np.sort(values)[index], (start @ eigenvectors[:, index]) ** 2
        near, single = (np.abs(rule.nodes - value) < 1e-3 for rule in (plain, merged))
        assert near.sum() > 1
        assert single.sum() == 1
        assert merged.weights[single] == pytest.approx(mass, rel=1e-3)
        assert merged.residuals[single] < 1e-4
    assert (
        np.abs(merged.nodes[:, None] - merged.nodes + np.eye(merged.nodes.size)).min()
        > probe.rounding_error
    )


def test_a_rule_without_ghosts_is_not_changed_by_merging(key):
    (probe, _) = tridiagonals(run(operator_of("linear", key, np.float32), key, 30, "device"))
    plain, merged = gauss_rule(probe), ghosts.merge_ghosts(probe)
    np.testing.assert_allclose(merged.nodes, plain.nodes, rtol=1e-12, atol=0)
    np.testing.assert_allclose(merged.weights, plain.weights, rtol=1e-12, atol=0)


def test_without_a_basis_the_probes_share_the_deflations_steps_and_outliers_weigh_1_over_n(
    key, dtype
):
    operator, values = operator_of("outliers", key, dtype), spectra.ALL["outliers"]
    density = hd.spectral_density(
        operator, key, num_steps=30, num_probes=2, deflation_steps=61, basis="none", progress=False
    )
    assert density.num_matvecs == 2 * (30 + 31)
    assert density.description["spent"] == {"deflation": 0, "probes": [[2, 61]]}
    for rule in density.rules:
        found = rule.nodes[: rule.num_deflated]
        assert np.abs(found - values[:, None]).min(axis=0).max() < 1e-3
        assert {round(float(value), 3) for value in found} >= {10, 7, 4, 2, -3}
        np.testing.assert_array_equal(rule.weights[: rule.num_deflated], 1 / 300)
    plain = hd.spectral_density(
        operator, key, num_steps=61, num_probes=2, deflation_steps=0, basis="none", progress=False
    )
    exact = values.sum()
    assert abs(density.trace().value - exact) < abs(plain.trace().value - exact)


def test_probes_one_after_the_other_give_the_rules_of_probes_together(key, dtype):
    operator = operator_of("outliers", key, dtype)
    settings = {"num_steps": 20, "num_probes": 3, "deflation_steps": 16, "progress": False}
    together = hd.spectral_density(operator, key, **settings)
    for at_once in (1, 2):
        apart = hd.spectral_density(operator, key, probes_at_once=at_once, **settings)
        assert hd.distance(together, apart) < 1e3 * np.finfo(dtype).eps
        assert apart.num_matvecs == together.num_matvecs


def test_a_tolerance_with_probes_in_turns_adds_probes_and_says_why_it_cannot_add_steps(key, caplog):
    operator = operator_of("linear", key, np.float32)
    density = hd.spectral_density(
        operator,
        key,
        num_steps=6,
        num_probes=2,
        deflation_steps=0,
        probes_at_once=1,
        tolerance=1e-4,
        progress=False,
    )
    assert "more steps need the bases of all probes" in density.description["stopped"]
    easy = hd.spectral_density(
        operator,
        key,
        num_steps=80,
        num_probes=2,
        deflation_steps=0,
        probes_at_once=1,
        tolerance=0.012,
        progress=False,
    )
    assert easy.description["stopped"] is None
    assert easy.description["spent"]["probes"] == [[1, 80]] * easy.description["num_probes"]
    assert easy.description["num_probes"] > 2


def test_a_tolerance_without_a_basis_lengthens_the_probes(key):
    operator = operator_of("linear", key, np.float32)
    density = hd.spectral_density(
        operator,
        key,
        num_steps=6,
        num_probes=2,
        deflation_steps=0,
        basis="none",
        tolerance=0.035,
        progress=False,
    )
    assert density.description["stopped"] is None
    assert density.description["num_steps"] > 6


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (
            {"basis": "disk"},
            "basis='disk', expected 'device', 'host', 'none', or None for the first that fits",
        ),
        ({"probes_at_once": 0}, "probes_at_once=0, expected a whole number of at least 1"),
        (
            {"basis": "none", "keep_eigenspace": True},
            "needs a basis: give basis='device' or 'host'",
        ),
    ],
)
def test_a_tier_that_is_none_is_refused(settings, said, key):
    with pytest.raises(ValueError, match=said):
        hd.spectral_density(operator_of("linear", key, np.float32), key, progress=False, **settings)
    with pytest.raises(
        ValueError, match="basis_storage='disk', expected one of 'device', 'host', 'none'"
    ):
        lanczos.init(jnp.ones((1, 3)), 2, basis_storage="disk")


def test_an_operator_that_is_not_symmetric_is_refused_without_a_basis_too(key):
    wrong = jnp.asarray(np.random.default_rng(0).standard_normal((30, 30)))
    operator = hd.FunctionOperator(lambda v: wrong @ v, jnp.zeros(30))
    with pytest.raises(ValueError, match=r"step [1-5]: the operator is not symmetric"):
        run(operator, key, 10, "none", count=1)
