"""Table of the candidate widths of all channel groups and blocks, and coordinate descent over it.

Every planner chooses one candidate per item, which is a group or a block: by one threshold on scores
(`allocation.py`), or for a latency (`passdeploy/latency/knapsack.py`). A *choice* is the index of that candidate for
each item, shape (items,). A block has the candidates 0 and 1; where it is 0, its groups count for nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from torch import Tensor

from passdeploy.channels.blocks import Block, outermost, presence
from passdeploy.channels.costs import CostModel
from passdeploy.channels.groups import ChannelGroup
from passdeploy.channels.plan import Plan, Scores
from passdeploy.channels.widths import candidate_widths

_MAX_SWEEPS = 12


@dataclass(frozen=True, eq=False)
class WidthTable:
    """Candidate widths of the groups that may be cut and of the blocks that may be skipped: groups first."""

    names: list[str]  # of groups, then `presence` of blocks
    orders: list[Tensor]  # per item: channel indices, best first
    sorted_scores: list[np.ndarray]  # per item: scores in that order, shape (width,)
    candidates: list[np.ndarray]  # per item: the widths it may have, ascending; the last one is its full width
    columns: list[int]  # per item: its index in the cost model's vectors
    full: np.ndarray  # the dense widths as such a vector
    blocks: tuple[Block, ...]  # the last items, in this order
    inside: list[list[int]]  # per item: those that count only while it is there; none for a group

    @classmethod
    def build(
        cls, scores: Scores, groups: Sequence[ChannelGroup], costs: CostModel, *, round_to: int, is_strict: bool
    ) -> WidthTable:
        """Sort the channels of every group that is prunable and has scores, and add the blocks that have scores.

        Args:
            scores: group name -> importance of its channels, shape (width,); `presence` of a block -> that of all that
                goes with it, shape (1,).
            groups: of the network.
            costs: of the network.
            round_to: candidates are multiples of this.
            is_strict: see `candidate_widths`.
        """
        cut = [group for group in groups if group.is_prunable and group.name in scores]
        blocks = [block for block in costs.blocks if presence(block.name) in scores]
        blocks.sort(key=lambda block: len(block.contains))  # inner ones first
        names = [*(group.name for group in cut), *(presence(block.name) for block in blocks)]
        index = {name: column for column, name in enumerate(costs.widths)}
        ranked = [scores[name].detach().double().cpu().sort(descending=True, stable=True) for name in names]
        inside = [list[int]() for _ in cut]
        for block in blocks:
            own = {*block.groups, *map(presence, block.contains)}
            inside.append([item for item, name in enumerate(names) if name in own])
        return cls(
            names=names,
            orders=[order for _, order in ranked],
            sorted_scores=_without_inner_scores([values.numpy() for values, _ in ranked], inside),
            candidates=[
                *(candidate_widths(group, round_to, is_strict=is_strict) for group in cut),
                *(np.array([0, 1]) for _ in blocks),
            ],
            columns=[index[name] for name in names],
            full=costs.vector({}),
            blocks=tuple(blocks),
            inside=inside,
        )

    @property
    def first_block(self) -> int:
        """Number of groups: the index of the first block among the items."""
        return len(self.names) - len(self.blocks)

    def at_least(self, share: float) -> WidthTable:
        """Drop the candidates below `share` of their group's full width."""
        return replace(self, candidates=[widths[widths >= share * widths[-1]] for widths in self.candidates])

    @cached_property
    def kept_score(self) -> list[np.ndarray]:
        """Sum of the scores that each candidate keeps; per item, shape (candidates,)."""
        pairs = zip(self.sorted_scores, self.candidates, strict=True)
        return [np.concatenate([[0.0], np.cumsum(values)])[widths] for values, widths in pairs]

    def scores_of(self, choice: np.ndarray, item: int) -> np.ndarray:
        """Sum of the scores that each candidate of an item keeps, all that is inside it included; shape (candidates,).

        For a block that is what `choice` leaves of it.
        """
        inner = sum(
            float(self.kept_score[other][choice[other]])
            for other in self.inside[item]
            if self.is_there(choice, other, within=item)
        )
        scores: np.ndarray = self.kept_score[item] + np.where(self.candidates[item] > 0, inner, 0.0)
        return scores

    def score(self, choice: np.ndarray) -> float:
        """Add up the scores that are kept."""
        return sum(
            float(values[index])
            for item, (values, index) in enumerate(zip(self.kept_score, choice, strict=True))
            if self.is_there(choice, item)
        )

    @cached_property
    def owners(self) -> list[list[int]]:
        """The blocks that each item is inside of."""
        return [[owner for owner, inner in enumerate(self.inside) if item in inner] for item in range(len(self.names))]

    def is_there(self, choice: np.ndarray, item: int, *, within: int | None = None) -> bool:
        """True if no block around an item is skipped; the block `within`, if given, and those around it aside."""
        around = self.owners[item]
        if within is not None:
            around = [owner for owner in around if owner in self.inside[within]]
        return all(self.candidates[owner][choice[owner]] for owner in around)

    def marginal_score(self, item_cost: np.ndarray) -> list[np.ndarray]:
        """Mean score per unit of cost of the channels that each candidate adds to the one below it.

        Args:
            item_cost: cost of one channel of each group and of each whole block, shape (items,).

        Returns:
            Per item, shape (candidates - 1,).
        """
        per_cost = [values / cost for values, cost in zip(self.sorted_scores, item_cost, strict=True)]
        means = [_means_between(*pair) for pair in zip(per_cost[: self.first_block], self.candidates, strict=False)]
        whole = self.full_choice()
        for item in range(self.first_block, len(self.names)):  # a block is worth what is inside it as well
            means.append(np.array([self.scores_of(whole, item)[-1] / item_cost[item]]))
        return means

    def channel_counts(self) -> np.ndarray:
        """Count the channels that a step of each item adds: one of a group, all of a block; shape (items,)."""
        widths = [widths[-1] for widths in self.candidates]
        return np.array([sum(widths[other] for other in inner) or 1 for inner in self.inside], float)

    def full_choice(self) -> np.ndarray:
        """Choose the full width of every group, and keep every block."""
        return np.array([len(widths) - 1 for widths in self.candidates], np.int64)

    def widths(self, choice: np.ndarray) -> np.ndarray:
        """Convert a choice to the cost model's vector of widths; what the table lacks is as in the dense network."""
        vector: np.ndarray = self.full.copy()
        vector[self.columns] = [widths[index] for widths, index in zip(self.candidates, choice, strict=True)]
        return vector

    def with_owners(self, choice: np.ndarray, item: int) -> np.ndarray:
        """Copy a choice with the blocks around an item kept, so that the item counts."""
        if not self.owners[item]:
            return choice
        around: np.ndarray = choice.copy()
        for owner in self.owners[item]:
            around[owner] = len(self.candidates[owner]) - 1
        return around

    def choice_of(self, widths: Mapping[str, int]) -> np.ndarray:
        """Return the choice with the candidates next to the given widths; what is not named is whole."""
        pairs = zip(self.names, self.candidates, strict=True)
        nearest = [int(np.abs(sizes - widths.get(name, sizes[-1])).argmin()) for name, sizes in pairs]
        return np.array(nearest, np.int64)

    def plan(self, choice: np.ndarray) -> Plan:
        """Keep the best channels of every group that is there, as many as are chosen, and skip blocks as chosen."""
        kept = {}
        for item, name in enumerate(self.names[: self.first_block]):
            if self.is_there(choice, item):
                width = int(self.candidates[item][choice[item]])
                kept[name] = tuple(sorted(self.orders[item][:width].tolist()))
        skipped = [block for item, block in enumerate(self.blocks, self.first_block) if not choice[item]]
        names = {block.name for block in outermost(skipped)}
        return Plan(kept, tuple(block.name for block in self.blocks if block.name in names))


