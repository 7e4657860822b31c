"""A share of `python -m benchmarks.reliability`: runs that are killed, race, or lose a process."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from benchmarks.reliability import kills, races, ranks, workers
from benchmarks.reliability.forked import Forked
from tests.reliability.rows import needs_fork, require_good


@pytest.fixture(scope="module")
def forked() -> Iterator[Forked]:
    with Forked() as waiting:
        yield waiting


FORKED = {
    "killed and resumed runs end with the same bits": (kills, 6, 0),
    "of two that race for a run the second names the first": (races, 3, 0),
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
