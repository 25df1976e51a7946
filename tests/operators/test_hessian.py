"""The operator of a loss: equal to the dense Hessian, however the data are cut, and honest about
what it cannot be."""

import functools
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from problems import dense_hessian, example_losses, logits_of, mean_loss, mlp

import hessdensity as hd
from hessdensity.losses import risk
from hessdensity.vectors import trees
from hessdensity.vectors.random import random_block
from hessdensity.vectors.selection import select


def close(dtype):
    return {"atol": 300 * np.finfo(dtype).eps, "rtol": 0}


def test_products_are_the_columns_of_jax_hessian(dtype):
    loss, params, batch = mlp(dtype)
    matrix = hd.dense(hd.Hessian(loss, params, [batch]))
    np.testing.assert_allclose(matrix, dense_hessian(loss, params, batch), **close(dtype))
    assert not matrix[-2:].any()  # a leaf that the loss does not use gives zeros, not an error


@pytest.mark.parametrize("sizes", [30, 7, 64, 63])
def test_uneven_batches_are_the_full_batch(sizes, dtype):
    loss, params, batch = mlp(dtype)
    matrix = hd.dense(hd.Hessian(loss, params, hd.batches(batch, sizes)))
    np.testing.assert_allclose(matrix, dense_hessian(loss, params, batch), **close(dtype))


@pytest.mark.parametrize("count", [1, 3, 4, 5, 9])
def test_a_block_is_its_vectors_one_by_one(count, key, dtype):
    loss, params, batch = mlp(dtype)
    hessian = hd.Hessian(loss, params, hd.batches(batch, 30))
    rows = np.random.default_rng(0).standard_normal((count, 55))
    block = trees.unravel(rows, hessian.like)
    together = trees.ravel(hessian @ block)
    np.testing.assert_allclose(
        together, rows @ dense_hessian(loss, params, batch), atol=2000 * np.finfo(dtype).eps
    )
    single = hessian @ jax.tree.map(lambda leaf: leaf[-1], block)
    np.testing.assert_allclose(
        single["first"]["bias"], (hessian @ block)["first"]["bias"][-1], **close(dtype)
    )


def test_masked_examples_weigh_by_their_total_and_not_by_batch(dtype):
    _, params, (x, y) = mlp(dtype)
    mask = np.arange(64) % 5 > 1

    def masked(params, batch):
        x, y, mask = batch
        return hd.Total(jnp.sum(jnp.where(mask, example_losses(params, (x, y)), 0)), jnp.sum(mask))

    matrix = hd.dense(hd.Hessian(masked, params, hd.batches((x, y, mask), 30)))
    exact = dense_hessian(mean_loss, params, (x[mask], y[mask]))
    np.testing.assert_allclose(matrix, exact, **close(dtype))


@pytest.mark.parametrize(
    "where", ["second/*", "*/kernel", lambda path: "bias" in path, "first/kernel"]
)
def test_where_is_the_principal_block_of_the_selected_leaves(where, dtype):
    loss, params, batch = mlp(dtype)
    names = trees.paths(params)
    sizes = [leaf.size for leaf in jax.tree.leaves(params)]
    chosen = [
        where(name) if callable(where) else select(params, where).chosen[i]
        for i, name in enumerate(names)
    ]
    rows = np.repeat(chosen, sizes)
    block = dense_hessian(loss, params, batch)[np.ix_(rows, rows)]
    hessian = hd.Hessian(loss, params, hd.batches(batch, 30), where=where)
    np.testing.assert_allclose(hd.dense(hessian), block, **close(dtype))
    whole = hd.Hessian(loss, params, hd.batches(batch, 30))
    np.testing.assert_allclose(hd.dense(hd.Restricted(whole, where)), block, **close(dtype))
    assert jax.tree.structure(hd.Restricted(whole, where).like) == jax.tree.structure(hessian.like)


