"""The runs of all layers in one are, bit for bit, the runs of each layer alone."""

import json
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import hessdensity as hd
from hessdensity.layers.blocks import of_group
from hessdensity.vectors import trees

QUIET = {"progress": False}


def loss(params, batch):
    x, y = batch
    hidden = jnp.tanh(x @ params["a"] + params["b"][None])
    return jnp.mean((params["scale"] * (hidden @ params["c"]) - y) ** 2)


def weights():
    rng = np.random.default_rng(0)
    shapes = {"a": (4, 5), "b": (5,), "c": (5,), "scale": ()}
    return {
        name: jnp.asarray(rng.standard_normal(shape), jnp.float32) for name, shape in shapes.items()
    }


def data(scale=1.0):
    rng = np.random.default_rng(1)
    x, y = rng.standard_normal((24, 4)), scale * rng.standard_normal(24)
    return [(x.astype(np.float32), y.astype(np.float32))]


class Interrupted(hd.BlockDiagonal):
    """A block-diagonal operator that raises ``error`` in its pass after ``limit``."""

    def __init__(self, hessian, groups=None, limit=None, error=KeyboardInterrupt):
        super().__init__(hessian, groups)
        self.limit, self.error, self.num_passes = limit, error, 0

    def multiply(self, parts, needed=None):
        if self.num_passes == self.limit:
            raise self.error
        self.num_passes += 1
        return super().multiply(parts, needed)


@pytest.fixture(scope="module")
def hessian():
    return hd.Hessian(loss, weights(), data())


GROUPS = {"a": "a", "vectors": lambda path: path in ("b", "c"), "scale": "scale"}
"""Of 20, of 10 and of one dimension."""

DENSITIES = {
    "block": {"block_size": 2, "num_steps": 4},
    "block on the host": {"block_size": 2, "num_steps": 4, "basis": "host"},
    "probes": {"deflation_steps": 6, "num_probes": 2, "num_steps": 5},
    "probes without a basis": {"num_probes": 2, "num_steps": 5, "basis": "none"},
    "to a tolerance": {"block_size": 2, "num_steps": 2, "tolerance": 1e-2, "max_matvecs": 12},
}


def numbers(density):
    return [leaf for rule in density.rules for leaf in (rule.nodes, rule.weights)]


def assert_equal(ours, theirs):
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_array_equal(a, b)


def assert_same(ours, theirs, group):
    """Bit for bit, save for the group of one dimension.

    A block of one vector is filled up to the two of the others, so that the program is another.
    """
    if group == "scale":
        for a, b in zip(ours, theirs, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6)
    else:
        assert_equal(ours, theirs)


def alone(hessian, name, groups=GROUPS):
    return of_group(hessian, hd.BlockDiagonal(hessian, groups).groups[name])


# Densities ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", DENSITIES)
def test_a_density_is_that_of_the_layer_alone(name, hessian, key):
    found = hd.layer_densities(hessian, key, GROUPS, **DENSITIES[name], **QUIET)
    assert list(found) == list(GROUPS)
    for group, density in found.items():
        single = hd.spectral_density(alone(hessian, group), key, **DENSITIES[name], **QUIET)
        assert_same(numbers(density), numbers(single), group)
        assert density.dimension == single.dimension
        assert density.num_matvecs == single.num_matvecs
        assert density.description["stopped"] == single.description["stopped"]
    assert found["scale"].trace().value == pytest.approx(
        hd.dense(hd.layer_hessian(hessian, "scale")).item(), rel=1e-5
    )


def test_the_description_names_the_group_and_its_hessian(hessian, key):
    found = hd.layer_densities(hessian, key, GROUPS, num_steps=2, block_size=2, **QUIET)
    described = json.loads(json.dumps(found["vectors"].description))
    assert described["computation"] == "layer_densities"
    assert described["group"] == "vectors"
    assert described["operator"]["kind"] == "Hessian of 'vectors'"
    assert described["operator"]["groups"]["vectors"] == ["b", "c"]


