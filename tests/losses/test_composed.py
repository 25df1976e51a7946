"""A composed loss is a loss like any other, whose two parts stay in reach."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import hessdensity as hd
from hessdensity import losses
from hessdensity.losses import composed

RNG = np.random.default_rng(0)
X = RNG.standard_normal((9, 4)).astype(np.float32)
LABELS = RNG.integers(0, 3, 9).astype(np.int32)
W = jnp.asarray(RNG.standard_normal((4, 3)), jnp.float32)
BATCHES = [(X[:5], LABELS[:5]), (X[5:], LABELS[5:])]


def model(w, x):
    return jnp.tanh(x @ w)


def scaled(scale, w, x):
    return scale * model(w, x)


def plain(w, batch):
    return losses.cross_entropy(model(w, batch[0]), batch[1])


def test_it_has_the_value_and_the_hessian_of_the_plain_loss():
    loss = hd.compose(model, losses.cross_entropy)
    assert float(loss(W, BATCHES[0])) == float(plain(W, BATCHES[0]))
    vector = jnp.ones_like(W)
    product = hd.Hessian(loss, W, BATCHES) @ vector
    np.testing.assert_array_equal(product, hd.Hessian(plain, W, BATCHES) @ vector)


def test_masks_are_further_targets():
    logits = jnp.asarray(RNG.standard_normal((2, 4, 5)), jnp.float32)
    tokens = RNG.integers(0, 5, (2, 4)).astype(np.int32)
    mask = np.array([[1, 1, 1, 0], [1, 1, 0, 0]], bool)
    loss = hd.compose(lambda p, x: p * x, losses.next_token_cross_entropy)
    total = loss(jnp.ones(()), (logits, tokens, mask))
    expected = losses.next_token_cross_entropy(logits, tokens, mask)
    assert isinstance(total, hd.Total)
    assert (float(total.sum), int(total.count)) == (float(expected.sum), 3)


def test_held_arrays_of_the_model_are_leaves_and_the_criterion_is_static():
    loss = hd.compose(jax.tree_util.Partial(scaled, jnp.asarray(2.0)), losses.cross_entropy)
    leaves, structure = jax.tree.flatten(loss)
    assert [float(leaf) for leaf in leaves] == [2.0]
    again = jax.tree.unflatten(structure, [jnp.asarray(3.0)])
    assert again.criterion is losses.cross_entropy
    np.testing.assert_allclose(again.outputs(W, X), 3 * model(W, X), rtol=1e-6)
    assert structure != jax.tree.structure(hd.compose(loss.outputs, losses.mean_squared_error))


@pytest.mark.parametrize("part", ["outputs", "criterion"])
def test_a_model_or_criterion_of_whole_batches_makes_a_loss_of_whole_batches(part):
    def normalized(w, x):
        return model(w, x - x.mean(0, keepdims=True))

    def contrast(outputs, labels):
        return losses.cross_entropy(outputs - outputs.mean(0, keepdims=True), labels)

    functions = {"outputs": normalized, "criterion": contrast}
    functions[part].whole_batch = True
    assert hd.compose(**functions).whole_batch
    del functions[part].whole_batch
    assert not hd.compose(**functions).whole_batch


def test_a_bound_loss_stays_composed_exactly_if_it_was():
    def doubled(loss, shift, w, batch):
        return loss(2 * w + shift, batch)

    shift = jnp.full_like(W, 0.5)
    for loss in (hd.compose(model, losses.cross_entropy), plain):
        bound = composed.bind(doubled, loss, shift)
        assert isinstance(bound, hd.ComposedLoss) == isinstance(loss, hd.ComposedLoss)
        assert float(bound(W, BATCHES[0])) == float(loss(2 * W + shift, BATCHES[0]))


@pytest.mark.parametrize("where", [None, "kernel", lambda path: path == "bias"])
def test_a_selection_of_leaves_keeps_the_parts(where):
    def affine(p, x):
        return x @ p["kernel"] + p["bias"][None]

    params = {"bias": jnp.ones(3), "kernel": W}
    risk = hd.EmpiricalRisk(hd.compose(affine, losses.cross_entropy), params, BATCHES, where=where)
    assert risk.loss.criterion is losses.cross_entropy
    np.testing.assert_array_equal(risk.loss.outputs(risk.params, X), affine(params, X))


class Unhashable:
    __hash__ = None

    def __call__(self, *arguments):
        return 0.0


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((3, losses.cross_entropy), r"outputs is a int; expected a function outputs\(params, inp"),
        ((model, "mse"), r"criterion is a str; expected a function criterion\(outputs, \*targets"),
        ((Unhashable(), losses.cross_entropy), "outputs is a Unhashable that cannot be hashed"),
        ((model, Unhashable()), "criterion is a Unhashable that cannot be hashed"),
    ],
)
def test_parts_that_are_not_functions_are_refused(arguments, said):
    with pytest.raises(TypeError, match=said):
        hd.compose(*arguments)


@pytest.mark.parametrize("batch", [X, {"x": X, "y": LABELS}])
def test_a_batch_without_places_for_inputs_and_targets_is_refused(batch):
    loss = hd.compose(model, losses.cross_entropy)
    with pytest.raises(TypeError, match=r"a batch is a \w+; this loss expects \(inputs, targets\)"):
        loss(W, batch)
    with pytest.raises(TypeError, match="this loss expects"):
        hd.Hessian(loss, W, [batch]) @ W
