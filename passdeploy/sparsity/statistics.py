"""Numbers that describe a network's weights, and the mode a network is in while masks are learned."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from passdeploy.channels.groups import ChannelGroup


def weight_statistics(model: nn.Module, groups: Sequence[ChannelGroup]) -> list[Tensor]:
    """Per group, the standardised log-norm of each channel's filters, shape (width,).

    The input of the hypernetwork (PASS, arXiv:2407.17412, section 3: an embedding of weight statistics).
    """
    state = dict(model.named_parameters())
    statistics = []
    for group in groups:
        logs = []
        for slot in group.slots:
            if slot.is_output and slot.tensor in state:
                weight = state[slot.tensor].detach().float()
                norm = weight.movedim(slot.dim, 0).flatten(1).norm(dim=1)[slot.index.to(weight.device)].norm(dim=1)
                logs.append(norm.clamp_min(1e-12).log())
        values = torch.stack(logs).mean(0)
        statistics.append((values - values.mean()) / values.std(unbiased=False).clamp_min(1e-6))
    return statistics


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
