"""Make the same inputs at another image size and batch size, to check what must hold for more than one of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from passdeploy.models.modes import evaluating
from passdeploy.models.wrappers import calling_eagerly

_STEP = 32  # pixels; networks halve their maps five times
_LARGE = 128  # pixels from which images are made smaller, not larger: that takes less time


def other_sizes(inputs: Sequence[Any]) -> Iterator[tuple[Any, ...]]:
    """Yield inputs with one more sample and images of another size, then with only one of both changes.

    The first images have another parity and are not square. Even sizes hide code that counts on channels and pixels
    together being a multiple of something: `x.reshape(len(x), -1, 4)`.

    Nothing is yielded for inputs that are neither tensors nor lists of images, which detectors take.

    Args:
        inputs: positional arguments of a network; tensors with four or five dimensions are taken for images or videos,
            lists of tensors with three for images.
    """
    if not all(_is_list_of_images(item) or (isinstance(item, Tensor) and item.ndim) for item in inputs):
        return
    if any(_is_image(item) or _is_list_of_images(item) for item in inputs):
        yield _with_one_more([_resized(item, more=(1, 3)) for item in inputs])
        resized = [_resized(item) for item in inputs]
        yield _with_one_more(resized)
        yield tuple(resized)
    yield _with_one_more(inputs)


def further_sizes(inputs: Sequence[Any]) -> Iterator[tuple[Any, ...]]:
    """Yield the first sample alone, and images of half, twice and four times the size and of about 1,024 pixels.

    Code may do something else for them: tiles of large images, another path for a single one.
    """
    if (alone := one_sample(inputs)) is not None:
        yield alone
    sides = [max(image.shape[-2:]) for item in inputs for image in _images_in(item)]
    for factor in (0.5, 2.0, 4.0, 1024 / max(sides)) if sides else ():
        yield tuple(_scaled(item, factor) for item in inputs)


def _images_in(item: Any) -> Sequence[Tensor]:
    return item if _is_list_of_images(item) else [item] if _is_image(item) else []


def _scaled(images: Any, factor: float) -> Any:
    if _is_list_of_images(images):
        return [_scaled(image[None], factor)[0] for image in images]
    if not _is_image(images):
        return images
    size = [max(1, round(pixels * factor)) for pixels in images.shape[-2:]]
    return F.interpolate(images, size=[*images.shape[2:-2], *size], mode="nearest")


def doubled(inputs: Sequence[Any]) -> tuple[Any, ...]:
    """Return inputs with every sample once more, floating-point ones mirrored; what has no samples stays.

    For training mode, in which batch norms want two samples that differ, and other code an even number.
    """
    return tuple(
        torch.cat([item, _mirrored(item)])
        if isinstance(item, Tensor) and item.ndim
        else [*item, *map(_mirrored, item)]
        if _is_list_of_images(item)
        else item
        for item in inputs
    )


def _mirrored(item: Tensor) -> Tensor:
    return item.flip(-1) if item.ndim > 1 and item.is_floating_point() else item


def _with_one_more(inputs: Sequence[Any]) -> tuple[Any, ...]:
    return tuple(torch.cat([item, item[:1]]) if isinstance(item, Tensor) else [*item, item[0]] for item in inputs)


def _is_image(item: Any) -> bool:
    return isinstance(item, Tensor) and item.ndim in (4, 5) and item.is_floating_point()


def _is_list_of_images(item: Any) -> bool:
    return (
        isinstance(item, list | tuple)
        and bool(item)
        and all(isinstance(one, Tensor) and one.ndim == 3 and one.is_floating_point() for one in item)
    )


def _resized(images: Any, more: tuple[int, int] = (0, 0)) -> Any:
    """Scale images (N, C, H, W), videos (N, C, T, H, W) or lists of images (C, H, W); others are returned as they are.

    Args:
        images: the tensor or list.
        more: pixels to add besides to height and width.
    """
    if _is_list_of_images(images):
        return [_resized(image[None], more)[0] for image in images]
    if not _is_image(images):
        return images
    size = [_other_size(pixels) + added for pixels, added in zip(images.shape[-2:], more, strict=True)]
    return F.interpolate(images, size=[*images.shape[2:-2], *size], mode="nearest")


def _other_size(pixels: int) -> int:
    """Return another size with the same power of two in it, up to 32: a larger one for small images.

    >>> _other_size(8), _other_size(32), _other_size(224), _other_size(299)
    (16, 64, 128, 171)
    """
    power = pixels & -pixels
    step = min(power, _STEP) if power >= 8 else _STEP
    return pixels + step if pixels < _LARGE else pixels - round(pixels * 3 / 8 / step) * step


def one_sample(inputs: Sequence[Any]) -> tuple[Any, ...] | None:
    """Return the first sample of inputs as a batch of one; None where there is only one, or it cannot be told."""
    if not inputs or not all(_is_list_of_images(item) or (isinstance(item, Tensor) and item.ndim) for item in inputs):
        return None
    if not any(len(item) > 1 for item in inputs):
        return None
    return tuple(item[:1].clone() if isinstance(item, Tensor) else [item[0].clone()] for item in inputs)


def first_taken(model: nn.Module, inputs: Sequence[Any]) -> tuple[Any, ...] | None:
    """Return the first of `other_sizes` at which the network runs; None if it runs at the given sizes only."""
    return next((other for other in other_sizes(inputs) if takes(model, other)), None)


def takes(model: nn.Module, inputs: Sequence[Any], mode: AbstractContextManager[object] | None = None) -> bool:
    """True if the network runs on these inputs in evaluation mode, under a dispatch mode if one is given."""
    try:
        with torch.no_grad(), evaluating(model), calling_eagerly(model), mode or nullcontext():
            model(*inputs)
    except Exception:  # code that meets a size it was not made for may raise anything
        return False
    return True


def shapes_of(inputs: Sequence[Any]) -> list[list[int]]:
    """List the shapes of the tensors among the arguments of a network, and in lists and dictionaries among them."""
    return [list(item.shape) for item in tree_leaves(tuple(inputs)) if isinstance(item, Tensor)]
