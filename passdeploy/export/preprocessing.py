"""Networks that take plain pixels: the normalisation of the training images becomes part of the graph."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

PIXELS, NORMALISED = "RGB pixels, 0 to 255", "RGB in [0, 1], less mean, divided by std"  # an artifact's "input_values"


class OnPixels(nn.Module):
    """`network` behind the normalisation its images had in training.

    Args:
        network: takes normalised images (batch, 3, height, width).
        mean, std: of pixels in [0, 1], one of each per colour.
    """

    scale: Tensor
    offset: Tensor

    def __init__(self, network: nn.Module, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.network = network
        means, stds = (torch.tensor(values, dtype=torch.float32).view(1, 3, 1, 1) for values in (mean, std))
        self.register_buffer("scale", 1 / (255 * stds), persistent=False)
        self.register_buffer("offset", -means / stds, persistent=False)

    def forward(self, pixels: Tensor) -> Any:
        """What the network says of RGB pixels, float32 from 0 to 255, (batch, 3, height, width)."""
        return self.network(pixels * self.scale + self.offset)

    def pixels_of(self, images: Tensor) -> Tensor:
        """The pixels that normalised images were made from: whole numbers from 0 to 255, as float32."""
        return ((images - self.offset) / self.scale).round().clamp(0, 255)
