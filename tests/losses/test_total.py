"""What a loss may return, and the usual losses beside their formulas."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy.special import logsumexp

import hessdensity as hd
from hessdensity import losses

RNG = np.random.default_rng(0)
X = RNG.standard_normal((9, 4)).astype(np.float32)
Y = RNG.standard_normal(9).astype(np.float32)
W = np.array([0.5, -1.0, 0.25, 0.75], np.float32)
SIZES = [4, 4, 1]
CUTS = np.cumsum(SIZES)[:-1]
EVEN = np.ones(9)


def per_example(w, x, y):
    return (jnp.tanh(x @ w) - y) ** 2


def mean_loss(w, batch):
    return jnp.mean(per_example(w, *batch))


def cut(*arrays):
    return list(zip(*(np.split(array, CUTS) for array in arrays), strict=True))


def exact(weights=EVEN):
    """(value, gradient, Hessian) of the weighted mean over all nine examples, by hand and in
    float64."""
    x, t = X.astype(float), np.tanh(X.astype(float) @ W)
    slope, gap = 1 - t**2, t - Y
    value, first, second = gap**2, 2 * gap * slope, 2 * slope**2 - 4 * gap * t * slope
    sums = weights @ value, x.T @ (weights * first), x.T @ ((weights * second)[:, None] * x)
    return [part / weights.sum() for part in sums]


def assert_right(hessian, weights=EVEN):
    """Its dense matrix, its gradient and the loss that it reports are the exact ones."""
    value, gradient, matrix = exact(weights)
    for _ in range(2):
        np.testing.assert_allclose(hd.dense(hessian), matrix, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(hessian.gradient(), gradient, rtol=1e-5, atol=1e-6)
    assert hessian.describe()["loss"] == pytest.approx(value, rel=1e-5)
    assert hessian.describe()["num_examples"] == pytest.approx(weights.sum(), rel=1e-6)


# Means and totals ---------------------------------------------------------------------------------

EXAMPLES = {
    "all": EVEN,
    "ragged": np.array([1, 0, 1, 1, 0, 0, 1, 0, 1.0]),
    "one batch masked": np.array([1, 1, 0, 1, 0, 0, 0, 0, 1.0]),
    "fractional": np.array([0.5, 0.25, 2, 0, 1.75, 0.1, 3, 1, 0.3]),
}


@pytest.mark.parametrize("weights", EXAMPLES.values(), ids=EXAMPLES)
def test_a_total_is_divided_by_the_count_of_all_batches_together(weights):
    def loss(w, batch):
        x, y, weight = batch
        return hd.Total(jnp.sum(weight * per_example(w, x, y)), jnp.sum(weight))

    assert_right(hd.Hessian(loss, W, cut(X, Y, weights.astype(np.float32))), weights)


def test_a_mean_is_weighted_by_the_length_of_its_batch():
    assert_right(hd.Hessian(mean_loss, W, cut(X, Y)))


def test_a_total_of_a_count_that_is_a_python_number_is_as_good():
    hessian = hd.Hessian(
        lambda w, batch: hd.Total(jnp.sum(per_example(w, *batch)), len(batch[0])), W, cut(X, Y)
    )
    assert_right(hessian)
    assert hessian.describe()["num_examples"] == 9


def test_a_count_that_depends_on_the_parameters_is_held_fixed():
    hessian = hd.Hessian(
        lambda w, batch: hd.Total(jnp.sum(per_example(w, *batch)), jnp.sum(w**2)), W, [(X, Y)]
    )
    count = np.sum(W.astype(float) ** 2)
    np.testing.assert_allclose(hd.dense(hessian), exact()[2] * 9 / count, rtol=1e-5, atol=1e-6)


# What is refused ----------------------------------------------------------------------------------


REFUSED = {
    "a tuple": (
        lambda w, b: (mean_loss(w, b), 0.5),
        r"returned a tuple.*hd\.Total\(sum, count\).*has_aux=True",
    ),
    "a dict": (lambda w, b: {"loss": mean_loss(w, b)}, r"returned a dict.*hd\.Total\(sum, count\)"),
    "None": (lambda w, b: None, "returned a NoneType; expected the batch's mean loss"),
    "a vector": (
        lambda w, b: per_example(w, *b),
        r"returned shape \(9,\); expected a scalar: take the mean",
    ),
    "an integer": (
        lambda w, b: jnp.sum(b[1] > 0),
        "returned dtype int32; expected a real floating-point scalar",
    ),
    "a complex number": (
        lambda w, b: mean_loss(w, b) * (1 + 0j),
        "returned dtype complex64; expected a real",
    ),
    "a total of vectors": (
        lambda w, b: hd.Total(per_example(w, *b), 9),
        r"whose sum is shape \(9,\); expected a scalar",
    ),
    "a vector of counts": (lambda w, b: hd.Total(mean_loss(w, b), b[1]), r"count.* shape \(9,\)"),
    "a total without a sum": (lambda w, b: hd.Total(None, 9), "sum"),
    "a total without a count": (lambda w, b: hd.Total(mean_loss(w, b), None), "count"),
    "sum and count exchanged": (
        lambda w, b: hd.Total(9, mean_loss(w, b)),
        "whose sum is int32; expected a real",
    ),
}


@pytest.mark.parametrize(("loss", "sentence"), REFUSED.values(), ids=REFUSED)
def test_a_loss_that_is_neither_a_mean_nor_a_total_is_refused(loss, sentence):
    hessian = hd.Hessian(loss, W, [(X, Y)])
    with jax.numpy_dtype_promotion("standard"), pytest.raises(TypeError, match=sentence):
        hessian @ W


def test_a_loss_that_is_no_function_is_refused():
    with pytest.raises(
        TypeError, match=r"loss is a float; expected a function loss\(params, batch\)"
    ):
        hd.Hessian(0.5, W, [(X, Y)])


def test_a_mean_over_a_batch_of_unknown_length_is_refused_and_a_total_of_it_is_not():
    data = [{"x": X, "y": Y, "temperature": np.float32(2)}]

    def mean(w, batch):
        return mean_loss(w, (batch["x"], batch["y"])) / batch["temperature"]

    with pytest.raises(
        ValueError, match=r"no common leading axis.*'temperature': None.*return hd\.Total"
    ):
        hd.Hessian(mean, W, data) @ W
    total = hd.Hessian(lambda w, batch: hd.Total(9 * mean(w, batch), 9), W, data)
    np.testing.assert_allclose(2 * (total @ W), exact()[2] @ W, rtol=1e-5)


def test_counts_that_add_up_to_nothing_are_refused():
    hessian = hd.Hessian(lambda w, b: hd.Total(0 * mean_loss(w, b), 0), W, [(X, Y)])
    with pytest.raises(ValueError, match="counts of all batches add up to 0"):
        hessian @ W


# Losses on outputs --------------------------------------------------------------------------------

LOGITS = RNG.standard_normal((6, 5)).astype(np.float32)
LABELS = np.array([0, 4, 2, 2, 1, 3])
ONE_HOT = np.eye(5, dtype=np.float32)[LABELS]


def log_softmax(logits):
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


@pytest.mark.parametrize("labels", [LABELS, ONE_HOT], ids=["integers", "one-hot"])
def test_cross_entropy_is_minus_the_mean_log_probability_of_the_labels(labels):
    expected = -np.mean(log_softmax(LOGITS.astype(float))[np.arange(6), LABELS])
    value = losses.cross_entropy(jnp.asarray(LOGITS), jnp.asarray(labels))
    assert float(value) == pytest.approx(expected, rel=1e-6)
    assert float(value) == pytest.approx(
        float(optax.softmax_cross_entropy(LOGITS, ONE_HOT).mean()), rel=1e-6
    )


def test_the_hessian_of_cross_entropy_is_the_covariance_of_the_classes():
    probability = np.exp(log_softmax(LOGITS.astype(float)[0]))
    hessian = hd.Hessian(losses.cross_entropy, LOGITS[:1], [LABELS[:1]])
    np.testing.assert_allclose(
        hd.dense(hessian), np.diag(probability) - np.outer(probability, probability), atol=1e-6
    )


def test_soft_labels_are_weighed():
    soft = np.full((6, 5), 0.2, np.float32)
    expected = -np.mean(log_softmax(LOGITS.astype(float)))
    assert float(losses.cross_entropy(jnp.asarray(LOGITS), soft)) == pytest.approx(
        expected, rel=1e-6
    )


@pytest.mark.parametrize("labels", [LABELS[:, None], LABELS[:4]], ids=["a column", "too few"])
def test_labels_that_fit_neither_way_are_refused_and_not_broadcast(labels):
    # A column of integers times the logits is summed over the classes by broadcasting, without a
    # complaint.
    with jax.numpy_dtype_promotion("standard"), pytest.raises(ValueError, match=r"labels \("):
        losses.cross_entropy(jnp.asarray(LOGITS), jnp.asarray(labels))


def test_mean_squared_error_is_the_mean_over_examples_and_outputs_without_a_half():
    targets = RNG.standard_normal((6, 5)).astype(np.float32)
    expected = np.mean((LOGITS.astype(float) - targets) ** 2)
    assert float(
        losses.mean_squared_error(jnp.asarray(LOGITS), jnp.asarray(targets))
    ) == pytest.approx(expected)
    hessian = hd.Hessian(losses.mean_squared_error, LOGITS, [targets])
    np.testing.assert_allclose(hd.dense(hessian), 2 / 30 * np.eye(30), atol=1e-6)


def test_predictions_that_would_be_broadcast_against_the_targets_are_refused():
    with pytest.raises(
        ValueError, match=r"predictions \(6, 1\) and targets \(6,\) differ in shape.*reshape"
    ):
        losses.mean_squared_error(jnp.ones((6, 1)), jnp.ones(6))


# Tokens -------------------------------------------------------------------------------------------

TOKENS = RNG.integers(0, 7, (5, 6))
MASK = np.arange(6) < np.array([6, 2, 4, 1, 5])[:, None]  # sequences of different lengths, padded


def by_hand(logits, tokens, mask):
    """(sum, count) over the tokens after the first of each sequence that count, in a plain double
    loop."""
    total, count = 0.0, 0
    for row, sequence in enumerate(tokens):
        for place in range(1, len(sequence)):
            if mask[row, place]:
                total -= logits[row, place - 1, sequence[place]] - logsumexp(logits[row, place - 1])
                count += 1
    return total, count


@pytest.mark.parametrize("kind", [bool, np.int32, np.float32])
def test_next_token_cross_entropy_is_a_total_over_the_tokens_that_count(kind):
    logits = RNG.standard_normal((5, 6, 7)).astype(np.float32)
    total = losses.next_token_cross_entropy(
        jnp.asarray(logits), jnp.asarray(TOKENS), jnp.asarray(MASK.astype(kind))
    )
    expected, count = by_hand(logits, TOKENS, MASK)
    assert isinstance(total, hd.Total)
    assert float(total.sum) == pytest.approx(float(expected), rel=1e-5)
    assert int(total.count) == count == MASK[:, 1:].sum()
    everything = losses.next_token_cross_entropy(jnp.asarray(logits), jnp.asarray(TOKENS))
    assert int(everything.count) == 25
    assert float(everything.sum) == pytest.approx(
        float(by_hand(logits, TOKENS, np.ones_like(MASK))[0]), rel=1e-5
    )


def test_padding_weighs_nothing_however_the_sequences_are_cut_into_batches():
    table = 0.3 * RNG.standard_normal((7, 7))  # a bigram model: logits are the rows of a table

    def loss(table, batch):
        tokens, mask = batch
        return losses.next_token_cross_entropy(table[tokens], tokens, mask)

    with jax.enable_x64(True):
        parts = [(TOKENS[:3], MASK[:3]), (TOKENS[3:4], MASK[3:4]), (TOKENS[4:], MASK[4:])]
        estimate = hd.dense(hd.Hessian(loss, table, parts))
        # Given token a, the Hessian of -log softmax(table[a])[b] is the covariance of the classes,
        # whatever b.
        follow = np.zeros(7)
        np.add.at(follow, TOKENS[:, :-1][MASK[:, 1:]], 1)
        probability = np.exp(log_softmax(table))
        blocks = [
            f * (np.diag(p) - np.outer(p, p)) / follow.sum()
            for f, p in zip(follow, probability, strict=True)
        ]
        np.testing.assert_allclose(estimate, jax.scipy.linalg.block_diag(*blocks), atol=1e-12)


# Losses of whole batches --------------------------------------------------------------------------


class Model:
    """An object whose method, or which itself, is a loss."""

    def __init__(self, whole):
        self.whole_batch = whole

    def loss(self, w, batch):
        return mean_loss(w, batch)

    __call__ = loss


def declared(w, batch):
    return mean_loss(w, batch)


declared.whole_batch = True

WHOLE = {
    "a function": declared,
    "a method": Model(True).loss,
    "an object": Model(True),
    "a partial function": functools.partial(declared),
    "jit": jax.jit(declared),
    "jit of a method": jax.jit(Model(True).loss),
    "jit of an object": jax.jit(Model(True)),
    "jit of a partial method": jax.jit(functools.partial(Model(True).loss)),
    "a partial of jit of a method": functools.partial(jax.jit(Model(True).loss)),
    "a pytree partial of a method": jax.tree_util.Partial(Model(True).loss),
    "checkpoint of jit of a method": jax.checkpoint(jax.jit(Model(True).loss)),
}


@pytest.mark.parametrize("loss", WHOLE.values(), ids=WHOLE)
def test_whole_batch_is_seen_through_everything_that_wraps_a_loss(loss):
    assert hd.Hessian(loss, W, [(X, Y)]).risk.whole_batch
    with pytest.raises(ValueError, match="microbatch=2, but the loss says that its batches must"):
        hd.Hessian(loss, W, [(X, Y)], microbatch=2)


@pytest.mark.parametrize(
    "loss", [mean_loss, jax.jit(mean_loss), Model(False).loss, jax.jit(Model(False)), np.sum]
)
def test_a_loss_that_does_not_say_so_may_be_cut(loss):
    assert not hd.Hessian(loss, W, [(X, Y)], microbatch=2).risk.whole_batch


def test_the_outermost_layer_decides():
    outer = functools.partial(Model(True).loss)
    outer.whole_batch = False
    assert not hd.Hessian(outer, W, [(X, Y)], microbatch=2).risk.whole_batch
