"""Check the tensors, hooks, modes and stated sizes of a slim network, which its outputs do not show.

`slim` and `masked` read a plan and copy a network with the same functions, so a defect in one of these changes both
alike. Here the plan is read a second time: every tensor of the slim network is compared with the slice of the dense
network's tensor that the plan keeps, and nothing may be left inside of the modules of a skipped block.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor, nn

from passdeploy.channels.blocks import Block, replacements_of
from passdeploy.channels.groups import ChannelGroup
from passdeploy.channels.plan import Plan
from passdeploy.models.cloning import named_plain_tensors
from passdeploy.models.memory_order import memory_order
from passdeploy.models.selected_channels import SelectedChannels, is_index_name
from passdeploy.models.wrappers import COMPILED_CALL
from passdeploy.slimming.size_attributes import is_convolution
from passdeploy.slimming.tensors import storage_of

_HOOK_TABLES = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")


def structure_fault(
    model: nn.Module, smaller: nn.Module, groups: Sequence[ChannelGroup], plan: Plan, blocks: Sequence[Block] = ()
) -> str:
    """Describe the first difference of `smaller` from `model` that `plan` does not ask for; empty if there is none."""
    removed = _removed_places(groups, plan)
    cut_names = {name for name, _ in removed}
    whole, cut = _tensors_of(model, cut_names), _tensors_of(smaller, cut_names)
    skipped = [module for block in blocks if block.name in plan.skipped for module in block.modules]
    skipped += [one.module for one in replacements_of(blocks, plan.skipped)]
    if fault := _skipping_fault(smaller, cut, skipped):
        return fault
    inside = tuple(f"{module}." for module in skipped)
    if fault := _selection_fault(model, smaller, groups, plan, inside):
        return fault
    if unknown := sorted(cut_names - whole.keys()):
        return f"the groups name {unknown[0]}, which the network does not have"
    whole = {name: tensor for name, tensor in whole.items() if not name.startswith(inside)}
    if whole.keys() != cut.keys():
        return f"{min(whole.keys() ^ cut.keys())} exists, or is shared, in one of the two networks only"
    for name, old in whole.items():
        if fault := _tensor_fault(old, cut[name], {dim: gone for (of, dim), gone in removed.items() if of == name}):
            return f"{name} {fault}"
    modules = _modules_of(smaller)
    for name, module in _modules_of(model).items():
        if name.startswith(inside) or (name in skipped and name not in modules):
            continue
        if name not in modules:
            return f"module {name} is missing"
        if fault := _mode_fault(module, modules[name]) if name in skipped else _module_fault(module, modules[name]):
            return f"{name or 'the network itself'} {fault}"
    return ""


def _skipping_fault(smaller: nn.Module, tensors: Mapping[str, Tensor], skipped: Sequence[str]) -> str:
    """Describe what is left of modules that were to go; empty if nothing is."""
    for module in skipped:
        if left := next((name for name in tensors if name.startswith(f"{module}.")), ""):
            return f"{left} is left of a block that is skipped"
    left = next(
        (name for name, _ in smaller.named_modules() if name.startswith(tuple(f"{one}." for one in skipped))), ""
    )
    return f"module {left} is left of a block that is skipped" if left else ""


def _tensors_of(model: nn.Module, cut_names: Collection[str]) -> dict[str, Tensor]:
    plain = {name: tensor for name, tensor in named_plain_tensors(model) if name in cut_names}
    named = {**dict(model.named_parameters()), **dict(model.named_buffers()), **plain}
    return {name: tensor for name, tensor in named.items() if not is_index_name(name)}


def _modules_of(model: nn.Module) -> dict[str, nn.Module]:
    """Name the modules as if none had been wrapped to select channels of what it puts out."""
    found, wrappers = dict[str, nn.Module](), list[str]()
    for name, module in model.named_modules():
        if isinstance(module, SelectedChannels):
            wrappers.append(name)
            continue
        for wrapper in wrappers:
            if name == f"{wrapper}.whole" or name.startswith(f"{wrapper}.whole."):
                name = wrapper + name.removeprefix(f"{wrapper}.whole")
        found[name] = module
    return found


def _selection_fault(
    model: nn.Module, smaller: nn.Module, groups: Sequence[ChannelGroup], plan: Plan, inside: tuple[str, ...]
) -> str:
    """Describe the first output of which other channels are selected than a plan keeps; empty if there is none.

    Args:
        model: the network before.
        smaller: the slim network.
        groups: of `model`.
        plan: of these groups.
        inside: beginnings of the names of modules that went with skipped blocks.
    """
    gone: dict[tuple[str, int], set[int]] = {}
    expected, found = _selections_in(model), _selections_in(smaller)
    for group in groups:
        kept = set(plan.kept.get(group.name, range(group.width)))
        for one in group.fixed_outputs if len(kept) < group.width else ():
            places = (place for channel, row in enumerate(one.index.tolist()) if channel not in kept for place in row)
            gone.setdefault((one.module, one.dim), set()).update(places)
            expected.setdefault((one.module, one.dim), list(range(one.size)))
    for module, dim in expected.keys() | found.keys():
        if f"{module}.".startswith(inside):
            continue
        left = [
            index
            for place, index in enumerate(expected.get((module, dim), ()))
            if place not in gone.get((module, dim), ())
        ]
        if found.get((module, dim)) != left:
            return f"of the output of {module} other channels are selected along dimension {dim} than the plan keeps"
    return ""


def _selections_in(model: nn.Module) -> dict[tuple[str, int], list[int]]:
    """Map modules of which channels are selected, with the dimension, to these channels."""
    return {
        (name, dim): module.get_buffer(buffer).tolist()
        for name, module in model.named_modules()
        if isinstance(module, SelectedChannels)
        for buffer, dim, _ in module.selections
    }


def _removed_places(groups: Sequence[ChannelGroup], plan: Plan) -> dict[tuple[str, int], set[int]]:
    """Map (tensor, dimension) to the indices along it that a plan removes, read from the kept channels."""
    places: dict[tuple[str, int], set[int]] = {}
    for group in groups:
        kept = set(plan.kept.get(group.name, range(group.width)))
        for slot in group.slots if len(kept) < group.width else ():
            gone = [place for channel, row in enumerate(slot.index.tolist()) if channel not in kept for place in row]
            places.setdefault((slot.tensor, slot.dim), set()).update(gone)
    return places


def _tensor_fault(old: Tensor, new: Tensor, removed: Mapping[int, set[int]]) -> str:
    """Describe how `new` differs from `old` without the removed indices of each dimension; empty if it does not."""
    expected = old.detach()
    for dim, gone in removed.items():
        stay = [index for index in range(old.size(dim)) if index not in gone]
        expected = expected.index_select(dim, torch.tensor(stay, dtype=torch.int64, device=old.device))
    if new.shape != expected.shape:
        return f"has the shape {tuple(new.shape)} and should have {tuple(expected.shape)}"
    if (new.dtype, new.device, new.layout) != (old.dtype, old.device, old.layout):
        return "has another dtype, device or layout than before"
    if isinstance(old, nn.Parameter) and not (isinstance(new, nn.Parameter) and new.requires_grad == old.requires_grad):
        return "is no longer a parameter with the same requires_grad"
    order = memory_order(old)
    if order != torch.contiguous_format and not new.is_contiguous(memory_format=order):
        return "is no longer in channels-last order"
    if old.layout != torch.strided or old.is_meta:
        return ""
    if storage_of(new) == storage_of(old) != 0:
        return "shares memory with the dense network"
    return "" if _equal(new.detach(), expected) else "has other values than what the plan keeps of the dense tensor"


def _equal(first: Tensor, second: Tensor) -> bool:
    if torch.equal(first, second):
        return True
    both_nan = (first != first) & (second != second)
    return bool(((first == second) | both_nan).all())


def _module_fault(old: nn.Module, new: nn.Module) -> str:
    """Describe how a module of the slim network differs from the one it was cut from; empty if it does not."""
    if fault := _mode_fault(old, new):
        return fault
    if vars(new).get(COMPILED_CALL) is not None:
        return "still calls what nn.Module.compile made of the dense network"
    for table in _HOOK_TABLES:
        before, after = vars(old).get(table), vars(new).get(table)
        if before is not None and (after is before or after is None or list(after) != list(before)):
            return f"has other hooks than before ({table})"
    if _states_its_shape(old) and not _states_its_shape(new):
        return f"states other sizes than its weight has: {new}"
    return ""


def _mode_fault(old: nn.Module, new: nn.Module) -> str:
    return "" if new.training == old.training else "is in another mode (training or evaluation)"


def _states_its_shape(layer: nn.Module) -> bool:
    """Test whether the size attributes of a torch layer agree with its tensors; False for modules without any."""
    stated, weight = _stated_shape(layer), getattr(layer, "weight", None)
    if weight is None:  # a batch norm without scale and shift
        weight = getattr(layer, "running_mean", None)
    return bool(stated) and isinstance(weight, Tensor) and tuple(weight.shape[: len(stated)]) == stated


def _stated_shape(layer: nn.Module) -> tuple[int, ...]:
    """Return the first dimensions of a torch layer's weight as its attributes state them; empty for other modules."""
    if is_convolution(layer):
        inputs, outputs = layer.in_channels, layer.out_channels
        is_transposed = getattr(layer, "transposed", False)
        return (inputs, outputs // layer.groups) if is_transposed else (outputs, inputs // layer.groups)
    if isinstance(layer, nn.Linear):
        return layer.out_features, layer.in_features
    if isinstance(layer, nn.modules.batchnorm._NormBase):
        return (layer.num_features,)
    if isinstance(layer, nn.GroupNorm):
        return (layer.num_channels,)
    if isinstance(layer, nn.LayerNorm | nn.RMSNorm):
        return tuple(layer.normalized_shape)
    if isinstance(layer, nn.PReLU):
        return (layer.num_parameters,)
    return (layer.num_embeddings, layer.embedding_dim) if isinstance(layer, nn.Embedding) else ()
