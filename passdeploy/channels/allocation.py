"""A budget divided among channel groups: from scores to the plan that keeps the most.

One threshold is shared by all groups (Huang et al., PASS, arXiv:2407.17412, global pruning). It is set where the
budget is met, with kept widths rounded to multiples that the hardware computes efficiently.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from torch import Tensor

from passdeploy.channels.costs import CostModel
from passdeploy.channels.groups import ChannelGroup
from passdeploy.channels.plan import Plan, Scores
from passdeploy.channels.widths import STRICT_KINDS, candidate_widths, minimum_width
from passdeploy.errors import BudgetError


@dataclass(frozen=True)
class Budget:
    """What the slim network may cost at most."""

    kind: str  # macs, params, channels or latency
    limit: int  # in units of that kind; latency counts nanoseconds

    @classmethod
    def of(cls, kind: str, amount: float, costs: CostModel) -> Budget:
        """A fraction of the dense network below or at 1, an absolute count above."""
        return cls(kind, int(amount * costs.of(kind)) if amount <= 1 else int(amount))


def choose_channels(
    scores: Scores,
    groups: Sequence[ChannelGroup],
    costs: CostModel,
    budget: Budget,
    *,
    round_to: int = 8,
    per_cost: bool = True,
    allocation: str = "global",
) -> Plan:
    """Keep the best channels that the budget pays for.

    Args:
        scores: importance of every channel of every prunable group.
        groups: the network's groups; those that are not prunable stay whole.
        costs: prices widths.
        budget: what the result may cost at most.
        round_to: layer widths become multiples of this; a layer narrower than twice that goes in smaller steps.
        per_cost: rank channels by score per unit of cost instead of by score alone. The cost of a channel is that
            of the dense network's, so a ranking does not depend on what else is cut.
        allocation: `global` (one threshold for all groups) or `uniform` (the same share of every group).

    Raises:
        BudgetError: even the narrowest network that `round_to` allows costs more.
    """
    cut = [group for group in groups if group.is_prunable and group.name in scores]
    smallest_plan(cut, costs, budget, round_to=round_to)
    ladder = _Ladder.build(scores, cut, costs, budget.kind, round_to, per_cost and allocation == "global")
    price = costs.price(budget.kind).value
    kept = ladder.uniform(price, budget.limit) if allocation == "uniform" else ladder.climb(price, budget.limit)
    return Plan(
        {
            group.name: tuple(sorted(order[:count].tolist()))
            for group, order, count in zip(cut, ladder.orders, kept, strict=True)
        }
    )


def smallest_plan(
    groups: Sequence[ChannelGroup], costs: CostModel, budget: Budget, *, round_to: int
) -> Mapping[str, int]:
    """The narrowest widths that `round_to` allows, group name -> channels.

    Raises:
        BudgetError: even they cost more than the budget.
    """
    widths = {group.name: minimum_width(group, round_to, budget.kind) for group in groups if group.is_prunable}
    smallest, whole = costs.of(budget.kind, widths), costs.of(budget.kind)
    if smallest > budget.limit:
        least = in_units(budget.kind, smallest).removesuffix(f" {budget.kind}")
        advice = f"Ask for more, set prune.round_to below {round_to}" if round_to > 1 else "Ask for more"
        raise BudgetError(
            f"asked for {in_units(budget.kind, budget.limit)} ({budget.limit / whole:.1%} of the dense network's), but "
            f"the smallest that can be reached is {least} ({smallest / whole:.1%}).\n"
            f"{advice}, or exclude fewer layers."
        )
    return widths


def in_units(kind: str, amount: int) -> str:
    """An amount as a person says it.

    >>> in_units("macs", 1234567), in_units("latency", 1_800_000)
    ('1,234,567 macs', '1.8 ms')
    """
    return f"{amount / 1e6:.3g} ms" if kind == "latency" else f"{amount:,} {kind}"


@dataclass(frozen=True)
class _Ladder:
    """Every group as a ladder of widths, best channels first, and the worth of each rung."""

    orders: list[Tensor]  # per group: channels, best first
    candidates: list[np.ndarray]  # per group: the widths it may have, ascending; the last one is full
    kept_score: list[np.ndarray]  # per group: the mean score of the channels that each rung after the first adds
    columns: np.ndarray  # where each group's width stands in the cost model's vector
    full: np.ndarray  # the cost model's dense widths

    @classmethod
    def build(
        cls,
        scores: Scores,
        groups: Sequence[ChannelGroup],
        costs: CostModel,
        kind: str,
        round_to: int,
        per_cost: bool,
    ) -> _Ladder:
        full = costs.vector({})
        position = {name: number for number, name in enumerate(costs.widths)}
        columns = np.array([position[group.name] for group in groups], int)
        prices = costs.price(kind).gradient(full) if per_cost else np.ones(len(full))
        orders, candidates, kept_score = [], [], []
        for group, column in zip(groups, columns, strict=True):
            values, order = scores[group.name].detach().double().cpu().sort(descending=True, stable=True)
            widths = candidate_widths(group, round_to, is_strict=kind in STRICT_KINDS)
            values = values.numpy() / prices[column]
            orders.append(order)
            candidates.append(widths)
            kept_score.append(np.array([values[low:high].mean() for low, high in pairwise(widths)]))
        return cls(orders, candidates, kept_score, columns, full)

    @property
    def floor(self) -> np.ndarray:
        return np.array([widths[0] for widths in self.candidates], np.int64)

    def widths(self, kept: np.ndarray) -> np.ndarray:
        """The cost model's vector when each group keeps `kept` channels."""
        vector: np.ndarray = self.full.copy()
        vector[self.columns] = kept
        return vector

    def climb(self, price: Callable[[np.ndarray], int], limit: int) -> np.ndarray:
        """Take rungs, best first over all groups: up to one threshold, then whatever still fits below it."""
        # A rung needs those below it, so it is worth no more than they are.
        kept_score = [np.minimum.accumulate(values) for values in self.kept_score]
        group = np.repeat(np.arange(len(kept_score)), [len(values) for values in kept_score])
        group = group[np.argsort(-np.concatenate([*kept_score, []]), kind="stable")]
        low, high = 0, len(group)
        while low < high:  # the longest run of steps that the limit pays for: costs only grow along the ladder
            middle = (low + high + 1) // 2
            fits = price(self.widths(self._at(self._heights(group[:middle])))) <= limit
            low, high = (middle, high) if fits else (low, middle - 1)
        height, full = self._heights(group[:low]), set()
        for step in group[low:].tolist():
            if step not in full:
                height[step] += 1
                if price(self.widths(self._at(height))) > limit:
                    height[step] -= 1
                    full.add(step)
        return self._at(height)

    def uniform(self, price: Callable[[np.ndarray], int], limit: int) -> np.ndarray:
        """The largest share that, kept of every group, costs no more than `limit`."""
        low, high = 0.0, 1.0
        for _ in range(40):
            middle = (low + high) / 2
            low, high = (middle, high) if price(self.widths(self._share(middle))) <= limit else (low, middle)
        return self._share(high if price(self.widths(self._share(high))) <= limit else low)

    def _share(self, share: float) -> np.ndarray:
        nearest = [widths[np.abs(widths - share * widths[-1]).argmin()] for widths in self.candidates]
        return np.array(nearest, np.int64)

    def _heights(self, steps: np.ndarray) -> np.ndarray:
        """The rung of every group after `steps`, each one group's next rung."""
        heights: np.ndarray = np.bincount(steps, minlength=len(self.candidates))
        return heights

    def _at(self, height: np.ndarray) -> np.ndarray:
        return np.array([widths[h] for widths, h in zip(self.candidates, height, strict=True)], np.int64)
