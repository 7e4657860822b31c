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

from passdeploy.channels.allocation import advice_for_budget, in_units
from passdeploy.channels.costs import CostModel
from passdeploy.channels.groups import ChannelGroup
from passdeploy.channels.plan import Plan, Scores
from passdeploy.channels.width_table import WidthTable, coordinate_descent
from passdeploy.errors import BudgetError, percent
from passdeploy.latency.latency_cost import LatencyCost

_HALVINGS = 24
_NEAR = 0.01  # share of the time that an adjusted plan may differ by
_STEPS = 2  # candidates up and down that are tried for each group
_NEIGHBOURS = 48
_PATIENCE = 4  # blocks that are skipped without a better plan before the search ends


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
    knapsack = _Knapsack.build(scores, groups, costs, round_to)
    cost = knapsack.cost
    fastest, within = knapsack.best_choice(np.inf), cost.sum_within(limit)
    if knapsack.time(fastest) > within:
        least, whole = cost.value(knapsack.table.widths(fastest)), costs.of("latency")
        raise BudgetError(
            f"asked for {in_units('latency', limit)} ({percent(limit / whole)} of the dense network's), but the "
            f"fastest that can be reached is {in_units('latency', least)} ({percent(least / whole)}).\n"
            f"{advice_for_budget(round_to)}"
        )
    return knapsack.table.plan(knapsack.best_within(within, fastest))


def allocate_fastest(scores: Scores, groups: Sequence[ChannelGroup], costs: CostModel, *, round_to: int) -> Plan:
    """Find the plan that takes the least time, whatever score it keeps; arguments as for `allocate`."""
    knapsack = _Knapsack.build(scores, groups, costs, round_to)
    return knapsack.table.plan(knapsack.best_choice(np.inf))


def adjust(
    plan: Plan,
    scores: Scores,
    groups: Sequence[ChannelGroup],
    costs: CostModel,
    wanted: int,
    *,
    round_to: int,
    known: Sequence[Plan] = (),
) -> Plan | None:
    """Change few widths of a plan, so that it takes about `wanted` nanoseconds, a little more or less.

    A plan that is made anew for another limit may be another network altogether, of which nothing is measured. Widths
    with little score for their time are taken away, or those with much added. Widths change in steps, so the changes
    of one or two groups more are tried as well; of all that end within a percent of `wanted`, the one that keeps the
    most score is taken, otherwise the nearest.

    Args:
        plan: to start from, with widths that `round_to` allows.
        scores: importance of every channel of every prunable group, 0 or more.
        groups: the network's groups.
        costs: of the network, latency included.
        wanted: nanoseconds by the latency table.
        round_to: layer widths become multiples of this.
        known: plans that must not be returned.

    Returns:
        The plan; None if all that are near are known.
    """
    knapsack = _Knapsack.build(scores, groups, costs, round_to)
    within = knapsack.cost.sum_within(wanted)
    below = knapsack.fill(knapsack.shrink(knapsack.table.choice_of(plan.widths()), within), within)

    def widths_of(plan: Plan) -> tuple[int, ...]:
        """List the widths of a plan, those inside of skipped blocks as the dense ones: they make no difference."""
        return tuple(knapsack.table.choice_of(plan.widths()).tolist())

    excluded = {widths_of(other) for other in known}
    neighbours = knapsack.neighbours(below, within)
    near = [choice for choice in neighbours if widths_of(knapsack.table.plan(choice)) not in excluded]
    if not near:
        return None
    off = [abs(knapsack.time(choice) / within - 1) for choice in near]
    right = [choice for choice, distance in zip(near, off, strict=True) if distance <= _NEAR]
    return knapsack.table.plan(max(right, key=knapsack.score) if right else near[int(np.argmin(off))])


