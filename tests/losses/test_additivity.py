"""A mean over examples is told from everything else by the losses of a batch and of its parts."""

import functools
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import hessdensity as hd
from hessdensity import adapters, losses
from hessdensity.losses.additivity import Split, judge

RNG = np.random.default_rng(0)
X = RNG.standard_normal((24, 5)).astype(np.float32)
Y = RNG.standard_normal(24).astype(np.float32)
MASK = (RNG.random((24, 7)) < 0.5).astype(np.float32)
W = RNG.standard_normal(5).astype(np.float32)
BATCHES = hd.batches((X, Y, MASK), 10)


def errors(w, batch):
    inputs, targets, _ = batch
    return (jnp.tanh(inputs @ w) - targets) ** 2


def mean(w, batch):
    return jnp.mean(errors(w, batch))


def weighted(w, batch):
    """The sum and the count of losses of unmasked tokens."""
    return jnp.sum(errors(w, batch)[:, None] * batch[2]), jnp.sum(batch[2])


def regularizer(w):
    return jnp.sum(w**2)


def contrastive(w, batch):
    scores = batch[0] @ jnp.diag(w) @ batch[0].T
    return jnp.mean(jax.nn.logsumexp(scores, axis=1) - jnp.diagonal(scores))


def normalized(w, batch):
    outputs = batch[0] @ w
    outputs = (outputs - jnp.mean(outputs)) / jnp.std(outputs)
    return jnp.mean((outputs - batch[1]) ** 2)


def noisy(w, batch):
    """Dropout of a fixed key: repeatable, but of a mask that depends on the size of the batch."""
    kept = jax.random.bernoulli(jax.random.key(0), 0.5, batch[0].shape).astype(batch[0].dtype)
    return mean(w, (batch[0] * kept, *batch[1:]))


def examine(loss, batches=BATCHES, **options):
    """What the Hessian of a loss says, in the precision of the test."""
    real = jnp.zeros(0).dtype
    batches = [jax.tree.map(lambda a: a.astype(real), batch) for batch in batches]
    return hd.Hessian(loss, jnp.asarray(W, real), batches, **options).additivity()


MEANS = {
    "a mean": mean,
    "a mean of losses of both signs": lambda w, b: jnp.mean(jnp.sin(b[0] @ w)),
    "a mean with a regularizer": lambda w, b: mean(w, b) + regularizer(w),
    "a mean with a large regularizer": lambda w, b: mean(w, b) + 100 * regularizer(w),
    "a regularizer alone": lambda w, b: regularizer(w) + 0 * mean(w, b),
    "zero": lambda w, b: 0 * mean(w, b),
    "a total over tokens": lambda w, b: hd.Total(*weighted(w, b)),
    "a total over examples": lambda w, b: hd.Total(jnp.sum(errors(w, b)), len(b[0])),
}

OTHERS = {
    "a sum": (lambda w, b: jnp.sum(errors(w, b)), "the sum over the examples. Divide"),
    "a sum with a regularizer": (
        lambda w, b: jnp.sum(errors(w, b)) + regularizer(w),
        "the sum over the examples, and a term that does not depend on them. Divide",
    ),
    "a masked mean": (lambda w, b: weighted(w, b)[0] / weighted(w, b)[1], "hd.Total"),
    "a root of a mean": (lambda w, b: jnp.sqrt(mean(w, b)), "hd.Total"),
    "a contrastive loss": (contrastive, "whole_batch = True"),
    "a loss of batch statistics": (normalized, "whole_batch = True"),
    "dropout of a fixed key": (noisy, "Switch off dropout"),
    "a regularizer divided by the batch": (
        lambda w, b: mean(w, b) + regularizer(w) / len(b[0]),
        "whole_batch = True",
    ),
    "a total of a mean": (
        lambda w, b: hd.Total(mean(w, b), len(b[0])),
        "The sum of the loss's hd.Total does not add up",
    ),
    "a total without its count": (
        lambda w, b: hd.Total(jnp.sum(errors(w, b)), 1.0),
        "The count of the loss's hd.Total does not add up",
    ),
}


@pytest.mark.parametrize("loss", MEANS.values(), ids=MEANS)
def test_a_mean_over_examples_is_one(loss, dtype):
    found = examine(loss)
    assert found.error <= found.allowed / 10
    assert found.diagnosis == found.unchecked == ""


@pytest.mark.parametrize(("loss", "said"), OTHERS.values(), ids=OTHERS)
def test_any_other_loss_is_diagnosed(loss, said, dtype):
    found = examine(loss)
    assert not found.error <= 4 * found.allowed  # NaN where one example has no deviation
    assert said in found.diagnosis
    assert found.unchecked == ""


def test_the_diagnosis_shows_the_losses_of_a_batch_and_of_its_parts():
    found = examine(lambda w, b: jnp.sum(errors(w, b)), [jax.tree.map(lambda a: a[:4], BATCHES[0])])
    values = np.asarray(errors(jnp.asarray(W), BATCHES[0]), float)
    assert "for 4 examples" in found.diagnosis
    shown = [float(word) for word in re.findall(r"\d+\.\d+", found.diagnosis)]
    expected = [values[:4].sum(), values[:2].sum(), values[2:4].sum(), values[:4].sum() / 2]
    np.testing.assert_allclose(shown, expected, rtol=1e-5)


