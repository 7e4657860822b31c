"""Preprocessing of images before a network: how they are cropped and resized, and how pixels are normalised."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from passdeploy.errors import percent
from passdeploy.recipe.base import Section

IMAGENET_MEAN = (0.485, 0.456, 0.406)  # of pixels in [0, 1]; most pretrained networks expect this normalisation
IMAGENET_STD = (0.229, 0.224, 0.225)

Interpolation = Literal["nearest", "bilinear", "bicubic", "lanczos"]
Colour = Annotated[float, Field(ge=0, le=1)]
Spread = Annotated[float, Field(ge=1e-3, le=1)]  # pixels lie in [0, 1]: 58.4 would be of pixels up to 255


class PreprocessingSpec(Section):
    """Preprocessing of every image, in training and in testing, before the network gets it."""

    mean: tuple[Colour, Colour, Colour] = Field(
        default=IMAGENET_MEAN, strict=False, description="Of red, green and blue, pixels in [0, 1]: subtracted."
    )
    std: tuple[Spread, Spread, Spread] = Field(
        default=IMAGENET_STD, strict=False, description="Of red, green and blue, pixels in [0, 1]: divided by."
    )
    interpolation: Interpolation = Field(default="bilinear", description="How images are resized.")
    crop: float = Field(
        default=1.0,
        gt=0,
        le=1,
        description="Side of the centred square that is used, as a share of the image's shorter side.",
    )

    @property
    def text(self) -> str:
        """The preprocessing in words."""
        mean, std = (" ".join(f"{value:g}" for value in values) for values in (self.mean, self.std))
        square = "the largest square" if self.crop == 1 else f"{percent(self.crop)} of the largest square"
        return f"{square} in the centre, {self.interpolation}, mean {mean}, std {std}"