def test_groups_are_given_once(hessian, key):
    blocks = hd.BlockDiagonal(hessian, GROUPS)
    settings = {"num_steps": 2, "block_size": 2, **QUIET}
    ours, theirs = (
        hd.layer_densities(*arguments, **settings)
        for arguments in ((blocks, key), (hessian, key, GROUPS))
    )
    for name in GROUPS:
        assert_equal(numbers(ours[name]), numbers(theirs[name]))
    for compute in (hd.layer_densities, lambda *a: hd.layer_eigenspaces(*a[:2], 2, a[2])):
        with pytest.raises(
            ValueError, match=r"groups is given, but hessian is an hd.BlockDiagonal"
        ):
            compute(blocks, key, GROUPS)


@pytest.mark.parametrize(
    ("arguments", "error", "said"),
    [
        ((hd.Matrix(jnp.eye(2)), jax.random.key(0)), TypeError, "hessian is a Matrix; expected hd"),
        ((None, 3), TypeError, "key is a int"),
    ],
)
def test_what_is_not_a_hessian_or_a_key_is_refused(arguments, error, said, hessian):
    own = [hessian if arguments[0] is None else arguments[0], arguments[1]]
    with pytest.raises(error, match=said):
        hd.layer_densities(*own, **QUIET)
    with pytest.raises(error, match=said):
        hd.layer_eigenspaces(*own, 2, **QUIET)


# Eigenspaces --------------------------------------------------------------------------------------


def pairs(space):
    return [space.values, space.residuals, trees.ravel(space.vectors)]


@pytest.mark.parametrize("which", ["LM", "SA"])
def test_an_eigenspace_is_that_of_the_layer_alone(which, hessian, key):
    settings = {"which": which, "block_size": 2, **QUIET}
    found = hd.layer_eigenspaces(hessian, key, 3, GROUPS, **settings)
    for group, space in found.items():
        own = alone(hessian, group)
        rank = min(3, trees.size(own.like))  # a group of one dimension has one pair
        single = hd.top_eigenspace(own, key, rank, **settings)
        assert_same(pairs(space), pairs(single), group)
        assert (space.rank, space.num_matvecs) == (rank, single.num_matvecs)
        exact = np.linalg.eigvalsh(hd.dense(own))
        order = np.argsort(-np.abs(exact) if which == "LM" else exact)[:rank]
        wanted = np.sort(exact[order])[::-1]
        np.testing.assert_allclose(space.values, wanted, atol=1e-5 * np.abs(exact).max())


def test_a_rank_above_all_dimensions_gives_all_pairs(hessian, key):
    found = hd.layer_eigenspaces(hessian, key, 12, GROUPS, block_size=2, **QUIET)
    assert {name: space.rank for name, space in found.items()} == {
        "a": 12,
        "vectors": 10,
        "scale": 1,
    }
    assert found["vectors"].converged.all()
    exact = np.linalg.eigvalsh(hd.dense(alone(hessian, "vectors")))[::-1]
    np.testing.assert_allclose(found["vectors"].values, exact, atol=1e-5 * np.abs(exact).max())


def test_pairs_that_are_still_open_are_logged_by_layer(hessian, key, caplog):
    with caplog.at_level(logging.WARNING, logger="hessdensity"):
        found = hd.layer_eigenspaces(
            hessian, key, 5, ["a", "[bcs]*"], block_size=2, max_matvecs=8, **QUIET
        )
    assert found["a"].description["stopped"] == "max_matvecs=8 reached"
    assert any("layer_eigenspaces of 'a': max_matvecs=8" in r.message for r in caplog.records)


# Runs that are stopped ----------------------------------------------------------------------------

RUNS = {
    "densities": (
        lambda operator, key, **options: hd.layer_densities(
            operator, key, deflation_steps=4, num_probes=2, num_steps=4, **QUIET, **options
        ),
        numbers,
    ),
    "eigenspaces": (
        lambda operator, key, **options: hd.layer_eigenspaces(
            operator, key, 3, block_size=2, **QUIET, **options
        ),
        pairs,
    ),
}


