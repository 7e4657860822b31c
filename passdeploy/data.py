"""From a name in a recipe to batches of images.

A split is an ordered set of labelled images; `batches` walks it. The order of an epoch and the
augmentation of every sample are drawn from (seed, epoch) for the whole epoch at once and belong to a
position in that order: neither batch size, workers nor earlier draws change what a position gets.

Every image is decoded by the same function: to RGB, the largest centred square, bilinear to
`image_size`. Where train and test together fit in `HELD_BYTES` as uint8, that is done once, when the
set is loaded, and a damaged file is found there; larger sets are decoded batch by batch, ahead of use,
with the same bits. The decoders of Pillow release the interpreter lock, so workers are threads: no
shared memory to run out of, and an error arrives as it was raised.
"""

from __future__ import annotations

import os
import warnings
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from passdeploy.chance import generator
from passdeploy.errors import DataError, RecipeError, UsageError, require

if TYPE_CHECKING:
    from passdeploy.recipe import DataSpec

HELD_BYTES = 512 * 2**20
IMAGENET_MEAN = (0.485, 0.456, 0.406)  # of pixels in [0, 1]; what pretrained networks expect
IMAGENET_STD = (0.229, 0.224, 0.225)
TEST_SHARE = 0.2  # of every class, where the source has no test set of its own
_SPLIT_KEY = ("held-out share", 0)  # a constant: which images are held out never depends on the recipe
_SUFFIXES = {".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"}
_BATCHES_AHEAD = 3
_MOST_WORKERS = 16

Pixels = NDArray[np.uint8]  # (height, width, 3)
RGB = tuple[float, float, float]


