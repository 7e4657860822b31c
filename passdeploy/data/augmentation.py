"""Random shifts and flips of uint8 images, and their normalisation, on the device that holds the pixels.

The changes are drawn on the CPU, as numbers per image, so that they are the same wherever they are applied.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from passdeploy.data.images import Augmentation
from passdeploy.recipe.preprocessing import IMAGENET_MEAN, IMAGENET_STD

RGB = tuple[float, float, float]


class Normalisation:
    """(pixel / 255 - mean) / std, as one multiplication and one addition, on any device."""

    def __init__(self, means: RGB = IMAGENET_MEAN, stds: RGB = IMAGENET_STD) -> None:
        mean, std = torch.tensor(means).view(3, 1, 1), torch.tensor(stds).view(3, 1, 1)
        self._factors = {torch.device("cpu"): (1 / (255 * std), -mean / std)}

    def apply(self, images: Tensor) -> Tensor:
        """Return uint8 (batch, 3, height, width) as normalised float32, contiguous."""
        device = images.device
        if device not in self._factors:
            scale, offset = self._factors[torch.device("cpu")]
            self._factors[device] = scale.to(device), offset.to(device)
        scale, offset = self._factors[device]
        return images.to(torch.float32, memory_format=torch.contiguous_format).mul_(scale).add_(offset)


def changes_from(draws: Tensor, policy: Augmentation, image_size: int) -> Tensor:
    """Turn random numbers into changes: int64 (batch, 3), the row and column of a crop's corner, and 1 for a flip.

    Args:
        draws: uniform in [0, 1), shape (batch, 3): shift down, shift right, flip.
        policy: the changes to apply; the corner of an image that is not shifted is (reach, reach).
        image_size: height and width.
    """
    reach = reach_of(image_size)
    corners = (draws[:, :2] * (2 * reach + 1)).long() if policy.shift else torch.full((len(draws), 2), reach)
    flips = (draws[:, 2:] < 0.5).long() if policy.flip else torch.zeros(len(draws), 1, dtype=torch.int64)
    return torch.cat([corners, flips], dim=1)


def reach_of(image_size: int) -> int:
    """Return how far images are shifted at most, in pixels; what comes in is black."""
    return image_size // 8


def change_on_host(images: Tensor, changes: Tensor) -> Tensor:
    """Shift and flip each image (uint8, square) of a batch; a slice per image is four times faster than a gather."""
    size, reach = images.shape[3], reach_of(images.shape[3])
    if reach and not changes[:, :2].eq(reach).all():
        padded = F.pad(images, (reach, reach, reach, reach))
        images = torch.stack(
            [
                image[:, y : y + size, x : x + size]
                for image, (y, x) in zip(padded, changes[:, :2].tolist(), strict=True)
            ]
        )
    if changes[:, 2].any():
        images = torch.where(changes[:, 2].bool().view(-1, 1, 1, 1), images.flip(3), images)
    return images


def change_on_device(images: Tensor, changes: Tensor) -> Tensor:
    """Do the same with one gather over the batch: few kernels, and nothing that the host must know of."""
    size, reach = images.shape[3], reach_of(images.shape[3])
    padded = F.pad(images, (reach, reach, reach, reach))
    steps = torch.arange(size, device=images.device)
    rows = changes[:, :1] + steps  # (batch, height)
    columns = changes[:, 1:2] + torch.where(changes[:, 2:].bool(), size - 1 - steps, steps)  # (batch, width)
    batch = torch.arange(len(images), device=images.device)
    # indexing puts the channels last
    return padded[batch[:, None, None], :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)
