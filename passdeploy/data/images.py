"""One image: from a file or an array to a square of RGB pixels, and what a data set hands over before decoding."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from passdeploy.errors import DataError, first_line

Pixels = NDArray[np.uint8]  # (height, width, 3)


@dataclass(frozen=True)
class Augmentation:
    """Changes that leave the label true."""

    shift: bool = True  # by up to an eighth of the image, black beyond its border
    flip: bool = True  # left and right, every second image


@dataclass(frozen=True)
class ImageSource:
    """Images that are not decoded yet."""

    decode: Callable[[int], Pixels]  # index -> (image_size, image_size, 3)
    labels: tuple[int, ...]

    def subset(self, indices: Sequence[int]) -> ImageSource:
        """The same images, fewer of them."""
        return ImageSource(lambda i: self.decode(indices[i]), tuple(self.labels[i] for i in indices))

    def problem_of(self, index: int) -> str | None:
        """Why an image cannot be read, in one line; None where it can."""
        try:
            self.decode(index)
        except DataError as error:
            return first_line(error, longest=None)
        return None


@dataclass(frozen=True)
class RawDataset:
    """What a loader finds: names, and where train and test images come from."""

    classes: tuple[str, ...]
    train: ImageSource
    test: ImageSource
    augmentation: Augmentation = Augmentation()


def crop_and_resize(image: Image.Image, size: int) -> Pixels:
    """The largest centred square of `image`, bilinear to (size, size, 3)."""
    if image.mode.startswith("I;16"):  # Pillow would clip 16 bits at 255
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    elif image.mode in ("I", "F"):
        raise ValueError(f"pixels of mode {image.mode!r} have no known range")
    fitted = ImageOps.fit(image.convert("RGB"), (size, size), Image.Resampling.BILINEAR)
    return np.asarray(fitted, dtype=np.uint8)


def decode_file(path: Path, size: int) -> Pixels:
    """The image in a file, as `crop_and_resize` gives it.

    Raises:
        DataError: it cannot be read.
    """
    try:
        with Image.open(path) as image:
            return crop_and_resize(image, size)
    except Exception as error:  # decoders raise almost anything on damaged bytes
        reason = "Pillow knows no format like it" if isinstance(error, UnidentifiedImageError) else error
        raise DataError(
            f"{path} cannot be read as an image: {reason}.\nReplace the file, or take it out of its folder."
        ) from error
