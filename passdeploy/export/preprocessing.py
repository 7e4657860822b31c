"""Input normalisation inside the network, so that the exported graph accepts RGB pixels from 0 to 255."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

PIXELS, NORMALISED = "RGB pixels, 0 to 255", "RGB in [0, 1], less mean, divided by std"  # an artifact's "input_values"


class OnPixels(nn.Module):
    """A network with the normalisation of its training images in front, so that it accepts pixels.

    The name of this class is part of the scopes in ONNX files.

    Args:
        network: takes normalised images (batch, 3, height, width).
        mean, std: of pixels in [0, 1], one value per colour channel.
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
        """Normalise RGB pixels, float32 from 0 to 255, (batch, 3, height, width), and run the network on them."""
        return self.network(pixels * self.scale + self.offset)

    def pixels_of(self, images: Tensor) -> Tensor:
        """Undo the normalisation: return pixels, whole numbers from 0 to 255 as float32."""
        return ((images - self.offset) / self.scale).round().clamp(0, 255)
