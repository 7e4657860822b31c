"""Choose the channels to keep: from scores and a budget to a pruning plan.

All groups share one threshold on the scores (Huang et al., PASS, arXiv:2407.17412, global pruning). It is set where
the budget is met, with kept widths rounded to multiples that the hardware computes efficiently.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from passdeploy.channels.blocks import presence
from passdeploy.channels.costs import CostModel
from passdeploy.channels.groups import ChannelGroup
from passdeploy.channels.plan import Plan, Scores
from passdeploy.channels.width_table import WidthTable, coordinate_descent
from passdeploy.channels.widths import STRICT_KINDS, minimum_width
from passdeploy.errors import BudgetError, UsageError, percent

_SHARE_HALVINGS = 40  # of the share that is kept of every group
_SPENT_AT_LEAST = 0.95  # of a budget; a plan that leaves more of it is warned of
_SHARES = 129  # that are tried where halving finds none


@dataclass(frozen=True)
class Budget:
    """Upper limit of what the slim network may cost."""

    kind: str  # macs, params, channels or latency
    limit: int  # in units of that kind; latency counts nanoseconds

    @classmethod
    def of(cls, kind: str, amount: float, costs: CostModel) -> Budget:
        """Read `amount`: up to 1 it is a fraction of the dense network's cost, above it is an absolute count."""
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
    priced_at: Mapping[str, int] | None = None,
    is_last: bool = True,
    keep: Mapping[str, int] | None = None,
) -> Plan:
    """Keep the channels with the best scores that fit the budget.

    Args:
        scores: importance of every channel of every prunable group; and of blocks, by `presence`: those with a score
            may be skipped.
        groups: the network's groups; those that are not prunable stay whole.
        costs: of the network, as a function of widths.
        budget: upper limit of what the slim network costs.
        round_to: layer widths become multiples of this; a layer narrower than twice that goes in smaller steps.
        per_cost: rank channels by score per unit of cost instead of by score alone.
        allocation: `global` (one threshold for all groups) or `uniform` (the same share of every group, and every
            block).
        priced_at: widths at which the cost of one channel is taken, by group; what is not named, and None: the dense
            ones. The ranking depends on these alone, not on what else is cut.
        is_last: False: a plan for a smaller budget will follow. Then an expensive channel that is just below the
            threshold is removed although cheap ones would do for now; they would do every time.
        keep: widths that come first, whatever scores say, as far as they fit: of groups, and 1 for the `presence` of a
            block. None, and for a uniform allocation: none do.

    Raises:
        BudgetError: even the cheapest network that `round_to` allows costs more; for a uniform allocation, the cheapest
            one that keeps the same share of every group.
        UsageError: an allocation of that name is not known.
    """
    if allocation not in ("global", "uniform"):
        raise UsageError(f"allocation={allocation!r} is unknown.\nIt is 'global' or 'uniform'.")
    if allocation == "uniform":  # a share of a block cannot be kept
        costs = costs.without_blocks()
    costs = replace(costs, blocks=tuple(block for block in costs.blocks if presence(block.name) in scores))
    cut = [group for group in groups if group.is_prunable and group.name in scores]
    smallest = smallest_plan(cut, costs, budget, round_to=round_to)
    table = WidthTable.build(scores, cut, costs, round_to=round_to, is_strict=budget.kind in STRICT_KINDS)
    cost = costs.cost_of(budget.kind)

    def value(choice: np.ndarray) -> float:
        return cost.value(table.widths(choice))

    if allocation == "uniform":
        choice = _largest_uniform_share(table, value, budget.limit)
        _require_within(budget, int(value(choice)), costs, round_to)
        return table.plan(choice)
    item_cost = cost.gradient(costs.vector(priced_at or {}))[table.columns] if per_cost else table.channel_counts()
    steps = _steps_best_first(table.marginal_score(item_cost))
    if keep is not None:
        steps = _with_first(steps, table.choice_of({name: keep.get(name, 0) for name in table.names}))
    start = table.choice_of(smallest)
    return table.plan(_greedy(steps, start, value, budget.limit, table.score if is_last else None))


def narrowest_widths(
    groups: Sequence[ChannelGroup], costs: CostModel, *, round_to: int, kind: str = "macs"
) -> dict[str, int]:
    """Return the narrowest widths that `round_to` allows under a budget of `kind`, with every block skipped."""
    widths = {group.name: minimum_width(group, round_to, kind) for group in groups if group.is_prunable}
    return {**widths, **{presence(block.name): 0 for block in costs.blocks}}


