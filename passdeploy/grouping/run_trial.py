"""Run a trial cut and report where it stops."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch

from passdeploy.channels.groups import ChannelGroup
from passdeploy.errors import first_line
from passdeploy.grouping.constraints import Constraints
from passdeploy.grouping.shape_check import OpRecorder, ShapeChecker, Stop
from passdeploy.grouping.trial_cut import TrialCut
from passdeploy.models.modes import evaluating


@dataclass(frozen=True, eq=False)
class TrialResult:
    """The outcome of running one random cut of a network under given constraints."""

    cut: TrialCut
    constraints: Constraints
    groups: tuple[ChannelGroup, ...]  # under these constraints
    stop: Stop | None  # None: the cut network ran to its end
    ran_other_operations: bool = False  # than the whole network, as after a branch on a width

    def gets_further_than(self, other: TrialResult) -> bool:
        """True if this trial ran to the end, or past the operation where `other` stopped."""
        return self.stop is None or (other.stop is not None and self.stop.position > other.stop.position)


def run_trial(cut: TrialCut, constraints: Constraints) -> TrialResult:
    """Run a cut network with the size attributes of `constraints`; the same arguments give the same result.

    Args:
        cut: a cut of the labels of `constraints`.
        constraints: what the cut network must fulfil.
    """
    groups = cut.network.builder.gather(constraints)
    stop, ran_other_operations = _run(cut, groups)
    if stop is None:
        cut.discard_model()  # only the search for what stopped it looks at a model that has run
    return TrialResult(cut, constraints, groups, stop, ran_other_operations)


def _run(cut: TrialCut, groups: Sequence[ChannelGroup]) -> tuple[Stop | None, bool]:
    network, trace = cut.network, cut.network.trace
    masked_run: OpRecorder | None = None
    decisions: AbstractContextManager[None] = nullcontext()
    if not trace.is_meta:
        cut.discard_model()  # a model that ran with values may have kept some
        masked_run, log = cut.masked_run
        decisions = log.replaying()
    model = cut.model_with(groups)
    checker = ShapeChecker(trace.op_log, cut.size_of, masked_run=masked_run, is_meta=trace.is_meta)
    try:
        with torch.no_grad(), evaluating(model), decisions:
            checker.run_model(model, network.trial_inputs)
    except Exception as error:  # code that meets unexpected sizes may raise anything
        # A network whose code branches on values may run more operations than its trace has.
        position = min(checker.position, len(trace.op_log) - 1)
        return Stop(position, checker.expected, first_line(error)), checker.ran_other_operations
    return None, checker.ran_other_operations
