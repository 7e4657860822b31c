"""The input that pretrained weights were published for: size, crop, interpolation and normalisation of images.

They are read from timm's configuration of the weights, and from the transforms that torchvision publishes with them.
Nothing is downloaded.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from passdeploy.errors import require
from passdeploy.recipe.preprocessing import PreprocessingSpec

_INTERPOLATIONS = {
    "nearest": "nearest",
    "nearest-exact": "nearest",
    "bilinear": "bilinear",
    "bicubic": "bicubic",
    "lanczos": "lanczos",
}


@dataclass(frozen=True)
class PublishedInput:
    """Images as pretrained weights expect them."""

    image_size: int  # height and width, in pixels
    preprocessing: PreprocessingSpec


def published_input(name: str) -> PublishedInput | None:
    """Return what the pretrained weights of `torchvision/NAME` or `timm/NAME` expect; None where that is unknown.

    Raises:
        MissingExtra: timm is not installed.
    """
    library, _, short = name.partition("/")
    if library == "torchvision":
        return _of_torchvision(short)
    return _of_timm(short) if library == "timm" else None


def _of_torchvision(name: str) -> PublishedInput | None:
    from torchvision.models import get_model_weights

    try:
        transforms: Any = get_model_weights(name).DEFAULT.transforms()
    except (ValueError, AttributeError):  # unknown, or without weights: building it explains
        return None
    if not all(hasattr(transforms, key) for key in ("crop_size", "resize_size", "mean", "std", "interpolation")):
        return None  # not those of a classifier
    crop, resized = transforms.crop_size[-1], transforms.resize_size[-1]
    interpolation = transforms.interpolation.value
    return _made(crop, transforms.mean, transforms.std, interpolation, crop / resized)


def _of_timm(name: str) -> PublishedInput | None:
    timm = require("timm", extra="timm")
    try:
        config = timm.get_pretrained_cfg(name, allow_unregistered=False)
    except RuntimeError:
        return None
    if config is None or len(config.mean) != 3:
        return None
    return _made(config.input_size[-1], config.mean, config.std, config.interpolation, config.crop_pct)


def _made(image_size: int, mean: Any, std: Any, interpolation: str, crop: float) -> PublishedInput:
    values = {
        "mean": [float(value) for value in mean],
        "std": [float(value) for value in std],
        "interpolation": _INTERPOLATIONS.get(interpolation, "bilinear"),
        "crop": min(1.0, float(crop)),
    }
    return PublishedInput(int(image_size), PreprocessingSpec.model_validate(values))
