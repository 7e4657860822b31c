"""A small detector-like network, its data and its loss, for the tests of the trainers."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Detector(nn.Module):
    """A network with a residual stream that returns its logits and, beside them, its feature maps."""

    def __init__(self, classes: int = 3) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU())
        self.branch = nn.Sequential(
            nn.Conv2d(16, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1)
        )
        self.head = nn.Conv2d(16, classes, 1)

    def forward(self, images: Tensor) -> tuple[Tensor, dict[str, list[Tensor]]]:
        stem = self.stem(images)
        neck = stem + self.branch(stem)
        return self.head(neck).mean((2, 3)), {"maps": [stem, neck]}


def loss(output: tuple[Tensor, object], labels: Tensor) -> Tensor:
    return F.cross_entropy(output[0], labels)


def batches(count: int = 2) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [
        (torch.randn(4, 3, 8, 8, generator=generator), torch.randint(3, (4,), generator=generator))
        for _ in range(count)
    ]
