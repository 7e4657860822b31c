"""Outputs of modules without weights that lose channels: zero in a masked network, left out of a slim one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from passdeploy.channels.groups import ChannelGroup
from passdeploy.channels.plan import Plan
from passdeploy.models.selected_channels import select_channels_

OutputKey = tuple[str, int, int]  # a module, the dimension of its output, the size of that


def removed_outputs(groups: Sequence[ChannelGroup], plan: Plan) -> dict[OutputKey, Tensor]:
    """Map each dimension of an output that loses channels to the indices that go, ascending."""
    parts: dict[OutputKey, list[Tensor]] = {}
    for group in groups:
        for one in group.fixed_outputs:
            gone = one.index[plan.removed(group)].flatten()
            if len(gone):
                parts.setdefault((one.module, one.dim, one.size), []).append(gone)
    return {key: torch.cat(found).sort().values for key, found in parts.items()}


def select_outputs_(model: nn.Module, groups: Sequence[ChannelGroup], plan: Plan) -> None:
    """Let modules without weights put out only the channels that stay."""
    removed = removed_outputs(groups, plan)
    device = next((tensor.device for tensor in model.parameters() if not tensor.is_meta), None) if removed else None
    for (module, dim, size), gone in removed.items():
        stays = torch.ones(size, dtype=torch.bool)
        stays[gone] = False
        select_channels_(model, module, dim, size, stays.nonzero().flatten().to(device))


def mask_outputs_(model: nn.Module, groups: Sequence[ChannelGroup], plan: Plan) -> list[RemovableHandle]:
    """Set channels that go to zero where modules without weights return them; the handles undo that."""
    return [
        model.get_submodule(module).register_forward_hook(_ZeroChannels(dim, gone))
        for (module, dim, _), gone in removed_outputs(groups, plan).items()
    ]


class _ZeroChannels:
    """Hook that sets some channels of a module's output to zero, in a copy of it."""

    def __init__(self, dim: int, channels: Tensor) -> None:
        self._dim, self._channels = dim, channels

    def __call__(self, _: nn.Module, __: Any, output: Tensor) -> Tensor:
        return output.index_fill(self._dim, self._channels.to(output.device), 0.0)
