"""Clocks: time calls on the CPU with the host's monotonic clock, and on a GPU with CUDA events.

Work on a GPU is queued and runs after the call has returned, so the host's clock cannot time it. Tests pass a clock
that they advance by hand.
"""

from __future__ import annotations

from collections.abc import Callable
from time import perf_counter_ns
from typing import Any, Protocol

import torch

from passdeploy.profiling.runners import PROVIDERS


class Clock(Protocol):
    """A source of time for whole calls."""

    def now(self) -> float:
        """Return the seconds since some fixed moment, for budgets."""
        ...

    def time_ms(self, work: Callable[[], object]) -> float:
        """Call `work` once and return how long it took, in milliseconds."""
        ...

    def enqueue_ms(self, work: Callable[[], object]) -> float | None:
        """Call `work` once and return the milliseconds the host took to queue it; None where nothing is queued."""
        ...


class StepClock(Protocol):
    """A source of time for the single steps (operators) of a call; it does not wait for a step to finish."""

    def now(self) -> float:
        """Return the seconds since some fixed moment."""
        ...

    def delay_device(self, ms: float) -> None:
        """Start a call: keep the device busy for about `ms`, so that the host can queue steps ahead of it."""
        ...

    def time_step(self, work: Callable[[], object]) -> Callable[[], float]:
        """Run the next step; return a function that gives its milliseconds, to be called once the call is over."""
        ...


class HostClock:
    """The monotonic clock of this process, for work that is done when the call returns."""

    def now(self) -> float:
        """Return the seconds since some fixed moment."""
        return perf_counter_ns() / 1e9

    def time_ms(self, work: Callable[[], object]) -> float:
        """Return the wall-clock milliseconds of one call."""
        began = perf_counter_ns()
        work()
        return (perf_counter_ns() - began) / 1e6

    def enqueue_ms(self, work: Callable[[], object]) -> float | None:
        """Return None: nothing is queued on the host."""
        return None

    def delay_device(self, ms: float) -> None:
        """Do nothing: steps on the host run at once."""

    def time_step(self, work: Callable[[], object]) -> Callable[[], float]:
        """Run the next step and time it."""
        took = self.time_ms(work)
        return lambda: took


_CYCLES_PER_MS = 2_000_000  # of a fast GPU; a slower one waits longer


class CudaClock(HostClock):
    """CUDA events on the current stream: the time that the device works on a call.

    The stream is asked for in every call, since events on another stream than the work's do not wait for the work.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._began, self._ended = _event(), _event()
        self._last = self._began  # end of the previous step

    @property
    def _stream(self) -> torch.cuda.Stream:
        return torch.cuda.current_stream(self._device)

    def time_ms(self, work: Callable[[], object]) -> float:
        """Return the device milliseconds between two events around one call."""
        stream = self._stream
        self._began.record(stream)
        work()
        self._ended.record(stream)
        self._ended.synchronize()
        return float(self._began.elapsed_time(self._ended))

    def enqueue_ms(self, work: Callable[[], object]) -> float | None:
        """Return the host milliseconds until the call has returned, then wait for the device."""
        queued = super().time_ms(work)
        self._stream.synchronize()
        return queued

    def delay_device(self, ms: float) -> None:
        """Let the device sleep for about `ms`: steps that are queued meanwhile run without waiting for the host.

        Without this, a small kernel would appear to take as long as its launch.
        """
        torch.cuda._sleep(int(ms * _CYCLES_PER_MS))
        self._last = _event()
        self._last.record(self._stream)

    def time_step(self, work: Callable[[], object]) -> Callable[[], float]:
        """Queue the next step; it begins at the end of the step before, so that each step needs one event only."""
        began, ended = self._last, _event()
        work()
        ended.record(self._stream)
        self._last = ended

        def took() -> float:
            ended.synchronize()
            return float(began.elapsed_time(ended))

        return took


def _event() -> Any:
    """Make a CUDA event that records times."""
    event: Any = torch.cuda.Event  # typed in some releases of torch only
    return event(enable_timing=True)


def clock_for(device: torch.device) -> HostClock:
    """Choose the clock for work on `device`: CUDA events on a GPU, the host's clock elsewhere."""
    return CudaClock(device) if device.type == "cuda" else HostClock()


def clock_of_backend(backend: str, device: torch.device) -> HostClock:
    """Choose CUDA events for work that is queued on a GPU, and the host's clock for ONNX Runtime and the CPU.

    A call of ONNX Runtime is done when it returns, on a GPU too: see `OrtRunner.run`. Where a backend needs a GPU that
    PyTorch does not see, building its runner raises the error.
    """
    return HostClock() if backend in PROVIDERS or not torch.cuda.is_available() else clock_for(device)
