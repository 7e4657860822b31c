"""A clock that only moves when a fake network runs: timing without time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import repeat

from torch import Tensor


class FakeClock:
    """Time is what the fake networks say they took."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def now(self) -> float:
        return self.seconds

    def time_ms(self, work: Callable[[], object]) -> float:
        began = self.seconds
        work()
        return (self.seconds - began) * 1e3

    def enqueue_ms(self, work: Callable[[], object]) -> float | None:
        return None


class FakeRunner:
    """Takes the milliseconds it is told, and notes every call in a log shared with its opponent."""

    artifact, backend, device, precision = "none", "fake", "cpu", "fp32"

    def __init__(self, name: str, clock: FakeClock, ms: Iterator[float] | float, log: list[str] | None = None) -> None:
        self.name, self._clock = name, clock
        self._ms = repeat(ms) if isinstance(ms, float) else ms
        self._log = [] if log is None else log

    def prepare(self, images: Tensor) -> None:
        self.images = images

    def run(self) -> None:
        self._log.append(self.name)
        self._clock.seconds += next(self._ms) / 1e3