@pytest.mark.parametrize("name", RUNS)
def test_a_run_stopped_at_any_step_is_resumed_bit_for_bit(name, hessian, key, tmp_path):
    compute, numbers_of = RUNS[name]
    counted = Interrupted(hessian, GROUPS)
    whole = compute(counted, key)
    rng = np.random.default_rng(0)
    for number in range(3):
        folder = tmp_path / f"run{number}"
        limit = int(rng.integers(1, counted.num_passes))
        first = Interrupted(hessian, GROUPS, limit)
        part = compute(first, key, checkpoint=folder)
        assert all("interrupted" in each.description["stopped"] for each in part.values())
        rest = Interrupted(hessian, GROUPS)
        again = compute(rest, key, checkpoint=folder)
        assert rest.num_passes <= counted.num_passes - limit + 1
        for group in GROUPS:
            assert_equal(numbers_of(again[group]), numbers_of(whole[group]))
            assert again[group].num_matvecs == whole[group].num_matvecs
    # A finished run is read, and nothing is multiplied but one product to see the data.
    finished = Interrupted(hessian, GROUPS)
    read = compute(finished, key, checkpoint=folder)
    assert finished.num_passes <= 1
    for group in GROUPS:
        assert_equal(numbers_of(read[group]), numbers_of(whole[group]))


@pytest.mark.parametrize("name", RUNS)
def test_other_groups_keys_or_data_do_not_resume_a_run(name, hessian, key, tmp_path):
    compute, _ = RUNS[name]
    folder = tmp_path / "run"
    compute(Interrupted(hessian, GROUPS, 3), key, checkpoint=folder)
    with pytest.raises(ValueError, match=r"belongs to another computation: settings.key"):
        compute(hd.BlockDiagonal(hessian, GROUPS), jax.random.key(1), checkpoint=folder)
    with pytest.raises(ValueError, match=r"belongs to another computation: .*operator.groups"):
        compute(
            hd.BlockDiagonal(hessian, {**GROUPS, "a": "a"} | {"vectors": "b", "c": "c"}),
            key,
            checkpoint=folder,
        )
    other = hd.Hessian(loss, weights(), data(scale=1.01))
    with pytest.raises(ValueError, match=r"belongs to another computation: .*loss"):
        compute(hd.BlockDiagonal(other, GROUPS), key, checkpoint=folder)


@pytest.mark.parametrize("name", RUNS)
def test_a_product_that_is_not_finite_raises_with_the_partial_answers(name, hessian, key):
    compute, _ = RUNS[name]
    error = FloatingPointError("a Hessian-vector product is not finite in batch 0")
    with pytest.raises(hd.NonFiniteProductError, match="not finite in batch 0") as caught:
        compute(Interrupted(hessian, GROUPS, 3, error), key)
    assert set(caught.value.partial) == set(GROUPS)
    assert all(each.num_matvecs > 0 for each in caught.value.partial.values())
    with pytest.raises(hd.NonFiniteProductError) as caught:
        compute(Interrupted(hessian, GROUPS, 0, error), key)
    assert caught.value.partial is None


def test_data_with_nan_name_the_batch(key):
    (x, y), *_ = data()
    x[3, 1] = np.nan
    hessian = hd.Hessian(loss, weights(), [*data(), (x, y)])
    with pytest.raises(hd.NonFiniteProductError, match="batch 1"):
        hd.layer_densities(hessian, key, GROUPS, num_steps=2, block_size=2, **QUIET)


# Many devices -------------------------------------------------------------------------------------


def test_four_devices_give_what_one_gives(hessian, key):
    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:4])
    everywhere = NamedSharding(mesh, PartitionSpec())
    params = jax.device_put(weights(), everywhere)
    params["a"] = jax.device_put(params["a"], NamedSharding(mesh, PartitionSpec("data")))
    spread = hd.Hessian(loss, params, data())
    settings = {"block_size": 2, "num_steps": 4, **QUIET}
    ours, theirs = (hd.layer_densities(each, key, GROUPS, **settings) for each in (spread, hessian))
    for name in GROUPS:
        scale = np.abs(theirs[name].extent).max()
        assert hd.distance(ours[name], theirs[name]) < 1e-4 * scale
    spaces = [
        hd.layer_eigenspaces(each, key, 2, GROUPS, block_size=2, **QUIET)
        for each in (spread, hessian)
    ]
    for name in GROUPS:
        one, other = (each[name].values for each in spaces)
        np.testing.assert_allclose(one, other, atol=1e-5 * np.abs(other).max())
    shards = spaces[0]["a"].vectors["a"].addressable_shards
    assert {shard.data.shape for shard in shards} == {(2, 1, 5)}
