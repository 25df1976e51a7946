"""The block-diagonal part of a Hessian is the dense Hessian without its other blocks."""

import json
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree
from networks import labelled, true_tanh
from problems import dense_hessian, example_losses, mean_loss, mlp

import hessdensity as hd
from hessdensity.layers import blocks as blocks_module
from hessdensity.vectors import trees
from hessdensity.vectors.random import random_block

GROUPS = {
    "modules": ["first/*", "second/*", "unused"],
    "slices": {
        **hd.slices("second/*", -1, 3),
        "first": "first/*",
        "unused": "unused",
    },
    "one": "*",
}


def masked_loss(params, batch):
    *arrays, mask = batch
    losses = jnp.where(mask, example_losses(params, arrays), 0)
    return hd.Total(jnp.sum(losses), jnp.sum(mask))


def ragged(batch):
    """Two batches, of 48 and of 16 examples."""
    return [jax.tree.map(lambda leaf, own=own: leaf[own], batch) for own in RAGGED]


RAGGED = slice(0, 48), slice(48, 64)


def masked(batch):
    keep = jnp.asarray(np.random.default_rng(3).random(64) < 0.6)
    return (*batch, keep)


def dense(operator):
    """The matrix by products of five vectors, so that all tests share their programs."""
    n = trees.size(operator.like)
    rows = trees.unravel(np.eye(n + -n % 5, n), operator.like)
    return trees.ravel(operator @ rows)[:n].astype(float)


def owners(operator):
    """(n,) the number of the group that each entry belongs to."""
    numbers = trees.zeros(operator.like)
    for number, group in enumerate(operator.groups.values()):
        part = jax.tree.map(lambda leaf, n=number: leaf * 0 + n, group.take(numbers))
        numbers = group.put(numbers, part)
    return trees.ravel(jax.tree.map(lambda leaf: leaf[None], numbers))[0]


def block_part(matrix, operator):
    """The matrix without the blocks that belong to two groups."""
    numbers = owners(operator)
    return np.where(numbers[:, None] == numbers, matrix, 0)


@pytest.fixture(scope="module")
def problem():
    """(params, batch, dense Hessian) of 57 weights in float32."""
    _, params, batch = mlp(np.float32)
    return params, batch, dense_hessian(mean_loss, params, batch)


@pytest.fixture(scope="module")
def hessian(problem):
    params, batch, _ = problem
    return hd.Hessian(mean_loss, params, ragged(batch))


# Products -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", GROUPS)
def test_products_are_those_of_the_blocks_of_the_dense_hessian(name, hessian, problem):
    operator = hd.BlockDiagonal(hessian, GROUPS[name])
    expected = block_part(problem[2], operator)
    np.testing.assert_allclose(dense(operator), expected, atol=1e-6 * np.abs(expected).max())
    assert (np.abs(expected - problem[2]).max() > 0.01) == (name != "one")


def test_in_float64_they_agree_to_rounding_and_there_is_a_group_for_each_leaf():
    with jax.enable_x64(True):
        loss, params, batch = mlp(np.float64)
        operator = hd.BlockDiagonal(hd.Hessian(loss, params, [batch]))
        assert list(operator.groups) == trees.paths(params)
        expected = block_part(dense_hessian(loss, params, batch), operator)
        np.testing.assert_allclose(dense(operator), expected, atol=1e-14)


def test_masks_and_pieces_of_batches_are_weighted_as_in_the_hessian(problem):
    params, batch, _ = problem
    data = ragged(masked(batch))
    operator = hd.BlockDiagonal(
        hd.Hessian(masked_loss, params, data, microbatch=16), GROUPS["modules"]
    )
    flat, unravel = ravel_pytree(params)
    total = jax.jit(jax.hessian(lambda x: masked_loss(unravel(x), masked(batch)).sum))(flat)
    exact = np.asarray(total, float) / np.asarray(masked(batch)[2]).sum()
    expected = block_part(exact, operator)
    np.testing.assert_allclose(dense(operator), expected, atol=1e-6 * np.abs(expected).max())


