"""Modules without weights that a slim network has in place of those of a skipped block."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from passdeploy.channels.blocks import Block, Replacement, is_inside, replacements_of, tensors_of
from passdeploy.channels.groups import ChannelGroup
from passdeploy.channels.plan import Plan


class _Substitute(nn.Module):
    """A module that is called like the one whose place it takes, and returns as many entries.

    Args:
        entries: of the tuple to return, of which all but the first are None; 0: return a tensor.
    """

    def __init__(self, entries: int) -> None:
        super().__init__()
        self.entries = entries

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Compute the first entry from the first tensor among the arguments."""
        found = self.of(next(one for one in (*args, *kwargs.values()) if isinstance(one, Tensor)))
        return (found, *[None] * (self.entries - 1)) if self.entries else found

    def of(self, x: Tensor) -> Tensor:
        """Compute what is returned."""
        raise AssertionError("a subclass implements of")

    def extra_repr(self) -> str:
        """Show the number of entries, if a tuple is returned."""
        return f"entries={self.entries}" if self.entries else ""


class First(_Substitute):
    """Returns the first tensor that it is called with."""

    def of(self, x: Tensor) -> Tensor:
        """Return `x` itself."""
        return x


class Zero(_Substitute):
    """Returns a zero of one element, which contributes nothing to what it is added to.

    Args:
        ndim: number of its dimensions.
        entries: see the base class.
    """

    def __init__(self, ndim: int, entries: int) -> None:
        super().__init__(entries)
        self.ndim = ndim

    def of(self, x: Tensor) -> Tensor:
        """Make it like `x`: on the same device, of the same type."""
        return x.new_zeros((1,) * self.ndim)


class Zeros(_Substitute):
    """Returns zeros of the shape of the first tensor that it is called with."""

    def of(self, x: Tensor) -> Tensor:
        """Make zeros like `x`."""
        return torch.zeros_like(x)


def substitute_of(replacement: Replacement) -> nn.Module:
    """Make the module of a replacement."""
    if replacement.by == "identity":
        return nn.Identity()
    if replacement.by == "relu":
        return nn.ReLU()
    if replacement.by == "first":
        return First(replacement.entries)
    return Zero(replacement.ndim, replacement.entries) if replacement.by == "zero" else Zeros(replacement.entries)


def replace_modules_(model: nn.Module, replacements: Iterable[Replacement]) -> None:
    """Put substitutes in the place of modules, under every name that these have in `model`."""
    new: dict[int, nn.Module] = {}
    for one in replacements:
        old, substitute = model.get_submodule(one.module), substitute_of(one)
        new[id(old)] = substitute.train(old.training)
        _take_over_facts_(substitute, old)
    for module in list(model.modules()) if new else ():
        replaced = {name: new[id(child)] for name, child in module._modules.items() if id(child) in new}
        module._modules.update(replaced)
        if replaced and isinstance(module, nn.TransformerEncoderLayer):
            _leave_fused_path_(module, replaced.get("self_attn"))


def _take_over_facts_(substitute: nn.Module, old: nn.Module) -> None:
    """Give a substitute what code around it may read of the module before, such as `eps`; sizes no longer hold."""
    for name, value in vars(old).items():
        if not name.startswith("_") and isinstance(value, bool | float | str) and not hasattr(substitute, name):
            setattr(substitute, name, value)


def _leave_fused_path_(layer: nn.TransformerEncoderLayer, attention: nn.Module | None) -> None:
    """Keep an encoder layer from its fused operation, which takes the weights of both branches.

    Args:
        layer: which asks these attributes whether it may.
        attention: its substitute, if attention was skipped.
    """
    layer.activation_relu_or_gelu = 0
    if attention is not None:
        attention.register_parameter("in_proj_bias", None)


def groups_left(groups: Sequence[ChannelGroup], plan: Plan, blocks: Sequence[Block]) -> tuple[ChannelGroup, ...]:
    """Describe the groups without the slots that the skipped blocks of a plan take with them.

    A group whose slots all go is gone; `plan` may still name it.
    """
    gone = tensors_of(blocks, plan.skipped)
    if not gone:
        return tuple(groups)
    modules = [one.module for one in replacements_of(blocks, plan.skipped)]
    left = [
        replace(
            group,
            slots=tuple(slot for slot in group.slots if slot.tensor not in gone),
            fixed_outputs=tuple(
                one for one in group.fixed_outputs if not any(is_inside(one.module, name) for name in modules)
            ),
        )
        for group in groups
    ]
    return tuple(group for group in left if group.slots)
