"""The CIFAR ResNet of He and others (2016), any part of it left out at will.

Submodules bear PyTorch's names (`layer1.0.conv1` is `layer1_0/conv1`), so that reading weights is a
renaming."""

from collections.abc import Callable
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.models.weights import load_weights as load_weights

CHANNEL_MEAN = np.array([0.485, 0.456, 0.406], np.float32)
CHANNEL_STD = np.array([0.229, 0.224, 0.225], np.float32)

# Padding 1 and not "SAME": at stride 2 "SAME" pads only the far side, and the trained filters would
# see shifted images.
convolution = partial(nn.Conv, kernel_size=(3, 3), padding=1)


class Block(nn.Module):
    """Two convolutions beside a shortcut: (batch, h, w, c) -> (batch, h / stride, w / stride,
    channels).

    `branch_variance` scales the variance of the second convolution's first weights.
    """

    channels: int
    stride: int
    normalize: bool = True
    shortcut: bool = True
    branch_variance: float = 1.0

    @nn.compact
    def __call__(self, x: jax.Array, use_running_average: bool) -> jax.Array:
        norm = _norm(self.normalize, use_running_average)
        conv = partial(convolution, self.channels, use_bias=not self.normalize)
        y = conv(strides=self.stride, kernel_init=_he(1.0), name="conv1")(x)
        y = nn.relu(norm(name="bn1")(y))
        y = conv(kernel_init=_he(self.branch_variance), name="conv2")(y)
        y = norm(name="bn2")(y)
        if not self.shortcut:
            return nn.relu(y)
        # The shortcut without weights (option A of the paper): subsample, and fill the new channels
        # with zeros.
        shortcut = x[:, :: self.stride, :: self.stride]
        added = self.channels - x.shape[-1]
        shortcut = jnp.pad(shortcut, [(0, 0), (0, 0), (0, 0), (added // 2, added - added // 2)])
        return nn.relu(y + shortcut)


class ResNet(nn.Module):
    """Three stages of (depth - 2) / 6 blocks with 1, 2 and 4 times `width` channels: images ->
    (batch, num_classes).

    `use_running_average` normalizes by the stored statistics (collection `batch_stats`): each
    example's loss is then its own. Otherwise by the batch's, and the mean over batches is no mean
    over examples.

    Without normalization the convolutions have biases, and every residual branch starts with 1 /
    (number of blocks) of its variance: the sum of the branches then starts as large as the input,
    however deep the network is."""

    depth: int = 20
    num_classes: int = 10
    width: int = 16
    normalize: bool = True
    shortcuts: bool = True

    @nn.compact
    def __call__(self, x: jax.Array, use_running_average: bool = True) -> jax.Array:
        if self.depth < 8 or (self.depth - 2) % 6:
            raise ValueError(
                f"depth={self.depth}: a CIFAR ResNet has 6 n + 2 layers (8, 14, 20, 26, 32, ...)"
            )
        blocks = (self.depth - 2) // 6
        first = partial(convolution, self.width, use_bias=not self.normalize)
        x = first(kernel_init=_he(1.0), name="conv1")(x)
        x = nn.relu(_norm(self.normalize, use_running_average)(name="bn1")(x))
        branch_variance = 1 / (3 * blocks) if self.shortcuts and not self.normalize else 1.0
        for stage in (1, 2, 3):
            for index in range(blocks):
                stride = 2 if stage > 1 and index == 0 else 1
                channels = self.width * 2 ** (stage - 1)
                made = (channels, stride, self.normalize, self.shortcuts, branch_variance)
                x = Block(*made, name=f"layer{stage}_{index}")(x, use_running_average)
        return nn.Dense(self.num_classes, name="linear")(x.mean(axis=(1, 2)))


def _he(variance: float) -> Callable:
    return nn.initializers.variance_scaling(2 * variance, "fan_in", "truncated_normal")


def _norm(normalize: bool, use_running_average: bool) -> Callable[..., Any]:
    """Makes normalization layers, or what stands in their place."""
    if not normalize:
        return lambda name: lambda x: x
    return partial(nn.BatchNorm, use_running_average=use_running_average, momentum=0.9)


def normalize(images: np.ndarray) -> jax.Array:
    """Images (..., 3) of 0 to 255 as the float32 inputs the trained weights expect."""
    return (jnp.asarray(images, jnp.float32) / 255 - CHANNEL_MEAN) / CHANNEL_STD
