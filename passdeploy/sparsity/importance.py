"""How much the loss feels every channel, measured while masks are learned.

The slope of the loss by a gate on a channel is a by-product of every step. Its running square is the score of
Molchanov et al. (arXiv:1906.10771, eq. 8), of the network as it is at that moment instead of the dense one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from passdeploy.channels.plan import Plan

_GONE = 14.0  # what a channel that is gone loses, in logits: a factor of a million


class TaylorImportance:
    """Running average of the squared slope of a gate on every channel.

    Args:
        start: group name -> the first scores, shape (width,).
        memory: weight of the past in each step's average, in [0, 1); 1 keeps the first scores.
    """

    def __init__(self, start: Mapping[str, Tensor], memory: float) -> None:
        self.scores = {name: values.clone() for name, values in start.items()}
        self.is_kept = {name: torch.ones_like(values, dtype=torch.bool) for name, values in start.items()}
        self.memory = memory

    def keep_(self, plan: Plan) -> None:
        """Remember which channels the masks leave; the others feel nothing and keep the scores they had."""
        for name, kept in plan.kept.items():
            self.is_kept[name].zero_()
            self.is_kept[name][list(kept)] = True

    def update_(self, gate_gradients: Mapping[str, Tensor]) -> None:
        """Take in one step: group name -> slope of the loss by each gate, shape (width,)."""
        for name, slope in gate_gradients.items():
            fresh = torch.lerp(slope.square(), self.scores[name], self.memory)
            self.scores[name] = torch.where(self.is_kept[name], fresh, self.scores[name])

    def logits(self) -> dict[str, Tensor]:
        """Group name -> logits whose sigmoid is nearly proportional to the scores, on one scale for all groups.

        Those of channels that are gone are far lower.
        """
        largest = torch.stack([values.max() for values in self.scores.values()]).max().clamp_min(1e-30)
        return {
            name: (values / largest).clamp_min(1e-9).log() - 2.0 - _GONE * ~self.is_kept[name]
            for name, values in self.scores.items()
        }

    def take_over_(self, logits: Sequence[Tensor]) -> None:
        """Go on from the logits of an earlier measurement, one tensor per group; all channels are there again."""
        for name, values in zip(self.scores, logits, strict=True):
            self.scores[name] = (values + 2.0).exp()
