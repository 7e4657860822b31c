"""Images before and after decoding: sources of images with labels, and decoding to a square of RGB pixels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from passdeploy.errors import DataError, first_line

Pixels = NDArray[np.uint8]  # (3, height, width)

_RESAMPLING = {name: Image.Resampling[name.upper()] for name in ("nearest", "bilinear", "bicubic", "lanczos")}


@dataclass(frozen=True)
class Frame:
    """The square of an image that a network gets."""

    size: int  # height and width in pixels
    interpolation: str = "bilinear"
    crop: float = 1.0  # side of the centred square before it is resized, as a share of the shorter side


@dataclass(frozen=True)
class Augmentation:
    """Random changes of training images that do not change the label."""

    shift: bool = True  # by up to an eighth of the image, filled with black
    flip: bool = True  # horizontally, with probability 1/2


@dataclass(frozen=True)
class ImageSource:
    """Labelled images that are decoded on demand."""

    decode: Callable[[int], Pixels]  # index -> (3, image_size, image_size)
    labels: tuple[int, ...]
    paths: tuple[str, ...] | None = None  # of the files, if `decode` is `decode_file`; other processes can read them
    frame: Frame | None = None  # with which these decode them

    @classmethod
    def of_files(cls, paths: Sequence[str], labels: Sequence[int], frame: Frame) -> ImageSource:
        """Return a source of image files."""
        return cls(lambda i: decode_file(paths[i], frame), tuple(labels), tuple(paths), frame)

    def subset(self, indices: Sequence[int]) -> ImageSource:
        """Return a source of the images at `indices`."""
        labels = tuple(self.labels[i] for i in indices)
        paths = tuple(self.paths[i] for i in indices) if self.paths else None
        return ImageSource(lambda i: self.decode(indices[i]), labels, paths, self.frame)

    def problem_of(self, index: int) -> str | None:
        """Try to decode an image; return the first line of the error, or None."""
        try:
            self.decode(index)
        except DataError as error:
            return first_line(error, longest=None)
        return None


@dataclass(frozen=True)
class RawDataset:
    """A data set before decoding: the names of its classes, and its train and test images."""

    classes: tuple[str, ...]
    train: ImageSource
    test: ImageSource
    augmentation: Augmentation = Augmentation()
    left_out: tuple[str, ...] = ()  # what lies beside the images and is not used, one sentence for each reason


_TURNS = {  # EXIF orientation -> how a viewer turns the image
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def crop_and_resize(image: Image.Image, frame: Frame) -> Pixels:
    """Crop the centred square of `image` that a frame asks for and resize it, to uint8 (3, size, size).

    It is turned as its EXIF orientation says, which cameras write instead of turning the pixels.
    """
    source = image
    if image.mode.startswith("I;16"):  # Pillow would clip 16 bits at 255
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    elif image.mode in ("I", "F"):
        raise ValueError(f"pixels of mode {image.mode!r} have no known range")
    image.load()  # which settles size and mode
    if image.mode != "RGB":  # it would be copied
        image = image.convert("RGB")
    size = frame.size
    fitted = ImageOps.fit(image, (size, size), _RESAMPLING[frame.interpolation], bleed=(1 - frame.crop) / 2)
    if (turn := _turn_of(source)) is not None:  # of the small square, which is quicker
        fitted = fitted.transpose(turn)
    rows = np.frombuffer(fitted.tobytes("raw", "RGB;L"), np.uint8)  # of each row its reds, its greens, its blues
    return np.ascontiguousarray(rows.reshape(size, 3, size).transpose(1, 0, 2))


def _turn_of(image: Image.Image) -> Image.Transpose | None:
    """Return how the EXIF orientation of a loaded image turns it; None where there is none, or none that is valid."""
    try:
        return _TURNS.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # damaged EXIF data, of any kind; the pixels may be whole
        return None


def decode_file(path: str | Path, frame: Frame) -> Pixels:
    """Read an image file, and crop and resize it to uint8 (3, size, size).

    Raises:
        DataError: it cannot be read.
    """
    try:
        with Image.open(path) as image:
            return crop_and_resize(image, frame)
    except Exception as error:  # decoders raise almost anything on damaged bytes
        raise unreadable(str(path), error, "Replace the file, or take it out of its folder.") from error


def unreadable(image: str, error: Exception, advice: str) -> DataError:
    """Make the error that says why an image cannot be decoded, from what the decoder raised."""
    reason = "Pillow knows no format like it" if isinstance(error, UnidentifiedImageError) else first_line(error)
    return DataError(f"{image} cannot be read as an image: {reason}.\n{advice}")
