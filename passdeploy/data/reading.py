"""Pixels of a split's images: decoded once and kept in memory, or decoded ahead of use by threads or processes.

All three give the same bits. Threads need nothing to start, and an error is raised as it is; processes
(`decoding_processes.py`) leave the interpreter lock to the thread that feeds a GPU.
"""

from __future__ import annotations

import copy
import os
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from functools import partial

import numpy as np
import torch
from torch import Tensor

from passdeploy.data.decoding_processes import borrowed_processes, can_decode_in_processes
from passdeploy.data.decoding_threads import DecodingThreads
from passdeploy.data.images import Frame, ImageSource, Pixels
from passdeploy.data.stand_ins import StandIns
from passdeploy.errors import DataError

_BATCHES_AHEAD = 3
_MOST_THREADS = 16
_TASKS_PER_WORKER = 4  # of each batch: enough to be even, few enough not to matter


class PixelReader:
    """Pixels of the images of a source, uint8 (images, 3, size, size)."""

    def __init__(
        self,
        source: ImageSource,
        *,
        image_size: int,
        workers: int,
        is_cached: bool,
        stand_ins: StandIns | None = None,
    ) -> None:
        self.source, self.image_size, self.workers, self.stand_ins = source, image_size, workers, stand_ins
        self.cached = self._decode_all() if is_cached else None  # uint8 (images, 3, height, width)

    def __len__(self) -> int:
        return len(self.source.labels)

    @property
    def image_bytes(self) -> int:
        """Bytes of one image."""
        return 3 * self.image_size**2

    def subset(self, indices: Tensor) -> PixelReader:
        """Return a reader of the images at `indices`."""
        part = copy.copy(self)
        part.source = self.source.subset(indices.tolist())
        part.stand_ins = StandIns(part.source, self.stand_ins.found) if self.stand_ins else None
        part.cached = None if self.cached is None else self.cached[indices]
        return part

    def read(self, parts: Sequence[Tensor], *, is_pinned: bool = False, in_processes: bool = False) -> Iterator[Tensor]:
        """Iterate over the images of each part, uint8 (batch, 3, height, width).

        Args:
            parts: indices of images, int64 (batch,).
            is_pinned: in memory that a GPU copies from without waiting.
            in_processes: decode in processes where that is possible, else in threads.
        """
        if self.cached is not None:
            for part in parts:
                yield torch.index_select(self.cached, 0, part, out=self._new_batch(len(part), is_pinned))
        elif in_processes and self.source.paths and self.source.frame and can_decode_in_processes():
            yield from self._read_in_processes(parts, self.source.paths, self.source.frame, is_pinned)
        else:
            yield from self._read_in_threads(parts, is_pinned)

    def _new_batch(self, count: int, is_pinned: bool) -> Tensor:
        shape = (count, 3, self.image_size, self.image_size)
        return torch.empty(shape, dtype=torch.uint8, pin_memory=is_pinned)

    def _read_in_threads(self, parts: Sequence[Tensor], is_pinned: bool) -> Iterator[Tensor]:
        decode = self.stand_ins.decode if self.stand_ins else self.source.decode
        with DecodingThreads(self.workers, decode, self.source) as threads:
            waiting: deque[tuple[Tensor, list[Future[None]]]] = deque()
            for part in parts:
                batch = self._new_batch(len(part), is_pinned)
                waiting.append((batch, self._submit(threads, batch.numpy(), part.tolist())))
                if len(waiting) > _BATCHES_AHEAD:
                    yield _finished(threads, *waiting.popleft())
            while waiting:
                yield _finished(threads, *waiting.popleft())

    def _submit(self, threads: DecodingThreads[Pixels], places: Pixels, indices: Sequence[int]) -> list[Future[None]]:
        def decode(start: int, end: int) -> None:
            for place, index in zip(places[start:end], indices[start:end], strict=True):
                place[:] = threads.decode(index)

        step = -(-len(indices) // (_TASKS_PER_WORKER * self.workers)) or 1
        starts = range(0, len(indices), step)
        return [threads.submit(partial(decode, start, min(start + step, len(indices)))) for start in starts]

    def _read_in_processes(
        self, parts: Sequence[Tensor], paths: Sequence[str], frame: Frame, is_pinned: bool
    ) -> Iterator[Tensor]:
        largest = max(map(len, parts), default=0) * self.image_bytes
        with borrowed_processes(self.workers, largest, _BATCHES_AHEAD + 1) as processes:
            submitted = 0
            for done in range(len(parts)):
                for part in parts[submitted : done + _BATCHES_AHEAD + 1]:
                    processes.submit([paths[index] for index in part.tolist()], frame)
                    submitted += 1
                batch = self._new_batch(len(parts[done]), is_pinned)
                pixels, reasons = processes.collect()
                # by NumPy: torch would copy with a thread per core, and the cores are decoding
                np.copyto(batch.numpy(), pixels.view(batch.shape).numpy())
                for number, reason in reasons.items():
                    if self.stand_ins is None:
                        raise DataError(reason)
                    index = int(parts[done][number])
                    self.stand_ins.note(index, reason.splitlines()[0])
                    batch[number] = torch.from_numpy(self.stand_ins.replace(index))
                yield batch

    def _decode_all(self) -> Tensor:
        pixels = np.empty((len(self), 3, self.image_size, self.image_size), dtype=np.uint8)

        def fill(index: int) -> None:
            pixels[index] = self.source.decode(index)

        with DecodingThreads(self.workers, fill, self.source) as threads:
            threads.map(range(len(self)))
        return torch.from_numpy(pixels)


def worker_count(workers: int | str) -> int:
    """Return the number of decoding workers; "auto": one per processor that this process may use, at most 16."""
    if isinstance(workers, int):
        return max(1, workers)
    try:
        return min(len(os.sched_getaffinity(0)), _MOST_THREADS)
    except AttributeError:  # not on every system
        return min(os.cpu_count() or 1, _MOST_THREADS)


def _finished(threads: DecodingThreads[Pixels], batch: Tensor, tasks: Sequence[Future[None]]) -> Tensor:
    threads.require_done(tasks)
    return batch