@dataclass(frozen=True)
class _Knapsack:
    """Candidate widths with the score that they keep and the time that they take."""

    table: WidthTable
    cost: LatencyCost

    @classmethod
    def build(cls, scores: Scores, groups: Sequence[ChannelGroup], costs: CostModel, round_to: int) -> _Knapsack:
        """Build the candidates of all groups; arguments as for `allocate`."""
        cost = costs.cost_of("latency")
        assert isinstance(cost, LatencyCost)
        return cls(WidthTable.build(scores, groups, costs, round_to=round_to, is_strict=True), cost)

    def best_choice(self, multiplier: float, blocks_of: np.ndarray | None = None) -> np.ndarray:
        """Maximise score - `multiplier` * time one item at a time; an infinite one asks for speed alone.

        Args:
            multiplier: of time, score per nanosecond.
            blocks_of: a choice whose blocks are taken as they are; None: blocks are chosen too.
        """

        def gain(choice: np.ndarray, item: int) -> np.ndarray:
            times = self.curve(self.table.widths(choice), item)
            return -times if np.isinf(multiplier) else self.table.scores_of(choice, item) - multiplier * times

        return coordinate_descent(self.table, gain, blocks_of)

    def best_within(self, limit: float, fastest: np.ndarray) -> np.ndarray:
        """Find the choice with the most score that keeps to `limit`, with room that is left filled.

        Blocks are few and large, so that one multiplier for all of them leaves much of the limit unused. They are also
        skipped one after the other, always the one that is worth the least for its time; for each set of blocks the
        widths are found again.

        Args:
            limit: nanoseconds of all nodes.
            fastest: a choice that keeps to it.
        """
        best = self.fill(self._bisect(limit, fastest), limit)
        blocks = self.table.full_choice()
        since_best = 0
        while since_best < _PATIENCE and blocks[self.table.first_block :].any():
            narrowest = self.best_choice(np.inf, blocks)
            choice = narrowest
            if self.time(narrowest) <= limit:
                choice = self.fill(self._bisect(limit, narrowest, blocks), limit)
                since_best += 1
                if self.score(choice) > self.score(best):
                    best, since_best = choice, 0
            blocks[self._least_worthy_block(choice)] = 0
        return best

    def _least_worthy_block(self, choice: np.ndarray) -> int:
        """Return the block that keeps the least score for its time."""
        widths, worth = self.table.widths(choice), dict[int, float]()
        for item in range(self.table.first_block, len(choice)):
            if choice[item]:
                time = float(self.curve(widths, item)[-1])
                worth[item] = float(self.table.scores_of(choice, item)[-1]) / max(time, 1.0)
        return min(worth, key=lambda item: worth[item])

    def _bisect(self, limit: float, fastest: np.ndarray, blocks_of: np.ndarray | None = None) -> np.ndarray:
        """Bisect for the smallest multiplier that keeps to `limit`; of the choices seen, return the best that does."""
        best, most = fastest, self.score(fastest)
        all_score, all_time = self.score(self.table.full_choice()), self.cost.sum(self.table.full)
        low, high = 1e-4 * all_score / all_time, 1e4 * all_score / all_time
        for _ in range(_HALVINGS):
            middle = float(np.sqrt(low * high))
            choice = self.best_choice(middle, blocks_of)
            if self.time(choice) <= limit:
                high = middle
                if self.score(choice) > most:
                    best, most = choice, self.score(choice)
            else:
                low = middle
        return best

    def shrink(self, choice: np.ndarray, limit: float) -> np.ndarray:
        """Take widths away until `limit` is met, each time those with the least score for their time."""
        choice = choice.copy()
        while self.time(choice) > limit and (steps := self._steps_down(choice)):
            _, group, index = min(steps)
            choice[group] = index
        return choice

    def neighbours(self, choice: np.ndarray, wanted: float) -> list[np.ndarray]:
        """List `choice` and changes of one or two of its groups that take about `wanted`, some dozens of them.

        The times of two changes are added, although layers between both groups depend on each of them.
        """
        widths, moves = self.table.widths(choice), [(0.0, -1, 0)]  # extra time, group, index of the candidate
        for group, now in self._present(choice):
            times = self.curve(widths, group)
            near = range(max(now - _STEPS, 0), min(now + _STEPS + 1, len(times)))
            moves += [(float(times[index] - times[now]), group, index) for index in near if index != now]
        extra = np.array([move[0] for move in moves])
        off = np.abs(extra[:, None] + extra[None, :] - (wanted - self.cost.sum(widths)))
        found = [choice]
        for row, column in zip(*np.unravel_index(np.argsort(off, axis=None), off.shape), strict=True):
            if len(found) > _NEIGHBOURS:
                break
            (_, first, to_first), (_, second, to_second) = moves[row], moves[column]
            if first < second:  # each pair once, and a single change beside none
                changed = choice.copy()
                changed[second] = to_second
                if first >= 0:
                    changed[first] = to_first
                found.append(changed)
        return found

    def fill(self, choice: np.ndarray, limit: float) -> np.ndarray:
        """Spend the rest of `limit`, each time on the wider candidate that keeps the most score for its time."""
        choice = choice.copy()
        while steps := self._steps_up(choice, limit):
            _, item, index = max(steps)
            choice[item] = index
        return choice

    def _steps_up(self, choice: np.ndarray, limit: float) -> list[tuple[float, int, int]]:
        """List the wider candidates that still fit as (score per nanosecond, item, index of the candidate)."""
        widths = self.table.widths(choice)
        left = limit - self.cost.sum(widths)
        steps: list[tuple[float, int, int]] = []
        for group, now in self._present(choice):
            times, kept_score = self.curve(widths, group), self.table.scores_of(choice, group)
            for index in range(now + 1, len(times)):
                extra = float(times[index] - times[now])
                if extra <= left:
                    steps.append((float(kept_score[index] - kept_score[now]) / max(extra, 1.0), group, index))
        return steps

    def _steps_down(self, choice: np.ndarray) -> list[tuple[float, int, int]]:
        """List the narrower candidates that save time as (score lost per nanosecond, group, index of the candidate)."""
        widths = self.table.widths(choice)
        steps: list[tuple[float, int, int]] = []
        for group, now in self._present(choice):
            times, kept_score = self.curve(widths, group), self.table.scores_of(choice, group)
            for index in range(now):
                saved = float(times[now] - times[index])
                if saved > 0:
                    steps.append((float(kept_score[now] - kept_score[index]) / saved, group, index))
        return steps

    def curve(self, widths: np.ndarray, group: int) -> np.ndarray:
        """Predict nanoseconds of the nodes that depend on a group, at each of its candidates; other groups stay."""
        return self.cost.curve(widths, self.table.columns[group], self.table.candidates[group])

    def time(self, choice: np.ndarray) -> float:
        """Predict the nanoseconds of all nodes."""
        return self.cost.sum(self.table.widths(choice))

    def score(self, choice: np.ndarray) -> float:
        """Add up the scores that are kept."""
        return self.table.score(choice)

    def _present(self, choice: np.ndarray) -> list[tuple[int, int]]:
        """List (item, index of its candidate) of all that no skipped block is around."""
        return [(item, index) for item, index in enumerate(choice.tolist()) if self.table.is_there(choice, item)]
