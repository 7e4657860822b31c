"""Progress events, and listeners that show or record them.

A listener is any function of one event. The terminal's progress bars, `metrics.jsonl` and `run.log` are written by
listeners; the library itself prints nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from time import perf_counter


@dataclass(frozen=True)
class StageStarted:
    """Start of a named piece of work."""

    stage: str
    text: str
    total: int | None = None  # number of steps, if known


@dataclass(frozen=True)
class Step:
    """End of one step of the running stage."""

    stage: str
    done: int  # steps so far, 1-based
    total: int
    metrics: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class StageFinished:
    """End of a stage; `text` is its result in one line."""

    stage: str
    text: str
    seconds: float
    is_skipped: bool = False  # finished by an earlier process and taken over by --resume


@dataclass(frozen=True)
class Warned:
    """A problem that the user should know of and that does not stop the work."""

    text: str


Event = StageStarted | Step | StageFinished | Warned
Listener = Callable[[Event], None]


def silent(event: Event) -> None:
    """Ignore an event; the default listener."""


def broadcast(*listeners: Listener) -> Listener:
    """Make one listener that passes every event to each of `listeners`, in order."""

    def listen(event: Event) -> None:
        for listener in listeners:
            listener(event)

    return listen


class Stage:
    """A running stage, as the body of `with stage(...)` sees it: it reports steps and sets the closing `text`."""

    def __init__(self, name: str, listener: Listener) -> None:
        self.name, self.listener, self.text = name, listener, ""
        self.done = 0  # steps that were reported
        self.seconds = 0.0  # set when the stage has ended

    def step(self, done: int, total: int, **metrics: float) -> None:
        """Report step `done` of `total`."""
        self.done = done
        self.listener(Step(self.name, done, total, metrics))


@contextmanager
def stage(name: str, text: str, listener: Listener, *, total: int | None = None) -> Iterator[Stage]:
    """Report the start of a stage, time it, and report its end with the closing `text` that the block has set."""
    listener(StageStarted(name, text, total))
    started = perf_counter()
    current = Stage(name, listener)
    yield current
    current.seconds = perf_counter() - started
    listener(StageFinished(name, current.text, current.seconds))
