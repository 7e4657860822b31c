"""Batches for a GPU, made ahead of use by a thread: copied as uint8, then changed and normalised on the GPU.

The thread copies from pinned memory and queues its work behind that of the training, in the same stream: neither side
waits, and memory is used again in the order of the stream. Where the images of a split fit into a quarter of the GPU's
free memory, they stay there once decoded, and only their indices travel.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from queue import Empty, Queue
from threading import Event, Lock, Thread
from typing import TypeVar

import torch
from torch import Tensor

from passdeploy.data.augmentation import Normalisation, change_on_device
from passdeploy.data.reading import PixelReader
from passdeploy.data.transforms import BatchTransforms
from passdeploy.runtime.transfers import to_device

RESIDENT_SHARE = 0.25  # of the free memory of a GPU that the images of a split may take
_BATCHES_READY = 2

Item = TypeVar("Item")


def is_fed(device: torch.device) -> bool:
    """Tell whether batches for a device are made by a `DeviceFeed`; those for the CPU are made where they are used."""
    return device.type != "cpu"


@dataclass(frozen=True)
class BatchPlan:
    """Content of a batch that is still to be made."""

    images: Tensor  # their indices in the split, int64 (batch,)
    labels: Tensor  # int64 (batch,)
    changes: Tensor | None  # int64 (batch, 3), as `augmentation.py` defines them; None: none
    transforms: BatchTransforms | None = None  # in place of `changes`


class DeviceFeed:
    """Batches of a split's images on one device."""

    def __init__(self, reader: PixelReader, device: torch.device, normalisation: Normalisation | None = None) -> None:
        self.reader, self.device, self._normalisation = reader, device, normalisation or Normalisation()
        self._is_cuda = device.type == "cuda"
        self._stream: torch.cuda.Stream | None = None  # that the last batches were made on
        self._resident = _ResidentPixels(len(reader), reader.image_size, device) if self._fits() else None

    def batches(self, plans: Sequence[BatchPlan]) -> Iterator[tuple[Tensor, Tensor]]:
        """Iterate over normalised images, float32 (batch, 3, height, width), with labels, both on the device."""
        stream = torch.cuda.current_stream(self.device) if self._is_cuda else None
        if stream and self._stream and stream != self._stream:
            stream.wait_stream(self._stream)  # it may still be filling the memory of the images that stay
        self._stream = stream
        if self._resident and not any(len(self._resident.missing(plan.images)) for plan in plans):
            return self._gathered(plans, self._resident)
        return ahead(self._made(plans, stream), _BATCHES_READY)

    def _gathered(self, plans: Sequence[BatchPlan], resident: _ResidentPixels) -> Iterator[tuple[Tensor, Tensor]]:
        """Iterate over batches whose images are all on the device; what else they need travels at once.

        There is no thread: little is left to do, and taking turns with it would cost the training more.
        """
        sizes = [len(plan.images) for plan in plans]

        def on_device(values: Sequence[Tensor]) -> Sequence[Tensor]:
            return to_device(torch.cat(list(values)), self.device).split(sizes) if values else ()

        places = on_device([resident.places[plan.images] for plan in plans])
        labels = on_device([plan.labels for plan in plans])
        drawn = [plan.changes for plan in plans if plan.changes is not None]
        changes = on_device(drawn) if drawn else [None] * len(plans)
        for plan, place, label, change in zip(plans, places, labels, changes, strict=True):
            yield self._changed(resident.pixels.index_select(0, place), change, plan.transforms), label

    def _made(
        self, plans: Sequence[BatchPlan], stream: torch.cuda.Stream | None
    ) -> Generator[tuple[Tensor, Tensor], None, None]:
        """Queue the work of each batch on a stream."""
        resident = self._resident
        wanted = [plan.images if resident is None else resident.missing(plan.images) for plan in plans]
        for plan, part, decoded in zip(plans, wanted, self._read(wanted), strict=True):
            with torch.cuda.stream(stream) if stream else nullcontext():
                if resident is None:
                    pixels = to_device(decoded, self.device)
                else:
                    resident.add_(part, decoded)
                    pixels = resident.pixels.index_select(0, to_device(resident.places[plan.images], self.device))
                changes = None if plan.changes is None else to_device(plan.changes, self.device)
                batch = self._changed(pixels, changes, plan.transforms), to_device(plan.labels, self.device)
            yield batch

    def _changed(self, pixels: Tensor, changes: Tensor | None, transforms: BatchTransforms | None) -> Tensor:
        if transforms is not None:
            pixels = transforms.apply(pixels)
        elif changes is not None:
            pixels = change_on_device(pixels, changes)
        return self._normalisation.apply(pixels)

    def _read(self, wanted: Sequence[Tensor]) -> Iterator[Tensor]:
        if not any(map(len, wanted)):  # all are on the device: start no worker
            return iter([torch.empty(0)] * len(wanted))
        return self.reader.read(wanted, is_pinned=self._is_cuda, in_processes=True)

    def _fits(self) -> bool:
        free = torch.cuda.mem_get_info(self.device)[0] if self._is_cuda else 0
        return len(self.reader) * self.reader.image_bytes <= RESIDENT_SHARE * free


class _ResidentPixels:
    """Memory on the device for all images of a split, filled in the order in which they are first used."""

    def __init__(self, count: int, image_size: int, device: torch.device) -> None:
        self.pixels = torch.empty((count, 3, image_size, image_size), dtype=torch.uint8, device=device)
        self.places = torch.full((count,), -1)  # of each image in `pixels`, on the host; -1: not there yet
        self._used, self._lock = 0, Lock()

    def missing(self, images: Tensor) -> Tensor:
        """Return those indices of `images` that are not there yet."""
        return images[self.places[images] < 0]

    def add_(self, images: Tensor, pixels: Tensor) -> None:
        """Take in images (pinned, in the current stream), except those that are there already."""
        if not len(images):
            return
        with self._lock:  # another iteration over the split may add images as well
            is_new = self.places[images] < 0
            images, pixels = (images, pixels) if is_new.all() else (images[is_new], pixels[is_new])
            end = self._used + len(images)
            self.pixels[self._used : end].copy_(pixels, non_blocking=True)
            self.places[images] = torch.arange(self._used, end)
            self._used = end


def ahead(items: Generator[Item, None, None], count: int) -> Iterator[Item]:
    """Iterate over items that a thread makes ahead of use, `count` of them at most; its errors are raised here."""
    made: Queue[Item | _End] = Queue(count)
    is_left = Event()

    def make() -> None:
        end = _End()
        try:
            for item in items:
                made.put(item)
                if is_left.is_set():
                    break
            items.close()
        except BaseException as error:
            end = _End(error)
        made.put(end)

    thread = Thread(target=make, name="passdeploy-batches", daemon=True)
    thread.start()
    try:
        while not isinstance(item := made.get(), _End):
            yield item
        if item.error:
            raise item.error
    finally:
        is_left.set()
        while thread.is_alive():
            with suppress(Empty):
                made.get(timeout=0.01)


@dataclass(frozen=True)
class _End:
    """Mark after the last item, with the error that ended them, if one did."""

    error: BaseException | None = None
