"""SqueezeNet 1.1 and ResNet-50 in PyTorch, for comparisons: the same networks and the same names of
weights.

Nothing else here imports PyTorch; whoever wants it imports this module inside a function.
"""

import torch
from torch import nn
from torch.nn import functional

from benchmarks.models.imagenet_resnet import BLOCKS
from benchmarks.models.squeezenet import FIRES, POOLED


class Fire(nn.Module):
    """See `benchmarks.models.squeezenet.Fire`."""

    def __init__(self, channels: int, squeezed: int, expanded: int) -> None:
        super().__init__()
        self.squeeze1x1 = nn.Conv2d(channels, squeezed, 1)
        self.expand1x1 = nn.Conv2d(squeezed, expanded, 1)
        self.expand3x3 = nn.Conv2d(squeezed, expanded, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = functional.relu(self.squeeze1x1(x))
        return functional.relu(torch.cat([self.expand1x1(x), self.expand3x3(x)], dim=1))


class SqueezeNet(nn.Module):
    """See `benchmarks.models.squeezenet.SqueezeNet`; (batch, 3, h, w)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 3, stride=2)
        channels = 64
        for number, (squeezed, expanded) in FIRES.items():
            self.add_module(f"fire{number}", Fire(channels, squeezed, expanded))
            channels = 2 * expanded
        self.conv10 = nn.Conv2d(channels, 1000, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self._pool(functional.relu(self.conv1(x)))
        for number in FIRES:
            x = self.get_submodule(f"fire{number}")(x)
            if number in POOLED:
                x = self._pool(x)
        return functional.relu(self.conv10(x)).mean(dim=(2, 3))

    @staticmethod
    def _pool(x: torch.Tensor) -> torch.Tensor:
        return functional.max_pool2d(x, 3, 2, ceil_mode=True)


class Bottleneck(nn.Module):
    """See `benchmarks.models.imagenet_resnet.Block`."""

    def __init__(self, inputs: int, channels: int, stride: int) -> None:
        super().__init__()
        outputs = 4 * channels
        self.conv1 = nn.Conv2d(inputs, channels, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.conv3 = nn.Conv2d(channels, outputs, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(outputs)
        self.downsample = None
        if stride > 1 or inputs != outputs:
            self.downsample = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)
            )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = functional.relu(self.bn1(self.conv1(x)))
        y = functional.relu(self.bn2(self.conv2(y)))
        y = self.bn3(self.conv3(y))
        return functional.relu(y + (x if self.downsample is None else self.downsample(x)))


class ResNet50(nn.Module):
    """See `benchmarks.models.imagenet_resnet.ImageNetResNet`; (batch, 3, h, w)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        inputs = 64
        for stage, blocks in enumerate(BLOCKS[50], start=1):
            channels, made = 64 * 2 ** (stage - 1), []
            for index in range(blocks):
                made.append(Bottleneck(inputs, channels, 2 if stage > 1 and index == 0 else 1))
                inputs = 4 * channels
            self.add_module(f"layer{stage}", nn.Sequential(*made))
        self.fc = nn.Linear(inputs, 1000)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = functional.max_pool2d(functional.relu(self.bn1(self.conv1(x))), 3, 2, padding=1)
        for stage in range(1, len(BLOCKS[50]) + 1):
            x = self.get_submodule(f"layer{stage}")(x)
        return self.fc(x.mean(dim=(2, 3)))


NETWORKS = {"squeezenet1_1": SqueezeNet, "resnet50": ResNet50}
