"""Taylor importance of every channel, measured while masks are learned.

The gradient of the loss by a gate on a channel is a by-product of every step. The running average of its square is the
importance of Molchanov et al. (arXiv:1906.10771, eq. 8), here of the network at that step instead of the dense one.
"""

from __future__ import annotations

import torch
from torch import Tensor

_REMOVED_LOGITS = 14.0  # subtracted from the logits of a removed channel: a factor of a million


class TaylorImportance:
    """Running average of the squared gradient of a gate on every channel.

    Args:
        start: the first importance, shape (channels of all groups,).
        memory: weight of the past in each step's average, in [0, 1); 1 keeps the first importance.
    """

    def __init__(self, start: Tensor, memory: float) -> None:
        self.scores = start.clone()
        self.is_kept = torch.ones_like(start, dtype=torch.bool)
        self.memory = memory

    def set_kept_(self, mask: Tensor) -> None:
        """Set the channels that masks keep; all others have no gradient and keep the importance they had."""
        self.is_kept.copy_(mask)

    def update_(self, gate_gradients: Tensor) -> None:
        """Average one step in: the gradient of the loss by each gate, in the shape of the scores."""
        averaged = torch.lerp(gate_gradients.to(self.scores.dtype).square(), self.scores, self.memory)
        self.scores = torch.where(self.is_kept, averaged, self.scores)

    def logits(self) -> Tensor:
        """Compute logits whose sigmoid is nearly proportional to the importance, on one scale for all groups.

        Those of removed channels are far lower.
        """
        largest = self.scores.max().clamp_min(1e-30)
        return (self.scores / largest).clamp_min(1e-9).log() - 2.0 - _REMOVED_LOGITS * ~self.is_kept

    def load_logits_(self, logits: Tensor) -> None:
        """Continue from logits of an earlier run."""
        self.scores = (logits + 2.0).exp()
