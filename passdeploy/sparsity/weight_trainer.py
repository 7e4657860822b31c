"""Weights that learn while masks are learned, so that a mask is judged by what training can still do without a channel.

With frozen weights a mask is judged by what the network can do at once, and the channels that are best at that are not
those that fine-tuning needs. Here a copy of the network takes a step of its own beside every step of the masks.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor, nn

from passdeploy.channels.groups import ChannelGroup
from passdeploy.channels.plan import Plan
from passdeploy.slimming.slim import slim
from passdeploy.slimming.tensors import cut_tensors, removed_places
from passdeploy.training.optimizers import make_optimizer

if TYPE_CHECKING:
    from passdeploy.recipe import OptimizerSpec

WARMUP_STEPS = 10


class CoTrainedWeights:
    """A copy of a network, and what moves its weights.

    Args:
        model: the network; it is left as it was. Parameters that do not require a gradient stay in the copy too.
        spec: optimizer of the copy, at a constant rate after a short warm-up: the network must not settle before the
            last channel has gone.
    """

    def __init__(self, model: nn.Module, spec: OptimizerSpec) -> None:
        self.network, self._spec = copy.deepcopy(model), spec
        self._optimizer = make_optimizer(self.network, spec)

    @property
    def parameters(self) -> list[nn.Parameter]:
        """What learns."""
        return [parameter for parameter in self.network.parameters() if parameter.requires_grad]

    def cut_(self, groups: Sequence[ChannelGroup], plan: Plan) -> None:
        """Slim the copy, and what the optimizer knows of its parameters (averages of gradients) with them."""
        smaller = slim(self.network, groups, plan)
        optimizer = make_optimizer(smaller, self._spec)
        new, averages = dict(smaller.named_parameters()), dict[str, dict[str, Tensor]]()
        for name, parameter in self.network.named_parameters():
            for key, value in self._optimizer.state.get(parameter, {}).items():
                if isinstance(value, Tensor) and value.shape == parameter.shape:
                    averages.setdefault(key, {})[name] = value
                else:  # a count of steps
                    optimizer.state[new[name]][key] = value
        for key, tensors in averages.items():
            for name, value in cut_tensors(tensors, removed_places(groups, plan)).items():
                optimizer.state[new[name]][key] = value
        self.network, self._optimizer = smaller, optimizer

    def forget_(self) -> None:
        """Drop the gradients of the step before."""
        self._optimizer.zero_grad(set_to_none=True)

    def step_(self, step: int) -> None:
        """Move the weights along their gradients; steps count from 0."""
        for group in self._optimizer.param_groups:
            group["lr"] = self._spec.lr * min(1.0, (step + 1) / WARMUP_STEPS)
        self._optimizer.step()

    def has_numbers(self) -> bool:
        """Whether every parameter is finite."""
        return all(bool(parameter.isfinite().all()) for parameter in self.parameters)