class Split(Protocol):
    """An ordered set of labelled images."""

    @property
    def num_classes(self) -> int:
        """How many classes the labels name."""

    def __len__(self) -> int: ...

    def batches(
        self,
        batch_size: int,
        *,
        epoch: int | None = None,
        seed: int = 0,
        augment: bool = False,
        drop_last: bool = False,
        part: tuple[int, int] = (0, 1),
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Normalised images, float32 (batch, 3, height, width), and labels, int64 (batch,).

        Args:
            batch_size: images per batch; the last one may be smaller, unless `drop_last`.
            epoch: which shuffling; None walks the split in its own order.
            seed: with `epoch`, the key of the order and of the augmentation.
            augment: change the images as this data set allows without changing a label.
            drop_last: leave out a last batch that is not full.
            part: (which, of how many): this share of every batch only, for one of several processes.
        """


@dataclass(frozen=True)
class ImageData:
    """A data set, decoded and split."""

    name: str
    classes: tuple[str, ...]  # label -> name
    image_shape: tuple[int, int, int]  # (3, height, width)
    mean: RGB  # of pixels in [0, 1]
    std: RGB
    train: Split
    test: Split

    @property
    def num_classes(self) -> int:
        """How many classes there are."""
        return len(self.classes)


@dataclass(frozen=True)
class Augmentation:
    """Changes that leave the label true."""

    shift: bool = True  # by up to an eighth of the image, black beyond its border
    flip: bool = True  # left and right, every second image


@dataclass(frozen=True)
class _Source:
    """Images that are not decoded yet."""

    decode: Callable[[int], Pixels]  # index -> (image_size, image_size, 3)
    labels: tuple[int, ...]

    def only(self, indices: Sequence[int]) -> _Source:
        """The same images, fewer of them."""
        return _Source(lambda i: self.decode(indices[i]), tuple(self.labels[i] for i in indices))


@dataclass(frozen=True)
class _Loaded:
    """What a loader finds: names, and where train and test images come from."""

    classes: tuple[str, ...]
    train: _Source
    test: _Source
    augmentation: Augmentation


def load_data(spec: DataSpec, *, held_bytes: int = HELD_BYTES) -> ImageData:
    """Find, split and, where it is small, decode the data set that `spec` names.

    Nothing here is drawn by the recipe's seed: images held out for testing are the same in every run.

    Args:
        spec: the `data` section of a recipe.
        held_bytes: sets of at most this many bytes of pixels are kept in memory.

    Raises:
        UsageError: no data set of that name.
        RecipeError: `data.root` is missing or not there.
        DataError: a class without images, fewer than two classes, a damaged image, or a test set
            with other classes than the training set.
    """
    if spec.name not in _LOADERS:
        raise UsageError(f"data.name is {spec.name!r}, which cannot be loaded.\nKnown: {', '.join(sorted(_LOADERS))}.")
    size = spec.image_size
    loaded = _LOADERS[spec.name](spec, size)
    if len(loaded.classes) < 2:
        raise DataError(
            f"the data set {spec.name!r} has only one class, {loaded.classes[0]!r}.\n"
            "A classifier needs at least two: put the images of each class in a folder of its own."
        )
    total_bytes = (len(loaded.train.labels) + len(loaded.test.labels)) * 3 * size * size

    def split(source: _Source, augmentation: Augmentation | None) -> ImageSplit:
        return ImageSplit(
            source,
            num_classes=len(loaded.classes),
            augmentation=augmentation,
            workers=worker_count(spec.workers),
            is_held=total_bytes <= held_bytes,
        )

    return ImageData(
        name=spec.name,
        classes=loaded.classes,
        image_shape=(3, size, size),
        mean=IMAGENET_MEAN,
        std=IMAGENET_STD,
        train=split(loaded.train, loaded.augmentation),
        test=split(loaded.test, None),
    )


def worker_count(workers: int | str) -> int:
    """How many threads decode; "auto" is one per processor that this process may use, at most 16."""
    if isinstance(workers, int):
        return max(1, workers)
    try:
        return min(len(os.sched_getaffinity(0)), _MOST_WORKERS)
    except AttributeError:  # not on every system
        return min(os.cpu_count() or 1, _MOST_WORKERS)


class ImageSplit:
    """The `Split` of every source: decoded pixels, or a way to decode them."""

    def __init__(
        self,
        source: _Source,
        *,
        num_classes: int,
        augmentation: Augmentation | None,
        workers: int,
        is_held: bool,
    ) -> None:
        self.num_classes = num_classes
        self.labels = torch.tensor(source.labels, dtype=torch.int64)
        self._decode, self._workers, self._augmentation = source.decode, workers, augmentation
        # (pixel / 255 - mean) / std, as one multiplication and one addition
        mean, std = torch.tensor(IMAGENET_MEAN).view(3, 1, 1), torch.tensor(IMAGENET_STD).view(3, 1, 1)
        self._scale, self._offset = 1 / (255 * std), -mean / std
        self._held = self._decode_all() if is_held else None  # uint8 (images, 3, height, width)

    def __len__(self) -> int:
        return len(self.labels)

    def batches(
        self,
        batch_size: int,
        *,
        epoch: int | None = None,
        seed: int = 0,
        augment: bool = False,
        drop_last: bool = False,
        part: tuple[int, int] = (0, 1),
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """See `Split.batches`."""
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}; a batch has at least one image")
        if augment and epoch is None:
            raise ValueError("augmentation is drawn per epoch: give one, or leave augment off")
        count = len(self) - len(self) % batch_size if drop_last else len(self)
        if epoch is None:
            order = torch.arange(count)
        else:
            order = torch.randperm(len(self), generator=generator("order", seed, epoch))[:count]
        policy = self._augmentation if augment else None
        return self._walk(order, batch_size, policy, generator("augment", seed, epoch or 0), part)

    def _walk(
        self,
        order: Tensor,
        batch_size: int,
        policy: Augmentation | None,
        chance: torch.Generator,
        part: tuple[int, int],
    ) -> Iterator[tuple[Tensor, Tensor]]:
        # one draw per position of the epoch, before it is known which batch the position falls into
        draws = list(torch.split(torch.rand((len(self), 3), generator=chance)[: len(order)], batch_size))
        which, of = part
        mine = [batch.tensor_split(of)[which] for batch in torch.split(order, batch_size)]
        draws = [drawn.tensor_split(of)[which] for drawn in draws]
        for chosen, drawn, pixels in zip(mine, draws, self._pixels(mine), strict=True):
            images = _augmented(pixels, policy, drawn) if policy else pixels
            yield images.to(torch.float32).mul_(self._scale).add_(self._offset), self.labels[chosen]

    def _pixels(self, parts: Sequence[Tensor]) -> Iterator[Tensor]:
        """The images of each part, uint8 (batch, 3, height, width)."""
        if self._held is not None:
            for part in parts:
                yield self._held[part]
            return
        with _threads(self._workers) as pool:
            waiting: deque[list[Future[Pixels]]] = deque()
            for part in parts:
                waiting.append([pool.submit(self._decode, index) for index in part.tolist()])
                if len(waiting) > _BATCHES_AHEAD:
                    yield _stacked([future.result() for future in waiting.popleft()])
            while waiting:
                yield _stacked([future.result() for future in waiting.popleft()])

    def _decode_all(self) -> Tensor:
        first = self._decode(0)
        held = np.empty((len(self), 3, *first.shape[:2]), dtype=np.uint8)

        def fill(index: int) -> None:
            held[index] = self._decode(index).transpose(2, 0, 1)

        with _threads(self._workers) as pool:
            for _ in pool.map(fill, range(len(self))):  # in order, so that the first bad file is named
                pass
        return torch.from_numpy(held)


class _threads(ThreadPoolExecutor):
    """A thread pool that drops what has not begun when its block is left early."""

    def __exit__(self, *error: object) -> None:
        self.shutdown(wait=True, cancel_futures=True)


def _stacked(images: Sequence[Pixels]) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(np.stack(images).transpose(0, 3, 1, 2)))


def _augmented(images: Tensor, policy: Augmentation, draws: Tensor) -> Tensor:
    """Shift and flip each image by its own draws.

    Args:
        images: uint8 (batch, 3, height, width).
        policy: which changes are allowed.
        draws: uniform in [0, 1), (batch, 3): down, right, flip.
    """
    if policy.shift:
        height, width = images.shape[2:]
        reach = height // 8
        framed = F.pad(images, (reach, reach, reach, reach))
        corners = (draws[:, :2] * (2 * reach + 1)).long().tolist()
        # a slice per image is four times faster on a CPU than one gather over the batch
        images = torch.stack(
            [image[:, y : y + height, x : x + width] for image, (y, x) in zip(framed, corners, strict=True)]
        )
    if policy.flip:
        images = torch.where((draws[:, 2] < 0.5).view(-1, 1, 1, 1), images.flip(3), images)
    return images


def _squared(image: Image.Image, size: int) -> Pixels:
    """The largest centred square of `image`, bilinear to (size, size, 3)."""
    if image.mode.startswith("I;16"):  # Pillow would clip 16 bits at 255
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    elif image.mode in ("I", "F"):
        raise ValueError(f"pixels of mode {image.mode!r} have no known range")
    fitted = ImageOps.fit(image.convert("RGB"), (size, size), Image.Resampling.BILINEAR)
    return np.asarray(fitted, dtype=np.uint8)


def _decoded(path: Path, size: int) -> Pixels:
    try:
        with Image.open(path) as image:
            return _squared(image, size)
    except Exception as error:  # decoders raise almost anything on damaged bytes
        reason = "Pillow knows no format like it" if isinstance(error, UnidentifiedImageError) else error
        raise DataError(
            f"{path} cannot be read as an image: {reason}.\nReplace the file, or take it out of its folder."
        ) from error


def _held_out(labels: Sequence[int]) -> tuple[list[int], list[int]]:
    """Indices for training and for testing: a fixed fifth of every class, at least one image of each."""
    train: list[int] = []
    test: list[int] = []
    for label in sorted(set(labels)):
        members = [index for index, other in enumerate(labels) if other == label]
        mixed = torch.randperm(len(members), generator=generator(*_SPLIT_KEY, label)).tolist()
        count = max(1, round(TEST_SHARE * len(members)))
        test += [members[i] for i in mixed[:count]]
        train += [members[i] for i in mixed[count:]]
    return sorted(train), sorted(test)


def _digits(spec: DataSpec, size: int) -> _Loaded:
    """scikit-learn's 1,797 scanned digits, 8x8 (Alpaydin and Kaynak 1998)."""
    bunch = require("sklearn.datasets", extra="demo").load_digits()
    scans = np.rint(bunch.images * (255 / 16)).astype(np.uint8)  # (1797, 8, 8)
    source = _Source(lambda i: _squared(Image.fromarray(scans[i]), size), tuple(bunch.target.tolist()))
    train, test = _held_out(source.labels)
    names = tuple(str(name) for name in bunch.target_names)
    return _Loaded(names, source.only(train), source.only(test), Augmentation(flip=False))


def _imagefolder(spec: DataSpec, size: int) -> _Loaded:
    """One folder per class, below train/ and test/ (or val/), or directly below the root."""
    root = _root_of(spec, "a folder with train/<class>/ and test/<class>/, or with one folder per class")
    if not _subfolders(root / "train"):
        classes, source = _folder_source(root, size)
        for label, count in Counter(source.labels).items():
            if count < 2:
                raise DataError(
                    f"class {classes[label]!r} in {root} has one image, too few to train and to test on.\n"
                    "Add images, or provide train/ and test/ folders."
                )
        train, test = _held_out(source.labels)
        return _Loaded(classes, source.only(train), source.only(test), Augmentation())
    held_out = next((root / name for name in ("test", "val") if (root / name).is_dir()), None)
    if held_out is None:
        raise DataError(
            f"{root} has train/ but neither test/ nor val/.\n"
            f"Add one, or set data.root to {root / 'train'}: a fixed fifth of each class is then held out."
        )
    classes, training = _folder_source(root / "train", size)
    test_classes, testing = _folder_source(held_out, size)
    if classes != test_classes:
        odd = sorted(set(classes) ^ set(test_classes))
        raise DataError(
            f"train/ and {held_out.name}/ in {root} have different classes.\n"
            f"Only one of them has {_some(odd)}; both need the same class folders."
        )
    return _Loaded(classes, training, testing, Augmentation())


def _folder_source(root: Path, size: int) -> tuple[tuple[str, ...], _Source]:
    """Class names, in alphabetical order, and every image below their folders."""
    classes = _subfolders(root)
    if not classes:
        raise DataError(f"{root} holds no images.\nExpected one folder per class, with images in it.")
    paths: list[Path] = []
    labels: list[int] = []
    for label, name in enumerate(classes):
        found = _images_below(root / name)
        if not found:
            raise DataError(
                f"class folder {root / name} holds no image ({', '.join(sorted(_SUFFIXES))}).\n"
                "Add images, or remove the folder."
            )
        paths += found
        labels += [label] * len(found)
    return tuple(classes), _Source(lambda i: _decoded(paths[i], size), tuple(labels))


def _images_below(folder: Path) -> list[Path]:
    paths = [
        Path(parent, name)
        for parent, _, names in os.walk(folder, followlinks=True)
        for name in names
        if not name.startswith(".") and os.path.splitext(name)[1].lower() in _SUFFIXES
    ]
    for path in paths:  # now rather than in the middle of an epoch, for sets too large to decode at once
        if not path.is_file():
            raise DataError(f"{path} is a link to a file that is not there.\nMend the link, or remove it.")
        if path.stat().st_size == 0:
            raise DataError(f"{path} is empty (0 bytes), not an image.\nReplace the file, or remove it.")
    return sorted(paths)


def _subfolders(folder: Path) -> list[str]:
    if not folder.is_dir():
        return []
    return sorted(path.name for path in folder.iterdir() if path.is_dir() and path.name[0] != ".")


def _cifar(spec: DataSpec, size: int) -> _Loaded:
    """CIFAR-10 and CIFAR-100 in the layout of their Python archives (Krizhevsky 2009).

    torchvision checks the MD5 of every file before it reads them: they are pickles.
    """
    from torchvision import datasets
    from torchvision.datasets.utils import check_integrity

    reader = datasets.CIFAR10 if spec.name == "cifar10" else datasets.CIFAR100
    lesson = f"the folder that holds {reader.base_folder}/, unpacked from {reader.url}"
    root = _root_of(spec, lesson)
    folder = root / reader.base_folder
    if not folder.is_dir():
        raise RecipeError(f"{root} has no folder {reader.base_folder}.\ndata.root must be {lesson}")
    for name, md5 in [*reader.train_list, *reader.test_list, (reader.meta["filename"], reader.meta["md5"])]:
        if not check_integrity(str(folder / name), md5):
            state = "is damaged (its MD5 is wrong)" if (folder / name).is_file() else "is missing"
            raise DataError(f"{folder / name} {state}.\nUnpack {reader.url} again.")

    def source(part: Any) -> _Source:
        return _Source(lambda i: _squared(Image.fromarray(part.data[i]), size), tuple(part.targets))

    with warnings.catch_warnings():  # the archives were pickled by a NumPy that newer ones complain about
        warnings.simplefilter("ignore")
        train, test = (reader(str(root), train=is_train, download=False) for is_train in (True, False))
    return _Loaded(tuple(train.classes), source(train), source(test), Augmentation())


def _root_of(spec: DataSpec, expected: str) -> Path:
    if spec.root is None:
        raise RecipeError(f"data.name {spec.name!r} needs data.root: {expected}.\nGive it with --set data.root=PATH.")
    root = Path(spec.root).expanduser()
    if not root.is_dir():
        raise RecipeError(f"data.root {str(root)!r} is not a folder here.\nExpected {expected}.")
    return root


def _some(names: Sequence[str], most: int = 5) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(map(repr, names[:most])) + more


_LOADERS: dict[str, Callable[[DataSpec, int], _Loaded]] = {
    "cifar10": _cifar,
    "cifar100": _cifar,
    "digits": _digits,
    "imagefolder": _imagefolder,
}
