"""Find the groups whose removal makes a randomly cut network compute something else than the masked one."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_leaves

from passdeploy.channels.plan import Plan
from passdeploy.grouping.comparison import Comparison
from passdeploy.grouping.trial_cut import END_CUTS, PlanKey, plan_of, random_plan

MAX_BISECTION_TRIALS = 60  # comparisons of parts of a cut


@dataclass(frozen=True)
class Failure:
    """Groups whose removal of channels changes the function, and the reason in words."""

    groups: frozenset[str]
    reason: str


def find_failing_groups(
    comparison: Comparison,
    *,
    trials: int,
    cut_successively: bool,
    other_inputs: Sequence[Any] | None = None,
    more_trials: Iterable[PlanKey] = (),
    elsewhere: Iterable[tuple[Comparison, str]] = (),
) -> Failure | None:
    """Find groups that make a randomly cut network differ from the masked one.

    Args:
        comparison: of the whole network.
        trials: number of random cuts to compare, until one differs.
        cut_successively: let each cut continue from what the cut before left; else each cuts the whole network.
        other_inputs: inputs of another size, for all cuts but the first; for a large network, for that one.
        more_trials: keys of further cuts of the whole network.
        elsewhere: comparisons in another mode or at further sizes, each with the reason to give where it fails.

    Returns:
        None if all are equal.
    """
    whole = comparison
    for index in range(trials):
        is_other = other_inputs is not None and (index > 0 or whole.is_large)
        here = comparison
        if is_other and other_inputs is not None:
            here = comparison.at(other_inputs)
            if _sizes_of_samples(other_inputs) != _sizes_of_samples(whole.inputs):
                here = here.strict()  # an error that only another image size shows may be as small as rounding
        plan = random_plan(here.groups, index, with_odd_widths=is_other)
        if not plan.kept:
            break
        is_continued = cut_successively and index + 1 < trials
        if not here.is_exact(plan, keep=is_continued):
            if is_other and not here.runs():
                continue  # on the meta device it did, as where positions are looked up in a table
            holds_here_only = is_other and comparison.is_exact(plan)
            if is_other and not (plain := comparison.at(here.inputs)).is_exact(plan):
                here = plain  # float32 shows it as well, and takes less time
            return Failure(frozenset(FailingGroups(here, plan).names()), _ONE_SIZE if holds_here_only else _CHANGED)
        if is_continued:
            comparison = here.after(plan).at(whole.inputs)
    strict = whole.strict()  # a norm may hide a branch that was flipped, but for its epsilon
    for key in more_trials:
        plan = plan_of(strict.groups, key)
        if plan.kept and not strict.is_exact(plan):
            return Failure(frozenset(FailingGroups(strict, plan).names()), _CHANGED)
    if whole.has_faint_parts and not whole.is_large:
        fine, plan = whole.by_part(), random_plan(whole.groups, 0)
        if plan.kept and not fine.is_exact(plan):
            return Failure(frozenset(FailingGroups(fine, plan).names()), _CHANGED)
    for there, reason in elsewhere:
        plans = [plan_of(whole.groups, key) for key in END_CUTS]  # a random one may keep a channel in its place
        if any(plan.kept for plan in plans) and there.runs():
            for plan in plans:
                if not there.is_exact(plan):
                    return Failure(frozenset(FailingGroups(there, plan).names()), reason)
    return None


_CHANGED = "the function changes with their number, in a way that no mask can follow"
IN_TRAINING = "in training mode the function changes with their number, in a way that no mask can follow"
WITH_OTHER_INPUTS = (
    "at another size of the input the function changes with their number, in a way that no mask can follow"
)
_ONE_SIZE = "they can be told apart at one input size only: positions and channels are reshaped into each other"


class FailingGroups:
    """Binary search for the groups of a plan that make the cut network differ from the masked one."""

    def __init__(self, comparison: Comparison, plan: Plan) -> None:
        self._comparison, self._plan, self._trials_left = comparison, plan, MAX_BISECTION_TRIALS

    def names(self) -> list[str]:
        """Run the comparisons and return the names of the groups: without them the rest of the plan is exact.

        Groups are cut together from the first one on. The one with which the network first differs has a part in the
        difference, even if it differs only where others are cut as well.
        """
        found, rest = list[str](), list(self._plan.kept)
        exact, failing = 0, len(rest)  # numbers of groups that can be cut together, and that cannot
        while self._trials_left > 0:
            if failing - exact > 1:
                middle = (exact + failing) // 2
                exact, failing = (middle, failing) if self._is_exact(rest[:middle]) else (exact, middle)
                continue
            found.append(rest.pop(exact))
            if exact == len(rest):
                return found
            failing = exact + 1  # groups that fail are often neighbours
            if self._is_exact(rest[:failing]):
                if failing == len(rest) or self._is_exact(rest):
                    return found
                exact, failing = failing, len(rest)
        return found + rest

    def _is_exact(self, names: Sequence[str]) -> bool:
        self._trials_left -= 1
        return self._comparison.is_exact(Plan({name: self._plan.kept[name] for name in names}))


def _sizes_of_samples(inputs: Sequence[Any]) -> list[tuple[int, ...]]:
    """List the shapes of the tensors among the inputs, without the batch."""
    return [tuple(leaf.shape[1:]) for leaf in tree_leaves(tuple(inputs)) if isinstance(leaf, Tensor)]
