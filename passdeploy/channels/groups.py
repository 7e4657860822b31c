"""Channel groups: the units in which a network can be cut.

A removable channel is a set of slices of parameters that only make sense together: a filter, its
normalisation, the slices of everything that reads it, and the same place in every layer that
is added to it. Channels with slices in the same dimensions of the same tensors form a group.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

from torch import Tensor

from passdeploy.channels.costs import CostModel, Factor


@dataclass(frozen=True, eq=False)
class Slot:
    """Where the channels of a group sit along one dimension of one tensor."""

    tensor: str  # name in the state dict
    dim: int
    index: Tensor  # (width, count): the places of each channel, ascending
    is_output: bool  # the layer puts these channels out
    is_input: bool  # the layer reads these channels; one that does neither scales or shifts them

    @property
    def layer(self) -> str:
        """The module that holds the tensor."""
        return self.tensor.rpartition(".")[0]


@dataclass(frozen=True, eq=False)
class Statistic:
    """Which channels of a group a statistic goes over; `passdeploy.statistics` knows it by module and turn."""

    module: str
    turn: int
    dim: int  # counted from the last
    channels: Tensor  # the number of the channel at each place of the dimension; -1: of another group, or of none


@dataclass(frozen=True, eq=False)
class ChannelGroup:
    """Channels that live in the same tensors, each of which can be removed on its own."""

    name: str  # the first layer that makes them
    width: int  # how many independently removable channels
    slots: tuple[Slot, ...]  # the first one is that layer's output
    reason: str = ""  # why they must stay; empty if they may be cut
    numbers: tuple[tuple[tuple[str, str, int | None], Factor], ...] = ()  # (module, attribute, place) -> what it says
    statistics: tuple[Statistic, ...] = ()  # taken over channels of this group

    @property
    def is_prunable(self) -> bool:
        """Whether channels may be removed; a single one is all there is, and stays."""
        return not self.reason and self.width > 1

    @property
    def span(self) -> int:
        """How many output channels of its first layer one channel of the group stands for."""
        return self.slots[0].index.size(1)

    @property
    def layers(self) -> tuple[str, ...]:
        """The modules that hold slices of this group, in order, each once."""
        return tuple(dict.fromkeys(slot.layer for slot in self.slots))

    def __repr__(self) -> str:
        fate = "prunable" if self.is_prunable else f"protected: {self.reason or 'a single channel'}"
        return f"ChannelGroup({self.name!r}, width={self.width}, {fate})"


@dataclass(frozen=True, eq=False)
class ChannelMap:
    """What one walk through a network found: its groups, and what its widths cost."""

    groups: tuple[ChannelGroup, ...]
    costs: CostModel

    def chosen(self, *, include: Sequence[str] = ("*",), exclude: Sequence[str] = ()) -> ChannelMap:
        """The same with fewer groups that may be cut.

        Args:
            include: patterns (as in `fnmatch`) of the layers whose output channels may be cut.
            exclude: patterns of layers whose output channels stay all the same.
        """
        groups = (replace(group, reason=group.reason or _left_out(group, include, exclude)) for group in self.groups)
        return replace(self, groups=tuple(groups))

    @property
    def prunable(self) -> tuple[ChannelGroup, ...]:
        """The groups that may be cut."""
        return tuple(group for group in self.groups if group.is_prunable)


def _left_out(group: ChannelGroup, include: Sequence[str], exclude: Sequence[str]) -> str:
    """Why the recipe leaves a group whole, if it does: what one layer must keep, all that share its channels keep."""
    for layer in dict.fromkeys(slot.layer for slot in group.slots if slot.is_output):
        for pattern in exclude:
            if fnmatchcase(layer, pattern):
                return f"excluded by {pattern!r} ({layer})"
        if not any(fnmatchcase(layer, pattern) for pattern in include):
            return f"not included ({layer})"
    return ""


def cuts_whole_groups(groups: int, inputs_per_group: int) -> bool:
    """Whether a grouped convolution loses whole groups (depthwise always) or the same places in every group.

    The finer of the two choices leaves the hypernetwork more to decide.
    """
    return groups > 1 and groups >= inputs_per_group
