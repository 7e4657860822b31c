"""Cut a network by a random plan, to be run as a trial."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from math import gcd
from typing import Literal

import torch
from torch import Tensor, nn

from passdeploy.channels.groups import ChannelGroup, SizeAttribute
from passdeploy.channels.plan import Plan
from passdeploy.grouping.constraints import Constraints
from passdeploy.grouping.shape_check import OpRecorder
from passdeploy.grouping.traced_network import TracedNetwork
from passdeploy.models.modes import evaluating
from passdeploy.runtime.seeds import generator
from passdeploy.slimming.masked import masked_from
from passdeploy.slimming.replay import DecisionLog
from passdeploy.slimming.size_attributes import read_size_attribute, size_attributes_after, write_size_attribute_
from passdeploy.slimming.slim import slim_from
from passdeploy.tracing.fixed_outputs import copy_outputs_
from passdeploy.tracing.labels import LabelUnionFind

_FEW = 3  # channels, of which no part is both less than all and more than few

# The number of a random plan (see `random_plan`), the channels that all groups keep, or the widths to which groups are
# cut: pairs of name and width.
PlanKey = int | Literal["first", "last"] | tuple[tuple[str, int], ...]
END_CUTS: tuple[PlanKey, ...] = ("first", "last")
_END_SHARE = 0.4  # that is kept of a group; not a half, which halves of a split would have by chance


class TrialCut:
    """One random cut of a network, whose size attributes can be set again and again without cutting anew.

    Args:
        network: the network to cut.
        labels: its channels, joined and protected as far as is known.
        key: what to cut, see `plan_of`.
    """

    def __init__(self, network: TracedNetwork, labels: LabelUnionFind, key: PlanKey) -> None:
        self.network, self.labels, self.key = network, labels, key
        self._groups = network.builder.gather(Constraints(labels))
        self.plan = plan_of(self._groups, key)
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
            copy_outputs_(self._model, {output.module for output in self.network.trace.fixed_outputs})
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
    def masked_run(self) -> tuple[OpRecorder, DecisionLog]:
        """The operations of the masked network with their scalars, and the decisions that it makes.

        A network whose code branches on values also computes with values, such as the sizes of boxes. In the masked
        network these are the same as in the cut one, and widths are those of the whole network.
        """
        reference = masked_from(self.network.trial_cloner, self._groups, self.plan)
        decisions, recorder = DecisionLog(), OpRecorder()
        with torch.no_grad(), evaluating(reference), decisions.recording():
            recorder.run_model(reference, self.network.trial_inputs)
        return recorder, decisions


def plan_of(groups: Sequence[ChannelGroup], key: PlanKey) -> Plan:
    """Draw channels to keep: of all groups if `key` is the number of a random plan, else of those it gives widths.

    For "first" and "last", it keeps the channels at that end of every group: a channel that is picked by its place is
    then another one, which a random plan keeps in its place by chance.
    """
    if isinstance(key, int):
        return random_plan(groups, key)
    if isinstance(key, str):
        return _end_plan(groups, key)
    widths, kept = dict(key), {}
    for group in groups:
        if group.is_prunable and (width := widths.get(group.name, group.width)) < group.width:
            order = torch.randperm(group.width, generator=generator("rehearse", width, group.name))
            kept[group.name] = tuple(sorted(order[:width].tolist()))
    return Plan(kept)


def _end_plan(groups: Sequence[ChannelGroup], end: str) -> Plan:
    kept = {}
    for group in groups:
        width = max(1, round(_END_SHARE * group.width))
        if group.is_prunable and width < group.width:
            start = 0 if end == "first" else group.width - width
            kept[group.name] = tuple(range(start, start + width))
    return Plan(kept)


def random_plan(groups: Sequence[ChannelGroup], trial_index: int, *, with_odd_widths: bool = False) -> Plan:
    """Draw channels to keep: about half of every group first, then alternately few and many, then any share.

    Shares alternate so that neighbours, such as the two halves of a split, are not cut to the same width by chance.

    Args:
        groups: of the network.
        trial_index: number of the plan; -n keeps exactly one nth of every group that can be divided by n.
        with_odd_widths: keep numbers of channels without the factors 2, 3 and 5, near those drawn, so that no product
            of channels and pixels is divisible by chance.
    """
    kept = {}
    for number, group in enumerate(group for group in groups if group.is_prunable):
        draws = generator("rehearse", trial_index, group.name)
        share = float(torch.rand((), generator=draws))
        if trial_index == 0:
            share = 0.4 + 0.2 * share
        elif trial_index in (1, 2):
            is_wide = (number + trial_index) % 2 == 1
            # Of two channels few are one and many are often one too: then neighbours would be equal after all.
            share = 1.0 if is_wide and group.width <= _FEW else (0.1, 0.7)[is_wide] + 0.2 * share
        elif trial_index == 3 and group.width <= _FEW:  # groups that are two apart were alike in the two plans before
            share = float(number // 2 % 2)
        elif trial_index < 0 and group.width % -trial_index == 0:
            share = 1 / -trial_index
        # After the first trial small groups may stay whole: if two groups lose one channel each, their sizes cannot
        # be told apart.
        most = group.width if trial_index else group.width - 1
        width = max(min(max(round(share * group.width), 1 if trial_index else 2), most), 1)
        if with_odd_widths:
            fitting = (other for other in range(1, group.width) if gcd(other, 2 * 3 * 5) == 1)
            width = min(fitting, key=lambda other: abs(other - width), default=width)
        if width < group.width:
            kept[group.name] = tuple(sorted(torch.randperm(group.width, generator=draws)[:width].tolist()))
    return Plan(kept)
