"""ResNet-18 and ResNet-50 for ImageNet (He and others 2016), in the form whose weights are handed
around today.

That is torchvision's: in a bottleneck the 3 x 3 convolution has the stride, not the first one.
Submodules bear its names (`layer1.0.downsample.0` is `layer1_0/downsample_0`), so that
`benchmarks.models.weights` reads its weights."""

from functools import partial
from typing import Any

import flax.linen as nn
import jax

BLOCKS = {18: (2, 2, 2, 2), 50: (3, 4, 6, 3)}  # blocks in each of the four stages

conv = partial(nn.Conv, use_bias=False, kernel_init=nn.initializers.he_normal())


class Block(nn.Module):
    """A residual block: (batch, h, w, c) -> (batch, h / stride, w / stride, channels), 4 channels
    if a bottleneck.

    Two 3 x 3 convolutions, or as a bottleneck 1 x 1, 3 x 3 and 1 x 1; a convolution on the shortcut
    where the shape changes. A branch starts at zero (the scale of its last normalization; Goyal and
    others 2017): without trained statistics the sum of the branches would grow with every block.
    """

    channels: int
    stride: int
    bottleneck: bool

    @nn.compact
    def __call__(self, x: jax.Array, use_running_average: bool) -> jax.Array:
        norm = partial(nn.BatchNorm, use_running_average=use_running_average, momentum=0.9)
        # kernel size, stride and channels of each convolution
        plan = [(3, self.stride, self.channels), (3, 1, self.channels)]
        if self.bottleneck:
            plan = [
                (1, 1, self.channels),
                (3, self.stride, self.channels),
                (1, 1, 4 * self.channels),
            ]
        y = x
        for number, (kernel, stride, channels) in enumerate(plan, start=1):
            square = partial(conv, channels, (kernel, kernel), padding=kernel // 2)
            y = square(strides=stride, name=f"conv{number}")(y)
            if number < len(plan):
                y = nn.relu(norm(name=f"bn{number}")(y))
        y = norm(scale_init=nn.initializers.zeros, name=f"bn{len(plan)}")(y)
        if x.shape != y.shape:
            x = conv(y.shape[-1], (1, 1), strides=self.stride, padding=0, name="downsample_0")(x)
            x = norm(name="downsample_1")(x)
        return nn.relu(x + y)


class ImageNetResNet(nn.Module):
    """Four stages of blocks with 64, 128, 256 and 512 channels: (batch, h, w, 3) -> (batch,
    num_classes).

    11,689,512 weights at depth 18, 25,557,032 at depth 50. `use_running_average` as in
    `benchmarks.models.resnet`."""

    depth: int = 50
    num_classes: int = 1000

    @nn.compact
    def __call__(self, x: jax.Array, use_running_average: bool = True) -> jax.Array:
        if self.depth not in BLOCKS:
            raise ValueError(f"depth={self.depth}: expected one of {', '.join(map(str, BLOCKS))}")
        norm: Any = partial(nn.BatchNorm, use_running_average, momentum=0.9)
        x = conv(64, (7, 7), strides=2, padding=3, name="conv1")(x)
        x = nn.relu(norm(name="bn1")(x))
        x = nn.max_pool(x, (3, 3), strides=(2, 2), padding=((1, 1), (1, 1)))
        for stage, blocks in enumerate(BLOCKS[self.depth], start=1):
            for index in range(blocks):
                stride = 2 if stage > 1 and index == 0 else 1
                made = (64 * 2 ** (stage - 1), stride, self.depth >= 50)
                x = Block(*made, name=f"layer{stage}_{index}")(x, use_running_average)
        return nn.Dense(self.num_classes, name="fc")(x.mean(axis=(1, 2)))
