"""What a batch teaches: labels, a teacher's answers, and blends of images with blends of labels.

Sources: knowledge distillation, Hinton, Vinyals and Dean (arXiv:1503.02531); mixup, Zhang et al. (arXiv:1710.09412);
CutMix, Yun et al. (arXiv:1905.04899).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from passdeploy.training.mixing import Blend

if TYPE_CHECKING:
    from passdeploy.recipe import DistillSpec


@dataclass(frozen=True)
class TrainingLoss:
    """What a batch teaches: the labels, and with a teacher also its answers."""

    label_smoothing: float = 0.0
    teacher: nn.Module | None = None
    distill: DistillSpec | None = None

    def loss(self, logits: Tensor, images: Tensor, labels: Tensor | Blend) -> Tensor:
        """The scalar to minimise.

        Args:
            logits: (batch, classes).
            images: what the teacher is asked about.
            labels: (batch,) class numbers, or those of a blend.
        """
        truth = self._truth(logits, labels)
        if self.teacher is None or self.distill is None:
            return truth
        asked = DistillationLoss(self.teacher, self.distill.alpha, self.distill.temperature, self.distill.only_better)
        return asked.loss(truth, logits, images, lambda scores: self._truth(scores, labels, reduction="none"))

    def _truth(self, logits: Tensor, labels: Tensor | Blend, *, reduction: str = "mean") -> Tensor:
        """The loss from the labels: the mean over the batch, or (`none`) of every image."""
        if isinstance(labels, Blend):
            first, other = (self._truth(logits, part, reduction=reduction) for part in (labels.labels, labels.others))
            return labels.share * first + (1 - labels.share) * other
        return F.cross_entropy(logits, labels, label_smoothing=self.label_smoothing, reduction=reduction)


@dataclass(frozen=True)
class DistillationLoss:
    """A teacher's answers as a share of a loss."""

    teacher: nn.Module  # of class scores, in evaluation mode
    alpha: float = 0.5  # the teacher's share; the labels have the rest
    temperature: float = 4.0  # divides the scores of both before they are compared
    only_better: bool = False  # the teacher counts only for images on which its own loss is the lower one

    def loss(self, truth: Tensor, logits: Tensor, images: Tensor, each: Callable[[Tensor], Tensor]) -> Tensor:
        """`truth`, of which the teacher's share is replaced by the divergence from its softened answers.

        Args:
            truth: the loss from the labels, a scalar.
            logits: the student's, (batch, classes).
            images: what the teacher is asked about.
            each: class scores -> their loss from the labels, of every image, (batch,); for `only_better`, where the
                labels take the teacher's share of the images that it has nothing to teach about.
        """
        with torch.no_grad():
            answers = logits_of(self.teacher(images))
        # soft gradients shrink with the square of the temperature (Hinton et al., section 2)
        soft, wanted = (F.log_softmax(scores / self.temperature, dim=1) for scores in (logits, answers))
        taught = self.temperature**2 * F.kl_div(soft, wanted, reduction="none", log_target=True).sum(1)
        if self.only_better:
            own, theirs = each(logits), each(answers)
            taught = torch.where(theirs < own.detach(), taught, own)
        return (1 - self.alpha) * truth + self.alpha * taught.mean()


def logits_of(output: Any) -> Tensor:
    """The class scores (batch, classes); in training GoogLeNet and Inception return more after them."""
    logits: Tensor = output if isinstance(output, Tensor) else output[0]
    return logits
