"""Weights that learn while masks are learned, so that a mask is judged by what training can still do without a channel.

With frozen weights a mask is judged by what the network can do at once, and the channels that are best at that are not
those that fine-tuning needs. Here a copy of the network takes a step of its own beside every step of the masks.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

from torch import nn

from passdeploy.optimizers import make_optimizer

if TYPE_CHECKING:
    from passdeploy.recipe import OptimizerSpec

WARMUP_STEPS = 10


class Rehearsal:
    """A copy of a network, and what moves its weights.

    Args:
        model: the network; it is left as it was. Parameters that do not require a gradient stay in the copy too.
        spec: optimizer of the copy, at a constant rate after a short warm-up: the network must not settle before the
            last channel has gone.
    """

    def __init__(self, model: nn.Module, spec: OptimizerSpec) -> None:
        self.network = copy.deepcopy(model)
        self.parameters = [parameter for parameter in self.network.parameters() if parameter.requires_grad]
        self._optimizer, self._lr = make_optimizer(self.network, spec), spec.lr

    def forget_(self) -> None:
        """Drop the gradients of the step before."""
        self._optimizer.zero_grad(set_to_none=True)

    def step_(self, step: int) -> None:
        """Move the weights along their gradients; steps count from 0."""
        for group in self._optimizer.param_groups:
            group["lr"] = self._lr * min(1.0, (step + 1) / WARMUP_STEPS)
        self._optimizer.step()

    def has_numbers(self) -> bool:
        """Whether every parameter is finite."""
        return all(bool(parameter.isfinite().all()) for parameter in self.parameters)
