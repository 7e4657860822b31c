"""Pruning plan: the channels of each group that stay, and the blocks that go.

It holds no model, so it can be read before weights are cut.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from passdeploy.channels.blocks import Block, presence
from passdeploy.channels.groups import ChannelGroup
from passdeploy.errors import PlanError, UsageError

Scores = Mapping[str, Tensor]  # group name -> importance, shape (width,), higher is better


@dataclass(frozen=True)
class Plan:
    """Channels that stay and blocks that go; a group that is not named keeps all of its channels.

    A group that lives only inside a skipped block goes with it, whatever the plan says of its channels.
    """

    kept: Mapping[str, tuple[int, ...]]  # group name -> ascending channel indices
    skipped: tuple[str, ...] = ()  # names of blocks

    @classmethod
    def of_masks(cls, masks: Mapping[str, Tensor]) -> Plan:
        """Keep the channels where a group's mask, bool (width,), is True; where none is, keep the first channel."""
        return cls({name: tuple(mask.nonzero().flatten().tolist()) or (0,) for name, mask in masks.items()})

    def check(self, groups: Sequence[ChannelGroup], blocks: Sequence[Block] = ()) -> None:
        """Raise PlanError unless every entry names a prunable group and some of its channels, in order.

        Every block that is skipped must be one of `blocks` that may be.
        """
        self._check_skipped(blocks)
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

    def _check_skipped(self, blocks: Sequence[Block]) -> None:
        by_name = {block.name: block for block in blocks}
        if self.skipped and not blocks:
            raise PlanError(
                f"plan skips block {self.skipped[0]!r}, but no blocks of the network were given.\n"
                "Find them with find_blocks and pass them on, as blocks=..."
            )
        for name in self.skipped:
            if (block := by_name.get(name)) is None:
                raise PlanError(
                    f"plan skips block {name!r}, but the network has no such block.\n"
                    "This plan was made for another model."
                )
            if not block.is_prunable:
                raise PlanError(f"plan skips block {name!r}, which must stay: {block.reason}.")
        if len(set(self.skipped)) < len(self.skipped):
            raise PlanError("plan skips a block twice.")

    def widths(self) -> dict[str, int]:
        """Count the channels that each named group keeps; `presence` of a skipped block is 0."""
        widths = {name: len(kept) for name, kept in self.kept.items()}
        return {**widths, **{presence(name): 0 for name in self.skipped}}

    def removed(self, group: ChannelGroup) -> Tensor:
        """Return the indices of the channels of `group` that are removed, ascending."""
        if group.name not in self.kept:
            return torch.zeros(0, dtype=torch.int64)
        is_kept = np.zeros(group.width, bool)
        is_kept[list(self.kept[group.name])] = True
        return torch.from_numpy(np.flatnonzero(~is_kept))

    def to_json(self) -> dict[str, object]:
        """Convert to plain values."""
        return {"kept": {name: list(kept) for name, kept in self.kept.items()}, "skipped": list(self.skipped)}

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> Plan:
        """Read what `to_json` made."""
        return cls({name: tuple(kept) for name, kept in document["kept"].items()}, tuple(document["skipped"]))


def reconcile(
    by_layer: Mapping[str, Tensor], groups: Sequence[ChannelGroup], *, how: str = "union"
) -> dict[str, Tensor]:
    """Combine masks or scores per layer into one mask or score vector per channel group.

    Layers whose outputs are added share their channels, so they must keep the same ones. The values of a pruner that
    works layer by layer are therefore pooled over all layers of a group and over all layer channels that one channel of
    the group spans.

    Args:
        by_layer: layer -> one value per output channel, shape (channels,); bool for masks (True stays), else scores.
        groups: of the network; those without a named layer are left out, as are those that cannot be pruned.
        how: `union` (kept if any layer keeps it; the highest score), `intersection` (if all do; the lowest) or `mean`.

    Returns:
        Group name -> value per channel, shape (width,), of the kind that was given; a `mean` of masks is a share.

    Raises:
        PlanError: a layer is unknown, or has more channels than values.
        UsageError: a way to combine of that name is not known.
    """
    if how not in ("union", "intersection", "mean"):
        raise UsageError(f"how={how!r} is unknown.\nIt is 'union', 'intersection' or 'mean'.")
    layers = list(dict.fromkeys(slot.layer for group in groups for slot in group.slots if slot.is_output))
    if unknown := sorted(set(by_layer) - set(layers)):
        raise PlanError(f"no layer {unknown[0]!r} puts out channels; known are {', '.join(layers[:5])}, ...")
    pooled = {}
    for group in groups:
        layer_values = []
        for slot in group.slots:
            if slot.is_output and slot.layer in by_layer and slot.tensor.endswith("weight"):
                values = by_layer[slot.layer]
                if int(slot.index.max()) >= len(values):
                    raise PlanError(
                        f"layer {slot.layer!r} puts out at least {int(slot.index.max()) + 1} channels, "
                        f"but {len(values)} values are given for it."
                    )
                layer_values.append(values[slot.index])  # (width, span)
        if layer_values and group.is_prunable:
            stacked = torch.cat(layer_values, dim=1)
            if how == "mean":
                pooled[group.name] = stacked.float().mean(1)
            else:
                pooled[group.name] = stacked.amax(1) if how == "union" else stacked.amin(1)
    return pooled
