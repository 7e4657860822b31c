"""Masks on weights: W_hat = M(i-1) * W * M(i), with a gradient that reaches the scores.

Source: Huang et al., PASS (arXiv:2407.17412), section 3. A mask has one entry per channel of a group and multiplies
every slice that the group owns in every parameter, so producers, consumers and all between are cut together.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from passdeploy.channels.groups import ChannelGroup, Slot


def straight_through(mask: Tensor, score: Tensor) -> Tensor:
    """The hard `mask` (0 or 1) forward, the gradient of `score` backward (Bengio et al., arXiv:1308.3432)."""
    return mask + score - score.detach()


class MaskedWeights:
    """The parameters of a network, multiplied by masks.

    Args:
        model: the network; its parameters are read at every call and never written.
        groups: the groups that masks are given for.
        reads_only: mask only the weight slices that read a channel. The function is the same, since nothing else sees
            the channel, but the gradient of a mask is then that of one gate on the channel.
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
        index: dict[tuple[str, int, bool], Tensor] = {}  # which entry of all masks, end to end, cuts which place
        start = 0
        for group in groups:
            reading = {id(slot) for slot in _read_slots(group)}
            for slot in group.slots:
                is_read = id(slot) in reading
                if slot.tensor in self._parameters and (is_read or not reads_only):
                    # Place `total` holds the constant 1 for channels that no mask is given for.
                    size = self._parameters[slot.tensor].size(slot.dim)
                    places = index.setdefault((slot.tensor, slot.dim, is_read), torch.full((size,), total))
                    places[slot.index] = torch.arange(start, start + group.width)[:, None].expand_as(slot.index)
            start += group.width
        self._index = {key: places.to(device) for key, places in index.items()}

    def __call__(self, masks: Mapping[str, Tensor], gates: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        """Name -> parameter, those that a mask touches multiplied by it.

        Args:
            masks: group name -> (width,).
            gates: the same values once more, for the slices that read a channel: the gradient of a gate is then that
                of one factor on the channel, whatever else its mask touches. None: the masks.
        """
        weights = dict(self._parameters)
        for name, scale in self._scales(self._laid_out(masks), self._laid_out(gates or masks)).items():
            weights[name] = weights[name] * scale
        return weights

    def existing(self, masks: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> list[tuple[Tensor, Tensor]]:
        """Each masked weight of a call, with what of it exists: bool of its shape, as `RestrictedNorms` takes it."""
        laid_out = self._laid_out(masks).detach()
        return [
            (weights[name], (scale > 0.5).expand_as(weights[name]))
            for name, scale in self._scales(laid_out, laid_out).items()
        ]

    def _laid_out(self, masks: Mapping[str, Tensor]) -> Tensor:
        return torch.cat([*(masks[name] for name in self.names), next(iter(masks.values())).new_ones(1)])

    def _scales(self, masks: Tensor, gates: Tensor) -> dict[str, Tensor]:
        scales: dict[str, Tensor] = {}
        for (name, dim, is_read), places in self._index.items():
            shape = [1] * self._parameters[name].ndim
            shape[dim] = -1
            along = (gates if is_read else masks)[places].view(shape)
            scales[name] = scales[name] * along if name in scales else along
        return scales


def run_with(model: nn.Module, weights: Mapping[str, Tensor], images: Tensor) -> Any:
    """The output of `model` with `weights` in place of its parameters, differentiable in both."""
    return torch.func.functional_call(model, dict(weights), (images,))


def _read_slots(group: ChannelGroup) -> Sequence[Slot]:
    """The slices that read a group; where nothing does (queries and keys), those that make it."""
    return [slot for slot in group.slots if slot.is_input] or group.slots


def batch_statistics_only(model: nn.Module) -> nn.Module:
    """A copy of `model` in evaluation mode whose batch norms use, and never store, the statistics of the batch.

    Parameters are shared with `model`, not copied. With the running statistics of the dense network, masks would be
    judged by how well they keep those instead of by what the network can do without them.
    """
    shared = {id(parameter): parameter for parameter in model.parameters()}
    learner = copy.deepcopy(model, shared).eval()
    for module in learner.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.train()
            module.momentum = 0.0
    return learner
