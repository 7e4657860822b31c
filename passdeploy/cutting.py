"""Tensors without the places that a plan drops, and back."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from passdeploy.channels.groups import ChannelGroup
from passdeploy.plan import Plan


def cut_tensors(tensors: Mapping[str, Tensor], groups: Sequence[ChannelGroup], plan: Plan) -> dict[str, Tensor]:
    """Tensors of a network, or others of their names and shapes, without what `plan` drops; in their memory order."""
    cut = dict(tensors)
    for (name, dim), places in _kept_places(cut, groups, plan):
        whole = cut[name].detach()
        if whole.is_meta:
            cut[name] = whole.new_empty((*whole.shape[:dim], len(places), *whole.shape[dim + 1 :]))
            continue
        is_last = (
            whole.ndim == 4 and not whole.is_contiguous() and whole.is_contiguous(memory_format=torch.channels_last)
        )
        order = torch.channels_last if is_last else torch.contiguous_format
        cut[name] = whole.index_select(dim, places.to(whole.device)).contiguous(memory_format=order)
    return cut


def put_back_(
    tensors: Mapping[str, Tensor], smaller: Mapping[str, Tensor], groups: Sequence[ChannelGroup], plan: Plan
) -> None:
    """Write tensors that `plan` cut into the places they were cut from; what was dropped stays as it is."""
    places: dict[str, dict[int, Tensor]] = {}
    for (name, dim), kept in _kept_places(tensors, groups, plan):
        places.setdefault(name, {})[dim] = kept
    with torch.no_grad():
        for name, whole in tensors.items():
            along = [
                places.get(name, {}).get(dim, torch.arange(size)).to(whole.device)
                for dim, size in enumerate(whole.shape)
            ]
            if along:
                whole[torch.meshgrid(*along, indexing="ij")] = smaller[name]
            else:
                whole.copy_(smaller[name])


def groups_after(
    groups: Sequence[ChannelGroup], plan: Plan, sizes: Mapping[str, Sequence[int]]
) -> tuple[ChannelGroup, ...]:
    """The groups of the network that `plan` leaves.

    Args:
        groups: of the network before, with all that are cut.
        plan: of these groups.
        sizes: name -> shape of the tensors before.

    Statistics over channels, which only `masked` needs, are not carried over.
    """
    new_place = {}
    for (name, dim), removed in removed_places(groups, plan).items():
        stays = torch.ones(sizes[name][dim], dtype=torch.int64)
        stays[removed] = 0
        new_place[name, dim] = stays.cumsum(0) - 1
    after = []
    for group in groups:
        kept = torch.tensor(plan.kept.get(group.name, range(group.width)))
        slots = []
        for slot in group.slots:
            places = new_place.get((slot.tensor, slot.dim))
            slots.append(slot if places is None else replace(slot, index=places[slot.index[kept]]))
        after.append(replace(group, width=len(kept), slots=tuple(slots), statistics=()))
    return tuple(after)


def like(old: Tensor, values: Tensor) -> Tensor:
    """`values` as what `old` is: a parameter that learns or not, or a buffer."""
    values = values.detach()
    if values is old or (not values.is_meta and values.data_ptr() == old.data_ptr()):
        values = values.clone()
    return nn.Parameter(values, old.requires_grad) if isinstance(old, nn.Parameter) else values


def _kept_places(
    tensors: Mapping[str, Tensor], groups: Sequence[ChannelGroup], plan: Plan
) -> Iterator[tuple[tuple[str, int], Tensor]]:
    """(tensor, dimension) and the places along it that stay, for those that `plan` cuts."""
    for (name, dim), removed in removed_places(groups, plan).items():
        if name in tensors:
            stays = torch.ones(tensors[name].size(dim), dtype=torch.bool)
            stays[removed] = False
            yield (name, dim), stays.nonzero().flatten()


def removed_places(groups: Sequence[ChannelGroup], plan: Plan) -> dict[tuple[str, int], Tensor]:
    """(tensor, dimension) -> the places along it that go."""
    places: dict[tuple[str, int], list[Tensor]] = {}
    for group in groups:
        removed = plan.removed(group)
        if len(removed):
            for slot in group.slots:
                places.setdefault((slot.tensor, slot.dim), []).append(slot.index[removed].flatten())
    return {key: torch.cat(parts) for key, parts in places.items()}
