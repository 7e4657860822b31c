"""Random changes of images by `torchvision.transforms.v2`: resized crop, flip, colour, RandAugment, erasing.

What happens to an image is computed from numbers that are drawn for its position in the epoch, as for the shifts of
`augmentation.py`: nothing depends on batches, workers or what was drawn before. The changes are made where the pixels
are, on the CPU or the GPU.

Sources: RandAugment, Cubuk et al. (arXiv:1909.13719), with the operations and strengths of torchvision; random erasing,
Zhong et al. (arXiv:1708.04896).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as F

from passdeploy.recipe.augmentation import AugmentationSpec

DRAWS = 21  # random numbers for each image: 4 of a crop, 1 of a flip, 3 of colours, 8 of RandAugment, 5 of erasing
_CROP, _FLIP, _COLOUR, _RANDAUGMENT, _ERASE = 0, 4, 5, 8, 16
_BINS = 31  # strengths of RandAugment, as in torchvision
_RATIO = math.log(4 / 3)


@dataclass(frozen=True)
class BatchTransforms:
    """Changes of one batch."""

    spec: AugmentationSpec
    draws: Tensor  # uniform in [0, 1), float64 (batch, DRAWS), on the CPU

    def apply(self, images: Tensor) -> Tensor:
        """Change uint8 images (batch, 3, height, width), on any device."""
        if not len(images):  # a part of a batch that is smaller than the number of processes
            return images
        changed = [_changed(image, self.spec, draws) for image, draws in zip(images, self.draws.tolist(), strict=True)]
        return torch.stack(changed)


def _changed(image: Tensor, spec: AugmentationSpec, draws: list[float]) -> Tensor:
    if spec.crop is not None:
        image = _resized_crop(image, spec.crop, draws[_CROP:_FLIP])
    if draws[_FLIP] < spec.flip:
        image = F.horizontal_flip(image)
    if spec.colour:
        image = _jittered(image, spec.colour, draws[_COLOUR:_RANDAUGMENT])
    if spec.randaugment is not None:
        for number in range(spec.randaugment.ops):
            kind, sign = draws[_RANDAUGMENT + 2 * number :][:2]
            name = _OPERATION_NAMES[int(kind * len(_OPERATION_NAMES))]
            strength = spec.randaugment.magnitude / (_BINS - 1)
            image = _OPERATIONS[name](image, strength, -1.0 if sign < 0.5 else 1.0)
    if draws[_ERASE] < spec.erase:
        image = _erased(image, draws[_ERASE + 1 :])
    return image


def _box(size: int, area: float, ratio: float, place: list[float]) -> tuple[int, int, int, int]:
    """Return top, left, height and width of a box with a share of the area and a ratio of its sides."""
    side = size * math.sqrt(area)
    height, width = (min(size, max(1, round(side * factor))) for factor in (math.exp(-ratio / 2), math.exp(ratio / 2)))
    top, left = (int(draw * (size - length + 1)) for draw, length in zip(place, (height, width), strict=True))
    return top, left, height, width


def _resized_crop(image: Tensor, smallest: float, draws: list[float]) -> Tensor:
    size, area = image.shape[-1], smallest + (1 - smallest) * draws[0]
    top, left, height, width = _box(size, area, _RATIO * (2 * draws[1] - 1), draws[2:4])
    cropped = image[:, top : top + height, left : left + width]
    resized: Tensor = F.resize(cropped, [size, size], interpolation=InterpolationMode.BILINEAR, antialias=True)
    return resized


def _jittered(image: Tensor, most: float, draws: list[float]) -> Tensor:
    for adjust, draw in zip((F.adjust_brightness, F.adjust_contrast, F.adjust_saturation), draws, strict=True):
        image = adjust(image, 1 + most * (2 * draw - 1))
    return image


def _erased(image: Tensor, draws: list[float]) -> Tensor:
    area, ratio = 0.02 + 0.31 * draws[0], math.log(10 / 3) * (2 * draws[1] - 1)
    top, left, height, width = _box(image.shape[-1], area, ratio, draws[2:4])
    changed = image.clone()
    changed[:, top : top + height, left : left + width] = 0
    return changed


def _moved(image: Tensor, *, shear: tuple[float, float] = (0, 0), shift: tuple[float, float] = (0, 0)) -> Tensor:
    """Shear by tangents of angles, or shift by a share of the size; what comes in is black."""
    size = image.shape[-1]
    moved: Tensor = F.affine(
        image,
        angle=0.0,
        translate=[round(share * size) for share in shift],
        scale=1.0,
        shear=[math.degrees(math.atan(each)) for each in shear],
        interpolation=InterpolationMode.NEAREST,
    )
    return moved


# Name -> function of an image (3, size, size), a strength in [0, 1] and a sign.
_OPERATIONS: dict[str, Callable[[Tensor, float, float], Tensor]] = {
    "identity": lambda image, _, __: image,
    "shear_x": lambda image, strength, sign: _moved(image, shear=(0.3 * strength * sign, 0)),
    "shear_y": lambda image, strength, sign: _moved(image, shear=(0, 0.3 * strength * sign)),
    "translate_x": lambda image, strength, sign: _moved(image, shift=(150 / 331 * strength * sign, 0)),
    "translate_y": lambda image, strength, sign: _moved(image, shift=(0, 150 / 331 * strength * sign)),
    "rotate": lambda image, strength, sign: F.rotate(image, 30 * strength * sign),
    "brightness": lambda image, strength, sign: F.adjust_brightness(image, 1 + 0.9 * strength * sign),
    "colour": lambda image, strength, sign: F.adjust_saturation(image, 1 + 0.9 * strength * sign),
    "contrast": lambda image, strength, sign: F.adjust_contrast(image, 1 + 0.9 * strength * sign),
    "sharpness": lambda image, strength, sign: F.adjust_sharpness(image, 1 + 0.9 * strength * sign),
    "posterize": lambda image, strength, _: F.posterize(image, 8 - round(4 * strength)),
    "solarize": lambda image, strength, _: F.solarize(image, 255 * (1 - strength)),
    "autocontrast": lambda image, _, __: F.autocontrast(image),
    "equalize": lambda image, _, __: F.equalize(image),
}
_OPERATION_NAMES = tuple(_OPERATIONS)
