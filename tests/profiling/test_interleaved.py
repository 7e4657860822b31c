from __future__ import annotations

import gc
from itertools import chain, groupby, repeat

import numpy as np
import pytest

from passdeploy.profiling.clock import HostClock
from passdeploy.profiling.interleaved import TimeBudget, measure_pair, measure_sessions, warm_up

from .fakes import FakeClock, FakeRunner


def test_the_networks_take_turns_and_neither_is_always_first():
    clock, log = FakeClock(), list[str]()
    measure_pair(FakeRunner("A", clock, 5.0, log), FakeRunner("B", clock, 5.0, log), clock, TimeBudget(seconds=1.0))
    turns = [(name, len(list(calls))) for name, calls in groupby(log)]
    warm_a, warm_b, first, *middle, _ = turns  # neighbouring turns of one network read as one long turn
    assert warm_a[0] == "A"
    assert warm_b[0] == "B"
    assert first == ("A", 5 + 2)  # 25 ms of timed calls, after a lead-in
    assert middle[0] == ("B", 2 * (5 + 2))
    assert middle[1] == ("A", 2 * (5 + 2))


def test_both_get_equal_time_not_equal_calls():
    clock = FakeClock()
    slow, fast = measure_pair(
        FakeRunner("slow", clock, 10.0), FakeRunner("fast", clock, 1.0), clock, TimeBudget(seconds=1.0, block_ms=20)
    )
    assert len(slow) == len(fast) >= 8
    assert (slow.shape[1], fast.shape[1]) == (2, 20)
    assert slow == pytest.approx(10.0)
    assert fast == pytest.approx(1.0)


def test_the_calls_after_a_turn_are_not_timed():
    clock, log = FakeClock(), list[str]()

    class ColdAfterTurn(FakeRunner):
        def run(self) -> None:
            is_cold = bool(log) and log[-1] != self.name
            super().run()
            self._clock.seconds += 0.1 if is_cold else 0.0

    samples = measure_pair(
        ColdAfterTurn("A", clock, 2.0, log), ColdAfterTurn("B", clock, 2.0, log), clock, TimeBudget(seconds=0.5)
    )
    assert samples[0].max() < 3.0
    assert samples[1].max() < 3.0


def test_a_slow_network_still_gets_enough_blocks():
    clock = FakeClock()
    slow, _ = measure_pair(FakeRunner("A", clock, 900.0), FakeRunner("B", clock, 800.0), clock, TimeBudget(seconds=0.1))
    assert slow.shape == (8, 1)


def test_every_session_has_its_part_of_the_budget():
    clock, built = FakeClock(), list[int]()

    def build(session: int) -> list[FakeRunner]:
        built.append(session)
        return [FakeRunner("A", clock, 5.0 + session), FakeRunner("B", clock, 1.0)]

    slow, fast = measure_sessions(build, clock, TimeBudget(seconds=4.0), sessions=4)
    assert built == [0, 1, 2, 3]
    assert [float(np.median(times)) for times in slow] == pytest.approx([5.0, 6.0, 7.0, 8.0])
    assert all(0.9 < (a.sum() + b.sum()) / 1e3 * 1.25 < 1.2 for a, b in zip(slow, fast, strict=True))
    (alone,) = measure_sessions(lambda _: [FakeRunner("A", clock, 5.0)], clock, TimeBudget(seconds=1.0), sessions=3)
    assert len(alone) == 3


def test_the_budget_asks_for_seconds_and_for_iterations_up_to_a_limit():
    budget = TimeBudget(seconds=3, iterations=1000, most_seconds=60)
    assert not budget.is_spent(elapsed_s=2.0, iterations=5000)
    assert not budget.is_spent(elapsed_s=10.0, iterations=999)
    assert budget.is_spent(elapsed_s=10.0, iterations=1000)
    assert budget.is_spent(elapsed_s=60.0, iterations=10)


def test_warm_up_waits_until_the_time_has_settled():
    clock = FakeClock()
    falling = chain((50.0 * 0.9**i for i in range(40)), repeat(0.5))
    settled = warm_up(FakeRunner("A", clock, falling).run, clock, TimeBudget(warm_up_ms=200))
    assert settled == pytest.approx(0.5, rel=0.05)
    assert clock.now() >= 0.2


def test_warm_up_gives_up_on_a_network_that_never_settles():
    clock = FakeClock()
    restless = chain.from_iterable(repeat((50.0, 100.0)))
    warm_up(FakeRunner("A", clock, restless).run, clock, TimeBudget(warm_up_ms=200))
    first = (50 + 100 + 50) / 1e3  # calls that are not timed
    assert 1.0 <= clock.now() - first < 1.2


def test_warm_up_does_not_take_compiling_for_running():
    clock = FakeClock()
    calls = chain((30_000.0, 2_000.0, 500.0), repeat(10.0))  # compiled anew, captured, stable
    assert warm_up(FakeRunner("A", clock, calls).run, clock, TimeBudget(warm_up_ms=200)) == pytest.approx(10.0)


def test_garbage_collection_is_on_again_afterwards():
    clock = FakeClock()
    measure_pair(FakeRunner("A", clock, 5.0), FakeRunner("B", clock, 5.0), clock, TimeBudget(seconds=0.1))
    assert gc.isenabled()


def test_the_host_clock_counts_forwards_in_milliseconds():
    clock = HostClock()
    began = clock.now()
    elapsed_ms = clock.time_ms(lambda: sum(range(1000)))
    assert 0 < elapsed_ms <= (clock.now() - began) * 1e3