def test_a_restricted_hessian_can_be_restricted_again():
    loss, params, batch = mlp(np.float32)
    first = hd.Hessian(loss, params, [batch], where="*/kernel")
    again = hd.Restricted(first, "second/*")
    alone = hd.Hessian(loss, params, [batch], where="second/kernel")
    np.testing.assert_array_equal(hd.dense(again), hd.dense(alone))
    with pytest.raises(ValueError, match="first/kernel"):
        hd.Restricted(first, "*/bias")


def test_bfloat16_parameters_get_the_hessian_of_their_float32_values():
    loss, params, batch = mlp(np.float32)
    short = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
    hessian = hd.Hessian(loss, short, [batch])
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(hessian.like)} == {"float32"}
    exact = dense_hessian(loss, jax.tree.map(lambda leaf: leaf.astype(jnp.float32), short), batch)
    np.testing.assert_allclose(hd.dense(hessian), exact, **close(np.float32))


def test_a_model_that_computes_in_bfloat16_is_accepted_with_its_own_precision(key):
    _, params, batch = mlp(np.float32)

    def loss(params, batch):
        short = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
        logits = logits_of(short, batch[0].astype(jnp.bfloat16)).astype(jnp.float32)
        return -jnp.take_along_axis(jax.nn.log_softmax(logits), batch[1][:, None], axis=1).mean()

    matrix, exact = (
        hd.dense(hd.Hessian(loss, params, [batch])),
        dense_hessian(mean_loss, params, batch),
    )
    assert np.linalg.norm(matrix - exact) < 0.05 * np.linalg.norm(exact)


def test_a_new_checkpoint_compiles_nothing():
    loss, params, batch = mlp(np.float32)
    hd.dense(hd.Hessian(loss, params, hd.batches(batch, 30), where="first/*"))
    compiled = risk.add_batch._cache_size()
    later = jax.tree.map(lambda leaf: 2 * leaf, params)
    matrix = hd.dense(hd.Hessian(loss, later, hd.batches(batch, 30), where="first/*"))
    assert risk.add_batch._cache_size() == compiled
    np.testing.assert_allclose(
        matrix, dense_hessian(loss, later, batch)[:35, :35], **close(np.float32)
    )


def test_it_describes_itself_and_its_data():
    loss, params, batch = mlp(np.float32)
    hessian = hd.Hessian(loss, params, hd.batches(batch, 30))
    assert "num_examples" not in hessian.describe()
    hd.dense(hessian)
    described = hessian.describe()
    assert described["num_examples"] == 64
    assert described["loss"] == pytest.approx(float(loss(params, batch)), rel=1e-5)
    assert len(described["batch_losses"]) == 3
    assert described["mode"] == "forward-over-reverse"
    assert described["precision"] == "highest"
    assert described["params"] == hd.Hessian(loss, params, [batch]).describe()["params"]


def test_the_precision_is_that_of_the_products_and_part_of_what_is_compiled():
    loss, params, batch = mlp(np.float32)
    seen = []

    def spying(params, batch):
        seen.append(jax.config.jax_default_matmul_precision)
        return loss(params, batch)

    for precision in ("highest", "bfloat16", None):
        hd.Hessian(spying, params, [batch], precision=precision) @ params
    assert list(dict.fromkeys(seen)) == ["highest", "bfloat16", None]
    with pytest.raises(ValueError, match="precision='best' is unknown"):
        hd.Hessian(loss, params, [batch], precision="best")


# Models that refuse forward-over-reverse ----------------------------------------------------------


@jax.custom_vjp
def cube(x):
    return x**3


# The rule's forward function calls the operation itself, as fused kernels do: forward mode meets
# the custom_vjp.
cube.defvjp(lambda x: (cube(x), x), lambda x, g: (3 * x**2 * g,))


@jax.custom_vjp
def clipped(x):
    return x


