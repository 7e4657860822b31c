"""The `augmentation` section of a training: random changes of training images, in the order in which they are made."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, model_validator

from passdeploy.recipe.base import Section

Probability = Annotated[float, Field(ge=0, le=1)]


class RandAugmentSpec(Section):
    """RandAugment (Cubuk et al., arXiv:1909.13719): operations chosen at random, all of one strength."""

    ops: int = Field(default=2, ge=1, le=4, description="Operations for each image.")
    magnitude: int = Field(default=9, ge=0, le=30, description="Strength of each, of 30.")


class AugmentationSpec(Section):
    """Random changes of training images, those of `torchvision.transforms.v2`; drawn by image and epoch."""

    crop: Annotated[float, Field(gt=0, le=1)] | None = Field(
        default=None,
        description="Random resized crop: the smallest share of the image's area that is kept, such as 0.35, with "
        "sides in a ratio of 3:4 to 4:3. null: whole images.",
    )
    flip: Probability = Field(default=0.5, description="Probability of a mirrored image, left to right.")
    colour: float = Field(
        default=0.0,
        ge=0,
        le=1,
        description="Colour jitter: brightness, contrast and saturation change by up to this share, each by itself.",
    )
    randaugment: RandAugmentSpec | None = Field(default=None, description="RandAugment; null: none.")
    erase: Probability = Field(
        default=0.0,
        description="Random erasing: the probability that a box of 2 to 33 % of the image becomes black.",
    )

    @model_validator(mode="after")
    def _changes_something(self) -> AugmentationSpec:
        if self.crop is None and not (self.flip or self.colour or self.erase) and self.randaugment is None:
            raise ValueError("changes nothing.\nSet crop, flip, colour, randaugment or erase, or `augment: none`.")
        return self
