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
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import NoReturn

import torch
from torch import Tensor

from passdeploy.data import decoding_threads
from passdeploy.data.decoding_threads import HangError
from passdeploy.data.images import Frame
from passdeploy.errors import MissingError
from passdeploy.runtime.child_process import child_environment

_PATIENCE_S = 5.0  # for a process to end


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
        self._progress_at = -(-slot_bytes * slots // 8) * 8  # behind the images: where each process is, int64 (count,)
        memory_bytes = self._progress_at + 8 * count
        handle = os.memfd_create("passdeploy-images")
        try:
            os.ftruncate(handle, memory_bytes)
            memory = mmap.mmap(handle, memory_bytes)
            self._pixels = torch.frombuffer(memory, dtype=torch.uint8, count=slot_bytes * slots)
            self._progress = torch.frombuffer(memory, dtype=torch.int64, count=count, offset=self._progress_at)
            self._progress.fill_(-1)
            workers = [_start_worker(handle) for _ in range(count)]
        finally:
            os.close(handle)
        self._connections, self._processes = [worker[0] for worker in workers], [worker[1] for worker in workers]
        self._submitted: list[tuple[int, list[str], int]] = []  # (slot, paths, bytes of one) of what was not collected
        self._next_slot = 0
        self.is_lost = False  # one of the processes has ended, or hangs

    def submit(self, paths: Sequence[str | Path], frame: Frame) -> None:
        """Begin to decode a batch to squares."""
        assert len(self._submitted) < self.slots
        image_bytes, slot = 3 * frame.size**2, self._next_slot
        files = [(slot * self.slot_bytes + index * image_bytes, str(path)) for index, path in enumerate(paths)]
        for number, connection in enumerate(self._connections):
            try:
                connection.send((frame, self._progress_at + 8 * number, files[number :: self.count]))
            except OSError:
                self._report_loss(number)
        self._submitted.append((slot, [str(path) for path in paths], image_bytes))
        self._next_slot = (slot + 1) % self.slots

    def collect(self) -> tuple[Tensor, dict[int, str]]:
        """Wait for the oldest batch.

        Returns:
            Its pixels, flat uint8, which are valid until `slots` more are submitted; and the reasons for images of it,
            by their number, that cannot be read.

        Raises:
            MissingError: a process has ended, or hangs.
        """
        problems: list[tuple[int, str]] = []
        for number, connection in enumerate(self._connections):
            try:
                self._require_progress(number)
                problems += connection.recv()
            except (EOFError, OSError):
                self._report_loss(number)
        slot, paths, image_bytes = self._submitted.pop(0)
        start = slot * self.slot_bytes
        reasons = {(offset - start) // image_bytes: message for offset, message in sorted(problems)}
        return self._pixels[start:][: len(paths) * image_bytes], reasons

    def drain(self) -> None:
        """Wait for what was submitted, without looking at it."""
        while self._submitted:
            self.collect()

    def close(self) -> None:
        """End the processes, also those that do not listen any more."""
        for connection in self._connections:
            connection.close()
        for process in self._processes:
            try:
                process.wait(0.0 if self.is_lost else _PATIENCE_S)
            except subprocess.TimeoutExpired:
                process.kill()
                with suppress(subprocess.TimeoutExpired):  # one that waits for a dead disk cannot even be killed
                    process.wait(_PATIENCE_S)

    def _require_progress(self, number: int) -> None:
        """Wait until a process has answered, as long as it goes on to other images."""
        before = None
        while not self._connections[number].poll(decoding_threads.HANG_S):
            at = int(self._progress[number])
            if at == before:
                slot, paths, image_bytes = self._submitted[0]
                image = (at - slot * self.slot_bytes) // image_bytes
                self._submitted.clear()
                self.is_lost = True
                raise HangError.at(paths[image] if 0 <= image < len(paths) else None)
            before = at

    def _report_loss(self, number: int) -> NoReturn:
        self._submitted.clear()
        self.is_lost = True
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
        with suppress(MissingError):
            processes.drain()
        if processes.is_lost:
            processes.close()
        else:
            _idle.append(processes)


@atexit.register
def close_idle_processes() -> None:
    """End the processes that nobody uses."""
    while _idle:
        _idle.pop().close()
