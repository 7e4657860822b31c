"""One cut that is tried: what goes, how long dimensions are without it, and the network that is left."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from passdeploy.channels.groups import ChannelGroup, SizeAttribute
from passdeploy.channels.plan import Plan
from passdeploy.models.cloning import ModelCloner
from passdeploy.runtime.seeds import generator
from passdeploy.slimming.size_attributes import read_size_attribute, size_attributes_after, write_size_attribute_
from passdeploy.slimming.slim import slim_from
from passdeploy.tracing.trace import Trace


class TrialCut:
    """A network cut by a plan, over and over with other numbers in its modules.

    Args:
        mould: of the whole network, or of a sketch of it.
        trace: what a walk found.
        state_labels: of the dimensions of its parameters and buffers.
        groups: as the trace has them now; their numbers do not count.
        plan: what stays of them.
    """

    def __init__(
        self,
        cloner: ModelCloner[nn.Module],
        trace: Trace,
        state_labels: Mapping[tuple[str, int], Tensor],
        groups: Sequence[ChannelGroup],
        plan: Plan,
    ) -> None:
        self._cloner, self._trace, self._state_labels = cloner, trace, state_labels
        self._groups, self.plan = groups, plan
        self._gone = torch.zeros(trace.union_find.size, dtype=torch.bool)  # which labels represent a channel that goes
        for group in groups:
            if len(removed := plan.removed(group)):
                self._gone[trace.union_find.find(self.labels_of(group)[removed])] = True
        self._sizes: dict[int, int] = {}  # see `size_of`
        self._cut: nn.Module | None = None
        self._said: dict[SizeAttribute, int] = {}  # what modules of the cut network said before numbers were written

    def labels_of(self, group: ChannelGroup) -> Tensor:
        """One label of each channel of a group."""
        slot = group.slots[0]
        return self._state_labels[slot.tensor, slot.dim][slot.index[:, 0]]

    def size_of(self, labels: Tensor) -> int:
        """How many channels of a dimension stay."""
        if id(labels) not in self._sizes:  # of labels in the trace, which keeps them
            self._sizes[id(labels)] = len(labels) - int(self._gone[self._trace.union_find.find(labels)].sum())
        return self._sizes[id(labels)]

    def cut(self, groups: Sequence[ChannelGroup]) -> nn.Module:
        """The network that is left, where the numbers of `groups` follow the widths, and all others are as they were.

        It is one and the same network, whose modules are told other numbers.
        """
        if self._cut is None:
            self._cut, self._said = slim_from(self._cloner, self._groups, self.plan), {}
        wanted = dict(size_attributes_after(groups, self.plan))
        for number in self._said.keys() - wanted.keys():
            write_size_attribute_(self._cut, number, self._said[number])
        for number, value in wanted.items():
            if number not in self._said:
                self._said[number] = read_size_attribute(self._cut, number)
            write_size_attribute_(self._cut, number, value)
        return self._cut

    def forget(self) -> None:
        """Cut anew the next time: a network that ran with values may have kept some."""
        self._cut = None


def random_plan(groups: Sequence[ChannelGroup], trial_index: int) -> Plan:
    """Channels in no order: about half of every group, then little and much of it in turns, then any share.

    In turns, so that neighbours such as the two halves of a split are not cut alike by chance.
    """
    kept = {}
    for number, group in enumerate(group for group in groups if group.is_prunable):
        draws = generator("rehearse", trial_index, group.name)
        share = float(torch.rand((), generator=draws))
        if trial_index == 0:
            share = 0.4 + 0.2 * share
        elif trial_index in (1, 2):
            share = (0.1, 0.7)[(number + trial_index) % 2] + 0.2 * share
        # After the first cut small groups may stay whole: of two that lose one channel each nobody can tell the sums.
        most = group.width if trial_index else group.width - 1
        width = max(min(max(round(share * group.width), 1 if trial_index else 2), most), 1)
        if width < group.width:
            kept[group.name] = tuple(sorted(torch.randperm(group.width, generator=draws)[:width].tolist()))
    return Plan(kept)
