"""Processes that decode image files for one that trains on a GPU.

Pillow holds the interpreter lock for a tenth of the time that it takes to decode an image. With many threads of one
process the lock becomes the limit, and the thread that launches the GPU's kernels waits for it too. These are processes
of their own: not forked, since a process that uses CUDA must not be, and without `multiprocessing`, which would run the
user's main module again. They write into memory that both sides map.
"""

from __future__ import annotations

import atexit
import mmap
import os
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import NoReturn

import torch
from torch import Tensor

from passdeploy.data.images import Frame
from passdeploy.errors import MissingError
from passdeploy.runtime.child_process import child_environment


class DecodingProcesses:
    """Processes that decode batches in turn, each its share of every batch."""

    def __init__(self, count: int, slot_bytes: int, slots: int) -> None:
        """Start the processes.

        Args:
            count: of processes.
            slot_bytes: size of the largest batch.
            slots: batches that may be submitted and not yet collected.
        """
        self.count, self.slot_bytes, self.slots = count, slot_bytes, slots
        handle = os.memfd_create("passdeploy-images")
        try:
            os.ftruncate(handle, slot_bytes * slots)
            self._pixels = torch.frombuffer(mmap.mmap(handle, slot_bytes * slots), dtype=torch.uint8)
            workers = [_start_worker(handle) for _ in range(count)]
        finally:
            os.close(handle)
        self._connections, self._processes = [worker[0] for worker in workers], [worker[1] for worker in workers]
        self._submitted: list[tuple[int, int, int]] = []  # (slot, images, bytes of one) of what was not collected
        self._next_slot = 0

    def submit(self, paths: Sequence[str | Path], frame: Frame) -> None:
        """Begin to decode a batch to squares."""
        assert len(self._submitted) < self.slots
        image_bytes, slot = 3 * frame.size**2, self._next_slot
        files = [(slot * self.slot_bytes + index * image_bytes, str(path)) for index, path in enumerate(paths)]
        for number, connection in enumerate(self._connections):
            try:
                connection.send((frame, files[number :: self.count]))
            except OSError:
                self._report_loss(number)
        self._submitted.append((slot, len(paths), image_bytes))
        self._next_slot = (slot + 1) % self.slots

    def collect(self) -> tuple[Tensor, dict[int, str]]:
        """Wait for the oldest batch.

        Returns:
            Its pixels, flat uint8, which are valid until `slots` more are submitted; and the reasons for images of it,
            by their number, that cannot be read.

        Raises:
            MissingError: a process has ended.
        """
        problems: list[tuple[int, str]] = []
        for number, connection in enumerate(self._connections):
            try:
                problems += connection.recv()
            except (EOFError, OSError):
                self._report_loss(number)
        slot, count, image_bytes = self._submitted.pop(0)
        start = slot * self.slot_bytes
        reasons = {(offset - start) // image_bytes: message for offset, message in sorted(problems)}
        return self._pixels[start:][: count * image_bytes], reasons

    def drain(self) -> None:
        """Wait for what was submitted, without looking at it."""
        while self._submitted:
            self.collect()

    def close(self) -> None:
        """End the processes."""
        for connection in self._connections:
            connection.close()
        for process in self._processes:
            process.wait()

    def _report_loss(self, number: int) -> NoReturn:
        self._submitted.clear()
        status = self._processes[number].wait()
        raise MissingError(
            f"a process that decodes images has ended with status {status}, perhaps for lack of memory.\n"
            "Set data.workers to a smaller number."
        )


def _start_worker(memory: int) -> tuple[Connection, subprocess.Popen[bytes]]:
    ours, theirs = socket.socketpair()
    with theirs:
        process = subprocess.Popen(
            [sys.executable, "-m", "passdeploy.data.decode_worker", str(theirs.fileno()), str(memory)],
            pass_fds=(theirs.fileno(), memory),
            stdin=subprocess.DEVNULL,
            env=child_environment(OMP_NUM_THREADS="1"),
        )
    return Connection(ours.detach()), process


_idle: list[DecodingProcesses] = []  # kept for the next epoch or the next split


def can_decode_in_processes() -> bool:
    """Tell whether this system has what the processes need: Linux, and an interpreter to start."""
    return hasattr(os, "memfd_create") and bool(sys.executable)


@contextmanager
def borrowed_processes(count: int, slot_bytes: int, slots: int) -> Iterator[DecodingProcesses]:
    """Lend processes with slots of at least this size; they start once and kept until the program ends."""
    try:
        processes = _idle.pop()
    except IndexError:
        processes = DecodingProcesses(count, slot_bytes, slots)
    if (processes.count, processes.slots) != (count, slots) or processes.slot_bytes < slot_bytes:
        processes.close()
        processes = DecodingProcesses(count, slot_bytes, slots)
    try:
        yield processes
    finally:
        try:
            processes.drain()
        except MissingError:
            processes.close()
        else:
            _idle.append(processes)


@atexit.register
def close_idle_processes() -> None:
    """End the processes that nobody uses."""
    while _idle:
        _idle.pop().close()
