"""ResNets for CIFAR (depth 8, 20, 32, 44, 56), which neither torchvision nor timm has.

He et al., Deep Residual Learning for Image Recognition (2016), section 4.2: three stages of 16, 32 and
64 channels on 32x32 images. Shortcuts have no parameters (option A): where a stage halves the image,
they take every second pixel and pad the missing channels with zeros, half below and half above.
The names of the tensors are those of the well-known PyTorch re-implementation (Y. Idelbayev).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import torch.nn.functional as F
from torch import Tensor, nn


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut without parameters."""

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.stride = stride
        self.padding = (channels - in_channels) // 2  # zero channels on either side of the shortcut

    def forward(self, x: Tensor) -> Tensor:
        """Map (batch, in_channels, height, width) to (batch, channels, height / stride, width / stride)."""
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        if self.padding:
            x = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.padding, self.padding))
        return F.relu(out + x)


class CifarResNet(nn.Module):
    """A ResNet of depth 6 * `blocks` + 2 for small images, 32x32 in the paper."""

    def __init__(self, blocks: int, num_classes: int = 10) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = _stage(16, 16, blocks, stride=1)
        self.layer2 = _stage(16, 32, blocks, stride=2)
        self.layer3 = _stage(32, 64, blocks, stride=2)
        self.linear = nn.Linear(64, num_classes)
        for module in self.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                nn.init.kaiming_normal_(module.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Map images (batch, 3, height, width) to logits (batch, num_classes)."""
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        x = F.adaptive_avg_pool2d(x, 1).flatten(1)  # (batch, 64)
        logits: Tensor = self.linear(x)
        return logits


def _stage(in_channels: int, channels: int, blocks: int, *, stride: int) -> nn.Sequential:
    first = BasicBlock(in_channels, channels, stride)
    return nn.Sequential(first, *(BasicBlock(channels, channels, 1) for _ in range(blocks - 1)))


# Name in a recipe, after `passdeploy/` -> factory of one argument, num_classes.
NETWORKS: Mapping[str, Callable[[int], nn.Module]] = {
    "resnet8_cifar": partial(CifarResNet, 1),
    "resnet20_cifar": partial(CifarResNet, 3),
    "resnet32_cifar": partial(CifarResNet, 5),
    "resnet44_cifar": partial(CifarResNet, 7),
    "resnet56_cifar": partial(CifarResNet, 9),
}


def resnet20_cifar(num_classes: int = 10) -> nn.Module:
    """Build the ResNet-20 for CIFAR: 0.27 M parameters, 41 M MACs on a 32x32 image."""
    return CifarResNet(3, num_classes)
