"""Mask what a plan drops: every shape and module stays, removed channels and skipped blocks contribute nothing."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from passdeploy.channels.blocks import Block
from passdeploy.channels.groups import ChannelGroup
from passdeploy.channels.plan import Plan
from passdeploy.models.cloning import ModelCloner, named_state
from passdeploy.models.function_calls import CallKey
from passdeploy.models.modes import outside_inference_mode
from passdeploy.models.wrappers import unwrapped
from passdeploy.slimming.fixed_outputs import mask_outputs_
from passdeploy.slimming.masked_branches import additions_of, mute_branches_
from passdeploy.slimming.masked_norms import KeptMask, restrict_norms_
from passdeploy.slimming.masked_reductions import KeptAlong
from passdeploy.slimming.tensors import like, removed_indices, require_groups_of


@outside_inference_mode()
def masked(model: nn.Module, groups: Sequence[ChannelGroup], plan: Plan, blocks: Sequence[Block] = ()) -> nn.Module:
    """Copy `model` so that dropped channels and skipped blocks contribute nothing to any consumer; every shape stays.

    Args:
        model: the network.
        groups: its channel groups.
        plan: channels to keep, and blocks to skip.
        blocks: its blocks; only needed where the plan skips some.

    Raises:
        PlanError: the plan does not fit the groups or the blocks, or the groups not the network.
    """
    cloner = ModelCloner(unwrapped(model))
    plan.check(groups, blocks)
    require_groups_of({**cloner.plain_tensors, **cloner.state}, groups, plan)
    return masked_from(cloner, groups, plan, blocks)


def masked_from(
    cloner: ModelCloner[nn.Module], groups: Sequence[ChannelGroup], plan: Plan, blocks: Sequence[Block] = ()
) -> nn.Module:
    """Do what `masked` does, for a network that is copied many times."""
    plan.check(groups, blocks)
    reference = cloner.copy(lambda _, old: like(old, old))
    state, kept = dict(named_state(reference)), dict[str, KeptMask]()
    with torch.no_grad():
        for (name, dim), removed in removed_indices(groups, plan).items():
            if name in state:
                kept.setdefault(name, KeptMask(state[name].shape)).removed[dim] = removed.indices
            if isinstance(state.get(name), nn.Parameter):  # running statistics are divided by: they stay as they are
                state[name].index_fill_(dim, removed.indices.to(state[name].device), 0.0)
    mask_outputs_(reference, groups, plan)
    mute_branches_(reference, additions_of(plan, blocks))
    return restrict_norms_(reference, kept, _existing(groups, plan))


def _existing(groups: Sequence[ChannelGroup], plan: Plan) -> dict[CallKey, list[KeptAlong]]:
    """Map each reduction over channels of which some are removed to masks of those that exist."""
    found: dict[tuple[CallKey, int], KeptAlong] = {}
    for group in groups:
        removed = plan.removed(group)
        for one in group.statistics if len(removed) else ():
            exists, owners = ~torch.isin(one.channels, torch.as_tensor(removed)), one.channels
            key = (one.module, one.call_index), one.dim
            if (other := found.get(key)) is not None:
                exists = exists & other.exists
                owners = torch.stack([owners, other.owners]).unique(dim=1, return_inverse=True)[1]
            found[key] = KeptAlong(one.dim, exists, owners)
    by_call: dict[CallKey, list[KeptAlong]] = {}
    for (call, _), kept in found.items():
        by_call.setdefault(call, []).append(kept)
    return by_call
