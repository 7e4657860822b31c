"""The fastest widths that keep so many multiply-adds: what a latency table is worth where no score says what to keep.

A plan for latency keeps the most score in a time, and how many multiply-adds that leaves is for the scores to say. Here
it is the other way round, so that networks of equal multiply-adds can be compared: for a price of multiply-adds, each
group in turn takes the width at which its time minus that price is least, until none wants to change; the price is
found at which enough are kept, and then every step down is taken that still leaves enough.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from passdeploy.channels.costs import CostModel, Polynomial
from passdeploy.channels.groups import ChannelGroup
from passdeploy.channels.widths import candidate_widths
from passdeploy.errors import BudgetError
from passdeploy.latency.cost import LatencyCost

_SWEEPS = 12
_HALVINGS = 24


def fastest_widths(
    costs: CostModel, groups: Sequence[ChannelGroup], macs: int, *, round_to: int, least: float = 0.0
) -> dict[str, int]:
    """The widths of every prunable group that take the least time and keep at least `macs` multiply-adds.

    Args:
        costs: with a latency price.
        groups: the network's groups; those that are not prunable stay whole.
        macs: to be kept at least.
        round_to: layer widths become multiples of this.
        least: share of its channels that every group keeps; with none, the multiply-adds go to where they are cheapest,
            and layers that take long for theirs (the first, the last) are left with next to no channels.

    Raises:
        BudgetError: the dense network has fewer.
    """
    if macs > costs.of("macs"):
        raise BudgetError(f"asked to keep {macs:,} multiply-adds; the dense network has {costs.of('macs'):,}.")
    search = _Search(costs, [group for group in groups if group.is_prunable], round_to, least)
    low, high = 0.0, 1e3 * search.time(search.full) / costs.of("macs")
    best = search.full
    for _ in range(_HALVINGS):
        middle = float(np.sqrt(max(low, 1e-9 * high) * high))
        found = search.settle(middle)
        if search.kept(found) >= macs:
            high = middle
            if search.time(found) < search.time(best):
                best = found
        else:
            low = middle
    best = search.trim(best, macs)
    return {group.name: int(best[column]) for group, column in zip(search.groups, search.columns, strict=True)}


class _Search:
    """Vectors of widths, their times and their multiply-adds."""

    def __init__(self, costs: CostModel, groups: Sequence[ChannelGroup], round_to: int, least: float) -> None:
        place = {name: number for number, name in enumerate(costs.widths)}
        price = costs.price("latency")
        assert isinstance(price, LatencyCost)
        self.groups, self.columns = groups, [place[group.name] for group in groups]
        self.full = costs.vector({})
        self._price, self._macs = price, costs.macs
        ladders = (candidate_widths(group, round_to, is_strict=True) for group in groups)
        self._rungs = [rungs[rungs >= least * group.width] for group, rungs in zip(groups, ladders, strict=True)]

    def time(self, widths: np.ndarray) -> float:
        return float(self._price.sum(widths))

    def kept(self, widths: np.ndarray) -> int:
        return self._macs.value(widths)

    def settle(self, kept_score: float) -> np.ndarray:
        """Widths at which no group, by itself, gains by another one, where a multiply-add is worth so many ns."""
        widths: np.ndarray = self.full.copy()
        for _ in range(_SWEEPS):
            before = widths.copy()
            for column, rungs in zip(self.columns, self._rungs, strict=True):
                times, macs = self._price.curve(widths, column, rungs), macs_along(self._macs, widths, column, rungs)
                widths[column] = rungs[int((times - kept_score * macs).argmin())]
            if (widths == before).all():
                break
        return widths

    def trim(self, widths: np.ndarray, macs: int) -> np.ndarray:
        """Take steps down while enough is kept, each time the one that saves the most time for what it loses."""
        widths = widths.copy()
        while True:
            spare, steps = self.kept(widths) - macs, list[tuple[float, int, int]]()
            for column, rungs in zip(self.columns, self._rungs, strict=True):
                lower = rungs[rungs < widths[column]]
                if not len(lower):
                    continue
                here = np.append(lower, widths[column])
                times, counts = self._price.curve(widths, column, here), macs_along(self._macs, widths, column, here)
                saved, lost = times[-1] - times[:-1], counts[-1] - counts[:-1]
                for rung in np.flatnonzero((lost <= spare) & (saved > 0)).tolist():
                    steps.append((float(saved[rung] / max(lost[rung], 1)), column, int(lower[rung])))
            if not steps:
                return widths
            _, column, width = max(steps)
            widths[column] = width


def macs_along(macs: Polynomial, widths: np.ndarray, column: int, rungs: np.ndarray) -> np.ndarray:
    """Multiply-adds were one group as wide as each of `rungs`, the others as they are; shape (rungs,)."""
    sizes = macs.fixed + macs.spans @ widths  # (terms, factors)
    moved = sizes[None] + macs.spans[None, :, :, column] * (rungs - widths[column])[:, None, None]
    found: np.ndarray = (macs.unit * moved.prod(2)).sum(1)
    return found
