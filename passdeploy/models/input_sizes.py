"""Make the same inputs at another image size and batch size, to check what must hold for more than one of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from passdeploy.models.modes import evaluating
from passdeploy.models.wrappers import calling_eagerly

_MOST_ADDED = 32  # pixels; networks halve their maps five times


def other_sizes(inputs: Sequence[Any]) -> Iterator[tuple[Any, ...]]:
    """Yield inputs with one more sample and larger images, then with only one of both changes.

    Nothing is yielded for inputs that are no tensors, such as the lists of images that detectors take and resize.

    Args:
        inputs: positional arguments of a network; tensors with four or five dimensions are taken for images or videos.
    """
    if not all(isinstance(item, Tensor) and item.ndim for item in inputs):
        return
    has_images = any(item.ndim in (4, 5) and item.is_floating_point() for item in inputs)
    variants = [(True, True), (True, False), (False, True)] if has_images else [(False, True)]
    for is_larger, has_more in variants:
        changed = [_enlarged(item) if is_larger else item for item in inputs]
        yield tuple(torch.cat([item, item[:1]]) if has_more else item for item in changed)


def _enlarged(images: Tensor) -> Tensor:
    """Scale images (N, C, H, W) or videos (N, C, T, H, W) up, to sizes with the same power of two in them."""
    if images.ndim not in (4, 5) or not images.is_floating_point():
        return images
    height, width = images.shape[-2:]
    size = [*images.shape[2:-2], height + _added(height), width + _added(width)]
    return F.interpolate(images, size=size, mode="nearest")


def _added(pixels: int) -> int:
    """Return the largest power of two that divides a size, at most 32; 32 for sizes that are odd or nearly so.

    >>> _added(224), _added(128), _added(8), _added(299)
    (32, 32, 8, 32)
    """
    power = pixels & -pixels
    return min(power, _MOST_ADDED) if power >= 8 else _MOST_ADDED


def first_taken(model: nn.Module, inputs: Sequence[Any]) -> tuple[Any, ...] | None:
    """Return the first of `other_sizes` at which the network runs; None if it runs at the given sizes only."""
    return next((other for other in other_sizes(inputs) if takes(model, other)), None)


def takes(model: nn.Module, inputs: Sequence[Any]) -> bool:
    """True if the network runs on these inputs in evaluation mode."""
    try:
        with torch.no_grad(), evaluating(model), calling_eagerly(model):
            model(*inputs)
    except Exception:  # code that meets a size it was not made for may raise anything
        return False
    return True


def shapes_of(inputs: Sequence[Any]) -> list[list[int]]:
    """List the shapes of the tensors among the arguments of a network."""
    return [list(item.shape) for item in inputs if isinstance(item, Tensor)]
