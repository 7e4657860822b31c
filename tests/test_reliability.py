"""A small share of `python -m benchmarks.reliability`: what happens when things go wrong, in every row of its table."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import pytest

from benchmarks.reliability import artifacts, hostile, kills, onnx_files, races, ranks, recipes, workers, writes
from benchmarks.reliability.forked import Forked
from benchmarks.reliability.tally import Tally

needs_fork = pytest.mark.skipif(sys.platform != "linux", reason="forks processes and reads /proc")


@pytest.fixture(scope="module")
def forked() -> Iterator[Forked]:
    with Forked() as waiting:
        yield waiting


def require_good(tally: Tally, trials: int) -> None:
    assert tally.failures == []
    assert tally.trials == trials


def test_broken_recipes_are_answered_in_three_lines():
    require_good(recipes.measure(80, seed=1), 80)


def test_damaged_files_are_refused():
    tally = artifacts.measure(150, seed=1)
    require_good(tally, 150)
    assert {"flipped", "truncated", "swapped", "emptied", "older format"} <= set(tally.outcomes)


@needs_fork
@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_hostile_files_and_names_touch_no_canary():
    tally = hostile.measure(200)
    require_good(tally, len(hostile.cases()))
    assert tally.trials >= 80


def test_broken_onnx_files_are_answered_or_refused():
    tally = onnx_files.measure(200, seed=1)
    require_good(tally, 200)
    assert {"read", "CorruptArtifact"} <= set(tally.outcomes)


@needs_fork
def test_a_write_that_fails_leaves_the_state_before_it():
    require_good(writes.measure(2, seed=3), 2)


@needs_fork
def test_runs_that_are_killed_end_with_the_same_bits(forked: Forked):
    require_good(kills.measure(1, 1, forked), 1)


@needs_fork
def test_of_two_that_race_for_a_run_the_second_names_the_first(forked: Forked):
    require_good(races.measure(1, 0, forked), 1)


@needs_fork
def test_a_process_whose_peer_is_killed_ends_and_both_can_go_on(forked: Forked):
    require_good(ranks.measure(1, 0, forked), 1)


@needs_fork
def test_the_number_of_workers_changes_no_bit(forked: Forked):
    require_good(workers.measure(2, 0, forked), 2)
