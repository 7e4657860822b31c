"""Table of the candidate widths of all channel groups, and coordinate descent over it.

Every planner chooses one candidate per group: by one threshold on scores (`allocation.py`), or for a latency
(`passdeploy/latency/knapsack.py`). A *choice* is the index of that candidate for each group, shape (groups,).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from torch import Tensor

from passdeploy.channels.costs import CostModel
from passdeploy.channels.groups import ChannelGroup
from passdeploy.channels.plan import Plan, Scores
from passdeploy.channels.widths import candidate_widths

_MAX_SWEEPS = 12


@dataclass(frozen=True, eq=False)
class WidthTable:
    """Candidate widths of the groups that may be cut, with their channels from best to worst."""

    names: list[str]
    orders: list[Tensor]  # per group: channel indices, best first
    sorted_scores: list[np.ndarray]  # per group: scores in that order, shape (width,)
    candidates: list[np.ndarray]  # per group: the widths it may have, ascending; the last one is its full width
    columns: list[int]  # per group: its index in the cost model's vectors
    full: np.ndarray  # the dense widths as such a vector

    @classmethod
    def build(
        cls, scores: Scores, groups: Sequence[ChannelGroup], costs: CostModel, *, round_to: int, is_strict: bool
    ) -> WidthTable:
        """Sort the channels of every group that is prunable and has scores.

        Args:
            scores: group name -> importance of its channels, shape (width,).
            groups: of the network.
            costs: of the network.
            round_to: candidates are multiples of this.
            is_strict: see `candidate_widths`.
        """
        cut = [group for group in groups if group.is_prunable and group.name in scores]
        index = {name: column for column, name in enumerate(costs.widths)}
        ranked = [scores[group.name].detach().double().cpu().sort(descending=True, stable=True) for group in cut]
        return cls(
            names=[group.name for group in cut],
            orders=[order for _, order in ranked],
            sorted_scores=[values.numpy() for values, _ in ranked],
            candidates=[candidate_widths(group, round_to, is_strict=is_strict) for group in cut],
            columns=[index[group.name] for group in cut],
            full=costs.vector({}),
        )

    def at_least(self, share: float) -> WidthTable:
        """Drop the candidates below `share` of their group's full width."""
        return replace(self, candidates=[widths[widths >= share * widths[-1]] for widths in self.candidates])

    @cached_property
    def kept_score(self) -> list[np.ndarray]:
        """Sum of the scores that each candidate keeps; per group, shape (candidates,)."""
        pairs = zip(self.sorted_scores, self.candidates, strict=True)
        return [np.cumsum(values)[widths - 1] for values, widths in pairs]

    def marginal_score(self, channel_cost: np.ndarray) -> list[np.ndarray]:
        """Mean score per unit of cost of the channels that each candidate adds to the one below it.

        Args:
            channel_cost: cost of one channel of each group, shape (groups,).

        Returns:
            Per group, shape (candidates - 1,).
        """
        per_cost = [values / cost for values, cost in zip(self.sorted_scores, channel_cost, strict=True)]
        return [_means_between(values, widths) for values, widths in zip(per_cost, self.candidates, strict=True)]

    def full_choice(self) -> np.ndarray:
        """Choose the full width of every group."""
        return np.array([len(widths) - 1 for widths in self.candidates], np.int64)

    def widths(self, choice: np.ndarray) -> np.ndarray:
        """Convert a choice to the cost model's vector of widths; groups outside the table are full."""
        vector: np.ndarray = self.full.copy()
        vector[self.columns] = [widths[index] for widths, index in zip(self.candidates, choice, strict=True)]
        return vector

    def plan(self, choice: np.ndarray) -> Plan:
        """Keep the best channels of every group, as many as are chosen."""
        chosen = (int(widths[index]) for widths, index in zip(self.candidates, choice, strict=True))
        ranked = zip(self.names, self.orders, chosen, strict=True)
        return Plan({name: tuple(sorted(order[:width].tolist())) for name, order, width in ranked})


def _means_between(values: np.ndarray, widths: np.ndarray) -> np.ndarray:
    """Average the values from each width to the next one, shape (widths - 1,)."""
    low, sizes = widths[:-1], np.diff(widths)
    means = np.empty(len(sizes))
    for size in np.unique(sizes):  # mostly one or two
        rows = sizes == size
        means[rows] = values[low[rows, None] + np.arange(size)].mean(1)
    return means


def coordinate_descent(table: WidthTable, gain: Callable[[np.ndarray, int], np.ndarray]) -> np.ndarray:
    """Give each group in turn its best width while the others stay, from full widths until none changes.

    Args:
        table: of candidate widths.
        gain: (the cost model's vector of widths, index of a group) -> gain of each candidate of that group, shape
            (candidates,).

    Returns:
        The choice at which no group, by itself, gains by another width; or the one after the last sweep.
    """
    choice = table.full_choice()
    widths = table.widths(choice)
    for _ in range(_MAX_SWEEPS):
        before = choice.copy()
        for group, candidates in enumerate(table.candidates):
            if len(candidates) > 1:
                choice[group] = int(gain(widths, group).argmax())
                widths[table.columns[group]] = candidates[choice[group]]
        if (choice == before).all():
            break
    return choice
