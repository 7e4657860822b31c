"""Memory order of tensors: contiguous or channels-last."""

from __future__ import annotations

import torch
from torch import Tensor

_CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}  # by the number of dimensions


def memory_order(tensor: Tensor) -> torch.memory_format:
    """Return channels-last (of images or of videos) if only that describes how a tensor is stored, else contiguous."""
    order = _CHANNELS_LAST.get(tensor.ndim)
    if order is None or tensor.is_contiguous() or not tensor.is_contiguous(memory_format=order):
        return torch.contiguous_format
    return order
