"""Small test networks, each with one structure through which channels are traced."""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models import get_model


def conv_bn(inputs: int, outputs: int, kernel: int = 3, groups: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, groups=groups, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(),
    )


class Head(nn.Module):
    """A classifier: mean over pixels, then a linear layer."""

    def __init__(self, channels: int, classes: int = 5) -> None:
        super().__init__()
        self.fc = nn.Linear(channels, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x.mean((2, 3)))


class Plain(nn.Module):
    """A chain that ends in a flattened map: one channel is many inputs of the linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = conv_bn(3, 8), conv_bn(8, 6)
        self.fc = nn.Linear(6 * 16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.adaptive_avg_pool2d(self.second(self.first(x)), 4)
        return self.fc(torch.flatten(x, 1))


class Residual(nn.Module):
    """Two residual blocks that add to one stream."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv_bn(3, 8)
        self.inner = nn.ModuleList(nn.Sequential(conv_bn(8, 6), conv_bn(6, 8)) for _ in range(2))
        self.head = Head(8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.inner:
            x = x + block(x)
        return self.head(x)


class Concatenated(nn.Module):
    """A dense block: every layer reads the outputs of all layers before it."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.left, self.right = conv_bn(3, 6), conv_bn(6, 4), conv_bn(10, 4)
        self.head = Head(14)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = torch.cat([x, self.left(x)], 1)
        return self.head(torch.cat([x, self.right(x)], 1))


class Depthwise(nn.Module):
    """An inverted residual, and a depthwise convolution that doubles its channels."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv_bn(3, 6)
        self.block = nn.Sequential(conv_bn(6, 12, 1), conv_bn(12, 12, groups=12), conv_bn(12, 6, 1))
        self.doubled = conv_bn(6, 12, groups=6)
        self.head = Head(12)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.head(self.doubled(x + self.block(x)))


class Grouped(nn.Module):
    """Grouped convolutions: of few wide groups the same indices are removed, of many narrow groups whole groups."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.wide = conv_bn(3, 12), conv_bn(12, 8, groups=2)
        self.many, self.head = conv_bn(8, 16, groups=4), Head(16)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.many(self.wide(self.stem(x))))


class SqueezeExcite(nn.Module):
    """A squeeze-and-excite gate, computed from the channels that it scales."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.squeeze, self.excite = conv_bn(3, 8), nn.Conv2d(8, 4, 1), nn.Conv2d(4, 8, 1)
        self.out, self.head = conv_bn(8, 6), Head(6)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        gate = torch.sigmoid(self.excite(F.silu(self.squeeze(F.adaptive_avg_pool2d(x, 1)))))
        return self.head(self.out(x * gate))


class Shuffled(nn.Module):
    """ShuffleNet's unit: one half of the channels is convolved, and both halves are interleaved."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.work, self.out = conv_bn(3, 8), nn.Sequential(conv_bn(4, 6), conv_bn(6, 4)), conv_bn(8, 6)
        self.head = Head(6)

    def forward(self, x: Tensor) -> Tensor:
        left, right = self.stem(x).chunk(2, dim=1)
        x = torch.cat([left, self.work(right)], dim=1)
        batch, channels, height, width = x.shape
        x = x.view(batch, 2, channels // 2, height, width).transpose(1, 2).reshape(batch, channels, height, width)
        return self.head(self.out(x))


class PaddedShortcut(nn.Module):
    """CIFAR ResNet's shortcut A: a strided slice, padded with zero channels on both sides."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.block, self.head = conv_bn(3, 6), nn.Sequential(conv_bn(6, 5), conv_bn(5, 10)), Head(10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.head(self.block(x)[:, :, ::2, ::2] + F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 2, 2)))


class Transposed(nn.Module):
    """Transposed convolutions, plain and grouped."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv_bn(3, 8)
        self.up = nn.ConvTranspose2d(8, 12, 2, stride=2)
        self.depthwise = nn.ConvTranspose2d(12, 12, 2, stride=2, groups=12)
        self.grouped, self.head = nn.ConvTranspose2d(12, 8, 3, groups=2), Head(8)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.up(self.stem(x)))
        return self.head(F.relu(self.grouped(F.relu(self.depthwise(x)))))


class Tied(nn.Module):
    """One convolution used twice in a row, which joins its input and output channels."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.shared, self.head = conv_bn(3, 8), nn.Conv2d(8, 8, 3, padding=1), Head(8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.head(F.relu(self.shared(F.relu(self.shared(x)))))


EVERY = (
    Plain,
    Residual,
    Concatenated,
    Depthwise,
    Grouped,
    SqueezeExcite,
    Shuffled,
    PaddedShortcut,
    Transposed,
    Tied,
)


def family(name: str, **options: Any) -> nn.Module:
    """Build a network of torchvision for ten classes; the hidden layers of VGG, 120 million weights, have 64 units."""
    model = get_model(name, weights=None, num_classes=10, **options)
    if name.startswith("vgg"):
        wide = [index for index, layer in enumerate(model.classifier) if isinstance(layer, nn.Linear)]
        for index, units in zip(wide, ((512 * 7 * 7, 64), (64, 64), (64, 10)), strict=True):
            model.classifier[index] = nn.Linear(*units)
    return cast(nn.Module, model)


def randomise_(model: nn.Module, seed: int = 0) -> nn.Module:
    """Give batch norms random statistics, so that a channel that was zeroed instead of removed shows."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                for tensor, low, high in (
                    (module.running_mean, -0.3, 0.3),
                    (module.running_var, 0.5, 1.5),
                    (module.weight, 0.5, 1.5),
                    (module.bias, -0.5, 0.5),
                ):
                    tensor.uniform_(low, high, generator=generator)
    return model.eval()
