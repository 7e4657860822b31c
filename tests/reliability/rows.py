"""What the tests of `benchmarks.reliability` share."""

from __future__ import annotations

import sys

import pytest

from benchmarks.reliability.tally import Tally

needs_fork = pytest.mark.skipif(sys.platform != "linux", reason="forks processes and reads /proc")


def require_good(tally: Tally, trials: int) -> None:
    assert tally.failures == []
    assert tally.trials == trials
