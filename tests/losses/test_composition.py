"""Custom rules and short dtypes are read off a loss, as they stand in the user's code."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import hessdensity as hd
from hessdensity.losses.composition import Composition

W = np.ones(3, np.float32)
X = np.random.default_rng(0).standard_normal((4, 3)).astype(np.float32)


@jax.custom_vjp
def clipped(x):
    return x


clipped.defvjp(lambda x: (x, None), lambda _, g: (jnp.clip(g, -1.0, 1.0),))


@jax.custom_jvp
def spike(x):
    return (x > 0).astype(x.dtype)


spike.defjvp(lambda x, t: (spike(*x), t[0] * jax.nn.sigmoid(x[0])))


def composition(activation, **options):
    return hd.Hessian(
        lambda w, x: jnp.mean(activation(x @ w) ** 2), jnp.asarray(W), [X], **options
    ).composition()


@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit, jax.checkpoint, jax.vmap])
def test_a_users_custom_rules_are_named_with_their_places(wrap):
    found = composition(wrap(lambda h: clipped(spike(h))))
    assert [rule.split(":")[0] for rule in found.rules] == [
        "clipped (test_composition.py",
        "spike (test_composition.py",
    ]
    assert "clipped (test_composition.py:" in found.explain()


def test_rules_inside_of_loops_are_found():
    def steps(h):
        return jax.lax.fori_loop(0, 3, lambda _, h: spike(h), h)

    assert len(composition(steps).rules) == 1


@pytest.mark.parametrize(
    "activation", [jax.nn.relu, jax.nn.gelu, jax.nn.softmax, jax.nn.silu, jax.nn.relu6]
)
def test_the_rules_of_jax_itself_are_true_derivatives(activation):
    assert composition(activation) == Composition(epsilon=np.finfo(np.float32).eps)


@pytest.mark.parametrize("short", ["bfloat16", "float16"])
def test_a_short_dtype_inside_of_the_model_is_found(short):
    found = composition(lambda h: jnp.tanh(h.astype(short)).astype(jnp.float32))
    assert found.short == (short,)
    assert found.epsilon == float(jnp.finfo(short).eps)
    assert short in found.explain()


@pytest.mark.parametrize("precision", ["default", None])
def test_a_lowered_precision_of_matrix_products_is_as_coarse_as_bfloat16(precision):
    found = composition(jnp.tanh, precision=precision)
    assert found.short == (f"precision={precision!r}",)
    assert found.epsilon == float(jnp.finfo(jnp.bfloat16).eps)


def test_what_rounding_explains_follows_the_shortest_dtype():
    double, single = (jax.ShapeDtypeStruct((3,), dtype) for dtype in (np.float64, np.float32))
    assert Composition().tolerance(double) == 1e-9
    assert Composition().tolerance(single) == 1e-3
    assert Composition(epsilon=1e-7).tolerance(double) == 1e-3
    assert Composition(short=("bfloat16",), epsilon=2**-7).tolerance(single) == 2**-5


def test_float8_does_not_excuse_every_mistake():
    found = composition(lambda h: h.astype(jnp.float8_e4m3fn).astype(jnp.float32))
    assert found.epsilon == float(jnp.finfo(jnp.bfloat16).eps)
