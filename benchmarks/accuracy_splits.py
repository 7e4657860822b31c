"""Splits of `accuracy.py`: a number of steps, the first images, some classes of a data set."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import count, islice
from typing import Any

from torch import Tensor

from passdeploy.data.splits import ImageData


class FixedSteps:
    """A split limited to a number of training steps; after the end of the data it starts again."""

    def __init__(self, split: Any, steps: int, batch: int) -> None:
        self._split, self._steps, self._batch, self.num_classes = split, steps, batch, split.num_classes

    def __len__(self) -> int:
        return self._steps * self._batch

    def batches(self, batch_size: int, *, epoch: int = 0, **options: Any) -> Iterator[tuple[Tensor, Tensor]]:
        return islice(endless_batches(self._split, batch_size, **options), self._steps)


class FirstImages:
    """A split limited to its first images, in a fixed shuffled order."""

    def __init__(self, split: Any, images: int) -> None:
        self._split, self._images, self.num_classes = split, min(images, len(split)), split.num_classes

    def __len__(self) -> int:
        return self._images

    def batches(self, batch_size: int, **_: Any) -> Iterator[tuple[Tensor, Tensor]]:
        return islice(self._split.batches(batch_size, epoch=0), -(-self._images // batch_size))


def select_classes(data: ImageData, low: int, high: int) -> ImageData:
    """Select the classes from `low` to `high` - 1 and renumber them from 0."""
    return replace(
        data,
        classes=data.classes[low:high],
        train=_select_labels(data.train, low, high),
        test=_select_labels(data.test, low, high),
    )


def _select_labels(split: Any, low: int, high: int) -> Any:
    part = split.subset(((split.labels >= low) & (split.labels < high)).nonzero().flatten())
    part.labels, part.num_classes = part.labels - low, high - low
    return part


def endless_batches(split: Any, batch: int, *, seed: int, augment: bool, **_: Any) -> Iterator[tuple[Tensor, Tensor]]:
    for epoch in count():
        yield from split.batches(batch, epoch=epoch, seed=seed, augment=augment, drop_last=True)
