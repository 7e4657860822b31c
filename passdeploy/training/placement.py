"""The device, data type and memory order that a network's weights have, and tensors moved to match them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


def device_of(model: nn.Module) -> torch.device:
    """Device of the first parameter; the CPU for a network without any."""
    return next((tensor.device for tensor in model.parameters()), torch.device("cpu"))


def placed_like(model: nn.Module, images: Tensor, device: torch.device) -> Tensor:
    """Images where the model is, in its dtype and, where its weights are channels-last, in that order."""
    weight = next((p for p in model.parameters() if p.is_floating_point()), images)
    return images.to(device, weight.dtype, memory_format=memory_order_of(model))


def memory_order_of(model: nn.Module) -> torch.memory_format:
    """Channels-last where any convolution weight is stored that way, else contiguous."""
    is_last = any(
        p.ndim == 4 and p.is_contiguous(memory_format=torch.channels_last) and not p.is_contiguous()
        for p in model.parameters()
    )
    return torch.channels_last if is_last else torch.contiguous_format


@contextmanager
def channels_last_inside(model: nn.Module, channels_last: bool) -> Iterator[None]:
    """Keep a model's 4-d weights channels-last inside, and contiguous afterwards."""
    if not channels_last:
        yield
        return
    model.to(memory_format=torch.channels_last)
    try:
        yield
    finally:
        model.to(memory_format=torch.contiguous_format)
