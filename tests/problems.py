"""Small losses with dense Hessians to compare with."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree


def mlp(dtype, examples=64, seed=0):
    """(loss, params, (x, y)) of a 6-5-3 tanh network, 55 weights, with a leaf that the loss does
    not use."""
    rng = np.random.default_rng(seed)

    def array(*shape):
        return jnp.asarray(rng.standard_normal(shape), dtype)

    params = {
        "first": {"kernel": array(6, 5), "bias": array(5)},
        "second": {"kernel": array(5, 3), "bias": array(3)},
        "unused": array(2),
    }
    batch = array(examples, 6), jnp.asarray(rng.integers(0, 3, examples), jnp.int32)
    return mean_loss, params, batch


def logits_of(params, x):
    hidden = jnp.tanh(x @ params["first"]["kernel"] + params["first"]["bias"][None])
    return hidden @ params["second"]["kernel"] + params["second"]["bias"][None]


def example_losses(params, batch):
    x, y = batch
    log_probabilities = jax.nn.log_softmax(logits_of(params, x))
    return -jnp.take_along_axis(log_probabilities, y[:, None], axis=1)[:, 0]


def mean_loss(params, batch):
    return example_losses(params, batch).mean()


def dense_hessian(loss, params, batch):
    """(n, n) by jax.hessian of the whole, leaves in tree order."""
    flat, unravel = ravel_pytree(params)
    return np.asarray(jax.hessian(lambda x: loss(unravel(x), batch))(flat), float)
