"""Short measurements of latency, for tests that look at whole commands and not at the precision of their figures."""

from __future__ import annotations

from functools import partial

import pytest

from passdeploy.commands import closing_latency
from passdeploy.profiling import TimeBudget, interleaved, pair


def shorten_measurements(patch: pytest.MonkeyPatch | None = None) -> None:
    """Measure for a moment, warmed up for two short windows.

    On a busy machine two windows hardly ever agree, and every warm-up would take five times its shortest time.
    """
    patch = patch or pytest.MonkeyPatch()
    patch.setattr(closing_latency, "LATENCY_SECONDS", 0.05)
    patch.setattr(pair, "TimeBudget", partial(TimeBudget, warm_up_ms=1.0, block_ms=2.0, stable_within=1.0))
    patch.setattr(interleaved, "_WINDOW_MS", 5.0)
