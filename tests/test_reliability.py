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


FORKED = {
    "killed and resumed runs end with the same bits": (kills, 1, 0),
    "of two that race for a run the second names the first": (races, 1, 0),
    "a process whose peer is killed ends, and both can go on": (ranks, 1, 0),
    "the number of workers changes no bit": (workers, 2, 0),
}


@needs_fork
@pytest.mark.parametrize("row", FORKED)
def test_processes(row: str, forked: Forked):
    module, trials, seed = FORKED[row]
    tally = module.measure(trials, seed, forked)
    require_good(tally, trials)
    assert module is not kills or tally.facts["went_on_from_a_step_of_learning"] > 0
