"""What time is it, and how long did that take: the seam where measuring meets the machine.

A network on the CPU is timed with a monotonic clock; work on a GPU is queued, so it is timed with
events on the device. Tests hand in a clock that they move by hand.
"""

from __future__ import annotations

from collections.abc import Callable
from time import perf_counter_ns
from typing import Any, Protocol

import torch


class Clock(Protocol):
    """A source of time."""

    def now(self) -> float:
        """Seconds since some fixed moment, for budgets."""
        ...

    def time_ms(self, work: Callable[[], object]) -> float:
        """Do `work` once; how long it took, in milliseconds."""
        ...

    def enqueue_ms(self, work: Callable[[], object]) -> float | None:
        """Do `work` once; how long the host took to queue it, or None where nothing is queued."""
        ...


class HostClock:
    """The monotonic clock of this process: right for work that is over when the call returns."""

    def now(self) -> float:
        """Seconds since some fixed moment."""
        return perf_counter_ns() / 1e9

    def time_ms(self, work: Callable[[], object]) -> float:
        """Wall-clock milliseconds of one call."""
        began = perf_counter_ns()
        work()
        return (perf_counter_ns() - began) / 1e6

    def enqueue_ms(self, work: Callable[[], object]) -> float | None:
        """None: the call is the work."""
        return None


class CudaClock(HostClock):
    """Events on a CUDA device: the time the device worked, one call at a time, on the stream that is current now."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.current_stream(device)
        event: Any = torch.cuda.Event  # typed in some releases of torch, untyped in others
        self._began, self._ended = event(enable_timing=True), event(enable_timing=True)

    def time_ms(self, work: Callable[[], object]) -> float:
        """Device milliseconds between two events around one call."""
        self._began.record(self._stream)
        work()
        self._ended.record(self._stream)
        self._ended.synchronize()
        return float(self._began.elapsed_time(self._ended))

    def enqueue_ms(self, work: Callable[[], object]) -> float | None:
        """Host milliseconds until the call has returned; the device is idle before, and waited for after."""
        queued = super().time_ms(work)
        self._stream.synchronize()
        return queued


def clock_for(device: torch.device) -> Clock:
    """The clock that tells the truth about work that is queued on `device`."""
    return CudaClock(device) if device.type == "cuda" else HostClock()
