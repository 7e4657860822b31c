"""Index-select the kept channels of every tensor of a network, and write cut tensors back."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property

import torch
from torch import Tensor, nn

from passdeploy.channels.groups import ChannelGroup
from passdeploy.channels.plan import Plan
from passdeploy.errors import PlanError
from passdeploy.models.memory_order import memory_order
from passdeploy.models.parameters import parameter_like
from passdeploy.slimming.fixed_outputs import removed_outputs


class Removed:
    """Indices along one dimension that are removed; listed only once they are asked for."""

    def __init__(self) -> None:
        self._parts: list[tuple[Tensor, Tensor]] = []

    def add(self, index: Tensor, channels: Tensor) -> None:
        """Add the indices of `channels`; `index` has those of all channels, shape (width, indices of one channel)."""
        self._parts.append((index, channels))

    def __len__(self) -> int:
        return sum(len(channels) * index.size(1) for index, channels in self._parts)

    @cached_property
    def indices(self) -> Tensor:
        """The indices, shape (count,)."""
        found = [index[channels].flatten() for index, channels in self._parts]
        return found[0] if len(found) == 1 else torch.cat([torch.zeros(0, dtype=torch.int64), *found])


def cut_tensors(tensors: Mapping[str, Tensor], gone: Mapping[tuple[str, int], Removed]) -> dict[str, Tensor]:
    """Copy tensors of a network, or others of the same names and shapes, without the removed indices.

    The memory order stays.

    Args:
        tensors: by name.
        gone: (tensor, dimension) -> removed indices, see `removed_indices`.
    """
    cut, sizes = dict(tensors), dict[str, list[int]]()
    for (name, dim), removed in gone.items():
        if name not in cut:
            continue
        whole = cut[name].detach()
        if whole.is_meta:
            sizes.setdefault(name, list(whole.shape))[dim] -= len(removed)
            continue
        indices = _kept_indices(whole.size(dim), removed.indices)
        smaller = whole.index_select(dim, indices.to(whole.device, non_blocking=True))
        cut[name] = smaller.contiguous(memory_format=memory_order(whole))
    return cut | {name: cut[name].new_empty(left) for name, left in sizes.items()}


def require_groups_of(tensors: Mapping[str, Tensor], groups: Sequence[ChannelGroup], plan: Plan) -> None:
    """Check that a network has the tensors that a plan cuts, and that they are long enough.

    Args:
        tensors: of the network, by name.
        groups: its groups, or so the caller says.
        plan: of these groups.

    Raises:
        PlanError: the groups are of another network.
    """
    for group in groups:
        for slot in group.slots if len(plan.removed(group)) else ():
            tensor = tensors.get(slot.tensor)
            if tensor is None:
                problem = "the network has no such tensor"
            elif slot.dim >= tensor.ndim or int(slot.index.max()) >= tensor.size(slot.dim):
                problem = f"it has the shape {list(tensor.shape)} here"
            else:
                continue
            raise PlanError(
                f"group {group.name!r} cuts {slot.tensor} along dimension {slot.dim}, but {problem}.\n"
                "Find the groups of the network that is cut: find_groups(model, example_inputs)."
            )


def put_back_(
    tensors: Mapping[str, Tensor], smaller: Mapping[str, Tensor], groups: Sequence[ChannelGroup], plan: Plan
) -> None:
    """Write tensors that `plan` cut back to where they were cut from; what was dropped stays as it is."""
    indices: dict[str, dict[int, Tensor]] = {}
    for (name, dim), removed in removed_indices(groups, plan).items():
        if name in tensors:
            indices.setdefault(name, {})[dim] = _kept_indices(tensors[name].size(dim), removed.indices)
    with torch.no_grad():
        for name, whole in tensors.items():
            along = [
                indices.get(name, {}).get(dim, torch.arange(size)).to(whole.device)
                for dim, size in enumerate(whole.shape)
            ]
            if along:
                whole[torch.meshgrid(*along, indexing="ij")] = smaller[name]
            else:
                whole.copy_(smaller[name])


def groups_after(groups: Sequence[ChannelGroup], plan: Plan) -> tuple[ChannelGroup, ...]:
    """Describe the groups of the slim network.

    Args:
        groups: of the network before, with all that are cut.
        plan: of these groups.
    """
    gone = {place: removed.indices.sort().values for place, removed in removed_indices(groups, plan).items()}
    gone_outputs = removed_outputs(groups, plan)
    stays_of = _staying_masks(groups, plan)
    after = []
    for group in groups:
        kept = torch.tensor(plan.kept.get(group.name, range(group.width)))
        slots = tuple(
            replace(slot, index=_renumbered(slot.index[kept], gone.get((slot.tensor, slot.dim))))
            for slot in group.slots
        )
        outputs = []
        for one in group.fixed_outputs:
            lost = gone_outputs.get((one.module, one.dim, one.size), torch.zeros(0, dtype=torch.int64))
            outputs.append(replace(one, size=one.size - len(lost), index=_renumbered(one.index[kept], lost)))
        number = torch.full((group.width + 1,), -1)  # of the channel among those that stay; the last: of none, -1
        number[kept] = torch.arange(len(kept))
        statistics = tuple(
            replace(one, channels=number[one.channels[stays_of[one.module, one.call_index, one.dim]]])
            for one in group.statistics
        )
        after.append(replace(group, width=len(kept), slots=slots, statistics=statistics, fixed_outputs=tuple(outputs)))
    return tuple(after)


def _renumbered(index: Tensor, gone: Tensor | None) -> Tensor:
    """Count indices anew, without those that are gone, which are ascending."""
    return index if gone is None else index - torch.searchsorted(gone, index)


def _staying_masks(groups: Sequence[ChannelGroup], plan: Plan) -> dict[tuple[str, int, int], Tensor]:
    """Map each reduction (module, call, dimension) to a mask of the indices along it that stay, of any group."""
    stays: dict[tuple[str, int, int], Tensor] = {}
    for group in groups:
        removed = torch.as_tensor(plan.removed(group))
        for one in group.statistics:
            key = one.module, one.call_index, one.dim
            stays[key] = stays.get(key, torch.ones(len(one.channels), dtype=torch.bool))
            stays[key] &= ~torch.isin(one.channels, removed)
    return stays


def storage_of(tensor: Tensor) -> int:
    """Return the address of a tensor's memory; 0 if it has none, as sparse and meta tensors."""
    try:
        return tensor.untyped_storage().data_ptr()
    except (RuntimeError, NotImplementedError):
        return 0


def like(old: Tensor, values: Tensor) -> Tensor:
    """Make `values` what `old` is, a parameter of the same kind or a buffer, in memory of its own."""
    is_shared = values is old or storage_of(values) == storage_of(old) != 0
    own = values.detach().clone() if is_shared else values.detach()
    return parameter_like(old, own) if isinstance(old, nn.Parameter) else own


def _kept_indices(size: int, removed: Tensor) -> Tensor:
    """List the indices along a dimension of that size that stay."""
    stays = torch.ones(size, dtype=torch.bool)
    stays[removed] = False
    return stays.nonzero().flatten()


def removed_indices(groups: Sequence[ChannelGroup], plan: Plan) -> dict[tuple[str, int], Removed]:
    """Map (tensor, dimension) to the indices along it that go."""
    found: defaultdict[tuple[str, int], Removed] = defaultdict(Removed)
    for group in groups:
        channels = plan.removed(group)
        if len(channels):
            for slot in group.slots:
                found[slot.tensor, slot.dim].add(slot.index, channels)
    return found
