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
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import affine_grid, avg_pool2d, grid_sample
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as F

from passdeploy.recipe.augmentation import AugmentationSpec, RandAugmentSpec
from passdeploy.runtime.transfers import to_device

DRAWS = 21  # random numbers for each image: 4 of a crop, 1 of a flip, 3 of colours, 8 of RandAugment, 5 of erasing
_CROP, _FLIP, _COLOUR, _RANDAUGMENT, _ERASE = 0, 4, 5, 8, 16
_BINS = 31  # strengths of RandAugment, as in torchvision
_RATIO = math.log(4 / 3)
_UNMOVED = [[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]]

Matrix = list[list[float]]  # (2, 3): from the place of a pixel (x, y, 1) to where it is taken from


@dataclass(frozen=True)
class BatchTransforms:
    """Changes of one batch."""

    spec: AugmentationSpec
    draws: Tensor  # uniform in [0, 1), float64 (batch, DRAWS), on the CPU

    def apply(self, images: Tensor) -> Tensor:
        """Change uint8 images (batch, 3, height, width), on any device."""
        if not len(images):  # a part of a batch that is smaller than the number of processes
            return images
        drawn: list[list[float]] = self.draws.tolist()
        operations = [_operations_of(self.spec.randaugment, draws) for draws in drawn]
        moves = [[operation.matrix(images.shape[-1]) for operation in each] for each in operations]
        # one copy for the batch: a GPU would have to finish its queue for each one that is made image by image
        matrices = to_device(torch.tensor(moves).view(len(images), -1, 2, 3), images.device)
        each_image = zip(images, drawn, operations, matrices, strict=True)
        return torch.stack([_changed(image, self.spec, *changes) for image, *changes in each_image])


class _Operation(NamedTuple):
    """One operation of RandAugment."""

    name: str
    strength: float  # in [0, 1]
    sign: float

    def matrix(self, size: int) -> Matrix:
        """Return the matrix of an operation that moves pixels; that of one that does not move any for others."""
        move = _MOVES.get(self.name)
        return move(self.strength * self.sign, size) if move else _UNMOVED

    def apply(self, image: Tensor, matrix: Tensor) -> Tensor:
        """Change an image (3, size, size); `matrix` is the operation's, on the image's device."""
        if self.name in _MOVES:
            return _moved(image, matrix)
        operation = _OPERATIONS.get(self.name)
        return operation(image, self.strength, self.sign) if operation else image


def _operations_of(spec: RandAugmentSpec | None, draws: list[float]) -> list[_Operation]:
    """Choose the operations for an image."""
    operations = list[_Operation]()
    if spec is None:
        return operations
    for number in range(spec.ops):
        kind, sign = draws[_RANDAUGMENT + 2 * number :][:2]
        name = _OPERATION_NAMES[int(kind * len(_OPERATION_NAMES))]
        operations.append(_Operation(name, spec.magnitude / (_BINS - 1), -1.0 if sign < 0.5 else 1.0))
    return operations


def _changed(
    image: Tensor, spec: AugmentationSpec, draws: list[float], operations: list[_Operation], matrices: Tensor
) -> Tensor:
    if spec.crop is not None:
        image = _resized_crop(image, spec.crop, draws[_CROP:_FLIP])
    if draws[_FLIP] < spec.flip:
        image = F.horizontal_flip(image)
    if spec.colour:
        image = _jittered(image, spec.colour, draws[_COLOUR:_RANDAUGMENT])
    for operation, matrix in zip(operations, matrices, strict=True):
        image = operation.apply(image, matrix)
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


def _moved(image: Tensor, matrix: Tensor) -> Tensor:
    """Take each pixel from where `matrix` sends it, the nearest one there; what comes in is black."""
    grid = affine_grid(matrix[None], [1, *image.shape], align_corners=False)
    pixels = image[None].to(torch.float32)
    moved = grid_sample(pixels, grid, mode="nearest", padding_mode="zeros", align_corners=False)
    return moved[0].to(image.dtype)


def _rotation(degrees: float) -> Matrix:
    cosine, sine = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    return [[cosine, -sine, 0.0], [sine, cosine, 0.0]]


def _pixels(share: float, size: int) -> float:
    """Round a share of the size to whole pixels, where an image reaches from -1 to 1."""
    return 2 * round(share * size) / size


# Name -> function of a signed strength and the size: the matrix that says where a pixel comes from, around the middle.
_MOVES: dict[str, Callable[[float, int], Matrix]] = {
    "shear_x": lambda strength, _: [[1.0, 0.3 * strength, 0.0], [0.0, 1.0, 0.0]],
    "shear_y": lambda strength, _: [[1.0, 0.0, 0.0], [0.3 * strength, 1.0, 0.0]],
    "translate_x": lambda strength, size: [[1.0, 0.0, -_pixels(150 / 331 * strength, size)], [0.0, 1.0, 0.0]],
    "translate_y": lambda strength, size: [[1.0, 0.0, 0.0], [0.0, 1.0, -_pixels(150 / 331 * strength, size)]],
    "rotate": lambda strength, _: _rotation(30 * strength),
}


def _sharpened(image: Tensor, factor: float) -> Tensor:
    """Do what `F.adjust_sharpness` does, which copies its kernel to the device for every image.

    The kernel is 1/13 around 5/13: the sum of nine pixels and four times the middle one.
    """
    if min(image.shape[-2:]) < 3:
        return image
    sharpened = image.to(torch.float32)
    inner = sharpened[:, 1:-1, 1:-1]
    blurred = avg_pool2d(sharpened, 3, stride=1, divisor_override=1).add_(inner, alpha=4).div_(13).round_()
    inner.add_(blurred.sub_(inner), alpha=1 - factor)
    return sharpened.clamp_(0, 255).to(image.dtype)


# Name -> function of an image (3, size, size), a strength in [0, 1] and a sign.
_OPERATIONS: dict[str, Callable[[Tensor, float, float], Tensor]] = {
    "brightness": lambda image, strength, sign: F.adjust_brightness(image, 1 + 0.9 * strength * sign),
    "colour": lambda image, strength, sign: F.adjust_saturation(image, 1 + 0.9 * strength * sign),
    "contrast": lambda image, strength, sign: F.adjust_contrast(image, 1 + 0.9 * strength * sign),
    "sharpness": lambda image, strength, sign: _sharpened(image, 1 + 0.9 * strength * sign),
    "posterize": lambda image, strength, _: F.posterize(image, 8 - round(4 * strength)),
    "solarize": lambda image, strength, _: F.solarize(image, 255 * (1 - strength)),
    "autocontrast": lambda image, _, __: F.autocontrast(image),
    "equalize": lambda image, _, __: F.equalize(image),
}
_OPERATION_NAMES = ("identity", *_MOVES, *_OPERATIONS)
