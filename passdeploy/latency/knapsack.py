"""The knapsack over channel groups: the widths that keep the most score in the time there is.

As in HALP (Shen et al. 2022), every group is a ladder of widths, with the score that each keeps and the time that it
takes; but a layer's time depends on two groups, so the items are not independent. Lagrange's relaxation handles both:
for a price of time, each group in turn takes its best width while its neighbours stay, until none wants to change; the
price is found at which the budget is met. That finds steps in the times too, where no slope would show them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from passdeploy.channels.allocation import in_units
from passdeploy.channels.costs import CostModel
from passdeploy.channels.groups import ChannelGroup
from passdeploy.channels.plan import Plan, Scores
from passdeploy.channels.widths import candidate_widths
from passdeploy.errors import BudgetError
from passdeploy.latency.cost import LatencyCost

_SWEEPS = 12
_HALVINGS = 24


def allocate(scores: Scores, groups: Sequence[ChannelGroup], costs: CostModel, limit: int, *, round_to: int) -> Plan:
    """The plan that keeps the most score within `limit` nanoseconds.

    Args:
        scores: importance of every channel of every prunable group, 0 or more.
        groups: the network's groups; those that are not prunable, and those without scores, stay whole.
        costs: with a latency price.
        limit: nanoseconds.
        round_to: layer widths become multiples of this.

    Raises:
        BudgetError: no widths take so little.
    """
    sack = _Knapsack.pack(scores, groups, costs, round_to)
    fastest = sack.settle(np.inf)
    if sack.time(fastest) > sack.price.relaxed(limit):
        least, whole = sack.price.value(sack.widths(fastest)), costs.of("latency")
        raise BudgetError(
            f"asked for {in_units('latency', limit)} ({limit / whole:.1%} of the dense network's), but the fastest "
            f"that can be reached is {in_units('latency', least)} ({least / whole:.1%}).\n"
            f"Ask for more{f', set prune.round_to below {round_to}' if round_to > 1 else ''}, or exclude fewer layers."
        )
    within = sack.price.relaxed(limit)
    return sack.plan(sack.fill(sack.best_within(within, fastest), within))


@dataclass(frozen=True)
class _Knapsack:
    """Groups as ladders: what each rung keeps; which group stands where in the price's vectors."""

    names: list[str]
    orders: list[Tensor]  # per group: channels, best first
    candidates: list[np.ndarray]  # per group: widths, ascending
    kept_score: list[np.ndarray]  # per group: the score that each rung keeps
    columns: list[int]
    price: LatencyCost
    full: np.ndarray  # the cost model's dense widths

    @classmethod
    def pack(cls, scores: Scores, groups: Sequence[ChannelGroup], costs: CostModel, round_to: int) -> _Knapsack:
        cut = [group for group in groups if group.is_prunable and group.name in scores]
        context = {name: number for number, name in enumerate(costs.widths)}
        price = costs.price("latency")
        assert isinstance(price, LatencyCost)
        orders, candidates, kept_score = [], [], []
        for group in cut:
            values, order = scores[group.name].detach().double().cpu().sort(descending=True, stable=True)
            widths = candidate_widths(group, round_to, is_strict=True)
            orders.append(order)
            candidates.append(widths)
            kept_score.append(np.cumsum(values.numpy())[widths - 1])
        columns = [context[group.name] for group in cut]
        return cls([group.name for group in cut], orders, candidates, kept_score, columns, price, costs.vector({}))

    def settle(self, price_of_time: float) -> np.ndarray:
        """Rungs at which no group, by itself, gains by another one; an infinite price asks for speed alone."""
        at = np.array([len(widths) - 1 for widths in self.candidates])
        widths = self.widths(at)
        for _ in range(_SWEEPS):
            before = at.copy()
            for group, column in enumerate(self.columns):
                if len(self.candidates[group]) > 1:
                    times = self.price.curve(widths, column, self.candidates[group])
                    gain = -times if np.isinf(price_of_time) else self.kept_score[group] - price_of_time * times
                    at[group] = int(gain.argmax())
                    widths[column] = self.candidates[group][at[group]]
            if (at == before).all():
                break
        return at

    def best_within(self, limit: float, fastest: np.ndarray) -> np.ndarray:
        """The rungs of the lowest price of time that keep to `limit`; of those seen, the ones that keep the most."""
        best, most = fastest, self.score(fastest)
        all_score, all_time = sum(float(kept_score[-1]) for kept_score in self.kept_score), self.price.sum(self.full)
        low, high = 1e-4 * all_score / all_time, 1e4 * all_score / all_time
        for _ in range(_HALVINGS):
            middle = float(np.sqrt(low * high))
            at = self.settle(middle)
            if self.time(at) <= limit:
                high = middle
                if self.score(at) > most:
                    best, most = at, self.score(at)
            else:
                low = middle
        return best

    def fill(self, at: np.ndarray, limit: float) -> np.ndarray:
        """Spend what is left of the budget, each time on the step up that keeps the most for its time."""
        at = at.copy()
        while True:
            widths = self.widths(at)
            left = limit - self.price.sum(widths)
            steps: list[tuple[float, int, int]] = []
            for group, column in enumerate(self.columns):
                times = self.price.curve(widths, column, self.candidates[group])
                for rung in range(at[group] + 1, len(times)):
                    extra = float(times[rung] - times[at[group]])
                    if extra <= left:
                        kept = float(self.kept_score[group][rung] - self.kept_score[group][at[group]])
                        steps.append((kept / max(extra, 1.0), group, rung))
            if not steps:
                return at
            _, group, rung = max(steps)
            at[group] = rung

    def widths(self, at: np.ndarray) -> np.ndarray:
        """The price's vector."""
        vector: np.ndarray = self.full.copy()
        vector[self.columns] = [widths[rung] for widths, rung in zip(self.candidates, at, strict=True)]
        return vector

    def time(self, at: np.ndarray) -> float:
        return self.price.sum(self.widths(at))

    def score(self, at: np.ndarray) -> float:
        return sum(float(kept_score[rung]) for kept_score, rung in zip(self.kept_score, at, strict=True))

    def plan(self, at: np.ndarray) -> Plan:
        """The best channels of every group, as many as its rung says."""
        widths = (self.candidates[group][rung] for group, rung in enumerate(at))
        chosen = zip(self.names, self.orders, widths, strict=True)
        return Plan({name: tuple(sorted(order[: int(width)].tolist())) for name, order, width in chosen})