def cheapest_widths(groups: Sequence[ChannelGroup], costs: CostModel, *, round_to: int, kind: str) -> dict[str, int]:
    """Return the widths that `round_to` allows with the lowest cost of `kind`.

    These are the narrowest ones, except for a latency: below one block of channels other kernels run, which may be
    slower. Then they are searched for, one group at a time.
    """
    narrowest = narrowest_widths(groups, costs, round_to=round_to, kind=kind)
    if kind not in STRICT_KINDS:
        return narrowest
    cost = costs.latency
    assert cost is not None
    scores = {name: torch.zeros(costs.widths[name]) for name in narrowest}  # any will do: widths are asked for
    table = WidthTable.build(scores, groups, costs, round_to=round_to, is_strict=True)

    def gain(choice: np.ndarray, item: int) -> np.ndarray:
        return -cost.curve(table.widths(choice), table.columns[item], table.candidates[item])

    choice = coordinate_descent(table, gain)
    pairs = zip(table.names, table.candidates, choice, strict=True)
    found = {name: int(widths[index]) for name, widths, index in pairs}
    return min(found, narrowest, key=lambda widths: costs.of(kind, widths))


def smallest_plan(
    groups: Sequence[ChannelGroup], costs: CostModel, budget: Budget, *, round_to: int
) -> Mapping[str, int]:
    """Return `narrowest_widths`, or `cheapest_widths` where those cost more than the budget.

    Raises:
        BudgetError: both cost more.
    """
    widths = narrowest_widths(groups, costs, round_to=round_to, kind=budget.kind)
    if costs.of(budget.kind, widths) > budget.limit:
        widths = cheapest_widths(groups, costs, round_to=round_to, kind=budget.kind)
    _require_within(budget, costs.of(budget.kind, widths), costs, round_to)
    return widths


def _require_within(budget: Budget, smallest: int, costs: CostModel, round_to: int) -> None:
    """Raise a BudgetError where the smallest cost that can be reached is more than a budget."""
    if smallest > budget.limit:
        whole = costs.of(budget.kind)
        least = in_units(budget.kind, smallest).removesuffix(f" {budget.kind}")
        raise BudgetError(
            f"asked for {in_units(budget.kind, budget.limit)} ({percent(budget.limit / whole)} of the dense "
            f"network's), but the smallest that can be reached is {least} ({percent(smallest / whole)}).\n"
            f"{advice_for_budget(round_to)}"
        )


def require_below_dense(budget: Budget, costs: CostModel) -> None:
    """Raise a BudgetError where a budget is not below what the dense network costs."""
    kind, whole = budget.kind, costs.of(budget.kind)
    if budget.limit >= whole:
        raise BudgetError(
            f"asked for {in_units(kind, budget.limit)}, but the dense network has {in_units(kind, whole)}: "
            "nothing would be cut.\nAsk for less, or for a share of the dense network: a number below 1."
        )


def advice_for_budget(round_to: int) -> str:
    """Say what to do about a budget that cannot be reached.

    >>> advice_for_budget(8)
    'Ask for more, set prune.round_to below 8, or let more layers be cut (include, exclude).'
    """
    narrower = f", set prune.round_to below {round_to}" if round_to > 1 else ""
    return f"Ask for more{narrower}, or let more layers be cut (include, exclude)."


def unspent_words(budget: Budget, achieved: int, whole: int, *, round_to: int, key: str) -> str | None:
    """Say that a plan leaves much of its budget, and what to do; None if it does not.

    Args:
        budget: of the plan.
        achieved: cost of the plan.
        whole: cost of the dense network.
        round_to: that the widths of the plan are multiples of.
        key: by which it is set, `prune.round_to` in a recipe.
    """
    if achieved >= _SPENT_AT_LEAST * budget.limit:
        return None
    kept, asked = percent(achieved / whole), percent(budget.limit / whole)
    return (
        f"the plan has {kept} of the {budget.kind} where {asked} were asked for: what is left is too little for the "
        f"next step of a width.\nA smaller {key} than {round_to} comes closer."
    )


def in_units(kind: str, amount: int) -> str:
    """Format a cost with its unit.

    >>> in_units("macs", 1234567), in_units("latency", 1_800_000)
    ('1,234,567 macs', '1.8 ms')
    """
    return f"{amount / 1e6:.3g} ms" if kind == "latency" else f"{amount:,} {kind}"


def _greedy(
    steps: np.ndarray,
    start: np.ndarray,
    value: Callable[[np.ndarray], float],
    limit: float,
    score: Callable[[np.ndarray], float] | None = None,
) -> np.ndarray:
    """Widen groups step by step until the budget is spent.

    The first step that does not fit may be so expensive that much of the budget is left without it, where cheaper steps
    before it could have made room. Given a `score`, that is tried as well, and what keeps more of it is taken.

    Args:
        steps: the group that each step widens, in the order in which steps are taken, shape (steps,).
        start: the choice to widen, which fits; its steps come first. Mostly the narrowest widths, which are zeros.
        value: cost of a choice.
        limit: of the cost.
        score: adds up the scores that a choice keeps.

    Returns:
        The choice: an index into the candidates of every group.
    """
    steps, groups = _with_first(steps, start), len(start)
    choice, count = _spend(steps, start, value, limit)
    if score is None or count == len(steps):
        return choice
    first = np.where(np.arange(groups) == steps[count], _after(steps[: count + 1], groups), start)
    other, _ = _spend(_with_first(steps, first), start, value, limit)
    return other if score(other) > score(choice) else choice