@pytest.mark.parametrize(
    ("name", "count"), [("modules", 5), ("modules", 1), ("slices", 5), ("one", 5)]
)
def test_each_block_is_bit_for_bit_the_hessian_of_its_layer(name, count, hessian, key):
    operator = hd.BlockDiagonal(hessian, GROUPS[name])
    block = random_block(key, 0, count, operator.like)
    product = operator @ block
    for label, group in operator.groups.items():
        alone = blocks_module.of_group(hessian, group) @ group.take(block, 1)
        np.testing.assert_array_equal(
            trees.ravel(group.take(product, 1)), trees.ravel(alone), err_msg=label
        )


def test_a_single_vector_has_a_single_product(hessian, key):
    operator = hd.BlockDiagonal(hessian, GROUPS["modules"])
    block = random_block(key, 0, 1, operator.like)
    single = operator @ trees.first_vector(block)
    jax.tree.map(np.testing.assert_array_equal, trees.as_single(single), operator @ block)


def test_more_groups_than_one_program_holds_are_several_programs(hessian, problem, monkeypatch):
    params = {f"layer{i:02}": jnp.ones(1 + i % 3) for i in range(20)}
    many = hd.BlockDiagonal(hd.Hessian(lambda p, x: jnp.mean(x), params, [jnp.ones(3)]))
    assert [[len(program) for program in many.programs(size)] for size in (1, 4, 5, 40)] == [
        [16, 4],
        [4] * 5,
        [3] * 6 + [2],
        [1] * 20,
    ]
    assert sorted(np.concatenate(many.programs(5))) == list(range(20))
    monkeypatch.setattr(blocks_module, "_TANGENTS", 10)
    operator = hd.BlockDiagonal(hessian, GROUPS["modules"])
    assert [len(program) for program in operator.programs(5)] == [2, 1]
    expected = block_part(problem[2], operator)
    np.testing.assert_allclose(dense(operator), expected, atol=1e-6 * np.abs(expected).max())


def test_only_the_programs_of_the_groups_that_are_needed_are_run(hessian, key, monkeypatch):
    monkeypatch.setattr(blocks_module, "_TANGENTS", 1)
    operator = hd.BlockDiagonal(hessian, GROUPS["modules"])
    parts = operator.split(random_block(key, 0, 1, operator.like))
    whole = operator.multiply(parts)
    some = operator.multiply(parts, ["second/*"])
    assert set(whole) == set(operator.groups)
    assert set(some) == {"second/*"}
    jax.tree.map(np.testing.assert_array_equal, some["second/*"], whole["second/*"])


def test_a_model_without_forward_mode_goes_reverse_over_reverse_and_says_so_once(caplog):
    def loss(params, batch):
        x, y = batch
        logits = true_tanh(x @ params["a"]) @ params["b"]
        chosen = jnp.take_along_axis(logits, y[:, None], axis=1)[:, 0]
        return jnp.mean(jax.nn.logsumexp(logits, axis=1) - chosen)

    def forward(params, batch):
        x, y = batch
        logits = jnp.tanh(x @ params["a"]) @ params["b"]
        chosen = jnp.take_along_axis(logits, y[:, None], axis=1)[:, 0]
        return jnp.mean(jax.nn.logsumexp(logits, axis=1) - chosen)

    rng = np.random.default_rng(0)
    params = {
        "a": jnp.asarray(rng.standard_normal((8, 3)), jnp.float32),
        "b": jnp.asarray(rng.standard_normal((3, 4)), jnp.float32),
    }
    data = list(labelled(30, 8))
    operator = hd.BlockDiagonal(hd.Hessian(loss, params, data))
    with caplog.at_level(logging.WARNING, logger="hessdensity"):
        assert operator.temporary_bytes(5) >= 0
        found = hd.dense(operator)
    assert [record.message[:30] for record in caplog.records] == ["The model has a custom_vjp, wh"]
    expected = dense(hd.BlockDiagonal(hd.Hessian(forward, params, data)))
    np.testing.assert_allclose(found, expected, atol=1e-6)
    assert operator.describe()["mode"] == "reverse-over-reverse"


def test_an_error_of_the_loss_is_not_taken_for_a_missing_forward_mode(problem):
    def broken(params, batch):
        return mean_loss(params, batch) + len(3)

    params, batch, _ = problem
    with pytest.raises(TypeError, match=r"object of type 'int' has no len"):
        hd.BlockDiagonal(hd.Hessian(broken, params, [batch])) @ params


