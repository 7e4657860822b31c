"""Try to leave blocks out: what computes something else than with branches of zero, or fails, must stay.

All blocks are left out together, then some by chance, then every second one while channels are cut as well, then the
others. Without blocks
a network must also run in training mode, and as anybody calls it: torch has faster code for attention, which other
trials avoid and which looks at other attributes. Only where a trial fails are blocks left out one by one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import torch

from passdeploy.channels.blocks import Block
from passdeploy.channels.groups import ChannelGroup
from passdeploy.channels.plan import Plan
from passdeploy.errors import first_line
from passdeploy.grouping.comparison import Comparison
from passdeploy.grouping.traced_network import TracedNetwork
from passdeploy.grouping.trial_cut import random_plan
from passdeploy.models.input_sizes import doubled
from passdeploy.models.modes import evaluating
from passdeploy.runtime.seeds import generator
from passdeploy.slimming.slim import slim_from
from passdeploy.tracing.meta_model import MetaMode

_Trial = Callable[[Plan], str | None]  # what went wrong under a plan: an error, "" for other outputs; None: nothing
_CHANGED = "the network without it computes something else than with a branch of zero"


class BlockTrials:
    """Trials that leave out the blocks of a network.

    Args:
        network: the network.
        groups: its channel groups.
        blocks: as far as they are known.
    """

    def __init__(self, network: TracedNetwork, groups: Sequence[ChannelGroup], blocks: Sequence[Block]) -> None:
        self._network, self._groups, self._blocks = network, groups, tuple(blocks)

    def checked(self) -> tuple[Block, ...]:
        """Run the trials and return the blocks; those that fail get a reason to stay."""
        while any(block.is_prunable for block in self._blocks):
            failed = next((faults for plan, trial in self._trials() if (faults := _faults(plan, trial))), {})
            if not failed:
                break
            if any(block.chains for block in self._blocks):  # they may fail where each block alone does not
                self._blocks = tuple(replace(block, chains=()) for block in self._blocks)
                continue
            self._blocks = tuple(
                replace(block, reason=failed[block.name]) if block.name in failed else block for block in self._blocks
            )
        return self._blocks

    def _trials(self) -> Iterator[tuple[Plan, _Trial]]:
        names = tuple(block.name for block in self._blocks if block.is_prunable)
        comparison = Comparison(
            self._network.cloner, self._network.noise, self._network.trace, self._groups, self._blocks
        )
        yield Plan({}, names), comparison.fault_of
        if self._network.trace.is_meta and self._training_fault(Plan({})) is None:
            yield Plan({}, names), self._training_fault
        if self._network.may_train_otherwise:
            training = comparison.in_training(self._network.training_noise)
            if training.runs():
                yield Plan({}, names), training.fault_of
        other = self._network.noise_of_other_size
        elsewhere = comparison if other is None else comparison.at(other)
        draw = generator("blocks", len(names))
        some = tuple(name for name in names if float(torch.rand((), generator=draw)) < 0.5)
        if 0 < len(some) < len(names):
            yield Plan({}, some), comparison.fault_of
        for number in (0, 1):
            yield Plan(random_plan(self._groups, number).kept, names[number::2]), elsewhere.fault_of
            yield Plan({}, names[number::2]), self._calling_fault

    def _calling_fault(self, plan: Plan) -> str | None:
        """Return the error that the slim network raises when it is simply called; None if it runs."""
        network = slim_from(self._network.cloner, self._groups, plan, self._blocks)
        try:
            with torch.no_grad(), evaluating(network):
                network(*self._network.noise)
        except Exception as error:  # as below
            return first_line(error)
        return None

    def _training_fault(self, plan: Plan) -> str | None:
        """Return the error that the slim network raises in training mode, on the meta device; None if it runs."""
        network = slim_from(self._network.trial_cloner, self._groups, plan, self._blocks)
        try:
            with torch.no_grad(), evaluating(network, training=True), torch.random.fork_rng(devices=[]), MetaMode():
                network(*doubled(self._network.trial_inputs))
        except Exception as error:  # code that meets other modules than its own may raise anything
            return f"in training mode, {first_line(error)}"
        return None


def _faults(plan: Plan, trial: _Trial) -> dict[str, str]:
    """Run a trial; returns the blocks that fail in it and the reason of each."""
    fault = trial(plan) if plan.skipped else None
    if fault is None or (plan.kept and trial(Plan(plan.kept)) is not None):  # which is not the blocks' fault
        return {}
    alone = {name: trial(replace(plan, skipped=(name,))) for name in plan.skipped}
    failing = {name: found for name, found in alone.items() if found is not None} or dict.fromkeys(plan.skipped, fault)
    return {
        name: f"the network does not run without it: {found}" if found else _CHANGED for name, found in failing.items()
    }
