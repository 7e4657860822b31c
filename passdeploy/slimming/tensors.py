"""Tensors without the places that a plan drops, and back."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property

import torch
from torch import Tensor, nn

from passdeploy.channels.groups import ChannelGroup
from passdeploy.channels.plan import Plan


class Removed:
    """Places along one dimension that go: how many, and, once somebody asks, which."""

    def __init__(self) -> None:
        self._parts: list[tuple[Tensor, Tensor]] = []

    def add(self, index: Tensor, channels: Tensor) -> None:
        """Of these channels; `index` has the places of all, shape (width, places of one)."""
        self._parts.append((index, channels))

    def __len__(self) -> int:
        return sum(len(channels) * index.size(1) for index, channels in self._parts)

    @cached_property
    def places(self) -> Tensor:
        """Which, shape (places,)."""
        found = [index[channels].flatten() for index, channels in self._parts]
        return found[0] if len(found) == 1 else torch.cat([torch.zeros(0, dtype=torch.int64), *found])


def cut_tensors(tensors: Mapping[str, Tensor], gone: Mapping[tuple[str, int], Removed]) -> dict[str, Tensor]:
    """Tensors of a network, or others of their names and shapes, without some places; in their memory order.

    Args:
        tensors: by name.
        gone: as `removed_places` tells.
    """
    cut, sizes = dict(tensors), dict[str, list[int]]()
    for (name, dim), removed in gone.items():
        if name not in cut:
            continue
        whole = cut[name].detach()
        if whole.is_meta:
            sizes.setdefault(name, list(whole.shape))[dim] -= len(removed)
            continue
        places = _kept_places(whole.size(dim), removed.places)
        is_last = (
            whole.ndim == 4 and not whole.is_contiguous() and whole.is_contiguous(memory_format=torch.channels_last)
        )
        order = torch.channels_last if is_last else torch.contiguous_format
        cut[name] = whole.index_select(dim, places.to(whole.device)).contiguous(memory_format=order)
    return cut | {name: cut[name].new_empty(left) for name, left in sizes.items()}


def put_back_(
    tensors: Mapping[str, Tensor], smaller: Mapping[str, Tensor], groups: Sequence[ChannelGroup], plan: Plan
) -> None:
    """Write tensors that `plan` cut into the places they were cut from; what was dropped stays as it is."""
    places: dict[str, dict[int, Tensor]] = {}
    for (name, dim), removed in removed_places(groups, plan).items():
        if name in tensors:
            places.setdefault(name, {})[dim] = _kept_places(tensors[name].size(dim), removed.places)
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
    """
    new_place = {}
    for (name, dim), removed in removed_places(groups, plan).items():
        stays = torch.ones(sizes[name][dim], dtype=torch.int64)
        stays[removed.places] = 0
        new_place[name, dim] = stays.cumsum(0) - 1
    stays_of = _staying_places(groups, plan)
    after = []
    for group in groups:
        kept = torch.tensor(plan.kept.get(group.name, range(group.width)))
        slots = []
        for slot in group.slots:
            places = new_place.get((slot.tensor, slot.dim))
            slots.append(slot if places is None else replace(slot, index=places[slot.index[kept]]))
        number = torch.full((group.width + 1,), -1)  # of the channel among those that stay; the last: of none, -1
        number[kept] = torch.arange(len(kept))
        statistics = tuple(
            replace(one, channels=number[one.channels[stays_of[one.module, one.call_index, one.dim]]])
            for one in group.statistics
        )
        after.append(replace(group, width=len(kept), slots=tuple(slots), statistics=statistics))
    return tuple(after)


def _staying_places(groups: Sequence[ChannelGroup], plan: Plan) -> dict[tuple[str, int, int], Tensor]:
    """(module, turn, dimension) of a statistic -> whether each place along it stays, whoever it belongs to."""
    stays: dict[tuple[str, int, int], Tensor] = {}
    for group in groups:
        removed = torch.as_tensor(plan.removed(group))
        for one in group.statistics:
            key = one.module, one.call_index, one.dim
            stays[key] = stays.get(key, torch.ones(len(one.channels), dtype=torch.bool))
            stays[key] &= ~torch.isin(one.channels, removed)
    return stays


def like(old: Tensor, values: Tensor) -> Tensor:
    """`values` as what `old` is: a parameter that learns or not, or a buffer."""
    values = values.detach()
    if values is old or (not values.is_meta and values.data_ptr() == old.data_ptr()):
        values = values.clone()
    return nn.Parameter(values, old.requires_grad) if isinstance(old, nn.Parameter) else values


def _kept_places(size: int, removed: Tensor) -> Tensor:
    """The places along a dimension of that size that stay."""
    stays = torch.ones(size, dtype=torch.bool)
    stays[removed] = False
    return stays.nonzero().flatten()


def removed_places(groups: Sequence[ChannelGroup], plan: Plan) -> dict[tuple[str, int], Removed]:
    """(tensor, dimension) -> the places along it that go."""
    found: defaultdict[tuple[str, int], Removed] = defaultdict(Removed)
    for group in groups:
        channels = plan.removed(group)
        if len(channels):
            for slot in group.slots:
                found[slot.tensor, slot.dim].add(slot.index, channels)
    return found
