"""Attributes of modules that state sizes (`out_channels`, `num_heads`, split lists), kept equal to the weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from passdeploy.channels.groups import ChannelGroup, cuts_whole_groups
from passdeploy.channels.plan import Plan
from passdeploy.slimming.tensors import Removed

NumberKey = tuple[str, str, int | None]  # module, attribute, place in it


def numbers_after(groups: Sequence[ChannelGroup], plan: Plan) -> list[tuple[NumberKey, int]]:
    """The numbers that modules keep and that are sizes, and what they say once `plan` is carried out."""
    widths = {group.name: group.width for group in groups} | plan.widths()
    return [(number, size.size(widths)) for group in groups for number, size in group.numbers]


_GATES = {"LSTM": 4, "GRU": 3}  # rows of a recurrent network's weights for each of its units


def _loses_groups(groups: int, size: int, inputs_per_group: int, removed: Removed | None) -> bool:
    """Whether some of the groups of channels of a layer go, else all of them become narrower.

    Args:
        groups: how many there were.
        size: channels of all of them, along the first dimension of the weight.
        inputs_per_group: how many there were.
        removed: places along that dimension that went; None: the layer is rebuilt from the widths it was made with.
    """
    if removed is None:
        return cuts_whole_groups(groups, inputs_per_group)
    if groups == 1 or not len(removed):
        return False
    lost = torch.bincount(removed.places // (size // groups), minlength=groups)
    return bool((lost == size // groups).any())


def update_size_attributes_(module: nn.Module, removed_of: Callable[[Tensor], Removed | None]) -> None:
    """Make a module's own numbers agree with its weights.

    Args:
        module: with its new weights, and the old numbers.
        removed_of: weight -> places along its first dimension that went, or None where nobody knows.
    """
    if isinstance(module, nn.RNNBase):
        module.input_size = module.get_parameter("weight_ih_l0").size(1)
        module.hidden_size = module.get_parameter("weight_hh_l0").size(0) // _GATES.get(module.mode, 1)
        module._flat_weights = [getattr(module, name) for name in module._flat_weights_names]
        return
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor):
        return
    if isinstance(module, nn.modules.conv._ConvNd):
        inputs, outputs = (weight.size(0), weight.size(1)) if module.transposed else (weight.size(1), weight.size(0))
        spelled_out, size = (inputs, module.in_channels) if module.transposed else (outputs, module.out_channels)
        if _loses_groups(module.groups, size, module.in_channels // module.groups, removed_of(weight)):
            module.groups = spelled_out // (size // module.groups)
        module.in_channels = inputs if module.transposed else inputs * module.groups
        module.out_channels = outputs * module.groups if module.transposed else outputs
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


def read_number(model: nn.Module, number: NumberKey) -> Any:
    """What a number of a module says; `index` is its place where the attribute is a tuple or a list."""
    module, attribute, index = number
    value = getattr(model.get_submodule(module), attribute)
    return value if index is None else value[index]


def write_number_(model: nn.Module, number: NumberKey, value: int) -> None:
    """Make it say `value`."""
    name, attribute, index = number
    module = model.get_submodule(name)
    if index is None:
        setattr(module, attribute, value)
        return
    old = getattr(module, attribute)
    new = [*old[:index], value, *old[index + 1 :]]
    setattr(module, attribute, tuple(new) if isinstance(old, tuple) else new)
