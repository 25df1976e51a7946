"""Small models in every framework, and the layers whose Hessian is exactly a sum of squares.

The networks are piecewise linear. If the outputs are linear in a kernel W near its value, then the
Hessian of the mean cross-entropy with respect to W is its Gauss-Newton matrix.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx
from networks import normal

from hessdensity import adapters, losses

CLASSES = 3


@dataclass(frozen=True)
class Model:
    """A model, its parameters and a batch of inputs."""

    outputs: Callable[[Any, Any], Any]
    params: Any
    inputs: Any
    inexact: frozenset[str] = frozenset()
    """The layers in which the outputs are not piecewise linear."""

    @property
    def labels(self):
        return np.arange(len(self.inputs), dtype=np.int32) % CLASSES


def randomized(params):
    """Arrays of these shapes in the current precision. No bias is zero."""
    rng = np.random.default_rng(2)
    return jax.tree.map(lambda leaf: normal(rng, *leaf.shape), params)


def inputs(*shape):
    rng = np.random.default_rng(3)
    return jnp.asarray(rng.standard_normal(shape), jnp.zeros(0).dtype)


def pooled(x):
    """Rectified features, averaged over all axes between the examples and the features."""
    return jax.nn.relu(x).mean(axis=tuple(range(1, x.ndim - 1)))


# Flax linen ---------------------------------------------------------------------------------------


class MLP(linen.Module):
    @linen.compact
    def __call__(self, x):
        return linen.Dense(CLASSES)(jax.nn.relu(linen.Dense(5)(x)))


class Strided(linen.Module):
    @linen.compact
    def __call__(self, x):
        x = jax.nn.relu(linen.Conv(2, (3, 3), strides=2)(x))
        x = linen.max_pool(x, (2, 2), strides=(2, 2))
        return linen.Dense(CLASSES)(x.reshape(len(x), -1))


class Grouped(linen.Module):
    @linen.compact
    def __call__(self, x):
        x = linen.Conv(4, (2, 2), feature_group_count=2, kernel_dilation=2)(x)
        return linen.Dense(CLASSES)(pooled(x))


class DepthwiseTransposed(linen.Module):
    @linen.compact
    def __call__(self, x):
        x = jax.nn.relu(linen.Conv(4, (3, 3), feature_group_count=2, padding="VALID")(x))
        x = linen.ConvTranspose(2, (2, 2), strides=(2, 2))(x)
        return linen.Dense(CLASSES)(pooled(x))


class Block(linen.Module):
    """A layer with a residual connection, as the body of a scan."""

    @linen.compact
    def __call__(self, x, _=None):
        return x + jax.nn.relu(linen.Dense(x.shape[-1])(x)), None


class Rematerialized(linen.Module):
    @linen.compact
    def __call__(self, x):
        for _ in range(2):
            x, _ = linen.remat(Block)()(x)
        return linen.Dense(CLASSES)(x)


class Scanned(linen.Module):
    remat: bool = False
    axis: int = 0

    @linen.compact
    def __call__(self, x):
        body = linen.remat(Block, prevent_cse=False) if self.remat else Block
        layers = linen.scan(
            body, variable_axes={"params": self.axis}, split_rngs={"params": True}, length=3
        )
        x, _ = layers()(x, None)
        return linen.Dense(CLASSES)(x)


def from_linen(module, *shape):
    x = inputs(*shape)
    shapes = jax.eval_shape(module.init, jax.random.key(0), x.astype(jnp.float32))
    variables = randomized(shapes)
    loss, params = adapters.from_linen(module, variables, losses.cross_entropy)
    return Model(loss.outputs, params, x)


# Flax NNX -----------------------------------------------------------------------------------------


class NormalizedConv(nnx.Module):
    def __init__(self):
        rngs = nnx.Rngs(0)
        self.conv = nnx.Conv(2, 2, (3, 3), rngs=rngs)
        self.norm = nnx.BatchNorm(2, use_running_average=True, rngs=rngs)
        self.head = nnx.Linear(2, CLASSES, rngs=rngs)

    def __call__(self, x):
        return self.head(pooled(self.norm(self.conv(x))))


class NnxScanned(nnx.Module):
    def __init__(self):
        @nnx.split_rngs(splits=3)
        @nnx.vmap(in_axes=0, out_axes=0)
        def layers(rngs):
            return nnx.Linear(4, 4, rngs=rngs)

        self.layers = layers(nnx.Rngs(0))
        self.head = nnx.Linear(4, CLASSES, rngs=nnx.Rngs(1))

    def __call__(self, x):
        @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
        def forward(x, layer):
            return jax.nn.relu(layer(x))

        return self.head(forward(x, self.layers))


def from_nnx(make, *shape, **options):
    module = make()
    statistics = nnx.state(module, nnx.BatchStat)
    nnx.update(module, jax.tree.map(lambda leaf: 0.5 + leaf.astype(jnp.zeros(0).dtype), statistics))
    loss, params = adapters.from_nnx(module, losses.cross_entropy, **options)
    return Model(loss.outputs, randomized(params), inputs(*shape))


# Equinox and Haiku --------------------------------------------------------------------------------


def equinox():
    return pytest.importorskip("equinox", reason="Equinox is not installed")


def haiku():
    return pytest.importorskip("haiku", reason="dm-haiku is not installed")


def from_equinox(make, *shape):
    """A model of one example, which is mapped over the examples."""
    eqx = equinox()
    shapes, static = eqx.partition(
        eqx.filter_eval_shape(make), lambda leaf: isinstance(leaf, jax.ShapeDtypeStruct)
    )

    def outputs(params, x):
        return jax.vmap(eqx.combine(params, static))(x)

    return Model(outputs, randomized(shapes), inputs(*shape))


def equinox_mlp():
    return from_equinox(lambda: equinox().nn.MLP(4, CLASSES, 5, 1, key=jax.random.key(0)), 7, 4)


def equinox_conv():
    def make():
        eqx, keys = equinox(), jax.random.split(jax.random.key(0))
        return eqx.nn.Sequential(
            [
                eqx.nn.Conv2d(1, 3, 3, stride=2, key=keys[0]),
                eqx.nn.Lambda(jax.nn.relu),
                eqx.nn.Lambda(lambda x: x.max(axis=2).reshape(-1)),
                eqx.nn.Linear(9, CLASSES, key=keys[1]),
            ]
        )

    return from_equinox(make, 5, 1, 7, 7)


def haiku_conv():
    hk = haiku()

    def forward(x):
        x = jax.nn.relu(hk.Conv2D(2, 3, stride=2)(x))
        return hk.nets.MLP([4, CLASSES])(x.mean(axis=(1, 2)))

    transformed = hk.without_apply_rng(hk.transform(forward))
    x = inputs(5, 6, 6, 2)
    shapes = jax.eval_shape(transformed.init, jax.random.key(0), x)
    return Model(transformed.apply, randomized(shapes), x)


# Plain functions ----------------------------------------------------------------------------------


def plain(outputs, x, inexact=(), **shapes):
    rng = np.random.default_rng(4)
    params = {name: normal(rng, *shape) for name, shape in shapes.items()}
    return Model(outputs, params, x, frozenset(inexact))


def low_rank():
    def outputs(p, x):
        return jax.nn.relu(x @ p["w"] + x @ p["a"] @ p["b"]) @ p["head"]

    return plain(outputs, inputs(7, 4), w=(4, 5), a=(4, 2), b=(2, 5), head=(5, CLASSES))


def experts():
    def outputs(p, x):
        gates = jax.nn.softmax(x @ p["router"])
        sent = jnp.einsum("bd,be->ebd", x, gates)
        hidden = jax.nn.relu(jnp.einsum("ebd,edh->ebh", sent, p["up"]) + p["bias"][:, None])
        return jnp.einsum("ebh,eho->bo", hidden, p["down"])

    return plain(
        outputs,
        inputs(7, 3),
        inexact=["router"],
        router=(3, 2),
        up=(2, 3, 4),
        bias=(2, 4),
        down=(2, 4, CLASSES),
    )


def attention():
    def outputs(p, x):
        q, k, v = (jnp.einsum("btd,dhk->bthk", x, p[name]) for name in "qkv")
        weights = jax.nn.softmax(jnp.einsum("bthk,bshk->bhts", q, k))
        mixed = jnp.einsum("bhts,bshk->bthk", weights, v)
        x = x + jnp.einsum("bthk,hkd->btd", mixed, p["out"])
        x = x + jax.nn.relu(x @ p["up"]) @ p["down"]
        return x.mean(axis=1) @ p["head"]

    projection = dict.fromkeys("qkv", (4, 2, 2))
    return plain(
        outputs,
        inputs(5, 3, 4),
        inexact="qk",
        **projection,
        out=(2, 2, 4),
        up=(4, 6),
        down=(6, 4),
        head=(4, CLASSES),
    )


def mixed_tokens(x, q, k, v):
    """Attention with one head."""
    return jax.nn.softmax((x @ q) @ jnp.swapaxes(x @ k, 1, 2)) @ (x @ v)


def stacked_by_index():
    def outputs(p, x):
        w = p["qkv"]
        return pooled(mixed_tokens(x, w[0], w[1], w[2])) @ p["head"]

    return plain(
        outputs,
        inputs(5, 4, 3),
        inexact=["qkv[0]", "qkv[1]"],
        qkv=(3, 3, 4),
        head=(4, CLASSES),
    )


def stacked_by_split():
    def outputs(p, x):
        return pooled(mixed_tokens(x, *jnp.split(p["qkv"], 3, axis=1))) @ p["head"]

    return plain(
        outputs,
        inputs(5, 4, 3),
        inexact=["qkv[0]", "qkv[1]"],
        qkv=(3, 12),
        head=(4, CLASSES),
    )


def shared():
    """One layer for two views of an example."""

    def outputs(p, x):
        views = x, x[:, ::-1]
        return sum(jax.nn.relu(view @ p["w"] + p["b"][None]) for view in views) @ p["head"]

    return plain(outputs, inputs(7, 4), w=(4, 5), b=(5,), head=(5, CLASSES))


def transposed_kernel():
    """The kernel on the left, and a leaf that is moved on the way to its use."""

    def outputs(p, x):
        hidden = jax.nn.relu(p["w"] @ x.T)
        kernel = jnp.flip(p["head"].reshape(5, 1, CLASSES), 0)[:, 0].astype(x.dtype)
        return hidden.T @ kernel

    return plain(outputs, inputs(7, 4), w=(5, 4), head=(CLASSES * 5,))


def tokens(apply, *shape):
    """One layer for every token, applied in some layout of the axes."""

    def outputs(p, x):
        return pooled(apply(x, p["w"])) @ p["head"]

    return plain(outputs, inputs(*shape), w=(shape[-1], 4), head=(4, CLASSES))


def folded_tokens():
    """The axis of the examples is hidden in a longer one."""
    return tokens(lambda x, w: (x.reshape(-1, x.shape[-1]) @ w).reshape(*x.shape[:2], -1), 5, 4, 3)


def as_many_tokens_as_examples():
    return tokens(lambda x, w: x @ w, 5, 5, 3)


def examples_second():
    """Tokens come first, and there are as many as examples."""
    return tokens(lambda x, w: jnp.swapaxes(jnp.swapaxes(x, 0, 1) @ w, 0, 1), 5, 5, 3)


def tokens_behind_features():
    """The features of the result come before the tokens."""
    return tokens(lambda x, w: jnp.einsum("btd,dm->bmt", x, w), 5, 4, 3)


def layer_over_tokens():
    """The kernel mixes the tokens, so that the features are positions."""
    return tokens(lambda x, w: jnp.einsum("btd,tm->bdm", x, w), 5, 3, 3)


def scanned_over_tokens():
    """The steps of a scan share the layer, and are positions."""

    def outputs(p, x):
        def step(total, token):
            return total + jax.nn.relu(token @ p["w"]), None

        start = jnp.zeros((len(x), 4), x.dtype)
        total, _ = jax.lax.scan(step, start, jnp.swapaxes(x, 0, 1), reverse=True)
        return total @ p["head"]

    return plain(outputs, inputs(5, 4, 3), w=(3, 4), head=(4, CLASSES))


def one_of_two_nested_scans():
    """Two stacked layers, each of which is applied to all tokens by a scan."""

    def outputs(p, x):
        def layer(x, kernel):
            def step(_, token):
                return None, jax.nn.relu(token @ kernel)

            return jax.lax.scan(step, None, x)[1], None

        x, _ = jax.lax.scan(layer, jnp.swapaxes(x, 0, 1), p["w"])
        return x.sum(axis=0) @ p["head"]

    return plain(outputs, inputs(5, 4, 3), w=(2, 3, 3), head=(3, CLASSES))


MODELS = {
    "linen MLP": lambda: from_linen(MLP(), 7, 4),
    "strided convolution and max-pool": lambda: from_linen(Strided(), 5, 7, 7, 1),
    "grouped convolution": lambda: from_linen(Grouped(), 5, 5, 5, 4),
    "depthwise and transposed convolution": lambda: from_linen(DepthwiseTransposed(), 5, 5, 5, 2),
    "linen remat": lambda: from_linen(Rematerialized(), 7, 4),
    "linen scan": lambda: from_linen(Scanned(), 7, 3),
    "linen scan with layers on the last axis": lambda: from_linen(Scanned(axis=1), 7, 3),
    "linen scan of remat": lambda: from_linen(Scanned(remat=True), 7, 3),
    "NNX convolution and stored statistics": lambda: from_nnx(
        NormalizedConv, 5, 4, 4, 2, batch_statistics="stored"
    ),
    "NNX scan": lambda: from_nnx(NnxScanned, 7, 4),
    "Equinox MLP": equinox_mlp,
    "Equinox convolution": equinox_conv,
    "Haiku": haiku_conv,
    "LoRA": low_rank,
    "experts": experts,
    "attention": attention,
    "stacked projections by index": stacked_by_index,
    "stacked projections by split": stacked_by_split,
    "shared layer": shared,
    "transposed kernels": transposed_kernel,
    "folded tokens": folded_tokens,
    "as many tokens as examples": as_many_tokens_as_examples,
    "examples on the second axis": examples_second,
    "tokens behind features": tokens_behind_features,
    "layer over tokens": layer_over_tokens,
    "scan over tokens": scanned_over_tokens,
    "nested scans": one_of_two_nested_scans,
}
