"""Train and test splits of a data set, and batches of normalised images from them.

A split is an ordered set of labelled images, and `batches` iterates over it. The order of an epoch and the
augmentation of every image are drawn from (seed, epoch) for the whole epoch at once, so that they do not depend on the
batch size, the number of workers or anything drawn before.

Every image is decoded to RGB, cropped to a centred square and resized, as `data.preprocessing` says. If train and test
together fit in `CACHE_BYTES` as uint8, all images are decoded when the set is loaded, and a damaged file is reported
then, or left out with `on_unreadable: skip`. Larger sets are decoded a few batches ahead of use (`reading.py`), with
bit-identical results; a damaged file is found on the way, and with skip another image stands in for it
(`stand_ins.py`). A GPU gets its batches as uint8, from a thread that works ahead (`feeding.py`).
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from passdeploy.data.augmentation import RGB, Normalisation, change_on_host, changes_from
from passdeploy.data.contents import DataContents
from passdeploy.data.datasets import find_images
from passdeploy.data.decoding_threads import DecodingThreads
from passdeploy.data.feeding import BatchPlan, DeviceFeed, is_fed
from passdeploy.data.identity import DataIdentity
from passdeploy.data.images import Augmentation, ImageSource, RawDataset
from passdeploy.data.reading import PixelReader, worker_count
from passdeploy.data.stand_ins import StandIns
from passdeploy.data.transforms import DRAWS, BatchTransforms
from passdeploy.errors import DataError
from passdeploy.recipe.augmentation import AugmentationSpec
from passdeploy.recipe.preprocessing import IMAGENET_MEAN as IMAGENET_MEAN
from passdeploy.recipe.preprocessing import IMAGENET_STD as IMAGENET_STD
from passdeploy.recipe.preprocessing import PreprocessingSpec
from passdeploy.runtime.seeds import generator

if TYPE_CHECKING:
    from passdeploy.recipe import DataSpec

CACHE_BYTES = 512 * 2**20


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
        augment: bool | AugmentationSpec = False,
        drop_last: bool = False,
        part: tuple[int, int] = (0, 1),
        device: torch.device | None = None,
        first: int = 0,
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Iterate over normalised images, float32 (batch, 3, height, width), with labels, int64 (batch,).

        Args:
            batch_size: images per batch; the last one may be smaller, unless `drop_last`.
            epoch: number of the shuffling; None keeps the split's own order.
            seed: with `epoch`, the key of the order and of the augmentation.
            augment: apply the random changes that leave the labels of this data set true, or those of a recipe.
            drop_last: leave out a last batch that is not full.
            part: (index, count): only the part with this index of every batch, for one of `count` processes.
            device: that the batches are on; None: the CPU.
            first: number of the batch to begin with; the others are as they would be, and none before it is decoded.
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
    unreadable: list[str] = field(default_factory=list)  # images that others of their class stood in for, so far
    contents: DataContents | None = None  # None: not a data set on disk
    identity: DataIdentity | None = None  # None: as above
    preprocessing: PreprocessingSpec = field(
        default_factory=PreprocessingSpec
    )  # of all images; its mean and std are the ones above

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
    preprocessing = spec.preprocessing or PreprocessingSpec()
    loaded = find_images(spec)
    skipped: list[str] = []
    unreadable: list[str] = []
    is_cached = (len(loaded.train.labels) + len(loaded.test.labels)) * 3 * size * size <= cache_bytes
    may_skip = spec.on_unreadable == "skip"
    if may_skip and is_cached:
        loaded = _without_unreadable(loaded, worker_count(spec.workers), skipped)

    def split(source: ImageSource, augmentation: Augmentation | None) -> ImageSplit:
        return ImageSplit(
            source,
            image_size=size,
            num_classes=len(loaded.classes),
            augmentation=augmentation,
            workers=worker_count(spec.workers),
            is_cached=is_cached,
            stand_ins=StandIns(source, unreadable) if may_skip and not is_cached else None,
            normalisation=Normalisation(preprocessing.mean, preprocessing.std),
        )

    return ImageData(
        name=spec.name,
        classes=loaded.classes,
        image_shape=(3, size, size),
        mean=preprocessing.mean,
        std=preprocessing.std,
        train=split(loaded.train, loaded.augmentation),
        test=split(loaded.test, None),
        skipped=tuple(skipped),
        unreadable=unreadable,
        contents=DataContents.of(loaded, skipped),
        identity=DataIdentity.of(loaded, spec.root),
        preprocessing=preprocessing,
    )


def _without_unreadable(found: RawDataset, workers: int, skipped: list[str]) -> RawDataset:
    """Drop the images that cannot be read, and append the reasons to `skipped`."""
    parts = []
    for source in (found.train, found.test):
        with DecodingThreads(workers, source.problem_of, source) as threads:
            problems = threads.map(range(len(source.labels)))
        skipped += [problem for problem in problems if problem]
        parts.append(source.subset([index for index, problem in enumerate(problems) if not problem]))
        if lost := set(source.labels) - set(parts[-1].labels):
            raise DataError(
                f"no image of class {found.classes[min(lost)]!r} can be read; the first problem: {skipped[0]}.\n"
                "Replace the files, or remove the class."
            )
    return replace(found, train=parts[0], test=parts[1])


class ImageSplit:
    """The `Split` over an `ImageSource`, with its pixels kept in memory or decoded on demand."""

    def __init__(
        self,
        source: ImageSource,
        *,
        image_size: int,
        num_classes: int,
        augmentation: Augmentation | None,
        workers: int,
        is_cached: bool,
        stand_ins: StandIns | None = None,
        normalisation: Normalisation | None = None,
    ) -> None:
        self.num_classes = num_classes
        self.labels = torch.tensor(source.labels, dtype=torch.int64)
        self._augmentation, self._normalisation = augmentation, normalisation or Normalisation()
        self._reader = PixelReader(
            source, image_size=image_size, workers=workers, is_cached=is_cached, stand_ins=stand_ins
        )
        self._feeds: dict[torch.device, DeviceFeed] = {}

    def __len__(self) -> int:
        return len(self.labels)

    def subset(self, indices: Tensor) -> ImageSplit:
        """Return a split of the images at `indices`, int64; labels keep their numbers."""
        part = copy.copy(self)
        part.labels, part._reader, part._feeds = self.labels[indices], self._reader.subset(indices), {}
        return part

    def batches(
        self,
        batch_size: int,
        *,
        epoch: int | None = None,
        seed: int = 0,
        augment: bool | AugmentationSpec = False,
        drop_last: bool = False,
        part: tuple[int, int] = (0, 1),
        device: torch.device | None = None,
        first: int = 0,
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
        if isinstance(augment, AugmentationSpec):
            draws = self._draws("transforms", DRAWS, seed, epoch)[:count].double()
            plans = self._plans(order, batch_size, part, None)
            parts = self._own(draws, batch_size, part)
            plans = [
                replace(plan, transforms=BatchTransforms(augment, own)) for plan, own in zip(plans, parts, strict=True)
            ]
        else:
            plans = self._plans(order, batch_size, part, self._draw_changes(count, seed, epoch) if augment else None)
        plans = plans[first:]
        return self._on_device(plans, device) if device and is_fed(device) else self._on_host(plans)

    def _draw_changes(self, count: int, seed: int, epoch: int | None) -> Tensor | None:
        """Draw for all positions of the epoch at once, so that nothing depends on the batch size."""
        if self._augmentation is None:
            return None
        draws = self._draws("augment", 3, seed, epoch)[:count]
        return changes_from(draws, self._augmentation, self._reader.image_size)

    def _draws(self, purpose: str, each: int, seed: int, epoch: int | None) -> Tensor:
        """Draw `each` uniform numbers for every position of an epoch, (images, each)."""
        return torch.rand((len(self), each), generator=generator(purpose, seed, epoch or 0))

    def _own(self, values: Tensor, batch_size: int, part: tuple[int, int]) -> list[Tensor]:
        """Split values by position into batches, and return this process's part of each."""
        index, count = part
        return [batch.tensor_split(count)[index] for batch in torch.split(values, batch_size)]

    def _plans(
        self, order: Tensor, batch_size: int, part: tuple[int, int], changes: Tensor | None
    ) -> Sequence[BatchPlan]:
        images = self._own(order, batch_size, part)
        drawn = [None] * len(images) if changes is None else self._own(changes, batch_size, part)
        return [BatchPlan(chosen, self.labels[chosen], each) for chosen, each in zip(images, drawn, strict=True)]

    def _on_host(self, plans: Sequence[BatchPlan]) -> Iterator[tuple[Tensor, Tensor]]:
        for plan, pixels in zip(plans, self._reader.read([plan.images for plan in plans]), strict=True):
            images = pixels if plan.changes is None else change_on_host(pixels, plan.changes)
            if plan.transforms is not None:
                images = plan.transforms.apply(images)
            yield self._normalisation.apply(images), plan.labels

    def _on_device(self, plans: Sequence[BatchPlan], device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
        if device not in self._feeds:
            self._feeds[device] = DeviceFeed(self._reader, device, self._normalisation)
        yield from self._feeds[device].batches(plans)
