"""Knapsack solver over channel groups: find the widths that keep the most score within a latency.

As in HALP (Shen et al. 2022), every group has candidate widths, each with the score that it keeps and the time that it
takes. But the time of a layer depends on two groups, so the items are not independent. Lagrangian relaxation handles
both: for a multiplier of time, coordinate descent maximises score - multiplier * time, and bisection finds the
multiplier at which the limit is met. This also uses steps in the times, which a gradient would not show.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from passdeploy.channels.allocation import in_units
from passdeploy.channels.costs import CostModel
from passdeploy.channels.groups import ChannelGroup
from passdeploy.channels.plan import Plan, Scores
from passdeploy.channels.width_table import WidthTable, coordinate_descent
from passdeploy.errors import BudgetError
from passdeploy.latency.latency_cost import LatencyCost

_HALVINGS = 24


def allocate(scores: Scores, groups: Sequence[ChannelGroup], costs: CostModel, limit: int, *, round_to: int) -> Plan:
    """Find the plan that keeps the most score within `limit` nanoseconds.

    Args:
        scores: importance of every channel of every prunable group, 0 or more.
        groups: the network's groups; those that are not prunable, and those without scores, stay whole.
        costs: of the network, latency included.
        limit: nanoseconds.
        round_to: layer widths become multiples of this.

    Raises:
        BudgetError: no widths are so fast.
    """
    cost = costs.cost_of("latency")
    assert isinstance(cost, LatencyCost)
    knapsack = _Knapsack(WidthTable.build(scores, groups, costs, round_to=round_to, is_strict=True), cost)
    fastest, within = knapsack.best_choice(np.inf), cost.sum_within(limit)
    if knapsack.time(fastest) > within:
        least, whole = cost.value(knapsack.table.widths(fastest)), costs.of("latency")
        raise BudgetError(
            f"asked for {in_units('latency', limit)} ({limit / whole:.1%} of the dense network's), but the fastest "
            f"that can be reached is {in_units('latency', least)} ({least / whole:.1%}).\n"
            f"Ask for more{f', set prune.round_to below {round_to}' if round_to > 1 else ''}, or exclude fewer layers."
        )
    return knapsack.table.plan(knapsack.fill(knapsack.best_within(within, fastest), within))


@dataclass(frozen=True)
class _Knapsack:
    """Candidate widths with the score that they keep and the time that they take."""

    table: WidthTable
    cost: LatencyCost

    def best_choice(self, multiplier: float) -> np.ndarray:
        """Maximise score - `multiplier` * time one group at a time; an infinite one asks for speed alone."""

        def gain(widths: np.ndarray, group: int) -> np.ndarray:
            times = self.curve(widths, group)
            return -times if np.isinf(multiplier) else self.table.kept_score[group] - multiplier * times

        return coordinate_descent(self.table, gain)

    def best_within(self, limit: float, fastest: np.ndarray) -> np.ndarray:
        """Bisect for the smallest multiplier that keeps to `limit`; of the choices seen, return the best that does."""
        best, most = fastest, self.score(fastest)
        all_score, all_time = self.score(self.table.full_choice()), self.cost.sum(self.table.full)
        low, high = 1e-4 * all_score / all_time, 1e4 * all_score / all_time
        for _ in range(_HALVINGS):
            middle = float(np.sqrt(low * high))
            choice = self.best_choice(middle)
            if self.time(choice) <= limit:
                high = middle
                if self.score(choice) > most:
                    best, most = choice, self.score(choice)
            else:
                low = middle
        return best

    def fill(self, choice: np.ndarray, limit: float) -> np.ndarray:
        """Spend the rest of `limit`, each time on the wider candidate that keeps the most score for its time."""
        choice = choice.copy()
        while steps := self._steps_up(choice, limit):
            _, group, index = max(steps)
            choice[group] = index
        return choice

    def _steps_up(self, choice: np.ndarray, limit: float) -> list[tuple[float, int, int]]:
        """List the wider candidates that still fit as (score per nanosecond, group, index of the candidate)."""
        widths = self.table.widths(choice)
        left = limit - self.cost.sum(widths)
        steps: list[tuple[float, int, int]] = []
        for group, now in enumerate(choice.tolist()):
            times, kept_score = self.curve(widths, group), self.table.kept_score[group]
            for index in range(now + 1, len(times)):
                extra = float(times[index] - times[now])
                if extra <= left:
                    steps.append((float(kept_score[index] - kept_score[now]) / max(extra, 1.0), group, index))
        return steps

    def curve(self, widths: np.ndarray, group: int) -> np.ndarray:
        """Predict nanoseconds of the nodes that depend on a group, at each of its candidates; other groups stay."""
        return self.cost.curve(widths, self.table.columns[group], self.table.candidates[group])

    def time(self, choice: np.ndarray) -> float:
        """Predict the nanoseconds of all nodes."""
        return self.cost.sum(self.table.widths(choice))

    def score(self, choice: np.ndarray) -> float:
        """Add up the scores that are kept."""
        return sum(float(values[index]) for values, index in zip(self.table.kept_score, choice, strict=True))
