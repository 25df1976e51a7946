"""A block in which every start is a probe that the others deflate: theorem and estimates."""

import jax
import jax.numpy as jnp
import named_spectra as spectra
import numpy as np
import pytest

import hessdensity as hd
from hessdensity.spectra import leave_one_out
from hessdensity.spectra.leave_one_out import BlockKrylov


def block_krylov(values, count, num_steps, seed=0):
    """A block Krylov run on a diagonal matrix in float64, and its basis as rows."""
    rng = np.random.default_rng(seed)
    starts = rng.standard_normal((values.size, count))
    basis, factors = np.linalg.qr(starts)
    for _ in range(num_steps):
        new = values[:, None] * basis[:, -count:]
        for _ in range(3):
            new = new - basis @ (basis.T @ new)
        basis = np.concatenate([basis, np.linalg.qr(new)[0]], axis=1)
    products = basis.T @ (values[:, None] * basis[:, : count * num_steps])
    size = count * num_steps
    padded = np.concatenate([factors, np.zeros((size - count, count))])
    error = 1e-13 * np.abs(values).max()
    return BlockKrylov(products[:size], products[size:], padded, num_steps, error), basis[:, :size]


@pytest.mark.parametrize("name", ["linear", "geometric", "outliers"])
@pytest.mark.parametrize(("count", "num_steps"), [(2, 6), (3, 5), (5, 4)])
def test_deflation_moves_the_cumulative_by_b_minus_1_and_w1_by_the_nuclear_norm(
    name, count, num_steps
):
    values = np.sort(spectra.ORDINARY[name])
    block, basis = block_krylov(values, count, num_steps)
    for index, rule in enumerate(leave_one_out.leave_one_out(block, values.size)):
        multiple = leave_one_out.multiple_eigenspaces(block)
        deflated = basis @ leave_one_out.krylov_of_others(block, index, multiple)
        complement = np.linalg.svd(deflated.T)[2][deflated.shape[1] :]
        inside, outside = (
            np.linalg.eigvalsh(q @ (values[:, None] * q.T)) for q in (deflated.T, complement)
        )
        np.testing.assert_allclose(rule.nodes[: rule.num_deflated], inside, atol=1e-10)
        split = np.sort(np.concatenate([inside, outside]))
        middles = (split[1:] + split[:-1]) / 2
        middles = middles[np.abs(middles[:, None] - values).min(axis=1) > 1e-9]
        moved = np.searchsorted(split, middles) - np.searchsorted(values, middles)
        assert np.abs(moved).max() <= count - 1
        assert np.abs(split - values).sum() <= 2 * rule.coupling * (1 + 1e-9) + 1e-9


@pytest.mark.parametrize("name", ["linear", "outliers", "eight of 300", "three values"])
def test_the_intervals_of_a_block_hold_the_truth(name, dtype):
    values = np.sort(spectra.ALL[name])
    operator = hd.Matrix.from_eigenvalues(jnp.asarray(values, dtype), jax.random.key(0))
    x = np.linspace(values[0], values[-1], 23) + 0.01
    truth = np.searchsorted(values, x, side="right") / values.size
    held = []
    for seed in range(8):
        density = hd.spectral_density(
            operator, jax.random.key(seed), block_size=3, num_steps=8, progress=False
        )
        assert all(rule.weights.sum() == pytest.approx(1) for rule in density.rules)
        trace, share = density.trace(), density.cdf(x)
        held.append(trace.lower - 1e-4 <= values.sum() <= trace.upper + 1e-4)
        held.append(np.mean((share.lower <= truth) & (truth <= share.upper)))
    assert np.mean(held) >= 0.9


def test_a_multiple_eigenvalue_is_not_lost_to_the_other_starts():
    # Rounding brings the probe's own copies into the Krylov space of the others.
    rng = np.random.default_rng(0)
    values = np.concatenate([np.full(12, 10.0), np.full(7, 5.0), 0.1 * rng.standard_normal(581)])
    operator = hd.Matrix.from_eigenvalues(jnp.asarray(values, jnp.float32), jax.random.key(0))
    traces = [
        hd.spectral_density(
            operator, jax.random.key(seed), block_size=4, num_steps=30, progress=False
        ).trace()
        for seed in range(8)
    ]
    assert np.mean([t.lower <= values.sum() <= t.upper for t in traces]) >= 0.75
    assert abs(np.mean([t.value for t in traces]) / values.sum() - 1) < 0.15


def test_a_block_on_the_host_is_the_block_on_the_device_and_without_a_basis_it_is_refused(key):
    values = spectra.ORDINARY["outliers"]
    operator = hd.Matrix.from_eigenvalues(jnp.asarray(values, jnp.float32), key)
    settings = {"block_size": 3, "num_steps": 9, "progress": False}
    device, host = (
        hd.spectral_density(operator, key, basis=basis, **settings) for basis in ("device", "host")
    )
    np.testing.assert_array_equal(device.nodes, host.nodes)
    np.testing.assert_array_equal(device.weights, host.weights)
    assert device.num_matvecs == 27
    with pytest.raises(ValueError, match="a block needs its basis"):
        hd.spectral_density(operator, key, basis="none", **settings)
    with pytest.raises(ValueError, match="num_probes=4 and block_size=3"):
        hd.spectral_density(operator, key, num_probes=4, **settings)


def test_a_finished_block_is_read_from_its_checkpoint(key, tmp_path):
    values = spectra.ORDINARY["outliers"]
    operator = hd.Matrix.from_eigenvalues(jnp.asarray(values, jnp.float32), key)
    settings = {"block_size": 3, "num_steps": 6, "progress": False, "checkpoint": tmp_path / "run"}
    first, again = (hd.spectral_density(operator, key, **settings) for _ in range(2))
    np.testing.assert_array_equal(first.nodes, again.nodes)
    np.testing.assert_array_equal(first.weights, again.weights)
