"""LeNet-5 (LeCun, Bottou, Bengio and Haffner 1998), as it is used today."""

import flax.linen as nn
import jax


class LeNet5(nn.Module):
    """Two 5 x 5 convolutions without padding, each with a pool, and three dense layers: images ->
    (batch, num_classes).

    ReLU and maxima take the place of the original's sigmoids and averages. 28 x 28 images are
    padded to the 32 x 32 that it was made for."""

    num_classes: int = 10

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        margin = max(32 - x.shape[1], 0) // 2
        for index, channels in enumerate((6, 16)):
            padding = margin if index == 0 else 0
            x = nn.relu(nn.Conv(channels, (5, 5), padding=padding)(x))
            x = nn.max_pool(x, (2, 2), strides=(2, 2))
        x = x.reshape(len(x), -1)
        for width in (120, 84):
            x = nn.relu(nn.Dense(width)(x))
        return nn.Dense(self.num_classes)(x)
