"""Two networks, timed in turns in one process: A B B A A B B A ...

A machine changes while it is measured: clocks ramp, other programs come and go. Measured one after the
other, two networks see two machines; measured in turns of a few milliseconds they see the same one.
The first calls after a turn, with the caches still full of the other network, are not timed.

Where a network's memory lies makes it a percent or two slower or faster for as long as it lives, so both are built
anew several times: each time is a sitting.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from math import ceil
from statistics import median

import numpy as np

from passdeploy.profiling.clock import Clock
from passdeploy.profiling.runners import Runner
from passdeploy.profiling.statistics import CallTimes
from passdeploy.runtime.garbage import no_collection

Build = Callable[[], Runner]  # loads a network, ready to be timed

_WINDOW_MS = 40.0  # of warm-up, between two looks at whether the time still falls
_FIRST_CALLS = 3  # in which a compiler compiles, captures and settles
_LATER_WARM_UP_MS = 50.0  # of a sitting after the first: the processor is awake by then
SESSIONS = 8
BUILT_ONCE = ("compile",)  # backends where building takes longer than measuring
_UNTIMED_SHARE = 4  # one call in four of a block is its lead-in


@dataclass(frozen=True)
class TimeBudget:
    """How long to measure two networks against each other, warm-up apart."""

    seconds: float = 4.0  # at least, for both together
    iterations: int = 0  # at least, of each network ...
    most_seconds: float = 60.0  # ... unless that takes longer than this
    block_ms: float = 25.0  # one turn of one network
    warm_up_ms: float = 200.0  # at least, of each network
    stable_within: float = 0.03  # warm when two windows agree to this
    fewest_pairs: int = 8  # of blocks: below this an interval over blocks means little

    def of_session(self, number: int, sessions: int) -> TimeBudget:
        """The part of one sitting; its blocks may be few, since it is sittings that the interval is over."""
        return replace(
            self, seconds=self.seconds / sessions, iterations=ceil(self.iterations / sessions),
            most_seconds=self.most_seconds / sessions, fewest_pairs=ceil(self.fewest_pairs / sessions) + 1,
            warm_up_ms=self.warm_up_ms if number == 0 else min(self.warm_up_ms, _LATER_WARM_UP_MS),
        )  # fmt: skip

    def is_spent(self, elapsed_s: float, iterations: int) -> bool:
        """Whether enough was measured."""
        if elapsed_s < self.seconds:
            return False
        return iterations >= self.iterations or elapsed_s >= self.most_seconds


def measure_pair(first: Runner, second: Runner, clock: Clock, budget: TimeBudget) -> tuple[CallTimes, CallTimes]:
    """Time two prepared runners in turns.

    Returns:
        Milliseconds of each call, shape (blocks, calls in a block) for each runner; block i of one was
        measured next to block i of the other.
    """
    with no_collection():
        calls = [max(1, round(budget.block_ms / warm_up(runner.run, clock, budget))) for runner in (first, second)]
        blocks: tuple[list[list[float]], list[list[float]]] = ([], [])
        began = clock.now()
        for turn in _turns():
            for index in turn:
                blocks[index].append(_block((first, second)[index].run, calls[index], clock))
            pairs = len(blocks[0])
            if pairs >= budget.fewest_pairs and budget.is_spent(clock.now() - began, pairs * min(calls)):
                break
    return np.array(blocks[0]), np.array(blocks[1])


def measure_one(runner: Runner, clock: Clock, budget: TimeBudget) -> CallTimes:
    """Time one prepared runner by itself; milliseconds of each call, shape (blocks, calls in a block)."""
    with no_collection():
        calls = max(1, round(budget.block_ms / warm_up(runner.run, clock, budget)))
        blocks, began = list[list[float]](), clock.now()
        while len(blocks) < budget.fewest_pairs or not budget.is_spent(clock.now() - began, len(blocks) * calls):
            blocks.append([clock.time_ms(runner.run) for _ in range(calls)])
    return np.array(blocks)


def in_turns(first: Build, second: Build) -> Callable[[int], tuple[Runner, Runner]]:
    """What builds both for a sitting, another one first every other time: the second may find better memory."""

    def build(session: int) -> tuple[Runner, Runner]:
        if session % 2 == 0:
            return first(), second()
        late, early = second(), first()
        return early, late

    return build


def measure_sessions(
    build: Callable[[int], Sequence[Runner]], clock: Clock, budget: TimeBudget, *, sessions: int = SESSIONS
) -> list[list[CallTimes]]:
    """Time one or two networks that are built anew for every sitting.

    Args:
        build: the runners of a sitting, by its number, prepared; see `in_turns`.
        clock: what times them.
        budget: of all sittings together.
        sittings: how many.

    Returns:
        For each network the samples of each sitting, as `measure_pair` returns them.
    """
    found: list[list[CallTimes]] = []
    for number in range(sessions):
        runners, part = build(number), budget.of_session(number, sessions)
        if len(runners) == 1:
            taken: tuple[CallTimes, ...] = (measure_one(runners[0], clock, part),)
        else:
            taken = measure_pair(runners[0], runners[1], clock, part)
        found.append(list(taken))
        del runners  # a GPU may have no room for the next ones beside them
    return [list(samples) for samples in zip(*found, strict=True)]


def warm_up(work: Callable[[], object], clock: Clock, budget: TimeBudget) -> float:
    """Repeat `work` until its time has settled; the time of one call, in milliseconds.

    It always takes `budget.warm_up_ms`, and gives up waiting for calm after five times that. The first calls are not
    looked at: a compiler that has met another network since compiles this one again, which takes seconds.
    """
    for _ in range(_FIRST_CALLS):
        work()
    began, before = clock.now(), float("inf")
    while True:
        window = [clock.time_ms(work)]
        while sum(window) < _WINDOW_MS:
            window.append(clock.time_ms(work))
        now, elapsed_ms = median(window), (clock.now() - began) * 1e3
        is_stable = abs(now - before) <= budget.stable_within * now
        if elapsed_ms >= budget.warm_up_ms and (is_stable or elapsed_ms >= 5 * budget.warm_up_ms):
            return now
        before = now


def _turns() -> Iterator[tuple[int, int]]:
    """A B, B A, A B, ...: neither network is always the first of its pair."""
    while True:
        yield 0, 1
        yield 1, 0


def _block(work: Callable[[], object], calls: int, clock: Clock) -> list[float]:
    """One turn: a lead-in that is not timed, then `calls` calls that are."""
    for _ in range(ceil(calls / _UNTIMED_SHARE) if calls > 1 else 0):
        work()
    return [clock.time_ms(work) for _ in range(calls)]
