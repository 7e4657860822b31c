"""Losses for which the user's own code runs the network, as detectors and the trainers of other packages want it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from passdeploy.errors import TrainingError


@dataclass(frozen=True)
class BatchLoss:
    """A loss of a network and a batch of any form, such as `BatchLoss(lambda network, batch: network(**batch).loss)`.

    `learn_masks` and `prune` take it in place of a loss of outputs and targets. The network that it is given is in
    training mode, but for dropout: detectors compute their losses only then.

    Args:
        function: (network, batch) -> loss, a mean over the batch; it runs the network that it is given.
    """

    function: Callable[[nn.Module, Any], Tensor]

    def __call__(self, network: nn.Module, batch: Any) -> Tensor:
        """Compute the loss of a batch.

        Raises:
            TrainingError: the function returned no scalar that has a gradient.
        """
        loss = self.function(network, batch)
        if not isinstance(loss, Tensor) or loss.numel() != 1 or not loss.requires_grad:
            found = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
            raise TrainingError(
                f"the function of BatchLoss returned {found}{'' if _has_gradient(loss) else ' without a gradient'}.\n"
                "Let it run the network that it is given and return one number, such as the sum of its losses."
            )
        return loss.reshape(())


def _has_gradient(value: Any) -> bool:
    return isinstance(value, Tensor) and value.requires_grad
