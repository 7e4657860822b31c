"""Taylor importance of every channel, measured while masks are learned.

The gradient of the loss by a gate on a channel is a by-product of every step. The running average of its square is the
importance of Molchanov et al. (arXiv:1906.10771, eq. 8), here of the network at that step instead of the dense one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from passdeploy.channels.plan import Plan

_REMOVED_LOGITS = 14.0  # subtracted from the logits of a removed channel: a factor of a million


class TaylorImportance:
    """Running average of the squared gradient of a gate on every channel.

    Args:
        start: group name -> the first importance, shape (width,).
        memory: weight of the past in each step's average, in [0, 1); 1 keeps the first importance.
    """

    def __init__(self, start: Mapping[str, Tensor], memory: float) -> None:
        self.scores = {name: values.clone() for name, values in start.items()}
        self.is_kept = {name: torch.ones_like(values, dtype=torch.bool) for name, values in start.items()}
        self.memory = memory

    def set_kept_(self, plan: Plan) -> None:
        """Set the channels that masks keep; all others have no gradient and keep the importance they had."""
        for name, kept in plan.kept.items():
            self.is_kept[name].zero_()
            self.is_kept[name][list(kept)] = True

    def update_(self, gate_gradients: Mapping[str, Tensor]) -> None:
        """Average one step in: group name -> gradient of the loss by each gate, shape (width,)."""
        for name, gradient in gate_gradients.items():
            averaged = torch.lerp(gradient.square(), self.scores[name], self.memory)
            self.scores[name] = torch.where(self.is_kept[name], averaged, self.scores[name])

    def logits(self) -> dict[str, Tensor]:
        """Compute group name -> logits whose sigmoid is nearly proportional to the importance, on one scale for all.

        Those of removed channels are far lower.
        """
        largest = torch.stack([values.max() for values in self.scores.values()]).max().clamp_min(1e-30)
        return {
            name: (values / largest).clamp_min(1e-9).log() - 2.0 - _REMOVED_LOGITS * ~self.is_kept[name]
            for name, values in self.scores.items()
        }

    def load_logits_(self, logits: Sequence[Tensor]) -> None:
        """Continue from logits of an earlier run, one tensor (width,) per group, in the order of the groups."""
        for name, values in zip(self.scores, logits, strict=True):
            self.scores[name] = (values + 2.0).exp()