def _without_inner_scores(scores: list[np.ndarray], inside: Sequence[Sequence[int]]) -> list[np.ndarray]:
    """Subtract from the score of each block what is inside it: that counts by itself.

    A block may be worth less than its channels one by one, since they do the same work. Then less is left than nothing,
    and a block is skipped rather than cut so far that it loses more than its score.
    """
    own = list(scores)
    for item, inner in enumerate(inside):
        if inner:
            own[item] = scores[item] - sum(float(own[other].sum()) for other in inner)
    return own


def _means_between(values: np.ndarray, widths: np.ndarray) -> np.ndarray:
    """Average the values from each width to the next one, shape (widths - 1,)."""
    low, sizes = widths[:-1], np.diff(widths)
    means = np.empty(len(sizes))
    for size in np.unique(sizes):  # mostly one or two
        rows = sizes == size
        means[rows] = values[low[rows, None] + np.arange(size)].mean(1)
    return means


def coordinate_descent(
    table: WidthTable, gain: Callable[[np.ndarray, int], np.ndarray], blocks_of: np.ndarray | None = None
) -> np.ndarray:
    """Give each item in turn its best candidate while the others stay, from full widths until none changes.

    What is inside a skipped block is chosen as if it were there, so that the block is judged at its best widths.

    Args:
        table: of candidate widths.
        gain: (choice, index of an item) -> gain of each candidate of that item, shape (candidates,).
        blocks_of: a choice whose blocks are taken as they are; None: blocks are chosen like widths.

    Returns:
        The choice at which no item, by itself, gains by another candidate; or the one after the last sweep.
    """
    choice = table.full_choice()
    items = range(len(choice)) if blocks_of is None else range(table.first_block)
    if blocks_of is not None:
        choice[table.first_block :] = blocks_of[table.first_block :]
    for _ in range(_MAX_SWEEPS):
        before = choice.copy()
        for item in items:
            if len(table.candidates[item]) > 1:
                choice[item] = int(gain(table.with_owners(choice, item), item).argmax())
        if (choice == before).all():
            break
    return choice
