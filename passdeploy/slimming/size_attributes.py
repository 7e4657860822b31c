"""Attributes of modules that state sizes (`out_channels`, `num_heads`, split lists), kept equal to the weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn

from passdeploy.channels.blocks import Block, is_inside, replacements_of, skipped_blocks
from passdeploy.channels.groups import ChannelGroup, SizeAttribute, cuts_whole_groups
from passdeploy.channels.plan import Plan
from passdeploy.slimming.tensors import Removed

_GATES = {"LSTM": 4, "GRU": 3}  # weight rows of a recurrent layer per hidden unit; 1 for others


def size_attributes_after(
    groups: Sequence[ChannelGroup], plan: Plan, blocks: Sequence[Block] = ()
) -> list[tuple[SizeAttribute, int]]:
    """Return the size attributes of all groups with their values after `plan`, but those of skipped blocks."""
    gone = {name for block in skipped_blocks(blocks, plan.skipped) for name in block.groups}
    replaced = [one.module for one in replacements_of(blocks, plan.skipped)]
    kept = {name: width for name, width in plan.widths().items() if name not in gone}
    widths = {group.name: group.width for group in groups} | kept
    return [
        (attribute, size.size(widths))
        for group in groups
        for attribute, size in group.size_attributes
        if not any(is_inside(attribute.module, module) for module in replaced)
    ]


def _loses_groups(groups: int, size: int, inputs_per_group: int, removed: Removed | None) -> bool:
    """True if a layer lost whole channel groups, False if each of its groups became narrower.

    Args:
        groups: number of groups before.
        size: channels of all groups together before, along the first dimension of the weight.
        inputs_per_group: input channels of each group before.
        removed: indices removed along that dimension; None if unknown, as in a network rebuilt from a file.
    """
    if removed is None:
        return cuts_whole_groups(groups, inputs_per_group)
    if groups == 1 or not len(removed):
        return False
    lost = torch.bincount(removed.indices // (size // groups), minlength=groups)
    return bool((lost == size // groups).any())


def update_size_attributes_(module: nn.Module, removed_of: Callable[[Tensor], Removed | None]) -> None:
    """Set the size attributes of a torch layer, such as `out_channels`, to the shapes of its weights.

    Args:
        module: a layer with its new weights and the old attributes.
        removed_of: weight -> indices removed along its first dimension, or None if unknown.
    """
    if isinstance(module, nn.RNNBase):
        module.input_size = module.get_parameter("weight_ih_l0").size(1)
        module.hidden_size = module.get_parameter("weight_hh_l0").size(0) // _GATES.get(module.mode, 1)
        module._flat_weights = [getattr(module, name) for name in module._flat_weights_names]
        return
    if isinstance(module, nn.RNNCellBase):
        module.input_size, module.hidden_size = module.weight_ih.size(1), module.weight_hh.size(1)
        return
    weight = getattr(module, "weight", None)
    if weight is None:  # a batch norm without scale and shift
        weight = getattr(module, "running_mean", None)
    if not isinstance(weight, Tensor):
        return
    if is_convolution(module):
        transposed = getattr(module, "transposed", False)
        inputs, outputs = (weight.size(0), weight.size(1)) if transposed else (weight.size(1), weight.size(0))
        first_dim, size = (inputs, module.in_channels) if transposed else (outputs, module.out_channels)
        if _loses_groups(module.groups, size, module.in_channels // module.groups, removed_of(weight)):
            module.groups = first_dim // (size // module.groups)
        module.in_channels = inputs if transposed else inputs * module.groups
        module.out_channels = outputs * module.groups if transposed else outputs
    elif isinstance(module, nn.Linear):
        module.out_features, module.in_features = weight.shape
    elif isinstance(module, nn.modules.batchnorm._NormBase):
        module.num_features = len(weight)
    elif isinstance(module, nn.LayerNorm | nn.RMSNorm):
        module.normalized_shape = tuple(weight.shape)
    elif isinstance(module, nn.GroupNorm):
        per_group = module.num_channels // module.num_groups
        if _loses_groups(module.num_groups, module.num_channels, per_group, removed_of(weight)):
            module.num_groups = len(weight) // per_group
        module.num_channels = len(weight)
    elif isinstance(module, nn.PReLU):
        module.num_parameters = len(weight)
    elif isinstance(module, nn.Embedding):
        module.num_embeddings, module.embedding_dim = weight.shape


def is_convolution(module: nn.Module) -> TypeGuard[nn.modules.conv._ConvNd]:
    """True for a convolution of torch, and for torchvision's deformable one, which states its sizes alike."""
    return isinstance(module, nn.modules.conv._ConvNd) or any(
        (kind.__module__, kind.__name__) == ("torchvision.ops.deform_conv", "DeformConv2d")
        for kind in type(module).__mro__
    )


def read_size_attribute(model: nn.Module, size: SizeAttribute) -> Any:
    """Return the value of a size attribute in `model`."""
    value = getattr(model.get_submodule(size.module), size.attribute)
    return value if size.index is None else value[size.index]


def write_size_attribute_(model: nn.Module, size: SizeAttribute, value: int) -> None:
    """Set a size attribute of `model`; a tuple or list is replaced by a changed copy."""
    module = model.get_submodule(size.module)
    if size.index is None:
        setattr(module, size.attribute, value)
        return
    old = getattr(module, size.attribute)
    new = [*old[: size.index], value, *old[size.index + 1 :]]
    setattr(module, size.attribute, tuple(new) if isinstance(old, tuple) else new)
