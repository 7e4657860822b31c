"""Plan and measure the same latency once for each width multiple (`profile --sweep-round`)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from passdeploy.channels.plan import Scores
from passdeploy.errors import BudgetError, first_line
from passdeploy.latency.search import LatencyGoal, LatencySearch, SearchResult
from passdeploy.latency.target import describe_trial


def sweep_round(
    steps: Sequence[int], search_at: Callable[[int], LatencySearch], scores: Scores, goal: LatencyGoal
) -> list[dict[str, Any]]:
    """Plan and measure the same goal with widths in multiples of each of `steps`.

    Returns:
        One row per step: `round_to`, the share of the score that is `kept`, and the measured times; or the reason why
        it was `refused`.
    """
    rows = []
    total = sum(float(values.sum()) for values in scores.values())
    for step in steps:
        try:
            result: SearchResult = search_at(step).find(scores, goal)
        except BudgetError as error:
            rows.append({"round_to": step, "refused": first_line(error, longest=None)})
            continue
        kept = sum(float(scores[name][list(channels)].sum()) for name, channels in result.best.plan.kept.items())
        rows.append({"round_to": step, "kept": kept / total, **describe_trial(result.best)})
    return rows
