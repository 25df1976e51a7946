"""The CIFAR ResNet of He and others (2016), and a reader for weights trained in PyTorch.

Submodules bear PyTorch's names (`layer1.0.conv1` is `layer1_0/conv1`), so that reading weights is a renaming.
"""

import re
from functools import partial
from os import PathLike

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import unflatten_dict
from safetensors.numpy import load_file

CHANNEL_MEAN = np.array([0.485, 0.456, 0.406], np.float32)
CHANNEL_STD = np.array([0.229, 0.224, 0.225], np.float32)

# Padding 1 and not "SAME": at stride 2 "SAME" pads only the far side, and the trained filters would see shifted images.
convolution = partial(nn.Conv, kernel_size=(3, 3), padding=1, use_bias=False, kernel_init=nn.initializers.he_normal())


class Block(nn.Module):
    """Two convolutions beside a shortcut: (batch, h, w, c) -> (batch, h / stride, w / stride, channels)."""

    channels: int
    stride: int

    @nn.compact
    def __call__(self, x: jax.Array, use_running_average: bool) -> jax.Array:
        norm = partial(nn.BatchNorm, use_running_average=use_running_average, momentum=0.9)
        y = convolution(self.channels, strides=self.stride, name="conv1")(x)
        y = nn.relu(norm(name="bn1")(y))
        y = convolution(self.channels, name="conv2")(y)
        y = norm(name="bn2")(y)
        # The shortcut without weights (option A of the paper): subsample, and fill the new channels with zeros.
        shortcut = x[:, :: self.stride, :: self.stride]
        added = self.channels - x.shape[-1]
        shortcut = jnp.pad(shortcut, [(0, 0), (0, 0), (0, 0), (added // 2, added - added // 2)])
        return nn.relu(y + shortcut)


class ResNet(nn.Module):
    """Three stages of (depth - 2) / 6 blocks with 16, 32 and 64 channels: (batch, 32, 32, 3) -> (batch, num_classes).

    `use_running_average` normalises by the stored statistics (collection `batch_stats`): each example's loss is
    then its own. Otherwise by the batch's, and the mean over batches is no mean over examples.
    """

    depth: int = 20
    num_classes: int = 10

    @nn.compact
    def __call__(self, x: jax.Array, use_running_average: bool) -> jax.Array:
        if self.depth < 8 or (self.depth - 2) % 6:
            raise ValueError(f"depth={self.depth}: a CIFAR ResNet has 6 n + 2 layers (8, 14, 20, 26, 32, ...)")
        x = convolution(16, name="conv1")(x)
        x = nn.relu(nn.BatchNorm(use_running_average, momentum=0.9, name="bn1")(x))
        for stage, channels in enumerate((16, 32, 64), start=1):
            for index in range((self.depth - 2) // 6):
                stride = 2 if stage > 1 and index == 0 else 1
                x = Block(channels, stride, name=f"layer{stage}_{index}")(x, use_running_average)
        return nn.Dense(self.num_classes, name="linear")(x.mean(axis=(1, 2)))


def load_weights(path: str | PathLike) -> dict:
    """Trained variables {"params": ..., "batch_stats": ...} from a safetensors file in PyTorch's names and layouts."""
    flat = {}
    for name, array in load_file(path).items():
        *modules, kind = re.sub(r"(layer\d)\.(\d+)", r"\1_\2", name).split(".")
        match kind, array.ndim:
            case "weight", 4:  # OIHW -> HWIO
                leaf, array = ("params", *modules, "kernel"), array.transpose(2, 3, 1, 0)
            case "weight", 2:  # (out, in) -> (in, out)
                leaf, array = ("params", *modules, "kernel"), array.T
            case "weight", 1:
                leaf = ("params", *modules, "scale")
            case "bias", 1:
                leaf = ("params", *modules, "bias")
            case "running_mean" | "running_var", 1:
                leaf = ("batch_stats", *modules, kind.removeprefix("running_"))
            case _:
                raise ValueError(f"{name} of shape {array.shape} is no part of a CIFAR ResNet")
        flat[leaf] = jnp.asarray(array)
    return unflatten_dict(flat)


def normalise(images: np.ndarray) -> jax.Array:
    """Images (..., 3) in uint8 as the float32 inputs the trained weights expect."""
    return (jnp.asarray(images, jnp.float32) / 255 - CHANNEL_MEAN) / CHANNEL_STD
