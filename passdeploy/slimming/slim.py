"""Build the slim network of a plan: a copy with smaller tensors and updated sizes.

`slim` cuts removed channels out and has no skipped blocks; `masked` (masked.py) leaves every shape and module alone and
lets them contribute nothing.
The two compute the same, to rounding: that is the promise of the whole project, and `verify` checks it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from passdeploy.channels.blocks import Block, Replacement, replacements_of, tensors_of
from passdeploy.channels.groups import ChannelGroup, SizeAttribute
from passdeploy.channels.plan import Plan
from passdeploy.models.bound_functions import rebind_to_tensors_
from passdeploy.models.cloning import ModelCloner, modules_by_name, named_plain_tensors, named_state
from passdeploy.models.modes import outside_inference_mode
from passdeploy.models.selected_channels import select_channels_named_
from passdeploy.models.wrappers import unwrapped
from passdeploy.runtime.garbage import garbage_collection_paused
from passdeploy.slimming.fixed_outputs import select_outputs_
from passdeploy.slimming.size_attributes import size_attributes_after, update_size_attributes_, write_size_attribute_
from passdeploy.slimming.substitutes import replace_modules_
from passdeploy.slimming.tensors import Removed, cut_tensors, like, removed_indices, require_groups_of

NOTHING = Removed()


@garbage_collection_paused()
@outside_inference_mode()
def slim(model: nn.Module, groups: Sequence[ChannelGroup], plan: Plan, blocks: Sequence[Block] = ()) -> nn.Module:
    """Build a new network of the same classes without what `plan` drops; `model` is untouched.

    Parameter names, training mode and `requires_grad` are as in `model`. A skipped block is `nn.Identity` or what else
    is left of it (see `Substitute`), without parameters.

    Args:
        model: the network.
        groups: its channel groups.
        plan: channels to keep, and blocks to skip.
        blocks: its blocks; only needed where the plan skips some.

    Raises:
        PlanError: the plan does not fit the groups or the blocks, or the groups not the network.
        ModelError: the network cannot be copied, such as TorchScript.
    """
    cloner = ModelCloner(unwrapped(model))
    plan.check(groups, blocks)
    require_groups_of({**cloner.plain_tensors, **cloner.state}, groups, plan)
    return slim_from(cloner, groups, plan, blocks)


def slim_from(
    cloner: ModelCloner[nn.Module], groups: Sequence[ChannelGroup], plan: Plan, blocks: Sequence[Block] = ()
) -> nn.Module:
    """Do what `slim` does, for a network that is copied many times."""
    plan.check(groups, blocks)
    skipped = tensors_of(blocks, plan.skipped)
    removed = removed_indices(groups, plan)
    state = cut_tensors({name: old for name, old in cloner.state.items() if name not in skipped}, removed)
    gone: dict[int, Removed] = {}  # id of a tensor -> what it lost along its first dimension

    def cut(name: str, old: Tensor) -> Tensor:
        if name in skipped:
            return old  # of a module that is replaced
        is_shape_alone = old.is_meta and state[name] is old
        new = old if is_shape_alone else like(old, state[name])
        gone[id(new)] = removed.get((name, 0), NOTHING)
        return new

    smaller = cloner.copy(cut, _cut_plain_tensors(cloner, removed))
    select_outputs_(smaller, groups, plan)
    replace_modules_(smaller, replacements_of(blocks, plan.skipped))
    for _, module in modules_by_name(smaller):
        update_size_attributes_(module, lambda weight: gone.get(id(weight)))
    for attribute, value in size_attributes_after(groups, plan, blocks):
        write_size_attribute_(smaller, attribute, value)
    return smaller


def _cut_plain_tensors(cloner: ModelCloner[nn.Module], removed: Mapping[tuple[str, int], Removed]) -> dict[str, Tensor]:
    """Cut the tensors that are plain attributes of modules, by name; only those that lose something."""
    names = {name for name, _ in removed} - cloner.state.keys()
    plain = cloner.plain_tensors if names else {}
    return cut_tensors({name: plain[name] for name in names & plain.keys()}, removed)


def hidden_state(smaller: nn.Module, groups: Sequence[ChannelGroup]) -> dict[str, Tensor]:
    """Collect the tensors of a slim network that were cut and are not in its state dict; a rebuild needs them too.

    These are buffers that are not saved, and plain attributes of modules.
    """
    known = smaller.state_dict().keys()
    buffers = {**dict(smaller.named_buffers()), **dict(named_plain_tensors(smaller))}
    names = {slot.tensor for group in groups if group.is_prunable for slot in group.slots} - known
    return {name: buffers[name] for name in sorted(names & buffers.keys())}  # others went with a skipped block


def resize_(
    model: nn.Module,
    state: Mapping[str, Tensor],
    size_attributes: Sequence[tuple[SizeAttribute, int]] = (),
    replacements: Sequence[Replacement] = (),
) -> None:
    """Give `model` the parameters and buffers in `state`, whatever their shapes, and all that goes with them.

    This is how a slim network is rebuilt from its factory and its tensors. Shared parameters stay shared.

    Args:
        model: as its factory made it.
        state: its tensors by name; those that are missing stay.
        size_attributes: as `size_attributes_after` gave them when the network was cut.
        replacements: as `replacements_of` gave them for the skipped blocks.

    Raises:
        ModelError: the network cannot be rebuilt, such as TorchScript.
    """
    model = unwrapped(model)
    replace_modules_(model, replacements)
    select_channels_named_(model, state)
    new = {
        id(old): like(old, state[name].to(old.device, old.dtype)) if name in state else old
        for name, old in named_state(model)
    }
    for module in model.modules():
        for table in (module._parameters, module._buffers):
            for attribute, old in table.items():
                if old is not None:
                    table[attribute] = new[id(old)]  # type: ignore[assignment]
        update_size_attributes_(module, lambda _: None)
    plain = {id(old): like(old, state[name].to(old)) for name, old in named_plain_tensors(model) if name in state}
    for module in model.modules() if plain else ():
        for attribute, value in list(vars(module).items()):
            if isinstance(value, Tensor) and id(value) in plain:
                setattr(module, attribute, plain[id(value)])
    rebind_to_tensors_(model, {**new, **plain})
    for size_attribute, value in size_attributes:
        write_size_attribute_(model, size_attribute, value)