# Gradient clipping by norm. (Clipping each element would be the gradient of a Huber loss, and
# symmetric.)
clipped.defvjp(
    lambda x: (clipped(x), None), lambda _, g: (g / jnp.maximum(1, 10 * jnp.linalg.norm(g)),)
)


def with_rule(rule, params, batch):
    return jnp.mean(jnp.sum(rule(batch @ params) ** 4, axis=1))


def test_a_custom_vjp_that_is_the_true_gradient_goes_reverse_over_reverse_and_is_exact(caplog):
    x = jnp.asarray(np.random.default_rng(0).standard_normal((20, 4)), jnp.float32)
    params = jnp.asarray(np.random.default_rng(1).standard_normal((4, 3)) * 0.3, jnp.float32)
    hessian = hd.Hessian(functools.partial(with_rule, cube), params, hd.batches(x, 9))
    assert hessian.temporary_bytes(1) > 0  # before any product has told the mode
    exact = dense_hessian(functools.partial(with_rule, lambda z: z**3), params, x)
    with caplog.at_level(logging.WARNING, logger="hessdensity"):
        matrix = hd.dense(hessian, block_size=5)
    np.testing.assert_allclose(matrix, exact, atol=1e-5 * np.abs(exact).max())
    assert hessian.describe()["mode"] == "reverse-over-reverse"
    assert len([record for record in caplog.records if "custom_vjp" in record.message]) == 1


def test_a_custom_vjp_that_is_no_gradient_is_refused_by_name_every_time(key):
    rng = np.random.default_rng(1)
    x, params = (jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in ((5, 4), (4, 3)))
    hessian = hd.Hessian(functools.partial(with_rule, clipped), params, [x])
    for _ in range(2):
        with pytest.raises(
            ValueError,
            match=r"custom_vjp rule in the model \(clipped \(test_hessian.py:\d+\)\) is not the",
        ):
            hessian @ params
    # A rule that forward mode can differentiate gets through to Lanczos, which sees the asymmetry.
    silent = jax.custom_vjp(lambda x: x)
    silent.defvjp(lambda x: (x, None), lambda _, g: (g / jnp.maximum(1, 10 * jnp.linalg.norm(g)),))
    with pytest.raises(ValueError, match="the operator is not symmetric"):
        hd.spectral_density(
            hd.Hessian(functools.partial(with_rule, silent), params, [x]), key, progress=False
        )


def test_a_users_own_type_error_is_not_mistaken_for_a_custom_vjp():
    def loss(params, batch):
        raise TypeError("mine")

    with pytest.raises(TypeError, match="mine"):
        hd.Hessian(loss, jnp.ones(3), [jnp.ones(2)]) @ jnp.ones(3)


# Bad input ----------------------------------------------------------------------------------------


def test_a_product_that_is_not_finite_names_the_batch():
    batches = [jnp.ones((2, 3)), jnp.ones((2, 3)).at[1, 1].set(jnp.inf), jnp.ones((2, 3))]
    hessian = hd.Hessian(lambda w, x: jnp.mean(x @ w) ** 2, jnp.ones(3), batches)
    with pytest.raises(FloatingPointError, match="not finite in batch 1 of 3"):
        hessian @ jnp.ones(3)


@pytest.mark.parametrize("leaf", [jnp.arange(3), jnp.ones(3, jnp.complex64), jnp.array([True])])
def test_a_selected_leaf_that_is_not_real_is_refused_by_path_and_a_held_one_is_not(leaf):
    params = {"w": jnp.ones(2), "step": leaf}

    def loss(params, batch):
        return jnp.mean(batch @ params["w"]) ** 2

    with pytest.raises(TypeError, match=f"params leaf 'step' is {leaf.dtype}.*Hold it fixed"):
        hd.Hessian(loss, params, [jnp.ones((4, 2))])
    assert hd.dense(hd.Hessian(loss, params, [jnp.ones((4, 2))], where="w")).shape == (2, 2)


