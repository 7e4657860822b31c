"""Masks on weights, W_hat = M(i-1) * W * M(i), with straight-through gradients to the channel scores.

Source: Huang et al., PASS (arXiv:2407.17412), section 3. A mask has one entry per channel of a group and multiplies
every slice that the group owns in every parameter: those of producers, of consumers and of all layers between them.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from passdeploy.channels.groups import ChannelGroup, Slot


def straight_through(mask: Tensor, score: Tensor) -> Tensor:
    """Return the values of `mask` (0 or 1) with the gradient of `score` (Bengio et al., arXiv:1308.3432)."""
    return mask + score - score.detach()


class MaskedWeights:
    """Parameters of a network, multiplied by masks.

    Args:
        model: the network; its parameters are read at every call and never written.
        groups: the groups that masks are given for.
        reads_only: mask only the weight slices that read a channel. The network computes the same, since nothing else
            reads the channel, but the gradient of a mask is then that of one gate on the channel.
        is_trained: gradients reach the parameters too; otherwise they are frozen.
    """

    def __init__(
        self,
        model: nn.Module,
        groups: Sequence[ChannelGroup],
        *,
        reads_only: bool = False,
        is_trained: bool = False,
    ) -> None:
        self.names = tuple(group.name for group in groups)
        self._parameters = {
            name: tensor if is_trained else tensor.detach() for name, tensor in model.named_parameters()
        }
        device = next(iter(self._parameters.values())).device
        total = sum(group.width for group in groups)
        # For every index along (parameter, dim): the entry of all concatenated masks that it is multiplied by.
        index: dict[tuple[str, int, bool], Tensor] = {}
        start = 0
        for group in groups:
            reading = {id(slot) for slot in _read_slots(group)}
            for slot in group.slots:
                is_read = id(slot) in reading
                if slot.tensor in self._parameters and (is_read or not reads_only):
                    # Entry `total` is the constant 1, for channels that no mask is given for.
                    size = self._parameters[slot.tensor].size(slot.dim)
                    entries = index.setdefault((slot.tensor, slot.dim, is_read), torch.full((size,), total))
                    entries[slot.index] = torch.arange(start, start + group.width)[:, None].expand_as(slot.index)
            start += group.width
        self._index = {key: entries.to(device) for key, entries in index.items()}

    def __call__(self, masks: Mapping[str, Tensor], gates: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        """Multiply the parameters by masks; return all of them by name.

        Args:
            masks: group name -> (width,).
            gates: the same values once more, for the slices that read a channel: the gradient of a gate is then that
                of one factor on the channel, without the other slices that its mask multiplies. None: the masks.
        """
        weights = dict(self._parameters)
        for name, scale in self._scales(self._concatenated(masks), self._concatenated(gates or masks)).items():
            weights[name] = weights[name] * scale
        return weights

    def kept_masks(self, masks: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> list[tuple[Tensor, Tensor]]:
        """Pair each masked weight of a call with a bool mask of its shape that is true on kept channels.

        `RestrictedNorms` takes these pairs.
        """
        entries = self._concatenated(masks).detach()
        return [
            (weights[name], (scale > 0.5).expand_as(weights[name]))
            for name, scale in self._scales(entries, entries).items()
        ]

    def _concatenated(self, masks: Mapping[str, Tensor]) -> Tensor:
        """Concatenate the masks of all groups and a 1, shape (sum of widths + 1,)."""
        return torch.cat([*(masks[name] for name in self.names), next(iter(masks.values())).new_ones(1)])

    def _scales(self, masks: Tensor, gates: Tensor) -> dict[str, Tensor]:
        """Compute the factor of every masked parameter, in a shape that broadcasts to it."""
        scales: dict[str, Tensor] = {}
        for (name, dim, is_read), entries in self._index.items():
            shape = [1] * self._parameters[name].ndim
            shape[dim] = -1
            factor = (gates if is_read else masks)[entries].view(shape)
            scales[name] = scales[name] * factor if name in scales else factor
        return scales


def run_with(model: nn.Module, weights: Mapping[str, Tensor], images: Tensor) -> Any:
    """Run `model` with `weights` in place of its parameters; the output is differentiable in weights and images."""
    return torch.func.functional_call(model, dict(weights), (images,))


def _read_slots(group: ChannelGroup) -> Sequence[Slot]:
    """Return the slices that read a group; for groups that none reads (queries and keys), those that produce it."""
    return [slot for slot in group.slots if slot.is_input] or group.slots


def batch_statistics_only(model: nn.Module) -> nn.Module:
    """Copy `model` in evaluation mode, with batch norms that use the statistics of the batch and do not store them.

    Parameters are shared with `model`, not copied. With the running statistics of the dense network, the loss would
    favour masks that keep those statistics, though they are measured again after slimming.
    """
    shared = {id(parameter): parameter for parameter in model.parameters()}
    evaluated = copy.deepcopy(model, shared).eval()
    for module in evaluated.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.train()
            module.momentum = 0.0
    return evaluated
