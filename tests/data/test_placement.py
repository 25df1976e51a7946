"""A batch reaches the devices in pieces that hold each example once, and the sums over them are
those of the batch."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scenarios
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from problems import dense_hessian, mlp

import hessdensity as hd
from hessdensity import distributed
from hessdensity.adapters.linen import from_linen
from hessdensity.data import placement
from hessdensity.data import processes as _agreement
from hessdensity.data.passes import Passes
from hessdensity.data.placement import BatchPlacement
from hessdensity.vectors import trees
from hessdensity.vectors.random import random_block

LOSS, PARAMS, BATCH = mlp(np.float32)
EXACT = dense_hessian(LOSS, PARAMS, BATCH)
HOST = jax.tree.map(np.asarray, BATCH)


def on_mesh(tree, count=8, **axes):
    return distributed.place(
        tree, distributed.make_mesh(devices=jax.devices()[:count], **axes), min_size=10**9
    )


def assert_exact(hessian):
    """A product with the Hessian of all examples."""
    vector = np.random.default_rng(2).standard_normal(55)
    block = trees.unravel(vector[None], hessian.like)
    np.testing.assert_allclose(trees.ravel(hessian @ block)[0], EXACT @ vector, atol=1e-4)


def pieces(batches, *, count=8, **settings):
    """(number of the batch, piece), all of them."""
    return list(
        Passes(batches, BatchPlacement(on_mesh(np.zeros(1, np.float32), count), "data", **settings))
    )


def rows_per_device(piece):
    return max(shard.data.shape[0] for shard in jax.tree.leaves(piece)[0].addressable_shards)


# Host batches -------------------------------------------------------------------------------------


@pytest.mark.parametrize("microbatch", [None, 1, 4, 9, 16, 100])
@pytest.mark.parametrize("lengths", [(16, 16, 5), (15, 3), (1,), (37, 0, 40), (0, 5)])
@pytest.mark.parametrize("count", [2, 3, 8])
def test_every_example_is_in_one_piece_and_no_device_has_more_than_its_share(
    count, lengths, microbatch
):
    ends = np.cumsum([0, *lengths])
    batches = [np.arange(ends[i], ends[i + 1], dtype=np.float32) for i in range(len(lengths))]
    found = pieces(batches, count=count, microbatch=microbatch)
    for index, batch in enumerate(batches):
        seen = [np.asarray(piece) for number, piece in found if number == index]
        np.testing.assert_array_equal(np.sort(np.concatenate(seen)), batch)
    assert {number for number, _ in found} == set(range(len(lengths)))
    whole = [length // count or length for length in lengths if length]
    share = max(whole[0], *(length // count for length in lengths))
    share = share if microbatch is None else max(microbatch // count, 1)
    assert max(rows_per_device(piece) for _, piece in found) <= share


@pytest.mark.parametrize(
    ("size", "kind"), [(63, AxisType.Auto), (30, AxisType.Explicit), (7, AxisType.Auto)]
)
def test_batches_that_the_mesh_does_not_divide_give_the_hessian_of_them_all(size, kind):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(kind,))
    params = jax.device_put(PARAMS, NamedSharding(mesh, PartitionSpec()))
    hessian = hd.Hessian(LOSS, params, hd.batches(HOST, size))
    assert_exact(hessian)
    plain = hd.Hessian(LOSS, PARAMS, hd.batches(HOST, size))
    assert_exact(plain)
    ours, theirs = hessian.describe(), plain.describe()
    np.testing.assert_allclose(ours.pop("batch_losses"), theirs.pop("batch_losses"), rtol=1e-6)
    assert ours.pop("loss") == pytest.approx(theirs.pop("loss"), rel=1e-6)
    assert ours == theirs


def test_rows_are_split_over_the_data_axis_alone():
    params = on_mesh(PARAMS, data=2, model=4)
    ((_, (x, y)),) = hd.Hessian(LOSS, params, [HOST]).risk.passes
    assert x.sharding.is_equivalent_to(NamedSharding(x.sharding.mesh, PartitionSpec("data")), 2)
    assert {shard.data.shape for shard in y.addressable_shards} == {(32,)}
    ((_, (x, _)),) = hd.Hessian(LOSS, params, [HOST], data_axis="model").risk.passes
    assert {shard.data.shape for shard in x.addressable_shards} == {(16, 6)}
    for axis in (None, "rows"):
        ((_, (x, _)),) = hd.Hessian(LOSS, params, [HOST], data_axis=axis).risk.passes
        assert x.sharding.is_fully_replicated


def test_a_scalar_of_a_batch_goes_with_each_of_its_pieces():
    found = pieces([(np.arange(11.0), 3.0)])
    assert [(x.shape[0], float(scalar)) for _, (x, scalar) in found] == [
        (8, 3),
        (1, 3),
        (1, 3),
        (1, 3),
    ]


def test_leaves_of_different_lengths_are_not_cut():
    ((_, (x, y)),) = pieces([(np.zeros((16, 2)), np.zeros(5))])
    assert x.sharding.is_fully_replicated
    assert y.shape == (5,)
    with pytest.raises(
        ValueError, match=r"microbatch=4, but batch 0 cannot be cut.*'0': 16, '1': 5"
    ):
        pieces([(np.zeros((16, 2)), np.zeros(5))], microbatch=4)


# Pieces that the user asks for --------------------------------------------------------------------


@pytest.mark.parametrize("microbatch", [7, 20])
def test_a_microbatch_changes_nothing_but_rounding(microbatch):
    hessian = hd.Hessian(LOSS, PARAMS, hd.batches(HOST, 30), microbatch=microbatch)
    assert_exact(hessian)
    assert [len(y) for _, (_, y) in hessian.restrict("first/*").risk.passes] == [
        len(y) for _, (_, y) in hessian.risk.passes
    ]
    assert [len(y) for _, (_, y) in hessian.risk.passes] == {
        7: [7] * 4 + [2] + [7] * 4 + [2, 4],
        20: [20, 10, 20, 10, 4],
    }[microbatch]
    assert hessian.describe()["num_examples"] == 64
    assert len(hessian.describe()["batch_losses"]) == 3


def test_parts_and_the_noise_of_gradients_are_those_of_batches_and_not_of_pieces(key):
    loss, params, batch = scenarios.loss, scenarios.weights(), scenarios.dealt("large", 1)[1][0]
    batches = hd.batches(batch, 14)
    whole, cut = (hd.Hessian(loss, params, batches, microbatch=size) for size in (None, 4))
    block = random_block(key, 0, 4, whole.like)
    (ours, counts), (theirs, expected) = (
        cut.multiply_parts(block, 2),
        whole.multiply_parts(block, 2),
    )
    assert counts == expected == [36, 28]
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-5), ours, theirs)
    space = hd.top_eigenspace(whole, key, 2, progress=False)
    errors = [hd.eigenvalue_data_error(hessian, space) for hessian in (cut, whole)]
    np.testing.assert_allclose(errors[0].parts, errors[1].parts, atol=1e-4)
    pair = [
        hd.gradient_covariance(loss, placed, batches, space) for placed in (on_mesh(params), params)
    ]
    np.testing.assert_allclose(pair[0].covariance, pair[1].covariance, rtol=1e-3)
    np.testing.assert_allclose(pair[0].total_variance, pair[1].total_variance, rtol=1e-4)


def test_a_piece_is_placed_when_the_one_before_it_is_handed_over():
    placed = []

    class Spy(BatchPlacement):
        def _put(self, batch, sharding):
            placed.append(len(batch))
            return super()._put(batch, sharding)

    ahead = [len(placed) for _ in Passes([np.zeros(10), np.zeros(4)], Spy(microbatch=4))]
    assert ahead == [2, 3, 4, 4]
    assert placed == [4, 4, 2, 4]


@pytest.mark.parametrize("microbatch", [0, -1, 2.5, "8"])
def test_a_microbatch_that_is_no_number_is_refused(microbatch):
    with pytest.raises(
        ValueError, match=r"microbatch=.*expected a whole number of at least 1, or None"
    ):
        hd.Hessian(LOSS, PARAMS, [HOST], microbatch=microbatch)


# Batches that the user has placed -----------------------------------------------------------------


@pytest.mark.parametrize("spec", [PartitionSpec("data"), PartitionSpec()])
def test_placed_batches_are_cut_where_they_are(spec):
    params = on_mesh(PARAMS)
    split = NamedSharding(params["unused"].sharding.mesh, spec)
    placed = (
        jax.device_put(HOST[0], split),
        jax.device_put(HOST[1], NamedSharding(split.mesh, PartitionSpec())),
    )
    hessian = hd.Hessian(LOSS, params, [placed], microbatch=24)
    found = [x for _, (x, _) in hessian.risk.passes]
    assert [len(x) for x in found] == ([24, 24, 16])
    assert all(x.sharding.is_equivalent_to(split, 2) for x in found)
    assert_exact(hessian)


def test_cutting_a_placed_batch_moves_no_rows():
    split = NamedSharding(distributed.make_mesh(), PartitionSpec("data"))
    program = placement._cut_rows(split, 8, 3).lower(
        jax.ShapeDtypeStruct((64, 6), np.float32, sharding=split), 0
    )
    text = program.compile().as_text()
    assert not [
        name
        for name in ("all-gather", "all-to-all", "collective-permute", "all-reduce")
        if name in text
    ]


def test_params_and_a_batch_on_different_devices_are_refused_by_name():
    near, far = jax.device_put(PARAMS, jax.devices()[0]), jax.device_put(HOST, jax.devices()[1])
    with pytest.raises(
        ValueError, match=r"batch 0, leaf '0' is on cpu:1, but the params.*on cpu:0.*NumPy"
    ):
        hd.Hessian(LOSS, near, [far]) @ PARAMS
    with pytest.raises(
        ValueError, match=r"is on cpu:1, but .* are on 8 devices \(cpu:0 to cpu:7\)"
    ):
        hd.Hessian(LOSS, on_mesh(PARAMS), [far]) @ PARAMS
    with pytest.raises(ValueError, match="leaf '1' is on cpu:1"):
        hd.Hessian(LOSS, PARAMS, [(jax.device_put(HOST[0], jax.devices()[0]), far[1])]) @ PARAMS
    with pytest.raises(ValueError, match=r"params: some leaves are on cpu:0, others on 8 devices"):
        hd.Hessian(LOSS, {**on_mesh(PARAMS), "first": near["first"]}, [HOST])


def test_arrays_that_only_jax_has_placed_go_to_the_params():
    ((_, (x, _)),) = hd.Hessian(LOSS, on_mesh(PARAMS), [BATCH]).risk.passes
    assert {shard.data.shape for shard in x.addressable_shards} == {(8, 6)}
    device = jax.devices()[3]
    ((_, (x, _)),) = hd.Hessian(LOSS, jax.device_put(PARAMS, device), [BATCH]).risk.passes
    assert x.devices() == {device}


# Losses whose batches must not be cut -------------------------------------------------------------


def centered(w, batch):
    """Logits with the batch's mean taken off them: examples depend on each other."""
    logits = batch @ w
    return jnp.mean((logits - logits.mean()) ** 4)