@pytest.mark.parametrize("shift", [0.0, 1.0])
def test_a_loss_whose_batches_average_to_zero_is_a_mean_nevertheless(shift):
    """As a policy gradient has it, whose advantages are centered in every batch."""

    def loss(w, batch):
        return jnp.mean(batch[1] * jnp.exp(0 * (batch[0] @ w))) + shift * jnp.mean(batch[1])

    centered = [(x, y - y.mean(), m) for x, y, m in BATCHES]
    found = examine(loss, centered)
    assert found.error <= found.allowed


def test_a_masked_mean_whose_halves_count_equally_many_tokens_is_found_all_the_same():
    mask = np.zeros((8, 4), np.float32)
    mask[:, :2] = 1
    mask[0, 0] = mask[4, 0] = 0  # so many in both halves, but not in the first quarter
    batch = (X[:8], Y[:8], mask)
    found = examine(OTHERS["a masked mean"][0], [batch])
    assert found.error > found.allowed


def test_a_loss_that_declares_to_need_whole_batches_is_not_checked():
    class Model:
        whole_batch = True

        def loss(self, w, batch):
            return contrastive(w, batch)

    for loss in (Model().loss, jax.jit(Model().loss), functools.partial(jax.jit(Model().loss))):
        assert examine(loss).unchecked == "the loss has whole_batch = True."


def test_batches_of_one_example_are_not_checked():
    assert "no batch has two examples" in examine(mean, hd.batches((X, Y, MASK), 1)).unchecked
    assert "no batch has two examples" in examine(mean, microbatch=1).unchecked


def test_one_batch_of_two_examples_is_enough():
    single, pair = ([tuple(a[:size] for a in (X, Y, MASK))] for size in (1, 2))
    found = examine(OTHERS["a sum"][0], [*single, *pair])
    assert found.error > found.allowed
    assert "the sum over the examples" in found.diagnosis


def test_batches_without_a_common_axis_are_not_checked():
    def loss(w, batch):
        return hd.Total(jnp.sum((batch["x"] @ w) ** 2) + jnp.sum(batch["y"]), 3)

    found = examine(loss, [{"x": X[:4], "y": Y[:3]}])
    assert "no common leading axis" in found.unchecked


def test_a_scalar_of_a_batch_is_part_of_all_its_parts():
    def loss(w, batch):
        return hd.Total(batch["t"] * jnp.sum((batch["x"] @ w) ** 2), len(batch["x"]))

    found = examine(loss, [{"x": X[:6], "t": np.float32(2)}])
    assert found.error <= found.allowed
    assert not found.unchecked


def test_a_model_of_one_size_of_a_batch_is_not_checked():
    def loss(w, batch):
        return jnp.mean((batch.reshape(8, 5) @ w) ** 2)

    found = examine(loss, [X[:8], X[8:16]])
    assert "the loss fails on a part of a batch (TypeError: " in found.unchecked


@pytest.mark.parametrize("name", ["a mean", "a sum", "a contrastive loss"])
@pytest.mark.parametrize("size", [16, 12])
def test_it_is_told_on_a_mesh_and_in_microbatches(name, size):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    place = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    loss = {**MEANS, **{key: loss for key, (loss, _) in OTHERS.items()}}[name]
    for options in ({}, {"microbatch": 8}):
        hessian = hd.Hessian(
            loss, jax.device_put(W, place), hd.batches((X, Y, MASK), size), **options
        )
        found = hessian.additivity()
        assert (found.error <= found.allowed) == (name == "a mean")


class Net(nn.Module):
    train: bool = True

    @nn.compact
    def __call__(self, x):
        return nn.Dense(3)(nn.BatchNorm(use_running_average=not self.train)(nn.Dense(4)(x)))


@pytest.mark.parametrize("statistics", ["batch", "stored"])
def test_an_adapter_says_itself_whether_the_examples_depend_on_each_other(statistics):
    model = Net(train=statistics == "batch")
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        variables = model.init(jax.random.key(0), X)
        loss, params = adapters.from_linen(
            model, variables, losses.cross_entropy, batch_statistics=statistics
        )
        labels = RNG.integers(0, 3, len(X))
        found = hd.Hessian(loss, params, hd.batches((X, labels), 10)).additivity()
    assert bool(found.unchecked) == (statistics == "batch")
    assert found.error <= found.allowed


def test_a_model_in_bfloat16_is_allowed_its_rounding_and_a_sum_is_not():
    def loss(w, batch):
        short = [a.astype(jnp.bfloat16) for a in batch]
        return mean(w.astype(jnp.bfloat16), short)

    found = examine(loss)
    assert 1e-6 < found.error <= found.allowed
    found = examine(lambda w, batch: loss(w, batch) * len(batch[0]))
    assert found.error > found.allowed


def test_a_loss_that_is_not_finite_is_not_a_mean():
    values = np.array([1.0, np.nan, 1.0])
    found = judge([[Split(values, np.array([2.0, 1.0, 1.0]))]], 1e-4, False)
    assert not found.error <= found.allowed
    assert found.diagnosis
