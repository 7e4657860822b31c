"""Train and test splits of a data set, and batches of normalised images from them.

A split is an ordered set of labelled images, and `batches` iterates over it. The order of an epoch and the
augmentation of every image are drawn from (seed, epoch) for the whole epoch at once, so that they do not depend on the
batch size, the number of workers or anything drawn before.

Every image is decoded to RGB, cropped to the largest centred square, and resized bilinearly to `image_size`. If train
and test together fit in `CACHE_BYTES` as uint8, all images are decoded when the set is loaded, and a damaged file is
reported then. Larger sets are decoded a few batches ahead of use, with bit-identical results. The workers are threads:
Pillow's decoders release the interpreter lock, no shared memory is needed, and an error is raised as it is.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from passdeploy.data.datasets import find_images
from passdeploy.data.images import Augmentation, ImageSource, Pixels, RawDataset
from passdeploy.errors import DataError
from passdeploy.runtime.seeds import generator

if TYPE_CHECKING:
    from passdeploy.recipe import DataSpec

CACHE_BYTES = 512 * 2**20
IMAGENET_MEAN = (0.485, 0.456, 0.406)  # of pixels in [0, 1]; pretrained networks expect this normalisation
IMAGENET_STD = (0.229, 0.224, 0.225)
_BATCHES_AHEAD = 3
_MOST_WORKERS = 16

RGB = tuple[float, float, float]


class Split(Protocol):
    """An ordered set of labelled images."""

    @property
    def num_classes(self) -> int:
        """Number of classes; labels are below it."""

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
        """Iterate over normalised images, float32 (batch, 3, height, width), with labels, int64 (batch,).

        Args:
            batch_size: images per batch; the last one may be smaller, unless `drop_last`.
            epoch: number of the shuffling; None keeps the split's own order.
            seed: with `epoch`, the key of the order and of the augmentation.
            augment: apply the random changes that leave the labels of this data set true.
            drop_last: leave out a last batch that is not full.
            part: (index, count): only the part with this index of every batch, for one of `count` processes.
        """


@dataclass(frozen=True)
class ImageData:
    """A data set with its train and test splits."""

    name: str
    classes: tuple[str, ...]  # label -> name
    image_shape: tuple[int, int, int]  # (3, height, width)
    mean: RGB  # of pixels in [0, 1]
    std: RGB
    train: Split
    test: Split
    skipped: tuple[str, ...] = ()  # images that could not be read and were left out, with the reason

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self.classes)


def load_data(spec: DataSpec, *, cache_bytes: int = CACHE_BYTES) -> ImageData:
    """Find, split and, where it is small, decode the data set that `spec` names.

    Nothing here depends on the recipe's seed: the images held out for testing are the same in every run.

    Args:
        spec: the `data` section of a recipe.
        cache_bytes: sets of at most this many bytes of pixels are decoded once and kept in memory.

    Raises:
        UsageError: no data set of that name.
        RecipeError: `data.root` is missing or not there.
        DataError: a class without images, fewer than two classes, a damaged image, or a test set
            with other classes than the training set.
    """
    size = spec.image_size
    loaded = find_images(spec)
    if len(loaded.classes) < 2:
        raise DataError(
            f"the data set {spec.name!r} has only one class, {loaded.classes[0]!r}.\n"
            "A classifier needs at least two: put the images of each class in a folder of its own."
        )
    skipped: list[str] = []
    if spec.on_unreadable == "skip":
        loaded = _without_unreadable(loaded, worker_count(spec.workers), skipped)
    total_bytes = (len(loaded.train.labels) + len(loaded.test.labels)) * 3 * size * size

    def split(source: ImageSource, augmentation: Augmentation | None) -> ImageSplit:
        return ImageSplit(
            source,
            num_classes=len(loaded.classes),
            augmentation=augmentation,
            workers=worker_count(spec.workers),
            is_cached=total_bytes <= cache_bytes,
        )

    return ImageData(
        name=spec.name,
        classes=loaded.classes,
        image_shape=(3, size, size),
        mean=IMAGENET_MEAN,
        std=IMAGENET_STD,
        train=split(loaded.train, loaded.augmentation),
        test=split(loaded.test, None),
        skipped=tuple(skipped),
    )


def _without_unreadable(found: RawDataset, workers: int, skipped: list[str]) -> RawDataset:
    """Drop the images that cannot be read, and append the reasons to `skipped`."""
    parts = []
    for source in (found.train, found.test):
        with _CancellingThreadPool(workers) as pool:
            problems = list(pool.map(source.problem_of, range(len(source.labels))))
        skipped += [problem for problem in problems if problem]
        parts.append(source.subset([index for index, problem in enumerate(problems) if not problem]))
        if lost := set(source.labels) - set(parts[-1].labels):
            raise DataError(
                f"no image of class {found.classes[min(lost)]!r} can be read; the first problem: {skipped[0]}.\n"
                "Replace the files, or remove the class."
            )
    return replace(found, train=parts[0], test=parts[1])


def worker_count(workers: int | str) -> int:
    """Return the number of decoding threads; "auto": one per processor that this process may use, at most 16."""
    if isinstance(workers, int):
        return max(1, workers)
    try:
        return min(len(os.sched_getaffinity(0)), _MOST_WORKERS)
    except AttributeError:  # not on every system
        return min(os.cpu_count() or 1, _MOST_WORKERS)


class ImageSplit:
    """The `Split` over an `ImageSource`, with its pixels kept in memory or decoded on demand."""

    def __init__(
        self,
        source: ImageSource,
        *,
        num_classes: int,
        augmentation: Augmentation | None,
        workers: int,
        is_cached: bool,
    ) -> None:
        self.num_classes = num_classes
        self.labels = torch.tensor(source.labels, dtype=torch.int64)
        self._decode, self._workers, self._augmentation = source.decode, workers, augmentation
        # (pixel / 255 - mean) / std, as one multiplication and one addition
        mean, std = torch.tensor(IMAGENET_MEAN).view(3, 1, 1), torch.tensor(IMAGENET_STD).view(3, 1, 1)
        self._scale, self._offset = 1 / (255 * std), -mean / std
        self._cached = self._decode_all() if is_cached else None  # uint8 (images, 3, height, width)

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
        return self._iterate(order, batch_size, policy, generator("augment", seed, epoch or 0), part)

    def _iterate(
        self,
        order: Tensor,
        batch_size: int,
        policy: Augmentation | None,
        generator: torch.Generator,
        part: tuple[int, int],
    ) -> Iterator[tuple[Tensor, Tensor]]:
        # drawn for all positions of the epoch at once, so that they do not depend on the batch size
        draws = torch.rand((len(self), 3), generator=generator)[: len(order)]
        index, count = part
        own_images = [batch.tensor_split(count)[index] for batch in torch.split(order, batch_size)]
        own_draws = [batch.tensor_split(count)[index] for batch in torch.split(draws, batch_size)]
        for chosen, drawn, pixels in zip(own_images, own_draws, self._pixels(own_images), strict=True):
            images = _augment(pixels, policy, drawn) if policy else pixels
            yield images.to(torch.float32).mul_(self._scale).add_(self._offset), self.labels[chosen]

    def _pixels(self, parts: Sequence[Tensor]) -> Iterator[Tensor]:
        """Iterate over the images of each part, uint8 (batch, 3, height, width)."""
        if self._cached is not None:
            for part in parts:
                yield self._cached[part]
            return
        with _CancellingThreadPool(self._workers) as pool:
            waiting: deque[list[Future[Pixels]]] = deque()
            for part in parts:
                waiting.append([pool.submit(self._decode, index) for index in part.tolist()])
                if len(waiting) > _BATCHES_AHEAD:
                    yield _stack([future.result() for future in waiting.popleft()])
            while waiting:
                yield _stack([future.result() for future in waiting.popleft()])

    def _decode_all(self) -> Tensor:
        first = self._decode(0)
        pixels = np.empty((len(self), 3, *first.shape[:2]), dtype=np.uint8)

        def fill(index: int) -> None:
            pixels[index] = self._decode(index).transpose(2, 0, 1)

        with _CancellingThreadPool(self._workers) as pool:
            for _ in pool.map(fill, range(len(self))):  # in order, so that the first bad file is named
                pass
        return torch.from_numpy(pixels)


class _CancellingThreadPool(ThreadPoolExecutor):
    """A thread pool that cancels work that has not begun when its block is left early."""

    def __exit__(self, *error: object) -> None:
        self.shutdown(wait=True, cancel_futures=True)


def _stack(images: Sequence[Pixels]) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(np.stack(images).transpose(0, 3, 1, 2)))


def _augment(images: Tensor, policy: Augmentation, draws: Tensor) -> Tensor:
    """Shift and flip each image by its own random numbers.

    Args:
        images: uint8 (batch, 3, height, width).
        policy: the changes to apply.
        draws: uniform in [0, 1), shape (batch, 3): shift down, shift right, flip.
    """
    if policy.shift:
        height, width = images.shape[2:]
        reach = height // 8
        padded = F.pad(images, (reach, reach, reach, reach))
        corners = (draws[:, :2] * (2 * reach + 1)).long().tolist()
        # a slice per image is four times faster on a CPU than one gather over the batch
        images = torch.stack(
            [image[:, y : y + height, x : x + width] for image, (y, x) in zip(padded, corners, strict=True)]
        )
    if policy.flip:
        images = torch.where((draws[:, 2] < 0.5).view(-1, 1, 1, 1), images.flip(3), images)
    return images
