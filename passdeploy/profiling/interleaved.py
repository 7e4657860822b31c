"""Interleaved timing of two networks in one process: A B B A A B B A ...

A machine changes while it is measured: clocks ramp, other programs come and go. Networks that are timed one after the
other meet different conditions; in turns of a few milliseconds they meet the same. The first calls of a turn, when the
caches still hold the other network's data, are not timed.

The addresses at which a network's memory is allocated make it a percent or two slower or faster for as long as it is
loaded. So both networks are built anew several times; each time is a session.
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
from passdeploy.runtime.garbage import garbage_collection_paused

RunnerBuilder = Callable[[], Runner]  # loads a network and prepares it to be timed

_WINDOW_MS = 40.0  # of warm-up; the medians of two windows in a row are compared
_FIRST_CALLS = 3  # not timed: a compiler compiles and captures in them
_LATER_WARM_UP_MS = 50.0  # of a session after the first: the clocks of the processor have ramped up by then
SESSIONS = 8
BUILT_ONCE = ("compile",)  # backends where building takes longer than measuring
_CALLS_PER_LEAD_IN = 4  # one untimed call before every four timed ones of a block


@dataclass(frozen=True)
class TimeBudget:
    """The time and the number of calls to measure two networks with, warm-up not counted."""

    seconds: float = 4.0  # at least, for both together
    iterations: int = 0  # at least, of each network ...
    most_seconds: float = 60.0  # ... unless that takes longer than this
    block_ms: float = 25.0  # one turn of one network
    warm_up_ms: float = 200.0  # at least, of each network
    stable_within: float = 0.03  # warm when two windows agree to this
    fewest_pairs: int = 8  # of blocks: below this an interval over blocks means little

    def for_session(self, number: int, sessions: int) -> TimeBudget:
        """Return the part of one session; few blocks are enough, since intervals are computed over sessions."""
        return replace(
            self,
            seconds=self.seconds / sessions,
            iterations=ceil(self.iterations / sessions),
            most_seconds=self.most_seconds / sessions,
            fewest_pairs=ceil(self.fewest_pairs / sessions) + 1,
            warm_up_ms=self.warm_up_ms if number == 0 else min(self.warm_up_ms, _LATER_WARM_UP_MS),
        )

    def is_spent(self, elapsed_s: float, iterations: int) -> bool:
        """Test whether enough was measured."""
        if elapsed_s < self.seconds:
            return False
        return iterations >= self.iterations or elapsed_s >= self.most_seconds


def measure_pair(first: Runner, second: Runner, clock: Clock, budget: TimeBudget) -> tuple[CallTimes, CallTimes]:
    """Time two prepared runners in turns.

    Returns:
        Milliseconds of each call, shape (blocks, calls in a block) for each runner; block i of one was
        measured next to block i of the other.
    """
    with garbage_collection_paused():
        calls = [max(1, round(budget.block_ms / warm_up(runner.run, clock, budget))) for runner in (first, second)]
        blocks: tuple[list[list[float]], list[list[float]]] = ([], [])
        began = clock.now()
        for turn in _alternating_orders():
            for index in turn:
                blocks[index].append(_time_block((first, second)[index].run, calls[index], clock))
            pairs = len(blocks[0])
            if pairs >= budget.fewest_pairs and budget.is_spent(clock.now() - began, pairs * min(calls)):
                break
    return np.array(blocks[0]), np.array(blocks[1])


def measure_one(runner: Runner, clock: Clock, budget: TimeBudget) -> CallTimes:
    """Time one prepared runner by itself; milliseconds of each call, shape (blocks, calls in a block)."""
    with garbage_collection_paused():
        calls = max(1, round(budget.block_ms / warm_up(runner.run, clock, budget)))
        blocks, began = list[list[float]](), clock.now()
        while len(blocks) < budget.fewest_pairs or not budget.is_spent(clock.now() - began, len(blocks) * calls):
            blocks.append([clock.time_ms(runner.run) for _ in range(calls)])
    return np.array(blocks)


def build_in_turns(first: RunnerBuilder, second: RunnerBuilder) -> Callable[[int], tuple[Runner, Runner]]:
    """Return the function that builds both runners of a session.

    The second network is built first in every other session, since the order decides which memory each one gets.
    """

    def build_session(session: int) -> tuple[Runner, Runner]:
        if session % 2 == 0:
            return first(), second()
        built_first = second()
        return first(), built_first

    return build_session


def measure_sessions(
    build: Callable[[int], Sequence[Runner]], clock: Clock, budget: TimeBudget, *, sessions: int = SESSIONS
) -> list[list[CallTimes]]:
    """Time one or two networks that are built anew for every session.

    Args:
        build: returns the prepared runners of a session, given its number; see `build_in_turns`.
        clock: the source of time.
        budget: of all sessions together.
        sessions: how many times the networks are built.

    Returns:
        For each network the call times of each session, as `measure_pair` returns them.
    """
    measured: list[list[CallTimes]] = []  # one list per session, one entry per network
    for number in range(sessions):
        runners, part = build(number), budget.for_session(number, sessions)
        if len(runners) == 1:
            times: tuple[CallTimes, ...] = (measure_one(runners[0], clock, part),)
        else:
            times = measure_pair(runners[0], runners[1], clock, part)
        measured.append(list(times))
        del runners  # a GPU may have no room for the next ones beside them
    return [list(of_network) for of_network in zip(*measured, strict=True)]


def warm_up(work: Callable[[], object], clock: Clock, budget: TimeBudget) -> float:
    """Repeat `work` until its time is stable; return the time of one call, in milliseconds.

    This takes at least `budget.warm_up_ms`, and stops after five times that even if the time is not stable. The first
    calls are not timed: a compiler that has compiled another network in between compiles this one again, which takes
    seconds.
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


def _alternating_orders() -> Iterator[tuple[int, int]]:
    """Yield the orders A B, B A, A B, ... without end, so that neither network is always the first of its pair."""
    while True:
        yield 0, 1
        yield 1, 0


def _time_block(work: Callable[[], object], calls: int, clock: Clock) -> list[float]:
    """Run one turn of a network: a lead-in that is not timed, then `calls` timed calls; return their milliseconds."""
    for _ in range(ceil(calls / _CALLS_PER_LEAD_IN) if calls > 1 else 0):
        work()
    return [clock.time_ms(work) for _ in range(calls)]
