"""Masks on weights, W_hat = M(i-1) * W * M(i), and the gradients of a loss by them.

Source: Huang et al., PASS (arXiv:2407.17412), section 3. A mask has one entry per channel of a group and multiplies
every slice that the group owns in every parameter: those of producers, of consumers and of all layers between them. A
gate multiplies the slices that read the channel, and no others.

A removed channel never comes back. So its slices are set to zero once, when it is removed, and nothing is multiplied in
the steps that follow: all gradients by a channel whose slices are zero are zero. Where a mask is 1, the gradient by it
is the sum of weight times gradient over the slices that it would multiply, all of them known after the backward pass.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from passdeploy.channels.groups import ChannelGroup, Slot
from passdeploy.models.cloning import deep_copy
from passdeploy.models.modes import train_without_chance_


class ChannelGradients:
    """Gradients of a loss by masks and by gates of 1 on all channels, from its gradients by the parameters.

    Args:
        parameters: of the network, by name; their values are read at every call.
        groups: of that network.
        columns: place of every channel in the results, shape (channels of all groups,).
        total: size of the results; places that `columns` does not name are zero.
    """

    def __init__(
        self, parameters: Mapping[str, Tensor], groups: Sequence[ChannelGroup], columns: Tensor, total: int
    ) -> None:
        # For every index along (parameter, dim): the entry of (masks, gates, nothing) that it counts for.
        entries: dict[tuple[str, int, bool], Tensor] = {}
        start = 0
        for group in groups:
            own = columns[start : start + group.width, None]
            reading = {id(slot) for slot in _read_slots(group)}
            for slot in group.slots:
                if slot.tensor in parameters:
                    is_read = id(slot) in reading
                    nothing = torch.full((parameters[slot.tensor].size(slot.dim),), 2 * total)
                    of_dim = entries.setdefault((slot.tensor, slot.dim, is_read), nothing)
                    of_dim[slot.index] = (own + total if is_read else own).expand_as(slot.index)
            start += group.width
        names = [*dict.fromkeys(name for name, _, _ in entries)]
        self.parameters = [parameters[name] for name in names]
        self._sums = [(names.index(name), dim) for name, dim, _ in entries]
        self._entries = torch.cat([*entries.values()]).to(self.parameters[0].device)
        self._total = total

    @torch.no_grad()
    def __call__(self, gradients: Sequence[Tensor | None]) -> tuple[Tensor, Tensor]:
        """Compute the gradients by masks and those by gates, each (total,).

        Args:
            gradients: of the loss by each of `parameters`; None counts as zero.
        """
        given = [torch.zeros_like(p) if g is None else g for p, g in zip(self.parameters, gradients, strict=True)]
        products = torch._foreach_mul(given, self.parameters)
        along = {key: _sum_except(products[key[0]], key[1]) for key in dict.fromkeys(self._sums)}
        values = torch.cat([along[key] for key in self._sums])
        # Equal entries are added in a fixed order, also on a GPU; `index_add_` would use atomics there.
        sums = values.new_zeros(2 * self._total + 1).index_put_((self._entries,), values, accumulate=True)
        others, gates = sums[: self._total], sums[self._total : -1]
        return others + gates, gates


def _sum_except(tensor: Tensor, dim: int) -> Tensor:
    """Sum over all dimensions but one."""
    others = [each for each in range(tensor.ndim) if each != dim]
    return tensor.sum(others) if others else tensor


def _read_slots(group: ChannelGroup) -> Sequence[Slot]:
    """Return the slices that read a group; for groups that none reads (queries and keys), those that produce it."""
    return [slot for slot in group.slots if slot.is_input] or group.slots


def producing_slots(group: ChannelGroup, tensors: Mapping[str, Tensor]) -> list[Slot]:
    """Return the slices of weights, of two or more dimensions, that produce a group; without any, those that read it.

    Args:
        group: of a network.
        tensors: parameters and buffers of that network, by name.
    """
    slots = [slot for slot in group.slots if slot.tensor in tensors and tensors[slot.tensor].ndim > 1]
    return [slot for slot in slots if slot.is_output] or slots


def batch_statistics_only(model: nn.Module, *, training: bool = False) -> nn.Module:
    """Copy `model` in evaluation mode, with batch norms that use the statistics of the batch and do not store them.

    The memory of parameters is shared with `model`. Parameters that require a gradient are the same objects; the others
    are not, and require one in the copy. With the running statistics of the dense network, the loss would favour masks
    that keep those statistics, though they are measured again after slimming.

    Args:
        model: the network.
        training: set all other modules to training mode as well, but for those that drop something at random.
    """
    shared = {id(p): p if p.requires_grad else nn.Parameter(p.detach()) for p in model.parameters()}
    evaluated = deep_copy(model, shared).eval()
    if training:
        train_without_chance_(evaluated)
    for module in evaluated.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.train()
            module.momentum = 0.0
    return evaluated
