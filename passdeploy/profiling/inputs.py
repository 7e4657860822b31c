"""Example images to time networks with."""

from __future__ import annotations

import torch
from torch import Tensor


def example_images(batch: int, image_shape: tuple[int, ...]) -> Tensor:
    """Noise to time with, the same every time, shape (batch, *image_shape)."""
    return torch.randn(batch, *image_shape, generator=torch.Generator().manual_seed(0))
