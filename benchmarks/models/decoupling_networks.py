"""The networks of Wu, Zhu, Wu, Wang and Ge (2020), with and without their batch normalization.

There, BatchNorm comes after each ReLU instead of before it, and has neither scales nor shifts. So
the inputs of the next layer have a mean of about 0.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import flax.linen as nn
import jax

# PyTorch's default: uniform between +-1 / sqrt(inputs). The paper's text says Xavier and calls it
# PyTorch's default. The largest eigenvalue of E[M] of LeNet-5's fc1 at initialization decides it:
# 3.75e-3 in the paper's figure, 3.2e-3 with this initialization and 7.8e-2 with Xavier's.
INITIALIZER = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")
Dense = partial(nn.Dense, kernel_init=INITIALIZER)
Conv = partial(nn.Conv, kernel_init=INITIALIZER)


def _activation(normalize: bool, use_running_average: bool) -> Callable[[jax.Array], jax.Array]:
    """A ReLU, and BatchNorm behind it if ``normalize`` is true."""

    def apply(x: jax.Array) -> jax.Array:
        x = nn.relu(x)
        if not normalize:
            return x
        return nn.BatchNorm(use_running_average, momentum=0.9, use_scale=False, use_bias=False)(x)

    return apply


class FullyConnected(nn.Module):
    """F-200^2 and its kin: dense layers of the given widths, of which the last gives the logits."""

    widths: Sequence[int] = (200, 200, 10)
    normalize: bool = False

    @nn.compact
    def __call__(self, x: jax.Array, use_running_average: bool = True) -> jax.Array:
        activation = _activation(self.normalize, use_running_average)
        x = x.reshape(len(x), -1)
        *hidden, classes = self.widths
        for index, width in enumerate(hidden, start=1):
            x = activation(Dense(width, name=f"fc{index}")(x))
        return Dense(classes, name=f"fc{len(self.widths)}")(x)


class LeNet5(nn.Module):
    """Two 5 x 5 convolutions without padding, each with a pool, and three dense layers."""

    normalize: bool = False
    num_classes: int = 10

    @nn.compact
    def __call__(self, x: jax.Array, use_running_average: bool = True) -> jax.Array:
        activation = _activation(self.normalize, use_running_average)
        for index, channels in enumerate((6, 16), start=1):
            conv = Conv(channels, (5, 5), padding="VALID", name=f"conv{index}")
            x = nn.max_pool(activation(conv(x)), (2, 2), strides=(2, 2))
        x = x.reshape(len(x), -1)
        for index, width in enumerate((120, 84), start=1):
            x = activation(Dense(width, name=f"fc{index}")(x))
        return Dense(self.num_classes, name="fc3")(x)


class VGG11(nn.Module):
    """VGG-11 of one width: eight 3 x 3 convolutions, five pools and a dense layer."""

    width: int = 48
    normalize: bool = False
    num_classes: int = 10

    @nn.compact
    def __call__(self, x: jax.Array, use_running_average: bool = True) -> jax.Array:
        activation = _activation(self.normalize, use_running_average)
        for index in range(1, 9):
            x = activation(Conv(self.width, (3, 3), padding=1, name=f"conv{index}")(x))
            if index in (1, 2, 4, 6, 8):
                x = nn.max_pool(x, (2, 2), strides=(2, 2))
        return Dense(self.num_classes, name="fc1")(x.reshape(len(x), -1))


class ResNet18(nn.Module):
    """ResNet-18 for CIFAR with the same width everywhere: four stages of two residual blocks.

    A block that halves the image has a 1 x 1 convolution as its shortcut.
    """

    width: int = 48
    normalize: bool = False
    num_classes: int = 10

    @nn.compact
    def __call__(self, x: jax.Array, use_running_average: bool = True) -> jax.Array:
        activation = _activation(self.normalize, use_running_average)
        conv = partial(Conv, self.width)
        x = activation(conv((3, 3), padding=1, name="conv1")(x))
        for block in range(8):
            stride = 2 if block in (2, 4, 6) else 1
            first, second = f"conv{2 * block + 2}", f"conv{2 * block + 3}"
            y: Any = activation(conv((3, 3), padding=1, strides=stride, name=first)(x))
            y = conv((3, 3), padding=1, name=second)(y)
            if stride > 1:
                x = conv((1, 1), strides=stride, name=f"shortcut{block // 2}")(x)
            x = activation(x + y)
        return Dense(self.num_classes, name="fc1")(x.mean(axis=(1, 2)))
