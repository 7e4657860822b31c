"""Images of a data set of the Hugging Face hub (`hf/NAME`); the `datasets` library downloads and decodes them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from passdeploy.data.images import Frame, ImageSource, Pixels, RawDataset, crop_and_resize, unreadable
from passdeploy.errors import DataError, first_line, require

if TYPE_CHECKING:
    from passdeploy.recipe import DataSpec

_HELD_OUT = ("test", "validation")  # the first one whose labels are known is tested on


def find_hub_images(spec: DataSpec, frame: Frame) -> RawDataset:
    """Find the images of an image classification set of the hub, or of a local folder in its format (`data.root`).

    Accuracy is counted on the part `test`, or on `validation` where the labels of `test` are secret: -1, or no column.

    Raises:
        MissingExtra: the `datasets` library is not installed.
        DataError: the set cannot be loaded, or lacks images, labels, or a part to train or to test on.
    """
    parts = _load_parts(spec)
    offered = [name for name in _HELD_OUT if name in parts]
    if "train" not in parts or not offered:
        raise DataError(
            f"the data set {spec.name!r} has the parts {', '.join(parts)}.\nNeeded are train, and test or validation."
        )
    image, label = _columns(spec, parts["train"])
    labels = {name: _labels_of(parts[name], label) for name in ("train", *offered)}
    secret = [name for name, numbers in labels.items() if not numbers or min(numbers) < 0]
    if "train" in secret:
        raise DataError(
            f"the data set {spec.name!r} has images without a label in its part train.\n"
            "Set data.root to a folder that holds the set without them."
        )
    held_out = next((name for name in offered if name not in secret), None)
    if held_out is None:
        raise DataError(
            f"the data set {spec.name!r} keeps the labels of {' and '.join(offered)} secret: nothing can be tested.\n"
            "Set data.root to a folder that holds the set with a part test that has labels."
        )

    def source(name: str) -> ImageSource:
        def decode(index: int) -> Pixels:
            try:
                return crop_and_resize(parts[name][index][image], frame)
            except Exception as error:  # decoders raise almost anything on damaged bytes
                advice = "Leave such images out with --set data.on_unreadable=skip"
                raise unreadable(f"image {index} of {spec.name} ({name})", error, advice) from error

        return ImageSource(decode, labels[name])

    left_out = tuple(f"the part {name}, whose labels are secret" for name in secret)
    classes = tuple(parts["train"].features[label].names)
    return RawDataset(classes, source("train"), source(held_out), left_out=left_out)


def _load_parts(spec: DataSpec) -> Any:
    """Load all parts of a data set, by name."""
    library = require("datasets", extra="hf")
    try:
        return library.load_dataset(spec.root or spec.name.removeprefix("hf/"))
    except Exception as error:  # the library raises its own, urllib's and pyarrow's errors
        raise DataError(
            f"the data set {spec.name!r} cannot be loaded: {first_line(error, longest=120)}.\n"
            "Go online once (it is kept), or set data.root to a folder that holds it."
        ) from error


def _columns(spec: DataSpec, part: Any) -> tuple[str, str]:
    """Find the columns of the images and of their labels."""
    kinds = {key: type(feature).__name__ for key, feature in part.features.items()}
    image, label = (
        next((key for key, kind in kinds.items() if kind == wanted), None) for wanted in ("Image", "ClassLabel")
    )
    if image is None or label is None:
        raise DataError(
            f"the data set {spec.name!r} has the columns {', '.join(kinds)}.\nNeeded are an Image and a ClassLabel."
        )
    return image, label


def _labels_of(part: Any, label: str) -> tuple[int, ...]:
    """Read the labels of a part: -1 where one is secret; none at all where the part has no column of them."""
    if label not in part.features:
        return ()
    return tuple(-1 if number is None else int(number) for number in part[label])