@pytest.mark.parametrize(
    ("where", "error", "said"),
    [
        ("third/*", ValueError, r"matches no leaf.*\n.*first/bias"),
        (3, TypeError, "where=3 is a int; expected a glob"),
    ],
)
def test_a_where_that_selects_nothing_lists_the_paths(where, error, said):
    loss, params, batch = mlp(np.float32)
    with pytest.raises(error, match=said):
        hd.Hessian(loss, params, [batch], where=where)


def test_a_loss_that_is_no_function_or_cannot_be_hashed_is_refused():
    class Unhashable(list):
        def __call__(self, params, batch):
            return 0.0

    with pytest.raises(TypeError, match="loss is a float; expected a function"):
        hd.Hessian(1.0, jnp.ones(3), [jnp.ones(2)])
    with pytest.raises(TypeError, match=r"cannot be hashed.*wrap it in a function"):
        hd.Hessian(Unhashable(), jnp.ones(3), [jnp.ones(2)])


def test_counts_that_add_up_to_nothing_are_refused():
    hessian = hd.Hessian(lambda w, x: hd.Total(jnp.sum(x @ w), 0), jnp.ones(3), [jnp.ones((2, 3))])
    with pytest.raises(ValueError, match="counts of all batches add up to 0"):
        hessian @ jnp.ones(3)


# Memory -------------------------------------------------------------------------------------------


def deep(checkpoint):
    """A residual network of 16 narrow blocks, whose activations are much larger than its weights.

    Scanned: the compiler's CPU backend puts together again what `jax.checkpoint` has doubled in
    layers side by side."""

    def block(x, w):
        return x + jnp.tanh(jnp.tanh(x @ w[0]) @ w[1]), None

    block = jax.checkpoint(block, prevent_cse=False) if checkpoint else block
    return lambda params, x: jnp.mean(jax.lax.scan(block, x, params)[0] ** 2)


def test_rematerialization_changes_the_memory_and_nothing_else():
    rng = np.random.default_rng(0)
    params = [
        jnp.asarray(rng.standard_normal(shape) / 8, jnp.float32)
        for shape in ((16, 8, 32), (16, 32, 8))
    ]
    x = rng.standard_normal((1000, 8)).astype(np.float32)
    plain, saving = (hd.Hessian(deep(checkpoint), params, [x]) for checkpoint in (False, True))
    ours, theirs = (
        trees.ravel([leaf[None] for leaf in hessian @ params]) for hessian in (saving, plain)
    )
    np.testing.assert_allclose(ours, theirs, atol=1e-5 * np.abs(theirs).max())
    assert saving.temporary_bytes(1) < 0.5 * plain.temporary_bytes(1)


def test_the_temporary_bytes_are_those_of_the_largest_piece_and_cost_no_compilation():
    loss, params, batch = mlp(np.float32, examples=512)
    compiled = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, _, **about: compiled.append(event) if "add_products" in str(about) else None
    )
    try:
        whole, cut = (hd.Hessian(loss, params, [batch], microbatch=size) for size in (None, 64))
        assert cut.temporary_bytes(2) < whole.temporary_bytes(2) / 4
        assert whole.temporary_bytes(100) == whole.temporary_bytes(5)  # five vectors a program
        compiled.clear()
        whole @ random_block(jax.random.key(0), 0, 2, whole.like)
        cut @ random_block(jax.random.key(0), 0, 2, cut.like)
        assert not compiled
    finally:
        jax.monitoring.clear_event_listeners()


def test_the_fingerprint_is_taken_once(monkeypatch):
    loss, params, batch = mlp(np.float32)
    calls, original = [], risk.fingerprint
    monkeypatch.setattr(risk, "fingerprint", lambda tree: calls.append(tree) or original(tree))
    hessian = hd.Hessian(loss, params, [batch])
    assert hessian.describe() == hessian.describe()
    assert len(calls) == 1
