"""Any sum over the data in one checked pass."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import hessdensity as hd
from hessdensity.losses import batch_total


def problem(rng, sizes=(8, 8, 3)):
    """A two-layer network, and ragged batches."""
    params = {
        "first": jnp.asarray(rng.standard_normal((4, 5)), jnp.float32),
        "second": jnp.asarray(rng.standard_normal((5, 2)), jnp.float32),
    }
    batches = [
        (
            rng.standard_normal((size, 4)).astype(np.float32),
            rng.standard_normal((size, 2)).astype(np.float32),
        )
        for size in sizes
    ]
    return params, batches


def network(params, x):
    """The outputs, and the input of each layer."""
    hidden = jnp.tanh(x @ params["first"])
    return hidden @ params["second"], {"first": x, "second": hidden}


def loss(params, batch):
    outputs, _ = network(params, batch[0])
    return jnp.mean(jnp.sum((outputs - batch[1]) ** 2, axis=1))


def input_sums(loss, params, batch):
    """A new sum over the data: the inputs of each layer."""
    merged = {**params}
    _, inputs = network(merged, batch[0])
    return batch_total(loss, params, batch), jax.tree.map(lambda x: x.sum(0), inputs)


@pytest.fixture
def rng():
    return np.random.default_rng(3)


@pytest.mark.parametrize("microbatch", [None, 3])
def test_a_new_sum_over_the_data_is_a_few_lines_and_exact(rng, microbatch):
    params, batches = problem(rng)
    risk = hd.EmpiricalRisk(loss, params, batches, microbatch=microbatch)
    total, count = risk.sum(input_sums)
    mean = jax.tree.map(lambda leaf: leaf / count, total)
    assert len(inspect.getsource(input_sums).splitlines()) + 3 < 30

    _, inputs = network(params, np.concatenate([x for x, _ in batches]))
    assert count == 19
    for name, leaf in inputs.items():
        np.testing.assert_allclose(mean[name], leaf.mean(0), atol=1e-6)


def test_a_sum_is_checked_like_a_product(rng):
    params, batches = problem(rng)
    shift = [0.0]
    risk = hd.EmpiricalRisk(
        loss, params, lambda: [(x + np.float32(shift[0]), y) for x, y in batches]
    )
    risk.sum(input_sums)
    shift[0] = 0.1
    with pytest.raises(RuntimeError, match="pass 2 differs from pass 1, first in batch 0"):
        risk.sum(input_sums)
    shift[0] = np.inf
    with pytest.raises(FloatingPointError, match="the inputs is not finite in batch 0 of 3"):
        risk.sum(input_sums, what="the inputs")


def test_a_fold_meets_each_batch_once_in_order_with_its_pieces_added_up(rng):
    params, batches = problem(rng)
    risk = hd.EmpiricalRisk(loss, params, batches, microbatch=3)

    def combine(rows, sums, count):
        return [*rows, (sums[0]["first"], int(count))]

    rows, counts = risk.fold(input_sums, [()], combine=combine, initial=[])
    assert counts == [count for _, count in rows] == [8, 8, 3]
    for (row, _), (x, _) in zip(rows, batches, strict=True):
        np.testing.assert_allclose(row, x.sum(0), atol=1e-5)


def test_sums_by_part_add_up_to_the_whole(rng):
    params, batches = problem(rng, sizes=(4, 6, 2, 5))
    risk = hd.EmpiricalRisk(loss, params, batches)
    (whole, count) = risk.sum(input_sums)
    parts, counts = risk.sum_parts(input_sums, [[()], [()]], [[None], [None]])
    assert counts == [6, 11]
    assert sum(counts) == count
    both = jax.tree.map(jnp.add, parts[0][0], parts[1][0])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), both, whole)


def test_gradients_and_products_of_one_bfloat16_model_are_passes_over_the_same_data(rng):
    """Their programs round the losses differently, which is not a change of the data."""
    params, batches = problem(rng, sizes=(64, 64, 40))
    extra = [0]

    def short(params, batch):
        params = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
        outputs, _ = network(params, batch[0].astype(jnp.bfloat16))
        return jnp.mean(jnp.sum((outputs - batch[1].astype(jnp.bfloat16)) ** 2, axis=1))

    with jax.numpy_dtype_promotion("standard"):
        hessian = hd.Hessian(short, params, lambda: batches[: len(batches) - extra[0]])
        hessian.gradient()
        hessian @ params
        hessian.risk.sum(input_sums)
        hessian.gradient()
        extra[0] = 1
        with pytest.raises(RuntimeError, match="first in batch 2: no such batch"):
            hessian.gradient()


def test_a_gradient_elsewhere_is_not_compared_with_the_passes_here(rng):
    params, batches = problem(rng)
    hessian = hd.Hessian(loss, params, batches)
    hessian @ params
    offset = jax.tree.map(lambda leaf: 0.5 * leaf, params)
    moved = hd.gradient(loss, jax.tree.map(lambda leaf: 1.5 * leaf, params), batches)
    found = hessian.gradient(offset)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), found, moved)


@pytest.mark.parametrize("microbatch", [1, 3, 100])
def test_gradients_and_their_covariance_take_microbatches(rng, microbatch, key):
    params, batches = problem(rng, sizes=(6, 6, 6, 6))
    space = hd.top_eigenspace(hd.Hessian(loss, params, batches), key, 2, progress=False)
    whole = hd.gradient(loss, params, batches)
    pieces = hd.gradient(loss, params, batches, microbatch=microbatch)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), pieces, whole)
    one = hd.gradient_covariance(loss, params, batches, space)
    other = hd.gradient_covariance(loss, params, batches, space, microbatch=microbatch)
    np.testing.assert_allclose(other.covariance, one.covariance, rtol=1e-4, atol=1e-4)
    assert other.num_batches == 4


@pytest.mark.parametrize("call", [hd.gradient, hd.gradient_covariance])
def test_a_loss_without_a_mean_is_refused_by_gradients_too(rng, call, key):
    params, batches = problem(rng)
    space = hd.top_eigenspace(hd.Hessian(loss, params, batches), key, 1, progress=False)

    def wrong(params, batch):
        return loss(params, batch), 0.5

    more = () if call is hd.gradient else (space,)
    with pytest.raises(TypeError, match="loss returned a tuple; expected the batch's mean loss"):
        call(wrong, params, batches, *more)
