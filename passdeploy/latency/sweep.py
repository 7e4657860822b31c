"""Plan and measure one latency with several multiples of widths (`profile --sweep-round`)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from passdeploy.channels.plan import Scores
from passdeploy.errors import BudgetError, first_line
from passdeploy.latency.search import LatencyGoal, LatencySearch, SearchResult
from passdeploy.latency.target import measured


def sweep_round(
    steps: Sequence[int], search_at: Callable[[int], LatencySearch], scores: Scores, request: LatencyGoal
) -> list[dict[str, Any]]:
    """Plan and measure the same request with widths in multiples of each of `steps`.

    Returns:
        One row per step: `round_to`, the share of the score that is `kept`, and what was measured; or why it was
        `refused`.
    """
    rows = []
    whole = sum(float(values.sum()) for values in scores.values())
    for step in steps:
        try:
            met: SearchResult = search_at(step).find(scores, request)
        except BudgetError as error:
            rows.append({"round_to": step, "refused": first_line(error, longest=None)})
            continue
        kept = sum(float(scores[name][list(channels)].sum()) for name, channels in met.trial.plan.kept.items())
        rows.append({"round_to": step, "kept": kept / whole, **measured(met.trial)})
    return rows
