"""Cut a network by a random plan, to be run as a trial."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor, nn

from passdeploy.channels.groups import ChannelGroup, SizeAttribute
from passdeploy.channels.plan import Plan
from passdeploy.grouping.constraints import Constraints
from passdeploy.grouping.shape_check import ScalarRecorder, ScalarsByLine
from passdeploy.grouping.traced_network import TracedNetwork
from passdeploy.models.modes import evaluating
from passdeploy.runtime.seeds import generator
from passdeploy.slimming.masked import masked_from
from passdeploy.slimming.replay import DecisionLog
from passdeploy.slimming.size_attributes import read_size_attribute, size_attributes_after, write_size_attribute_
from passdeploy.slimming.slim import slim_from
from passdeploy.tracing.labels import LabelUnionFind

EXACT_SHARES = {3: 0.5, 4: 0.25}  # number of a random plan -> the share of every group that it keeps


class TrialCut:
    """One random cut of a network, whose size attributes can be set again and again without cutting anew.

    Args:
        network: the network to cut.
        labels: its channels, joined and protected as far as is known.
        index: number of the random plan.
    """

    def __init__(self, network: TracedNetwork, labels: LabelUnionFind, index: int) -> None:
        self.network, self.labels, self.index = network, labels, index
        self._groups = network.builder.gather(Constraints(labels))
        self.plan = random_plan(self._groups, index)
        self._is_removed = torch.zeros(labels.size, dtype=torch.bool)  # by the root of a channel's labels
        for group in self._groups:
            if len(removed := self.plan.removed(group)):
                self._is_removed[labels.find(network.labels_of(group)[removed])] = True
        self._sizes: dict[int, int] = {}  # see `size_of`
        self._model: nn.Module | None = None
        self._cut_values: dict[SizeAttribute, int] = {}  # values in the cut model before any was written

    def size_of(self, labels: Tensor) -> int:
        """Return the size after the cut of a dimension with these labels, which must be a tensor of the trace."""
        if id(labels) not in self._sizes:  # the trace keeps the tensor, so that its id stays its own
            self._sizes[id(labels)] = len(labels) - int(self._is_removed[self.labels.find(labels)].sum())
        return self._sizes[id(labels)]

    def model_with(self, groups: Sequence[ChannelGroup]) -> nn.Module:
        """Return the cut model with the size attributes of `groups` set, and all others as the cut left them.

        The model is the same object in every call until `discard_model`.
        """
        if self._model is None:
            self._model, self._cut_values = slim_from(self.network.trial_cloner, self._groups, self.plan), {}
        wanted = dict(size_attributes_after(groups, self.plan))
        for attribute in self._cut_values.keys() - wanted.keys():
            write_size_attribute_(self._model, attribute, self._cut_values[attribute])
        for attribute, value in wanted.items():
            if attribute not in self._cut_values:
                self._cut_values[attribute] = read_size_attribute(self._model, attribute)
            write_size_attribute_(self._model, attribute, value)
        return self._model

    def discard_model(self) -> None:
        """Free the cut model; `model_with` cuts the network again."""
        self._model = None

    @cached_property
    def masked_run(self) -> tuple[ScalarsByLine, DecisionLog]:
        """The scalars that the masked network computes with, by line of code, and the decisions that it makes.

        A network whose code branches on values also computes with values, such as the sizes of boxes. In the masked
        network these are the same as in the cut one, and widths are those of the whole network.
        """
        reference = masked_from(self.network.trial_cloner, self._groups, self.plan)
        decisions, recorder = DecisionLog(), ScalarRecorder()
        with torch.no_grad(), evaluating(reference), decisions.recording():
            recorder.run_model(reference, self.network.trial_inputs)
        return recorder.scalars, decisions


def random_plan(groups: Sequence[ChannelGroup], trial_index: int) -> Plan:
    """Draw channels to keep: about half of every group first, then alternately few and many, then any share.

    Shares alternate so that neighbours, such as the two halves of a split, are not cut to the same width by chance.
    The plans numbered in `EXACT_SHARES` keep exactly that share of every group that it divides: most of the plans that
    people make do, and then a new width most easily equals another number in the code (`if self.inputs != width:`).

    Args:
        groups: of the network.
        trial_index: number of the plan; a negative one, -n, cuts every layer that is wider than n channels to n.
    """
    kept = {}
    for number, group in enumerate(group for group in groups if group.is_prunable):
        draws = generator("rehearse", trial_index, group.name)
        share = float(torch.rand((), generator=draws))
        if trial_index == 0:
            share = 0.4 + 0.2 * share
        elif trial_index in (1, 2):
            share = (0.1, 0.7)[(number + trial_index) % 2] + 0.2 * share
        elif trial_index < 0:
            share = min(1.0, -trial_index / (group.width * group.span))
        share = EXACT_SHARES.get(trial_index, share)
        # After the first trial small groups may stay whole: if two groups lose one channel each, their sizes cannot
        # be told apart.
        most = group.width if trial_index else group.width - 1
        width = max(min(max(round(share * group.width), 1 if trial_index else 2), most), 1)
        if width < group.width:
            kept[group.name] = tuple(sorted(torch.randperm(group.width, generator=draws)[:width].tolist()))
    return Plan(kept)
