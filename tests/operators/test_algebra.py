"""Wrappers and principal blocks forward all that an operator knows."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import hessdensity as hd
from hessdensity.operators.algebra import CountingOperator, Wrapper
from hessdensity.operators.protocol import OPTIONAL_MEMBERS
from hessdensity.runs import run as run_module
from hessdensity.runs.memory import Free


def loss(params, batch):
    x, y = batch
    return jnp.mean((jnp.tanh(x @ params["a"]) @ params["b"] - y) ** 2)


def problem(inputs=6, hidden=5, examples=40):
    rng = np.random.default_rng(0)
    params = {
        "a": jnp.asarray(rng.standard_normal((inputs, hidden)), jnp.float32),
        "b": jnp.asarray(rng.standard_normal(hidden), jnp.float32),
    }
    x = rng.standard_normal((examples, inputs)).astype(np.float32)
    return params, [(x, rng.standard_normal(examples).astype(np.float32))]


def hessian(scale=1.0, **settings):
    params, data = problem()
    return hd.Hessian(loss, jax.tree.map(lambda leaf: scale * leaf, params), data, **settings)


class Plain:
    """An operator with the two required members alone."""

    def __init__(self):
        self.like = {
            "a": jax.ShapeDtypeStruct((6, 5), jnp.float32),
            "b": jax.ShapeDtypeStruct((5,), jnp.float32),
        }

    def __matmul__(self, block):
        return jax.tree.map(lambda leaf: 2 * leaf, block)


@pytest.mark.parametrize("name", OPTIONAL_MEMBERS)
def test_a_wrapper_has_an_optional_member_if_and_only_if_its_operator_has_it(name):
    wrappers = [Wrapper, lambda operator: CountingOperator(operator, lambda count: None)]
    for wrap in wrappers:
        # A block of the wrapped operator would lose what the wrapper does.
        assert hasattr(wrap(hessian()), name) == (name != "restrict")
        assert hasattr(wrap(wrap(hessian())), name) == (name != "restrict")
        assert hasattr(wrap(Plain()), name) == (name == "describe")
    with pytest.raises(AttributeError, match="'Wrapper' object has no attribute 'like_this'"):
        Wrapper(hessian()).like_this  # noqa: B018


def test_products_are_counted_in_vectors_and_singles_stay_single(key):
    counts, operator = [], hessian()
    counting = CountingOperator(operator, counts.append)
    vector = jax.tree.map(jnp.ones_like, operator.params)
    block = jax.tree.map(lambda leaf: jnp.stack([leaf] * 3), vector)
    for vectors in (vector, block):
        ours, theirs = counting @ vectors, operator @ vectors
        jax.tree.map(np.testing.assert_array_equal, ours, theirs)
    assert counts == [1, 3]


@pytest.mark.parametrize("whole", [hessian, lambda: Wrapper(hessian())], ids=["own", "forwarded"])
def test_a_principal_block_of_a_hessian_is_its_where(whole):
    block, alone = hd.Restricted(whole(), "a"), hessian(where="a")
    np.testing.assert_allclose(hd.dense(block), hd.dense(alone), atol=1e-6)
    np.testing.assert_allclose(block.gradient()["a"], alone.gradient()["a"], atol=1e-6)
    assert block.gradient()["b"] is None
    assert block.temporary_bytes(2) > 0
    assert block.describe()["restricted_to"] == ["a"]


def test_a_padded_block_selects_parameters_and_gradients():
    block, alone = hd.Restricted(Wrapper(hessian()), "a"), hessian(where="a")
    np.testing.assert_allclose(hd.dense(block), hd.dense(alone), atol=1e-6)
    offset = {"a": jnp.ones((6, 5)), "b": None}
    for arguments in ((), (offset,)):
        ours, theirs = block.gradient(*arguments), alone.gradient(*arguments)
        np.testing.assert_allclose(ours["a"], theirs["a"], atol=1e-6)
        assert ours["b"] is None
    assert block.params["b"] is None
    assert not hasattr(block, "restrict")


def test_verification_sees_through_a_principal_block(key):
    found = hd.verify_operator(hd.Restricted(hessian(), "a"), key)
    assert bool(found)
    assert len(found.checks) == 5  # with the gradient and the loss of the operator inside


def test_a_track_over_a_principal_block_is_that_of_its_where(key):
    settings = {"rank": 3, "num_steps": 5, "deflation_steps": 6, "progress": False}
    points = [(0, 1.0), (1, 1.2)]
    block = hd.track(lambda scale: hd.Restricted(hessian(scale), "a"), points, key, **settings)
    alone = hd.track(lambda scale: hessian(scale, where="a"), points, key, **settings)
    assert np.isfinite(block.concentrations).all()
    np.testing.assert_array_equal(block.concentrations, alone.concentrations)
    np.testing.assert_array_equal(block.gradient_norms, alone.gradient_norms)
    np.testing.assert_array_equal(block.values, alone.values)


def test_the_planner_inside_of_a_track_chooses_as_outside(key, monkeypatch):
    """26 MB are free, and the activations need 24: no basis fits beside them."""
    params, data = problem(inputs=200, hidden=100, examples=12_000)
    operator = hd.Hessian(loss, params, data)
    assert 23e6 < operator.temporary_bytes(2) < 24.5e6
    settings = {"num_steps": 3, "deflation_steps": 60, "progress": False}
    monkeypatch.setattr(run_module, "free_memory", lambda like: Free(26_000_000, 10**10))
    outside = hd.spectral_density(operator, key, **settings)
    track = hd.track(
        lambda params: hd.Hessian(loss, params, data),
        [(0, params)],
        key,
        rank=1,
        block_size=1,
        **settings,
    )
    assert outside.description["basis"] == "none"
    assert track.densities[0].description["basis"] == "none"


def test_a_principal_block_of_a_wrapper_keeps_what_the_wrapper_does():
    class Damped(Wrapper):
        def __matmul__(self, block):
            return jax.tree.map(lambda x, y: x + 10 * y, self._operator @ block, block)

    damped = Damped(hessian())
    whole = hd.dense(damped)
    block = hd.dense(hd.Restricted(damped, "a"))
    np.testing.assert_allclose(block, whole[:30, :30], atol=1e-5)
