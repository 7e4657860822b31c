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


class StepClock(Protocol):
    """A source of time for the steps of a call, which waits for none of them."""

    def now(self) -> float:
        """Seconds since some fixed moment."""
        ...

    def hold(self, ms: float) -> None:
        """Begin a call: a device starts on it in about `ms`, so that the host can get ahead."""
        ...

    def span(self, work: Callable[[], object]) -> Callable[[], float]:
        """Do the next step; what says, once the call is over, how many milliseconds it took."""
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

    def hold(self, ms: float) -> None:
        """Nothing: what is asked for is done at once."""

    def span(self, work: Callable[[], object]) -> Callable[[], float]:
        """Do the next step, and time it."""
        took = self.time_ms(work)
        return lambda: took


_CYCLES_PER_MS = 2_000_000  # of a fast GPU; a slower one waits longer


class CudaClock(HostClock):
    """Events on a CUDA device: the time the device worked, one call at a time, on the stream that is current now."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.current_stream(device)
        self._began, self._ended = _event(), _event()
        self._last = self._began  # where the step before ended

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

    def hold(self, ms: float) -> None:
        """Keep the device busy with nothing: what is queued meanwhile runs without waiting for the host.

        Else small kernels would take as long as it takes to launch them.
        """
        with torch.cuda.stream(self._stream):
            torch.cuda._sleep(int(ms * _CYCLES_PER_MS))
        self._last = _event()
        self._last.record(self._stream)

    def span(self, work: Callable[[], object]) -> Callable[[], float]:
        """Queue the next step; it began where the one before ended, which saves an event for each."""
        began, ended = self._last, _event()
        work()
        ended.record(self._stream)
        self._last = ended

        def took() -> float:
            ended.synchronize()
            return float(began.elapsed_time(ended))

        return took


def _event() -> Any:
    event: Any = torch.cuda.Event  # typed in some releases of torch, untyped in others
    return event(enable_timing=True)


def clock_for(device: torch.device) -> HostClock:
    """The clock that tells the truth about work that is queued on `device`."""
    return CudaClock(device) if device.type == "cuda" else HostClock()
