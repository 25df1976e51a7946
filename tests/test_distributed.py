"""The same key gives the same density, wherever the arrays live."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from problems import mlp

import hessdensity as hd
from hessdensity import lanczos


def mesh_of(count, kind=AxisType.Auto):
    return jax.make_mesh((count,), ("data",), axis_types=(kind,), devices=jax.devices()[:count])


def density(params, batches, key, **where):
    loss = mlp(np.float32)[0]
    return hd.spectral_density(hd.Hessian(loss, params, batches, **where), key, num_steps=20, progress=False)


@pytest.fixture
def alone(key):
    _, params, batch = mlp(np.float32)
    return density(params, [batch], key)


def assert_same(ours, theirs):
    """To rounding relative to the norm of T: nodes, and moments up to 2m - 1 in units of the largest node."""
    scale = max(map(abs, ours.extent))
    for a, b in zip(ours.rules, theirs.rules, strict=True):
        assert np.abs(a.nodes[-1] - b.nodes[-1]) < 1e-5 * scale
        for k in range(1, 8):
            assert a.weights @ (a.nodes / scale) ** k == pytest.approx(b.weights @ (b.nodes / scale) ** k, abs=1e-5)
    assert hd.distance(ours, theirs) < 1e-4 * scale


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("count", [4, 8])
def test_data_sharded_batches_and_replicated_params_give_the_density_of_one_device(count, kind, key, alone):
    _, params, batch = mlp(np.float32)
    mesh = mesh_of(count, kind)
    replicated = jax.device_put(params, NamedSharding(mesh, PartitionSpec()))
    sharded = jax.device_put(batch, NamedSharding(mesh, PartitionSpec("data")))
    assert_same(density(replicated, [sharded], key), alone)


def test_host_batches_go_to_the_parameters_mesh(key, alone):
    _, params, batch = mlp(np.float32)
    replicated = jax.device_put(params, NamedSharding(mesh_of(4), PartitionSpec()))
    assert_same(density(replicated, [jax.tree.map(np.asarray, batch)], key), alone)


def test_sharded_parameters_keep_their_shards_in_every_vector(key):
    mesh = mesh_of(4)
    rows = NamedSharding(mesh, PartitionSpec("data"))
    everywhere = NamedSharding(mesh, PartitionSpec())
    x = jnp.asarray(np.random.default_rng(0).standard_normal((40, 4096)), jnp.float32)
    w = jnp.asarray(np.random.default_rng(1).standard_normal(4096), jnp.float32) / 64

    def loss(w, batch):
        return jnp.mean(jnp.log1p((batch @ w) ** 2))

    def run(w, batch):
        return hd.spectral_density(hd.Hessian(loss, w, [batch]), key, num_steps=12, progress=False)

    alone = run(w, x)
    assert_same(run(jax.device_put(w, rows), jax.device_put(x, everywhere)), alone)
    hessian = hd.Hessian(loss, jax.device_put(w, rows), [jax.device_put(x, everywhere)])
    state = lanczos.init(hd.slq._trees.random_block(key, 0, 2, hessian.like), 10)
    for state in lanczos.iterate(hessian, state):
        shards = {shard.data.size for chunk in state.basis for shard in chunk.addressable_shards}
        assert shards == {2 * lanczos.CHUNK * 1024}
        assert {shard.data.shape for shard in state.vectors.addressable_shards} == {(2, 1024)}
