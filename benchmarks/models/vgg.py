"""The VGG-11 for CIFAR of Ghorbani, Krishnan and Xiao (2019)."""

import flax.linen as nn
import jax

LAYERS = (64, "pool", 128, "pool", 256, 256, "pool", 512, 512, "pool", 512, 512, "pool")


class VGG11(nn.Module):
    """Eight 3 x 3 convolutions with biases, five pools, two dense layers: (batch, 32, 32, 3) ->
    (batch, num_classes).

    As there, the convolutions keep their biases where BatchNorm follows, which takes them out
    again: a direction each in which the loss is flat, with the batch's statistics. Their dropout is
    left out."""

    num_classes: int = 10
    normalize: bool = False

    @nn.compact
    def __call__(self, x: jax.Array, use_running_average: bool = True) -> jax.Array:
        for layer in LAYERS:
            if layer == "pool":
                x = nn.max_pool(x, (2, 2), strides=(2, 2))
                continue
            x = nn.Conv(layer, (3, 3), kernel_init=nn.initializers.he_normal())(x)
            if self.normalize:
                x = nn.BatchNorm(use_running_average, momentum=0.9)(x)
            x = nn.relu(x)
        x = nn.Dense(256, kernel_init=nn.initializers.he_normal())(x.reshape(len(x), -1))
        return nn.Dense(self.num_classes)(nn.relu(x))