def test_a_block_with_nan_is_refused_by_its_batch(problem):
    params, batch, _ = problem
    second = batch[0].at[0, 0].set(np.nan), batch[1]
    operator = hd.BlockDiagonal(hd.Hessian(mean_loss, params, [batch, second]))
    with pytest.raises(FloatingPointError, match=r"Hessian-vector product.*batch 1"):
        operator @ params


# What is known of it ------------------------------------------------------------------------------


def test_the_traces_of_the_blocks_sum_to_the_trace_of_the_hessian(hessian, problem):
    for name in ("modules", "slices"):
        operator = hd.BlockDiagonal(hessian, GROUPS[name])
        groups = operator.groups.values()
        traces = [np.trace(dense(blocks_module.of_group(hessian, group))) for group in groups]
        assert sum(traces) == pytest.approx(np.trace(problem[2]), rel=1e-5)


def test_the_interval_of_the_cosine_holds_the_ratio_of_the_norms(hessian, problem):
    operator = hd.BlockDiagonal(hessian, GROUPS["modules"])
    exact = np.linalg.norm(block_part(problem[2], operator)) / np.linalg.norm(problem[2])
    assert 0.5 < exact < 0.95
    found = [operator.cosine(jax.random.key(seed), 20) for seed in range(20)]
    held = [each.lower <= exact <= each.upper for each in found]
    assert np.mean(held) >= 0.85
    values = [each.value for each in found]
    assert np.mean(values) == pytest.approx(exact, abs=0.03)
    # The standard error is that of the values.
    assert 0.5 < np.std(values) / np.mean([each.standard_error for each in found]) < 2


def test_the_cosine_of_one_block_is_one_and_of_zero_blocks_zero(hessian, key):
    alone = hd.BlockDiagonal(hessian, "*").cosine(key, 5)
    assert (alone.value, alone.standard_error) == (pytest.approx(1), pytest.approx(0, abs=1e-6))

    def bilinear(params, x):
        return jnp.mean(params["a"] * params["b"] * x)

    params = {"a": jnp.ones(()), "b": jnp.ones(())}
    none = hd.BlockDiagonal(hd.Hessian(bilinear, params, [jnp.ones(3)])).cosine(key, 5)
    assert (none.value, none.standard_error, none.lower, none.upper) == (0, 0, 0, 0)

    flat = hd.Hessian(lambda p, x: jnp.mean(p["a"] * x) + p["b"], params, [jnp.ones(3)])
    with pytest.raises(ValueError, match="the Hessian is zero"):
        hd.BlockDiagonal(flat).cosine(key, 5)


def test_the_description_is_json_and_names_the_parts(hessian):
    operator = hd.BlockDiagonal(hessian, GROUPS["slices"])
    described = json.loads(json.dumps(operator.describe()))
    assert described["kind"] == "BlockDiagonal"
    assert described["groups"]["first"] == ["first/bias", "first/kernel"]
    assert described["groups"]["second/*[2]"] == [
        "second/bias, axis 0 from 2 to 3",
        "second/kernel, axis 1 from 2 to 3",
    ]


def test_it_has_the_members_of_its_hessian(hessian):
    operator = hd.BlockDiagonal(hessian, GROUPS["modules"])
    assert operator.params is hessian.params
    jax.tree.map(np.testing.assert_array_equal, operator.gradient(), hessian.gradient())
    assert operator.temporary_bytes(5) >= 0


@pytest.mark.parametrize("make", [hd.BlockDiagonal, lambda other: hd.layer_hessian(other, "a")])
def test_what_is_not_a_hessian_is_refused(make):
    with pytest.raises(TypeError, match=r"hessian is a Matrix; expected hd.Hessian\(loss, params"):
        make(hd.Matrix(jnp.eye(2)))


@pytest.mark.parametrize(("arguments", "said"), [((0, 3), "key is a int"), ((None, 3), "key is a")])
def test_a_cosine_needs_a_key(arguments, said, hessian):
    with pytest.raises(TypeError, match=said):
        hd.BlockDiagonal(hessian).cosine(*arguments)


def test_a_cosine_needs_two_vectors(hessian, key):
    with pytest.raises(ValueError, match="num_vectors=1, expected a whole number of at least 2"):
        hd.BlockDiagonal(hessian).cosine(key, 1)


