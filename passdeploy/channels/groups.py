"""Channel groups: the channels of tied layers, which must be removed together.

A removable channel is a set of parameter slices: a filter, its normalisation, the slices of every layer that reads it,
and the same index in every layer whose output is added to it. Channels with slices in the same dimensions of the same
tensors form a group.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from fnmatch import fnmatchcase

from torch import Tensor

from passdeploy.channels.blocks import Block, chosen_blocks
from passdeploy.channels.costs import CostModel, Factor
from passdeploy.errors import UsageError


@dataclass(frozen=True, eq=False)
class Slot:
    """The indices that the channels of a group occupy along one dimension of one tensor."""

    tensor: str  # name in the state dict
    dim: int
    index: Tensor  # (width, span along this dimension): the indices of each channel, ascending
    is_output: bool  # the dimension holds output channels of the layer
    is_input: bool  # the dimension holds input channels; neither: the tensor scales or shifts the channels

    @property
    def layer(self) -> str:
        """Name of the module that holds the tensor."""
        return self.tensor.rpartition(".")[0]

    @property
    def output_name(self) -> str:
        """Name of what puts out the channels: the layer, or a parameter that the network itself holds."""
        return self.layer or self.tensor


@dataclass(frozen=True, eq=False)
class Statistic:
    """A mean, norm, maximum or softmax over channels of a group, known by its module and call index.

    `models/function_calls.py` counts the calls.
    """

    module: str
    call_index: int
    dim: int  # counted from the last
    channels: Tensor  # (size of the dimension,): number of the channel in its group; -1: it is not in this group


@dataclass(frozen=True, eq=False)
class FixedOutput:
    """The indices that the channels of a group occupy along one dimension of what a module without weights returns.

    Such a module, which computes a position embedding from sines, goes on putting out all channels; a slim network
    selects those that stay.
    """

    module: str
    dim: int
    size: int  # of that dimension
    index: Tensor  # (width, span along this dimension): the indices of each channel, ascending


@dataclass(frozen=True)
class SizeAttribute:
    """An integer attribute of a module, or an entry of a tuple or list attribute, that states a size.

    Examples are `num_heads` and the sizes of a split.
    """

    module: str
    attribute: str
    index: int | None  # of the entry; None: the attribute is the integer itself


@dataclass(frozen=True, eq=False)
class ChannelGroup:
    """Channels that occupy the same tensors, each of which can be removed without the others."""

    name: str  # the first layer that produces the channels; the parameter, where the network itself holds it
    width: int  # number of independently removable channels
    slots: tuple[Slot, ...]  # the first one is the output dimension of that layer
    reason: str = ""  # why the channels must stay; empty if they may be cut
    size_attributes: tuple[tuple[SizeAttribute, Factor], ...] = ()  # attributes to update, and the sizes they state
    statistics: tuple[Statistic, ...] = ()  # taken over channels of this group
    fixed_outputs: tuple[FixedOutput, ...] = ()  # of modules without weights, that meet channels of this group

    @property
    def numbers(self) -> tuple[tuple[SizeAttribute, Factor], ...]:
        """The size attributes, under the name that they had before."""
        return self.size_attributes

    @property
    def is_prunable(self) -> bool:
        """True if channels may be removed: there is more than one, and nothing protects them."""
        return not self.reason and self.width > 1

    @property
    def span(self) -> int:
        """Number of output channels of the first layer that belong to one channel of the group."""
        return self.slots[0].index.size(1)

    @property
    def layers(self) -> tuple[str, ...]:
        """Names of the modules that hold slices of this group, in order, each once."""
        return tuple(dict.fromkeys(slot.layer for slot in self.slots))

    def __repr__(self) -> str:
        status = "prunable" if self.is_prunable else f"protected: {self.reason or 'a single channel'}"
        return f"ChannelGroup({self.name!r}, width={self.width}, {status})"


@dataclass(frozen=True, eq=False)
class ChannelMap:
    """The channel groups and blocks of a network, and its cost as a function of what a plan leaves of them."""

    groups: tuple[ChannelGroup, ...]
    costs: CostModel
    blocks: tuple[Block, ...] = ()  # in the order of the forward pass; none where they were not looked for
    idle_layers: tuple[str, ...] = ()  # that the example did not reach, in evaluation or in training

    def chosen(self, *, include: Sequence[str] = ("*",), exclude: Sequence[str] = ()) -> ChannelMap:
        """Protect the groups and blocks that `include` leaves out or `exclude` names.

        Args:
            include: patterns (as in `fnmatch`) of the layers whose output channels may be cut, and of blocks.
            exclude: patterns of the layers whose output channels must stay, and of blocks, even if `include` matches. A
                block stays with any such layer or block inside of it.

        Raises:
            UsageError: a pattern matches no layer whose output channels were followed, and no block.
        """
        _require_matches(self, [*include, *exclude])
        groups = tuple(
            replace(group, reason=group.reason or _exclusion_reason(group, include, exclude)) for group in self.groups
        )
        outputs = [layer for group in self.groups for layer in _output_layers(group)]
        blocks = chosen_blocks(self.blocks, include=include, exclude=exclude, layers=outputs)
        kept = {block.name for block in blocks if not block.is_prunable}
        costs = replace(self.costs, blocks=tuple(block for block in self.costs.blocks if block.name not in kept))
        return replace(self, groups=groups, blocks=blocks, costs=costs)

    @property
    def prunable(self) -> tuple[ChannelGroup, ...]:
        """Groups that may be cut."""
        return tuple(group for group in self.groups if group.is_prunable)

    def require_prunable(self, network: str) -> None:
        """Raise a UsageError, which names the network and a reason, unless something may be cut."""
        if not self.prunable:
            reason = next((group.reason for group in self.groups if group.reason), "it has no channels to follow")
            raise UsageError(f"nothing of {network} can be cut: {reason}.")


def _output_layers(group: ChannelGroup) -> list[str]:
    """List the layers whose output channels a group holds, each once."""
    return list(dict.fromkeys(slot.output_name for slot in group.slots if slot.is_output))


def _exclusion_reason(group: ChannelGroup, include: Sequence[str], exclude: Sequence[str]) -> str:
    """Return why the recipe's patterns protect a group, or "": one excluded output layer protects the whole group."""
    for layer in _output_layers(group):
        for pattern in exclude:
            if fnmatchcase(layer, pattern):
                return f"excluded by {pattern!r} ({layer})"
        if not any(fnmatchcase(layer, pattern) for pattern in include):
            return f"not included ({layer})"
    return ""


def _require_matches(channel_map: ChannelMap, patterns: Sequence[str]) -> None:
    """Raise a UsageError for the first pattern that matches nothing: it would be left out in silence."""
    layers = [layer for group in channel_map.groups for layer in _output_layers(group)]
    names = [*layers, *(block.name for block in channel_map.blocks)]
    for pattern in patterns:
        if pattern == "*" or any(fnmatchcase(name, pattern) for name in names):
            continue
        inside = f"{pattern}.*"
        close = [inside] if any(fnmatchcase(name, inside) for name in names) else get_close_matches(pattern, names, 1)
        or_block = ", and no block" if channel_map.blocks else ""
        raise UsageError(
            f"include or exclude: {pattern!r} matches no layer whose output channels can be followed{or_block}.\n"
            + (f"Did you mean {close[0]!r}?" if close else "* stands for any characters, as in fnmatch.")
        )


def cuts_whole_groups(groups: int, inputs_per_group: int) -> bool:
    """True if a grouped convolution loses whole groups (depthwise always), not the same channels of every group.

    Of the two, the choice with more removable channels is taken.
    """
    return groups > 1 and groups >= inputs_per_group
