"""Mixup and CutMix: batches whose images are mixed in pairs, with the labels of both."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from passdeploy.runtime.seeds import generator, seed_of
from passdeploy.runtime.transfers import to_device


@dataclass(frozen=True)
class MixedLabels:
    """Labels of images that were mixed in pairs."""

    labels: Tensor  # of each image, (batch,)
    others: Tensor  # of its partner, (batch,)
    share: float  # weight of `labels` in the loss, 0 to 1; `others` have the rest


@dataclass(frozen=True)
class Mixing:
    """Mixup, CutMix or a random choice of the two in each step; draws follow from a key."""

    mixup: float = 0.0  # alpha of the Beta distribution that the weights are drawn from; 0: never
    cutmix: float = 0.0  # the same, for CutMix

    def mix(self, images: Tensor, labels: Tensor, *key: str | int) -> tuple[Tensor, Tensor | MixedLabels]:
        """Mix each image (batch, 3, height, width) with another of the batch, and return the labels of both.

        Without mixup and cutmix, return the images and labels as they are.
        """
        if not (self.mixup or self.cutmix):
            return images, labels
        draws = generator("mix", *key)
        is_cut = bool(self.cutmix) and (not self.mixup or torch.rand((), generator=draws).item() < 0.5)
        share = _beta(self.cutmix if is_cut else self.mixup, *key)
        partner = to_device(torch.randperm(len(images), generator=draws), images.device)
        if is_cut:
            images, share = _paste_box(images, partner, share, torch.rand(2, generator=draws).tolist())
        else:
            images = share * images + (1 - share) * images[partner]
        return images, MixedLabels(labels, labels[partner], share)


def _beta(parameter: float, *key: str | int) -> float:
    """Draw from Beta(parameter, parameter)."""
    import numpy as np

    return float(np.random.default_rng(seed_of("beta", *key)).beta(parameter, parameter))


def _paste_box(images: Tensor, partner: Tensor, share: float, centre: list[float]) -> tuple[Tensor, float]:
    """Paste a box of the partner into each image.

    Args:
        images: (batch, channels, height, width); they are not changed.
        partner: index of each image's partner in the batch, (batch,).
        share: of an image that stays its own if the box lies inside; a box that crosses a border is clipped.
        centre: of the box, as fractions of height and width.

    Returns:
        The images, and the share of their pixels that was not replaced.
    """
    height, width = images.shape[-2:]
    half = 0.5 * (1 - share) ** 0.5
    top, bottom = (round(min(max(centre[0] + side * half, 0.0), 1.0) * height) for side in (-1, 1))
    left, right = (round(min(max(centre[1] + side * half, 0.0), 1.0) * width) for side in (-1, 1))
    images = images.clone()
    images[..., top:bottom, left:right] = images[partner][..., top:bottom, left:right]
    return images, 1 - (bottom - top) * (right - left) / (height * width)
