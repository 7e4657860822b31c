"""Progress as events: the library tells, listeners show or record.

A listener is any function of one event. The terminal, `metrics.jsonl` and the report are
listeners; the library neither prints nor knows who is listening.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from time import perf_counter


@dataclass(frozen=True)
class StageStarted:
    """A named piece of work begins."""

    stage: str
    text: str
    total: int | None = None  # steps, where they are known


@dataclass(frozen=True)
class Step:
    """One step of the running stage is done."""

    stage: str
    done: int  # steps so far, 1-based
    total: int
    metrics: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class StageFinished:
    """A stage ends; `text` says what it achieved, in one line."""

    stage: str
    text: str
    seconds: float
    is_skipped: bool = False  # finished by an earlier process and taken over by --resume


@dataclass(frozen=True)
class Warned:
    """Something the user should know that does not stop the work."""

    text: str


Event = StageStarted | Step | StageFinished | Warned
Listener = Callable[[Event], None]


def silent(event: Event) -> None:
    """The listener that does nothing."""


def broadcast(*listeners: Listener) -> Listener:
    """One listener that hands every event to each of `listeners`, in order."""

    def tell(event: Event) -> None:
        for listener in listeners:
            listener(event)

    return tell


class Stage:
    """What the body of a `with stage(...)` may say about itself."""

    def __init__(self, name: str, tell: Listener) -> None:
        self.name, self.tell, self.text = name, tell, ""
        self.seconds = 0.0  # known when the stage has ended

    def step(self, done: int, total: int, **metrics: float) -> None:
        """Report step `done` of `total`."""
        self.tell(Step(self.name, done, total, metrics))


@contextmanager
def stage(name: str, text: str, tell: Listener, *, total: int | None = None) -> Iterator[Stage]:
    """Announce a stage, time it, and report what it set as its closing `text`."""
    tell(StageStarted(name, text, total))
    began = perf_counter()
    current = Stage(name, tell)
    yield current
    current.seconds = perf_counter() - began
    tell(StageFinished(name, current.text, current.seconds))