def _with_first(steps: np.ndarray, choice: np.ndarray) -> np.ndarray:
    """Take the steps that lead to a choice first, in their order; shape (steps,)."""
    by_group = np.argsort(steps, kind="stable")
    starts = np.concatenate([[0], np.cumsum(np.bincount(steps, minlength=len(choice)))])
    number = np.empty(len(steps), np.int64)  # of each step among those of its group
    number[by_group] = np.arange(len(steps)) - starts[steps[by_group]]
    is_first = number < choice[steps]
    ordered: np.ndarray = np.concatenate([steps[is_first], steps[~is_first]])
    return ordered


def _spend(
    steps: np.ndarray, start: np.ndarray, value: Callable[[np.ndarray], float], limit: float
) -> tuple[np.ndarray, int]:
    """Take as many of the first `steps` as fit together, those to `start` at least, and of the others what still fits.

    Returns:
        The choice, and the number of first steps that fit together.
    """
    groups = len(start)
    count = _most_steps(steps, groups, lambda choice: value(choice) <= limit, fewest=int(start.sum()))
    return _add_what_fits(_after(steps[:count], groups), steps[count:], value, limit), count


def _steps_best_first(marginal_score: list[np.ndarray]) -> np.ndarray:
    """Sort the steps of all groups by score; returns the group that each step widens, shape (steps,)."""
    # A step needs the narrower ones of its group, so it ranks no higher than any of them.
    scores = [np.minimum.accumulate(values) for values in marginal_score]
    groups = np.repeat(np.arange(len(scores)), [len(values) for values in scores])
    return groups[np.argsort(-np.concatenate([*scores, []]), kind="stable")]


def _most_steps(steps: np.ndarray, groups: int, fits: Callable[[np.ndarray], bool], *, fewest: int) -> int:
    """Count the first `steps` that fit together, by bisection; the `fewest` do, and mostly costs grow with widths."""
    low, high = fewest, len(steps)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(_after(steps[:middle], groups)) else (low, middle - 1)
    return low


def _add_what_fits(
    choice: np.ndarray, steps: np.ndarray, value: Callable[[np.ndarray], float], limit: float
) -> np.ndarray:
    """Take further steps in order; once a step of a group does not fit, skip the wider ones of that group.

    Steps inside of a skipped block cost nothing. They wait for the others: were they taken first, the block would have
    to fit at its full widths to be kept.
    """
    finished, cost = set[int](), value(choice)
    while len(steps):
        waiting = list[int]()
        for group in steps.tolist():
            if group in finished:
                continue
            choice[group] += 1
            if (wider := value(choice)) > limit:
                finished.add(group)
            elif wider != cost:  # a latency may fall where a width reaches a whole block of channels
                cost = wider
                continue
            else:
                waiting.append(group)
            choice[group] -= 1
        if len(waiting) == len(steps):
            break
        steps = np.array(waiting, np.int64)
    widened: np.ndarray = choice + _after(steps, len(choice))
    if value(widened) <= limit:
        return widened
    for group in steps.tolist():  # together they cost something after all
        if group in finished:
            continue
        choice[group] += 1
        if value(choice) > limit:
            finished.add(group)
            choice[group] -= 1
    return choice


def _after(steps: np.ndarray, groups: int) -> np.ndarray:
    """Count the steps of each group from its narrowest width: the choice after `steps`, shape (groups,)."""
    choice: np.ndarray = np.bincount(steps, minlength=groups)
    return choice


def _largest_uniform_share(table: WidthTable, value: Callable[[np.ndarray], float], limit: float) -> np.ndarray:
    """Choose the candidates nearest to one share of every group, the largest share that fits, by bisection.

    Where bisection finds none, since a latency may fall where widths grow, shares are tried from the largest one down;
    of those that all cost too much, the cheapest is returned.
    """
    low, high = 0.0, 1.0
    for _ in range(_SHARE_HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if value(_nearest(table, middle)) <= limit else (low, middle)
    upper, lower = _nearest(table, high), _nearest(table, low)
    every = (_nearest(table, share) for share in np.linspace(1.0, 0.0, _SHARES))
    choices: list[np.ndarray] = [upper, lower, *(every if value(lower) > limit else ())]
    costs = [value(choice) for choice in choices]
    fitting = [number for number, cost in enumerate(costs) if cost <= limit]
    return choices[fitting[0] if fitting else int(np.argmin(costs))]


def _nearest(table: WidthTable, share: float) -> np.ndarray:
    """Choose the candidate of every group that is nearest to `share` of its full width."""
    nearest = [np.abs(widths - share * widths[-1]).argmin() for widths in table.candidates]
    return np.array(nearest, np.int64)
