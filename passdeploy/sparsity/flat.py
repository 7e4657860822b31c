"""Channels of all groups, and all blocks, in one vector: one operation of a step serves all of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from passdeploy.channels.blocks import Block, outermost, presence
from passdeploy.channels.groups import ChannelGroup
from passdeploy.channels.plan import Plan


@dataclass(frozen=True)
class FlatChannels:
    """Order of the channels of several groups in one vector, group after group; then one entry for each block."""

    widths: Mapping[str, int]  # group name -> channels; then `presence` of a block -> 1
    blocks: tuple[Block, ...] = ()

    @classmethod
    def of(cls, groups: Sequence[ChannelGroup], blocks: Sequence[Block] = ()) -> FlatChannels:
        """Order the channels of `groups`, and `blocks`."""
        widths = {group.name: group.width for group in groups}
        return cls({**widths, **{presence(block.name): 1 for block in blocks}}, tuple(blocks))

    @property
    def total(self) -> int:
        """Number of channels of all groups and of blocks."""
        return sum(self.widths.values())

    @property
    def channels(self) -> int:
        """Number of channels of all groups."""
        return self.total - len(self.blocks)

    def join(self, values: Mapping[str, Tensor]) -> Tensor:
        """Join one tensor (width,) per group, and (1,) per block, to one of shape (total,)."""
        return torch.cat([values[name] for name in self.widths])

    def split(self, flat: Tensor) -> dict[str, Tensor]:
        """Split a tensor (total,) into views (width,), by group name and `presence` of blocks."""
        return dict(zip(self.widths, flat.split([*self.widths.values()]), strict=True))

    def mask(self, plan: Plan, *, with_inside: bool = True) -> Tensor:
        """Write a plan as a mask on the CPU, bool (total,): True on what stays.

        Args:
            plan: channels and blocks to keep.
            with_inside: what is inside of a skipped block goes with it; False: it is as the plan says.
        """
        skipped = [block for block in self.blocks if block.name in plan.skipped]
        gone = {name for block in skipped for name in (names_in(block) if with_inside else [presence(block.name)])}
        mask, start = np.zeros(self.total, bool), 0
        for name, width in self.widths.items():
            if name not in gone:
                mask[start : start + width][list(plan.kept.get(name, range(width)))] = True
            start += width
        return torch.from_numpy(mask)

    def plan(self, mask: Tensor) -> Plan:
        """Write a mask on the CPU, bool (total,), as a plan; where a group keeps no channel, it keeps the first.

        Groups inside of skipped blocks are not named.
        """
        masks = self.split(mask)
        skipped = [block for block in self.blocks if not masks[presence(block.name)]]
        gone = {name for block in skipped for name in names_in(block)}
        blocks = {presence(block.name) for block in self.blocks}
        kept = Plan.of_masks({name: one for name, one in masks.items() if name not in gone and name not in blocks}).kept
        return Plan(kept, tuple(block.name for block in outermost(skipped)))


def names_in(block: Block) -> list[str]:
    """Return the names in widths of a block, and of the blocks and groups that go with it."""
    return [presence(block.name), *map(presence, block.contains), *block.groups]
