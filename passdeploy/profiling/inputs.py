"""Input images for timing: make them, and write their shape in messages."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def example_images(batch: int, image_shape: tuple[int, ...]) -> Tensor:
    """Make a batch of noise, the same every time, shape (batch, *image_shape)."""
    return torch.randn(batch, *image_shape, generator=torch.Generator().manual_seed(0))


def shape_text(sizes: Sequence[Any]) -> str:
    """Write a shape for people.

    >>> shape_text((3, 224, 224))
    '3 x 224 x 224'
    """
    return " x ".join(map(str, sizes))