centered.whole_batch = True


def test_a_batch_that_must_not_be_cut_is_split_over_the_mesh_or_refused():
    x = np.random.default_rng(0).standard_normal((24, 5)).astype(np.float32)
    w = np.ones(5, np.float32)
    exact = dense_hessian(centered, jnp.asarray(w), x[:16])
    np.testing.assert_allclose(
        hd.dense(hd.Hessian(centered, on_mesh(w), [x[:16]])), exact, rtol=1e-4
    )
    odd = hd.Hessian(functools.partial(centered), on_mesh(w), [x[:16], x[16:21]])
    with pytest.raises(
        ValueError,
        match=r"batch 1 has 5 examples, which the 8 devices of the mesh axis 'data' do not",
    ):
        odd @ w
    whole = hd.Hessian(centered, on_mesh(w), [x[:15]], data_axis=None)
    np.testing.assert_allclose(
        hd.dense(whole), dense_hessian(centered, jnp.asarray(w), x[:15]), rtol=1e-4
    )
    with pytest.raises(
        ValueError, match=r"microbatch=4, but the loss says that its batches must not be cut"
    ):
        hd.Hessian(centered, w, [x], microbatch=4)


def test_the_adapters_say_which_losses_normalize_over_the_batch():
    linen = pytest.importorskip("flax.linen")
    model = linen.BatchNorm()
    variables = model.init(jax.random.key(0), jnp.ones((2, 3)), use_running_average=True)

    def loss(mode):
        return from_linen(
            model, variables, lambda y, t: jnp.mean((y - t) ** 2), batch_statistics=mode,
            use_running_average=mode == "stored",
        )  # fmt: skip

    batch = np.ones((9, 3), np.float32), np.zeros((9, 3), np.float32)
    stored, params = loss("stored")
    hd.Hessian(stored, on_mesh(params), [batch], microbatch=3) @ params
    train, _ = loss("batch")
    with pytest.raises(ValueError, match="batch statistics"):
        hd.Hessian(train, on_mesh(params), [batch]) @ params


# What processes have said (test_processes.py has them speak) --------------------------------------


def test_another_length_than_in_the_first_pass_is_refused_by_process_and_batch(monkeypatch):
    monkeypatch.setattr(_agreement, "_exchange", lambda length, batch, index: np.array([length]))
    agreement = _agreement.ProcessBatches(len)
    batches = [np.zeros(3), np.zeros(2)]
    for _ in range(2):
        assert [lengths.tolist() for _, lengths in agreement.batches(iter(batches))] == [[3], [2]]
    with pytest.raises(
        RuntimeError, match="process 0, batch 1: 5 examples, but 2 examples in the first pass"
    ):
        list(agreement.batches(iter([np.zeros(3), np.zeros(5)])))
    with pytest.raises(
        RuntimeError, match="process 0, batch 1: no batch, but 2 examples in the first pass"
    ):
        list(agreement.batches(iter([np.zeros(3)])))
