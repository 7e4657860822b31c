"""Fakes for timing: a clock that advances only when a fake network runs, and the fake network."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import repeat

from torch import Tensor


class FakeClock:
    """A clock that fake networks advance by the time they are told to take."""

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
    """A network whose calls take the given milliseconds, recorded in a log that both networks of a comparison share."""

    artifact, backend, device, precision = "none", "fake", "cpu", "fp32"

    def __init__(self, name: str, clock: FakeClock, ms: Iterator[float] | float, log: list[str] | None = None) -> None:
        self.name, self._clock = name, clock
        self._ms = repeat(ms) if isinstance(ms, float) else ms
        self._log = [] if log is None else log

    def prepare(self, images: Tensor, *others: Tensor) -> None:
        self.images = images

    def run(self) -> None:
        self._log.append(self.name)
        self._clock.seconds += next(self._ms) / 1e3
