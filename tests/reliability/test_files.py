"""A share of `python -m benchmarks.reliability`: broken recipes and files, hostile ones, and writes that fail."""

from __future__ import annotations

import sys

import pytest

from benchmarks.reliability import artifacts, hostile, onnx_files, recipes, writes
from tests.reliability.rows import needs_fork, require_good


def test_broken_recipes_are_answered_in_three_lines():
    require_good(recipes.measure(500, seed=1), 500)


def test_damaged_files_are_refused():
    tally = artifacts.measure(300, seed=1)
    require_good(tally, 300)
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
@pytest.mark.skipif(sys.version_info < (3, 11), reason="pathlib of Python 3.10 keeps the functions that are replaced")
def test_a_write_that_fails_leaves_the_state_before_it():
    require_good(writes.measure(10, seed=3), 10)
