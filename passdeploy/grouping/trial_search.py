"""Search for the constraints of a network by trial cuts: cut at random, run, and repair what fails.

A trace cannot show where a size comes from: `view(b, self.heads, -1)` and `view(b, x.shape[1] // 64, -1)` look the
same. So the network is cut at random and run. Where it raises, or computes a tensor of another size than the labels
predict, the search first looks for integer attributes that hold the old size, and lets them follow the width from now
on; then for widths that the code takes to be equal, and joins them. If neither gets the network further, the channels
at that operation are protected; so are those where a scalar changes, such as the square root of a width. At last the
outputs of the cut network are compared with those of the masked one, and groups that change them are protected too.

Networks of operations that cannot go wrong, such as convolutions, batch norms, pooling and sums, are not tried (see
risk.py), unless their code reads widths.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property
from typing import Any, TypeVar

import torch

from passdeploy.channels.blocks import Block
from passdeploy.channels.groups import ChannelGroup, ChannelMap, SizeAttribute
from passdeploy.grouping.comparison import Comparison
from passdeploy.grouping.constraints import Constraints, LabelledSize
from passdeploy.grouping.failing_groups import IN_TRAINING, WITH_OTHER_INPUTS, Failure, find_failing_groups
from passdeploy.grouping.norm_sizes import stated_norm_widths
from passdeploy.grouping.protections import labels_around
from passdeploy.grouping.remedies import Remedies, Remedy
from passdeploy.grouping.risk import RequiredCheck, picks_channels, required_check, states_sizes
from passdeploy.grouping.run_trial import TrialResult, run_trial
from passdeploy.grouping.shape_check import Stop
from passdeploy.grouping.size_log import log_of_sizes
from passdeploy.grouping.stale_sizes import AttributeFixes
from passdeploy.grouping.tied_widths import width_equalities
from passdeploy.grouping.traced_network import TracedNetwork
from passdeploy.grouping.tracked_sizes import ComparisonLog, groups_of
from passdeploy.grouping.trial_cut import END_CUTS, PlanKey, TrialCut
from passdeploy.grouping.width_comparisons import comparisons_in, turning_widths
from passdeploy.grouping.width_reads import reads_widths
from passdeploy.tracing.labels import Reason

MAX_REPAIRS = 150  # changes of the constraints before the whole network is protected
MAX_ATTEMPTS = 100  # attribute fixes and width equalities to try, successful or not
# Random cuts that must run to the end. One is not enough where sizes are stated or were wrong: a stale size may fit by
# chance, the more so the narrower the groups are.
REPAIRED_TRIALS = 3
NARROW_TRIALS = 5
# Where the code compares widths, cuts of every group to exactly one half and one quarter run as well: most of the plans
# that people make do that, and then a new width most easily equals another number in the code.
EXACT_CUTS = -2, -4
NARROW_WIDTH = 16  # channels
# Cuts whose outputs are compared. If no group is narrow, the second one cuts the network that the first one left.
COMPARED_TRIALS = 2

Candidate = TypeVar("Candidate")  # for a repair


class TrialSearch:
    """A search for constraints under which every cut of a network runs and computes what the masked network does.

    Args:
        network: the network with its trace.
        remedies: what helped in earlier searches; what helps in this one is added.
        chosen_in: modules in which other dimensions are chosen than in the first of them.
    """

    def __init__(self, network: TracedNetwork, remedies: Remedies | None = None, chosen_in: Iterable[str] = ()) -> None:
        self.network, self._remedies, self._chosen_in = network, remedies or Remedies(), frozenset(chosen_in)
        self.constraints = Constraints(network.trace.union_find, stated_norm_widths(network.model, network.trace))
        self.was_repaired = False  # the constraints are no longer those of the trace
        self._repairs_left, self._attempts_left = MAX_REPAIRS, MAX_ATTEMPTS
        self._attribute_fixes = AttributeFixes(network.model, network.trace.op_log)
        self._failed_fixes: set[tuple[Any, ...]] = set()
        self._failed_equalities: set[tuple[str, ...]] = set()
        self._failed_at: dict[TrialResult, list[int]] = {}  # trial -> positions where its attribute fixes failed
        self._has_settled_values = False
        self._trials_to_compare: dict[PlanKey, None] = {}  # cuts that ran other operations than the whole network
        self._turning: tuple[Constraints, list[PlanKey]] | None = None  # see `_turning_keys`
        self._logged: tuple[Constraints, ComparisonLog] | None = None  # see `_log_of_sizes`
        self._protect_looked_up()
        check = required_check(network.trace, network.class_of)
        self._branches = check is not RequiredCheck.VALUES and bool(self._turning_keys or network.noise_of_other_paths)
        self._reads_widths = self._log_of_sizes.has_reads or reads_widths(network.model)
        self.required_check = RequiredCheck.VALUES if self._branches or self._reads_widths else check

    @property
    def channel_map(self) -> ChannelMap:
        """The groups under the present constraints, and what their widths cost."""
        return self.network.builder.assemble(self.constraints)

    def channel_map_with(self, blocks: Sequence[Block]) -> ChannelMap:
        """The same with the blocks of the network, and what they cost."""
        return self.network.builder.assemble(self.constraints, blocks)

    @property
    def removable(self) -> int:
        """Number of channels, of all groups together, that may be removed under the present constraints."""
        return sum(group.width * group.span for group in self._groups if group.is_prunable)

    def settle_sizes(self, *, stop_at: int = -1) -> None:
        """Extend the constraints until the network runs however it is cut.

        Args:
            stop_at: return early once no more than this many channels may be removed.
        """
        if not self.required_check:
            return
        self._protect_looked_up()
        trial = self._run(self.constraints, 0)
        while True:
            if not trial.stop:
                if (key := self._next_key(trial)) is None:
                    return
                trial = self._run(self.constraints, key)
                continue
            if self._repairs_left <= 0:
                self.constraints = self._all_protected()
                return
            trial = self._repair(trial, trial.stop)
            self.constraints = trial.constraints
            self._count_repair()
            if self.removable <= stop_at:
                return
            if trial.cut.key:  # the constraints have changed: the cuts that ran before must run again
                trial.cut.discard_model()
                trial = self._run(self.constraints, 0)

    def settle_values(self) -> None:
        """Protect groups until the outputs of the cut network equal those of the masked one."""
        if self._has_settled_values:
            return
        self._has_settled_values = True
        while (failure := self._find_failure()) is not None:
            if self._repairs_left <= 0:
                self.constraints = self._all_protected()
                return
            for group in self._groups:
                if group.name in failure.groups:
                    labels, reason = self.network.labels_of(group), Reason(failure.reason, module=group.layers[0])
                    self.constraints = self.constraints.with_protected(labels, reason)
            self._count_repair()
            self.settle_sizes()

    def _protect_looked_up(self) -> None:
        """Protect groups whose widths the code looks up in dictionaries or sets: other widths may be in there, too."""
        for operand in self._log_of_sizes.looked_up:
            for group in self._groups:
                if group.is_prunable and group.name in groups_of(operand):
                    reason = Reason("the code looks their number up", module=group.layers[0])
                    self.constraints = self.constraints.with_protected(self.network.labels_of(group), reason)

    def _run(self, constraints: Constraints, key: PlanKey) -> TrialResult:
        trial = run_trial(TrialCut(self.network, constraints.labels, key), constraints)
        # where a comparison of widths comes out differently, the same operations may run with other numbers
        if trial.stop is None and (trial.ran_other_operations or isinstance(key, tuple)):
            self._trials_to_compare[key] = None
        return trial

    def _repair(self, trial: TrialResult, stop: Stop) -> TrialResult:
        """Extend the constraints so that the network gets past `stop`, and return the trial in which it did."""
        if self._remedies.none_helps(stop, self._chosen_in):
            return self._protect(trial, stop)
        remedy = self._remedies.of(stop)
        self._failed_at.clear()
        attempts = [self._fix_attributes, self._equalise_widths]
        if isinstance(remedy, tuple):  # widths were made equal
            attempts.reverse()
        for attempt in attempts:
            if (repaired := attempt(trial, stop, remedy)) is not None:
                return repaired
        self._remedies.give_up(stop)
        return self._protect(trial, stop)

    def _fix_attributes(self, trial: TrialResult, stop: Stop, known: Remedy | None = None) -> TrialResult | None:
        """Let attributes that hold a stale size follow the widths, if that gets the network further; `known` first."""
        cut, constraints = trial.cut, trial.constraints
        candidates = self._attribute_fixes.candidates(stop, cut.model_with(trial.groups), cut.size_of)
        for sizes in _known_first(candidates, _attributes_of, known):
            attempt = stop.position, constraints.equality_keys, _attributes_of(sizes)
            if not sizes or attempt in self._failed_fixes or self._attempts_left <= 0:
                continue
            self._attempts_left -= 1
            after = run_trial(cut, constraints.with_size_attributes(sizes))
            if after.gets_further_than(trial):
                self._remedies.remember(stop, _attributes_of(sizes))
                return after
            self._failed_fixes.add(attempt)
            self._failed_at.setdefault(trial, []).append(after.stop.position if after.stop else stop.position)
        cut.discard_model()
        return None

    def _equalise_widths(self, trial: TrialResult, stop: Stop, known: Remedy | None = None) -> TrialResult | None:
        """Join widths that the code takes to be equal, if that gets the network further; `known` first."""
        op_log, roots_of = self.network.trace.op_log, trial.constraints.labels.find
        equalities = width_equalities(op_log, stop.position, self.network.class_of, roots_of)
        for equality in _known_first(equalities, lambda equality: equality.key, known):
            if equality.key in self._failed_equalities or self._attempts_left <= 0:
                continue
            constraints = trial.constraints.with_equality(equality)
            if constraints.labels.version == trial.constraints.labels.version:
                continue
            self._attempts_left -= 1
            after = self._run(constraints, trial.cut.key)
            if after.gets_further_than(trial):
                self._remedies.remember(stop, equality.key)
                return after
            # Now that the widths are equal, an attribute may state them.
            would_fail = self._fixes_fail_alike(trial, stop, after)
            if after.stop and not would_fail and (fixed := self._fix_attributes(after, after.stop)):
                self._remedies.remember(stop, equality.key)
                return fixed
            self._failed_equalities.add(equality.key)
        return None

    def _fixes_fail_alike(self, trial: TrialResult, stop: Stop, after: TrialResult) -> bool:
        """True if attribute fixes failed before widths were made equal, and meet the same error and sizes after it."""
        if after.stop is None or trial not in self._failed_at:
            return False
        same_stop = after.stop.position == stop.position and after.stop.error == stop.error
        places = {stop.position, *self._failed_at[trial]}
        return same_stop and all(self._sizes_at(place, trial) == self._sizes_at(place, after) for place in places)

    def _sizes_at(self, position: int, trial: TrialResult) -> list[int]:
        """List the sizes after the cut of what an operation reads and computes, as far as channels lie along them."""
        record = self.network.trace.op_log[position]
        tensors = (*record.inputs, *record.results)
        return [trial.cut.size_of(labels) for _, by_dim in tensors for labels in by_dim.values()]

    def _protect(self, trial: TrialResult, stop: Stop) -> TrialResult:
        """Protect the channels around an operation, as few as get the network further; all if nothing does."""
        failed = stop.record
        module = failed.modules[-1] if failed.modules else ""
        text = f"the code depends on their number: {stop.error[:120]}"
        reason = Reason(text, failed.op, module, failed.source)
        for vectors in labels_around(failed, self.network.trace, self.network.model):
            if not vectors:
                continue
            constraints = trial.constraints.with_protected(torch.cat(vectors), reason)
            if constraints.labels.version == trial.constraints.labels.version:
                continue
            after = self._run(constraints, trial.cut.key)
            if after.gets_further_than(trial):
                return after
            after.cut.discard_model()
        constraints = self._all_protected()
        return TrialResult(trial.cut, constraints, self.network.builder.gather(constraints), None)

    def _all_protected(self) -> Constraints:
        vectors = [state.labels for state in self.network.trace.state]
        return self.constraints.with_protected(
            torch.cat(vectors), Reason("the network does not run once anything is cut")
        )

    def _count_repair(self) -> None:
        self._repairs_left -= 1
        self.was_repaired = True

    def _find_failure(self) -> Failure | None:
        """Find groups without which the outputs of the cut network would equal those of the masked one."""
        if not (self._may_differ or self.network.may_train_otherwise or self.network.noise_of_other_paths):
            return None
        network, groups = self.network, self._groups
        comparison = Comparison(network.cloner, network.noise, network.trace, groups)
        is_doubtful = self._branches or self._reads_widths or bool(self._turning_keys)
        trials = COMPARED_TRIALS if is_doubtful else self._trials_needed(groups) if self._may_differ else 0
        return find_failing_groups(
            comparison,
            trials=min(1 if comparison.is_large else COMPARED_TRIALS, trials),
            cut_successively=not _has_narrow_group(groups),
            other_inputs=network.noise_of_other_size,
            more_trials=dict.fromkeys([*self._end_cuts, *self._trials_to_compare]),
            elsewhere=self._elsewhere(comparison, has_other_size=trials > 1),
        )

    def _elsewhere(self, comparison: Comparison, *, has_other_size: bool) -> Iterator[tuple[Comparison, str]]:
        """Yield comparisons where the network does something else, each with the reason to give if it fails.

        Args:
            comparison: of the whole network.
            has_other_size: the other size is compared anyway.
        """
        if self.network.may_train_otherwise:
            yield comparison.in_training(self.network.training_noise), IN_TRAINING
        for inputs in self.network.noise_of_other_paths:
            if has_other_size and inputs is self.network.noise_of_other_size:
                continue
            yield comparison.at(inputs).strict(), WITH_OTHER_INPUTS

    @property
    def _groups(self) -> tuple[ChannelGroup, ...]:
        return self.network.builder.gather(self.constraints)

    @property
    def _may_differ(self) -> bool:
        return self.required_check is RequiredCheck.VALUES or self.was_repaired or bool(self._trials_to_compare)

    def _trials_needed(self, groups: Sequence[ChannelGroup]) -> int:
        if self.was_repaired and _has_narrow_group(groups):
            return NARROW_TRIALS
        return REPAIRED_TRIALS if self.was_repaired or self._states_sizes else 1

    def _next_key(self, trial: TrialResult) -> PlanKey | None:
        """Return the key of the cut to try after one that ran; None after the last."""
        keys: list[PlanKey] = [*range(self._trials_needed(trial.groups)), *self._end_cuts]
        if trial.cut.key not in keys[:-1] and (turning := self._turning_keys):
            keys += [*EXACT_CUTS, *turning]
        following = keys.index(trial.cut.key) + 1 if trial.cut.key in keys else 0
        return keys[following] if following < len(keys) else None

    @property
    def _turning_keys(self) -> list[PlanKey]:
        """Cuts after which comparisons of widths come out differently, under the present constraints."""
        if self._turning is None or self._turning[0] is not self.constraints:
            for key in [key for key in self._trials_to_compare if isinstance(key, tuple)]:
                del self._trials_to_compare[key]
            widths = {group.name: group.width for group in self._groups}
            turned = dict.fromkeys(
                tuple(sorted(turning.items()))
                for comparison in comparisons_in(self._log_of_sizes)
                for turning in turning_widths(comparison, widths)
            )
            self._turning = self.constraints, list(turned)
        return self._turning[1]

    @property
    def _log_of_sizes(self) -> ComparisonLog:
        """The log of what the code does with sizes that depend on widths, under the present constraints."""
        if self._logged is None or self._logged[0] is not self.constraints:
            self._logged = self.constraints, log_of_sizes(self.network, self.constraints)
        return self._logged[1]

    @cached_property
    def _end_cuts(self) -> tuple[PlanKey, ...]:
        return END_CUTS if picks_channels(self.network.trace) else ()

    @cached_property
    def _states_sizes(self) -> bool:
        return states_sizes(self.network.trace)


def _known_first(
    candidates: Iterable[Candidate], remedy_of: Callable[[Candidate], Remedy], known: Remedy | None
) -> Iterable[Candidate]:
    """Move the candidate that is a known remedy to the front; the order of the others stays."""
    return candidates if known is None else sorted(candidates, key=lambda candidate: remedy_of(candidate) != known)


def _attributes_of(sizes: Sequence[LabelledSize]) -> frozenset[SizeAttribute]:
    return frozenset(size.attribute for size in sizes)


def _has_narrow_group(groups: Sequence[ChannelGroup]) -> bool:
    """True if a cut may leave so few channels of a group that it says little about other cuts."""
    return any(group.is_prunable and group.width < NARROW_WIDTH for group in groups)