# The Hessian of one layer -------------------------------------------------------------------------


def test_a_layer_is_a_path_a_module_a_glob_or_a_slice(hessian, problem):
    names = trees.paths(hessian.like)
    ends = np.cumsum([leaf.size for leaf in jax.tree.leaves(problem[0])])
    places = {
        name: np.arange(57)[slice(e - leaf.size, e)]
        for name, e, leaf in zip(names, ends, jax.tree.leaves(problem[0]), strict=True)
    }
    kernel = places["first/kernel"].reshape(6, 5)
    expected = {
        "first": np.concatenate([places["first/bias"], places["first/kernel"]]),
        "*/bias": np.concatenate([places["first/bias"], places["second/bias"]]),
        hd.LeafSlice("first/*", -1, 4, 5): np.array([places["first/bias"][4], *kernel[:, 4]]),
    }
    for layer, own in expected.items():
        found = dense(hd.layer_hessian(hessian, layer))
        np.testing.assert_allclose(found, problem[2][np.ix_(own, own)], atol=2e-6)


def test_a_found_layer_is_its_kernel():
    params = {"w": jnp.ones((4, 3)), "w2": jnp.ones((3, 2)), "qkv": jnp.ones((3, 3, 3))}

    def outputs(p, x):
        hidden = jnp.tanh(x @ p["w"])
        q, k, v = (hidden @ p["qkv"][i] for i in range(3))
        return (q * k + v) @ p["w2"]

    def loss(p, batch):
        return jnp.mean((outputs(p, batch[0]) - batch[1]) ** 2)

    rng = np.random.default_rng(0)
    x = rng.standard_normal((5, 4)).astype(np.float32)
    y = rng.standard_normal((5, 2)).astype(np.float32)
    hessian = hd.Hessian(loss, params, [(x, y)])
    layers = hd.find_layers(outputs, params, x)
    # The path of a leaf is exact, although other paths begin in the same way.
    found = hd.layer_hessian(hessian, layers["w"])
    assert trees.paths(found.like) == ["w"]
    np.testing.assert_array_equal(hd.dense(found), hd.dense(hd.layer_hessian(hessian, "w")))
    with pytest.raises(
        ValueError, match=r"'qkv\[1\]' has only a part of the leaf 'qkv'.*hd.slices"
    ):
        hd.layer_hessian(hessian, layers["qkv[1]"])
    with pytest.raises(ValueError, match=r"where='v' matches no leaf. The paths are:\n  qkv"):
        hd.layer_hessian(hessian, "v")


def test_the_hessian_of_a_slice_is_a_hessian_like_any_other(problem):
    params, batch, _ = problem
    hessian = hd.Hessian(masked_loss, params, ragged(masked(batch)), microbatch=8)
    layer = hd.layer_hessian(hessian, hd.LeafSlice("first/kernel", 1, 0, 5))
    leaf = lambda tree: tree["first"]["kernel"]  # noqa: E731
    np.testing.assert_array_equal(leaf(layer.params), params["first"]["kernel"][:, :1])
    np.testing.assert_allclose(leaf(layer.gradient()), leaf(hessian.gradient())[:, :1], atol=1e-7)
    moved = jax.tree.map(lambda x: 0.1 * x, layer.params)
    whole = jax.tree.map(jnp.zeros_like, hessian.params)
    whole["first"]["kernel"] = whole["first"]["kernel"].at[:, :1].set(leaf(moved))
    np.testing.assert_allclose(
        leaf(layer.gradient(moved)), leaf(hessian.gradient(whole))[:, :1], atol=1e-6
    )
    assert layer.describe()["num_examples"] == hessian.describe()["num_examples"]


def test_a_loss_of_whole_batches_stays_whole():
    def loss(params, x):
        return jnp.mean(jnp.tanh(x @ params["w"] - jnp.mean(x @ params["w"])) ** 2)

    loss.whole_batch = True
    x = jnp.asarray(np.random.default_rng(0).standard_normal((6, 4)), jnp.float32)
    hessian = hd.Hessian(loss, {"w": jnp.ones(4)}, [x])
    assert hd.layer_hessian(hessian, hd.LeafSlice("w", 0, 0, 2)).risk.whole_batch
    assert hd.layer_hessian(hessian, "w").risk.whole_batch
