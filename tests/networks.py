"""Small networks whose Hessians are exact, and networks whose custom rules are not derivatives."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import hessdensity as hd


@dataclass(frozen=True)
class Network:
    """A loss, its parameters and batches of (inputs, labels)."""

    loss: Any
    params: Any
    batches: Any

    def hessian(self, **options):
        return hd.Hessian(self.loss, self.params, self.batches, **options)


def labelled(rows, columns, classes=4):
    rng = np.random.default_rng(0)
    inputs = rng.standard_normal((rows, columns)).astype(jnp.zeros(0).dtype)
    return hd.batches((inputs, rng.integers(0, classes, rows).astype(np.int32)), rows // 3)


def cross_entropy(logits, labels):
    chosen = jnp.take_along_axis(logits, labels[:, None], axis=1)[:, 0]
    return jnp.mean(jax.nn.logsumexp(logits, axis=1) - chosen)


def normal(rng, *shape):
    return jnp.asarray(
        rng.standard_normal(shape) / np.sqrt(np.prod(shape[:-1])), jnp.zeros(0).dtype
    )


def dense(activation, compute=None):
    rng = np.random.default_rng(1)
    params = [normal(rng, 8, 16), normal(rng, 16, 16), normal(rng, 16, 4)]

    def loss(params, batch):
        inputs, labels = batch
        dtype = compute or inputs.dtype
        h = inputs.astype(dtype)
        for kernel in params[:-1]:
            h = activation(h @ kernel.astype(dtype))
        return cross_entropy((h @ params[-1].astype(dtype)).astype(params[-1].dtype), labels)

    return Network(loss, params, labelled(90, 8))


def convolutional(activation):
    rng = np.random.default_rng(1)
    params = {"first": normal(rng, 3, 3, 1, 4), "last": normal(rng, 6 * 6 * 4, 4)}

    def loss(params, batch):
        images, labels = batch
        dims = ("NHWC", "HWIO", "NHWC")
        h = images.reshape(-1, 6, 6, 1)
        h = jax.lax.conv_general_dilated(h, params["first"], (1, 1), "SAME", dimension_numbers=dims)
        return cross_entropy(activation(h).reshape(len(images), -1) @ params["last"], labels)

    return Network(loss, params, labelled(60, 36))


def spiking(spike):
    """A recurrent network of leaky integrate-and-fire neurons, over four steps of time."""
    rng = np.random.default_rng(1)
    params = {"in": 2 * normal(rng, 8, 16), "own": normal(rng, 16, 16), "out": normal(rng, 16, 4)}

    def loss(params, batch):
        inputs, labels = batch
        potential = spikes = jnp.zeros((len(inputs), 16), inputs.dtype)
        total = jnp.zeros((len(inputs), 4), inputs.dtype)
        for _ in range(4):
            potential = 0.8 * potential * (1 - spikes)
            potential = potential + inputs @ params["in"] + spikes @ params["own"]
            spikes = spike(potential - 0.5)
            total = total + spikes @ params["out"]
        return cross_entropy(total, labels)

    return Network(loss, params, labelled(90, 8))


def slope(x):
    return 1 / (1 + jnp.abs(4 * x)) ** 2


@jax.custom_vjp
def surrogate_vjp(x):
    """A step with a smooth gradient. The forward rule is the formula, of which JAX knows that its
    derivative is zero, so that first and second derivatives do not belong to one function."""
    return (x > 0).astype(x.dtype)


surrogate_vjp.defvjp(lambda x: ((x > 0).astype(x.dtype), x), lambda x, g: (g * slope(x),))


@jax.custom_jvp
def surrogate_jvp(x):
    return (x > 0).astype(x.dtype)


surrogate_jvp.defjvp(lambda x, t: ((x[0] > 0).astype(x[0].dtype), t[0] * slope(x[0])))


@jax.custom_vjp
def scaled(x):
    """The identity, with gradients that are scaled by 0.9."""
    return x


scaled.defvjp(lambda x: (x, None), lambda _, g: (0.9 * g,))


@jax.custom_vjp
def true_tanh(x):
    """A rule that is a derivative."""
    return jnp.tanh(x)


true_tanh.defvjp(lambda x: (true_tanh(x), x), lambda x, g: (g * (1 - jnp.tanh(x) ** 2),))

HONEST = {
    "tanh": lambda: dense(jnp.tanh),
    "relu": lambda: dense(jax.nn.relu),
    "gelu": lambda: dense(jax.nn.gelu),
    "a true custom rule": lambda: dense(true_tanh),
    "convolution and relu": lambda: convolutional(jax.nn.relu),
    "convolution and gelu": lambda: convolutional(jax.nn.gelu),
}
"""Networks with Hessians."""

NOT_DERIVATIVES = {
    "gradients scaled by 0.9": lambda: dense(lambda h: scaled(jnp.tanh(h))),
    "a surrogate gradient by custom_vjp": lambda: spiking(surrogate_vjp),
    "a surrogate gradient by custom_jvp": lambda: spiking(surrogate_jvp),
}
"""Networks whose products are not symmetric, each by a rule of its own."""
