"""Co-trained weights: a copy of the network that takes one optimiser step for every step of mask learning.

With frozen weights, masks are compared by the loss of the network as it is, and the channels with the lowest loss then
are not those with which fine-tuning ends best. With co-trained weights, masks are compared while training goes on.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from passdeploy.channels.blocks import Block
from passdeploy.channels.groups import ChannelGroup
from passdeploy.channels.plan import Plan
from passdeploy.models.cloning import deep_copy
from passdeploy.slimming.slim import slim
from passdeploy.slimming.tensors import cut_tensors, removed_indices
from passdeploy.training.optimizers import load_optimizer_tensors_, make_optimizer, optimizer_tensors
from passdeploy.training.saving import named, prefixed

if TYPE_CHECKING:
    from passdeploy.recipe import OptimizerSpec

_WARMUP_STEPS = 10


class CoTrainedWeights:
    """Copy of a network, and the optimiser of its weights.

    Args:
        model: the network; it is left as it was. Parameters that do not require a gradient stay frozen in the copy.
        spec: of the optimiser, at a constant rate after a short warm-up: a rate that falls would end training before
            the last channel is removed.
    """

    def __init__(self, model: nn.Module, spec: OptimizerSpec) -> None:
        self.network, self._spec = deep_copy(model), spec
        self.optimizer = make_optimizer(self.network, spec)

    @property
    def parameters(self) -> list[nn.Parameter]:
        """Parameters that are trained."""
        return [parameter for parameter in self.network.parameters() if parameter.requires_grad]

    def averages(self, parameter: Tensor) -> list[Tensor]:
        """Return the optimiser state of a parameter in its shape: momentum, squared gradients."""
        state = self.optimizer.state.get(parameter, {}).values()
        return [value for value in state if isinstance(value, Tensor) and value.shape == parameter.shape]

    def slim_(self, groups: Sequence[ChannelGroup], plan: Plan, blocks: Sequence[Block] = ()) -> None:
        """Slim the copy, and the optimiser state of its parameters (momentum, squared gradients) in the same way."""
        smaller = slim(self.network, groups, plan, blocks)
        optimizer = make_optimizer(smaller, self._spec)
        new, averages = dict(smaller.named_parameters()), dict[str, dict[str, Tensor]]()  # state key -> name -> tensor
        for name, parameter in self.network.named_parameters():
            if name not in new:  # of a block that is skipped
                continue
            for key, value in self.optimizer.state.get(parameter, {}).items():
                if isinstance(value, Tensor) and value.shape == parameter.shape:
                    averages.setdefault(key, {})[name] = value
                else:  # a count of steps
                    optimizer.state[new[name]][key] = value
        for key, tensors in averages.items():
            for name, value in cut_tensors(tensors, removed_indices(groups, plan)).items():
                optimizer.state[new[name]][key] = value
        self.network, self.optimizer = smaller, optimizer

    def state_dict(self) -> dict[str, Tensor]:
        """Return the weights and their optimiser state; what `slim_` cut is not there."""
        weights = dict(self.network.named_parameters())
        return prefixed("weights", weights) | prefixed("optimizer", optimizer_tensors(self.optimizer))

    @torch.no_grad()
    def load_state_dict(self, tensors: Mapping[str, Tensor]) -> None:
        """Load what `state_dict` returned into a copy that was slimmed in the same way."""
        saved = named(tensors, "weights")
        for name, parameter in self.network.named_parameters():
            parameter.copy_(saved[name])
        load_optimizer_tensors_(self.optimizer, named(tensors, "optimizer"))

    def set_lr_(self, step: int) -> None:
        """Set the learning rate of a step, counted from 0."""
        for group in self.optimizer.param_groups:
            group["lr"] = self._spec.lr * min(1.0, (step + 1) / _WARMUP_STEPS)
