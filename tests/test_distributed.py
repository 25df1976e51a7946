"""The same key gives the same density, wherever the arrays live, and nothing is gathered on the
way."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scenarios
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from scenarios import assert_same

import hessdensity as hd
from hessdensity import distributed
from hessdensity.krylov import lanczos
from hessdensity.vectors.random import random_block


def mesh_of(count, kind=AxisType.Auto, model=1):
    shape, names = (
        ((count,), ("data",)) if model == 1 else ((count // model, model), ("data", "model"))
    )
    return jax.make_mesh(
        shape, names, axis_types=(kind,) * len(names), devices=jax.devices()[:count]
    )


def put(layout, mesh):
    """The weights, placed."""
    if layout == "tensor":
        specs = {"kernel": PartitionSpec(None, "model"), "bias": PartitionSpec()}
        return {
            name: jax.device_put(leaf, NamedSharding(mesh, specs[name]))
            for name, leaf in scenarios.weights().items()
        }
    return distributed.place(
        scenarios.weights(), mesh, min_size={"replicated": 10**9, "fsdp": 8}[layout]
    )


@pytest.fixture(scope="module")
def alone():
    """What one device finds."""
    return {
        deal: scenarios.results(
            scenarios.weights(), scenarios.dealt(deal, 2)[1], more=deal == "uneven"
        )
        for deal in ("even", "uneven")
    }


@pytest.mark.parametrize(
    ("layout", "count", "kind"),
    [
        ("replicated", 8, AxisType.Explicit),
        ("fsdp", 2, AxisType.Explicit),
        ("fsdp", 4, AxisType.Auto),
        ("tensor", 8, AxisType.Auto),
    ],
)
def test_any_number_of_devices_and_any_layout_give_the_density_of_one_on_ragged_host_batches(
    layout, count, kind, alone
):
    mesh = mesh_of(count, kind, model=4 if layout == "tensor" else 1)
    data = scenarios.dealt("uneven", 2)[1]  # of 15 and of 5 examples
    assert_same(scenarios.results(put(layout, mesh), data), alone["uneven"])


def test_so_do_batches_that_the_user_has_placed(alone):
    mesh = mesh_of(8, AxisType.Explicit, model=4)
    data = jax.device_put(scenarios.dealt("even", 2)[1], NamedSharding(mesh, PartitionSpec("data")))
    assert_same(scenarios.results(put("tensor", mesh), data), alone["even"])


def test_eigenspaces_traces_gradients_and_parts_are_those_of_one_device(alone, key):
    params, data = put("fsdp", mesh_of(8)), scenarios.dealt("uneven", 2)[1]
    assert_same(scenarios.results(params, data, more=True), alone["uneven"])
    gradients = [hd.gradient(scenarios.loss, p, data) for p in (params, scenarios.weights())]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), *gradients)
    assert {shard.data.shape for shard in gradients[0]["kernel"].addressable_shards} == {(1, 4)}
    parts = [
        hd.part_densities(
            hd.Hessian(scenarios.loss, p, data), key, 2, num_steps=6, num_probes=1, progress=False
        )
        for p in (params, scenarios.weights())
    ]
    for ours, theirs in zip(parts[0].densities, parts[1].densities, strict=True):
        assert hd.distance(ours, theirs) < 1e-4 * np.abs(theirs.extent).max()


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

    alone, sharded = run(w, x), run(jax.device_put(w, rows), jax.device_put(x, everywhere))
    assert hd.distance(sharded, alone) < 1e-4 * max(map(abs, alone.extent))
    hessian = hd.Hessian(loss, jax.device_put(w, rows), [jax.device_put(x, everywhere)])
    state = lanczos.init(random_block(key, 0, 2, hessian.like), 10)
    for state in lanczos.iterate(hessian, state):
        shards = {
            shard.data.size for chunk in state.basis.chunks for shard in chunk.addressable_shards
        }
        assert shards == {2 * lanczos.CHUNK * 1024}
        assert {shard.data.shape for shard in state.vectors.addressable_shards} == {(2, 1024)}


def test_outliers_keep_the_shards_of_the_parameters(key):
    params, data = put("fsdp", mesh_of(8)), scenarios.dealt("uneven", 2)[1]
    hessian = hd.Hessian(scenarios.loss, params, data)
    found = hd.spectral_density(
        hessian, key, num_steps=8, deflation_steps=20, keep_eigenspace=True, progress=False
    )
    for space in (found.eigenspace, hd.top_eigenspace(hessian, key, 2, progress=False)):
        rank = space.values.size
        assert rank
        assert {shard.data.shape for shard in space.vectors["kernel"].addressable_shards} == {
            (rank, 1, 4)
        }


# The room `distributed` ---------------------------------------------------------------------------


def test_a_mesh_has_the_axis_model_only_where_it_is_longer_than_one():
    assert dict(distributed.make_mesh().shape) == {"data": 8}
    assert dict(distributed.make_mesh(model=4).shape) == {"data": 2, "model": 4}
    assert dict(distributed.make_mesh(data=2, devices=jax.devices()[3:5]).shape) == {"data": 2}
    assert set(distributed.make_mesh(model=2).axis_types) == {AxisType.Auto}


@pytest.mark.parametrize(
    "axes", [{"model": 3}, {"data": 4}, {"data": 4, "model": 3}, {"model": 0}, {"model": 16}]
)
def test_axes_that_are_not_all_devices_are_refused(axes):
    with pytest.raises(ValueError, match="but there are 8 devices; expected data x model of them"):
        distributed.make_mesh(**axes)


def test_large_leaves_are_split_along_their_longest_dimension_that_the_axis_divides():
    mesh = distributed.make_mesh()
    shapes = {
        "a": (16, 64),
        "b": (24, 7),
        "c": (9, 11),
        "d": (8,),
        "e": (),
        "f": (4, 3, 16, 16),
        "g": (0, 8),
    }
    expected = {
        "a": (16, 8),
        "b": (3, 7),
        "c": (9, 11),
        "d": (8,),
        "e": (),
        "f": (4, 3, 2, 16),
        "g": (0, 8),
    }
    values = {
        name: np.arange(np.prod(shape, dtype=int), dtype=np.float32).reshape(shape)
        for name, shape in shapes.items()
    }
    for tree in (values, jax.tree.map(jnp.asarray, values)):
        placed = distributed.place(tree, mesh, min_size=50)
        assert {
            name: leaf.addressable_shards[0].data.shape for name, leaf in placed.items()
        } == expected
        jax.tree.map(np.testing.assert_array_equal, placed, values)
    described = distributed.place(
        jax.eval_shape(lambda: jax.tree.map(jnp.asarray, values)), mesh, min_size=50
    )
    assert {
        name: leaf.sharding.shard_shape(leaf.shape) for name, leaf in described.items()
    } == expected
    with pytest.raises(ValueError, match=r"axis='model', but the mesh has the axes \('data',\)"):
        distributed.place(values, mesh, axis="model")


def test_a_watched_loader_is_the_loader():
    for data in (["a", "b"], lambda: iter("ab"), "ab"):
        watched = distributed.watch(data, timeout=600)
        assert list(watched) == list(watched) == ["a", "b"]


def test_a_coordinator_that_is_not_there_is_named():
    with pytest.raises(
        RuntimeError, match=r"process 1 found no coordinator at 127.0.0.1:1 within 1 s.*process 0"
    ):
        distributed.start("127.0.0.1:1", 2, 1, connect_timeout=1)
    with pytest.raises(ValueError, match=r"coordinator_address='here', expected 'host:port'"):
        distributed.start("here", 2, 1)


def test_starting_too_late_or_by_halves_is_refused_with_the_repair():
    with pytest.raises(ValueError, match="start: num_processes and process_id missing"):
        distributed.start("127.0.0.1:1234")
    with pytest.raises(RuntimeError, match=r"JAX has been used already.*first, before any array"):
        distributed.start()
