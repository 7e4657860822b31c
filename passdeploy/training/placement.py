"""Device, data type and memory order (channels-last) of a network, and inputs moved to match them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


def device_of(model: nn.Module) -> torch.device:
    """Return the device of the first parameter; the CPU for a network without any."""
    return next((tensor.device for tensor in model.parameters()), torch.device("cpu"))


def placed_like(model: nn.Module, images: Tensor, device: torch.device) -> Tensor:
    """Move images (batch, channels, height, width) to `device`, and to the model's dtype and memory order."""
    weight = next((p for p in model.parameters() if p.is_floating_point()), images)
    return images.to(device, weight.dtype, memory_format=memory_order_of(model))


def memory_order_of(model: nn.Module) -> torch.memory_format:
    """Return channels-last if any convolution weight is stored in that order, else contiguous."""
    is_last = any(
        p.ndim == 4 and p.is_contiguous(memory_format=torch.channels_last) and not p.is_contiguous()
        for p in model.parameters()
    )
    return torch.channels_last if is_last else torch.contiguous_format


@contextmanager
def channels_last_inside(model: nn.Module, channels_last: bool) -> Iterator[None]:
    """Store a model's 4-d weights channels-last while the context lasts, if asked, and contiguous afterwards."""
    if not channels_last:
        yield
        return
    model.to(memory_format=torch.channels_last)
    try:
        yield
    finally:
        model.to(memory_format=torch.contiguous_format)
