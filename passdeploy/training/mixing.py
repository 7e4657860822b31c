"""Mixup and CutMix: images blended in pairs, with the labels of both."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from passdeploy.runtime.seeds import generator, seed_of


@dataclass(frozen=True)
class Blend:
    """The labels of images that are part one, part another."""

    labels: Tensor  # (batch,)
    others: Tensor  # (batch,)
    share: float  # of the first


@dataclass(frozen=True)
class Mixing:
    """Blends of two images each, drawn from a key."""

    mixup: float = 0.0  # parameter of the Beta distribution; 0: never
    cutmix: float = 0.0

    def mix(self, images: Tensor, labels: Tensor, *key: str | int) -> tuple[Tensor, Tensor | Blend]:
        """Each image with a partner from the same batch, and the labels of both.

        Without mixup and cutmix, the images and labels as they are.
        """
        if not (self.mixup or self.cutmix):
            return images, labels
        draws = generator("mix", *key)
        is_cut = bool(self.cutmix) and (not self.mixup or torch.rand((), generator=draws).item() < 0.5)
        share = _beta(self.cutmix if is_cut else self.mixup, *key)
        partner = torch.randperm(len(images), generator=draws).to(images.device)
        if is_cut:
            images, share = _pasted(images, partner, share, torch.rand(2, generator=draws).tolist())
        else:
            images = share * images + (1 - share) * images[partner]
        return images, Blend(labels, labels[partner], share)


def _beta(parameter: float, *key: str | int) -> float:
    """One draw from Beta(parameter, parameter)."""
    import numpy as np

    return float(np.random.default_rng(seed_of("beta", *key)).beta(parameter, parameter))


def _pasted(images: Tensor, partner: Tensor, share: float, centre: list[float]) -> tuple[Tensor, float]:
    """A box of the partner in each image; the share of the image that is left is near `share` (less at a border)."""
    height, width = images.shape[-2:]
    half = 0.5 * (1 - share) ** 0.5
    top, bottom = (round(min(max(centre[0] + side * half, 0.0), 1.0) * height) for side in (-1, 1))
    left, right = (round(min(max(centre[1] + side * half, 0.0), 1.0) * width) for side in (-1, 1))
    images = images.clone()
    images[..., top:bottom, left:right] = images[partner][..., top:bottom, left:right]
    return images, 1 - (bottom - top) * (right - left) / (height * width)
