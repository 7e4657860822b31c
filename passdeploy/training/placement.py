"""Device, data type and memory order (channels-last) of a network, and inputs moved to match them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from passdeploy.models.memory_order import memory_order


def device_of(model: nn.Module) -> torch.device:
    """Return the device of the first parameter; the CPU for a network without any."""
    return next((tensor.device for tensor in model.parameters()), torch.device("cpu"))


def placed_like(model: nn.Module, images: Tensor, device: torch.device) -> Tensor:
    """Move images (batch, channels, height, width) to `device`, and to the model's dtype and memory order.

    The order is channels-last if any convolution weight is stored so.
    """
    weight = next((p for p in model.parameters() if p.is_floating_point()), images)
    orders = {memory_order(p) for p in model.parameters() if p.ndim == images.ndim}
    order = next(iter(orders - {torch.contiguous_format}), torch.contiguous_format)
    return images.to(device, weight.dtype, memory_format=order)


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
