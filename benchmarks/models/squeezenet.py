"""SqueezeNet 1.1 (Iandola and others 2016), for weights trained on ImageNet; submodules bear the
weights' names."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

CHANNEL_MEAN = np.array([104, 117, 123], np.float32)  # blue, green, red

# (width of the squeeze, width of each of the two expansions), by the number in the layer's name
FIRES = {
    2: (16, 64),
    3: (16, 64),
    4: (32, 128),
    5: (32, 128),
    6: (48, 192),
    7: (48, 192),
    8: (64, 256),
    9: (64, 256),
}
POOLED = (3, 5)  # the layers that a pool follows


class Fire(nn.Module):
    """A 1 x 1 convolution to few channels, then 1 x 1 and 3 x 3 ones side by side: (..., c) ->
    (..., 2 expanded)."""

    squeezed: int
    expanded: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = nn.relu(nn.Conv(self.squeezed, (1, 1), name="squeeze1x1")(x))
        left = nn.Conv(self.expanded, (1, 1), name="expand1x1")(x)
        right = nn.Conv(self.expanded, (3, 3), padding=1, name="expand3x3")(x)
        return nn.relu(jnp.concatenate([left, right], axis=-1))


class SqueezeNet(nn.Module):
    """Convolutions with biases and no normalization, 1,235,496 weights: (batch, h, w, 3) -> (batch,
    num_classes)."""

    num_classes: int = 1000

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = nn.relu(nn.Conv(64, (3, 3), strides=2, padding=0, name="conv1")(x))
        x = _pool(x)
        for number, widths in FIRES.items():
            x = Fire(*widths, name=f"fire{number}")(x)
            if number in POOLED:
                x = _pool(x)
        return nn.relu(nn.Conv(self.num_classes, (1, 1), name="conv10")(x)).mean(axis=(1, 2))


def _pool(x: jax.Array) -> jax.Array:
    """Maxima of 3 x 3 at stride 2, the last window reaching over the far side: the number of them
    is rounded up."""
    return nn.max_pool(x, (3, 3), strides=(2, 2), padding=((0, 1), (0, 1)))


def normalize(images: jax.Array) -> jax.Array:
    """Images (..., 3), red green blue of 0 to 255, as the float32 inputs the trained weights
    expect."""
    return jnp.asarray(images, jnp.float32)[..., ::-1] - CHANNEL_MEAN
