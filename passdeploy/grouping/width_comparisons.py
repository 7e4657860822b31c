"""List the comparisons of widths that a network's code makes, and find widths at which they come out differently.

`x + (y if x.shape == y.shape else self.project(y))` takes the other branch where two different widths are cut to the
same one. Random cuts hardly ever do that, and people do. So each comparison that was logged while the whole network ran
(size_log.py) is solved for widths that turn it.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping

import numpy as np
import torch

from passdeploy.grouping.tracked_sizes import ComparisonLog, Formula
from passdeploy.runtime.seeds import generator

ATTEMPTS = 4  # draws of all widths of a comparison but one, which is then solved for
MAX_TURNS = 2  # of them, the widths that are returned


def comparisons_in(log: ComparisonLog) -> list[Formula]:
    """List the comparisons that depend on widths, in order, each once.

    Their values are the outcomes at given widths. For an order of two sizes, whether they are equal is listed as well.
    """
    found = dict[Formula, None]()
    for comparison in log.comparisons:
        found[comparison] = None
        if comparison.operation in _ORDERS:  # equal sizes are the border of both outcomes
            found[Formula(operator.eq, comparison.left, comparison.right)] = None
    return [comparison for comparison in found if comparison.groups]


_ORDERS = {operator.lt, operator.le, operator.gt, operator.ge}


def turning_widths(comparison: Formula, widths: Mapping[str, int]) -> Iterator[dict[str, int]]:
    """Yield widths of the groups of a comparison at which its outcome is another than at full width.

    Args:
        comparison: of sizes that depend on the widths of prunable groups.
        widths: group name -> full width.
    """
    names, found = list(comparison.groups), 0
    with np.errstate(all="ignore"):
        outcome = bool(comparison.value(widths))
    draws = generator("turn", *names)
    for attempt in range(ATTEMPTS):
        drawn = {name: int(torch.randint(1, widths[name] + 1, (), generator=draws)) for name in names}
        others = {name: widths[name] for name in names} if attempt == 0 else drawn
        for number in torch.randperm(len(names), generator=draws).tolist():
            name = names[number]
            with np.errstate(all="ignore"):  # a remainder of zero
                outcomes = comparison.value({**others, name: np.arange(1, widths[name] + 1)})
            turned = np.flatnonzero(np.asarray(outcomes, bool) != outcome) + 1
            if len(turned):
                # The largest is on the border between outcomes, and leaves most to differ in.
                place = len(turned) - 1 if attempt == 0 else int(torch.randint(len(turned), (), generator=draws))
                yield {**others, name: int(turned[place])}
                found += 1
                break
        if found == MAX_TURNS:
            return
