"""Channels of all groups in one vector: one operation of a step serves all groups, where there was one for each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from passdeploy.channels.groups import ChannelGroup
from passdeploy.channels.plan import Plan


@dataclass(frozen=True)
class FlatChannels:
    """Order of the channels of several groups in one vector: group after group."""

    widths: Mapping[str, int]  # group name -> channels

    @classmethod
    def of(cls, groups: Sequence[ChannelGroup]) -> FlatChannels:
        """Order the channels of `groups`."""
        return cls({group.name: group.width for group in groups})

    @property
    def total(self) -> int:
        """Number of channels of all groups."""
        return sum(self.widths.values())

    def join(self, values: Mapping[str, Tensor]) -> Tensor:
        """Join one tensor (width,) per group to one of shape (total,)."""
        return torch.cat([values[name] for name in self.widths])

    def split(self, flat: Tensor) -> dict[str, Tensor]:
        """Split a tensor (total,) into views (width,), by group name."""
        return dict(zip(self.widths, flat.split([*self.widths.values()]), strict=True))

    def mask(self, plan: Plan) -> Tensor:
        """Write a plan as a mask on the CPU, bool (total,): True on the channels that stay."""
        mask, start = np.zeros(self.total, bool), 0
        for name, width in self.widths.items():
            mask[start : start + width][list(plan.kept.get(name, range(width)))] = True
            start += width
        return torch.from_numpy(mask)

    def plan(self, mask: Tensor) -> Plan:
        """Write a mask on the CPU, bool (total,), as a plan; where a group keeps no channel, it keeps the first."""
        return Plan.of_masks(self.split(mask))
