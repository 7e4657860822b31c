"""Find the fastest widths that keep a number of multiply-adds: the worth of a latency table without scores.

A latency plan keeps the most score within a time, and the scores decide how many multiply-adds remain. This is the
other way round, so that networks of equal multiply-adds can be compared: for a multiplier, coordinate descent maximises
multiplier * multiply-adds - time; bisection finds the multiplier at which enough are kept; then groups are narrowed as
long as enough remain.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from passdeploy.channels.costs import CostModel, Polynomial
from passdeploy.channels.groups import ChannelGroup
from passdeploy.channels.width_table import WidthTable, coordinate_descent
from passdeploy.errors import BudgetError
from passdeploy.latency.latency_cost import LatencyCost

_HALVINGS = 24


def fastest_widths(
    costs: CostModel, groups: Sequence[ChannelGroup], macs: int, *, round_to: int, least: float = 0.0
) -> dict[str, int]:
    """Find the widths of every prunable group that take the least time and keep at least `macs` multiply-adds.

    Args:
        costs: of the network, latency included.
        groups: the network's groups; those that are not prunable stay whole.
        macs: to be kept at least.
        round_to: layer widths become multiples of this.
        least: share of its channels that every group keeps at least. At 0 the layers that are slow for their
            multiply-adds (the first, the last) end up with next to no channels.

    Raises:
        BudgetError: the dense network has fewer.
    """
    if macs > costs.of("macs"):
        raise BudgetError(f"asked to keep {macs:,} multiply-adds; the dense network has {costs.of('macs'):,}.")
    search = _Search.build(costs, groups, round_to, least)
    best = search.table.full_choice()
    low, high = 0.0, 1e3 * search.time(best) / costs.of("macs")
    for _ in range(_HALVINGS):
        middle = float(np.sqrt(max(low, 1e-9 * high) * high))
        choice = search.best_choice(middle)
        if search.kept(choice) >= macs:
            high = middle
            if search.time(choice) < search.time(best):
                best = choice
        else:
            low = middle
    chosen = zip(search.table.names, search.table.candidates, search.trim(best, macs), strict=True)
    return {name: int(widths[index]) for name, widths, index in chosen}


@dataclass(frozen=True)
class _Search:
    """Candidate widths, the time that they take and the multiply-adds that they keep."""

    table: WidthTable
    cost: LatencyCost
    macs: Polynomial

    @classmethod
    def build(cls, costs: CostModel, groups: Sequence[ChannelGroup], round_to: int, least: float) -> _Search:
        """Take every prunable group; without scores all channels count the same."""
        cost = costs.cost_of("latency")
        assert isinstance(cost, LatencyCost)
        scores = {group.name: torch.ones(group.width) for group in groups}
        table = WidthTable.build(scores, groups, costs, round_to=round_to, is_strict=True)
        return cls(table.at_least(least), cost, costs.macs)

    def time(self, choice: np.ndarray) -> float:
        """Predict the nanoseconds of all nodes."""
        return float(self.cost.sum(self.table.widths(choice)))

    def kept(self, choice: np.ndarray) -> int:
        """Count the multiply-adds of the network."""
        return self.macs.value(self.table.widths(choice))

    def best_choice(self, multiplier: float) -> np.ndarray:
        """Maximise `multiplier` (nanoseconds) * multiply-adds - time, one group at a time."""

        def gain(choice: np.ndarray, group: int) -> np.ndarray:
            times, macs = self._curves(self.table.widths(choice), group, self.table.candidates[group])
            return multiplier * macs - times

        return coordinate_descent(self.table, gain)

    def trim(self, choice: np.ndarray, macs: int) -> np.ndarray:
        """Narrow groups while `macs` are kept, each time where the most time is saved per multiply-add lost."""
        choice = choice.copy()
        while steps := self._steps_down(choice, macs):
            _, group, index = max(steps)
            choice[group] = index
        return choice

    def _steps_down(self, choice: np.ndarray, macs: int) -> list[tuple[float, int, int]]:
        """List the narrower candidates that keep enough as (ns saved per multiply-add, group, index)."""
        widths, steps = self.table.widths(choice), list[tuple[float, int, int]]()
        spare = self.kept(choice) - macs
        for group, now in enumerate(choice.tolist()):
            times, counts = self._curves(widths, group, self.table.candidates[group][: now + 1])
            saved, lost = times[-1] - times[:-1], counts[-1] - counts[:-1]
            for index in np.flatnonzero((lost <= spare) & (saved > 0)).tolist():
                steps.append((float(saved[index] / max(lost[index], 1)), group, index))
        return steps

    def _curves(self, widths: np.ndarray, group: int, candidates: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Compute nanoseconds and multiply-adds at each of one group's `candidates`; other groups stay."""
        column = self.table.columns[group]
        return self.cost.curve(widths, column, candidates), macs_along(self.macs, widths, column, candidates)


def macs_along(macs: Polynomial, widths: np.ndarray, column: int, candidates: np.ndarray) -> np.ndarray:
    """Count multiply-adds with one group at each of the widths `candidates`, other groups at `widths`.

    Returns:
        Counts, shape (candidates,).
    """
    sizes = macs.fixed + macs.spans @ widths  # (terms, factors)
    moved = sizes[None] + macs.spans[None, :, :, column] * (candidates - widths[column])[:, None, None]
    counts: np.ndarray = (macs.unit * moved.prod(2)).sum(1)
    return counts
