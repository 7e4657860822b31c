"""The plan: which channels stay. It knows no model, so it can be read before a weight is cut."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from passdeploy.channels.groups import ChannelGroup
from passdeploy.errors import PlanError

Scores = Mapping[str, Tensor]  # group name -> importance, shape (width,), higher is better


@dataclass(frozen=True)
class Plan:
    """The channels that survive; a group that is not named keeps all of them."""

    kept: Mapping[str, tuple[int, ...]]  # group name -> ascending channel indices

    @classmethod
    def of_masks(cls, masks: Mapping[str, Tensor]) -> Plan:
        """From a mask per group, bool (width,), True stays; where nothing does, the first channel."""
        return cls({name: tuple(mask.nonzero().flatten().tolist()) or (0,) for name, mask in masks.items()})

    def check(self, groups: Sequence[ChannelGroup]) -> None:
        """Raise PlanError unless every entry names a prunable group and some of its channels, in order."""
        by_name = {group.name: group for group in groups}
        for name, kept in self.kept.items():
            if (group := by_name.get(name)) is None:
                raise PlanError(
                    f"plan names group {name!r}, but the network has no such group.\n"
                    "This plan was made for another model, or for other layers to exclude."
                )
            if not kept:
                raise PlanError(f"plan keeps nothing of group {name!r}; a layer needs at least one channel.")
            if list(kept) != sorted(set(kept)):
                raise PlanError(f"plan lists the channels of group {name!r} out of order or twice.")
            if kept[0] < 0 or kept[-1] >= group.width:
                raise PlanError(
                    f"plan keeps channel {kept[-1] if kept[0] >= 0 else kept[0]} of group {name!r}, "
                    f"but that group has {group.width} channels (0 to {group.width - 1}).\n"
                    "This plan was made for another model."
                )
            if len(kept) < group.width and not group.is_prunable:
                raise PlanError(
                    f"plan cuts group {name!r}, which must stay whole: {group.reason or 'it has a single channel'}."
                )

    def widths(self) -> dict[str, int]:
        """Group name -> how many channels it keeps, for the groups named."""
        return {name: len(kept) for name, kept in self.kept.items()}

    def removed(self, group: ChannelGroup) -> Tensor:
        """The channels of `group` that go, ascending."""
        if group.name not in self.kept:
            return torch.zeros(0, dtype=torch.int64)
        stays = np.zeros(group.width, bool)
        stays[list(self.kept[group.name])] = True
        return torch.from_numpy(np.flatnonzero(~stays))

    def to_json(self) -> dict[str, object]:
        """Group name -> kept channels, in plain lists."""
        return {name: list(kept) for name, kept in self.kept.items()}


def reconcile(
    by_layer: Mapping[str, Tensor], groups: Sequence[ChannelGroup], *, how: str = "union"
) -> dict[str, Tensor]:
    """What layers say of their output channels, as what each group says of its channels.

    Layers that are added up share their channels, so they must agree: a mask or score per layer, as a pruner that
    thinks in layers gives it, is pooled over every layer of a group and every channel that a group's channel spans.

    Args:
        by_layer: layer -> one value per output channel, shape (channels,); bool for masks (True stays), else scores.
        groups: of the network; those of which no layer is named are left out, as are those that must stay.
        how: `union` (stays if any layer wants it; the highest score), `intersection` (if all do; the lowest) or `mean`.

    Returns:
        Group -> value per channel, shape (width,), of the kind that was given; a `mean` of masks is a share.

    Raises:
        PlanError: a layer is unknown, or its values are not one per channel.
    """
    layers = {slot.layer: len(slot.index) for group in groups for slot in group.slots if slot.is_output}
    if unknown := sorted(set(by_layer) - set(layers)):
        raise PlanError(f"no layer {unknown[0]!r} puts out channels; known are {', '.join(list(layers)[:5])}, ...")
    pooled = {}
    for group in groups:
        votes = []
        for slot in group.slots:
            if slot.is_output and slot.layer in by_layer and slot.tensor.endswith("weight"):
                values = by_layer[slot.layer]
                if int(slot.index.max()) >= len(values):
                    raise PlanError(
                        f"layer {slot.layer!r} puts out at least {int(slot.index.max()) + 1} channels, "
                        f"but {len(values)} values are given for it."
                    )
                votes.append(values[slot.index])  # (width, channels that one spans)
        if votes and group.is_prunable:
            every = torch.cat(votes, dim=1)
            if how == "mean":
                pooled[group.name] = every.float().mean(1)
            else:
                pooled[group.name] = every.amax(1) if how == "union" else every.amin(1)
    return pooled
