"""Try a cut before anybody asks for one, and learn from what breaks.

What no walk can see is where a number comes from: `view(b, self.heads, -1)` and `view(b, x.shape[1] // 64, -1)` look
the same. So the network is cut at random and run. Where it stops, or makes a tensor of another size than the labels
foretell, a number that a module keeps and that equals the old size is made to say the new one, now and whenever the
network is cut. Where no such number helps, the channels that meet there are protected; and so they are where a factor
changes, such as the square root of a width. In the end the cut network must compute what the masked one does; groups
that spoil this are found by halving, and protected too.

A network that leaves no doubt (trust.py), such as one of convolutions, batch norms, pooling and sums, is not rehearsed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from passdeploy.channels.groups import ChannelMap
from passdeploy.errors import first_line
from passdeploy.grouping.equivalence import Comparison, FailingGroups
from passdeploy.grouping.gather import GroupBuilder, LabelledSize
from passdeploy.grouping.risk import RequiredCheck, required_check, states_sizes
from passdeploy.grouping.shape_check import FactorRecorder, FactorsByLine, ShapeChecker, Stop
from passdeploy.grouping.stale_sizes import AttributeFixes
from passdeploy.grouping.tied_widths import width_equalities
from passdeploy.grouping.trial import TrialCut, random_plan
from passdeploy.models.modes import evaluating
from passdeploy.runtime.seeds import generator
from passdeploy.slimming.masked import masked_from
from passdeploy.slimming.replay import DecisionLog
from passdeploy.tracing.labels import NONE, Reason
from passdeploy.tracing.meta_model import MetaModel
from passdeploy.tracing.trace import OpRecord, Trace

MOST_REPAIRS = 150
SOME_TAKES = 3  # cuts that must go well where sizes are spelled out, or one did not: a number may be right by chance
MOST_TAKES = 5  # where one did not, and groups are so narrow that this is likely
NARROW = 16  # channels
# Of these cuts that many are compared, too; where no group is narrow the second is one of what the first left.
VALUE_TAKES = 2
MOST_ATTEMPTS = 100  # to repair or tie


class TrialSearch:
    """A network that is cut, run and repaired until the cut network runs and equals the masked one.

    Args:
        model: the network.
        inputs: an example of what it is called with.
        sketch: of both.
        trace: what a walk found; channels that cannot be cut are protected in its book.
    """

    def __init__(self, model: nn.Module, inputs: Sequence[Any], meta_model: MetaModel, trace: Trace) -> None:
        self.model, self.trace = model, trace
        self.inputs = tuple(tree_map(_noise_like, list(inputs)))
        self._cloner_with_values = meta_model.original_cloner
        self._cloner = meta_model.meta_cloner if trace.is_meta else meta_model.original_cloner
        self._inputs_on_stage = meta_model.inputs if trace.is_meta else self.inputs
        self.builder = GroupBuilder(trace)
        self.numbers: list[LabelledSize] = []
        self._repairs = AttributeFixes(model, trace.op_log)
        self.required_check = required_check(trace, lambda name: type(meta_model.model.get_submodule(name)))
        self.was_repaired = False
        self._cast: tuple[int, int] | None = None  # version of the labels and number of the cut that is tried
        self._beside: tuple[FactorsByLine, DecisionLog] | None = None  # see `_beside_masked`
        self._is_settled = False
        self.trial_index = 0  # which of the random cuts
        self._repairs_left, self._attempts_left = MOST_REPAIRS, MOST_ATTEMPTS
        self._ties: list[tuple[str, ...]] = []  # those that are kept
        self._tied_in_vain: set[tuple[str, ...]] = set()
        self._vain: set[tuple[Any, ...]] = set()  # repairs that did not help
        self.outcome: Stop | None = None  # of the last rehearsal

    def settle_sizes(self, *, least: int = -1) -> None:
        """Repair, tie and protect until the network runs however it is cut, or no more than `least` may be removed."""
        if not self.required_check:
            return
        self.trial_index = 0
        stop = self.run_trial()
        while stop or self.trial_index < self._takes - 1:
            if stop is None:
                self.trial_index += 1
                stop = self.run_trial()
                continue
            if self._repairs_left <= 0:
                self.give_up()
                return
            if not self.repair(stop) and not self.tie(stop):
                self.protect_around(stop)
            # From here on the cut is another one: it must stand every test again.
            self._repairs_left -= 1
            self.was_repaired = True
            if self.removable <= least:
                return
            if self.trial_index:
                self.trial_index = 0
                stop = self.run_trial()
            else:
                stop = self.outcome

    def settle_values(self) -> None:
        """Protect until the cut network computes what the masked one does."""
        if self._is_settled:
            return
        self._is_settled = True
        while self._may_differ and (culprits := self._culprits()):
            if self._repairs_left <= 0:
                self.give_up()
                return
            for group in self.groups:
                if group.name in culprits:
                    words = "the function changes with their number, in a way that no mask can follow"
                    self.trace.union_find.protect(self.trial.labels_of(group), Reason(words, module=group.layers[0]))
            self._repairs_left -= 1
            self.was_repaired = True
            self.settle_sizes()

    def found(self) -> ChannelMap:
        """The groups as they are now, and what they cost."""
        return self.builder.assemble(self.numbers)

    @property
    def removable(self) -> int:
        """How many channels, of all groups together, nothing forbids to remove."""
        return sum(group.width * group.span for group in self.builder.gather(self.numbers) if group.is_prunable)

    @property
    def _may_differ(self) -> bool:
        return self.required_check is RequiredCheck.VALUES or self.was_repaired

    @property
    def _takes(self) -> int:
        if self.was_repaired and self._is_narrow:
            return MOST_TAKES
        return SOME_TAKES if self.was_repaired or self._states_sizes else 1

    @cached_property
    def _states_sizes(self) -> bool:
        return states_sizes(self.trace)

    def sample_plan(self) -> None:
        """Decide on the next random cut, which is the last one where nothing but numbers has changed."""
        self.groups = self.builder.gather(self.numbers)
        if self._cast != (key := (self.trace.union_find.version, self.trial_index)):
            plain = self.builder.gather()
            self.trial = TrialCut(
                self._cloner, self.trace, self._state_labels, plain, random_plan(plain, self.trial_index)
            )
            self._cast, self._beside = key, None

    def run_trial(self) -> Stop | None:
        """Cut at random and run; where it stopped, or None."""
        self.sample_plan()
        self.outcome = self._run()
        return self.outcome

    def _run(self) -> Stop | None:
        if not self.trace.is_meta:
            self.trial.forget()
        cut = self.trial.cut(self.groups)
        factors, decisions = (None, nullcontext()) if self.trace.is_meta else self._beside_masked()
        size_of, is_meta = self.trial.size_of, self.trace.is_meta
        checker = ShapeChecker(self.trace.op_log, size_of, factors=factors, is_meta=is_meta)
        try:
            with torch.no_grad(), evaluating(cut), decisions:
                checker.run_model(cut, self._inputs_on_stage)
        except Exception as error:  # anything may break in code that meets other sizes than it knows
            # Who decides by values may have gone on for longer than its walk.
            position = min(checker.position, len(self.trace.op_log) - 1)
            return Stop(position, checker.expected, first_line(error))
        return None

    def _beside_masked(self) -> tuple[FactorsByLine, AbstractContextManager[None]]:
        """What the masked network computes with, and a way to decide as it did.

        A network that decides by values computes with what it found, such as the sizes of boxes. In the masked network
        these are the same, and widths are those of the whole one.
        """
        if self._beside is None:
            reference, decisions, seen = (
                masked_from(self._cloner, self.groups, self.trial.plan),
                DecisionLog(),
                FactorRecorder(),
            )
            with torch.no_grad(), evaluating(reference), decisions.recording():
                seen.run_model(reference, self.inputs)
            self._beside = seen.found, decisions
        factors, decisions = self._beside
        return factors, decisions.replaying()

    def repair(self, stop: Stop) -> bool:
        """Find numbers that are stale and let them follow the widths; returns whether that gets the network further."""
        trial = self.trial
        return any(
            self.improves(repair, stop) for repair in self._repairs.of(stop, trial.cut(self.groups), trial.size_of)
        )

    def tie(self, stop: Stop) -> bool:
        """Find widths that must be the same and join them; returns whether that gets the network further."""
        union_find = self.trace.union_find

        def class_of(module: str) -> type:
            return type(self.model.get_submodule(module))

        for tie in width_equalities(self.trace.op_log, stop.position, class_of, union_find.find):
            if tie.key in self._tied_in_vain or self._attempts_left <= 0:
                continue
            saved, version = union_find.save(), union_find.version
            stays = union_find.protections()[0] >= 0
            for ours, other in tie.pairs:
                if (
                    not stays[union_find.find(torch.cat([ours, other])).numpy()].any()
                    and NONE not in ours
                    and NONE not in other
                ):
                    union_find.join(
                        ours, other.repeat(len(ours) // len(other)), Reason("as wide as channels that must stay")
                    )
            if union_find.version > version:
                self._attempts_left -= 1
                self._ties.append(tie.key)
                after = self.run_trial()
                # Once the widths are the same, a number may say what they are.
                if after is None or after.position > stop.position or self.repair(after):
                    return True
                self._ties.pop()
                self._tied_in_vain.add(tie.key)
                union_find.restore(saved)
        return False

    def improves(self, repair: Sequence[LabelledSize], stop: Stop) -> bool:
        """Whether the network gets further with `repair`, which is kept if so; what was in vain is not tried again."""
        keys = frozenset(number.attribute for number in repair)
        attempt = stop.position, tuple(self._ties), keys
        if not repair or attempt in self._vain or self._attempts_left <= 0:
            return False
        self._attempts_left -= 1
        before = self.numbers
        self.numbers = [*(number for number in before if number.attribute not in keys), *repair]
        after = self.run_trial()
        if after is None or after.position > stop.position:
            return True
        self.numbers = before
        self.groups = self.builder.gather(before)
        self.trial.cut(self.groups)  # says again what it said
        self._vain.add(attempt)
        return False

    def protect_around(self, stop: Stop) -> None:
        """What meets at the operation that broke must stay, there and wherever the same line sees the same sizes.

        Where that does not help the number came from further away: then all that the module touches must stay, then
        whatever the line sees elsewhere, then all that modules of this class touch, and those around them, and so on.
        """
        union_find, stopped = self.trace.union_find, stop.record
        module = stopped.modules[-1] if stopped.modules else ""
        words = f"the code depends on their number: {stop.error[:120]}"
        reason = Reason(words, stopped.op, module, stopped.source)
        for part in self._parts_around(stopped):
            saved, version = union_find.save(), union_find.version
            vectors = {
                id(vector): vector
                for record in part
                for _, labels in (*record.inputs, *record.results)
                for vector in labels.values()
            }
            if vectors:
                union_find.protect(torch.cat(list(vectors.values())), reason)
            if union_find.version == version:
                continue
            after = self.run_trial()
            if after is None or after.position > stop.position:
                return
            union_find.restore(saved)
        self.give_up()

    def _parts_around(self, stopped: OpRecord) -> Iterator[list[OpRecord]]:
        """Parts of what happened in which the number may come from that an operation depends on, the least first."""
        op_log = self.trace.op_log
        line = [other for other in op_log if (other.op, other.source) == (stopped.op, stopped.source)]
        alike = [other for other in line if _shapes(other) == _shapes(stopped)]
        owners = {other.modules[-1] for other in alike if other.modules}
        yield alike
        yield [other for other in op_log if owners.intersection(other.modules)]
        yield line
        for depth in range(1, len(stopped.modules) + 1):
            kind = type(self.model.get_submodule(stopped.modules[-depth]))
            names = {name for name, module in self.model.named_modules() if type(module) is kind}
            yield [other for other in op_log if names.intersection(other.modules)]

    def give_up(self) -> None:
        """Nothing of the network can be cut: no repair made it run."""
        for state in self.trace.state:
            self.trace.union_find.protect(state.labels, Reason("the network does not run once anything is cut"))
        self.outcome = None

    def _culprits(self) -> set[str]:
        """Names of groups without which the cut network would equal the masked one."""
        self.trial_index = 0
        self.sample_plan()  # it runs: that was tried
        comparison = Comparison(self._cloner_with_values, self.inputs, self.trace, self.groups)
        takes = 1 if comparison.is_large else min(VALUE_TAKES, self._takes)
        plan = self.trial.plan
        while plan.kept:
            goes_on = self.trial_index + 1 < takes
            if not comparison.is_exact(plan, keep=goes_on and not self._is_narrow):
                return FailingGroups(comparison, plan).found
            if not goes_on:
                break
            self.trial_index += 1
            if not self._is_narrow:
                comparison = comparison.after(plan)
            plan = random_plan(comparison.groups, self.trial_index)
        return set()

    @property
    def _is_narrow(self) -> bool:
        """Whether there are groups of which one cut leaves so few channels that they tell little about another."""
        return any(group.is_prunable and group.width < NARROW for group in self.groups)

    @cached_property
    def _state_labels(self) -> dict[tuple[str, int], Tensor]:
        return {(state.tensor, state.dim): state.labels for state in self.trace.state}


def _noise_like(leaf: Any) -> Any:
    """Noise in place of an example: zeros would hide what is wrong."""
    if isinstance(leaf, Tensor) and leaf.is_floating_point():
        noise = torch.randn(leaf.shape, generator=generator("rehearse", "noise"))
        return noise.to(leaf.device, leaf.dtype)
    return leaf


def _shapes(record: OpRecord) -> list[tuple[int, ...]]:
    return [shape for shape, _ in (*record.inputs, *record.results)]
